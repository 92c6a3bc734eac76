//! SVD-Padé: the exact square root in double precision, with the Padé-approximated adjoint.

use super::{Scalar, Spectral};
use crate::Result;
use crate::config::Output;
use crate::moment::{Moment, pool_in_double};
use candle_core::Tensor;

/// Covariance pooling with the exact root in double precision and a floor under the eigenvalues, and
/// the Padé-approximated adjoint (SVD-Padé).
///
/// Song, Sebe, Wang, *Why Approximate Matrix Square Root Outperforms Accurate SVD in Global Covariance
/// Pooling?* (ICCV 2021), `SVD_Pade.py` of KingJamesSong/DifferentiableSVD: `C = Σ^(1/2)` in double
/// precision, eigenvalues up to the machine's epsilon (2.2e-16) raised to it. Backpropagation through
/// eigenvectors needs `K_ij = 1/(λi - λj)`, which is written as a geometric series in the ratio of
/// both, `1/λi · 1/(1 - λj/λi)` with `λi > λj`, and the series is replaced by its `[50, 50]` Padé
/// approximant.
///
/// # What the approximant is
/// The Padé approximant `[m, n]`, `n ≥ 1`, of a rational function of lower degrees is that function: for
/// the geometric series it is `1/(1 - x)` itself, for every degree. (Its equations are singular; the
/// coefficients that the official code finds are the rounding errors of its 20 digits, in a
/// numerator and a denominator whose common factors cancel to within 1e-13.) So the published adjoint is
/// that of the exact root wherever eigenvalues differ, and is computed here as such: for the
/// square root, `(√λi - √λj) K_ij = 1/(√λi + √λj)`, without cancellation. The published code differs
/// where eigenvalues are equal: above the floor, off the diagonal, it has 0 in place of the limit,
/// which is taken here; at the floor it has 0 off the diagonal and `1/(2√2.2e-16)` on it, where the
/// features have no part: 0 here.
///
/// So beside [`MpnCov`](super::MpnCov) of power 1/2 this is: double precision whatever the type of the
/// features, and a floor. The decomposition is that of symmetric matrices, as [everywhere](super)
/// here; the official code calls `torch.svd` on the CPU.
///
/// # Known troubles
/// Eigenvalues at the floor have the factor `1/√λi` to others: gradients of rank-deficient
/// covariances are large, as those of the exact root are. Between an eigenvalue above the floor and one
/// below it the factor is `1/(√λi + √ε)`, as in the published code, not the quotient of the floored
/// roots, which is up to half of that; it matters for eigenvalues of a few 1e-16.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SvdPade {
    /// Form of the output.
    pub output: Output,
}

impl SvdPade {
    /// Pools feature maps, differentiably.
    ///
    /// # Shapes
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Errors
    /// As there, and [`Error::Decomposition`](crate::Error::Decomposition).
    ///
    /// # Cost
    /// See [the module](super), in f64.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let output = self.output;
        let function = FlooredRoot;
        pool_in_double(x, Moment::COVARIANCE, Spectral { function, output })
    }
}

/// `√max(λ, ε)` with the machine's epsilon.
struct FlooredRoot;

impl Scalar for FlooredRoot {
    fn value(&self, eigenvalue: f64) -> f64 {
        eigenvalue.max(f64::EPSILON).sqrt()
    }

    fn divided_difference(&self, a: f64, b: f64) -> f64 {
        match a.max(b) > f64::EPSILON {
            true => 1.0 / (self.value(a) + self.value(b)),
            false => 0.0,
        }
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> super::gpu::Function {
        super::gpu::Function::FlooredRoot {
            floor: f64::EPSILON,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_differences_are_finite_and_right() {
        super::super::tests::check(&FlooredRoot, |x| 0.5 / x.sqrt());
        assert_eq!(FlooredRoot.divided_difference(0.0, 0.0), 0.0);
    }
}
