//! `metrics.jsonl`: what a run says of itself, one JSON object a line. It is the truth; TensorBoard's
//! files and reports are made from the same lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::EpochMetrics;

/// One line. Steps count updates from 1 over the whole run, epochs from 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    /// Some steps together, those since the line of this kind before.
    Step(StepLine),
    /// An epoch with its evaluation.
    Epoch(EpochMetrics),
    /// A look into the network.
    Diagnostics(Diagnostics),
    /// An update that was left out because its loss or a gradient was not finite.
    Skipped {
        /// Which update.
        step: u64,
        /// Its epoch.
        epoch: usize,
        /// What was not finite, and where first.
        problem: String,
    },
}

impl Line {
    /// The update that it was written after.
    #[must_use]
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Epoch(line) => line.step,
            Self::Diagnostics(line) => line.step,
            Self::Skipped { step, .. } => *step,
        }
    }
}

/// Means over the steps since the line before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// The last of them.
    pub step: u64,
    /// Its epoch.
    pub epoch: usize,
    /// Loss of the batches, each before its update.
    pub loss: f64,
    /// Rate of the last step.
    pub learning_rate: f64,
    /// Norm of all gradients of the last step, before clipping; none where that step was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// Images of all ranks a second.
    pub images_per_second: f64,
    /// Share of the time in which the network waited for data, 0 to 1.
    pub wait_share: f64,
    /// Wall time of the run so far, without the time in which it was stopped.
    pub seconds: f64,
}

/// What the field looks at. All of a few images, in evaluation mode.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// The update before.
    pub step: u64,
    /// Its epoch.
    pub epoch: usize,
    /// Wall time of the run so far.
    pub seconds: f64,
    /// Eigenvalues of the covariance of the features that enter the head, over its trace, in falling
    /// order: the mean over the images. Empty where it is not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spectrum: Vec<f64>,
    /// `‖C − √Σ‖ / ‖√Σ‖` in the Frobenius norm, `C` the layer's output: the mean over the images; of
    /// heads whose output approximates the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_distance: Option<f64>,
    /// Norm of the gradients of the last update by stage (`backbone.layer1`, `classifier`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gradient_norms: BTreeMap<String, f64>,
}
