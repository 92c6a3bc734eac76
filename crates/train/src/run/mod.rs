//! A run in its folder: from an experiment file to `result.json`.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `spec.toml` | the resolved spec |
//! | `environment.json` | commit, machine, threads, data: see [`Environment`] |
//! | `metrics.jsonl` | one [`Line`](crate::Line) a line: the truth |
//! | `events.out.tfevents.*` | the same for TensorBoard |
//! | `checkpoints/last.safetensors` | weights and the state that the run goes on from |
//! | `checkpoints/previous.safetensors` | the one before, in case the last cannot be read |
//! | `checkpoints/best.safetensors` | weights of the best epoch |
//! | `result.json` | what came out: see [`RunResult`] |
//! | `confusion.csv` | answers (columns) to the images of each class (rows) at the end |
//! | `console.log` | what was said |

mod environment;
mod folder;
mod others;
mod recorder;
mod resume;
mod start;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::Device;
use isqrt_datasets::{Images, Skipped};
use isqrt_models::Network;
use isqrt_models::checkpoint::{self, LoadOptions, Record};
use serde::{Deserialize, Serialize};

pub use crate::svm_eval::svm;
pub use environment::{Environment, Resumed};
pub use folder::{FINAL, Paths, weights_file};
pub use start::{Start, start_from};

use crate::EventWriter;
use crate::collective::{Collective, Single};
use crate::data::RunData;
use crate::evaluate::evaluate;
use crate::machine;
use crate::state::Saved;
use crate::{
    EpochMetrics, Error, Evaluation, Feed, Job, Rank, Result, Silent, SpecFile, StepInfo, Tally,
    TrainConfig, Trainer,
};
use environment::environment;
use folder::{Lock, Log, failed, remove_partial, write_whole};
use others::with_others;
use recorder::{Recorder, preprocessing};
use resume::{bring_along, complete_move, finished, open_metrics, open_saved};

/// Whether a run goes on where it was stopped.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Resume {
    /// Where the folder has a state, from it; otherwise from the start.
    #[default]
    Auto,
    /// From the start; a folder with a run is refused.
    Never,
    /// From this state.
    From(PathBuf),
}

/// Who watches a run, and can stop it.
pub trait Console {
    /// A sentence for people.
    fn say(&mut self, text: &str);

    /// After an update; `Break` stops the run.
    fn step(&mut self, step: &StepInfo) -> ControlFlow<()>;

    /// After an epoch; `Break` stops the run.
    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()>;
}

/// What came out of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// `finished` or `stopped`.
    pub status: String,
    /// Epochs that are done.
    pub epochs: usize,
    /// Updates that are done.
    pub steps: u64,
    /// Updates that were left out since something was not finite.
    pub skipped_steps: u64,
    /// Epoch with the smallest error on the part that epochs are evaluated on.
    pub best: Option<Best>,
    /// `test`, or `validation` where the test part is another one.
    pub selected_on: String,
    /// The last weights (averaged ones where there are such) on the part that is reported on.
    #[serde(rename = "final")]
    pub last: Option<Outcome>,
    /// The linear SVMs on the last weights' representations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub svm: Option<SvmOutcome>,
    /// Learnt values.
    pub parameters: usize,
    /// Wall time of training with its evaluations.
    pub wall_seconds: f64,
    /// Processor time, all threads.
    pub cpu_seconds: f64,
    /// Training images a second, mean of the epochs.
    pub images_per_second: f64,
    /// Largest memory of the process that finished the run, before any SVMs.
    pub peak_memory_mb: Option<f64>,
    /// Largest memory that its tensors and scratch took of a GPU; none on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_gpu_memory_mb: Option<f64>,
    /// What `gpu.layer = "fastest"` found in that process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured_kernels: Vec<String>,
    /// Of the images, see [`DataInfo`](crate::data::DataInfo).
    #[serde(default)]
    pub data_fingerprint: String,
    /// Of the spec, see [`crate::Spec::hash`].
    pub spec_hash: String,
    /// Images that were left out by the process that finished the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_images: Vec<Skipped>,
}

/// The best epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// From 1.
    pub epoch: usize,
    /// In percent, on the part that it was chosen on.
    pub eval_error: f64,
    /// Its weights on the test part, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Outcome>,
}

/// An evaluation with its errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Top-1 error in percent.
    pub error: f64,
    /// Top-5 error in percent.
    pub error5: f64,
    /// Counts and the rest.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

impl From<Evaluation> for Outcome {
    fn from(evaluation: Evaluation) -> Self {
        Self {
            error: evaluation.error(),
            error5: evaluation.error5(),
            evaluation,
        }
    }
}

/// What the SVMs came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SvmOutcome {
    /// Their C.
    pub c: f64,
    /// Top-1 error in percent.
    pub error: f64,
    /// Right answers.
    pub correct: u64,
    /// Images.
    pub total: u64,
    /// What is to be known about it, such as classes that did not converge.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Trains what a spec says in a folder, which another process must not use meanwhile. Several devices, all
/// different GPUs, share each batch; a device has a thread of its own then.
///
/// # Errors
/// Those of the data, the network and the loop; [`Error::Rank`] where another device than the first fails;
/// [`Error::Run`] for a folder that is in use or has another run, [`Error::File`] for what cannot be written.
/// What was kept before stays whole.
pub fn run(
    file: &SpecFile,
    data: RunData,
    out: &Path,
    resume: &Resume,
    devices: &[Device],
    console: &mut dyn Console,
) -> Result<RunResult> {
    let device = devices.first().unwrap_or(&Device::Cpu);
    let paths = Paths {
        root: out.to_owned(),
    };
    let config = file.spec.config(data.info.classes);
    // A spec that cannot be trained leaves no folder.
    let pass = config.check_on(devices);
    let pass = pass.map_err(|error| file.place(error))?;
    let spec_hash = file.spec.hash()?;
    let identity = format!("{spec_hash} {}", data.info.fingerprint);
    let folder = paths.root.join("checkpoints");
    if !folder.exists() && !matches!(resume, Resume::From(_)) {
        file.start_weights()?;
    }
    std::fs::create_dir_all(&folder).map_err(|error| failed(&folder, &error))?;
    let lock = Lock::take(&paths.root)?;
    let mut console = Log::open(&paths.root, console)?;
    if let Some(mut result) = finished(&paths, file, resume, &spec_hash, &data.info)? {
        console.say("this run is finished: its result is in result.json");
        let known = result.svm.as_ref().map(|svm| svm.c);
        if file.spec.evaluation.svm.is_some() && known != file.spec.evaluation.svm {
            let mut network =
                Network::new(&config.model, config.seed, config.precision.dtype(), device)?;
            config.begin(&mut network)?;
            add_svm(&mut network, file, &data, &paths, &mut result, &mut console)?;
        }
        return Ok(result);
    }
    remove_partial(&folder);
    remove_partial(&paths.root);
    complete_move(&paths)?;

    let mut ranks = match devices.len() {
        0 | 1 => Vec::new(),
        _ => Rank::all(devices)?,
    };
    // Passes of an evaluation are as large as those of a GPU's training, at the end too, where one evaluates.
    let given = file;
    let shared = with_passes_of(file, pass, &data, ranks.len().max(1));
    let file = &shared;
    let others = ranks.split_off(ranks.len().min(1));
    let collective: &dyn Collective = ranks.first().map_or(&Single, |rank| rank);
    let first = job(file, &data, &config, (device, collective));
    let mut trainer = Trainer::new(first).map_err(|error| file.place(error))?;
    let saved = open_saved(&paths, file, resume, &identity, &mut console)?;
    if let Some(began) = saved.as_ref().map(Saved::ranks)
        && began != devices.len().max(1)
    {
        return Err(Error::Run {
            path: paths.root.clone(),
            message: format!(
                "this run was begun on {began} device(s) and goes on on as many, not on {}: name them with \
                 --device, or choose another folder with --out",
                devices.len().max(1)
            ),
        });
    }
    let resumed_at = match &saved {
        Some(saved) => {
            trainer.resume(saved)?;
            if let Resume::From(state) = resume {
                bring_along(state, &paths, &mut console)?;
            }
            saved.progress().step
        }
        None => {
            if file.spec.start.is_some()
                && let Some(start) = trainer.start_from(|network| start_from(file, network))?
            {
                console.say(&start.to_string());
                for line in start.report.lines() {
                    console.note(&line);
                }
            }
            0
        }
    };
    let context = (saved.as_ref(), devices, pass);
    environment(&paths, &data.info, given, context, &mut console)?;
    write_whole(&paths.spec(), given.spec.to_toml()?.as_bytes())?;
    let lines = saved.as_ref().map_or(0, |saved| saved.progress().lines);
    let (metrics, there) = open_metrics(&paths.metrics(), lines)?;
    if there < lines {
        console.say(&format!(
            "metrics.jsonl has {there} lines, and its state counts {lines}: what came before is missing"
        ));
        trainer.has_lines(there);
    }
    let events = match file.spec.log.tensorboard {
        true => Some(
            EventWriter::create(&paths.root, resumed_at)
                .map_err(|error| failed(&paths.root, &error))?,
        ),
        false => None,
    };
    let record = Record {
        preprocessing: preprocessing(&data.seen),
        pipeline: serde_json::to_value(&data.seen).ok(),
        classes: data.classes.clone(),
        training: serde_json::to_value(given.spec.anywhere()).ok(),
    };
    let mut recorder = Recorder {
        file,
        paths: &paths,
        identity: &identity,
        record,
        metrics,
        events,
        console: &mut console,
        epochs_kept: saved.as_ref().map_or(0, |saved| saved.progress().epoch),
    };
    let follow = |rank: &Rank, device: &Device| {
        let mut trainer = Trainer::new(job(file, &data, &config, (device, rank)))?;
        if let Some(saved) = &saved {
            trainer.resume(saved)?;
        }
        trainer.run(&mut Silent)?;
        Ok(trainer.skipped())
    };
    let (result, skipped_elsewhere) = with_others(
        ranks.first(),
        others.into_iter().zip(devices.iter().skip(1)),
        &follow,
        || trainer.run(&mut recorder),
    )?;
    let mut skipped_images = data.skipped.clone();
    skipped_images.extend(trainer.skipped());
    skipped_images.extend(skipped_elsewhere);
    let status = match result.stopped {
        true => "stopped",
        false => "finished",
    };
    let mut outcome = RunResult {
        status: status.to_owned(),
        epochs: result.epochs.len(),
        steps: result.steps,
        skipped_steps: result.skipped_steps,
        best: result.best.map(|(epoch, eval_error)| Best {
            epoch,
            eval_error,
            test: None,
        }),
        selected_on: match data.test {
            Some(_) => "validation",
            None => "test",
        }
        .to_owned(),
        last: None,
        svm: None,
        parameters: result.parameters,
        wall_seconds: result.seconds,
        cpu_seconds: result.cpu_seconds,
        images_per_second: mean(result.epochs.iter().map(|e| e.images_per_second)),
        peak_memory_mb: None,
        peak_gpu_memory_mb: None,
        measured_kernels: vec![],
        spec_hash,
        data_fingerprint: data.info.fingerprint.clone(),
        skipped_images,
    };
    if !result.stopped {
        let record = recorder.record;
        let mut network = trainer.into_averaged()?;
        checkpoint::save(&network, &paths.checkpoint(FINAL), &record)?;
        report(&network, file, &data, &paths, &mut outcome, &mut console)?;
        test_best(&mut network, file, &data, &paths, &mut outcome)?;
        // SVMs may need more memory or time than there is; the run is done without them.
        outcome.measure(devices);
        write_result(&paths, &outcome)?;
        add_svm(
            &mut network,
            file,
            &data,
            &paths,
            &mut outcome,
            &mut console,
        )?;
    } else {
        outcome.measure(devices);
        write_result(&paths, &outcome)?;
    }
    drop(lock);
    Ok(outcome)
}

/// A spec whose evaluations have passes for one of several devices, where it does not say how large they are.
fn with_passes_of(file: &SpecFile, pass: usize, data: &RunData, ranks: usize) -> SpecFile {
    let mut file = file.clone();
    if ranks > 1 && file.spec.evaluation.batch.is_none() {
        let images = pass / data.eval.pipeline.views().max(1);
        file.spec.evaluation.batch = Some(images.max(1));
    }
    file
}

impl RunResult {
    /// Notes what the process that trained has used so far.
    fn measure(&mut self, devices: &[Device]) {
        self.peak_memory_mb = machine::peak_memory_mb();
        self.peak_gpu_memory_mb = machine::peak_gpu_memory_mb(devices);
        self.measured_kernels = isqrt_linalg::measured_kernels();
    }
}

fn write_result(paths: &Paths, result: &RunResult) -> Result<()> {
    let text = serde_json::to_vec_pretty(result).map_err(|e| failed(&paths.result(), &e))?;
    write_whole(&paths.result(), &text)
}

/// Evaluates the last weights on the part that is reported on.
fn report(
    network: &Network,
    file: &SpecFile,
    data: &RunData,
    paths: &Paths,
    outcome: &mut RunResult,
    console: &mut Log<'_>,
) -> Result<()> {
    let feed = data.reported();
    console.say(&format!("evaluating on {} images", feed.images.len()));
    let tally = count(network, file, data, feed, &mut |_| ())?;
    write_confusion(&paths.root.join("confusion.csv"), &data.classes, &tally)?;
    outcome.last = Some(tally.evaluation().into());
    Ok(())
}

/// Adds the SVMs that the spec asks for to the result, on the weights that the run reports on.
fn add_svm(
    network: &mut Network,
    file: &SpecFile,
    data: &RunData,
    paths: &Paths,
    outcome: &mut RunResult,
    console: &mut Log<'_>,
) -> Result<()> {
    if let Some(c) = file.spec.evaluation.svm {
        console.say(&format!(
            "fitting {} linear SVMs on the representations of {} images",
            data.classes.len(),
            data.train_as_eval.images.len()
        ));
        let weights = paths.checkpoint(FINAL);
        checkpoint::load(network, &weights, &LoadOptions::default())?;
        outcome.svm = Some(svm(network, file, data, data.reported(), c)?);
        write_result(paths, outcome)?;
    }
    Ok(())
}

/// Evaluates the best weights on the part that is reported on, where that is not the one that chose them.
fn test_best(
    network: &mut Network,
    file: &SpecFile,
    data: &RunData,
    paths: &Paths,
    outcome: &mut RunResult,
) -> Result<()> {
    // A run that goes on from a state of elsewhere may not have it.
    let weights = paths.checkpoint("best");
    if let (Some(best), Some(feed), true) = (&mut outcome.best, &data.test, weights.exists()) {
        checkpoint::load(network, &weights, &LoadOptions::default())?;
        best.test = Some(
            count(network, file, data, feed, &mut |_| ())?
                .evaluation()
                .into(),
        );
    }
    Ok(())
}

/// Counts a network's answers to images as its spec evaluates them.
///
/// # Errors
/// As [`evaluate`].
pub fn count(
    network: &Network,
    file: &SpecFile,
    data: &RunData,
    feed: &Feed,
    each: &mut dyn FnMut(usize),
) -> Result<Tally> {
    let config = file.spec.config(data.info.classes);
    let job = job(file, data, &config, (&Device::Cpu, &Single));
    evaluate(network, &job.eval_loader(feed)?, &Single, each)
}

pub(crate) fn job<'a>(
    file: &SpecFile,
    data: &RunData,
    config: &'a TrainConfig,
    (device, collective): (&Device, &'a dyn Collective),
) -> Job<'a> {
    let spec = &file.spec;
    Job {
        train: data.train.clone(),
        eval: data.eval.clone(),
        workers: match (spec.data.workers, collective.size()) {
            (workers, 1) => workers,
            (None, _) if matches!(data.train.images, Images::Memory(_)) => None,
            (workers, ranks) => {
                let threads = workers.unwrap_or_else(rayon::current_num_threads);
                Some(threads.div_ceil(ranks))
            }
        },
        prefetch: spec.data.prefetch,
        broken: data.broken,
        eval_every: spec.evaluation.every,
        eval_batch: spec.evaluation.batch.unwrap_or_else(|| {
            (config.batch / config.accumulate / data.eval.pipeline.views().max(1)).max(1)
        }),
        log_every: spec.log.every_steps,
        diagnostics: spec.diagnostics.clone(),
        device: device.clone(),
        collective,
        config,
    }
}

fn write_confusion(path: &Path, classes: &[String], tally: &Tally) -> Result<()> {
    // More than a page can show, and a square of their number.
    const MOST: usize = 500;
    if classes.len() > MOST {
        return Ok(());
    }
    let quoted = |name: &String| match name.contains([',', '"', '\n']) {
        true => format!("\"{}\"", name.replace('"', "\"\"")),
        false => name.clone(),
    };
    let names: Vec<String> = classes.iter().map(quoted).collect();
    let mut text = format!("label\\answer,{}\n", names.join(","));
    for (name, row) in names.iter().zip(tally.confusion()) {
        let row: Vec<String> = row.map(|n| n.to_string()).collect();
        text += &format!("{name},{}\n", row.join(","));
    }
    write_whole(path, text.as_bytes())
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    sum / f64::max(count, 1.0)
}
