//! G²DeNet: the square root of a Gaussian's embedding.

use super::{Power, Spectral};
use crate::Result;
use crate::config::{Output, not_negative};
use crate::moment::{Moment, pool};
use candle_core::Tensor;

/// Pooling of a Gaussian: mean and covariance in one matrix, to the power 1/2.
///
/// Wang, Li, Zhang, *G²DeNet: Global Gaussian Distribution Embedding Network and Its Application to
/// Visual Recognition* (CVPR 2017): mean `μ` and covariance `Σ` of the features as one matrix,
///
/// ```text
/// C = [ Σ + β²μμᵀ   βμ ]^(1/2)
///     [   βμᵀ       1  ]
/// ```
///
/// of size `d + 1`. With `Z = [X - (1 - β)μ1ᵀ; 1ᵀ]/√M` the embedding is `ZZᵀ`, so it is pooled as any other
/// moment.
///
/// # Choices
/// Those of the authors' code (`nnfspool_forward_Gaussian.m`, `vl_GlbGaussian_nn.m`, as they stand
/// in the code of MoNet, Gou et al. 2018) where it has any: `β = 1` (the blocks are `XXᵀ/M` and `μ`),
/// `ε = 1e-3` for its `diag_fun`, which in the same authors' code of MPN-COV is `(λ + ε)^α`, and the whole
/// matrix, `(d + 1)²` values (263 169 for 512 channels). Two differences: that code leaves out
/// eigenvalues up to 1e-10 (a jump from 0 to `√ε`, without a gradient between both sides), here `ε`
/// is added to all of them; and the method is listed under SVD (Li et al. 2018, table 1), while that
/// code calls `eig`, as here.
///
/// What it does around the layer, element by element, is not part of this: a root of the features
/// before, signed root and l2 normalisation ([`normalize`](crate::bilinear::normalize())) after.
///
/// # Known troubles
/// One eigenvalue carries the mean and the 1: with `β = 1` and features after a ReLU, it dwarfs all
/// others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GaussianEmbedding {
    /// Weight `β` of the mean, at least 0.
    pub beta: f64,
    /// What is added to the eigenvalues, at least 0.
    pub epsilon: f64,
    /// Form of the output.
    pub output: Output,
}

impl Default for GaussianEmbedding {
    fn default() -> Self {
        Self {
            beta: 1.0,
            epsilon: 1e-3,
            output: Output::Full,
        }
    }
}

impl GaussianEmbedding {
    /// Checks the options; `forward` does so too.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) names the option.
    pub fn validate(&self) -> Result<()> {
        not_negative("beta", self.beta)?;
        not_negative("epsilon", self.epsilon)
    }

    /// Pools feature maps, differentiably. Constant features have the gradient of their mean.
    ///
    /// # Shapes
    /// - `x`: `(batch, d, height, width)` or `(batch, d, positions)`, f32 or f64
    /// - returns `(batch, d + 1, d + 1)`, or `(batch, (d+1)(d+2)/2)` for
    ///   [`Output::Triangle`], of the same type
    ///
    /// # Errors
    /// As [`CovPool::forward`](crate::CovPool::forward), and
    /// [`Error::Decomposition`](crate::Error::Decomposition).
    ///
    /// # Cost
    /// See [the module](super), with `d + 1` for `d`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.validate()?;
        let moment = Moment {
            removed: 1.0 - self.beta,
            ones: true,
        };
        let function = Power {
            power: 0.5,
            epsilon: self.epsilon,
        };
        let output = self.output;
        pool(x, moment, Spectral { function, output })
    }

    /// Values an image for `d` channels.
    pub fn out_dim(&self, d: usize) -> usize {
        self.output.len(d + 1)
    }
}
