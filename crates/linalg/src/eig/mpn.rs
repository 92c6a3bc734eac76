//! MPN-COV: a power of the covariance by eigendecomposition, with its own backward.

use super::{Power, Spectral};
use crate::Result;
use crate::config::{Output, out_of_range};
use crate::moment::{Moment, pool};
use candle_core::Tensor;

/// Matrix power normalised covariance pooling by eigendecomposition.
///
/// Li, Xie, Wang, Zuo, *Is Second-order Information Helpful for Large-scale Visual Recognition?*
/// (ICCV 2017): `C = U diag(λ^α) Uᵀ` of the covariance `Σ = U diag(λ) Uᵀ`, `α = 1/2` by default,
/// without pre-normalisation. This is the baseline that iSQRT-COV replaces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MpnCov {
    /// The exponent `α`, in `(0, 1]`.
    pub power: f64,
    /// Form of the output.
    pub output: Output,
}

impl Default for MpnCov {
    fn default() -> Self {
        Self {
            power: 0.5,
            output: Output::Triangle,
        }
    }
}

impl MpnCov {
    /// Checks the options; `forward` does so too.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) names the option.
    pub fn validate(&self) -> Result<()> {
        match self.power > 0.0 && self.power <= 1.0 {
            true => Ok(()),
            false => Err(out_of_range("power", self.power, "a number in (0, 1]")),
        }
    }

    /// Pools feature maps, differentiably; one eigendecomposition an image, images in parallel.
    ///
    /// # Shapes
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Errors
    /// As there, and [`Error::Decomposition`](crate::Error::Decomposition).
    ///
    /// # Numerics
    /// The gradient is that of the matrix function, see [the module](super). Eigenvalues below
    /// `d ε λ_max` count as zero; pairs of zeros, where features have no part and the derivative is
    /// infinite, as 0.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.validate()?;
        let function = Power {
            power: self.power,
            epsilon: 0.0,
        };
        let output = self.output;
        pool(x, Moment::COVARIANCE, Spectral { function, output })
    }
}
