#!/usr/bin/env python3
r"""Times training steps of networks and their ops in PyTorch beside `isqrt bench network`.

The PyTorch side is torchvision's network (ResNets, VGG, AlexNet); with `--head isqrt` the last
stage of a ResNet keeps the resolution, a 1x1 convolution brings the channels to 256, and the
pooling is the authors' formulas as written in layer.py. Both memory layouts of PyTorch (NCHW and channels_last) are timed.

    python3 tools/peers/network.py --isqrt target/release/isqrt --model resnet50 --batch 8 --ops
    python3 tools/peers/network.py --isqrt target/x86_64-unknown-linux-gnu/release/isqrt \
        --device cuda:0 --precision bf16 --head isqrt --batch 256

On a GPU `--precision` is of both sides: f32, tf32 (convolutions and linear layers rounded) or bf16 (autocast;
the covariance head in f32).
Needs PyTorch and torchvision. Prints a line per implementation, then the ratios ours/torch (below
1: ours is faster). Each side runs in turn, several times; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torchvision
from torch import nn

import layer

# The ops of `isqrt bench network --ops`, in its order: channels in, out, side, kernel, stride.
CONVOLUTIONS = [
    (64, 64, 56, 3, 1),
    (128, 128, 56, 3, 2),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (256, 64, 56, 1, 1),
    (64, 256, 56, 1, 1),
    (512, 2048, 7, 1, 1),
    (3, 64, 224, 7, 2),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class SecondOrder(nn.Module):
    """A ResNet with the paper's surgery and head."""

    def __init__(self, net, classes, reduction=256, iterations=5):
        super().__init__()
        first = net.layer4[0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
        channels = net.fc.in_features
        net.avgpool, net.fc = nn.Identity(), nn.Identity()
        self.features = nn.Sequential(
            *[child for child in net.children() if not isinstance(child, nn.Identity)],
            nn.Conv2d(channels, reduction, 1, bias=False),
            nn.BatchNorm2d(reduction),
            nn.ReLU(inplace=True),
        )
        index = torch.triu_indices(reduction, reduction)
        self.register_buffer("index", index[0] * reduction + index[1], persistent=False)
        self.iterations = iterations
        self.fc = nn.Linear(len(self.index), classes)

    def forward(self, x):
        x = self.features(x).flatten(2).contiguous()
        # The root needs f32, whatever the maps are of.
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(layer.layer(x.float(), self.iterations, self.index))


def build(args):
    net = torchvision.models.get_model(args.model, weights=None, num_classes=args.classes)
    return SecondOrder(net, args.classes) if args.head == "isqrt" else net


def step_times(net, optimiser, x, labels, autocast):
    """Forward with the loss, backward, update: milliseconds."""
    t = [layer.now(x.device)]
    optimiser.zero_grad(set_to_none=True)
    with autocast():
        loss = nn.functional.cross_entropy(net(x), labels)
    t.append(layer.now(x.device))
    loss.backward()
    t.append(layer.now(x.device))
    optimiser.step()
    del loss
    t.append(layer.now(x.device))
    forward, backward, update = (1e3 * (b - a) for a, b in zip(t, t[1:]))
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "update_ms": update,
        "step_ms": forward + backward + update,
    }


def training(args, layout):
    """A training step and an evaluation in this memory layout, to be timed."""
    net = build(args).to(args.device, memory_format=layout)
    rate, momentum, decay = 1e-6, 0.9, 1e-4
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum, weight_decay=decay)
    x = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=layout)
    x = x.to(args.device)
    labels = (torch.arange(args.batch) % args.classes).to(args.device)

    def autocast():
        return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")

    return lambda: step_times(net, optimiser, x, labels, autocast), lambda: eval_times(net, x, autocast)


def eval_times(net, x, autocast):
    net.eval()
    with torch.no_grad(), autocast():
        start = layer.now(x.device)
        net(x)
        end = layer.now(x.device)
    net.train()
    return {"eval_ms": 1e3 * (end - start)}


def medians(rows):
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def repeat(seconds, task):
    """Medians of what `task` returns, after a warm-up."""
    task()
    rows, start = [], time.perf_counter()
    while len(rows) < 3 or time.perf_counter() - start < seconds:
        rows.append(task())
    return medians(rows)


def pass_times(forward, inputs):
    """An op and its gradients for these inputs."""
    device = inputs[0].device
    start = layer.now(device)
    y = forward()
    middle = layer.now(device)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return 1e3 * (middle - start), 1e3 * (layer.now(device) - middle)


def op_times(batch, device, layout, seconds):
    """Times in the order of `isqrt bench network --ops`."""

    def images(channels, side):
        x = torch.randn(batch, channels, side, side).contiguous(memory_format=layout)
        return x.to(device).requires_grad_(True)

    rows = []
    for inputs, outputs, side, kernel, stride in CONVOLUTIONS:
        x = images(inputs, side)
        w = torch.randn(outputs, inputs, kernel, kernel).contiguous(memory_format=layout)
        w = w.to(device).requires_grad_(True)

        def task():
            def run(x, w, wanted):
                conv = nn.functional.conv2d
                return pass_times(lambda: conv(x, w, None, stride, kernel // 2), wanted)

            forward, backward = run(x, w, (x, w))
            dw = run(x.detach(), w, (w,))[1]
            # As `isqrt bench network` has it: what the input's gradient adds.
            dx = backward - dw
            return {"forward_ms": forward, "backward_ms": backward, "dx_ms": dx, "dw_ms": dw}

        rows.append(repeat(seconds, task))
    x = images(64, 112)
    norm = nn.BatchNorm2d(64).to(device)
    pool = nn.MaxPool2d(3, 2, 1)
    a, b = images(256, 56), images(256, 56)
    for forward, wanted in (
        (lambda: torch.relu_(norm(x)), (x, norm.weight, norm.bias)),
        (lambda: pool(x), (x,)),
        (lambda: torch.relu_(a + b), (a, b)),
    ):

        def task():
            return dict(zip(("forward_ms", "backward_ms"), pass_times(forward, wanted)))

        rows.append(repeat(seconds, task))
    return rows


def ours(args):
    """The rows of `isqrt bench network`."""
    command = [args.isqrt, "bench", "network", "--json", "--threads", str(args.threads)]
    command += ["--device", str(args.device), "--precision", args.precision]
    command += ["--model", args.model, "--batch", str(args.batch)]
    command += ["--head", args.head] * (args.head != "own")
    command += ["--size", str(args.size), "--classes", str(args.classes)]
    command += ["--budget", str(args.seconds)] + ["--ops"] * args.ops
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in lines.splitlines()]


def peak_memory_mb(args, layout):
    """Largest memory of a process of its own that does four training steps and nothing else."""
    command = [sys.executable, __file__, "--memory-of", layout, "--threads", str(args.threads)]
    command += ["--model", args.model, "--head", args.head, "--batch", str(args.batch)]
    command += ["--size", str(args.size), "--classes", str(args.classes)]
    command += ["--device", str(args.device), "--precision", args.precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def show(name, row):
    parts = [f"{key[:-3]} {row[key]:9.2f}" for key in row if key.endswith("_ms") and row[key]]
    print(f"  {name:20} " + "  ".join(parts), flush=True)


def ratios(ours, theirs, keys):
    return "  ".join(f"{key[:-3]} {ours[key] / theirs[key]:.2f}" for key in keys if theirs.get(key))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isqrt", default="target/release/isqrt", help="the binary")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda:0")
    parser.add_argument("--precision", choices=["f32", "tf32", "bf16"], default="f32")
    parser.add_argument("--model", default="resnet50", help="named as in torchvision")
    parser.add_argument("--head", choices=["own", "isqrt"], default="own")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--ops", action="store_true", help="the ops too")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="per side and round")
    parser.add_argument("--memory-of", choices=list(LAYOUTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(1)
    if args.memory_of:
        task = training(args, LAYOUTS[args.memory_of])[0]
        for _ in range(4):
            task()
        if args.device.type == "cuda":
            print(torch.cuda.max_memory_allocated(args.device) / 2**20)
            return
        # Not `ru_maxrss`, which a process has from its parent.
        status = open("/proc/self/status").read()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {args.threads} threads,"
        f" {args.device}, {args.model} {args.head}, batch {args.batch}, {args.size}x{args.size},"
        f" ms a batch, {args.precision}"
    )

    runs = {}
    for name, layout in LAYOUTS.items():

        def task(sides=training(args, layout)):
            step, evaluate = sides
            return {**step(), **evaluate()}

        runs[name] = task
    names, steps = [], {name: [] for name in ["ours", *runs]}
    ops = {name: [] for name in ["ours", *runs]}
    for _ in range(args.rounds):
        rows = ours(args)
        memory = {"ours": rows[0]["peak_memory_mb"]}
        keys = ["forward_ms", "backward_ms", "update_ms", "step_ms", "eval_ms"]
        steps["ours"].append({key: rows[0][key] for key in keys})
        ops["ours"].append(rows[1:])
        names = [row["case"] for row in rows[1:]]
        for name, task in runs.items():
            steps[name].append(repeat(args.seconds, task))
            if args.ops:
                share = args.seconds / (len(CONVOLUTIONS) + 3)
                ops[name].append(op_times(args.batch, args.device, LAYOUTS[name], share))

    def report(case, table, keys):
        print(case)
        for name, row in table.items():
            show(name if name == "ours" else f"torch {name}", row)
        for name in LAYOUTS:
            print(f"  ours/torch {name}: {ratios(table['ours'], table[name], keys)}", flush=True)

    table = {name: medians(rows) for name, rows in steps.items()}
    memory |= {f"torch {name}": peak_memory_mb(args, name) for name in LAYOUTS}
    print("peak memory, MB:", ", ".join(f"{name} {mb:.0f}" for name, mb in memory.items()))
    report("training step", table, ["step_ms", "forward_ms", "backward_ms", "eval_ms"])
    for i, case in enumerate(names):
        keys = list(ops["NCHW"][0][i])
        table = {
            name: medians([{key: round_[i][key] for key in keys} for round_ in rounds])
            for name, rounds in ops.items()
        }
        report(case, table, keys)


if __name__ == "__main__":
    main()
