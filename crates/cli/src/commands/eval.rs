//! `isqrt eval`: a trained network on a part of a data set.

use super::device::DeviceArg;
use super::train::{Settings, svm_line};
use crate::output;
use crate::progress::{Counter, say};
use anyhow::Context;
use clap::{Args, ValueEnum};
use isqrt_models::checkpoint::{self, Checkpoint, LoadOptions};
use isqrt_train::data::RunData;
use isqrt_train::run::{Outcome, Paths, count, svm, weights_file};
use isqrt_train::spec::Normalise;
use isqrt_train::{SpecFile, told_pipeline};
use std::path::PathBuf;

/// Evaluate the network of a run, or other weights, as its spec evaluates
///
/// Top-1 and top-5 error with counts, cross-entropy, calibration error, accuracy of each class. Views of
/// an image (mirror, ten crops) are averaged: `--set data.eval_transforms=imagenet-tencrop`.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt eval runs/e10-isqrt
  isqrt eval runs/e10-isqrt --checkpoint best --part val
  isqrt eval experiments/imagenet/resnet50-isqrt.toml --weights r50.safetensors --data ILSVRC2012 \\
    --set data.eval_transforms=imagenet-tencrop")]
pub struct Eval {
    /// Run folder, or an experiment file with --weights
    run: PathBuf,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    device: DeviceArg,
    /// Checkpoint of the run: final (what result.json reports on; of a run that goes on, last), last, best,
    /// epoch-0010 and so on
    #[arg(long, value_name = "NAME", conflicts_with = "weights")]
    checkpoint: Option<String>,
    /// File with the weights, of any layout that `isqrt convert` reads, or the folder of a run
    #[arg(long, value_name = "PATH")]
    weights: Option<PathBuf>,
    /// Part of the data
    #[arg(long, value_enum, default_value_t = Part::Test)]
    part: Part,
    /// Fit linear SVMs with this C on the representations of the training part, and evaluate them too
    #[arg(long, value_name = "C")]
    svm: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What the run trains on, seen as in evaluation
    Train,
    /// What epochs are evaluated on
    Val,
    /// What is reported on
    Test,
}

impl Eval {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let paths = Paths {
            root: self.run.clone(),
        };
        let is_run = self.run.is_dir();
        let spec = if is_run {
            paths.spec()
        } else {
            self.run.clone()
        };
        let mut file = self.settings.read(&spec)?;
        let weights = match (&self.weights, is_run) {
            (Some(weights), _) => weights_file(weights)?,
            (None, true) => paths.weights(self.checkpoint.as_deref())?,
            (None, false) => anyhow::bail!(
                "{} is a spec: say which weights with --weights, or give a run folder",
                self.run.display()
            ),
        };
        if let Some(c) = self.svm {
            anyhow::ensure!(
                c > 0.0 && c.is_finite(),
                "--svm {c}: a positive number is needed"
            );
        }
        let checkpoint_file = Checkpoint::open(&weights)?;
        let record = checkpoint::record(&checkpoint_file)?;
        // Means and deviations are those that the network knows, whatever the images are.
        let own_means = file.spec.data.normalise == Normalise::Train;
        let told = told_pipeline(&record, &weights)?.filter(|_| own_means);
        if told.is_some() || !own_means {
            file.spec.data.normalise = Normalise::ImageNet;
            // For one pass, and several views are possible.
            file.spec.data.in_memory = false;
        }
        let others = is_run && is_other(&paths, &file)?;
        let mut data = match others && self.svm.is_none() {
            true => RunData::open_unseen(&file)?,
            false => RunData::open(&file, None)?,
        };
        match &told {
            Some(told) => data.normalise_as(told),
            None if others && own_means => say(&format!(
                "warning: {} does not tell the means that it was trained with; those of these images are taken",
                weights.display()
            )),
            None => {}
        }
        let known = record.classes;
        let mut pairs = known.iter().zip(&data.classes);
        if known.len() == data.classes.len()
            && let Some((theirs, ours)) = pairs.find(|(theirs, ours)| theirs != ours)
        {
            say(&format!(
                "warning: the weights know the class {theirs}, where the data have {ours}: what follows is of no \
                 use unless the classes are the same under other names"
            ));
        }
        let config = file.spec.config(data.info.classes);
        let mut network =
            checkpoint::network(&checkpoint_file, &config.model, &LoadOptions::default())?;
        // Checkpoints of a run tell their order; only those of others may not.
        let start = file.spec.start.as_ref().filter(|_| self.weights.is_some());
        let options = LoadOptions {
            triangle: start.and_then(|s| s.triangle).map(Into::into),
            ..LoadOptions::default()
        };
        checkpoint::load_from(&mut network, &checkpoint_file, &options)
            .with_context(|| format!("{} classes in the data", data.info.classes))?;
        let mut network = network.on(&self.device.open()?)?;
        config.begin(&mut network)?;
        let feed = match self.part {
            Part::Train => &data.train_as_eval,
            Part::Val => &data.eval,
            Part::Test => data.reported(),
        };
        let total = feed.images.len() as u64;
        let counter = Counter::default();
        let mut done = 0;
        let tally = count(&network, &file, &data, feed, &mut |images| {
            done += images as u64;
            counter.at("evaluating", done, total);
        })?;
        counter.end();
        let outcome = Outcome::from(tally.evaluation());
        let svm = match self.svm {
            Some(c) => Some(svm(&network, &file, &data, feed, c)?),
            None => None,
        };
        if json {
            let mut object = serde_json::to_value(&outcome)?;
            object["weights"] = serde_json::to_value(&weights)?;
            object["classes"] = serde_json::to_value(&data.classes)?;
            object["svm"] = serde_json::to_value(&svm)?;
            return output::json(&object);
        }
        output::line(&format!(
            "{} on {} images of {} ({})",
            weights.display(),
            outcome.evaluation.total,
            data.info.name,
            data.info.note
        ))?;
        output::line(&format!(
            "top-1 error {:.2} %, top-5 error {:.2} % ({} and {} of {} images right), loss {:.4}, \
             calibration error {:.4}",
            outcome.error,
            outcome.error5,
            outcome.evaluation.correct,
            outcome.evaluation.correct5,
            outcome.evaluation.total,
            outcome.evaluation.loss,
            outcome.evaluation.calibration_error
        ))?;
        if let Some(svm) = svm {
            output::line(&svm_line(&svm))?;
        }
        let mut classes: Vec<(usize, [u64; 2])> = outcome
            .evaluation
            .per_class
            .iter()
            .copied()
            .enumerate()
            .collect();
        classes.retain(|(_, [_, total])| *total > 0);
        let share = |[right, total]: [u64; 2]| right as f64 / total as f64;
        classes.sort_by(|a, b| share(a.1).total_cmp(&share(b.1)));
        const SHOWN: usize = 10;
        if classes.len() > SHOWN {
            output::line(&format!("the {SHOWN} classes with the lowest accuracy:"))?;
        }
        let rows = classes.iter().take(SHOWN).map(|&(class, counts)| {
            vec![
                data.classes[class].clone(),
                format!("{:.1} %", 100.0 * share(counts)),
                format!("{} of {}", counts[0], counts[1]),
            ]
        });
        output::table(&["class", "accuracy", "right"], rows.collect(), 1)
    }
}

/// Whether the images are others than those of the run. Those may lie elsewhere by now: as many of each part
/// are taken for the same.
fn is_other(paths: &Paths, file: &SpecFile) -> anyhow::Result<bool> {
    let own = SpecFile::read(&paths.spec(), &[])?.spec.data.root;
    let real = |root: &Option<PathBuf>| root.as_ref().and_then(|root| root.canonicalize().ok());
    if own == file.spec.data.root || real(&own) == real(&file.spec.data.root) {
        return Ok(false);
    }
    let here = RunData::sizes(file)?;
    let seen = paths.data()?;
    let other = seen.is_none_or(|own| (own.train, own.eval, own.test) != here);
    say(match other {
        true => "these are taken for other images than those of the run",
        false => "these are taken for the images of the run: as many of each part",
    });
    Ok(other)
}
