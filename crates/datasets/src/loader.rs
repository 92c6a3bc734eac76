//! Batches of normalised pixels, epoch after epoch.
//!
//! The order of an epoch depends on (seed, epoch), the pixels of a sample on (seed, epoch, sample);
//! neither on threads. Images of a batch are prepared in parallel (rayon), and one thread prepares
//! the next batch while the caller works with the current one.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::augment::Augment;
use crate::random::{Purpose, Stream};
use crate::set::{ChannelStats, ImageSet};
use crate::{Error, Result};

/// What a [`Loader`] does with its set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch.
    pub batch: usize,
    /// A new order each epoch; otherwise the order of the set.
    pub shuffle: bool,
    /// Leave out the last batch where it is smaller than the others.
    pub drop_last: bool,
    /// Decides order and augmentation.
    pub seed: u64,
    /// Random changes; off by default.
    pub augment: Augment,
    /// Subtracted from each channel (pixels scaled to 0..1).
    pub mean: [f32; 3],
    /// Each channel is divided by this afterwards.
    pub std: [f32; 3],
}

impl LoaderConfig {
    /// For training: shuffled, the incomplete batch left out, no augmentation.
    #[must_use]
    pub fn train(batch: usize, seed: u64, stats: ChannelStats) -> Self {
        Self {
            batch,
            shuffle: true,
            drop_last: true,
            seed,
            augment: Augment::default(),
            mean: stats.mean,
            std: stats.std,
        }
    }

    /// For evaluation: every image once, in the order of the set.
    #[must_use]
    pub fn eval(batch: usize, stats: ChannelStats) -> Self {
        Self {
            shuffle: false,
            drop_last: false,
            ..Self::train(batch, 0, stats)
        }
    }
}

/// Some images with their labels, ready for a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `(batch, 3, height, width)`, normalised.
    pub images: Vec<f32>,
    /// One class index an image.
    pub labels: Vec<u32>,
    /// Number of images.
    pub batch: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Makes the batches of each epoch from a set.
#[derive(Debug, Clone)]
pub struct Loader {
    set: Arc<ImageSet>,
    config: LoaderConfig,
    /// Normalised value of each of the 256 levels, a table a channel.
    levels: Arc<[[f32; 256]; 3]>,
}

/// The normalised value of each value of each channel, `(v/255 - mean) / std`; a deviation of 0, which
/// constant images have, leaves the scale alone.
#[must_use]
pub fn levels(mean: [f32; 3], std: [f32; 3]) -> [[f32; 256]; 3] {
    let level = |c: usize, v: usize| {
        let std = std[c];
        (v as f32 / 255.0 - mean[c]) / if std == 0.0 { 1.0 } else { std }
    };
    std::array::from_fn(|c| std::array::from_fn(|v| level(c, v)))
}

impl Loader {
    /// A loader over `set`.
    ///
    /// # Errors
    /// [`Error::Config`]: a batch of 0, no batch in an epoch, padding as large as the image, a
    /// standard deviation that is negative or not finite.
    pub fn new(set: Arc<ImageSet>, config: LoaderConfig) -> Result<Self> {
        let (height, width) = set.image_size();
        if config.batch == 0 {
            return Err(Error::Config("a batch needs at least 1 image".to_owned()));
        }
        if config.drop_last && set.len() < config.batch {
            return Err(Error::Config(format!(
                "{} images make no batch of {}: use a smaller batch",
                set.len(),
                config.batch
            )));
        }
        if config.augment.pad_crop >= height.min(width) {
            return Err(Error::Config(format!(
                "padding by {} pixels needs images larger than that, and they are {width}x{height}",
                config.augment.pad_crop
            )));
        }
        for c in 0..3 {
            let (mean, std) = (config.mean[c], config.std[c]);
            if !mean.is_finite() || !std.is_finite() || std < 0.0 {
                return Err(Error::Config(format!(
                    "cannot normalise channel {c} with mean {mean} and standard deviation {std}"
                )));
            }
        }
        let levels = levels(config.mean, config.std);
        Ok(Self {
            set,
            config,
            levels: Arc::new(levels),
        })
    }

    /// Number of batches in an epoch.
    #[must_use]
    pub fn batches(&self) -> usize {
        match self.config.drop_last {
            true => self.set.len() / self.config.batch,
            false => self.set.len().div_ceil(self.config.batch),
        }
    }

    /// The set it reads from.
    #[must_use]
    pub fn set(&self) -> &Arc<ImageSet> {
        &self.set
    }

    /// Sample indices of an epoch in the order in which they come.
    #[must_use]
    pub fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.set.len()).collect();
        if self.config.shuffle {
            Stream::new(self.config.seed, Purpose::Order, epoch as u64, 0).shuffle(&mut order);
        }
        order.truncate(self.batches() * self.config.batch);
        order
    }

    /// The batches of one epoch.
    ///
    /// Inside a rayon pool batches are prepared when they are asked for; elsewhere a thread is one
    /// batch ahead. (A pool thread that waits for that thread, which waits for the pool, would
    /// wait for ever.)
    #[must_use]
    pub fn epoch(&self, epoch: usize) -> Epoch {
        let source = Source {
            loader: self.clone(),
            order: self.order(epoch),
            epoch,
            next: 0,
        };
        let left = self.batches();
        let inline = |source| Epoch {
            left,
            ahead: None,
            source: Some(source),
        };
        if rayon::current_thread_index().is_some() {
            return inline(source);
        }
        let (sender, receiver) = sync_channel(1);
        let spare = source.clone();
        let spawned = std::thread::Builder::new()
            .name("batches".to_owned())
            .spawn(move || source.send_all(&sender));
        match spawned {
            Ok(thread) => Epoch {
                left,
                ahead: Some(Ahead { receiver, thread }),
                source: None,
            },
            Err(error) => {
                tracing::warn!(%error, "no thread for the loader: batches are prepared in turn");
                inline(spare)
            }
        }
    }

    fn prepare(&self, indices: &[usize], epoch: usize) -> Batch {
        let (height, width) = self.set.image_size();
        let plane = height * width;
        let mut images = vec![0.0; indices.len() * 3 * plane];
        images
            .par_chunks_exact_mut(3 * plane)
            .zip(indices)
            .for_each(|(out, &index)| self.fill(out, index, epoch));
        Batch {
            images,
            labels: indices.iter().map(|&i| self.set.labels()[i]).collect(),
            batch: indices.len(),
            height,
            width,
        }
    }

    /// Augments, normalises and transposes (HWC to CHW) one image in one pass.
    fn fill(&self, out: &mut [f32], index: usize, epoch: usize) {
        let (height, width) = self.set.image_size();
        let choice = self.config.augment.choose(self.config.seed, epoch, index);
        let (rows, columns) = (choice.rows(height), choice.columns(width));
        let image = self.set.image(index);
        let (red, rest) = out.split_at_mut(height * width);
        let (green, blue) = rest.split_at_mut(height * width);
        let [reds, greens, blues] = &*self.levels;
        for (y, &from_row) in rows.iter().enumerate() {
            let row = &image[from_row * width * 3..(from_row + 1) * width * 3];
            for (x, &from) in columns.iter().enumerate() {
                let pixel = &row[from * 3..from * 3 + 3];
                let at = y * width + x;
                red[at] = reds[usize::from(pixel[0])];
                green[at] = greens[usize::from(pixel[1])];
                blue[at] = blues[usize::from(pixel[2])];
            }
        }
    }
}

/// Prepares the batches of an epoch one after the other.
#[derive(Debug, Clone)]
struct Source {
    loader: Loader,
    order: Vec<usize>,
    epoch: usize,
    next: usize,
}

impl Source {
    fn prepare_next(&mut self) -> Batch {
        let end = (self.next + self.loader.config.batch).min(self.order.len());
        let batch = self.loader.prepare(&self.order[self.next..end], self.epoch);
        self.next = end;
        batch
    }

    fn send_all(mut self, sender: &SyncSender<Batch>) {
        while self.next < self.order.len() {
            // The receiver is gone when the caller has dropped the epoch: nothing left to do.
            if sender.send(self.prepare_next()).is_err() {
                return;
            }
        }
    }
}

#[derive(Debug)]
struct Ahead {
    receiver: Receiver<Batch>,
    thread: JoinHandle<()>,
}

/// Iterator over the batches of one epoch. Dropping it early ends its thread.
#[derive(Debug)]
pub struct Epoch {
    left: usize,
    ahead: Option<Ahead>,
    source: Option<Source>,
}

impl Iterator for Epoch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        if let Some(source) = &mut self.source {
            return Some(Ok(source.prepare_next()));
        }
        let Ahead { receiver, thread } = self.ahead.take()?;
        match receiver.recv() {
            Ok(batch) => {
                self.ahead = Some(Ahead { receiver, thread });
                Some(Ok(batch))
            }
            Err(_) => {
                self.left = 0;
                Some(Err(Error::Worker(panic_text(thread.join()))))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Epoch {}

impl Drop for Epoch {
    fn drop(&mut self) {
        if let Some(Ahead { receiver, thread }) = self.ahead.take() {
            // First the receiver, so that the thread's next send fails and it returns.
            drop(receiver);
            let _ = thread.join();
        }
    }
}

fn panic_text(joined: std::thread::Result<()>) -> String {
    match joined {
        Ok(()) => "it ended early".to_owned(),
        Err(payload) => payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "it panicked".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_panic_in_the_thread_reaches_the_caller() {
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::spawn(move || {
            let batch = Batch {
                images: vec![],
                labels: vec![],
                batch: 0,
                height: 1,
                width: 1,
            };
            sender.send(batch).unwrap();
            panic!("on purpose");
        });
        let mut epoch = Epoch {
            left: 5,
            ahead: Some(Ahead { receiver, thread }),
            source: None,
        };
        assert!(epoch.next().unwrap().is_ok());
        let error = epoch.next().unwrap().unwrap_err();
        assert!(error.to_string().contains("on purpose"), "{error}");
        assert!(epoch.next().is_none());
    }
}
