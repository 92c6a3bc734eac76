//! Covariance pooling without a root, the "Plain-COV" of the paper.
//!
//! # Equation
//! `Σ = (1/M) Σ_m (x_m - μ)(x_m - μ)ᵀ` (divisor `M`), upper triangle row by row, entries as they are.
//! Backward: `dX = (dΣ + dΣᵀ)(X - μ1ᵀ)/M`, centred.
//!
//! # Shapes
//! `(B, d, H, W)` to `(B, d(d+1)/2)`. No options.
//!
//! # Cost and memory
//! One symmetric product, `d²M/2` multiply-adds, and one product backward; the features are kept.
//!
//! # Known troubles
//! Large eigenvalues rule it, which is what the root is for. Mathematics and kernels: [`CovPool`].

use candle_core::Tensor;
use isqrt_linalg::{CovPool, Output, PreNormalization};
use isqrt_nn::{Mode, Scope};

use super::{NoOptions, Options, Representation, RepresentationEntry};
use crate::Result;

pub(super) const COV: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "cov"
    }

    fn about(&self) -> &'static str {
        "plain covariance, upper triangle"
    }

    fn second_order(&self) -> bool {
        true
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        _scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        options.read::<NoOptions>(self.name())?;
        let pool = CovPool::plain();
        Ok(Box::new(Covariance { pool, channels }))
    }
}

/// A [`CovPool`] as a representation.
pub(super) struct Covariance {
    pub(super) pool: CovPool,
    pub(super) channels: usize,
}

impl Representation for Covariance {
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        Ok(self.pool.forward(x)?.flatten_from(1)?)
    }

    fn out_dim(&self) -> usize {
        self.pool.out_dim(self.channels)
    }

    fn multiply_adds(&self, positions: usize) -> Option<u64> {
        let plan = self.pool.describe(self.channels, positions).ok()?;
        Some(plan.forward_multiply_adds as u64)
    }

    fn triangle(&self) -> Option<usize> {
        matches!(self.pool.output, Output::Triangle).then_some(self.channels)
    }

    fn is_centred(&self) -> bool {
        true
    }

    /// Without post-compensation the output is the root of the covariance over its norm.
    fn approximates_root(&self) -> bool {
        self.pool.root.as_ref().is_some_and(|root| {
            root.post_compensation || root.pre_normalization == PreNormalization::None
        })
    }
}
