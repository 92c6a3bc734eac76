//! Training a small network with one head.

use super::{Outcome, Task, Tick};
use crate::error::{Error, Result};
use crate::files::make_dir;
use crate::plan::{Training, Work};
use crate::record::{EpochRecord, Measurement};
use candle_core::Device;
use isqrt_models::checkpoint::{self, LoadOptions};
use isqrt_models::{ModelSpec, Network};
use isqrt_train::{EpochMetrics, Job, Observer, OptimiserSpec, StepInfo, TrainConfig, Trainer};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// Trains on the training part and reports the error on the test part, or for a search on the
/// validation part. A training that diverged has an error that is not a number. Weights of a network that
/// others start from are kept.
pub(super) fn run(
    training: &Training,
    task: &Task<'_>,
    device: &Device,
    tick: &mut Tick<'_>,
) -> Result<Outcome> {
    let search = matches!(task.work, Work::Search(_));
    let keep = matches!(task.work, Work::Pretrain(_)).then_some(&task.keep);
    let seed = task.seed.unwrap_or(0);
    let failed = |message: String| Error::Cell {
        cell: format!("training of {}", training.recipe.backbone.name),
        message,
    };
    let data = task
        .data
        .ok_or_else(|| failed("there are no images to train on".to_owned()))?;
    let lr = training
        .lr
        .ok_or_else(|| failed("the learning rate is not known".to_owned()))?;
    let config = config(training, lr, seed, data.info.classes);
    // What is not random has been done to the images when they were decoded.
    let (pipeline, ..) = training.recipe.pipelines().map_err(failed)?;
    let augment = pipeline.split_random().1.steps;
    let set = &data.set;
    let eval = if search { &set.val } else { &set.test };
    if let Some(folder) = keep.and_then(|path| path.parent()) {
        make_dir(folder)?;
    }
    let mut watch = Watch {
        tick,
        epochs: Vec::new(),
        of: config.epochs,
        last_error: None,
        stopped: false,
    };
    // Several trainings run beside each other.
    let device = isqrt_device::beside(device).map_err(|e| failed(e.to_string()))?;
    let result = Job::in_memory(&config, &augment, Arc::clone(&set.train), Arc::clone(eval))
        .map(|job| Job {
            eval_every: training.recipe.eval_every,
            device,
            ..job
        })
        .and_then(Trainer::new)
        .and_then(|mut trainer| {
            if let Some(weights) = &task.start {
                trainer.start_from(|network| begin(network, weights))?;
            }
            let result = trainer.run(&mut watch)?;
            if let Some(path) = keep {
                trainer.network().save(path)?;
            }
            Ok(result)
        });
    if watch.stopped {
        return Err(Error::Stopped);
    }
    let metric = if search {
        "validation_error"
    } else {
        "top1_error"
    };
    let mut measurements = match result {
        Ok(r) => vec![
            Measurement::new(metric, r.top1_error, "%"),
            Measurement::new("accuracy", 100.0 - r.top1_error, "%"),
            Measurement::new(
                "top5_error",
                r.evaluation.as_ref().map_or(f64::NAN, |e| e.error5()),
                "%",
            ),
            Measurement::new(
                "correct",
                r.evaluation.as_ref().map_or(0, |e| e.correct) as f64,
                "images",
            ),
            Measurement::new("parameters", r.parameters as f64, "values"),
        ],
        // Every number of it, or those of the other seeds would pass for all.
        Err(e) if e.is_divergence() => [metric, "accuracy", "top5_error"]
            .map(|metric| Measurement::new(metric, f64::NAN, "%"))
            .into(),
        Err(e) => return Err(failed(e.to_string())),
    };
    let trained: f64 = watch.epochs.iter().map(|e| e.seconds).sum();
    measurements.push(Measurement::new("train_seconds", trained, "s"));
    Ok(Outcome {
        measurements,
        epochs: watch.epochs,
    })
}

/// The engine's configuration.
fn config(training: &Training, lr: f64, seed: u64, classes: usize) -> TrainConfig {
    let recipe = &training.recipe;
    TrainConfig {
        model: ModelSpec::new(recipe.backbone.clone(), training.head.clone(), classes),
        epochs: recipe.epochs,
        batch: recipe.batch,
        accumulate: 1,
        optimiser: OptimiserSpec::Sgd {
            lr,
            momentum: recipe.momentum,
            nesterov: false,
            weight_decay: recipe.weight_decay,
            decay: isqrt_nn::Decay::default(),
        },
        schedule: isqrt_nn::Schedule::default(),
        groups: Vec::new(),
        frozen: Vec::new(),
        frozen_norm: false,
        label_smoothing: 0.0,
        clip_norm: None,
        ema: None,
        precision: isqrt_train::Precision::default(),
        gpu: isqrt_train::GpuSpec::default(),
        non_finite: isqrt_train::NonFinite::default(),
        seed,
    }
}

/// Weights of a network of the same backbone, and of the same head where that has any; not its classifier.
fn begin(network: &mut Network, weights: &Path) -> isqrt_train::Result<()> {
    let options = LoadOptions {
        partial: true,
        ..LoadOptions::default()
    };
    checkpoint::load(network, weights, &options)?;
    Ok(())
}

/// Passes steps on as fractions and keeps the epochs.
struct Watch<'a, 'b> {
    tick: &'a mut Tick<'b>,
    epochs: Vec<EpochRecord>,
    of: usize,
    last_error: Option<f64>,
    stopped: bool,
}

impl Observer for Watch<'_, '_> {
    fn wants_state(&self, _: u64) -> bool {
        false
    }

    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        let error = self
            .last_error
            .map_or_else(String::new, |e| format!(", error {e:.1} %"));
        let words = format!(
            "epoch {}/{}, loss {:.2}{error}",
            info.epoch, self.of, info.loss
        );
        let flow = (self.tick)(info.step as f64 / info.steps.max(1) as f64, &words);
        self.stopped |= flow.is_break();
        flow
    }

    fn epoch(&mut self, m: &EpochMetrics) -> ControlFlow<()> {
        self.last_error = m.eval_error;
        self.epochs.push(m.into());
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::DataInfo;
    use crate::run::Data;
    use crate::spec::Recipe;
    use isqrt_datasets::{DataSet, ImageSet};
    use isqrt_models::RepresentationSpec;

    fn images(count: usize, salt: usize) -> Arc<ImageSet> {
        const SIDE: usize = 16;
        let classes = vec!["a".to_owned(), "b".to_owned()];
        let pixels = (0..count * SIDE * SIDE * 3)
            .map(|i| ((i + salt).wrapping_mul(2_654_435_761) >> 7) as u8)
            .collect();
        let labels = (0..count).map(|i| (i % 2) as u32).collect();
        Arc::new(ImageSet::new(classes, SIDE, SIDE, pixels, labels).unwrap())
    }

    #[test]
    fn a_training_whose_last_step_spoils_the_weights_is_recorded_as_diverged() {
        let (train, held_out) = (images(16, 0), images(8, 5));
        let data = Data {
            info: DataInfo {
                classes: 2,
                ..DataInfo::default()
            },
            set: DataSet {
                stats: train.channel_stats(),
                train,
                val: Arc::clone(&held_out),
                test: held_out,
                skipped: Vec::new(),
                note: String::new(),
            },
        };
        for name in ["gap", "cov", "mpn"] {
            let training = Training {
                head: RepresentationSpec::new(name),
                recipe: Recipe {
                    backbone: "e10net".into(),
                    batch: 16,
                    ..Recipe::default()
                },
                lr: Some(1e30),
                start_head: None,
                start: String::new(),
            };
            let work = Work::Train(training.clone());
            let task = Task {
                work: &work,
                seed: Some(0),
                data: Some(&data),
                start: None,
                key: "",
                keep: "nowhere".into(),
                fresh: false,
            };
            let tick: &mut Tick<'_> = &mut |_, _| ControlFlow::Continue(());
            let outcome = run(&training, &task, &Device::Cpu, tick).unwrap();
            assert_eq!(outcome.measurements[0].metric, "top1_error");
            assert!(outcome.measurements[0].value.is_nan(), "{outcome:?}");
        }
    }
}
