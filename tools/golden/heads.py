#!/usr/bin/env python3
"""Makes crates/linalg/tests/golden/heads.safetensors and crates/models/tests/golden/dropcov.safetensors:
pooling heads in f64, written plainly from the papers' formulas, differentiated by PyTorch.

Where a method is published with an adjoint of its own that is not the gradient of its forward pass
(MTP, MPA, Improved B-CNN by Newton's steps, SVD-Pade), that adjoint is written down here and PyTorch
differentiates the rest. Needs torch, numpy, mpmath and safetensors:

    python3 tools/golden/heads.py
"""

import hashlib
import pathlib

import mpmath
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve()
CRATES = HERE.parents[2] / "crates"


def transposed(x):
    return x.transpose(1, 2)


def centred(x):
    """Factor of the covariance, M - 1 columns: the null direction of the mean is rotated away."""
    m = x.shape[2]
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(m, 1), torch.eye(m)[:, 1:]], 1))
    return x @ basis[:, 1:] / m**0.5


def about_zero(x):
    return x / x.shape[2] ** 0.5


def gaussian(x, beta):
    mean = x.mean(2, keepdim=True)
    ones = torch.ones(x.shape[0], 1, x.shape[2])
    return torch.cat([x - (1 - beta) * mean, ones], 1) / x.shape[2] ** 0.5


def spectral(z, f):
    """f(zz') by eigh, on the side where eigenvalues do not repeat: PyTorch's gradient needs that."""
    size = z.shape[1]
    if size <= z.shape[2]:
        values, u = torch.linalg.eigh(z @ transposed(z))
        return u @ torch.diag_embed(f(values)) @ transposed(u)
    zero = f(torch.zeros(()))
    values, v = torch.linalg.eigh(transposed(z) @ z)
    inside = v @ torch.diag_embed((f(values) - zero) / values) @ transposed(v)
    return zero * torch.eye(size) + z @ inside @ transposed(z)


def triangle(c):
    i, j = torch.triu_indices(c.shape[1], c.shape[1])
    return c[:, i, j]


def normalize(y):
    return F.normalize(y.sign() * (y.abs() + 1e-8).sqrt())


def frobenius(a):
    return a.pow(2).sum((1, 2), keepdim=True).sqrt()


def eye_like(a):
    return torch.eye(a.shape[1]).expand_as(a)


def lyapunov(b, c, n):
    three = 3 * eye_like(b)
    for _ in range(n):
        square = b @ b
        c = 0.5 * (c @ (three - square) - square @ c + b @ c @ b)
        b = 0.5 * b @ (three - square)
    return 0.5 * c


class Newton(torch.autograd.Function):
    """Newton-Schulz forward, Lyapunov backward (msubhransu/matrix-sqrt)."""

    @staticmethod
    def forward(ctx, a, n):
        norm = frobenius(a)
        y, z = a / norm, eye_like(a)
        for _ in range(n):
            t = 0.5 * (3 * eye_like(a) - z @ y)
            y, z = y @ t, t @ z
        root = y * norm.sqrt()
        ctx.save_for_backward(root)
        ctx.n = n
        return root

    @staticmethod
    def backward(ctx, g):
        (root,) = ctx.saved_tensors
        norm = frobenius(root)
        return lyapunov(root / norm, g / norm, ctx.n), None


class Approximant(torch.autograd.Function):
    """MTP and MPA (KingJamesSong/FastDifferentiableMatSqrt), coefficients from mpmath."""

    @staticmethod
    def forward(ctx, a, form, degree):
        norm = frobenius(a)
        p = eye_like(a) - a / norm
        with mpmath.workdps(40):
            terms = 2 * degree if form == "mpa" else degree
            series = [mpmath.binomial(mpmath.mpf(1) / 2, k) * (-1) ** k for k in range(terms + 1)]
            numerator, denominator = mpmath.pade(series, degree, degree) if form == "mpa" else (series, [1])
        root = Approximant.sum(denominator, p).inverse() @ Approximant.sum(numerator, p) * norm.sqrt()
        ctx.save_for_backward(root, norm)
        return root

    @staticmethod
    def sum(coefficients, p):
        out, power = torch.zeros_like(p), eye_like(p)
        for c in coefficients:
            out, power = out + float(c) * power, power @ p
        return out

    @staticmethod
    def backward(ctx, g):
        root, norm = ctx.saved_tensors
        return lyapunov(root / norm.sqrt(), g / norm.sqrt(), 8), None, None


class SvdPade(torch.autograd.Function):
    """Root by SVD forward, K of the eigenvectors' derivative by Pade approximants backward
    (KingJamesSong/DifferentiableSVD, SVD_Pade.py), with that code's 20 digits."""

    @staticmethod
    def forward(ctx, a):
        _, s, vh = torch.linalg.svd(a)
        s, v = s.clamp_min(torch.finfo(a.dtype).eps), transposed(vh)
        ctx.save_for_backward(s, v)
        return v @ torch.diag_embed(s.sqrt()) @ vh

    @staticmethod
    def backward(ctx, g):
        s, v = ctx.saved_tensors
        with mpmath.workdps(20):
            series = mpmath.taylor(lambda x: 1 / (1 - x), 0, 100)
            top, bottom = ([float(c) for c in part] for part in mpmath.pade(series, 50, 50))
        size = s.shape[1]
        rows, columns = s.unsqueeze(2).expand(-1, size, size), s.unsqueeze(1).expand(-1, size, size)
        high, low = torch.maximum(rows, columns), torch.minimum(rows, columns)
        ratio = low / high
        powers = torch.stack([ratio**k for k in range(51)])
        value = torch.tensordot(torch.tensor(top), powers, 1) / torch.tensordot(torch.tensor(bottom), powers, 1)
        k = torch.where(rows == columns, 0.0, torch.where(rows > columns, value, -value) / high)
        both = g + transposed(g)
        d_vectors = both @ v @ torch.diag_embed(s.sqrt())
        d_values = 0.5 * s**-0.5 * torch.diagonal(transposed(v) @ g @ v, dim1=1, dim2=2)
        inside = transposed(k) * (transposed(v) @ d_vectors) + torch.diag_embed(d_values)
        return v @ inside @ transposed(v)


def sketch(x, hashes, signs, dim):
    """Tensor Sketch by Fourier transform, summed over positions."""
    maps = [torch.zeros(x.shape[1], dim).scatter_(1, h[:, None].long(), s[:, None]) for h, s in zip(hashes, signs)]
    first, second = (torch.fft.fft(transposed(x) @ m) for m in maps)
    y = torch.fft.ifft(first * second).real.sum(1)
    # Places that no pair of channels meets are rounding errors here, which the signed root would show.
    return y * (y.abs() > 1e-12)


def maclaurin(x, signs):
    first, second = (w @ x for w in signs)
    return (first * second).sum(2) / signs[0].shape[0] ** 0.5


def heads(record):
    wide, tall = torch.randn(2, 12, 9), torch.randn(2, 7, 20)
    for name, x in (("wide", wide), ("tall", tall)):
        # Means apart from zero, as after a ReLU.
        x = x + 0.5

        def matrix(head, function):
            record(f"{name}.{head}", x, function)

        def whole(head, function):
            matrix(head, lambda x: normalize(function(x).flatten(1)))

        matrix("deepo2p", lambda x: triangle(spectral(about_zero(x), lambda v: (v + 1e-3).log())))
        for beta, epsilon in ((1.0, 1e-3), (0.5, 0.0)):
            matrix(
                f"g2denet-{beta}-{epsilon}",
                lambda x: spectral(gaussian(x, beta), lambda v: (v + epsilon).sqrt()),
            )
        whole("bcnn", lambda x: about_zero(x) @ transposed(about_zero(x)))
        whole("impbcnn-svd", lambda x: spectral(about_zero(x), lambda v: (v + 1e-3).sqrt()))
        for n in (1, 2, 10):

            def newton(x):
                a = about_zero(x) @ transposed(about_zero(x))
                return Newton.apply(a + 1e-3 * eye_like(a), n)

            whole(f"impbcnn-{n}", newton)
        for form, degree in (("mtp", 10), ("mtp", 3), ("mpa", 5), ("mpa", 2)):

            def approximant(x):
                return triangle(Approximant.apply(centred(x) @ transposed(centred(x)), form, degree))

            matrix(f"{form}-{degree}", approximant)
        if name == "tall":
            # Eigenvalues at the floor have gradients that are rounding errors times 1e8 in the formula.
            matrix("svd_pade", lambda x: triangle(SvdPade.apply(centred(x) @ transposed(centred(x)))))
        d, dim = x.shape[1], 32
        hashes = [torch.randint(0, dim, (d,)).double() for _ in range(2)]
        signs = [(2 * torch.randint(0, 2, (d,)) - 1).double() for _ in range(2)]
        record(
            f"{name}.cbp-sketch",
            x,
            lambda x: normalize(sketch(x, hashes, signs, dim)),
            h1=hashes[0],
            h2=hashes[1],
            s1=signs[0],
            s2=signs[1],
        )
        rows = [(2 * torch.randint(0, 2, (dim, d)) - 1).double() for _ in range(2)]
        record(f"{name}.cbp-maclaurin", x, lambda x: normalize(maclaurin(x, rows)), s1=rows[0], s2=rows[1])


def dropcov(record, tensors):
    """The attention and its rate (mingzeG/DropCov, acd/models/ResNet_ACD.py); no channel is dropped."""
    weight = torch.tensor([[[0.5, 1.0, -0.25]]])

    def attention(x, weight):
        y = F.conv1d(x.mean(2).unsqueeze(1), weight, padding=1).transpose(1, 2).softmax(1)
        return x * y + x, y

    def covariance(x):
        return centred(x) @ transposed(centred(x))

    def training(x):
        return triangle(covariance(attention(x, weight)[0]))

    x = torch.randn(3, 6, 5).abs()
    weight.requires_grad_(True)
    record("training", x, training, weight=weight)
    y = training(x)
    (tensors["training.dweight"],) = torch.autograd.grad((y * tensors["training.g"]).sum(), weight)
    for name, x in (("few", x), ("many", torch.randn(4, 48, 9).abs())):
        scaled, y = attention(x, weight)
        strength = covariance(scaled).sum(2)
        rate = F.cosine_similarity(y.squeeze(2), strength).mean()
        rate = 1 - 10 / torch.tensor(float(x.shape[1])).log2() * rate
        tensors[f"{name}.x"], tensors[f"{name}.p"] = x, rate.clamp(0, 1).detach()
        print(f"dropcov {name}: drops {rate.item():.3f}")


def recorder(tensors):
    def record(name, x, function, **others):
        x = x.clone().requires_grad_(True)
        y = function(x)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        assert dx.isfinite().all(), name
        for key, value in {"x": x, "y": y, "g": g, "dx": dx, **others}.items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()

    return record


def save(tensors, target):
    target = CRATES / target
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    metadata = {"generator": "tools/golden/heads.py", "sha256": digest, "torch": torch.__version__}
    save_file(tensors, target, metadata=metadata)
    print(f"wrote {target} ({target.stat().st_size} bytes)")


def main():
    torch.manual_seed(20220425)
    torch.set_default_dtype(torch.float64)
    tensors = {}
    heads(recorder(tensors))
    save(tensors, "linalg/tests/golden/heads.safetensors")
    tensors = {}
    dropcov(recorder(tensors), tensors)
    save(tensors, "models/tests/golden/dropcov.safetensors")


if __name__ == "__main__":
    main()
