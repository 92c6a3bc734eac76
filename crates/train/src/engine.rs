//! The training loop: the only one, for `isqrt train` and for the experiments alike.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{
    Batch, Broken, Epoch, ImageSet, Images, Loader, LoaderConfig, Pipeline, Position, Shard, Step,
};
use isqrt_models::Network;
use isqrt_nn::ops::cross_entropy;
use isqrt_nn::{Ema, Ledger, Mode, Optimizer, clip_grad_norm};

use crate::collective::{self, Collective, Single};
use crate::diagnostics;
use crate::error::ELSEWHERE;
use crate::evaluate::evaluate;
use crate::feeder::Feeder;
use crate::machine::cpu_seconds;
use crate::observer::{Moment, Observer, StepInfo};
use crate::spec::DiagnosticsSpec;
use crate::state::{Progress, Saved, Snapshot, Sums};
use crate::trouble;
use crate::{
    Diagnostics, EpochMetrics, Error, Evaluation, Line, NonFinite, Result, StepLine, TrainConfig,
    TrainResult, without_backtrace,
};

/// Images and what becomes of them.
#[derive(Debug, Clone)]
pub struct Feed {
    /// In memory or stored.
    pub images: Images,
    /// From an image to an input of the network.
    pub pipeline: Pipeline,
}

/// What is trained, on what, and what is noted meanwhile.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// How.
    pub config: &'a TrainConfig,
    /// Images to train on.
    pub train: Feed,
    /// Images to evaluate on.
    pub eval: Feed,
    /// Threads that prepare images, see [`LoaderConfig::workers`].
    pub workers: Option<usize>,
    /// Batches that are prepared ahead.
    pub prefetch: usize,
    /// What becomes of images that cannot be read.
    pub broken: Broken,
    /// Epochs from one evaluation to the next; the last epoch always has one.
    pub eval_every: usize,
    /// Images a pass of an evaluation, of one rank.
    pub eval_batch: usize,
    /// Updates a line of the log.
    pub log_every: u64,
    /// Looks into the network.
    pub diagnostics: Option<DiagnosticsSpec>,
    /// Where the network is.
    pub device: Device,
    /// The other ranks.
    pub collective: &'a dyn Collective,
}

impl<'a> Job<'a> {
    /// A job of one process on images in memory, normalised by the statistics of the training images;
    /// `augment` is done to these anew each epoch.
    ///
    /// # Errors
    /// [`Error::Config`] where the images have not as many classes as the network.
    pub fn in_memory(
        config: &'a TrainConfig,
        augment: &[Step],
        train: Arc<ImageSet>,
        eval: Arc<ImageSet>,
    ) -> Result<Self> {
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
        let feed = |set: Arc<ImageSet>, steps: &[Step]| Feed {
            images: set.into(),
            pipeline: Pipeline {
                steps: steps.to_vec(),
                ..Pipeline::identity()
            }
            .normalising(stats.mean, stats.std),
        };
        Ok(Self {
            train: feed(train, augment),
            eval: feed(eval, &[]),
            workers: None,
            prefetch: 2,
            broken: Broken::Fail,
            eval_every: 1,
            eval_batch: config.batch,
            log_every: 50,
            diagnostics: None,
            device: Device::Cpu,
            collective: &Single,
            config,
        })
    }

    /// Makes the batches of an evaluation.
    pub(crate) fn eval_loader(&self, feed: &Feed) -> Result<Loader> {
        self.loader(feed, LoaderConfig::eval(self.eval_batch))
    }

    fn loader(&self, feed: &Feed, config: LoaderConfig) -> Result<Loader> {
        let shard = Shard {
            rank: self.collective.rank(),
            ranks: self.collective.size(),
        };
        let config = LoaderConfig {
            workers: self.workers,
            prefetch: self.prefetch,
            broken: self.broken,
            shard,
            ..config
        };
        Ok(Loader::new(
            feed.images.clone(),
            feed.pipeline.clone(),
            config,
        )?)
    }
}

/// Updates from one look at the losses on a GPU to the next: between them nothing waits for it.
const READ_EVERY: u64 = 10;

/// Trains a new network and evaluates it after each epoch.
///
/// # Errors
/// [`Error::Config`] and [`Error::Model`] before anything runs; [`Error::NonFinite`] and
/// [`Error::Step`] with epoch and step, [`Error::Evaluation`] with the epoch.
/// [`Error::is_divergence`] tells runs whose numbers ran away from broken ones.
pub fn train(job: Job<'_>, observer: &mut dyn Observer) -> Result<TrainResult> {
    Trainer::new(job)?.run(observer)
}

/// A run under way.
pub struct Trainer<'a> {
    job: Job<'a>,
    network: Network,
    optimiser: Box<dyn Optimizer>,
    ema: Option<Ema>,
    feeder: Feeder,
    /// Losses and right answers that the GPU still has, and how many images they are of. None where every
    /// update waits for its loss.
    ledger: Option<Ledger>,
    unread: Sums,
    /// Mean loss when it was read last.
    known_loss: Option<f64>,
    loader: Loader,
    eval_loader: Loader,
    progress: Progress,
    /// Where the run was taken up again, until that epoch goes on.
    resumed: Option<Position>,
    /// No parameter of the backbone learns.
    backbone_stays: bool,
    /// Parameters that stay, whichever part they are of.
    frozen: Vec<Tensor>,
    began: Began,
    /// The last evaluation.
    evaluation: Option<Evaluation>,
}

/// When this process began, and what the run had taken before.
#[derive(Debug)]
struct Began {
    at: Instant,
    cpu: f64,
    seconds: f64,
    cpu_seconds: f64,
}

/// What an update came to.
struct Update {
    sums: Sums,
    /// The last pass of it, for a look into the network.
    images: Option<Tensor>,
    outcome: Outcome,
}

enum Outcome {
    /// Gradients, those of all ranks, and their norm where it is known.
    Gradients(GradStore, Option<f64>),
    /// Something is not finite.
    Bad(String),
    /// No rank had an image that could be read.
    Nothing,
}

impl<'a> Trainer<'a> {
    /// A network with initial weights, before its first step.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Model`] and [`Error::Data`] for what does not fit together.
    pub fn new(job: Job<'a>) -> Result<Self> {
        let config = job.config;
        config.check()?;
        let pass = config.pass(job.collective.size())?;
        let loading = LoaderConfig::train(pass, config.seed);
        let images = job.train.images.len();
        if images < config.batch {
            return Err(Error::Config {
                what: "batch",
                value: config.batch.to_string(),
                expected: format!("at most {images}, the number of training images"),
            });
        }
        let loader = job.loader(&job.train, loading)?;
        let eval_loader = job.eval_loader(&job.eval)?;
        let dtype = config.precision.dtype();
        let mut network = Network::new(&config.model, config.seed, dtype, &job.device)?;
        config.begin(&mut network)?;
        let ledger = match config.non_finite {
            NonFinite::Stop => Ledger::new(&job.device)?,
            // Updates that are left out must be known before they are made.
            NonFinite::Skip(_) => None,
        };
        let feeder = Feeder::new(&loader, &network)?;
        let optimiser = config.optimiser(network.vars())?;
        let ema = config.ema.map(|share| Ema::new(network.vars(), share));
        Ok(Self {
            backbone_stays: config.stays(network.vars()),
            frozen: config.frozen_of(network.vars()),
            ema: ema.transpose()?,
            progress: Progress::new(),
            resumed: None,
            began: Began {
                at: Instant::now(),
                cpu: cpu_seconds(),
                seconds: 0.0,
                cpu_seconds: 0.0,
            },
            evaluation: None,
            job,
            network,
            optimiser,
            feeder,
            ledger,
            unread: Sums::default(),
            known_loss: None,
            loader,
            eval_loader,
        })
    }

    /// Begins with other weights than initial ones, which `load` gives the network.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn start_from<T>(&mut self, load: impl FnOnce(&mut Network) -> Result<T>) -> Result<T> {
        let loaded = load(&mut self.network)?;
        if let Some(share) = self.job.config.ema {
            self.ema = Some(Ema::new(self.network.vars(), share)?);
        }
        Ok(loaded)
    }

    /// Goes on from a state of this run.
    ///
    /// # Errors
    /// [`Error::Model`], [`Error::Nn`] and [`Error::Data`] where it does not fit.
    pub fn resume(&mut self, saved: &Saved) -> Result<()> {
        let (progress, position) = saved.restore(
            &mut self.network,
            self.optimiser.as_mut(),
            self.ema.as_mut(),
        )?;
        // Refuses a position of other data now, not in the middle.
        drop(self.loader.resume(&position)?);
        self.began.seconds = progress.seconds;
        self.began.cpu_seconds = progress.cpu_seconds;
        self.progress = progress;
        self.resumed = Some(position);
        Ok(())
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The network when the run is over, with averaged weights where there are such.
    ///
    /// # Errors
    /// Those of candle.
    pub fn into_averaged(mut self) -> Result<Network> {
        if let Some(ema) = &mut self.ema {
            ema.swap(self.network.vars())?;
        }
        Ok(self.network)
    }

    /// Training images that were left out in this process.
    #[must_use]
    pub fn skipped(&self) -> Vec<isqrt_datasets::Skipped> {
        let mut skipped = self.loader.skipped();
        skipped.extend(self.eval_loader.skipped());
        skipped
    }

    /// Updates an epoch.
    #[must_use]
    pub fn updates(&self) -> usize {
        self.loader.batches() / self.job.config.accumulate
    }

    /// Trains to the end, or until the observer stops it.
    ///
    /// # Errors
    /// As [`train`].
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<TrainResult> {
        collective::share_weights(self.network.vars(), self.job.collective)?;
        if let Some(ema) = &mut self.ema {
            collective::share_averages(ema, self.job.collective)?;
        }
        let epochs = self.job.config.epochs;
        let mut stopped = false;
        while self.progress.epoch < epochs {
            if self.train_epoch(observer)? {
                self.snapshot(observer, Moment::Stop)?;
                stopped = true;
                break;
            }
            let metrics = self.finish_epoch(observer)?;
            let stop = observer.epoch(&metrics).is_break();
            if self.progress.epoch < epochs && self.any_rank(stop)? {
                self.snapshot(observer, Moment::Stop)?;
                stopped = true;
                break;
            }
        }
        let last = self.progress.epochs.last();
        Ok(TrainResult {
            epochs: self.progress.epochs.clone(),
            top1_error: last.and_then(|e| e.eval_error).unwrap_or(100.0),
            evaluation: self.evaluation.clone(),
            best: self.progress.best,
            steps: self.progress.step,
            skipped_steps: self.progress.skipped,
            parameters: self.network.vars().parameter_count(),
            seconds: self.seconds(),
            cpu_seconds: self.cpu_seconds(),
            stopped,
        })
    }

    /// Whether it is so on any rank.
    fn any_rank(&self, here: bool) -> Result<bool> {
        let mut count = [f64::from(u8::from(here))];
        self.job.collective.all_reduce_sums(&mut count)?;
        Ok(count[0] > 0.0)
    }

    /// Lines of the log that there are, where they are not those that the state counts.
    pub(crate) fn has_lines(&mut self, lines: u64) {
        self.progress.lines = lines;
    }

    fn seconds(&self) -> f64 {
        self.began.seconds + self.began.at.elapsed().as_secs_f64()
    }

    fn cpu_seconds(&self) -> f64 {
        self.began.cpu_seconds + cpu_seconds() - self.began.cpu
    }

    /// The rest of an epoch. True where the observer of any rank stopped it.
    fn train_epoch(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let position = self.resumed.take();
        let position = position.unwrap_or_else(|| self.position());
        let mut batches = self.loader.resume(&position)?;
        let updates = self.updates();
        let epoch = self.progress.epoch;
        while self.progress.batch < updates * self.job.config.accumulate {
            let began = Instant::now();
            let at = self.progress.batch / self.job.config.accumulate;
            let place = |source: Error| match source {
                // Says the file; a step means nothing to whoever looks after it.
                Error::Data(_) => source,
                source => Error::Step {
                    epoch: epoch + 1,
                    step: at + 1,
                    source: Box::new(source),
                },
            };
            let rate = self.rate(epoch * updates + at);
            let mut update = self.gradients(&mut batches).map_err(place)?;
            self.progress.batch += self.job.config.accumulate;
            self.progress.step += 1;
            let mut norm = None;
            match update.outcome {
                Outcome::Gradients(ref gradients, n) => {
                    norm = n;
                    let _span = tracing::info_span!("update").entered();
                    let stepped = self.optimiser.step(gradients, rate);
                    let side = update.images.as_ref().map(|images| images.dims()[2]);
                    stepped.map_err(|error| {
                        place(match side {
                            Some(side) => self.with_a_batch_that_fits(error.into(), side),
                            None => error.into(),
                        })
                    })?;
                    if let Some(ema) = &mut self.ema {
                        ema.update(self.network.vars())?;
                    }
                }
                Outcome::Bad(ref problem) => {
                    // An update before this one may have been the first, and is to be named.
                    if self.unread.images > 0.0 {
                        self.read_ledger(at)?;
                    }
                    self.bad(problem, at, observer)?;
                    // An update that is left out has no part in the means.
                    update.sums = Sums {
                        waited: update.sums.waited,
                        ..Sums::default()
                    };
                }
                Outcome::Nothing => {}
            }
            if self.ledger.is_some() {
                self.unread.images += update.sums.images;
                // Rank 0 alone keeps states, and all read together.
                if self.any_rank(self.reads_now(updates, observer))? {
                    let known = self.read_ledger(at)?;
                    norm = known.filter(|_| matches!(update.outcome, Outcome::Gradients(..)));
                }
            }
            update.sums.seconds = began.elapsed().as_secs_f64();
            self.progress.sums.add(&update.sums);
            self.progress.line.add(&update.sums);
            if self.ledger.is_some() {
                // What is known, until more is.
                update.sums.loss = self.known_loss.unwrap_or(f64::NAN) * update.sums.images;
            }
            let info = StepInfo {
                step: self.progress.step,
                steps: (updates * self.job.config.epochs) as u64,
                epoch: epoch + 1,
                epochs: self.job.config.epochs,
                loss: match update.sums.images {
                    0.0 => f64::NAN,
                    _ => update.sums.mean_loss(),
                },
                learning_rate: rate,
                images: update.sums.images as u64,
                seconds: update.sums.seconds,
                waited: update.sums.waited,
            };
            self.note(&info, norm, &update, observer)?;
            let stop = observer.step(&info).is_break();
            if self.any_rank(stop)? {
                if self.unread.images > 0.0 {
                    self.read_ledger(at)?;
                }
                return Ok(true);
            }
            self.snapshot(observer, Moment::Step)?;
        }
        Ok(false)
    }

    /// Whether somebody needs to know now what the updates since the last look came to.
    fn reads_now(&self, updates: usize, observer: &dyn Observer) -> bool {
        let step = self.progress.step;
        let looks = self.job.diagnostics.as_ref();
        self.known_loss.is_none()
            || step.is_multiple_of(READ_EVERY)
            || step.is_multiple_of(self.job.log_every)
            || looks.is_some_and(|look| step.is_multiple_of(look.every_steps))
            || self.progress.batch == updates * self.job.config.accumulate
            || observer.wants_state(step)
    }

    /// Reads what the last updates came to; the norm of the gradients of the last one.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where one of them was not finite.
    fn read_ledger(&mut self, at: usize) -> Result<Option<f64>> {
        let Some(ledger) = &mut self.ledger else {
            return Ok(None);
        };
        let _span = tracing::info_span!("read").entered();
        // What went wrong on the GPU shows here at the latest.
        let entries = ledger.take().map_err(|error| Error::Step {
            epoch: self.progress.epoch + 1,
            step: at + 1,
            source: Box::new(error.into()),
        })?;
        let mut sums = [entries.loss, entries.correct, entries.bad];
        self.job.collective.all_reduce_sums(&mut sums)?;
        let [loss, correct, bad] = sums;
        let images = std::mem::take(&mut self.unread).images;
        if bad > 0.0 {
            return Err(Error::NonFinite {
                epoch: self.progress.epoch + 1,
                step: at + 1,
                problem: format!(
                    "the loss or a gradient of this update, or of one of the {} before it, is not \
                     finite; with --set non_finite.skip=0 each update is looked at, and the layer told",
                    (READ_EVERY - 1).min(self.progress.step.saturating_sub(1))
                ),
            });
        }
        let read = Sums {
            loss,
            correct,
            ..Sums::default()
        };
        self.progress.sums.add(&read);
        self.progress.line.add(&read);
        if images > 0.0 {
            self.known_loss = Some(loss / images);
        }
        Ok(Some(entries.norm))
    }

    fn rate(&self, update: usize) -> f64 {
        let config = self.job.config;
        let updates = self.updates();
        let factor = config
            .schedule
            .factor(update, updates * config.epochs, updates);
        config.optimiser.lr() * factor
    }

    /// Forward and backward passes of one update, of all ranks.
    fn gradients(&self, batches: &mut Epoch) -> Result<Update> {
        let config = self.job.config;
        let collective = self.job.collective;
        let vars = self.network.vars();
        let (rank, ranks) = (collective.rank(), collective.size());
        // Running statistics as they were: a pass that goes wrong would spoil them for good.
        let statistics: Vec<Tensor> = match config.non_finite {
            NonFinite::Skip(_) => vars.buffers().map(|(_, buffer)| buffer.get()).collect(),
            NonFinite::Stop => Vec::new(),
        };
        let mut total: Option<GradStore> = None;
        let mut sums = Sums::default();
        let mut last = None;
        let (mut problem, mut problem_seen) = (None, None);
        for part in 0..config.accumulate {
            let began = Instant::now();
            let batch = {
                let _span = tracing::info_span!("load").entered();
                batches.next()
            };
            sums.waited += began.elapsed().as_secs_f64();
            let Some(batch) = batch.transpose()? else {
                break;
            };
            if batch.is_empty() || problem.is_some() {
                continue;
            }
            // Masks of dropout follow the pass.
            let updates = self.progress.epoch * self.updates();
            let pass = updates * config.accumulate + self.progress.batch + part;
            vars.set_step((pass * ranks + rank) as u64);
            let images = self
                .feeder
                .images(&batch)
                .map_err(|error| self.with_a_batch_that_fits(error, batch.height))?;
            match self.pass(&images, &batch, &mut sums, &mut total) {
                Ok(()) => {}
                Err(error) if error.is_divergence() => {
                    problem = Some(without_backtrace(&error.to_string()));
                    problem_seen = Some(images.clone());
                }
                Err(error) => return Err(self.with_a_batch_that_fits(error, batch.height)),
            }
            last = Some(images);
        }
        let mut shared = [
            sums.loss,
            sums.images,
            sums.correct,
            f64::from(u8::from(problem.is_some())),
        ];
        collective.all_reduce_sums(&mut shared)?;
        [sums.loss, sums.images, sums.correct, _] = shared;
        let outcome = match (shared[3] > 0.0, total) {
            (true, _) => Outcome::Bad(problem.unwrap_or_else(|| ELSEWHERE.to_owned())),
            (false, _) if sums.images == 0.0 => Outcome::Nothing,
            (false, total) => self.combine(total, sums.images, last.as_ref())?,
        };
        let outcome = match outcome {
            Outcome::Bad(problem) => {
                let told = problem_seen
                    .as_ref()
                    .map(|images| trouble::first_non_finite(&self.network, images, config.mode()));
                for ((_, buffer), value) in vars.buffers().zip(statistics) {
                    buffer.set(value);
                }
                match told {
                    Some(Ok(place)) => Outcome::Bad(format!("{problem}; {place}")),
                    _ => Outcome::Bad(problem),
                }
            }
            outcome => outcome,
        };
        Ok(Update {
            sums,
            images: last,
            outcome,
        })
    }

    /// Says which batch would fit where the memory of the GPU ran out; other errors stay.
    fn with_a_batch_that_fits(&self, error: Error, side: usize) -> Error {
        let gpu = isqrt_device::gpu_of(self.network.vars().device());
        let (Some(gpu), true) = (gpu, error.is_out_of_memory()) else {
            return error;
        };
        let problem = without_backtrace(&error.to_string());
        let advice = match self.batch_that_fits(gpu.memory, side) {
            Ok(0) | Err(_) => "not even one image fits: a smaller network or smaller images would \
                               (or, for a backbone that has it, checkpoint = true)"
                .to_owned(),
            Ok(fits) => {
                let (share, pass) = self.share();
                let parts = (1..=share)
                    .find(|parts| share.is_multiple_of(*parts) && share / parts <= fits)
                    .unwrap_or(share);
                format!(
                    "a pass of {pass} images does not fit, one of {fits} should: set accumulate = {parts} \
                     for the same updates in passes of {}, or a smaller batch",
                    share / parts
                )
            }
        };
        Error::OutOfMemory { problem, advice }
    }

    /// Says what to do where an evaluation took more memory than the GPU has; other errors stay.
    fn with_a_smaller_evaluation(&self, error: Error) -> Error {
        if self.job.device.is_cpu() || !error.is_out_of_memory() {
            return error;
        }
        let problem = without_backtrace(&error.to_string());
        let now = self.job.eval_batch;
        let advice = format!(
            "a pass of {now} images of an evaluation does not fit: set evaluation.batch to less"
        );
        Error::OutOfMemory { problem, advice }
    }

    /// Images of a pass that so much memory should hold: what a step keeps an image, and a third more for
    /// gradients on their way, beside parameters, their gradients, the optimiser's state and cuDNN's scratch.
    /// Always less than the pass that did not fit.
    fn batch_that_fits(&self, memory: usize, side: usize) -> Result<usize> {
        /// What cuDNN may take, and the context.
        const ELSEWHERE: u64 = 1 << 30;
        let config = self.job.config;
        let total = self.network.describe(side)?.total();
        let of_maps = config.precision.maps().size_in_bytes() as u64;
        let image = total.activation_bytes * of_maps / 4 * 4 / 3;
        let copies = (2 + config.optimiser.slots() + usize::from(config.ema.is_some())) as u64;
        let of_parameters = config.precision.dtype().size_in_bytes() as u64;
        let fixed =
            copies * total.parameters as u64 * of_parameters + ELSEWHERE.min(memory as u64 / 8);
        let fits = (memory as u64).saturating_sub(fixed) / image.max(1);
        Ok((fits as usize).min(self.share().1 / 2))
    }

    /// Images of an update and of a pass on this rank.
    fn share(&self) -> (usize, usize) {
        let share = self.job.config.batch / self.job.collective.size();
        (share, share / self.job.config.accumulate)
    }

    /// One pass of this rank: adds to the sums and to the gradients of the update.
    fn pass(
        &self,
        images: &Tensor,
        batch: &Batch,
        sums: &mut Sums,
        total: &mut Option<GradStore>,
    ) -> Result<()> {
        let config = self.job.config;
        let logits = {
            let _span = tracing::info_span!("forward").entered();
            self.forward(images, config.mode())?
        };
        let loss = cross_entropy(&logits, &batch.labels, config.label_smoothing)?;
        let count = batch.len() as f64;
        sums.images += count;
        if let Some(ledger) = &self.ledger {
            ledger.add(&loss, &logits, &batch.labels)?;
        } else {
            let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !value.is_finite() {
                return Err(Error::Loss(value));
            }
            sums.loss += value * count;
            sums.correct += correct(&logits, &batch.labels)? as f64;
        }
        // The mean over the images of the update, whatever share of them this pass has.
        let share = count / config.batch as f64;
        let loss = if share == 1.0 { loss } else { (loss * share)? };
        let gradients = {
            let _span = tracing::info_span!("backward").entered();
            self.network.vars().backward(&loss)?
        };
        match total {
            None => *total = Some(gradients),
            Some(total) => {
                for (_, var) in self.network.vars().parameters() {
                    let Some(more) = gradients.get(var.as_tensor()) else {
                        continue;
                    };
                    let sum = match total.get(var.as_tensor()) {
                        Some(sum) => (sum + more)?,
                        None => more.clone(),
                    };
                    total.insert(var.as_tensor(), sum);
                }
            }
        }
        Ok(())
    }

    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor> {
        if !self.backbone_stays {
            return Ok(self.network.forward(images, mode)?);
        }
        // Nothing below the head learns, so nothing of it has to be kept.
        let features = self.network.features(images, mode)?.detach();
        Ok(self.network.head(&features, mode)?)
    }

    /// Adds the gradients of all ranks up, limits them and looks whether they are numbers.
    fn combine(
        &self,
        total: Option<GradStore>,
        images: f64,
        seen: Option<&Tensor>,
    ) -> Result<Outcome> {
        let config = self.job.config;
        let vars = self.network.vars();
        let collective = self.job.collective;
        let mut total = match total {
            Some(total) => total,
            // This rank had no image; others had.
            None => empty_gradients(vars.device())?,
        };
        if collective.size() > 1 {
            let _span = tracing::info_span!("all_reduce").entered();
            // Gradients of the last layers are there first. One bucket at a time is there twice.
            let named: Vec<_> = vars.parameters().collect();
            let store = RefCell::new(&mut total);
            let gradients = named.iter().rev().map(|(name, var)| {
                let gradient = match store.borrow_mut().remove(var.as_tensor()) {
                    Some(gradient) => gradient.contiguous()?,
                    None => collective::zeros_like(var.as_tensor(), vars.dtype())?,
                };
                Ok(((*name).to_owned(), gradient))
            });
            let mut places = named.iter().rev();
            collective::in_buckets(gradients, |bucket| {
                collective.all_reduce(bucket)?;
                for ((_, sum), (_, var)) in bucket.drain(..).zip(places.by_ref()) {
                    store.borrow_mut().insert(var.as_tensor(), sum);
                }
                Ok(())
            })?;
        }
        // Images that could not be read are missing from the mean.
        let missing = config.batch as f64 / images;
        if missing != 1.0 {
            for (_, var) in vars.parameters() {
                if let Some(gradient) = total.get(var.as_tensor()) {
                    let scaled = (gradient * missing)?;
                    total.insert(var.as_tensor(), scaled);
                }
            }
        }
        // Parameters that stay have no say in the norm.
        for parameter in &self.frozen {
            total.remove(parameter);
        }
        let limit = config.clip_norm.unwrap_or(f64::INFINITY);
        if let Some(ledger) = &self.ledger {
            ledger.clip_grad_norm(vars, &mut total, limit)?;
            return Ok(Outcome::Gradients(total, None));
        }
        match clip_grad_norm(vars, &mut total, limit) {
            Ok(norm) => Ok(Outcome::Gradients(total, Some(norm))),
            Err(isqrt_nn::Error::NonFinite { name, .. }) => {
                let found = seen
                    .map(|images| {
                        trouble::first_bad_gradient(&self.network, images, config.mode(), &total)
                    })
                    .transpose();
                Ok(Outcome::Bad(match found {
                    Ok(Some(trouble)) => trouble.to_string(),
                    _ => format!("the gradient of {name} is not finite"),
                }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Decides about an update that was not finite.
    fn bad(&mut self, problem: &str, at: usize, observer: &mut dyn Observer) -> Result<()> {
        let epoch = self.progress.epoch + 1;
        let NonFinite::Skip(most) = self.job.config.non_finite else {
            return Err(Error::NonFinite {
                epoch,
                step: at + 1,
                problem: problem.to_owned(),
            });
        };
        self.progress.skipped += 1;
        if self.progress.skipped > most {
            return Err(Error::NonFinite {
                epoch,
                step: at + 1,
                problem: format!("{problem} (and {most} updates before were left out already)"),
            });
        }
        let step = self.progress.step;
        let problem = problem.to_owned();
        self.line(
            &Line::Skipped {
                step,
                epoch,
                problem,
            },
            observer,
        )
    }

    fn line(&mut self, line: &Line, observer: &mut dyn Observer) -> Result<()> {
        self.progress.lines += 1;
        observer.line(line)
    }

    /// Lines of the log that are due.
    fn note(
        &mut self,
        info: &StepInfo,
        norm: Option<f64>,
        update: &Update,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        if let (Some(look), Some(images), Outcome::Gradients(gradients, _)) =
            (&self.job.diagnostics, &update.images, &update.outcome)
            && self.job.collective.rank() == 0
            && info.step.is_multiple_of(look.every_steps)
        {
            match self.look(look.images, images, gradients) {
                Ok(seen) => {
                    let seen = Diagnostics {
                        step: info.step,
                        epoch: info.epoch,
                        seconds: self.seconds(),
                        ..seen
                    };
                    self.line(&Line::Diagnostics(seen), observer)?;
                }
                // The next step meets the same weights, and says what to do about them.
                Err(error) if error.is_divergence() => {}
                Err(error) => return Err(error),
            }
        }
        if !info.step.is_multiple_of(self.job.log_every) {
            return Ok(());
        }
        let line = std::mem::take(&mut self.progress.line);
        if line.images == 0.0 {
            return Ok(());
        }
        let line = StepLine {
            step: info.step,
            epoch: info.epoch,
            loss: line.mean_loss(),
            learning_rate: info.learning_rate,
            gradient_norm: norm,
            images_per_second: line.images_per_second(),
            wait_share: line.wait_share(),
            seconds: self.seconds(),
        };
        self.line(&Line::Step(line), observer)
    }

    /// A look at the first images of a pass.
    fn look(&self, count: usize, images: &Tensor, gradients: &GradStore) -> Result<Diagnostics> {
        let _span = tracing::info_span!("diagnostics").entered();
        let count = count.min(images.dim(0)?);
        let features = self
            .network
            .features(&images.narrow(0, 0, count)?, Mode::Eval)?
            .detach();
        Ok(Diagnostics {
            spectrum: diagnostics::spectrum(&features)?,
            root_distance: diagnostics::root_distance(&self.network, &features)?,
            gradient_norms: diagnostics::stage_norms(self.network.vars(), gradients)?,
            ..Diagnostics::default()
        })
    }

    /// Evaluates, notes, keeps.
    fn finish_epoch(&mut self, observer: &mut dyn Observer) -> Result<EpochMetrics> {
        let began = Instant::now();
        let config = self.job.config;
        let epoch = self.progress.epoch + 1;
        let sums = std::mem::take(&mut self.progress.sums);
        let due = epoch == config.epochs || epoch.is_multiple_of(self.job.eval_every);
        let vars = self.network.vars();
        collective::share_statistics(vars, self.job.collective)?;
        if let Some(ema) = &mut self.ema {
            collective::share_averages(ema, self.job.collective)?;
            ema.swap(vars)?;
        }
        let mut evaluation = None;
        if due {
            // The last step of an epoch may have spoilt the weights; no loss has shown it yet.
            let counted = evaluate(
                &self.network,
                &self.eval_loader,
                self.job.collective,
                |_| (),
            );
            let tally = counted.map_err(|source| Error::Evaluation {
                epoch,
                source: Box::new(self.with_a_smaller_evaluation(source)),
            })?;
            evaluation = Some(tally.evaluation());
        }
        let of = |value: fn(&Evaluation) -> f64| evaluation.as_ref().map(value);
        let metrics = EpochMetrics {
            epoch,
            step: self.progress.step,
            train_loss: sums.mean_loss(),
            train_error: 100.0 * (sums.images - sums.correct) / sums.images.max(1.0),
            eval_loss: of(|e| e.loss),
            eval_error: of(Evaluation::error),
            eval_error5: of(Evaluation::error5),
            seconds: sums.seconds + began.elapsed().as_secs_f64(),
            run_seconds: self.seconds(),
            cpu_seconds: self.cpu_seconds(),
            images_per_second: sums.images_per_second(),
            wait_share: sums.wait_share(),
        };
        if let Some(error) = metrics.eval_error
            && self.progress.best.is_none_or(|(_, best)| error < best)
        {
            self.progress.best = Some((epoch, error));
            observer.best(&self.network, &metrics)?;
        }
        if let Some(ema) = &mut self.ema {
            ema.swap(self.network.vars())?;
        }
        self.evaluation = evaluation;
        self.progress.epoch = epoch;
        self.progress.batch = 0;
        self.progress.epochs.push(metrics);
        self.line(&Line::Epoch(metrics), observer)?;
        self.snapshot(observer, Moment::Epoch)?;
        Ok(metrics)
    }

    fn position(&self) -> Position {
        self.loader
            .position(self.progress.epoch, self.progress.batch)
    }

    fn snapshot(&mut self, observer: &mut dyn Observer, moment: Moment) -> Result<()> {
        self.progress.seconds = self.seconds();
        self.progress.cpu_seconds = self.cpu_seconds();
        let snapshot = Snapshot {
            network: &self.network,
            optimiser: self.optimiser.as_ref(),
            ema: self.ema.as_ref(),
            progress: &self.progress,
            position: self.position(),
        };
        observer.snapshot(&snapshot, moment)
    }
}

/// No gradient of anything: candle makes a store only by a backward pass.
fn empty_gradients(device: &Device) -> Result<GradStore> {
    Ok(Tensor::zeros((), DType::F32, device)?.backward()?)
}

/// Images whose largest logit is that of their label, the first of equals.
fn correct(logits: &Tensor, labels: &[u32]) -> Result<usize> {
    let rows = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let right =
        |(row, label): &(&Vec<f32>, &u32)| crate::metrics::first_largest(row) == **label as usize;
    Ok(rows.iter().zip(labels).filter(right).count())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_should_fit_grows_with_the_memory_and_is_less_than_what_did_not() {
        let config: TrainConfig = toml::from_str(
            "epochs = 1\nbatch = 8\nseed = 1\n[optimiser]\nkind = \"sgd\"\nlr = 0.1\n\
             [model]\nbackbone = \"e10net\"\nclasses = 2\nrepresentation = { name = \"gap\" }",
        )
        .unwrap();
        let classes = vec!["a".to_owned(), "b".to_owned()];
        let (pixels, labels) = (vec![0; 8 * 32 * 32 * 3], vec![0; 8]);
        let set = Arc::new(ImageSet::new(classes, 32, 32, pixels, labels).unwrap());
        let job = Job::in_memory(&config, &[], Arc::clone(&set), set).unwrap();
        let trainer = Trainer::new(job).unwrap();
        let fits = |memory| trainer.batch_that_fits(memory, 32).unwrap();
        assert_eq!(fits(0), 0);
        // Four maps of 16x16x32 in f32 are 131 kB an image.
        assert_eq!(fits(500_000), 2);
        assert_eq!(fits(1 << 30), 4);
    }
}
