#!/usr/bin/env python3
"""Makes crates/models/tests/golden/{torchvision,curve,curve_f32}.safetensors of torchvision's networks
and of a few modules written here.

The weights are too many to keep. Both sides compute them (and the images) from the names: value i
of the tensor `name` is a hash of (name, i), exactly the same number in Python and in Rust
(crates/models/tests/torchvision.rs). The file holds the results alone: logits in training and in
evaluation after it, the gradient of the images, and two numbers for each parameter's gradient;
and the losses of twenty SGD steps of a ResNet-18, each on a batch of its own, twice: in f64 with
settings under which rounding grows manyfold a step, and in f32 and f64 with settings under which it
does not.

    python3 tools/golden/torchvision_nets.py

Needs torch, torchvision, numpy and safetensors.
"""

import hashlib
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import alexnet, mobilenet_v2, resnet, shufflenet_v2_x1_0, vgg

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/models/tests/golden/torchvision.safetensors"
CLASSES = 5


def uniform(name, shape):
    """In [-1, 1): FNV-1a of the name, then SplitMix64 at each place."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
    return torch.from_numpy(z.astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def fill(net):
    """Weights of rank 2 and more by the fan-in; norms near 1 (scale) and 0 (shift)."""
    for name, tensor in net.named_parameters():
        values = uniform(name, tensor.shape)
        if tensor.dim() > 1:
            values = values * (3.0 / tensor[0].numel()) ** 0.5
        elif name.endswith("weight"):
            values = 1.0 + 0.25 * values
        else:
            values = 0.25 * values
        tensor.data = values


class SecondOrder(nn.Module):
    """The authors' surgery: last stage at stride 1, 1x1 reduction; features pooled by the mean."""

    def __init__(self, net, channels):
        super().__init__()
        for name, child in net.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)
        block = self.layer4[0]
        block.conv2.stride = (1, 1)
        block.downsample[0].stride = (1, 1)
        self.layer_reduce = nn.Conv2d(2048, channels, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.relu(self.layer_reduce_bn(self.layer_reduce(x)))
        return self.fc(x.mean((2, 3)))


class Pooled(nn.Module):
    """Features pooled by the mean."""

    def __init__(self, features, channels):
        super().__init__()
        self.features = features
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def paper_alexnet():
    """The convolutions of the authors' MatConvNet network, without the last pooling."""
    layers = []
    for inputs, outputs, kernel, stride, padding, groups, pooled in [
        (3, 96, 11, 4, 0, 1, True),
        (96, 256, 5, 1, 2, 2, True),
        (256, 384, 3, 1, 1, 1, False),
        (384, 384, 3, 1, 1, 2, False),
        (384, 256, 3, 1, 1, 2, False),
    ]:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] + [nn.MaxPool2d(3, 2)] * pooled
    return nn.Sequential(*layers)


class Shuffled(nn.Module):
    """ShuffleNetV2 whose last stage keeps the resolution, with a reduction, pooled by the mean."""

    def __init__(self, net, channels):
        super().__init__()
        for name, child in net.named_children():
            if name != "fc":
                self.add_module(name, child)
        unit = self.stage4[0]
        unit.branch1[0].stride = (1, 1)
        unit.branch2[3].stride = (1, 1)
        self.layer_reduce = nn.Conv2d(1024, channels, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        x = torch.relu(self.layer_reduce_bn(self.layer_reduce(x)))
        return self.fc(x.mean((2, 3)))


class PreBlock(nn.Module):
    """Norm and ReLU before each convolution; shapes are (outputs, kernel, stride)."""

    def __init__(self, inputs, shapes):
        super().__init__()
        self.count, channels = len(shapes), inputs
        for i, (outputs, kernel, stride) in enumerate(shapes, 1):
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels))
            setattr(self, f"conv{i}", nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False))
            channels = outputs
        stride = max(stride for _, _, stride in shapes)
        changes = stride != 1 or inputs != channels
        self.downsample = nn.Conv2d(inputs, channels, 1, stride, bias=False) if changes else None

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        for i in range(1, self.count + 1):
            if i > 1:
                y = torch.relu(getattr(self, f"bn{i}")(y))
            y = getattr(self, f"conv{i}")(y)
        return y + shortcut


class SmallResNet(nn.Module):
    """For images of 32 pixels: torchvision's basic blocks, or blocks that normalise first."""

    def __init__(self, kind, depth, last_stride=2, stem_stride=1, reduction=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16) if kind == "basic" else None
        channels = 16
        for stage, (width, first) in enumerate(((16, 1), (32, 2), (64, last_stride)), 1):
            blocks = []
            for i in range(depth):
                stride = first if i == 0 else 1
                if kind == "basic":
                    change = None
                    if stride != 1 or channels != width:
                        change = nn.Sequential(
                            nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                        )
                    blocks.append(resnet.BasicBlock(channels, width, stride, change))
                    channels = width
                elif kind == "pre_basic":
                    blocks.append(PreBlock(channels, [(width, 3, stride), (width, 3, 1)]))
                    channels = width
                else:
                    shapes = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
                    blocks.append(PreBlock(channels, shapes))
                    channels = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.bn = None if kind == "basic" else nn.BatchNorm2d(channels)
        self.layer_reduce = None
        if reduction:
            self.layer_reduce = nn.Conv2d(channels, reduction, 1, bias=False)
            self.layer_reduce_bn = nn.BatchNorm2d(reduction)
            channels = reduction
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.conv1(x)
        if self.bn1 is not None:
            x = torch.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.bn is not None:
            x = torch.relu(self.bn(x))
        if self.layer_reduce is not None:
            x = torch.relu(self.layer_reduce_bn(self.layer_reduce(x)))
        return self.fc(x.mean((2, 3)))


def calm(net):
    """Larger filters, whose steps turn them less, and residual branches that start small."""
    for name, tensor in net.named_parameters():
        if tensor.dim() == 4:
            tensor.data *= 4.0
        elif name.endswith("bn2.weight"):
            tensor.data *= 0.2


def run(change, dtype, lr, batch, steps=20):
    """Losses of training steps at 64x64 from changed initial weights."""
    net = resnet.resnet18(num_classes=CLASSES).double()
    fill(net)
    change(net)
    net = net.to(dtype)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        labels = torch.tensor([(3 * step + i) % CLASSES for i in range(batch)])
        # Something to learn: a class has its own brightness in each channel.
        images = uniform(f"batch {step}", (batch, 3, 64, 64))
        images = images + uniform("classes", (CLASSES, 3, 1, 1))[labels]
        loss = nn.functional.cross_entropy(net(images.to(dtype)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def curves():
    wild = run(lambda net: None, torch.float64, 0.02, 8)
    save({"losses": wild}, TARGET.with_name("curve.safetensors"))
    names = {"f32": torch.float32, "f64": torch.float64}
    found = {name: run(calm, dtype, 0.005, 16) for name, dtype in names.items()}
    off = (found["f32"] / found["f64"] - 1.0).abs().max().item()
    print(f"f32 against f64: {off:.1e}; losses {found['f32'][0]:.3f} to {found['f32'][-1]:.3f}")
    save(found, TARGET.with_name("curve_f32.safetensors"))


def save(tensors, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    # One entry: several are stored in any order.
    script = "tools/golden/torchvision_nets.py"
    metadata = {"generator": f"{script}, sha256 {digest}, torch {torch.__version__}"}
    save_file(tensors, target, metadata=metadata)
    print(f"wrote {target} ({target.stat().st_size} bytes)")


def narrow(net, places, hidden=48):
    """The whole network, whose hidden linear layers of 4096 outputs have fewer."""
    inputs = net.classifier[places[0]].in_features
    for place, outputs in zip(places, (hidden, hidden, CLASSES)):
        net.classifier[place] = nn.Linear(inputs, outputs)
        inputs = outputs
    return net


def main():
    torch.set_default_dtype(torch.float64)
    curves()
    tensors = {}
    networks = {
        "resnet18": resnet.resnet18(num_classes=CLASSES),
        "resnet50": SecondOrder(resnet.resnet50(num_classes=CLASSES), 32),
        "vgg16": Pooled(vgg.vgg16(init_weights=False).features[:-1], 512),
        "vgg16_bn": Pooled(vgg.vgg16_bn(init_weights=False).features[:-1], 512),
        "vgg16_fc": narrow(vgg.vgg16(init_weights=False, dropout=0.0), (0, 3, 6)),
        "alexnet_fc": narrow(alexnet(dropout=0.0), (1, 4, 6)),
        "alexnet_bn": Pooled(paper_alexnet(), 256),
        "vgg11_bn": Pooled(vgg.vgg11_bn(init_weights=False).features[:-1], 512),
        "mobilenet_v2": Pooled(mobilenet_v2().features, 1280),
        "shufflenet_v2_x1_0": Shuffled(shufflenet_v2_x1_0(), 256),
        "resnet20": SmallResNet("basic", 3),
        "preresnet20": SmallResNet("pre_basic", 3),
        "preresnet164": SmallResNet("pre_bottleneck", 18, last_stride=1, stem_stride=2, reduction=24),
    }
    for key, net in networks.items():
        net = net.double()
        fill(net)
        sides = {"alexnet": (72, 96), "resnet20": (16, 24)}
        sides |= {"preresnet20": (16, 24), "preresnet164": (16, 24)}
        shape = (2, 3, *sides.get(key.removesuffix("_fc").removesuffix("_bn"), (48, 64)))
        x = uniform("images", shape).requires_grad_(True)
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        loss.backward()
        tensors[f"{key}.train"] = logits.detach()
        tensors[f"{key}.dx"] = x.grad[:, :, ::4, ::4].contiguous()
        for name, tensor in net.named_parameters():
            probe = uniform(name + ".probe", tensor.shape)
            pair = torch.stack([tensor.grad.norm(), (tensor.grad * probe).sum()])
            tensors[f"{key}.gradient.{name}"] = pair
        with torch.no_grad():
            tensors[f"{key}.eval"] = net.eval()(x)

    save(tensors, TARGET)


if __name__ == "__main__":
    main()
