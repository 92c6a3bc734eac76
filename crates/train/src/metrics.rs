//! What a run measures. Errors are top-1, in percent.

use serde::{Deserialize, Serialize};

/// One epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// From 1.
    pub epoch: usize,
    /// Mean loss of its steps.
    pub train_loss: f64,
    /// Error on the batches as they were trained on (each before its update), in percent.
    pub train_error: f64,
    /// Error on the evaluation set after the epoch, in percent.
    pub eval_error: f64,
    /// Training and evaluation together.
    pub seconds: f64,
}

/// Result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Images whose largest logit is that of their label.
    pub correct: usize,
    /// Images.
    pub total: usize,
}

impl Evaluation {
    /// Top-1 error in percent.
    #[must_use]
    pub fn error(&self) -> f64 {
        100.0 * (self.total - self.correct) as f64 / self.total.max(1) as f64
    }
}

/// Result of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResult {
    /// Epoch by epoch.
    pub epochs: Vec<EpochMetrics>,
    /// Error on the evaluation set at the end, in percent.
    pub top1_error: f64,
    /// Images it got right.
    pub correct: usize,
    /// Images of the evaluation set.
    pub total: usize,
    /// Number of learnt values.
    pub parameters: usize,
    /// The whole run.
    pub seconds: f64,
    /// Whether the observer stopped it before its last epoch.
    pub stopped: bool,
}
