//! A run in its folder: from an experiment file to `result.json`.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `spec.toml` | the resolved spec |
//! | `environment.json` | commit, machine, threads, data: see [`Environment`] |
//! | `metrics.jsonl` | one [`Line`] a line: the truth |
//! | `events.out.tfevents.*` | the same for TensorBoard |
//! | `checkpoints/last.safetensors` | weights and the state that the run goes on from |
//! | `checkpoints/previous.safetensors` | the one before, in case the last cannot be read |
//! | `checkpoints/best.safetensors` | weights of the best epoch |
//! | `result.json` | what came out: see [`RunResult`] |
//! | `confusion.csv` | answers (columns) to the images of each class (rows) at the end |
//! | `console.log` | what was said |

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::Device;
use isqrt_datasets::{Filter, Images, Pipeline, Skipped, Step};
use isqrt_models::checkpoint::{self, LoadOptions, Preprocessing, Record, Report, Triangle};
use isqrt_models::{Network, WholeFile, sync_folder_of};
use serde::{Deserialize, Serialize};

pub use crate::svm_eval::svm;

use crate::EventWriter;
use crate::collective::{Collective, Single};
use crate::data::{DataInfo, RunData};
use crate::evaluate::evaluate;
use crate::machine::{self, Machine};
use crate::ranks::gone;
use crate::spec::TriangleOrder;
use crate::state::{Saved, Snapshot};
use crate::{
    EpochMetrics, Error, Evaluation, Feed, Job, Line, Moment, Observer, Rank, Result, Silent,
    SpecFile, StepInfo, Tally, TrainConfig, Trainer, counted,
};

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

/// What a run ran on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// Of this program.
    pub version: String,
    /// Commit of the checkout.
    pub commit: String,
    /// Whether the checkout had changes.
    pub dirty: bool,
    /// Machine, threads, device.
    #[serde(flatten)]
    pub machine: Machine,
    /// The images.
    pub data: DataInfo,
    /// Seconds since 1970.
    pub started: u64,
    /// When and on what the run was taken up again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<Resumed>,
}

/// A run taken up again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resumed {
    /// Seconds since 1970.
    pub at: u64,
    /// Updates that were done.
    pub step: u64,
    /// Commit of the checkout, `+changes` where it had some.
    pub commit: String,
    /// Machine, threads, device.
    #[serde(flatten)]
    pub machine: Machine,
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
    /// Of the images, see [`DataInfo`].
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

impl From<TriangleOrder> for Triangle {
    fn from(order: TriangleOrder) -> Self {
        match order {
            TriangleOrder::Upper => Self::Upper,
            TriangleOrder::Lower => Self::Lower,
        }
    }
}

/// Names below a run folder.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The folder.
    pub root: PathBuf,
}

impl Paths {
    /// `spec.toml`
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.root.join("spec.toml")
    }

    /// `checkpoints/NAME.safetensors`
    #[must_use]
    pub fn checkpoint(&self, name: &str) -> PathBuf {
        self.root
            .join("checkpoints")
            .join(format!("{name}.safetensors"))
    }

    /// The weights of this checkpoint, or those that the result reports on; of a run that goes on, its last.
    ///
    /// # Errors
    /// [`Error::Run`] with those that there are.
    pub fn weights(&self, name: Option<&str>) -> Result<PathBuf> {
        let wanted = name.map_or_else(|| vec![FINAL, "last"], |name| vec![name]);
        let paths = wanted.iter().map(|name| self.checkpoint(name));
        if let Some(found) = paths.into_iter().find(|path| path.exists()) {
            return Ok(found);
        }
        let files = std::fs::read_dir(self.root.join("checkpoints"));
        let files = files.into_iter().flatten().flatten();
        let mut there: Vec<String> = files
            .filter_map(|file| {
                Some(
                    file.file_name()
                        .to_str()?
                        .strip_suffix(".safetensors")?
                        .to_owned(),
                )
            })
            .collect();
        there.sort();
        let there = match there.is_empty() {
            true => "none yet".to_owned(),
            false => there.join(", "),
        };
        Err(Error::Run {
            path: self.root.clone(),
            message: format!(
                "has no checkpoint {}; there are: {there}",
                wanted.join(" or ")
            ),
        })
    }

    /// `metrics.jsonl`
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `result.json`
    #[must_use]
    pub fn result(&self) -> PathBuf {
        self.root.join("result.json")
    }

    fn environment(&self) -> PathBuf {
        self.root.join("environment.json")
    }

    /// The images of the run, as it recorded them; none where it did not.
    ///
    /// # Errors
    /// [`Error::File`] where the record cannot be read.
    pub fn data(&self) -> Result<Option<DataInfo>> {
        let path = self.environment();
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|error| failed(&path, &error))?;
        let told: Environment =
            serde_json::from_slice(&bytes).map_err(|error| failed(&path, &error))?;
        Ok(Some(told.data))
    }
}

/// The file with the weights: itself, or of a run's folder the one that its result reports on.
///
/// # Errors
/// As [`Paths::weights`].
pub fn weights_file(path: &Path) -> Result<PathBuf> {
    let paths = Paths {
        root: path.to_owned(),
    };
    match paths.spec().exists() {
        true => paths.weights(None),
        false => Ok(path.to_owned()),
    }
}

/// The weights that a run begins with.
#[derive(Debug)]
pub struct Start {
    /// Their file.
    pub path: PathBuf,
    /// What was taken.
    pub report: Report,
}

impl std::fmt::Display for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "starting from {}: {} tensors taken, {} of the network's stay at their initial values",
            self.path.display(),
            self.report.taken,
            self.left()
        )
    }
}

impl Start {
    /// Tensors of the network that the file does not have.
    fn left(&self) -> usize {
        self.report.missing.len() + self.report.misshapen.len()
    }
}

/// Gives a network the weights that the spec begins with, if it names some.
///
/// # Errors
/// [`Error::Spec`] where they are not there or are of another network: have less than half of its tensors;
/// as [`checkpoint::load`].
pub fn start_from(file: &SpecFile, network: &mut Network) -> Result<Option<Start>> {
    let Some((start, path)) = file.spec.start.as_ref().zip(file.start_weights()?) else {
        return Ok(None);
    };
    let options = LoadOptions {
        partial: start.partial,
        triangle: start.triangle.map(Into::into),
    };
    let report = checkpoint::load(network, &path, &options)?;
    let start = Start { path, report };
    let (taken, left) = (start.report.taken, start.left());
    if taken < left {
        return Err(file.problem(
            "start.weights",
            &format!(
                "is {}, which has {taken} of the network's {} tensors: it is of another network",
                start.path.display(),
                taken + left
            ),
        ));
    }
    Ok(Some(start))
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

/// Trains on the first device here and on the others in threads of their own; what both came to, or the
/// error that ended the run.
fn with_others<'a, T, S: Send>(
    first: Option<&Rank>,
    others: impl Iterator<Item = (Rank, &'a Device)>,
    follow: &(impl Fn(&Rank, &Device) -> Result<Vec<S>> + Sync),
    lead: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<S>)> {
    /// The scope waits for the others, who wait for this rank.
    struct Panic<'a>(Option<&'a Rank>);
    impl Drop for Panic<'_> {
        fn drop(&mut self) {
            if let (Some(rank), true) = (self.0, std::thread::panicking()) {
                rank.fail("it panicked");
            }
        }
    }
    std::thread::scope(|scope| {
        let _tell = Panic(first);
        let others: Vec<_> = others
            .map(|(rank, device)| {
                let work = move || rank.at_work(device, follow);
                (device, scope.spawn(work))
            })
            .collect();
        let mut problems = Vec::new();
        let led = match lead() {
            Ok(led) => Some(led),
            Err(error) => {
                if let Some(rank) = first {
                    rank.fail(&error.to_string());
                }
                problems.push(error);
                None
            }
        };
        let mut all = Vec::new();
        for (device, thread) in others {
            match thread.join().unwrap_or_else(|_| Err(gone())) {
                Ok(followed) => all.extend(followed),
                Err(source) => problems.push(Error::Rank {
                    device: isqrt_device::name(device),
                    source: Box::new(source),
                }),
            }
        }
        // What ended the run, not that the others heard of it.
        let first = problems.into_iter().min_by_key(Error::is_of_the_ranks);
        match (led, first) {
            (Some(led), None) => Ok((led, all)),
            (_, Some(problem)) => Err(problem),
            (None, None) => Err(Error::Collective("the first rank is gone".to_owned())),
        }
    })
}

/// Name of the checkpoint with the weights that a finished run reports on.
pub const FINAL: &str = "final";

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

/// The result of a run that needs nothing more.
fn finished(
    paths: &Paths,
    file: &SpecFile,
    resume: &Resume,
    spec_hash: &str,
    data: &DataInfo,
) -> Result<Option<RunResult>> {
    let old = match std::fs::read_to_string(paths.spec()) {
        Ok(text) => text,
        Err(_) => return Ok(None),
    };
    let refuse = |message: String| {
        Err(Error::Run {
            path: paths.root.clone(),
            message,
        })
    };
    if *resume == Resume::Never {
        return refuse(
            "has a run already: choose another folder with --out, remove it, or leave --resume out to go \
             on with it"
                .to_owned(),
        );
    }
    let old: std::result::Result<crate::Spec, _> = toml::from_str(&old);
    let same = match &old {
        Ok(old) => old.hash()? == spec_hash,
        Err(_) => false,
    };
    // A run that ended before its first checkpoint has nothing to lose.
    let kept = ["last", "previous", "best"].map(|name| paths.checkpoint(name).exists());
    if !same && !kept.contains(&true) && !paths.result().exists() {
        return Ok(None);
    }
    if !same {
        let what = old.map_or_else(
            |_| "its spec.toml cannot be read".to_owned(),
            |old| difference(&old, &file.spec),
        );
        return refuse(format!(
            "has a run of another spec ({what}): choose another folder with --out"
        ));
    }
    let result = std::fs::read(paths.result());
    let result: Option<RunResult> = result.ok().and_then(|b| serde_json::from_slice(&b).ok());
    let result = result.filter(|result| result.status == "finished" && *resume == Resume::Auto);
    if result
        .as_ref()
        .is_some_and(|r| r.data_fingerprint != data.fingerprint)
    {
        return refuse(
            "has a finished run on other images (another fingerprint): choose another folder with --out"
                .to_owned(),
        );
    }
    Ok(result)
}

/// The first key that two specs do not have in common, with both values.
fn difference(old: &crate::Spec, new: &crate::Spec) -> String {
    let flat = |spec: &crate::Spec| {
        let mut values = Vec::new();
        if let Ok(toml::Value::Table(table)) = toml::Value::try_from(spec.decisive()) {
            flatten("", &table, &mut values);
        }
        values
    };
    let (old, new) = (flat(old), flat(new));
    let value = |values: &[(String, String)], key: &str| {
        let found = values.iter().find(|(k, _)| k == key);
        found.map_or_else(|| "not set".to_owned(), |(_, v)| v.clone())
    };
    let mut keys = old.iter().chain(&new).map(|(key, _)| key);
    let differs = keys.find(|key| value(&old, key) != value(&new, key));
    differs.map_or_else(
        || "the same keys".to_owned(),
        |key| {
            format!(
                "{key} is {} there, {} here",
                value(&old, key),
                value(&new, key)
            )
        },
    )
}

fn flatten(prefix: &str, table: &toml::Table, values: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let path = match prefix {
            "" => key.clone(),
            prefix => format!("{prefix}.{key}"),
        };
        match value {
            toml::Value::Table(table) => flatten(&path, table, values),
            value => values.push((path, value.to_string())),
        }
    }
}

/// How the spec of the run that a state lies in differs from this one.
fn other_spec(state: &Path, file: &SpecFile) -> Option<String> {
    let old = std::fs::read_to_string(state.parent()?.join("../spec.toml")).ok()?;
    let old: crate::Spec = toml::from_str(&old).ok()?;
    (old.decisive() != file.spec.decisive()).then(|| difference(&old, &file.spec))
}

/// The state to go on from.
fn open_saved(
    paths: &Paths,
    file: &SpecFile,
    resume: &Resume,
    identity: &str,
    console: &mut Log<'_>,
) -> Result<Option<Saved>> {
    let saved = match resume {
        Resume::Never => return Ok(None),
        Resume::From(path) => {
            let saved = Saved::open(path, identity);
            Some(
                saved.map_err(|error| match (error, other_spec(path, file)) {
                    (Error::File { path, message }, Some(what)) => Error::File {
                        path,
                        message: format!("{message} ({what})"),
                    },
                    (error, _) => error,
                })?,
            )
        }
        Resume::Auto => {
            let mut problems = Vec::new();
            let mut found = None;
            for name in ["last", "previous"] {
                let path = paths.checkpoint(name);
                if !path.exists() {
                    continue;
                }
                match Saved::open(&path, identity) {
                    Ok(saved) => {
                        found = Some(saved);
                        break;
                    }
                    Err(error) => {
                        console.say(&format!("{error}; looking for the one before"));
                        problems.push(error.to_string());
                    }
                }
            }
            if found.is_none() && !problems.is_empty() {
                return Err(Error::Run {
                    path: paths.root.clone(),
                    message: format!(
                        "no checkpoint of it can be gone on from ({}): remove the folder to start again",
                        problems.join("; ")
                    ),
                });
            }
            found
        }
    };
    if let Some(saved) = &saved {
        let progress = saved.progress();
        console.say(&format!(
            "going on after {} and {}",
            counted(progress.epoch, "epoch"),
            counted(progress.step, "update")
        ));
    }
    Ok(saved)
}

/// Writes `environment.json`, or adds to it that the run was taken up again; says what may make a
/// difference.
fn environment(
    paths: &Paths,
    data: &DataInfo,
    file: &SpecFile,
    (saved, devices, pass): (Option<&Saved>, &[Device], usize),
    console: &mut Log<'_>,
) -> Result<()> {
    let path = paths.environment();
    let commit = machine::commit();
    let here = Machine::on(devices);
    if let Some(gpu) = devices.iter().find(|device| !device.is_cpu()) {
        let precision = file.spec.precision;
        // The driver's name of the GPU, once where all are alike.
        let each = isqrt_device::gpu_of(gpu).map_or_else(String::new, |gpu| gpu.name);
        let names: Vec<_> = devices.iter().map(isqrt_device::name).collect();
        let gpu = file.spec.gpu;
        console.say(&format!(
            "on {} ({each}), {precision}, in passes of {pass} images{}{}",
            names.join(" and "),
            if devices.len() > 1 { " on each" } else { "" },
            match gpu.is_default() {
                true => String::new(),
                false => format!("; layer {}, convolutions {}", gpu.layer, gpu.convolutions),
            }
        ));
    }
    let on_gpu = devices.iter().any(Device::is_cuda);
    if !on_gpu && !file.spec.gpu.is_default() {
        console.say("gpu.layer and gpu.convolutions are for GPUs: the CPU does not look at them");
    }
    if saved.is_some() && on_gpu && file.spec.gpu.measures() {
        console.say("the fastest kernels and algorithms are looked for again: results may round differently");
    }
    let old = saved.and_then(|_| std::fs::read(&path).ok());
    let old: Option<Environment> = old.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let environment = match (old, saved) {
        (Some(mut old), Some(saved)) => {
            if old.machine.cpu != here.cpu {
                console.say(&format!(
                    "the run was begun on {} and goes on on {}: results may differ in the last bits",
                    old.machine.cpu, here.cpu
                ));
            }
            if old.machine.device != here.device {
                console.say(&format!(
                    "the run was begun on {} and goes on on {}: results differ in the last bits",
                    old.machine.device, here.device
                ));
            }
            if old.machine.threads != here.threads {
                console.say(&format!(
                    "the run was begun with {} threads and goes on with {}: the bits are the same for any \
                     number",
                    old.machine.threads, here.threads
                ));
            }
            old.resumed.push(Resumed {
                at: machine::now(),
                step: saved.progress().step,
                commit,
                machine: here,
            });
            old
        }
        _ => Environment {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dirty: commit.ends_with("+changes"),
            commit: commit.trim_end_matches("+changes").to_owned(),
            machine: here,
            data: data.clone(),
            started: machine::now(),
            resumed: Vec::new(),
        },
    };
    let text = serde_json::to_vec_pretty(&environment).map_err(|e| failed(&path, &e))?;
    write_whole(&path, &text)
}

/// The metrics of a run that goes on: what was written after its state is written again. With the number
/// of lines that were there, at most those that the state counts.
fn open_metrics(path: &Path, lines: u64) -> Result<(File, u64)> {
    let open = || -> std::io::Result<(File, u64)> {
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(path)?;
        let (mut length, mut there) = (0, 0);
        let mut reader = BufReader::new(&mut file);
        let mut line = Vec::new();
        for _ in 0..lines {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                break;
            }
            length += read as u64;
            there += 1;
        }
        file.set_len(length)?;
        file.seek(SeekFrom::End(0))?;
        Ok((file, there))
    };
    open().map_err(|error| failed(path, &error))
}

/// What a run writes while it goes on.
struct Recorder<'a, 'b> {
    file: &'a SpecFile,
    paths: &'a Paths,
    identity: &'a str,
    record: Record,
    metrics: File,
    events: Option<EventWriter>,
    console: &'a mut Log<'b>,
    /// Epochs whose state is kept.
    epochs_kept: usize,
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

/// Makes the state that was written beside the two others the last one, and that the one before. A process
/// that is killed meanwhile leaves `next`, which is whole, for the one after it.
fn complete_move(paths: &Paths) -> Result<()> {
    let [next, last, previous] = ["next", "last", "previous"].map(|name| paths.checkpoint(name));
    let move_on = || -> std::io::Result<()> {
        if !next.exists() {
            return Ok(());
        }
        if last.exists() {
            std::fs::rename(&last, &previous)?;
        }
        std::fs::rename(&next, &last)?;
        sync_folder_of(&last);
        Ok(())
    };
    move_on().map_err(|error| failed(&last, &error))
}

/// Metrics and best weights of the run that a state is taken from, where it is of another folder.
fn bring_along(state: &Path, paths: &Paths, console: &mut Log<'_>) -> Result<()> {
    let folder = state.parent().unwrap_or(Path::new(""));
    let from = folder.join("..").join("metrics.jsonl");
    for (from, to) in [
        (from, paths.metrics()),
        (folder.join("best.safetensors"), paths.checkpoint("best")),
    ] {
        if to.exists() {
            continue;
        }
        match from.exists() {
            true => {
                let copy = || {
                    let mut file = WholeFile::create(&to)?;
                    std::io::copy(&mut File::open(&from)?, file.file()?)?;
                    file.finish()
                };
                copy().map_err(|error| failed(&to, &error))?;
            }
            false => console.say(&format!("there is no {}", from.display())),
        }
    }
    Ok(())
}

/// Says things to people and writes them to `console.log`.
struct Log<'a> {
    file: File,
    console: &'a mut dyn Console,
}

impl<'a> Log<'a> {
    fn open(root: &Path, console: &'a mut dyn Console) -> Result<Self> {
        let path = root.join("console.log");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        Ok(Self {
            file: file.map_err(|error| failed(&path, &error))?,
            console,
        })
    }

    fn say(&mut self, text: &str) {
        self.note(text);
        self.console.say(text);
    }

    /// For the file alone. A full disk is told by what matters more than this.
    fn note(&mut self, text: &str) {
        let _ = writeln!(self.file, "{} {text}", machine::date(machine::now()));
    }
}

/// One process at a time in a folder, for as long as this lives, however it ends.
struct Lock {
    _file: File,
}

impl Lock {
    fn take(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| failed(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut by = String::new();
                let _ = file.read_to_string(&mut by);
                let by = match by.trim() {
                    "" => String::new(),
                    by => format!(" (process {by})"),
                };
                return Err(Error::Run {
                    path: root.to_owned(),
                    message: format!(
                        "another process{by} is training in this folder: wait for it, or choose another \
                         folder with --out"
                    ),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(&path, &error)),
        }
        // For people; the lock itself is the system's.
        let _ = file.set_len(0);
        let _ = write!(file, "{}", std::process::id());
        Ok(Self { _file: file })
    }
}

/// What killed processes left half-written.
fn remove_partial(folder: &Path) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".partial") {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// How images are made ready for the network, where it is as simple.
fn preprocessing(pipeline: &Pipeline) -> Option<Preprocessing> {
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

fn write_whole(path: &Path, text: &[u8]) -> Result<()> {
    let write = || {
        let mut file = WholeFile::create(path)?;
        file.file()?.write_all(text)?;
        file.finish()
    };
    write().map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::File {
        path: path.to_owned(),
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Ranks that meet once more each time, until `last`.
    fn meet(rank: &Rank, last: usize) -> Result<()> {
        (0..last).try_for_each(|_| rank.barrier())
    }

    fn together(
        follow: impl Fn(&Rank, &Device) -> Result<Vec<u8>> + Sync,
        lead: impl FnOnce(&Rank) -> Result<u8>,
    ) -> Result<(u8, Vec<u8>)> {
        let devices = [Device::Cpu, Device::Cpu, Device::Cpu];
        let mut ranks = Rank::all(&devices).unwrap();
        let others = ranks.split_off(1);
        let first = ranks.first();
        let others = others.into_iter().zip(&devices[1..]);
        with_others(first, others, &follow, || lead(first.unwrap()))
    }

    #[test]
    fn all_ranks_come_to_something_or_the_run_ends_with_what_ended_it() {
        let follow = |rank: &Rank, _: &Device| {
            meet(rank, 5)?;
            Ok(vec![rank.rank() as u8])
        };
        let all = together(follow, |rank| meet(rank, 5).map(|()| 7)).unwrap();
        assert_eq!(all, (7, vec![1, 2]));

        let fails = |rank: &Rank, _: &Device| match rank.rank() {
            2 => Err(Error::Loss(f64::NAN)),
            _ => meet(rank, 5).map(|()| vec![]),
        };
        let told = together(fails, |rank| meet(rank, 5).map(|()| 7)).unwrap_err();
        assert_eq!(told.to_string(), "cpu: the loss is NaN");
        assert!(told.is_divergence());

        let told = together(follow, |_| Err(Error::Output)).unwrap_err();
        assert!(matches!(told, Error::Output), "{told}");
    }

    #[test]
    fn a_rank_that_panics_leaves_nobody_waiting() {
        let follow = |rank: &Rank, _: &Device| meet(rank, 5).map(|()| vec![]);
        let panics = || together(follow, |_| panic!("on purpose"));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        assert!(caught.is_err());
        let panics = |rank: &Rank, _: &Device| match rank.rank() {
            1 => panic!("on purpose"),
            _ => meet(rank, 5).map(|()| vec![]),
        };
        let told = together(panics, |rank| meet(rank, 5).map(|()| 7)).unwrap_err();
        assert!(told.to_string().contains("panicked"), "{told}");
    }
}
