//! Who hears of a run's progress.

use std::ops::ControlFlow;

use isqrt_models::Network;

use crate::state::Snapshot;
use crate::{EpochMetrics, Line, Result};

/// An update that was made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepInfo {
    /// Its number in the run, from 1.
    pub step: u64,
    /// Updates of the whole run.
    pub steps: u64,
    /// Its epoch, from 1.
    pub epoch: usize,
    /// Epochs of the whole run.
    pub epochs: usize,
    /// Mean loss of its images, before the update; on a GPU that of the last updates whose loss was read.
    pub loss: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Images of all ranks.
    pub images: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Of these the seconds in which the network waited for data.
    pub waited: f64,
}

/// When a state may be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// After an update.
    Step,
    /// After an epoch with its evaluation.
    Epoch,
    /// Before a run that is stopped ends.
    Stop,
}

/// Hears of every step and epoch. `ControlFlow::Break(())` ends the run with what it has. An error from
/// one of them ends it too.
pub trait Observer {
    /// After an update.
    fn step(&mut self, step: &StepInfo) -> ControlFlow<()> {
        let _ = step;
        ControlFlow::Continue(())
    }

    /// After an epoch and its evaluation.
    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()> {
        let _ = metrics;
        ControlFlow::Continue(())
    }

    /// A line for the record.
    ///
    /// # Errors
    /// Where it cannot be written.
    fn line(&mut self, line: &Line) -> Result<()> {
        let _ = line;
        Ok(())
    }

    /// The network of the best epoch so far, with averaged weights where there are such.
    ///
    /// # Errors
    /// Where it cannot be kept.
    fn best(&mut self, network: &Network, metrics: &EpochMetrics) -> Result<()> {
        let _ = (network, metrics);
        Ok(())
    }

    /// Whether the state after update `step` may be kept. Where not, what the GPU knows of it need not be
    /// read.
    fn wants_state(&self, step: u64) -> bool {
        let _ = step;
        true
    }

    /// A state from which the run can go on.
    ///
    /// # Errors
    /// Where it cannot be kept.
    fn snapshot(&mut self, snapshot: &Snapshot<'_>, moment: Moment) -> Result<()> {
        let _ = (snapshot, moment);
        Ok(())
    }
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn wants_state(&self, _: u64) -> bool {
        false
    }
}
