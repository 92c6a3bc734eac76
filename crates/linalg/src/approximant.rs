//! MTP and MPA: the square root by a matrix polynomial or a rational function of matrices.
//!
//! Song, Sebe, Wang, *Fast Differentiable Matrix Square Root* (ICLR 2022), repository
//! KingJamesSong/FastDifferentiableMatSqrt: `C = √‖Σ‖_F · r(Σ/‖Σ‖_F)` where `r(A)` approximates `A^(1/2)`
//! about the identity, and the gradient of the exact root, as the solution of a
//! Lyapunov equation, by iteration from `C/√‖Σ‖_F`.
//!
//! - MTP, matrix Taylor polynomial: `r(A) = Σ_k a_k (I - A)^k`, `√(1-x) = Σ_k a_k x^k`, of degree 10.
//! - MPA, matrix Padé approximant `[n, n]`, `n = 5`: with `m = 2n + 1`, `r` is
//!   `Σ_k C(m, 2k) A^k / Σ_k C(m, 2k+1) A^k`. For, with `s² = λ`, that is
//!   `s ((1+s)^m + (1-s)^m) / ((1+s)^m - (1-s)^m) = s + O((1-s)^m)`, a quotient of polynomials of degree
//!   `n` in `λ`: the definition. The official code finds the same in powers of `I - A` from the
//!   Taylor coefficients.
//!
//! # Cost
//! Products of size `d`, forward: MTP 5 at degree 10 (Paterson and Stockmeyer 1973; the official code
//! takes 10), MPA `n - 1` = 4 and one Cholesky solve with `d` right sides (the denominator's
//! eigenvalues lie in `[2n+1, 4^n]`, so it does not fail; the official code solves by LU). Backward `5k - 1` for `k`
//! Lyapunov steps, 39 for 8. One matrix waits for the backward pass.
//!
//! # Known troubles
//! - Zero eigenvalues do not become 0: `r(0)` is `C(2n, n)/4^n` for MTP (0.176 at degree 10)
//!   and `1/(2n+1)` for MPA (0.091), times `√‖Σ‖_F`. Covariances of few positions have many.
//! - The backward pass is that of the exact root, not of the approximant; and its 8 steps leave
//!   pairs of eigenvalues below about `1.5^(-16)` = 1.5e-3 of `‖Σ‖_F` short of it.
//! - The official Taylor routine adds up in the tensor that holds the identity for the backward
//!   pass, whose `3I` is wrong then; the formulas here are the paper's.

use crate::config::{self, Output};
use crate::lyapunov::{frobenius, solve};
use crate::moment::{Method, Moment, pool};
use crate::reference::{Number, add_diagonal, cholesky_solve, product, scaled, sum, transposed};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;

/// Covariance pooling with an approximate root about the identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Approximant {
    /// Polynomial or rational.
    pub form: Form,
    /// Degree of the polynomial, 1 to 30; or of numerator and denominator, 1 to 8, since the condition
    /// of the denominator grows as `4^n / (2n+1)`.
    pub degree: usize,
    /// Steps of the Lyapunov equation's iteration backward, 1 to 20.
    pub iterations: usize,
    /// Form of the output.
    pub output: Output,
}

/// What approximates the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Matrix Taylor polynomial (MTP).
    Taylor,
    /// Matrix Padé approximant (MPA).
    Pade,
}

impl Approximant {
    /// MTP of degree 10, 8 steps backward, triangle.
    pub fn taylor() -> Self {
        Self {
            form: Form::Taylor,
            degree: 10,
            iterations: 8,
            output: Output::Triangle,
        }
    }

    /// MPA `[5, 5]`, 8 steps backward, triangle.
    pub fn pade() -> Self {
        Self {
            form: Form::Pade,
            degree: 5,
            ..Self::taylor()
        }
    }

    /// Checks the options; `forward` does so too.
    ///
    /// # Errors
    /// [`Error::Option`] names the option.
    pub fn validate(&self) -> Result<()> {
        let (most, expected) = match self.form {
            Form::Taylor => (30, "a number from 1 to 30"),
            Form::Pade => (8, "a number from 1 to 8"),
        };
        if !(1..=most).contains(&self.degree) {
            return Err(config::out_of_range("degree", self.degree, expected));
        }
        config::iterations(self.iterations)
    }

    /// Pools feature maps, differentiably. Constant features give zeros, and zero gradients.
    ///
    /// # Shapes
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Errors
    /// As there, and [`Error::Decomposition`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.validate()?;
        pool(x, Moment::COVARIANCE, *self)
    }
}

/// The root over `√‖Σ‖_F`, and that norm; none where the covariance vanishes.
pub(crate) struct Root<T> {
    root: Mat<T>,
    norm: Option<f64>,
}

impl<T: Number> Method<T> for Approximant {
    type Kept = Root<T>;

    fn shape(&self, size: usize) -> Vec<usize> {
        self.output.shape(size)
    }

    fn forward(&self, moment: Mat<T>, index: usize) -> Result<(Vec<T>, Root<T>)> {
        let norm = frobenius(&moment);
        let Some(divisor) = norm else {
            let root = Mat::zeros(moment.nrows(), moment.ncols());
            return Ok((self.output.read(&root), Root { root, norm }));
        };
        let a = scaled(T::nearest(1.0 / divisor), &moment);
        let root = match self.form {
            Form::Taylor => {
                let distance = add_diagonal(scaled(T::nearest(-1.0), &a), T::nearest(1.0));
                polynomial(&taylor(self.degree), &distance)
            }
            Form::Pade => rational(self.degree, &a).ok_or(Error::Decomposition {
                index,
                what: "Cholesky decomposition",
            })?,
        };
        let out = self.output.read(&scaled(T::nearest(divisor.sqrt()), &root));
        Ok((out, Root { root, norm }))
    }

    fn backward(&self, kept: &Root<T>, gradient: &[T]) -> Mat<T> {
        let root = &kept.root;
        let Some(norm) = kept.norm else {
            return Mat::zeros(root.nrows(), root.ncols());
        };
        let g = self.output.matrix(root.nrows(), gradient);
        let half = T::nearest(0.5 / norm.sqrt());
        let q = sum(half, &g, half, &transposed(&g));
        solve(root, &q, self.iterations)
    }
}

/// Coefficients of `√(1-x)` up to `x^degree`.
fn taylor(degree: usize) -> Vec<f64> {
    let mut out = vec![1.0];
    for k in 1..=degree {
        // a_k / a_(k-1) = (k - 1 - 1/2) / k.
        out.push(out[k - 1] * (k as f64 - 1.5) / k as f64);
    }
    out
}

/// `Σ c_k p^k` in about `2√n` products (Paterson and Stockmeyer 1973): powers up to `p^s`, then
/// Horner's rule in `p^s` on blocks of `s` coefficients.
fn polynomial<T: Number>(c: &[f64], p: &Mat<T>) -> Mat<T> {
    let n = p.nrows();
    let s = (c.len() as f64).sqrt().floor().max(1.0) as usize;
    let mut powers = vec![p.to_owned()];
    while powers.len() < s {
        powers.push(product(&powers[powers.len() - 1], p));
    }
    let block = |c: &[f64]| {
        let mut out = scaled(T::nearest(c[0]), &Mat::identity(n, n));
        for (&c, power) in c[1..].iter().zip(&powers) {
            out = sum(T::nearest(1.0), &out, T::nearest(c), power);
        }
        out
    };
    let mut blocks = c.chunks(s).rev();
    let mut out = block(blocks.next().unwrap_or(&[0.0]));
    for c in blocks {
        let shifted = product(&out, &powers[s - 1]);
        out = sum(T::nearest(1.0), &shifted, T::nearest(1.0), &block(c));
    }
    out
}

/// The Padé approximant `[n, n]` of the root about the identity.
fn rational<T: Number>(n: usize, a: &Mat<T>) -> Option<Mat<T>> {
    let size = a.nrows();
    let m = 2 * n + 1;
    // Divided by 2^(2n), the denominator at λ = 1.
    let mut binomial = 0.25_f64.powi(n as i32);
    let mut power: Mat<T> = Mat::identity(size, size);
    let (mut numerator, mut denominator) = (Mat::zeros(size, size), Mat::zeros(size, size));
    for k in 0..=n {
        if k > 0 {
            power = if k == 1 {
                a.to_owned()
            } else {
                product(&power, a)
            };
        }
        let one = T::nearest(1.0);
        numerator = sum(one, &numerator, T::nearest(binomial), &power);
        binomial *= (m - 2 * k) as f64 / (2 * k + 1) as f64;
        denominator = sum(one, &denominator, T::nearest(binomial), &power);
        binomial *= (m - 2 * k - 1) as f64 / (2 * k + 2) as f64;
    }
    cholesky_solve(denominator, numerator)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn scalar(value: f64) -> Mat<f64> {
        Mat::from_fn(1, 1, |_, _| value)
    }

    #[test]
    fn taylor_polynomials_are_summed_right() {
        assert_eq!(taylor(4), [1.0, -0.5, -0.125, -0.0625, -0.0390625]);
        for degree in 1..=30 {
            let c = taylor(degree);
            for x in [0.0, 0.3, 1.0] {
                let plain: f64 = (0..=degree).map(|k| c[k] * f64::powi(x, k as i32)).sum();
                let found = polynomial(&c, &scalar(x))[(0, 0)];
                assert!((found - plain).abs() < 1e-14, "{degree} {x}");
            }
        }
        // The known trouble.
        assert!((polynomial(&taylor(10), &scalar(1.0))[(0, 0)] - 0.176_197_052).abs() < 1e-9);
    }

    #[test]
    fn pade_approximants_touch_the_root_to_their_order() {
        for n in 1..=8 {
            for x in [0.02, 0.1] {
                let found = rational(n, &scalar(1.0 - x)).unwrap()[(0, 0)];
                // The first term of the error, s + 2s((1-s)/(1+s))^m.
                let s = f64::sqrt(1.0 - x);
                let bound = 3.0 * f64::powi((1.0 - s) / (1.0 + s), 2 * n as i32 + 1);
                assert!((found - s).abs() < bound + 1e-14, "{n} {x}: {found} {s}");
            }
            let zero = rational(n, &scalar(0.0)).unwrap()[(0, 0)];
            assert!((zero * (2 * n + 1) as f64 - 1.0).abs() < 1e-12);
        }
    }
}
