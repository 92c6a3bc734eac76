//! Functions of the second moment by eigendecomposition, `f(A) = U diag(f(λ)) Uᵀ` of
//! `A = U diag(λ) Uᵀ`, with the exact adjoint; one file a method.
//!
//! Several of the methods are published with a singular value decomposition. That of a symmetric
//! positive semi-definite matrix is its eigendecomposition, which takes about half of the time, so
//! that is what runs here.
//!
//! # The adjoint
//! Daleckii and Krein: in the basis of eigenvectors the gradient is multiplied, entry by entry, with
//! the divided differences `(f(λi) - f(λj)) / (λi - λj)`. These are computed without the difference
//! of the eigenvalues in the denominator and continue as `f'` where eigenvalues meet, so repeated
//! and nearly equal eigenvalues are as good as any. (Backpropagation through eigenvectors, as
//! published, divides by `λi - λj`.)
//!
//! # Cost
//! An image takes one eigendecomposition and one product of size `d` forward, four products
//! backward, besides those between features and moment (`d²M` multiply-adds forward, as many
//! backward). The eigenvectors, `d²` values, wait for the backward pass.

mod deep_o2p;
mod gaussian;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
mod mpn;
mod svd_pade;

pub use deep_o2p::DeepO2P;
pub use gaussian::GaussianEmbedding;
pub use mpn::MpnCov;
pub use svd_pade::SvdPade;

use crate::config::Output;
use crate::moment::Method;
use crate::reference::{Number, eigen, product, transposed};
use crate::{Error, Result};
use faer::Mat;

/// A function of eigenvalues that are not negative.
pub(crate) trait Scalar: Send + Sync {
    /// `f(λ)`.
    fn value(&self, eigenvalue: f64) -> f64;

    /// `(f(a) - f(b)) / (a - b)`, and `f'(a)` for `a = b`. Symmetric.
    fn divided_difference(&self, a: f64, b: f64) -> f64;

    /// The same function for a GPU.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> gpu::Function;
}

/// `(λ + ε)^p` for `p` in `(0, 1]`. Without `ε`, pairs of zeros, where features have no part and the
/// derivative is infinite, have the divided difference 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Power {
    pub(crate) power: f64,
    pub(crate) epsilon: f64,
}

impl Scalar for Power {
    fn value(&self, eigenvalue: f64) -> f64 {
        let shifted = eigenvalue + self.epsilon;
        match self.power {
            0.5 => shifted.sqrt(),
            power => shifted.powf(power),
        }
    }

    fn divided_difference(&self, a: f64, b: f64) -> f64 {
        let (low, high) = if a < b { (a, b) } else { (b, a) };
        let top = high + self.epsilon;
        let bottom = low + self.epsilon;
        if top == 0.0 {
            return 0.0;
        }
        if self.power == 0.5 {
            return 1.0 / (bottom.sqrt() + top.sqrt());
        }
        // With r = bottom/top = 1 - δ: (1 - r^p) / (1 - r), by ln_1p and exp_m1 without
        // cancellation.
        let delta = (high - low) / top;
        let ratio = if bottom == 0.0 {
            1.0
        } else if delta == 0.0 {
            self.power
        } else {
            -(self.power * (-delta).ln_1p()).exp_m1() / delta
        };
        top.powf(self.power - 1.0) * ratio
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> gpu::Function {
        gpu::Function::Power {
            power: self.power,
            epsilon: self.epsilon,
        }
    }
}

/// The method that applies a function to the eigenvalues.
pub(crate) struct Spectral<F> {
    pub(crate) function: F,
    pub(crate) output: Output,
}

/// Eigenvectors and eigenvalues of an image's moment.
pub(crate) struct Spectrum<T> {
    pub(crate) vectors: Mat<T>,
    pub(crate) values: Vec<f64>,
}

impl<T: Number> Spectrum<T> {
    /// Of a symmetric positive semi-definite matrix, on one thread; eigenvalues that are zero up to
    /// rounding (below `n ε λ_max`) are set to it.
    pub(crate) fn new(moment: &Mat<T>, index: usize) -> Result<Self> {
        // Near 1, by a power of two: the decomposition squares, which f32 does not bear at both ends.
        let largest = (0..moment.nrows()).fold(0.0, |most, i| moment[(i, i)].widened().max(most));
        let scale = match largest > 0.0 {
            true => largest.log2().floor().exp2(),
            false => 1.0,
        };
        let near_one = Mat::from_fn(moment.nrows(), moment.ncols(), |i, j| {
            T::nearest(moment[(i, j)].widened() / scale)
        });
        let (raw, vectors) = eigen(&near_one).ok_or(Error::Decomposition {
            index,
            what: "eigendecomposition",
        })?;
        let raw: Vec<f64> = raw.into_iter().map(|v| v.widened() * scale).collect();
        let most = raw.iter().fold(0.0_f64, |a, &b| a.max(b));
        let floor = most * raw.len() as f64 * T::EPSILON;
        let zeroed = raw.into_iter().map(|v| if v > floor { v } else { 0.0 });
        Ok(Self {
            vectors,
            values: zeroed.collect(),
        })
    }

    /// `U diag(f(λ)) Uᵀ`.
    pub(crate) fn apply(&self, function: &impl Scalar) -> Mat<T> {
        let u = &self.vectors;
        let scales: Vec<T> = self
            .values
            .iter()
            .map(|&v| T::nearest(function.value(v)))
            .collect();
        let scaled = Mat::from_fn(u.nrows(), u.ncols(), |i, j| u[(i, j)] * scales[j]);
        product(&scaled, &transposed(u))
    }

    /// The adjoint of [`apply`](Self::apply).
    pub(crate) fn adjoint(&self, function: &impl Scalar, upstream: &Mat<T>) -> Mat<T> {
        let u = &self.vectors;
        let ut = transposed(u);
        let mut inside = product(&product(&ut, upstream), u);
        for j in 0..inside.ncols() {
            for i in 0..inside.nrows() {
                let (a, b) = (self.values[i], self.values[j]);
                inside[(i, j)] *= T::nearest(function.divided_difference(a, b));
            }
        }
        product(&product(u, &inside), &ut)
    }
}

impl<T: Number, F: Scalar> Method<T> for Spectral<F> {
    type Kept = Spectrum<T>;

    fn shape(&self, size: usize) -> Vec<usize> {
        self.output.shape(size)
    }

    fn forward(&self, moment: Mat<T>, index: usize) -> Result<(Vec<T>, Spectrum<T>)> {
        let spectrum = Spectrum::new(&moment, index)?;
        Ok((self.output.read(&spectrum.apply(&self.function)), spectrum))
    }

    fn backward(&self, spectrum: &Spectrum<T>, gradient: &[T]) -> Mat<T> {
        let upstream = self.output.matrix(spectrum.values.len(), gradient);
        spectrum.adjoint(&self.function, &upstream)
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> Option<(gpu::Function, Output)> {
        Some((self.function.on_gpu(), self.output))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the difference quotient where that is exact enough, else the derivative.
    pub(super) fn check(function: &impl Scalar, derivative: impl Fn(f64) -> f64) {
        for (a, b) in [
            (2.0, 1.0),
            (1.0, 1.0),
            (1.0, 1.0 + 1e-13),
            (1e-6, 1e-6 + 1e-19),
            (3.0, 0.0),
            (1e-9, 5.0),
        ] {
            let found = function.divided_difference(a, b);
            let known = if (a - b).abs() > 1e-6 {
                (function.value(a) - function.value(b)) / (a - b)
            } else {
                derivative(a)
            };
            assert!(
                (found / known - 1.0).abs() < 1e-9,
                "{a} {b}: {found} {known}"
            );
            assert_eq!(found, function.divided_difference(b, a));
        }
        assert!(function.divided_difference(0.0, 0.0).is_finite());
    }

    #[test]
    fn divided_differences_are_finite_and_right() {
        for power in [0.3, 0.5, 1.0] {
            for epsilon in [0.0, 1e-3] {
                let function = Power { power, epsilon };
                check(&function, |x| power * (x + epsilon).powf(power - 1.0));
            }
            let none = Power {
                power,
                epsilon: 0.0,
            };
            assert_eq!(none.divided_difference(0.0, 0.0), 0.0);
        }
    }
}
