//! Improved B-CNN: the matrix square root of bilinear pooling.

use super::normalize;
use crate::Result;
use crate::config::{self, Output, not_negative};
use crate::eig::{Power, Spectral};
use crate::lyapunov::{frobenius, newton_schulz, solve};
use crate::moment::{Method, Moment, pool};
use crate::reference::{Number, add_diagonal, scaled, sum, transposed};
use candle_core::Tensor;
use faer::Mat;

/// Bilinear pooling with a matrix square root before the signed root and the l2 normalisation.
///
/// Lin, Maji, *Improved Bilinear Pooling with CNNs* (BMVC 2017): `C = (XXᵀ/M + εI)^(1/2)`, the whole
/// matrix, then [`normalize`]. Facts as in msubhransu/matrix-sqrt.
///
/// # Known troubles
/// - The size of `ε` in the paper is not among the sources at hand; 1e-3 is ours.
/// - Newton's steps leave small eigenvalues short of their roots: after `n` steps, those below
///   `1.5^(-2n)` of `‖A‖_F` (3e-4 for 10). The backward steps leave pairs of them short too, so with
///   few steps the gradient is not exactly that of the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImprovedBilinear {
    /// How the root and its gradient are computed.
    pub root: NewtonOrSvd,
    /// What is added to the eigenvalues, at least 0.
    pub epsilon: f64,
}

/// How the root of [`ImprovedBilinear`] and its gradient are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewtonOrSvd {
    /// Newton–Schulz steps from `A/‖A‖_F`; as many steps for the Lyapunov equation, from
    /// `C/‖C‖_F`.
    Newton {
        /// The number of steps, 1 to 20.
        iterations: usize,
    },
    /// The decomposition, which also solves the Lyapunov equation: `G_ij / (√λi + √λj)` in its
    /// basis. The method's SVD is the eigendecomposition, see [`eig`](crate::eig).
    Svd,
}

impl Default for ImprovedBilinear {
    /// 10 steps of Newton, the default of matrix-sqrt.
    fn default() -> Self {
        Self {
            root: NewtonOrSvd::Newton { iterations: 10 },
            epsilon: 1e-3,
        }
    }
}

impl ImprovedBilinear {
    /// Checks the options; `forward` does so too.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) names the option.
    pub fn validate(&self) -> Result<()> {
        if let NewtonOrSvd::Newton { iterations } = self.root {
            config::iterations(iterations)?;
        }
        not_negative("epsilon", self.epsilon)
    }

    /// Pools feature maps, differentiably. Zero features have zero gradients.
    ///
    /// # Shapes
    /// - `x`: `(batch, d, height, width)` or `(batch, d, positions)`, f32 or f64
    /// - returns `(batch, d²)` of length 1, of the same type
    ///
    /// # Errors
    /// As [`CovPool::forward`](crate::CovPool::forward), and
    /// [`Error::Decomposition`](crate::Error::Decomposition).
    ///
    /// # Cost
    /// With `n` steps of Newton `3n - 3` products of size `d` forward and `5n - 1` backward; with the
    /// decomposition as in [`eig`](crate::eig). One matrix waits for the backward pass, and one
    /// for the normalisation's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.validate()?;
        let epsilon = self.epsilon;
        let root = match self.root {
            NewtonOrSvd::Newton { iterations } => {
                let method = Newton {
                    iterations,
                    epsilon,
                };
                pool(x, Moment::ABOUT_ZERO, method)?
            }
            NewtonOrSvd::Svd => {
                let power = 0.5;
                let function = Power { power, epsilon };
                let output = Output::Full;
                pool(x, Moment::ABOUT_ZERO, Spectral { function, output })?
            }
        };
        normalize(&root.flatten_from(1)?)
    }
}

struct Newton {
    iterations: usize,
    epsilon: f64,
}

impl<T: Number> Method<T> for Newton {
    /// The root.
    type Kept = Mat<T>;

    fn shape(&self, size: usize) -> Vec<usize> {
        Output::Full.shape(size)
    }

    fn forward(&self, moment: Mat<T>, _index: usize) -> Result<(Vec<T>, Mat<T>)> {
        let a = add_diagonal(moment, T::nearest(self.epsilon));
        let root = match frobenius(&a) {
            Some(norm) => {
                let y = newton_schulz(&scaled(T::nearest(1.0 / norm), &a), self.iterations);
                scaled(T::nearest(norm.sqrt()), &y)
            }
            None => Mat::zeros(a.nrows(), a.ncols()),
        };
        Ok((Output::Full.read(&root), root))
    }

    fn backward(&self, root: &Mat<T>, gradient: &[T]) -> Mat<T> {
        let g = Output::Full.matrix(root.nrows(), gradient);
        let Some(norm) = frobenius(root) else {
            return Mat::zeros(root.nrows(), root.ncols());
        };
        let half = T::nearest(0.5 / norm);
        let q = sum(half, &g, half, &transposed(&g));
        solve(&scaled(T::nearest(1.0 / norm), root), &q, self.iterations)
    }
}
