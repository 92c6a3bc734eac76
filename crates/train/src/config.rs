//! How a network is trained, as data.

use isqrt_datasets::Step;
use isqrt_models::ModelSpec;
use isqrt_nn::{Decay, Mode, Schedule, SgdConfig};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A training run. Unknown keys are errors; keys with a default may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The network.
    pub model: ModelSpec,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images a step; an incomplete last batch of an epoch is left out.
    pub batch: usize,
    /// Learning rate at the start of the schedule.
    pub lr: f64,
    /// Learning rate over time; cosine to 0 by default.
    #[serde(default)]
    pub schedule: Schedule,
    /// Momentum of SGD; 0.9 by default.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
    /// Nesterov's form of it; off by default.
    #[serde(default)]
    pub nesterov: bool,
    /// Weight decay; 0 by default.
    #[serde(default)]
    pub weight_decay: f64,
    /// What decays; weights only by default.
    #[serde(default)]
    pub decay: Decay,
    /// Label smoothing; 0 by default.
    #[serde(default)]
    pub label_smoothing: f64,
    /// What is done to the training images anew each epoch; nothing by default. Inputs keep the size of
    /// the images.
    #[serde(default)]
    pub augment: Vec<Step>,
    /// Batch norm trains with its running statistics as constants, see [`Mode::Frozen`]; for
    /// networks that are trained already. Off by default.
    #[serde(default)]
    pub frozen_norm: bool,
    /// Fixes weights, order and augmentation.
    pub seed: u64,
}

fn default_momentum() -> f64 {
    0.9
}

impl TrainConfig {
    /// Checks what does not need the data.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Nn`] that names the setting.
    pub fn check(&self) -> Result<()> {
        let bad = |what, value: String, expected: &str| {
            Err(Error::Config {
                what,
                value,
                expected: expected.to_owned(),
            })
        };
        if self.epochs == 0 {
            return bad("epochs", "0".to_owned(), "at least 1");
        }
        if self.batch == 0 {
            return bad("batch", "0".to_owned(), "at least 1");
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return bad("lr", self.lr.to_string(), "a positive number");
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            let value = self.label_smoothing.to_string();
            return bad("label_smoothing", value, "at least 0 and less than 1");
        }
        Ok(self.schedule.check()?)
    }

    /// What the forward pass of a step is.
    pub(crate) fn mode(&self) -> Mode {
        match self.frozen_norm {
            true => Mode::Frozen,
            false => Mode::Train,
        }
    }

    pub(crate) fn sgd(&self) -> SgdConfig {
        SgdConfig {
            momentum: self.momentum,
            nesterov: self.nesterov,
            weight_decay: self.weight_decay,
            decay: self.decay,
        }
    }
}
