//! Who hears of a run's progress.

use std::ops::ControlFlow;

use crate::EpochMetrics;

/// Hears of every step and epoch. `ControlFlow::Break(())` ends the run with what it has.
pub trait Observer {
    /// After step number `step` (from 1) of `total`, with its loss.
    fn step(&mut self, step: usize, total: usize, loss: f32) -> ControlFlow<()> {
        let _ = (step, total, loss);
        ControlFlow::Continue(())
    }

    /// After an epoch and its evaluation.
    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()> {
        let _ = metrics;
        ControlFlow::Continue(())
    }
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}
