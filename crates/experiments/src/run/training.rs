//! Training a small network with one head.

use super::{Data, Outcome, Tick};
use crate::error::{Error, Result};
use crate::plan::Training;
use crate::record::{EpochRecord, Measurement};
use crate::spec::{Head, HeadName};
use isqrt_models::{ModelSpec, RepresentationSpec};
use isqrt_train::{EpochMetrics, Job, Observer, OptimiserSpec, StepInfo, TrainConfig, train};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Trains on the training part and reports the error on the test part, or for a search on the
/// validation part. A training that diverged has an error that is not a number.
pub(super) fn run(
    training: &Training,
    seed: u64,
    search: bool,
    data: Option<&Data>,
    tick: &mut Tick<'_>,
) -> Result<Outcome> {
    let failed = |message: String| Error::Cell {
        cell: format!("training of {}", training.recipe.backbone.name),
        message,
    };
    let data = data.ok_or_else(|| failed("there are no images to train on".to_owned()))?;
    let lr = training
        .lr
        .ok_or_else(|| failed("the learning rate is not known".to_owned()))?;
    let config = config(training, lr, seed, data.info.classes);
    // What is not random has been done to the images when they were decoded.
    let (pipeline, ..) = training.recipe.pipelines().map_err(failed)?;
    let augment = pipeline.split_random().1.steps;
    let set = &data.set;
    let eval = if search { &set.val } else { &set.test };
    let mut watch = Watch {
        tick,
        epochs: Vec::new(),
        of: config.epochs,
        last_error: None,
        stopped: false,
    };
    let result = Job::in_memory(&config, &augment, Arc::clone(&set.train), Arc::clone(eval))
        .and_then(|job| train(job, &mut watch));
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
            Measurement::new(
                "correct",
                r.evaluation.map_or(0, |e| e.correct) as f64,
                "images",
            ),
            Measurement::new("parameters", r.parameters as f64, "values"),
        ],
        Err(e) if e.is_divergence() => vec![Measurement::new(metric, f64::NAN, "%")],
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
        model: ModelSpec::new(
            recipe.backbone.clone(),
            representation(&training.head),
            classes,
        ),
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
        non_finite: isqrt_train::NonFinite::default(),
        seed,
    }
}

/// The head under its name in the registry, with its options.
fn representation(head: &Head) -> RepresentationSpec {
    let name = match head.name {
        HeadName::Gap => "gap",
        HeadName::Cov => "cov",
        HeadName::Isqrt => "isqrt",
        HeadName::Mpn => "mpn",
        HeadName::Eig => "eig",
        HeadName::Svd => "svd",
    };
    let options = serde_json::to_value(head).unwrap_or_default();
    let mut spec = RepresentationSpec::new(name);
    for (key, value) in options.as_object().into_iter().flatten() {
        if key != "name" {
            spec = spec.with(key, value.clone());
        }
    }
    spec
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
        self.epochs.push(EpochRecord {
            epoch: m.epoch,
            train_loss: m.train_loss,
            train_error: m.train_error,
            eval_error: m.eval_error.unwrap_or(f64::NAN),
            seconds: m.seconds,
        });
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::DataInfo;
    use crate::spec::Recipe;
    use isqrt_datasets::{DataSet, ImageSet};

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
        for name in [HeadName::Gap, HeadName::Cov, HeadName::Mpn] {
            let training = Training {
                head: Head {
                    name,
                    ..Head::default()
                },
                recipe: Recipe {
                    backbone: "e10net".into(),
                    batch: 16,
                    ..Recipe::default()
                },
                lr: Some(1e30),
            };
            let tick: &mut Tick<'_> = &mut |_, _| ControlFlow::Continue(());
            let outcome = run(&training, 0, false, Some(&data), tick).unwrap();
            assert_eq!(outcome.measurements[0].metric, "top1_error");
            assert!(outcome.measurements[0].value.is_nan(), "{outcome:?}");
        }
    }
}
