//! Batches of images, epoch after epoch.
//!
//! The order of an epoch depends on (seed, epoch), the pixels of a sample on (seed, epoch, sample);
//! neither on the number of workers. Workers read, decode and transform ahead of the caller; what
//! they hand over are bytes, which [`Batch::normalised`] turns into numbers in one pass.
//!
//! Several ranks share an epoch exactly: see [`Remainder`]. A [`Position`] says where an epoch
//! stands, for a checkpoint.

mod batch;
mod pool;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

pub use batch::{Batch, levels};

use crate::broken::{Broken, Skipped};
use crate::random::{Purpose, Stream};
use crate::sample::Sample;
use crate::set::ImageSet;
use crate::transforms::{Key, Pipeline, Scratch};
use crate::{Error, Result};
use pool::{Pool, Prepare};

/// What a [`Loader`] reads from.
#[derive(Debug, Clone)]
pub enum Images {
    /// Decoded images in memory.
    Memory(Arc<ImageSet>),
    /// Files or pieces of archives, read and decoded when their turn comes.
    Stored(Arc<Vec<Sample>>),
}

impl From<Arc<ImageSet>> for Images {
    fn from(set: Arc<ImageSet>) -> Self {
        Self::Memory(set)
    }
}

impl From<Vec<Sample>> for Images {
    fn from(samples: Vec<Sample>) -> Self {
        Self::Stored(Arc::new(samples))
    }
}

impl Images {
    /// Number of images.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(set) => set.len(),
            Self::Stored(samples) => samples.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Class of an image. Panics where `index >= len()`, as a slice does.
    #[must_use]
    pub fn label(&self, index: usize) -> u32 {
        match self {
            Self::Memory(set) => set.labels()[index],
            Self::Stored(samples) => samples[index].label,
        }
    }

    /// Name of an image below the root of its set. Panics where `index >= len()`, as a slice does.
    #[must_use]
    pub fn name(&self, index: usize) -> &str {
        match self {
            Self::Memory(set) => &set.names()[index],
            Self::Stored(samples) => &samples[index].name,
        }
    }
}

/// What a [`Loader`] does with its images.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch of one rank.
    pub batch: usize,
    /// A new order each epoch; otherwise the order of the set.
    pub shuffle: bool,
    /// What becomes of images that do not fill a batch on every rank.
    pub remainder: Remainder,
    /// Decides order and random transforms.
    pub seed: u64,
    /// Threads that prepare images. 0: none, the caller prepares them itself. None: as many as rayon has,
    /// one for each core unless it was told otherwise (one in all for images in memory, which cost little).
    pub workers: Option<usize>,
    /// Batches that may be ready or in the making beside the one that the caller has, at least 1; more where
    /// batches are so small that two images a worker need more.
    pub prefetch: usize,
    /// Which of several processes this is.
    pub shard: Shard,
    /// What becomes of images that cannot be read.
    pub broken: Broken,
}

/// One of several processes that share each epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

/// What becomes of the images at the end of an epoch that are fewer than a batch on every rank.
///
/// Step `k` of an epoch takes the images from `k * batch * ranks` of its order, and every rank a
/// piece of them, one after the other; all ranks have the same number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remainder {
    /// Left out: every batch is full. With `shuffle` they are others each epoch.
    Drop,
    /// Shared out evenly in a last, smaller step: every image once. With fewer images than ranks some
    /// ranks get a batch without images.
    Keep,
}

impl LoaderConfig {
    /// For training: shuffled, incomplete batches left out.
    #[must_use]
    pub fn train(batch: usize, seed: u64) -> Self {
        Self {
            batch,
            shuffle: true,
            remainder: Remainder::Drop,
            seed,
            workers: None,
            prefetch: 2,
            shard: Shard { rank: 0, ranks: 1 },
            broken: Broken::Fail,
        }
    }

    /// For evaluation: every image once, in the order of the set.
    #[must_use]
    pub fn eval(batch: usize) -> Self {
        Self {
            shuffle: false,
            remainder: Remainder::Keep,
            ..Self::train(batch, 0)
        }
    }

    fn check(&self, images: usize) -> Result<()> {
        let Self { batch, shard, .. } = *self;
        let config = |text: String| Err(Error::Config(text));
        if images == 0 {
            return config("a set without images".to_owned());
        }
        if u32::try_from(images).is_err() {
            return config(format!("{images} images, and the limit is {}", u32::MAX));
        }
        for (what, value, most) in [
            ("batch", batch, 1 << 24),
            ("prefetch", self.prefetch, 1 << 12),
            ("workers", self.workers.unwrap_or(0), 1 << 12),
            ("ranks", shard.ranks, 1 << 20),
        ] {
            if value > most {
                return config(format!("{what} = {value}, and the limit is {most}"));
            }
        }
        if batch == 0 {
            return config("a batch needs at least 1 image".to_owned());
        }
        if shard.rank >= shard.ranks {
            return config(format!(
                "rank {} of {} ranks: ranks count from 0",
                shard.rank, shard.ranks
            ));
        }
        let step = batch.saturating_mul(shard.ranks);
        if self.remainder == Remainder::Drop && images < step {
            return config(match shard.ranks {
                1 => format!("{images} images make no batch of {batch}: use a smaller batch"),
                n => format!(
                    "{images} images make no batch of {batch} on each of {n} ranks: use a smaller batch"
                ),
            });
        }
        self.broken.check()
    }
}

/// Where an epoch stands: what a checkpoint needs so that it goes on from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: usize,
    /// Batches of it that are done.
    pub batch: usize,
    /// Images in the set.
    pub images: usize,
    /// Images in a batch of one rank.
    pub batch_size: usize,
    /// Number of ranks. Which rank it is does not matter: all stand at the same batch.
    pub ranks: usize,
    /// Whether epochs are shuffled.
    pub shuffle: bool,
    /// What becomes of the last images.
    pub remainder: Remainder,
    /// Of order and random transforms.
    pub seed: u64,
}

/// Makes the batches of each epoch.
#[derive(Debug, Clone)]
pub struct Loader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    images: Images,
    pipeline: Pipeline,
    config: LoaderConfig,
    levels: [[f32; 256]; 3],
    /// What was left out, by index: the same image is counted once.
    skipped: Mutex<BTreeMap<u32, String>>,
}

impl Loader {
    /// A loader of `images`, each through `pipeline`.
    ///
    /// # Errors
    /// [`Error::Config`]: a batch of 0, no batch in an epoch, no such rank, a pipeline that cannot be.
    pub fn new(
        images: impl Into<Images>,
        pipeline: Pipeline,
        config: LoaderConfig,
    ) -> Result<Self> {
        let images = images.into();
        config.check(images.len())?;
        pipeline.check()?;
        let levels = levels(pipeline.mean, pipeline.std);
        Ok(Self {
            inner: Arc::new(Inner {
                images,
                pipeline,
                config,
                levels,
                skipped: Mutex::default(),
            }),
        })
    }

    /// Number of batches in an epoch, the same on every rank.
    #[must_use]
    pub fn batches(&self) -> usize {
        let step = self.step();
        match self.inner.config.remainder {
            Remainder::Drop => self.inner.images.len() / step,
            Remainder::Keep => self.inner.images.len().div_ceil(step),
        }
    }

    /// Images that all ranks together take at once.
    fn step(&self) -> usize {
        self.inner
            .config
            .batch
            .saturating_mul(self.inner.config.shard.ranks)
    }

    /// What it reads from.
    #[must_use]
    pub fn images(&self) -> &Images {
        &self.inner.images
    }

    /// What it does with each image.
    #[must_use]
    pub fn pipeline(&self) -> &Pipeline {
        &self.inner.pipeline
    }

    /// Normalised value of each value of each channel, for [`Batch::normalised`].
    #[must_use]
    pub fn levels(&self) -> &[[f32; 256]; 3] {
        &self.inner.levels
    }

    /// What was left out so far, in the order of the set.
    #[must_use]
    pub fn skipped(&self) -> Vec<Skipped> {
        let skipped = self.inner.skipped();
        let one = |(&index, problem): (&u32, &String)| Skipped {
            name: self.inner.images.name(index as usize).to_owned(),
            problem: problem.clone(),
        };
        skipped.iter().map(one).collect()
    }

    /// Sample indices of an epoch on this rank in the order in which they come.
    #[must_use]
    pub fn order(&self, epoch: usize) -> Vec<u32> {
        let LoaderConfig {
            batch,
            shuffle,
            seed,
            shard: Shard { rank, ranks },
            ..
        } = self.inner.config;
        let mut order: Vec<u32> = (0..self.inner.images.len() as u32).collect();
        if shuffle {
            Stream::new(seed, Purpose::Order, epoch as u64, 0).shuffle(&mut order);
        }
        let step = self.step();
        order.truncate(self.batches().saturating_mul(step));
        if ranks == 1 {
            return order;
        }
        let mut mine = Vec::with_capacity(order.len() / ranks + batch);
        for step in order.chunks(step) {
            let cut = |rank: usize| step.len() * rank / ranks;
            mine.extend(&step[cut(rank)..cut(rank + 1)]);
        }
        mine
    }

    /// The batches of one epoch.
    ///
    /// # Errors
    /// [`Error::Config`] where the system gives no thread.
    pub fn epoch(&self, epoch: usize) -> Result<Epoch> {
        self.epoch_from(epoch, 0)
    }

    /// The position after `batch` batches of an epoch.
    #[must_use]
    pub fn position(&self, epoch: usize, batch: usize) -> Position {
        let config = &self.inner.config;
        Position {
            epoch,
            batch,
            images: self.inner.images.len(),
            batch_size: config.batch,
            ranks: config.shard.ranks,
            shuffle: config.shuffle,
            remainder: config.remainder,
            seed: config.seed,
        }
    }

    /// The rest of the epoch in which a run was stopped: exactly the batches that were left.
    ///
    /// # Errors
    /// [`Error::Config`] where the position is of another set, batch size, seed or number of ranks.
    pub fn resume(&self, position: &Position) -> Result<Epoch> {
        let here = self.position(position.epoch, position.batch);
        let (was, is) = (position, &here);
        let settings = [
            ("images", was.images, is.images),
            ("ranks (devices)", was.ranks, is.ranks),
            ("batch size", was.batch_size, is.batch_size),
        ];
        let settings = settings.map(|(what, was, is)| (what, was.to_string(), is.to_string()));
        let others = [
            ("seed", was.seed.to_string(), is.seed.to_string()),
            ("shuffle", was.shuffle.to_string(), is.shuffle.to_string()),
            (
                "remainder",
                format!("{:?}", was.remainder),
                format!("{:?}", is.remainder),
            ),
        ];
        let differs = settings
            .into_iter()
            .chain(others)
            .find(|(_, was, is)| was != is);
        if let Some((what, was, is)) = differs {
            return Err(Error::Config(format!(
                "the run cannot go on from this position of its data, where {what} was {was} and now is \
                 {is}: resume with the settings of the run, or start it anew"
            )));
        }
        if position.batch > self.batches() {
            return Err(Error::Config(format!(
                "the run cannot go on from batch {} of an epoch of {}",
                position.batch,
                self.batches()
            )));
        }
        self.epoch_from(position.epoch, position.batch)
    }

    fn epoch_from(&self, epoch: usize, first: usize) -> Result<Epoch> {
        let config = self.inner.config;
        let order: Arc<[u32]> = self.order(epoch).into();
        let start = first.saturating_mul(config.batch).min(order.len());
        let task = Task {
            inner: Arc::clone(&self.inner),
            order: Arc::clone(&order),
            epoch,
        };
        let workers = config.workers.unwrap_or_else(|| match self.inner.images {
            Images::Memory(_) => 1,
            Images::Stored(_) => rayon::current_num_threads(),
        });
        let images = if workers == 0 {
            Ahead::No(Box::new(task), Box::default())
        } else {
            // Small batches must not leave workers without work.
            let window = config
                .prefetch
                .max(1)
                .max((2 * workers).div_ceil(config.batch));
            let range = (start, order.len());
            Ahead::Yes(Pool::start(task, range, config.batch, workers, window)?)
        };
        Ok(Epoch {
            inner: Arc::clone(&self.inner),
            order,
            next: start,
            left: self.batches() - first.min(self.batches()),
            images,
        })
    }
}

impl Inner {
    fn skipped(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, String>> {
        self.skipped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides about an image that could not be prepared.
    fn judge(&self, index: u32, error: Error) -> Result<()> {
        let mut skipped = self.skipped();
        let new = !skipped.contains_key(&index);
        let count = skipped.len() + usize::from(new);
        let name = self.images.name(index as usize);
        // Each rank sees its own share only.
        let all = self.images.len().div_ceil(self.config.shard.ranks);
        let problem = self.config.broken.leave_out(name, error, count, all)?;
        skipped.entry(index).or_insert(problem);
        Ok(())
    }
}

/// Prepares the images of one epoch.
struct Task {
    inner: Arc<Inner>,
    order: Arc<[u32]>,
    epoch: usize,
}

/// What one worker keeps between images.
#[derive(Default)]
struct Desk {
    bytes: Vec<u8>,
    scratch: Scratch,
}

/// Buffers larger than this are given back after a giant image.
const MAX_KEPT_BYTES: usize = 16 << 20;

/// An image as a pipeline leaves it.
struct Ready {
    pixels: Vec<u8>,
    height: usize,
    width: usize,
}

impl Prepare for Task {
    type Scratch = Desk;
    type Image = Ready;

    fn prepare(&self, position: usize, desk: &mut Desk) -> Result<Ready> {
        let index = self.order[position];
        let key = Key {
            seed: self.inner.config.seed,
            epoch: self.epoch as u64,
            sample: u64::from(index),
        };
        let mut pixels = Vec::new();
        let pipeline = &self.inner.pipeline;
        let (height, width) = match &self.inner.images {
            Images::Memory(set) => {
                let (height, width) = set.image_size();
                let image = (set.image(index as usize), width, height);
                let name = Path::new(&set.names()[index as usize]);
                pipeline.run_decoded(image, name, None, key, &mut desk.scratch, &mut pixels)?
            }
            Images::Stored(samples) => {
                let sample = &samples[index as usize];
                sample.read(&mut desk.bytes)?;
                let made = pipeline.run_encoded(
                    &desk.bytes,
                    &sample.path(),
                    sample.annotation.as_deref(),
                    key,
                    &mut desk.scratch,
                    &mut pixels,
                );
                if desk.bytes.capacity() > MAX_KEPT_BYTES {
                    desk.bytes = Vec::new();
                }
                made?
            }
        };
        Ok(Ready {
            pixels,
            height,
            width,
        })
    }

    fn name(&self, position: usize) -> String {
        let index = self.order.get(position).map_or(0, |&index| index as usize);
        match &self.inner.images {
            Images::Memory(set) => set.names()[index].clone(),
            Images::Stored(samples) => samples[index].path().display().to_string(),
        }
    }
}

/// Whether images are prepared ahead of the caller.
enum Ahead {
    Yes(Pool<Task>),
    No(Box<Task>, Box<Desk>),
}

/// Iterator over the batches of one epoch. After an error there is nothing more; dropping it early
/// ends its threads.
pub struct Epoch {
    inner: Arc<Inner>,
    order: Arc<[u32]>,
    /// Position of the next image.
    next: usize,
    left: usize,
    images: Ahead,
}

impl std::fmt::Debug for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epoch").field("left", &self.left).finish()
    }
}

impl Epoch {
    fn next_batch(&mut self) -> Result<Batch> {
        let end = (self.next + self.inner.config.batch).min(self.order.len());
        let indices = &self.order[self.next..end];
        let images = match &mut self.images {
            Ahead::No(task, desk) => (self.next..end)
                .map(|position| pool::prepare(&**task, position, desk))
                .collect(),
            // Only a rank without images in the last step has none.
            Ahead::Yes(_) if indices.is_empty() => Vec::new(),
            Ahead::Yes(pool) => pool.next().unwrap_or_default(),
        };
        if images.is_empty() && !indices.is_empty() {
            let name = self.inner.images.name(indices[0] as usize);
            return Err(Error::Lost(name.to_owned()));
        }
        self.next = end;
        let mut batch = Batch::new(self.inner.pipeline.views());
        for (&index, image) in indices.iter().zip(images) {
            match image {
                Ok(image) => {
                    let size = (image.height, image.width);
                    let label = self.inner.images.label(index as usize);
                    batch
                        .push(image.pixels, size, label, index)
                        .map_err(|expected| Error::Size {
                            path: self.inner.images.name(index as usize).into(),
                            found: (size.1, size.0),
                            expected: (expected.1, expected.0),
                        })?;
                }
                Err(error) => self.inner.judge(index, error)?,
            }
        }
        Ok(batch)
    }
}

impl Iterator for Epoch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let batch = self.next_batch();
        if batch.is_err() {
            self.left = 0;
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Epoch {}
