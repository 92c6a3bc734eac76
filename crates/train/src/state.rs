//! Where a run stands, and the file that it goes on from.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use isqrt_datasets::Position;
use isqrt_models::Network;
use isqrt_models::checkpoint::{self, Checkpoint, LoadOptions, Record};
use isqrt_nn::{Ema, Optimizer};
use serde::{Deserialize, Serialize};

use crate::{EpochMetrics, Error, Result};

/// Layout of [`Progress`] and of the tensors beside it.
const VERSION: u32 = 1;
/// Beginnings of the names of tensors that are not the network's.
const OPTIMISER: &str = "optimiser.";
const EMA: &str = "ema.";

/// Where a run stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Epochs that are done, with their evaluation.
    pub epoch: usize,
    /// Passes of the next one that are done.
    pub batch: usize,
    /// Updates that are done, those that were left out included.
    pub step: u64,
    /// Updates that were left out.
    pub skipped: u64,
    /// Lines of the log that are written.
    pub lines: u64,
    /// Of the epoch that is under way.
    pub sums: Sums,
    /// Since the last line of the log.
    pub line: Sums,
    /// Best epoch so far, and its error in percent.
    pub best: Option<(usize, f64)>,
    /// Wall time so far, without the time in which the run was stopped.
    pub seconds: f64,
    /// Processor time so far.
    pub cpu_seconds: f64,
    /// Epoch by epoch.
    pub epochs: Vec<EpochMetrics>,
}

impl Progress {
    /// At the start.
    pub(crate) fn new() -> Self {
        Self {
            epoch: 0,
            batch: 0,
            step: 0,
            skipped: 0,
            lines: 0,
            sums: Sums::default(),
            line: Sums::default(),
            best: None,
            seconds: 0.0,
            cpu_seconds: 0.0,
            epochs: Vec::new(),
        }
    }
}

/// What means are made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// Losses, each times its images.
    pub loss: f64,
    /// Images.
    pub images: f64,
    /// Right answers.
    pub correct: f64,
    /// Seconds.
    pub seconds: f64,
    /// Seconds in which the network waited for data.
    pub waited: f64,
}

impl Sums {
    pub(crate) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.images += other.images;
        self.correct += other.correct;
        self.seconds += other.seconds;
        self.waited += other.waited;
    }

    pub(crate) fn mean_loss(&self) -> f64 {
        self.loss / self.images.max(1.0)
    }

    pub(crate) fn images_per_second(&self) -> f64 {
        self.images / self.seconds.max(1e-9)
    }

    pub(crate) fn wait_share(&self) -> f64 {
        (self.waited / self.seconds.max(1e-9)).clamp(0.0, 1.0)
    }
}

/// What the file tells beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Told {
    version: u32,
    /// Of the spec and the data.
    identity: String,
    progress: Progress,
    position: Position,
}

/// A state of a run that can be written.
pub struct Snapshot<'a> {
    pub(crate) network: &'a Network,
    pub(crate) optimiser: &'a dyn Optimizer,
    pub(crate) ema: Option<&'a Ema>,
    pub(crate) progress: &'a Progress,
    pub(crate) position: Position,
}

impl Snapshot<'_> {
    /// Where the run stands.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        self.progress
    }

    /// Writes the weights alone, averaged ones where there are such.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_weights(&self, path: &Path, record: &Record) -> Result<()> {
        let averages = self.ema.map(Ema::state).transpose()?;
        checkpoint::save_averaged(self.network, path, record, averages.as_ref())?;
        Ok(())
    }

    /// Writes a file that [`Saved::open`] reads: the network's weights as in any checkpoint, and the
    /// state of the run beside them. The file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Model`] with the path where it cannot be written.
    pub fn save(&self, path: &Path, identity: &str, record: &Record) -> Result<()> {
        let told = Told {
            version: VERSION,
            identity: identity.to_owned(),
            progress: self.progress.clone(),
            position: self.position.clone(),
        };
        let told = serde_json::to_value(told).map_err(|error| Error::File {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let named = |prefix: &str, tensors: BTreeMap<String, Tensor>| {
            let named = tensors
                .into_iter()
                .map(|(name, tensor)| (format!("{prefix}{name}"), tensor));
            named.collect::<Vec<_>>()
        };
        let mut tensors = named(OPTIMISER, self.optimiser.state()?);
        if let Some(ema) = self.ema {
            tensors.extend(named(EMA, ema.state()?));
        }
        checkpoint::save_run(self.network, path, record, tensors, &told)?;
        Ok(())
    }
}

/// A file of a run that is to go on.
#[derive(Debug)]
pub struct Saved {
    file: Checkpoint,
    told: Told,
}

impl Saved {
    /// Opens a file of the run with this identity. Nothing is changed before a run takes it up.
    ///
    /// # Errors
    /// [`Error::File`] for what is truncated, of another program, another version or another run;
    /// [`Error::Model`] where it cannot be read.
    pub fn open(path: &Path, identity: &str) -> Result<Self> {
        let failed = |message: String| {
            Err(Error::File {
                path: path.to_owned(),
                message,
            })
        };
        let file = Checkpoint::open(path)?;
        let Some(told) = checkpoint::run(&file)? else {
            return failed("has weights but no state of a run".to_owned());
        };
        if told.get("version") != Some(&VERSION.into()) {
            return failed("is the state of a run of another version of this program".to_owned());
        }
        let told: Told = match serde_json::from_value(told) {
            Ok(told) => told,
            Err(error) => return failed(format!("has an unreadable state: {error}")),
        };
        if told.identity != identity {
            return failed("is of a run with another spec or other data".to_owned());
        }
        Ok(Self { file, told })
    }

    /// Where the run stood.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.told.progress
    }

    /// Devices that shared its batches.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.told.position.ranks
    }

    pub(crate) fn restore(
        &self,
        network: &mut Network,
        optimiser: &mut dyn Optimizer,
        ema: Option<&mut Ema>,
    ) -> Result<(Progress, Position)> {
        let mut states = [BTreeMap::new(), BTreeMap::new()];
        for (name, tensor) in checkpoint::run_tensors(&self.file)? {
            for (state, prefix) in states.iter_mut().zip([OPTIMISER, EMA]) {
                if let Some(name) = name.strip_prefix(prefix) {
                    state.insert(name.to_owned(), tensor.clone());
                }
            }
        }
        let [of_optimiser, of_ema] = states;
        checkpoint::load_from(network, &self.file, &LoadOptions::default())?;
        optimiser.load_state(&of_optimiser)?;
        if let Some(ema) = ema {
            ema.load_state(&of_ema)?;
        }
        Ok((self.told.progress.clone(), self.told.position.clone()))
    }
}
