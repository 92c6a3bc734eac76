//! Global average pooling: the mean of each channel, first order; the head of most published networks
//! (Lin et al. 2014), which covariance pooling replaces.
//!
//! # Equation
//! `y_c = (1/M) Σ_m x_cm` over the `M` positions.
//!
//! # Shapes
//! `(B, d, H, W)` to `(B, d)`. No options, no parameters.
//!
//! # Cost and memory
//! `dM` additions; nothing is kept for the backward pass, which spreads the gradient evenly.

use candle_core::Tensor;
use isqrt_nn::ops::global_avg_pool;
use isqrt_nn::{Mode, Scope};

use super::{NoOptions, Options, Representation, RepresentationEntry};
use crate::Result;

pub(super) const GAP: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "gap"
    }

    fn about(&self) -> &'static str {
        "global average pooling"
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        _scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        options.read::<NoOptions>(self.name())?;
        Ok(Box::new(GlobalAverage { channels }))
    }
}

struct GlobalAverage {
    channels: usize,
}

impl Representation for GlobalAverage {
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        Ok(global_avg_pool(x)?)
    }

    fn multiply_adds(&self, _positions: usize) -> Option<u64> {
        Some(0)
    }

    fn out_dim(&self) -> usize {
        self.channels
    }
}
