//! Optimisers as in PyTorch, parameter groups, gradient clipping and weight averages.
//!
//! All state is kept by parameter name and goes out and in as named tensors, sorted, so that a
//! checkpoint can hold it beside the parameters. Sums run in the order of names.

mod adamw;
mod clip;
mod ema;
mod group;
mod sgd;
mod state;

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use serde::{Deserialize, Serialize};

pub use adamw::{AdamW, AdamWConfig};
#[cfg(feature = "cuda")]
pub(crate) use clip::clip_on_gpu;
pub use clip::{clip_grad_norm, clip_grad_value, grad_norm, grad_squares};
pub use ema::Ema;
pub use group::ParamGroup;
pub use sgd::{Sgd, SgdConfig};

use crate::{Error, Result};

/// What moves parameters along their gradients.
pub trait Optimizer: std::fmt::Debug + Send {
    /// One update with this learning rate. Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// Where a gradient has another type than its parameter.
    fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()>;

    /// Copies of the state: `{parameter}.momentum_buffer`, or `{parameter}.exp_avg`,
    /// `.exp_avg_sq` and `.step`, as PyTorch calls them.
    ///
    /// # Errors
    /// Where candle cannot copy a tensor.
    fn state(&self) -> Result<BTreeMap<String, Tensor>>;

    /// Takes a state that [`state`](Self::state) gave. On error nothing changes.
    ///
    /// # Errors
    /// [`Error::State`] where a tensor is missing, has another shape, or is one too many.
    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()>;
}

/// Which parameters weight decay applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Weights of convolutions and linear layers (rank 2 and more), not biases and norms.
    #[default]
    WeightsOnly,
    /// All.
    All,
}

/// Refuses a number that is negative or not finite.
fn check_positive(what: &'static str, value: f64) -> Result<()> {
    check(
        value >= 0.0 && value.is_finite(),
        what,
        value,
        "finite, at least 0",
    )
}

/// Refuses a share that leaves nothing new.
fn check_share(what: &'static str, value: f64) -> Result<()> {
    let expected = "at least 0 and less than 1";
    check((0.0..1.0).contains(&value), what, value, expected)
}

fn check(
    good: bool,
    what: &'static str,
    value: impl std::fmt::Display,
    expected: &'static str,
) -> Result<()> {
    match good {
        true => Ok(()),
        false => Err(Error::Option {
            what,
            value: value.to_string(),
            expected,
        }),
    }
}
