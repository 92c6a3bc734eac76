#!/usr/bin/env python3
"""Makes crates/nn/tests/golden/nn.safetensors: values and gradients of PyTorch's own ops in f64.

One `{case}.x`, `.y`, `.g`, `.dx` for each op and option, the parameters after each step of the
optimisers, and the factors of the schedules. Needs torch, numpy and safetensors:

    python3 tools/golden/nn.py
"""

import hashlib
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/nn/tests/golden/nn.safetensors"

# kernel, stride, padding, ceil mode; the Rust side reads them from the name.
WINDOWS = [
    ((2, 2), (2, 2), (0, 0), False),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), True),
    ((3, 3), (2, 2), (1, 1), True),
    ((2, 3), (3, 1), (1, 0), False),
    ((3, 2), (2, 3), (1, 1), True),
    ((5, 1), (2, 1), (2, 0), True),
    ((2, 2), (4, 5), (1, 1), True),
    ((9, 4), (2, 2), (1, 2), True),
]

# size, alpha, beta, k
NORMS = [(5, 1e-4, 0.75, 1.0), (5, 2.5, 0.75, 2.0), (4, 0.5, 0.5, 1.5), (1, 1.0, 1.0, 0.5), (20, 3.0, 0.75, 1.0)]

# x, weight, stride, padding, dilation, groups, bias; the Rust side reads the options from the name.
CONVOLUTIONS = [
    ((2, 3, 9, 8), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1, False),
    ((2, 3, 9, 8), (4, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1, True),
    ((2, 3, 9, 8), (4, 3, 1, 1), (2, 1), (0, 0), (1, 1), 1, True),
    ((2, 3, 9, 8), (4, 3, 3, 2), (1, 2), (4, 1), (2, 3), 1, True),
    ((2, 4, 6, 7), (6, 2, 3, 3), (2, 2), (1, 1), (1, 1), 2, True),
    ((2, 4, 6, 7), (8, 1, 3, 3), (1, 1), (2, 2), (2, 2), 4, False),
    ((2, 16, 5, 6), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1, True),
    ((1, 16, 6, 7), (32, 16, 3, 3), (2, 2), (2, 2), (2, 2), 1, False),
    ((1, 32, 5, 6), (32, 16, 3, 1), (1, 2), (1, 0), (1, 1), 2, True),
    ((1, 16, 6, 5), (16, 1, 3, 3), (1, 1), (1, 1), (1, 1), 16, True),
    ((1, 16, 7, 6), (16, 1, 3, 3), (2, 2), (1, 1), (1, 1), 16, False),
    ((2, 5, 6, 4), (5, 1, 3, 3), (1, 2), (1, 1), (1, 1), 5, True),
]


def pooling(record):
    x = torch.randn(2, 2, 8, 7)
    for kernel, stride, padding, ceil in WINDOWS:
        name = "-".join(str(v) for v in (*kernel, *stride, *padding, int(ceil)))
        record(f"max_pool2d.{name}", x, lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil))
        for include in (True, False):
            record(
                f"avg_pool2d.{name}-{int(include)}",
                x,
                lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil_mode=ceil, count_include_pad=include),
            )


def convolutions(tensors):
    for shape, weight, stride, padding, dilation, groups, biased in CONVOLUTIONS:
        inputs = [torch.randn(shape), torch.randn(weight)] + [torch.randn(weight[0])] * biased
        inputs = [t.requires_grad_(True) for t in inputs]
        bias = inputs[2] if biased else None
        y = F.conv2d(inputs[0], inputs[1], bias, stride, padding, dilation, groups)
        g = torch.randn_like(y)
        options = (*shape, *weight, *stride, *padding, *dilation, groups)
        name = "conv2d." + "-".join(str(v) for v in options)
        gradients = torch.autograd.grad(y, inputs, g)
        keys = ("x", "w", "b")
        for key, value in {"y": y, "g": g, **dict(zip(keys, inputs))}.items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()
        for key, value in zip(keys, gradients):
            tensors[f"{name}.d{key}"] = value.contiguous()


def norms(record):
    x = torch.randn(2, 9, 3, 2)
    for size, alpha, beta, k in NORMS:
        name = f"local_response_norm.{size}-{alpha:g}-{beta:g}-{k:g}".replace("1e-04", "0.0001")
        record(name, x, lambda x: F.local_response_norm(x, size, alpha, beta, k))


def losses(record):
    x, labels = 3 * torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    for smoothing in (0.0, 0.1, 0.5):
        record(f"cross_entropy.{smoothing:g}", x, lambda x: F.cross_entropy(x, labels, label_smoothing=smoothing))


class Toy(torch.nn.Module):
    """Two parameters and a buffer; the loss makes the gradients 2·(a∘p) with a per step."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())
        self.register_buffer("running_mean", torch.zeros(2))


def optimisers(tensors):
    start, steps = {"weight": torch.randn(3, 2), "bias": torch.randn(2)}, 5
    targets = torch.randn(steps, 2, 3, 2)
    tensors |= {f"optimiser.{k}": v for k, v in start.items()} | {"optimiser.targets": targets}

    def loss(net, step):
        weight, bias = targets[step]
        return ((net.weight - weight) ** 2).sum() + ((net.bias - bias[0]) ** 2).sum()

    def groups(net, rate, decay):
        # Of the bias: ten times the rate, half of the decay.
        return [
            {"params": [net.weight], "lr": rate, "weight_decay": decay},
            {"params": [net.bias], "lr": 10 * rate, "weight_decay": decay / 2},
        ]

    makers = {
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-6),
    }
    for name, make in makers.items():
        for clip in ("none", "norm", "value"):
            net = Toy(**start)
            optimiser = make(groups(net, 0.01, 0.1))
            average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
            average.update_parameters(net)  # The first call copies.
            for step in range(steps):
                optimiser.zero_grad()
                loss(net, step).backward()
                if clip == "norm":
                    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.5)
                    tensors[f"optimiser.{name}.norm.{step}.norm"] = norm
                elif clip == "value":
                    torch.nn.utils.clip_grad_value_(net.parameters(), 0.7)
                optimiser.step()
                net.running_mean.add_(net.bias.detach())
                average.update_parameters(net)
                for key in ("weight", "bias"):
                    tensors[f"optimiser.{name}.{clip}.{step}.{key}"] = getattr(net, key).detach().clone()
            for key in ("weight", "bias", "running_mean"):
                tensors[f"optimiser.{name}.{clip}.ema.{key}"] = getattr(average.module, key).detach().clone()
            for key in ("weight", "bias"):
                for part, value in optimiser.state[getattr(net, key)].items():
                    if part != "step":
                        tensors[f"optimiser.{name}.{clip}.state.{key}.{part}"] = value.detach().clone()


def schedule_factors(tensors):
    per_epoch, epochs = 4, 10
    steps, warm = per_epoch * epochs, 2 * per_epoch

    def factors(make, every=1):
        """The rate of each step; `every` steps the scheduler moves once."""
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimiser = torch.optim.SGD([parameter], lr=1.0)
        schedule = make(optimiser)
        rates = []
        for step in range(steps):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            if (step + 1) % every == 0:
                schedule.step()
        return torch.tensor(rates)

    def warmed(make):
        def both(optimiser):
            line = schedules.LinearLR(optimiser, 1 / warm, 1.0, warm - 1)
            return schedules.SequentialLR(optimiser, [line, make(optimiser, steps - warm)], [warm])

        return factors(both)

    for name, make in {
        "cosine": lambda o, n: schedules.CosineAnnealingLR(o, n),
        "polynomial": lambda o, n: schedules.PolynomialLR(o, n, power=0.9),
        "constant": lambda o, n: schedules.ConstantLR(o, 1.0, n),
    }.items():
        tensors[f"schedule.{name}"] = factors(lambda o: make(o, steps))
        tensors[f"schedule.{name}.warm"] = warmed(make)
    tensors["schedule.step"] = factors(lambda o: schedules.StepLR(o, 3, 0.2), per_epoch)
    tensors["schedule.multi_step"] = factors(lambda o: schedules.MultiStepLR(o, [3, 7], 0.1), per_epoch)
    # PyTorch has no such schedule; this is MATLAB's logspace, a rate an epoch.
    tensors["schedule.logarithmic"] = torch.logspace(-1, -4, epochs).repeat_interleave(per_epoch)
    tensors["schedule.shape"] = torch.tensor([float(steps), float(per_epoch)])


def initialisers(tensors):
    """Largest value of the uniform and deviation of the normal initialisers, from large draws."""
    init, shape = torch.nn.init, (256, 64, 3, 3)
    draws = {
        "kaiming_fan_out": lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu").std(),
        "kaiming_fan_in": lambda w: init.kaiming_normal_(w, nonlinearity="relu").std(),
        "kaiming_uniform": lambda w: init.kaiming_uniform_(w, nonlinearity="relu").abs().max(),
        "xavier_uniform": lambda w: init.xavier_uniform_(w).abs().max(),
        "xavier_normal": lambda w: init.xavier_normal_(w).std(),
        "uniform_fan_in": lambda w: torch.nn.Conv2d(64, 256, 3).weight.detach().abs().max(),
        "normal": lambda w: init.normal_(w, std=0.02).std(),
    }
    for name, draw in draws.items():
        tensors[f"init.{name}"] = draw(torch.empty(shape))


def adaptive_pooling(record):
    x = torch.randn(2, 2, 8, 7)
    for size in ((3, 3), (8, 2), (5, 7), (1, 1), (11, 10)):
        name = "-".join(str(v) for v in size)
        record(f"adaptive_avg_pool2d.{name}", x, lambda x: F.adaptive_avg_pool2d(x, size))


def activations(record):
    """At both kinks too, and NaN-free."""
    x = 4 * torch.randn(2, 2, 5, 4)
    x[0, 0, 0] = torch.tensor([0.0, 6.0, -0.0, 7.0])
    record("relu6.6", x, F.relu6)
    record("channel_shuffle.2", torch.randn(2, 6, 3, 2), lambda x: F.channel_shuffle(x, 2))


def main():
    torch.manual_seed(20180618)
    torch.set_default_dtype(torch.float64)
    tensors = {}

    def record(name, x, function):
        op = name.split(".")[0]
        tensors.setdefault(f"input.{op}", x)
        x = x.clone().requires_grad_(True)
        y = function(x)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        for key, value in {"y": y, "g": g, "dx": dx}.items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()

    pooling(record)
    norms(record)
    losses(record)
    optimisers(tensors)
    schedule_factors(tensors)
    initialisers(tensors)
    convolutions(tensors)
    adaptive_pooling(record)
    activations(record)

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    # One entry alone: safetensors writes several in any order, and the file must be the same bytes.
    metadata = {"generator": f"tools/golden/nn.py, sha256 {digest}, torch {torch.__version__}"}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, TARGET, metadata=metadata)
    print(f"wrote {TARGET} ({TARGET.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
