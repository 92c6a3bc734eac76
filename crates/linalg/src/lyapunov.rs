//! The square root by products, and its exact derivative as the solution of a Lyapunov equation.
//!
//! With `C² = A`, `dC·C + C·dC = dA`; the map from `dA` to `dC` is self-adjoint, so the gradient `X` of `A`
//! solves `CX + XC = G` for the gradient `G` of `C`. Solved by the iteration for the matrix sign
//! (Roberts 1980) with the steps of Newton and Schulz, as Lin and Maji 2017 and Song et al. 2022 do.

use crate::reference::{Number, add_diagonal, product, scaled, sum, transposed};
use faer::Mat;

/// `‖a‖_F`, by which matrices are divided; `None` where it is 0 or its reciprocal overflows.
pub(crate) fn frobenius<T: Number>(a: &Mat<T>) -> Option<f64> {
    let square = |value: T| value.widened() * value.widened();
    let columns = (0..a.ncols()).flat_map(|j| (0..a.nrows()).map(move |i| (i, j)));
    let norm = columns.map(|at| square(a[at])).sum::<f64>().sqrt();
    let over = T::nearest(1.0 / norm).widened();
    over.is_finite().then_some(norm)
}

/// `½(3I - m)`.
fn step<T: Number>(m: &Mat<T>) -> Mat<T> {
    add_diagonal(scaled(T::nearest(-0.5), m), T::nearest(1.5))
}

/// The root of `a`, whose eigenvalues lie in `[0, 1]`, by `n ≥ 1` coupled Newton–Schulz steps:
/// `3n - 3` products for `n ≥ 2`, 1 for `n = 1`.
pub(crate) fn newton_schulz<T: Number>(a: &Mat<T>, n: usize) -> Mat<T> {
    // The first step from Y = A, Z = I.
    let t = step(a);
    let (mut y, mut z) = (product(a, &t), t);
    for k in 1..n {
        let t = step(&product(&z, &y));
        y = product(&y, &t);
        if k + 1 < n {
            z = product(&t, &z);
        }
    }
    y
}

/// `n` steps towards the solution `X` of `rX + Xr = q`, for symmetric `q` and `r` with eigenvalues in
/// `[0, 1]`: `q ← ½(q(3I - r²) - r²q + rqr)`, `r ← ½r(3I - r²)`, `X = q/2`. 5 products a step, the last one
/// without that for `r`.
///
/// Exact in the limit where no two eigenvalues of `r` are zero. Pairs of small ones grow by 1.5 a step
/// until they have converged, and stay behind (too small) where steps are few.
pub(crate) fn solve<T: Number>(r: &Mat<T>, q: &Mat<T>, n: usize) -> Mat<T> {
    let half = T::nearest(0.5);
    let (mut r, mut q) = (r.to_owned(), q.to_owned());
    for k in 0..n {
        let square = product(&r, &r);
        let right = product(&q, &square);
        let around = product(&product(&r, &q), &r);
        // q symmetric: r²q is the transpose of qr².
        let outer = sum(half, &right, half, &transposed(&right));
        let kept = sum(T::nearest(1.5), &q, half, &around);
        q = sum(T::nearest(1.0), &kept, T::nearest(-1.0), &outer);
        if k + 1 < n {
            r = product(&r, &step(&square));
        }
    }
    scaled(half, &q)
}
