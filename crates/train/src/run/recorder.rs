//! What a run writes while it goes on.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;

use isqrt_datasets::{Filter, Pipeline, Step};
use isqrt_models::Network;
use isqrt_models::checkpoint::{self, Preprocessing, Record};

use super::Paths;
use super::folder::{Log, failed};
use super::resume::complete_move;
use crate::state::Snapshot;
use crate::{EpochMetrics, EventWriter, Line, Moment, Observer, Result, SpecFile, StepInfo};

/// What a run writes while it goes on.
pub(super) struct Recorder<'a, 'b> {
    pub(super) file: &'a SpecFile,
    pub(super) paths: &'a Paths,
    pub(super) identity: &'a str,
    pub(super) record: Record,
    pub(super) metrics: File,
    pub(super) events: Option<EventWriter>,
    pub(super) console: &'a mut Log<'b>,
    /// Epochs whose state is kept.
    pub(super) epochs_kept: usize,
}

impl Observer for Recorder<'_, '_> {
    fn step(&mut self, step: &StepInfo) -> ControlFlow<()> {
        self.console.console.step(step)
    }

    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()> {
        let error = metrics
            .eval_error
            .map_or_else(String::new, |error| format!(", error {error:.2} %"));
        self.console.note(&format!(
            "epoch {}: loss {:.4}{error}, {:.1} images/s, {:.0} % waiting for data",
            metrics.epoch,
            metrics.train_loss,
            metrics.images_per_second,
            100.0 * metrics.wait_share
        ));
        self.console.console.epoch(metrics)
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let path = self.paths.metrics();
        let mut text = serde_json::to_vec(line).map_err(|error| failed(&path, &error))?;
        text.push(b'\n');
        self.metrics
            .write_all(&text)
            .map_err(|error| failed(&path, &error))?;
        if let Line::Skipped { step, problem, .. } = line {
            self.console
                .say(&format!("update {step} was left out: {problem}"));
        }
        if let Some(events) = &mut self.events {
            events
                .line(line)
                .map_err(|error| failed(&self.paths.root, &error))?;
        }
        Ok(())
    }

    fn best(&mut self, network: &Network, _: &EpochMetrics) -> Result<()> {
        let path = self.paths.checkpoint("best");
        Ok(checkpoint::save(network, &path, &self.record)?)
    }

    fn wants_state(&self, step: u64) -> bool {
        let every = self.file.spec.checkpoints.every_steps;
        every.is_some_and(|every| step.is_multiple_of(every))
    }

    fn snapshot(&mut self, snapshot: &Snapshot<'_>, moment: Moment) -> Result<()> {
        let kept = &self.file.spec.checkpoints;
        let progress = snapshot.progress();
        let due = match moment {
            Moment::Stop => true,
            Moment::Step => kept
                .every_steps
                .is_some_and(|every| progress.step.is_multiple_of(every)),
            Moment::Epoch => {
                progress.epoch == self.file.spec.epochs
                    || progress.epoch >= self.epochs_kept + kept.every_epochs
            }
        };
        // Before the state, which has this epoch behind it.
        let keeps = |every: usize| progress.epoch.is_multiple_of(every);
        if moment == Moment::Epoch && kept.keep_every.is_some_and(keeps) {
            let path = self
                .paths
                .checkpoint(&format!("epoch-{:04}", progress.epoch));
            snapshot.save_weights(&path, &self.record)?;
        }
        if due {
            self.save(snapshot)?;
        }
        if due && moment == Moment::Epoch {
            self.epochs_kept = progress.epoch;
        }
        Ok(())
    }
}

impl Recorder<'_, '_> {
    /// Writes the state beside the two that there are, and only then moves them on.
    fn save(&mut self, snapshot: &Snapshot<'_>) -> Result<()> {
        let _span = tracing::info_span!("checkpoint").entered();
        // Lines that the state counts must be there when it is.
        let metrics = self.paths.metrics();
        self.metrics
            .sync_data()
            .map_err(|error| failed(&metrics, &error))?;
        snapshot.save(&self.paths.checkpoint("next"), self.identity, &self.record)?;
        complete_move(self.paths)
    }
}

/// How images are made ready for the network, where it is as simple.
pub(super) fn preprocessing(pipeline: &Pipeline) -> Option<Preprocessing> {
    match pipeline.steps[..] {
        [
            Step::Resize {
                short,
                filter: Filter::Bilinear,
            },
            Step::CenterCrop { size: crop },
        ] if pipeline.std.iter().all(|std| *std > 0.0) => Some(Preprocessing {
            resize: short,
            crop,
            mean: pipeline.mean,
            std: pipeline.std,
        }),
        _ => None,
    }
}
