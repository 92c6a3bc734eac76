#!/usr/bin/env python3
"""Makes crates/models/tests/golden/checkpoints: files that torch.save wrote, and what networks with
the weights of others compute.

The small files are real ones, of every form that is read: today's archive and the format before
PyTorch 1.6, nested, wrapped, with views, halves and shared storages, and some that must be refused.
The networks (nets.safetensors) have the names of torchvision and of the authors' code
(jiangtaoxie/fast-MPN-COV); their weights follow from names as in torchvision_nets.py, and the test
writes them to a `.pth` itself. Kept are logits in evaluation and in training, and two numbers for
the gradient of each parameter in both.

    python3 tools/golden/checkpoints.py

Needs torch, torchvision, numpy and safetensors.
"""

import argparse
import collections
import hashlib
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import alexnet, resnet, vgg
from torchvision_nets import uniform

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/models/tests/golden/checkpoints"
CLASSES = 5


class Isqrt(nn.Module):
    """Covariance, five Newton-Schulz steps after trace normalisation, a triangle."""

    def __init__(self, lower):
        super().__init__()
        self.lower = lower

    def forward(self, x):
        b, d = x.shape[:2]
        x = x.reshape(b, d, -1)
        x = x - x.mean(2, keepdim=True)
        sigma = x @ x.transpose(1, 2) / x.shape[2]
        trace = sigma.diagonal(dim1=1, dim2=2).sum(1).reshape(b, 1, 1)
        eye = torch.eye(d, dtype=x.dtype)
        y, z = sigma / trace, eye.expand(b, d, d)
        for _ in range(5):
            t = 0.5 * (3.0 * eye - z @ y)
            y, z = y @ t, t @ z
        c = trace.sqrt() * y
        rows, columns = torch.tril_indices(d, d) if self.lower else torch.triu_indices(d, d)
        return c[:, rows, columns]


class Released(nn.Module):
    """mpncovresnet50: names of the released weights, triangle by rows of the lower half."""

    def __init__(self, net):
        super().__init__()
        for name, child in net.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)
        block = self.layer4[0]
        block.conv2.stride = block.downsample[0].stride = (1, 1)
        self.layer_reduce = nn.Conv2d(2048, 32, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 33 // 2, CLASSES)
        self.pool = Isqrt(lower=True)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(torch.relu(self.layer_reduce_bn(self.layer_reduce(x)))))


class Reduce(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(512, 32, 1, bias=False)
        self.conv_dr_block = nn.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU())
        self.pool = Isqrt(lower=False)

    def forward(self, x):
        return self.pool(self.conv_dr_block(x))


class Vgg(nn.Module):
    """mpncovvgg16_bn, with hidden layers of 64 and without dropout."""

    def __init__(self):
        super().__init__()
        self.features = vgg.vgg16_bn().features[:-1]
        self.representation = Reduce()
        relu, drop = nn.ReLU(), nn.Dropout(0.0)
        layers = [nn.Linear(528, 64), relu, drop, nn.Linear(64, 64), relu, drop]
        self.classifier = nn.Sequential(*layers, nn.Linear(64, CLASSES))

    def forward(self, x):
        return self.classifier(self.representation(self.features(x)))


def small_alexnet():
    net = alexnet(num_classes=CLASSES, dropout=0.0)
    net.classifier[1] = nn.Linear(256 * 36, 64)
    net.classifier[4] = nn.Linear(64, 64)
    net.classifier[6] = nn.Linear(64, CLASSES)
    return net


def fill(net):
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue
        values = uniform(name, tensor.shape)
        if tensor.dim() > 1:
            values = values * (3.0 / tensor[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var")):
            values = 1.0 + 0.25 * values
        else:
            values = 0.25 * values
        # As the file has them.
        tensor.data = values.float().double()


def networks():
    nets = {
        "resnet50": (resnet.resnet50(num_classes=CLASSES), (64, 96)),
        "mpncovresnet50": (Released(resnet.resnet50()), (64, 96)),
        "mpncovvgg16_bn": (Vgg(), (64, 96)),
        "alexnet": (small_alexnet(), (96, 96)),
    }
    out = {}
    for key, (net, (height, width)) in nets.items():
        net = net.double()
        fill(net)
        x = uniform("images", (2, 3, height, width))
        # Training last, since it changes the running statistics.
        for kind in ("eval", "train"):
            net.train(kind == "train")
            logits = net(x)
            out[f"{key}.{kind}"] = logits.detach()
            loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
            net.zero_grad()
            loss.backward()
            for name, tensor in net.named_parameters():
                probe = (tensor.grad * uniform(f"{name}.probe", tensor.shape)).sum()
                out[f"{key}.{kind}.gradient.{name}"] = torch.stack([tensor.grad.norm(), probe])
            print(key, kind, sum(p.numel() for p in net.parameters()), "parameters, loss", loss.item())
    return out


def files():
    torch.manual_seed(1)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    plain = collections.OrderedDict()
    plain["a.weight"] = base.clone()
    plain["a.bias"] = torch.tensor([0.5, -0.25, 2.0, 8.0])
    plain["a.num_batches_tracked"] = torch.tensor(7)
    torch.save(plain, TARGET / "archive.pth")
    # A name of 21 characters, which zip readers have been seen to stumble over.
    torch.save(plain, TARGET / "archive21_characters_.pth")
    torch.save(plain, TARGET / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(plain, TARGET / "protocol4.pth", pickle_protocol=4)

    # A transposed view, two views of one storage, other element types, parameters, an empty one.
    forms = {
        "transposed": base.t(),
        "row": base[2],
        "strided": base[:, 1::2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "parameter": nn.Parameter(base + 1.0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "int": torch.tensor([1, 2], dtype=torch.int32),
    }
    torch.save(forms, TARGET / "forms.pth")
    torch.save(forms, TARGET / "forms_legacy.pth", _use_new_zipfile_serialization=False)

    # What training scripts write: the network beside its optimiser, wrapped by DataParallel.
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    nested = {
        "epoch": 3,
        "arch": "mpncovresnet50",
        "state_dict": nn.DataParallel(layer).state_dict(),
        "best_prec1": torch.tensor(77.5),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(nested, TARGET / "nested.pth")
    torch.save(nested, TARGET / "nested_legacy.pth", _use_new_zipfile_serialization=False)

    # An expanded tensor beside a good one; a view that stands for other values than its storage's.
    torch.save({"good": base, "wide": torch.ones(1).expand(10)}, TARGET / "expanded.pth")
    torch.save({"neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag}, TARGET / "negated.pth")

    # Refused: a whole module, other classes, no tensor at all.
    torch.save(layer, TARGET / "module.pth")
    torch.save(layer, TARGET / "module_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"args": argparse.Namespace(lr=0.1), **plain}, TARGET / "namespace.pth")
    torch.save({"epoch": 3}, TARGET / "nothing.pth")


def main():
    TARGET.mkdir(parents=True, exist_ok=True)
    files()
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    script = "tools/golden/checkpoints.py"
    metadata = {"generator": f"{script}, sha256 {digest}, torch {torch.__version__}"}
    save_file(networks(), TARGET / "nets.safetensors", metadata=metadata)
    for path in sorted(TARGET.iterdir()):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
