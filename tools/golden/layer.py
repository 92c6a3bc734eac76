#!/usr/bin/env python3
"""Makes crates/linalg/tests/golden/layer.safetensors: the layer by PyTorch's own autograd in f64.

Written plainly from the paper's formulas with full matrices, so that it shares nothing with the
Rust side: PyTorch differentiates it. Needs torch, numpy and safetensors:

    python3 tools/golden/layer.py
"""

import hashlib
import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/linalg/tests/golden/layer.safetensors"


def covariance(x):
    x = x - x.mean(2, keepdim=True)
    return x @ x.transpose(1, 2) / x.shape[2]


def newton_schulz(a, n):
    eye = torch.eye(a.shape[1], dtype=a.dtype).expand_as(a)
    y, z = a, eye
    for _ in range(n):
        t = 0.5 * (3.0 * eye - z @ y)
        y, z = y @ t, t @ z
    return y


def layer(x, n, norm, post):
    sigma = covariance(x)
    if norm == "trace":
        s = sigma.diagonal(dim1=1, dim2=2).sum(1)
    else:
        s = sigma.pow(2).sum((1, 2)).sqrt()
    s = s.view(-1, 1, 1)
    y = newton_schulz(sigma / s, n)
    return y * s.sqrt() if post else y


def matrix_power(x, power):
    values, vectors = torch.linalg.eigh(covariance(x))
    return vectors @ torch.diag_embed(values.clamp_min(0) ** power) @ vectors.transpose(1, 2)


def main():
    torch.manual_seed(20180618)
    torch.set_default_dtype(torch.float64)
    tensors = {}

    def record(name, x, function):
        x = x.clone().requires_grad_(True)
        full = function(x)
        d = full.shape[1]
        i, j = torch.triu_indices(d, d)
        y = full[:, i, j]
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        for key, value in {"x": x, "y": y, "g": g, "dx": dx}.items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()

    wide, tall = torch.randn(2, 12, 3, 3), torch.randn(2, 7, 20)
    for n in (1, 2, 3, 5, 7):
        for name, x in (("wide", wide), ("tall", tall)):
            flat = x.flatten(2)
            record(f"{name}.trace.{n}", flat, lambda x, n=n: layer(x, n, "trace", True))
    record("wide.frobenius.5", wide.flatten(2), lambda x: layer(x, 5, "frobenius", True))
    record("wide.trace-alone.5", wide.flatten(2), lambda x: layer(x, 5, "trace", False))
    record("tall.plain", tall, covariance)
    record("tall.mpn-0.5", tall, lambda x: matrix_power(x, 0.5))
    record("tall.mpn-0.3", tall, lambda x: matrix_power(x, 0.3))

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    metadata = {"generator": "tools/golden/layer.py", "sha256": digest, "torch": torch.__version__}
    save_file(tensors, TARGET, metadata=metadata)
    print(f"wrote {TARGET} ({TARGET.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
