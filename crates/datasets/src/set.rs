//! A part of a data set in memory: decoded, 8 bits, all images of one size.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::broken::{Broken, Skipped};
use crate::sample::Sample;
use crate::split::Split;
use crate::transforms::{Key, Pipeline, Scratch};
use crate::{Error, Result};

/// Largest set that is held in memory.
pub const MAX_SET_BYTES: usize = 16 << 30;

/// Decoded images of one size with their labels.
#[derive(Debug)]
pub struct ImageSet {
    classes: Vec<String>,
    names: Vec<String>,
    labels: Vec<u32>,
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    fingerprint: OnceLock<String>,
}

/// Mean and standard deviation of each channel, pixels scaled to 0..1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChannelStats {
    /// Red, green, blue.
    pub mean: [f32; 3],
    /// Red, green, blue; population form (divisor n).
    pub std: [f32; 3],
}

/// Sums of the values and of their squares of each channel: exact, so the order does not matter.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ChannelSums {
    pixels: u64,
    sums: [(u64, u64); 3],
}

impl ChannelSums {
    /// Of RGB pixels.
    pub(crate) fn of(pixels: &[u8]) -> Self {
        let mut all = Self::default();
        // Sums of a piece fit into 32 bits, which is faster.
        for piece in pixels.chunks(3 << 15) {
            let mut sums = [(0u32, 0u32); 3];
            for pixel in piece.chunks_exact(3) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    let value = u32::from(value);
                    *sum = (sum.0 + value, sum.1 + value * value);
                }
            }
            let sums = sums.map(|(sum, squares)| (u64::from(sum), u64::from(squares)));
            let pixels = (piece.len() / 3) as u64;
            all = all.plus(Self { pixels, sums });
        }
        all
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        let (a, b) = (self.sums, other.sums);
        Self {
            pixels: self.pixels + other.pixels,
            sums: std::array::from_fn(|c| (a[c].0 + b[c].0, a[c].1 + b[c].1)),
        }
    }

    pub(crate) fn stats(self) -> ChannelStats {
        let n = self.pixels.max(1) as f64;
        let mean = self.sums.map(|(sum, _)| sum as f64 / n);
        let variance: [f64; 3] =
            std::array::from_fn(|c| (self.sums[c].1 as f64 / n - mean[c] * mean[c]).max(0.0));
        ChannelStats {
            mean: mean.map(|m| (m / 255.0) as f32),
            std: variance.map(|v| (v.sqrt() / 255.0) as f32),
        }
    }
}

/// Of pipelines that draw nothing.
const NO_KEY: Key = Key {
    seed: 0,
    epoch: 0,
    sample: 0,
};

/// Reads and decodes all `samples`, in parallel, to one size. Beside the set: what was left out of it.
///
/// # Errors
/// The first sample in order that fails, unless `broken` allows it: [`Error::Io`], [`Error::Decode`] or
/// [`Error::Size`]; [`Error::Config`] where there are no samples or too many pixels, or where the
/// pipeline is random or makes several views.
pub fn decode_all(
    samples: &[Sample],
    classes: &[String],
    pipeline: &Pipeline,
    broken: Broken,
) -> Result<(ImageSet, Vec<Skipped>)> {
    broken.check()?;
    pipeline.check()?;
    if pipeline.is_random() || pipeline.views() != 1 {
        return Err(Error::Config(
            "images in memory are made once and the same for all epochs: leave random steps and \
             several views to the loader"
                .to_owned(),
        ));
    }
    let load = |(bytes, scratch): &mut (Vec<u8>, Scratch), sample: &Sample| {
        let mut pixels = Vec::new();
        sample.read(bytes)?;
        let note = sample.annotation.as_deref();
        let size =
            pipeline.run_encoded(bytes, &sample.path(), note, NO_KEY, scratch, &mut pixels)?;
        Ok((pixels, size))
    };
    let mut skipped = Vec::new();
    let mut leave_out = |sample: &Sample, error| -> Result<()> {
        let problem = broken.leave_out(&sample.name, error, skipped.len() + 1, samples.len())?;
        let name = sample.name.to_string();
        skipped.push(Skipped { name, problem });
        Ok(())
    };
    // The first whole image says how large all are.
    let mut rest = samples;
    let (height, width) = loop {
        let Some((first, others)) = rest.split_first() else {
            return Err(Error::Config("a set without images".to_owned()));
        };
        match load(&mut Default::default(), first) {
            Ok((_, size)) => break size,
            Err(error) => leave_out(first, error)?,
        }
        rest = others;
    };
    let size = width * height * 3;
    let total = size
        .checked_mul(rest.len())
        .filter(|&n| n <= MAX_SET_BYTES)
        .ok_or_else(|| {
            Error::Config(format!(
                "{} images of {width}x{height} do not fit into {} GiB: choose a smaller resize",
                rest.len(),
                MAX_SET_BYTES >> 30
            ))
        })?;
    let mut pixels = vec![0; total];
    let work = rest.par_iter().zip(pixels.par_chunks_exact_mut(size));
    let work = work.map_init(Default::default, |desk, (sample, target)| {
        let (image, found) = load(desk, sample)?;
        if found != (height, width) {
            return Err(Error::Size {
                path: sample.path(),
                found: (found.1, found.0),
                expected: (width, height),
            });
        }
        target.copy_from_slice(&image);
        Ok(())
    });
    if broken == Broken::Fail {
        // Stops at the first error, and leaves nothing to move.
        if let Some(error) = work.find_map_first(Result::err) {
            return Err(error);
        }
        let set = ImageSet::of(rest.iter(), classes, (width, height), pixels)?;
        return Ok((set, skipped));
    }
    let outcomes: Vec<Result<()>> = work.collect();
    let mut kept: Vec<&Sample> = Vec::with_capacity(rest.len());
    for (at, (sample, outcome)) in rest.iter().zip(outcomes).enumerate() {
        match outcome {
            Ok(()) => {
                pixels.copy_within(at * size..(at + 1) * size, kept.len() * size);
                kept.push(sample);
            }
            Err(error) => leave_out(sample, error)?,
        }
    }
    pixels.truncate(kept.len() * size);
    let set = ImageSet::of(kept.into_iter(), classes, (width, height), pixels)?;
    Ok((set, skipped))
}

impl ImageSet {
    /// Pixels of these samples, in their order.
    fn of<'a>(
        samples: impl Iterator<Item = &'a Sample> + Clone,
        classes: &[String],
        (width, height): (usize, usize),
        pixels: Vec<u8>,
    ) -> Result<Self> {
        let labels = samples.clone().map(|s| s.label).collect();
        let mut set = Self::new(classes.to_vec(), width, height, pixels, labels)?;
        set.names = samples.map(|s| s.name.to_string()).collect();
        Ok(set)
    }

    /// A set from pixels in memory: image after image, HWC, RGB.
    ///
    /// # Errors
    /// [`Error::Config`] where the lengths do not fit together or a label has no class.
    pub fn new(
        classes: Vec<String>,
        width: usize,
        height: usize,
        pixels: Vec<u8>,
        labels: Vec<u32>,
    ) -> Result<Self> {
        if labels.is_empty() || width == 0 || height == 0 {
            return Err(Error::Config("a set without images".to_owned()));
        }
        if pixels.len() != labels.len() * width * height * 3 {
            return Err(Error::Config(format!(
                "{} bytes of pixels for {} images of {width}x{height}x3",
                pixels.len(),
                labels.len()
            )));
        }
        if let Some(label) = labels.iter().find(|&&l| l as usize >= classes.len()) {
            return Err(Error::Config(format!(
                "label {label} in a set of {} classes",
                classes.len()
            )));
        }
        Ok(Self {
            names: (0..labels.len()).map(|i| i.to_string()).collect(),
            classes,
            labels,
            width,
            height,
            pixels,
            fingerprint: OnceLock::new(),
        })
    }

    /// Number of images (never 0).
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Always false: a set has at least one image.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Class names in label order.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Number of classes, those without an image in this part included.
    #[must_use]
    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// Label of each image.
    #[must_use]
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Name of each image below the root of its set.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Height and width in pixels.
    #[must_use]
    pub fn image_size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// Pixels of one image, HWC, RGB. Panics where `index >= len()`, as a slice does.
    #[must_use]
    pub fn image(&self, index: usize) -> &[u8] {
        let size = self.width * self.height * 3;
        &self.pixels[index * size..(index + 1) * size]
    }

    /// Mean and standard deviation of each channel over all pixels of the set. Exact integer sums,
    /// so the same on every machine and for any number of threads. Take them from train only.
    #[must_use]
    pub fn channel_stats(&self) -> ChannelStats {
        let parts = self.pixels.par_chunks(3 << 16).map(ChannelSums::of);
        parts
            .reduce(ChannelSums::default, ChannelSums::plus)
            .stats()
    }

    /// SHA-256 in hexadecimal over class names, image names, labels, size and decoded pixels: two
    /// sets with the same fingerprint train alike, wherever they lie on disk.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.fingerprint
            .get_or_init(|| self.compute_fingerprint())
            .clone()
    }

    fn compute_fingerprint(&self) -> String {
        let images: Vec<[u8; 32]> = (0..self.len())
            .into_par_iter()
            .map(|i| {
                let mut hash = Sha256::new();
                text(&mut hash, &self.names[i]);
                hash.update(self.labels[i].to_le_bytes());
                hash.update(self.image(i));
                hash.finalize().into()
            })
            .collect();
        let mut hash = Sha256::new();
        hash.update(b"isqrt-datasets image set 1\n");
        for number in [self.classes.len(), self.len(), self.height, self.width] {
            hash.update((number as u64).to_le_bytes());
        }
        for class in &self.classes {
            text(&mut hash, class);
        }
        for image in &images {
            hash.update(image);
        }
        hex(&hash.finalize())
    }
}

/// Hexadecimal digits of a hash.
pub(crate) fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Length first, so that two different lists of texts never hash alike.
fn text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text.as_bytes());
}

/// All parts of a set, decoded.
#[derive(Debug)]
pub struct DataSet {
    /// To fit weights on.
    pub train: Arc<ImageSet>,
    /// To choose rates and heads on.
    pub val: Arc<ImageSet>,
    /// To report on.
    pub test: Arc<ImageSet>,
    /// Channel statistics of `train`, for normalisation of all parts.
    pub stats: ChannelStats,
    /// How the parts came about, a sentence for the record and the report.
    pub note: String,
    /// Broken images of all parts that were left out.
    pub skipped: Vec<Skipped>,
}

impl DataSet {
    /// Lists, splits and decodes a folder: [`crate::list`], [`crate::split`](fn@crate::split) and
    /// [`DataSet::decode`] in one call.
    ///
    /// # Errors
    /// Those of the three.
    pub fn open(root: &Path, pipeline: &Pipeline, seed: u64) -> Result<Self> {
        let parts = crate::split(crate::list(root)?, seed)?;
        Self::decode(&parts, pipeline, pipeline, Broken::Fail)
    }

    /// Decodes all parts to one size, training images by their own pipeline, and takes the statistics of train.
    ///
    /// # Errors
    /// Those of [`decode_all`]; also [`Error::Size`] where the parts differ in size.
    pub fn decode(
        parts: &Split,
        train: &Pipeline,
        eval: &Pipeline,
        broken: Broken,
    ) -> Result<Self> {
        let decode = |samples: &[Sample], pipeline: &Pipeline| {
            decode_all(samples, &parts.classes, pipeline, broken)
        };
        let (train, mut skipped) = decode(&parts.train, train)?;
        let mut held_out = |samples: &[Sample]| -> Result<ImageSet> {
            let (set, left_out) = decode(samples, eval)?;
            skipped.extend(left_out);
            if (set.width, set.height) != (train.width, train.height) {
                return Err(Error::Size {
                    path: samples[0].path(),
                    found: (set.width, set.height),
                    expected: (train.width, train.height),
                });
            }
            Ok(set)
        };
        let (val, test) = (held_out(&parts.val)?, held_out(&parts.test)?);
        let mut note = parts.note.clone();
        if !skipped.is_empty() {
            note.push_str(&format!("; {} broken images left out", skipped.len()));
        }
        let stats = train.channel_stats();
        Ok(Self {
            train: train.into(),
            val: val.into(),
            test: test.into(),
            stats,
            note,
            skipped,
        })
    }

    /// SHA-256 over the fingerprints of the three parts.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for part in [&self.train, &self.val, &self.test] {
            text(&mut hash, &part.fingerprint());
        }
        hex(&hash.finalize())
    }
}
