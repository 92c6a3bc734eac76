//! Runs of the paper profile: a recipe of `isqrt train` on a real data set, with what it will take,
//! measured, before anybody starts it.

use super::network;
use super::{Outcome, Task, Tick};
use crate::error::{Error, Result};
use crate::plan::Request;
use crate::record::{EpochRecord, Measurement};
use isqrt_models::ModelSpec;
use isqrt_train::data::RunData;
use isqrt_train::run::{Console, Resume, run};
use isqrt_train::{EpochMetrics, SpecFile, StepInfo};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Training images and classes of the paper's data sets, by the folders' names.
const SETS: [(&str, usize, usize); 4] = [
    ("imagenet", 1_281_167, 1000),
    ("cub", 5994, 200),
    ("aircraft", 6667, 100),
    ("cars", 8144, 196),
];

/// Images that the time of a step is measured with.
const BATCH: usize = 2;

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Path of the recipe below `experiments/`.
    pub spec: String,
    /// Hash of what it says.
    pub hash: String,
    /// Folder with the data set.
    pub data: PathBuf,
    /// Weights to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<PathBuf>,
    /// A few updates only.
    pub smoke: bool,
    /// How long it should take on this machine.
    #[serde(default)]
    pub seconds: f64,
}

impl Run {
    /// The run of a recipe on a set below the root.
    ///
    /// # Errors
    /// Why it cannot be run, in words.
    pub fn find(request: &Request, set: &str, spec: &str) -> std::result::Result<Self, String> {
        let root = (request.root.as_ref())
            .ok_or_else(|| format!("needs --data ROOT with the data set in ROOT/{set}"))?;
        let data = root.join(set);
        if !data.exists() {
            return Err(format!("{} is not there", data.display()));
        }
        let file = SpecFile::read(&request.specs.join(spec), &[]).map_err(|e| e.to_string())?;
        let weights = match &file.spec.start {
            None => None,
            Some(start) => {
                let path = root.join("weights").join(weights_name(&start.weights));
                if !path.is_file() {
                    return Err(format!(
                        "{} is not there: the network to start from",
                        path.display()
                    ));
                }
                Some(path)
            }
        };
        let hash = file.spec.hash().map_err(|e| e.to_string())?;
        let mut run = Self {
            spec: spec.to_owned(),
            hash,
            data,
            weights,
            smoke: request.smoke,
            seconds: 0.0,
        };
        if !run.smoke {
            run.seconds = seconds(&file, set).map_err(|e| e.to_string())?;
        }
        Ok(run)
    }

    /// Trains and reports, or goes on where it was stopped.
    ///
    /// # Errors
    /// [`Error::Cell`] with the trainer's message, [`Error::Stopped`].
    pub(super) fn train(&self, task: &Task<'_>, tick: &mut Tick<'_>) -> Result<Outcome> {
        let failed = |message: String| Error::Cell {
            cell: self.spec.clone(),
            message,
        };
        let seed = task.seed.unwrap_or(0);
        let mut settings = vec![setting("data.root", &self.data), format!("seed={seed}")];
        settings.extend((self.weights.as_ref()).map(|path| setting("start.weights", path)));
        let specs = task.keep.parent().unwrap_or(&task.keep).join("specs");
        let mut file = SpecFile::read(&specs.join(&self.spec), &settings)
            .map_err(|e| failed(e.to_string()))?;
        let mut few = None;
        if self.smoke {
            file.spec.batch = file.spec.batch.min(4);
            file.spec.accumulate = 1;
            few = Some([file.spec.batch, file.spec.batch]);
            file.spec.shrink();
        }
        let mut name = self.spec.replace(['/', '.'], "-");
        if self.smoke {
            name.push_str("-smoke");
        }
        let out = task.keep.join(format!("{name}-seed{seed}"));
        let data = RunData::open(&file, few).map_err(|e| failed(e.to_string()))?;
        let mut watch = Watch {
            tick,
            epochs: Vec::new(),
            of: file.spec.epochs,
        };
        let result =
            run(&file, data, &out, &Resume::Auto, &mut watch).map_err(|e| failed(e.to_string()))?;
        let epochs = watch.epochs;
        if result.status != "finished" {
            return Err(Error::Stopped);
        }
        let last = result
            .last
            .ok_or_else(|| failed("the run was never evaluated".to_owned()))?;
        let mut measurements = vec![
            Measurement::new("top1_error", last.error, "%"),
            Measurement::new("accuracy", 100.0 - last.error, "%"),
            Measurement::new("top5_error", last.error5, "%"),
            Measurement::new("train_seconds", result.wall_seconds, "s"),
            Measurement::new("parameters", result.parameters as f64, "values"),
        ];
        measurements
            .extend((result.svm.as_ref()).map(|svm| Measurement::new("svm_error", svm.error, "%")));
        Ok(Outcome {
            measurements,
            epochs,
        })
    }
}

/// The file's name, or for a checkpoint in a run folder that of the folder.
fn weights_name(path: &Path) -> String {
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let run = path
        .parent()
        .filter(|folder| folder.ends_with("checkpoints"));
    match run.and_then(Path::parent) {
        Some(run) => format!("{}.safetensors", name(run)),
        None => name(path),
    }
}

/// Quoted, so that a folder called `1` stays a name.
fn setting(key: &str, path: &Path) -> String {
    format!("{key}={}", toml::Value::from(path.display().to_string()))
}

/// Seconds of all epochs on this machine: those of an image, measured with the recipe's network and image
/// size, times the images of the official set.
fn seconds(file: &SpecFile, set: &str) -> Result<f64> {
    let spec = &file.spec;
    let (_, images, classes) = SETS
        .into_iter()
        .find(|(name, ..)| *name == set)
        .ok_or_else(|| Error::Unsupported(format!("no data set of the paper is called {set}")))?;
    let pipeline =
        (spec.data.train_transforms.pipeline()).map_err(|e| Error::Unsupported(e.to_string()))?;
    let (side, _) = pipeline.output_size().unwrap_or((224, 224));
    let model = spec.config(classes).model;
    Ok(seconds_an_image(&model, side)? * (images * spec.epochs) as f64)
}

/// Measured once for each network and size.
fn seconds_an_image(model: &ModelSpec, side: usize) -> Result<f64> {
    static KNOWN: Mutex<Vec<(ModelSpec, usize, f64)>> = Mutex::new(Vec::new());
    let mut known = KNOWN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((.., seconds)) = known.iter().find(|(m, s, _)| m == model && *s == side) {
        return Ok(*seconds);
    }
    let seconds = network::step_seconds(model, side, BATCH)? / BATCH as f64;
    known.push((model.clone(), side, seconds));
    Ok(seconds)
}

/// Passes steps on as fractions and keeps the epochs.
struct Watch<'a, 'b> {
    tick: &'a mut Tick<'b>,
    epochs: Vec<EpochRecord>,
    of: usize,
}

impl Console for Watch<'_, '_> {
    fn say(&mut self, text: &str) {
        tracing::info!("{text}");
    }

    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        let words = format!("epoch {}/{}, loss {:.2}", info.epoch, self.of, info.loss);
        (self.tick)(info.step as f64 / info.steps.max(1) as f64, &words)
    }

    fn epoch(&mut self, m: &EpochMetrics) -> ControlFlow<()> {
        self.epochs.push(m.into());
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_a_run_bear_its_name() {
        for (path, name) in [
            ("weights/a.safetensors", "a.safetensors"),
            (
                "runs/cub-1/checkpoints/last.safetensors",
                "cub-1.safetensors",
            ),
            ("last.safetensors", "last.safetensors"),
        ] {
            assert_eq!(weights_name(Path::new(path)), name);
        }
    }
}
