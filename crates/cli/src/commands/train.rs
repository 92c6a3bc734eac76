//! `isqrt train`: from an experiment file to a finished run.

use super::device::DevicesArg;
use crate::output::{self, show};
use crate::progress::{Training, say};
use anyhow::Context;
use candle_core::{DType, Device};
use clap::Args;
use isqrt_models::Network;
use isqrt_train::data::RunData;
use isqrt_train::plan::Plan;
use isqrt_train::run::{Resume, RunResult, SvmOutcome, run, start_from};
use isqrt_train::{SpecFile, counted};
use std::path::PathBuf;

/// Train a network as an experiment file says
///
/// The run folder holds the resolved spec, the environment, metrics.jsonl, TensorBoard's files,
/// checkpoints and result.json. The same command goes on where a run was stopped, by Ctrl-C (which
/// finishes the step and writes a checkpoint first), by a kill or a crash, and the weights at the end are
/// those of a run that was not. docs/training.md has every key.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt train experiments/smoke/e10-isqrt.toml
  isqrt train experiments/finetune/cub-resnet50-isqrt.toml --data CUB_200_2011 --dry-run
  isqrt train experiments/smoke/e10-isqrt.toml --set optimiser.lr=0.1 --out runs/lr-0.1")]
pub struct Train {
    /// Experiment file
    spec: PathBuf,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    device: DevicesArg,
    /// Run folder [default: runs/ and the name of the spec]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in the folder if there is one (auto), refuse it (never), or go on from a checkpoint
    #[arg(long, value_name = "auto|never|FILE", default_value = "auto")]
    resume: String,
    /// Print the plan, shapes, parameters and memory, and look at the data; train nothing
    #[arg(long)]
    dry_run: bool,
    /// Make N updates of everything, evaluation and checkpoint included, in a folder that is then removed
    /// (kept with --out); small batches of the program's own images may make a few more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    smoke: Option<u16>,
    /// Write a trace for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// What lies over an experiment file.
#[derive(Args)]
pub struct Settings {
    /// Set a key of the spec, as often as wanted: a.b=VALUE, VALUE as in TOML or plain text
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder, archive or list with the images, in place of data.root and data.set, set or not
    #[arg(long, value_name = "ROOT")]
    pub data: Option<PathBuf>,
}

impl Settings {
    /// The spec with all that lies over it.
    pub fn read(&self, path: &std::path::Path) -> anyhow::Result<SpecFile> {
        let Some(data) = &self.data else {
            return Ok(SpecFile::read(path, &self.set)?);
        };
        // So that the run can be evaluated from elsewhere.
        let root =
            std::path::absolute(data).with_context(|| format!("--data {}", data.display()))?;
        let root = root
            .to_str()
            .with_context(|| format!("{}: its name is not in UTF-8", data.display()))?;
        Ok(SpecFile::read_on(path, &self.set, Some(root))?)
    }
}

impl Train {
    /// True where the run was stopped before its end.
    pub fn run(&self, json: bool) -> anyhow::Result<bool> {
        let mut file = self.settings.read(&self.spec)?;
        let mut few = None;
        if let Some(updates) = self.smoke {
            let updates = usize::from(updates);
            let batch = file.spec.batch;
            few = Some([updates.saturating_mul(batch), batch]);
            file.spec.shrink();
        }
        if !json {
            say(&format!("reading {}", self.spec.display()));
        }
        let data = RunData::open(&file, few)?;
        if self.dry_run {
            let devices = self.device.open()?;
            let config = file.spec.config(data.info.classes);
            let pass = config.check_on(&devices);
            let pass = pass.map_err(|error| file.place(error))?;
            plan(&file, &data, devices.first().unwrap_or(&Device::Cpu), json)?;
            if devices.len() > 1 && !json {
                let devices = devices.len();
                output::line(&format!(
                    "on {devices} GPUs: {pass} images of each pass on each, with activations for as many"
                ))?;
            }
            // After the plan, which can be read before the weights are there.
            if file.start_weights()?.is_some() {
                let mut network = Network::new(&config.model, 0, DType::F32, &Device::Cpu)?;
                if let (Some(start), false) = (start_from(&file, &mut network)?, json) {
                    output::line(&start.to_string())?;
                }
            }
            return Ok(false);
        }
        let scratch = match (self.smoke, &self.out) {
            (Some(_), None) => Some(tempfile::tempdir().context("cannot make a folder")?),
            _ => None,
        };
        let out = match (&scratch, &self.out) {
            (Some(scratch), _) => scratch.path().join("run"),
            (None, Some(out)) => out.clone(),
            (None, None) => PathBuf::from("runs").join(self.spec.file_stem().unwrap_or_default()),
        };
        let resume = match self.resume.as_str() {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        };
        let devices = self.device.open()?;
        let mut console = Training::start(&file.spec, &data.info)?;
        let result = run(&file, data, &out, &resume, &devices, &mut console);
        console.end();
        let result = result?;
        let stopped = result.status != "finished";
        if json {
            let mut object = serde_json::to_value(&result)?;
            object["out"] = serde_json::to_value(&out)?;
            output::json(&object)?;
        } else {
            for line in summary(&result) {
                output::line(&line)?;
            }
            if scratch.is_none() {
                output::line(&format!("run folder: {}", out.display()))?;
            }
        }
        if stopped {
            say("stopped; the same command goes on from here");
        }
        Ok(stopped)
    }
}

/// What came out of the SVMs, as a sentence.
pub fn svm_line(svm: &SvmOutcome) -> String {
    let note = match svm.note.as_str() {
        "" => String::new(),
        note => format!("; {note}"),
    };
    format!(
        "linear SVMs (C = {}): top-1 error {:.2} % ({} of {} images right){note}",
        svm.c, svm.error, svm.correct, svm.total
    )
}

fn summary(result: &RunResult) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(last) = &result.last {
        lines.push(format!(
            "{}: top-1 error {:.2} %, top-5 error {:.2} % ({} of {} images right), calibration error {:.3}",
            counted(result.epochs, "epoch"),
            last.error,
            last.error5,
            last.evaluation.correct,
            last.evaluation.total,
            last.evaluation.calibration_error
        ));
    }
    if let Some(svm) = &result.svm {
        lines.push(svm_line(svm));
    }
    if let Some(best) = &result.best {
        let test = best.test.as_ref().map_or_else(String::new, |test| {
            format!(", on the test part {:.2} %", test.error)
        });
        lines.push(format!(
            "best epoch {} (chosen on the {} part): {:.2} %{test}",
            best.epoch, result.selected_on, best.eval_error
        ));
    }
    if !result.skipped_images.is_empty() {
        lines.push(format!(
            "{} broken images left out, named in result.json",
            result.skipped_images.len()
        ));
    }
    lines.push(format!(
        "{} in {}, {} of processor time{}{}",
        counted(result.steps, "update"),
        isqrt_experiments::stats::duration(result.wall_seconds),
        isqrt_experiments::stats::duration(result.cpu_seconds),
        // Known of whole epochs alone.
        match result.epochs {
            0 => String::new(),
            _ => format!(", {} images/s", show(result.images_per_second)),
        },
        [
            ("of the process", result.peak_memory_mb),
            ("on a GPU", result.peak_gpu_memory_mb)
        ]
        .iter()
        .filter_map(|(of, mb)| mb.map(|mb| format!(", peak memory {of} {mb:.0} MB")))
        .collect::<String>()
    ));
    lines.extend(result.measured_kernels.iter().cloned());
    lines
}

fn plan(file: &SpecFile, data: &RunData, device: &Device, json: bool) -> anyhow::Result<()> {
    let plan = Plan::new(file, data, device)?;
    // A look at the data: the first image of each part through its transforms.
    for (part, feed) in [("training", &data.train), ("evaluation", &data.eval)] {
        let config = isqrt_datasets::LoaderConfig {
            workers: Some(0),
            ..isqrt_datasets::LoaderConfig::eval(1)
        };
        let loader =
            isqrt_datasets::Loader::new(feed.images.clone(), feed.pipeline.clone(), config)?;
        loader
            .epoch(0)?
            .next()
            .transpose()
            .with_context(|| format!("the first {part} image"))?;
    }
    let total = plan.description.total();
    let megabytes = |bytes: u64| match bytes as f64 / 1e6 {
        small @ ..10.0 => format!("{small:.2} MB"),
        many => format!("{many:.0} MB"),
    };
    if json {
        return output::json(&serde_json::json!({
            "model": plan.model,
            "data": plan.data,
            "train_input": plan.train_input,
            "representation": plan.representation,
            "parameters": total.parameters,
            "updates_per_epoch": plan.updates_per_epoch,
            "epochs": plan.epochs,
            "batch": plan.batch,
            "pass": plan.pass,
            "memory": plan.memory,
            "spec_hash": plan.spec_hash,
        }));
    }
    if !file.spec.title.is_empty() {
        output::line(&file.spec.title)?;
    }
    let info = &plan.data;
    output::line(&format!(
        "data: {} ({} classes); {}",
        info.name, info.classes, info.note
    ))?;
    output::line(&format!(
        "parts: {} to train on, {} to evaluate epochs on, {} to report on at the end; input {} x {}{}",
        info.train,
        info.eval,
        if info.test == 0 {
            "the same".to_owned()
        } else {
            info.test.to_string()
        },
        info.input.0,
        info.input.1,
        plan.train_input
            .map_or_else(String::new, |(rows, columns)| {
                format!(", in training {rows} x {columns}")
            })
    ))?;
    let shape = |shape: &[usize]| {
        let sides: Vec<String> = shape.iter().map(ToString::to_string).collect();
        sides.join(" x ")
    };
    let rows = plan.description.stages.iter().chain([&total]).map(|stage| {
        vec![
            stage.name.clone(),
            shape(&stage.shape),
            stage.parameters.to_string(),
            megabytes(stage.activation_bytes),
        ]
    });
    output::table(
        &["stage", "output", "parameters", "activations an image"],
        rows.collect(),
        1,
    )?;
    output::line(&format!(
        "{}: {} values a representation; {} of {} of {} images in passes of {}",
        plan.model,
        plan.representation,
        counted(plan.epochs, "epoch"),
        counted(plan.updates_per_epoch, "update"),
        plan.batch,
        plan.pass
    ))?;
    output::line(&format!(
        "memory: at least {} ({} weights, gradients and optimiser, {} activations of a pass)",
        megabytes(plan.memory.total()),
        megabytes(plan.memory.parameters),
        megabytes(plan.memory.activations)
    ))?;
    output::line(&format!("spec {}", plan.spec_hash))
}
