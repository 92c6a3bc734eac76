#!/usr/bin/env python3
r"""Times the iSQRT-COV layer in PyTorch beside `isqrt bench layer`, in one run.

The PyTorch side is written from the paper's formulas as the authors' release evaluates them:
covariance through the centring matrix, trace normalisation, coupled Newton-Schulz with stored
iterates, the hand-written reverse-mode backward of 8 + 10 (N - 2) products, triangle by index.
That backward is compared with PyTorch's own differentiation before anything is timed.

    python3 tools/peers/layer.py --isqrt target/release/isqrt --threads 1 --batch 32
    python3 tools/peers/layer.py --isqrt target/x86_64-unknown-linux-gnu/release/isqrt \
        --device cuda:0 --batch 256 --positions 196

On a GPU the same iteration under `torch.compile` (PyTorch's own differentiation) and the root by batched
`torch.linalg.eigh` are timed too, and `--tf32` lets PyTorch round its products. Needs PyTorch. Prints a
line per case, both times and the ratio (PyTorch over ours). Each side runs in turn, several times; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import torch


class Covariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, d, m = x.shape
        centring = (torch.eye(m, dtype=x.dtype, device=x.device) - 1.0 / m) / m
        centring = centring.expand(b, m, m).contiguous()
        ctx.save_for_backward(x, centring)
        return x.bmm(centring).bmm(x.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, centring = ctx.saved_tensors
        return (grad + grad.transpose(1, 2)).bmm(x).bmm(centring)


class Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma, n):
        b, d, _ = sigma.shape
        eye3 = 3.0 * torch.eye(d, dtype=sigma.dtype, device=sigma.device).expand(b, d, d)
        trace = sigma.diagonal(dim1=1, dim2=2).sum(1)
        a = sigma / trace.view(b, 1, 1)
        ys, zs = [], []
        if n < 2:
            y = 0.5 * a.bmm(eye3 - a)
        else:
            z = 0.5 * (eye3 - a)
            y = a.bmm(z)
            ys.append(y)
            zs.append(z)
            for _ in range(1, n - 1):
                t = 0.5 * (eye3 - z.bmm(y))
                y, z = y.bmm(t), t.bmm(z)
                ys.append(y)
                zs.append(z)
            y = 0.5 * y.bmm(eye3 - z.bmm(y))
        ctx.n = n
        ctx.save_for_backward(sigma, a, y, trace, *ys, *zs)
        return y * trace.sqrt().view(b, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        n = ctx.n
        sigma, a, last, trace, *rest = ctx.saved_tensors
        ys, zs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        b, d, _ = sigma.shape
        eye3 = 3.0 * torch.eye(d, dtype=sigma.dtype, device=sigma.device).expand(b, d, d)
        t = trace.view(b, 1, 1)
        post = grad * t.sqrt()
        aux = (grad * last).sum((1, 2)) / (2 * trace.sqrt())
        if n < 2:
            ga = 0.5 * (post.bmm(eye3 - a) - a.bmm(post))
        else:
            y, z = ys[-1], zs[-1]
            yz = y.bmm(z)
            gy = 0.5 * (post.bmm(eye3 - yz) - z.bmm(y).bmm(post))
            gz = -0.5 * y.bmm(post).bmm(y)
            for y, z in zip(ys[-2::-1], zs[-2::-1]):
                t3 = eye3 - y.bmm(z)
                zy = z.bmm(y)
                gy, gz = (
                    0.5 * (gy.bmm(t3) - z.bmm(gz).bmm(z) - zy.bmm(gy)),
                    0.5 * (t3.bmm(gz) - y.bmm(gy).bmm(y) - gz.bmm(zy)),
                )
            ga = 0.5 * (gy.bmm(eye3 - a) - gz - a.bmm(gy))
        gs = ga / t
        scale = aux - (ga * sigma).sum((1, 2)) / (trace * trace)
        eye = torch.eye(d, dtype=sigma.dtype, device=sigma.device)
        return gs + scale.view(b, 1, 1) * eye, None


def layer(x, n, index):
    c = Root.apply(Covariance.apply(x), n)
    b, d, _ = c.shape
    return c.reshape(b, d * d)[:, index]


def plain(x, n, index):
    """The same from PyTorch's own ops alone, which it differentiates."""
    b, d, m = x.shape
    centred = (x - x.mean(2, keepdim=True)) / m**0.5
    sigma = centred.bmm(centred.transpose(1, 2))
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    y = sigma / trace
    t = 1.5 * eye - 0.5 * y
    y, z = y.bmm(t), t
    for k in range(1, n):
        t = 1.5 * eye - 0.5 * z.bmm(y)
        y = y.bmm(t)
        if k + 1 < n:
            z = t.bmm(z)
    return (y * trace.sqrt()).reshape(b, d * d)[:, index]


def by_eig(x, _, index):
    """The exact root by eigendecomposition, differentiated by PyTorch."""
    b, d, m = x.shape
    centred = (x - x.mean(2, keepdim=True)) / m**0.5
    values, vectors = torch.linalg.eigh(centred.bmm(centred.transpose(1, 2)))
    # Without a floor the derivative of the root at zeros is infinite.
    root = (vectors * values.clamp_min(1e-6).sqrt().unsqueeze(1)).bmm(vectors.transpose(1, 2))
    return root.reshape(b, d * d)[:, index]


def check_backward():
    """The hand-written backward against PyTorch's own, in double precision."""
    d, m = 6, 9
    index = torch.triu_indices(d, d)
    index = index[0] * d + index[1]
    for n in (1, 2, 3, 5, 7):
        x = torch.randn(2, d, m, dtype=torch.float64, requires_grad=True)
        g = torch.randn(2, d * (d + 1) // 2, dtype=torch.float64)
        centred = (x - x.mean(2, keepdim=True)) / m**0.5
        sigma = centred.bmm(centred.transpose(1, 2))
        trace = sigma.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
        eye = torch.eye(d, dtype=torch.float64)
        y, z = sigma / trace, eye.expand(2, d, d)
        for _ in range(n):
            t = 0.5 * (3 * eye - z.bmm(y))
            y, z = y.bmm(t), t.bmm(z)
        known = (y * trace.sqrt()).reshape(2, d * d)[:, index]
        found = layer(x, n, index)
        (known_x,) = torch.autograd.grad(known, x, g)
        (found_x,) = torch.autograd.grad(found, x, g)
        other = plain(x, n, index)
        (other_x,) = torch.autograd.grad(other, x, g)
        pairs = ((found, known), (found_x, known_x), (other, known), (other_x, known_x))
        for a, b in pairs:
            if not (a - b).norm() <= 1e-10 * b.norm():
                raise SystemExit(f"the PyTorch side is wrong at N = {n}: {a - b}")


def now(device):
    """When the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def torch_times(x, n, index, seconds, function=layer):
    forward, backward = [], []
    x = x.clone().requires_grad_(True)
    upstream = None
    start = time.perf_counter()
    while len(forward) < 3 or time.perf_counter() - start < seconds:
        t0 = now(x.device)
        y = function(x, n, index)
        t1 = now(x.device)
        if upstream is None:
            upstream = torch.ones_like(y)
            t1 = now(x.device)
        torch.autograd.grad(y, x, upstream)
        t2 = now(x.device)
        forward.append((t1 - t0) * 1e3)
        backward.append((t2 - t1) * 1e3)
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def ours(binary, threads, device, batch, dim, positions, schedule, seconds):
    command = [binary, "bench", "layer", "--json", "--threads", str(threads)]
    command += ["--device", str(device)]
    command += ["--batch", str(batch), "--dim", str(dim), "--positions", str(positions)]
    command += ["--budget", str(2 * seconds), *schedule]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in lines.splitlines():
        row = json.loads(line)
        if row["implementation"] == "ours":
            return row["forward_ms"], row["backward_ms"]
    raise SystemExit("isqrt bench layer printed no row of ours")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isqrt", default="target/release/isqrt", help="the binary")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda:0")
    parser.add_argument("--tf32", action="store_true", help="PyTorch may round products to TF32")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 10])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--positions", type=int, nargs="+", default=[196, 784])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 3, 5, 7])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, default=1.0, help="per side and round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.manual_seed(1)
    dim, on_gpu = args.dim, args.device.type == "cuda"
    index = torch.triu_indices(dim, dim)
    index = (index[0] * dim + index[1]).to(args.device)
    where = torch.cuda.get_device_name(args.device) if on_gpu else f"{args.threads} threads"
    precision = "TF32" if args.tf32 else "f32"
    print(f"torch {torch.__version__}, {where}, d = {dim}, ms a batch, torch in {precision}")
    minimax = [
        ("cubic minimax, 3 steps, against N=5", "cubic", "0.1", "3"),
        ("nonic minimax, 1 step, against N=5", "nonic", "0.1", "1"),
    ]
    check_backward()
    for positions in args.positions:
        for batch in args.batch:
            x = torch.randn(batch, dim, positions).to(args.device)
            cases = [(f"N={n}", n, ["--iterations", str(n)]) for n in args.iterations]
            for name, schedule, lower, steps in minimax:
                options = ["--schedule", schedule, "--lower", lower, "--iterations", steps]
                cases.append((name, 5, options))
            cases = [(name, n, options, layer) for name, n, options in cases]
            if on_gpu:
                compiled = torch.compile(plain)
                five = ["--iterations", "5"]
                cases.append(("N=5, torch.compile", 5, five, compiled))
                cases.append(("N=5, torch by EIG", 5, five, by_eig))
            for name, n, schedule, function in cases:
                a, b = [], []
                for _ in range(args.rounds):
                    a.append(torch_times(x, n, index, args.seconds, function))
                    options = (args.threads, args.device, batch, dim, positions, schedule)
                    b.append(ours(args.isqrt, *options, args.seconds))
                (tf, tb), (of, ob) = (
                    [statistics.median(column) for column in zip(*rows)] for rows in (a, b)
                )
                print(
                    f"batch {batch:3} M {positions:4} {name:36}"
                    f" torch {tf:8.2f} + {tb:8.2f}   ours {of:8.2f} + {ob:8.2f}"
                    f"   ratio {(tf + tb) / (of + ob):5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
