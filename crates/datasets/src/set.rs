//! A part of a data set in memory: decoded, 8 bits, all images of one size.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::decode::{Image, decode_file};
use crate::folder::Sample;
use crate::resize::Resize;
use crate::split::Split;
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

/// Reads and decodes an image and brings it to its size.
///
/// # Errors
/// [`Error::Io`] or [`Error::Decode`] with the path; [`Error::Config`] for a size that cannot be.
pub fn open_image(path: &Path, resize: Resize) -> Result<Image> {
    resize.apply(decode_file(path)?).map_err(Error::Config)
}

/// Reads and decodes all `samples`, in parallel, to one size.
///
/// # Errors
/// The first sample in order that fails: [`Error::Io`], [`Error::Decode`] or [`Error::Size`];
/// [`Error::Config`] where there are no samples or too many pixels.
pub fn decode_all(samples: &[Sample], classes: &[String], resize: Resize) -> Result<ImageSet> {
    let load = |sample: &Sample| open_image(&sample.path, resize);
    let Some(first) = samples.first() else {
        return Err(Error::Config("a set without images".to_owned()));
    };
    let Image { width, height, .. } = load(first)?;
    let size = width * height * 3;
    let total = size
        .checked_mul(samples.len())
        .filter(|&n| n <= MAX_SET_BYTES)
        .ok_or_else(|| {
            Error::Config(format!(
                "{} images of {width}x{height} do not fit into {} GiB: choose a smaller resize",
                samples.len(),
                MAX_SET_BYTES >> 30
            ))
        })?;
    let mut pixels = vec![0; total];
    let work = samples.par_iter().zip(pixels.par_chunks_exact_mut(size));
    let failed = work.find_map_first(|(sample, target)| match load(sample) {
        Ok(image) if (image.width, image.height) == (width, height) => {
            target.copy_from_slice(&image.pixels);
            None
        }
        Ok(image) => Some(Error::Size {
            path: sample.path.clone(),
            found: (image.width, image.height),
            expected: (width, height),
        }),
        Err(error) => Some(error),
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let labels = samples.iter().map(|s| s.label).collect();
    let mut set = ImageSet::new(classes.to_vec(), width, height, pixels, labels)?;
    set.names = samples.iter().map(|s| s.name.clone()).collect();
    Ok(set)
}

impl ImageSet {
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
        let sums = self
            .pixels
            .par_chunks(3 << 16)
            .map(|part| {
                let mut sums = [(0u64, 0u64); 3];
                for pixel in part.chunks_exact(3) {
                    for (sum, &value) in sums.iter_mut().zip(pixel) {
                        let value = u64::from(value);
                        *sum = (sum.0 + value, sum.1 + value * value);
                    }
                }
                sums
            })
            .reduce(
                || [(0, 0); 3],
                |a, b| std::array::from_fn(|c| (a[c].0 + b[c].0, a[c].1 + b[c].1)),
            );
        let n = (self.pixels.len() / 3) as f64;
        let mean = sums.map(|(sum, _)| sum as f64 / n);
        let variance: [f64; 3] =
            std::array::from_fn(|c| (sums[c].1 as f64 / n - mean[c] * mean[c]).max(0.0));
        ChannelStats {
            mean: mean.map(|m| (m / 255.0) as f32),
            std: variance.map(|v| (v.sqrt() / 255.0) as f32),
        }
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
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
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
}

impl DataSet {
    /// Lists, splits and decodes a folder: [`crate::list`], [`crate::split`](fn@crate::split) and
    /// [`DataSet::decode`] in one call.
    ///
    /// # Errors
    /// Those of the three.
    pub fn open(root: &Path, resize: Resize, seed: u64) -> Result<Self> {
        Self::decode(&crate::split(crate::list(root)?, seed)?, resize)
    }

    /// Decodes all parts to one size and takes the statistics of train.
    ///
    /// # Errors
    /// Those of [`decode_all`]; also [`Error::Size`] where the parts differ in size.
    pub fn decode(parts: &Split, resize: Resize) -> Result<Self> {
        let train = decode_all(&parts.train, &parts.classes, resize)?;
        let held_out = |samples: &[Sample]| -> Result<ImageSet> {
            let set = decode_all(samples, &parts.classes, resize)?;
            if (set.width, set.height) != (train.width, train.height) {
                return Err(Error::Size {
                    path: samples[0].path.clone(),
                    found: (set.width, set.height),
                    expected: (train.width, train.height),
                });
            }
            Ok(set)
        };
        let (val, test) = (held_out(&parts.val)?, held_out(&parts.test)?);
        let stats = train.channel_stats();
        Ok(Self {
            train: train.into(),
            val: val.into(),
            test: test.into(),
            stats,
            note: parts.note.clone(),
        })
    }

    /// SHA-256 over the fingerprints of the three parts.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for part in [&self.train, &self.val, &self.test] {
            text(&mut hash, &part.fingerprint());
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}
