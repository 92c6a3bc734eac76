//! The training loop.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{Batch, ChannelStats, ImageSet, Loader, LoaderConfig, Pipeline};
use isqrt_models::Network;
use isqrt_nn::ops::cross_entropy;
use isqrt_nn::{Mode, Optimizer, Sgd};

use crate::{EpochMetrics, Error, Evaluation, Observer, Result, TrainConfig, TrainResult};

/// Trains a new network on `train` and evaluates it on `eval` after each epoch.
///
/// # Errors
/// [`Error::Config`] and [`Error::Model`] before anything runs; [`Error::NonFinite`] and
/// [`Error::Step`] with epoch and step, [`Error::Evaluation`] with the epoch.
/// [`Error::is_divergence`] tells runs whose numbers ran away from broken ones.
pub fn train(
    config: &TrainConfig,
    train: Arc<ImageSet>,
    eval: Arc<ImageSet>,
    observer: &mut dyn Observer,
) -> Result<TrainResult> {
    Ok(train_network(config, train, eval, observer)?.1)
}

/// As [`train`], and gives the trained network too.
///
/// # Errors
/// As [`train`].
pub fn train_network(
    config: &TrainConfig,
    train: Arc<ImageSet>,
    eval: Arc<ImageSet>,
    observer: &mut dyn Observer,
) -> Result<(Network, TrainResult)> {
    let start = Instant::now();
    config.check()?;
    for set in [&train, &eval] {
        if set.class_count() != config.model.classes {
            return Err(Error::Config {
                what: "model.classes",
                value: config.model.classes.to_string(),
                expected: format!("the data have {} classes", set.class_count()),
            });
        }
    }
    let stats = train.channel_stats();
    let loader = Loader::new(
        train,
        Pipeline {
            steps: config.augment.clone(),
            ..Pipeline::identity()
        }
        .normalising(stats.mean, stats.std),
        LoaderConfig::train(config.batch, config.seed),
    )?;
    let device = Device::Cpu;
    let network = Network::new(&config.model, config.seed, DType::F32, &device)?;
    let mut run = Run {
        config,
        optimiser: Sgd::new(network.vars(), config.sgd())?,
        network,
        loader,
        device,
    };
    let mut result = TrainResult {
        epochs: Vec::with_capacity(config.epochs),
        top1_error: 100.0,
        correct: 0,
        total: 0,
        parameters: run.network.vars().parameter_count(),
        seconds: 0.0,
        stopped: false,
    };
    for epoch in 0..config.epochs {
        let began = Instant::now();
        let trained = run.epoch(epoch, observer)?;
        // The last step of an epoch may have spoilt the weights; no loss has shown it yet.
        let evaluation = evaluate(&run.network, &eval, stats, config.batch).map_err(|source| {
            Error::Evaluation {
                epoch: epoch + 1,
                source: Box::new(source),
            }
        })?;
        let metrics = EpochMetrics {
            epoch: epoch + 1,
            train_loss: trained.loss,
            train_error: trained.evaluation.error(),
            eval_error: evaluation.error(),
            seconds: began.elapsed().as_secs_f64(),
        };
        result.epochs.push(metrics);
        result.top1_error = evaluation.error();
        (result.correct, result.total) = (evaluation.correct, evaluation.total);
        let stop = observer.epoch(&metrics).is_break() || trained.stopped;
        if stop {
            result.stopped = epoch + 1 < config.epochs || trained.stopped;
            break;
        }
    }
    result.seconds = start.elapsed().as_secs_f64();
    Ok((run.network, result))
}

/// Counts the images of `set` that the network gets right, in evaluation mode.
///
/// `stats` are those of the set that it was trained on.
///
/// # Errors
/// Where the images do not fit the network or its features are not finite; [`Error::Output`]
/// where its answers are not.
pub fn evaluate(
    network: &Network,
    set: &Arc<ImageSet>,
    stats: ChannelStats,
    batch: usize,
) -> Result<Evaluation> {
    let pipeline = Pipeline::identity().normalising(stats.mean, stats.std);
    let loader = Loader::new(Arc::clone(set), pipeline, LoaderConfig::eval(batch))?;
    let mut evaluation = Evaluation {
        correct: 0,
        total: 0,
    };
    for batch in loader.epoch(0)? {
        let (images, labels) = tensors(batch?, &loader, network.vars().device())?;
        let logits = network.forward(&images, Mode::Eval)?;
        if logits
            .flatten_all()?
            .to_vec1::<f32>()?
            .iter()
            .any(|x| !x.is_finite())
        {
            return Err(Error::Output);
        }
        evaluation.correct += correct(&logits, &labels)?;
        evaluation.total += labels.len();
    }
    Ok(evaluation)
}

struct Run<'a> {
    config: &'a TrainConfig,
    network: Network,
    optimiser: Sgd,
    loader: Loader,
    device: Device,
}

struct TrainedEpoch {
    loss: f64,
    evaluation: Evaluation,
    stopped: bool,
}

impl Run<'_> {
    fn epoch(&mut self, epoch: usize, observer: &mut dyn Observer) -> Result<TrainedEpoch> {
        let per_epoch = self.loader.batches();
        let total = per_epoch * self.config.epochs;
        let mut losses = 0.0;
        let mut steps = 0;
        let mut evaluation = Evaluation {
            correct: 0,
            total: 0,
        };
        let mut stopped = false;
        for (i, batch) in self.loader.epoch(epoch)?.enumerate() {
            let step = epoch * per_epoch + i;
            let rate = self.config.lr * self.config.schedule.factor(step, total, per_epoch);
            let at = |source| Error::Step {
                epoch: epoch + 1,
                step: i + 1,
                source: Box::new(source),
            };
            let (images, labels) = tensors(batch?, &self.loader, &self.device)?;
            // Masks of dropout follow the step.
            self.network.vars().set_step(step as u64);
            let (loss, right) = self.step(&images, &labels, rate).map_err(at)?;
            if !loss.is_finite() {
                return Err(Error::NonFinite {
                    epoch: epoch + 1,
                    step: i + 1,
                    loss,
                });
            }
            losses += f64::from(loss);
            steps += 1;
            evaluation.correct += right;
            evaluation.total += labels.len();
            if observer.step(step + 1, total, loss).is_break() {
                stopped = true;
                break;
            }
        }
        Ok(TrainedEpoch {
            loss: losses / f64::from(steps.max(1)),
            evaluation,
            stopped,
        })
    }

    /// Forward, backward, update. The loss and the number of right answers are from before it.
    fn step(&mut self, images: &Tensor, labels: &[u32], rate: f64) -> Result<(f32, usize)> {
        let logits = self.network.forward(images, self.config.mode())?;
        let loss = cross_entropy(&logits, labels, self.config.label_smoothing)?;
        let value = loss.to_scalar::<f32>()?;
        if value.is_finite() {
            let gradients = self.network.vars().backward(&loss)?;
            self.optimiser.step(&gradients, rate)?;
        }
        Ok((value, correct(&logits, labels)?))
    }
}

fn tensors(batch: Batch, loader: &Loader, device: &Device) -> Result<(Tensor, Vec<u32>)> {
    let shape = (batch.len(), 3, batch.height, batch.width);
    let images = Tensor::from_vec(batch.normalised(loader.levels()), shape, device)?;
    Ok((images, batch.labels))
}

fn correct(logits: &Tensor, labels: &[u32]) -> Result<usize> {
    let rows = logits.to_vec2::<f32>()?;
    let right = |(row, label): &(&Vec<f32>, &u32)| {
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.is_some_and(|(k, _)| k == **label as usize)
    };
    Ok(rows.iter().zip(labels).filter(right).count())
}
