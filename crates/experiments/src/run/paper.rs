//! Runs of the paper profile: a recipe of `isqrt train` on a real data set, with what it will take,
//! measured, before anybody starts it.

use super::network;
use super::{Outcome, Task, Tick};
use crate::error::{Error, Result};
use crate::plan::Request;
use crate::record::{EpochRecord, Measurement};
use candle_core::Device;
use isqrt_models::ModelSpec;
use isqrt_train::data::RunData;
use isqrt_train::run::{Console, Resume, run};
use isqrt_train::{EpochMetrics, Line, SpecFile, StepInfo};
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
    /// Their size in bytes and when they were written, in seconds since 1970: others are another run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_stamp: Option<(u64, u64)>,
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
        // Whole, since it is part of the run's key.
        let data = whole(&root.join(set))?;
        let file = SpecFile::read(&request.specs.join(spec), &[]).map_err(|e| e.to_string())?;
        let weights = match &file.spec.start {
            None => None,
            Some(start) => {
                let path = root.join("weights").join(weights_name(&start.weights));
                let path = whole(&path).map_err(|e| format!("{e}: the network to start from"))?;
                if !path.is_file() {
                    return Err(format!("{} is no file of weights", path.display()));
                }
                Some(path)
            }
        };
        let hash = file.spec.hash().map_err(|e| e.to_string())?;
        let mut run = Self {
            spec: spec.to_owned(),
            hash,
            data,
            weights_stamp: weights.as_deref().and_then(stamp),
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
    pub(super) fn train(
        &self,
        task: &Task<'_>,
        device: &Device,
        tick: &mut Tick<'_>,
    ) -> Result<Outcome> {
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
        // With the key in its name: other images, weights or code find no run of these.
        let key = task.key.get(..8).unwrap_or(task.key);
        let out = task.keep.join(format!("{name}-seed{seed}-{key}"));
        let data = RunData::open(&file, few).map_err(|e| failed(e.to_string()))?;
        if task.fresh {
            set_aside(&out)?;
        }
        let mut watch = Watch {
            tick,
            of: file.spec.epochs,
        };
        let result = run(
            &file,
            data,
            &out,
            &Resume::Auto,
            std::slice::from_ref(device),
            &mut watch,
        )
        .map_err(|e| failed(e.to_string()))?;
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
            epochs: epochs(&out)?,
        })
    }
}

/// The epochs of a run folder, those from before it was stopped and taken up again too.
fn epochs(out: &Path) -> Result<Vec<EpochRecord>> {
    let path = out.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let lines = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    Ok(lines
        .filter_map(|line| match line {
            Line::Epoch(metrics) => Some((&metrics).into()),
            _ => None,
        })
        .collect())
}

/// Gives a finished run another name, so that a new one can begin; one that was stopped goes on.
fn set_aside(out: &Path) -> Result<()> {
    let result = std::fs::read(out.join("result.json")).unwrap_or_default();
    let result: serde_json::Value = serde_json::from_slice(&result).unwrap_or_default();
    let finished = result["status"] == "finished";
    if !finished {
        return Ok(());
    }
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let mut free = (1..).map(|n| out.with_file_name(format!("{name}-before{n}")));
    match free.find(|path| !path.exists()) {
        Some(path) => std::fs::rename(out, &path).map_err(Error::io("rename", out)),
        None => Ok(()),
    }
}

/// The whole path of what is there.
fn whole(path: &Path) -> std::result::Result<PathBuf, String> {
    path.canonicalize().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("{} is not there", path.display()),
        _ => format!("{}: {e}", path.display()),
    })
}

/// Size and time of a file, as far as the file system tells them.
fn stamp(path: &Path) -> Option<(u64, u64)> {
    let known = std::fs::metadata(path).ok()?;
    let since = known.modified().ok()?.duration_since(std::time::UNIX_EPOCH);
    Some((known.len(), since.ok()?.as_secs()))
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
    let seconds = network::step_seconds(model, side, BATCH, &Device::Cpu)? / BATCH as f64;
    known.push((model.clone(), side, seconds));
    Ok(seconds)
}

/// Passes steps on as fractions.
struct Watch<'a, 'b> {
    tick: &'a mut Tick<'b>,
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

    fn epoch(&mut self, _: &EpochMetrics) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_a_finished_run_is_set_aside() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("run");
        let write = |status: &str| {
            std::fs::create_dir_all(&out).unwrap();
            let text = format!(r#"{{"status": "{status}"}}"#);
            std::fs::write(out.join("result.json"), text).unwrap();
        };
        set_aside(&out).unwrap();
        write("stopped");
        set_aside(&out).unwrap();
        assert!(out.exists());
        for n in 1..3 {
            write("finished");
            set_aside(&out).unwrap();
            assert!(!out.exists());
            assert!(home.path().join(format!("run-before{n}")).exists());
        }
    }

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
