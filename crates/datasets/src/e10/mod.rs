//! The embedded set "E10": textures whose classes differ in what varies together, and in nothing else.
//!
//! An image is a sum of six oriented, coloured noise components under three smooth envelopes; both
//! components of a pair share an envelope. Class `k` is the `k`-th perfect matching of the six
//! components in lexicographic order. Every single component has the same law in every class, so
//! mean colours and mean filter energies say nothing about the class; the covariance of energies
//! does. Ten classes, 32x32 RGB, noise and random amplitudes on top. [`texture`](self) holds the
//! formulas.
//!
//! The same bytes on every machine for one seed: ChaCha streams, `libm` instead of the platform's
//! mathematics, sums in a fixed order, PNG without compression (noise does not compress). Written
//! as an ImageFolder tree so that it takes the way of every other set.

mod files;
pub(crate) mod material;
mod texture;

pub use files::{Outcome, generate, is_written};
pub(crate) use files::{beside, parent_of, remove_abandoned, rename};
pub use texture::{MATCHINGS, image};

use crate::{ImageSet, Result};

/// Height and width of an image.
pub const IMAGE_SIDE: usize = 32;
/// Number of classes.
pub const CLASSES: usize = 10;
/// Counts up when the images of a seed change.
pub const VERSION: u32 = 1;

/// Images a class in each part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// In `train`.
    pub train: usize,
    /// In `val`.
    pub val: usize,
    /// In `test`.
    pub test: usize,
}

impl Default for Sizes {
    /// 200 train, 50 validation, 200 test images a class: 4500 files, about 15 MB.
    fn default() -> Self {
        Self {
            train: 200,
            val: 50,
            test: 200,
        }
    }
}

/// A part of the set; part of the key of each image's random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Images to fit weights on.
    Train = 0,
    /// Images to choose on.
    Val = 1,
    /// Images to report on.
    Test = 2,
}

impl Part {
    const ALL: [Self; 3] = [Self::Train, Self::Val, Self::Test];

    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }

    fn count(self, sizes: Sizes) -> usize {
        match self {
            Self::Train => sizes.train,
            Self::Val => sizes.val,
            Self::Test => sizes.test,
        }
    }
}

/// Folder names of the classes: the matching that each stands for, such as `02-13-45`. They sort
/// in class order.
#[must_use]
pub fn class_names() -> Vec<String> {
    (0..CLASSES).map(matching_name).collect()
}

/// Name of the `place`-th of the fifteen matchings.
pub(crate) fn matching_name(place: usize) -> String {
    let pairs = material::perfect_matching(place);
    pairs.map(|[a, b]| format!("{a}{b}")).join("-")
}

/// One part in memory, without files (for tests and benchmarks), class after class.
///
/// # Errors
/// [`crate::Error::Config`] where `per_class` is 0.
pub fn image_set(seed: u64, part: Part, per_class: usize) -> Result<ImageSet> {
    use rayon::prelude::*;
    let pixels = (0..CLASSES * per_class)
        .into_par_iter()
        .flat_map_iter(|i| image(seed, part, i / per_class, i % per_class))
        .collect();
    let labels = (0..CLASSES * per_class)
        .map(|i| (i / per_class) as u32)
        .collect();
    ImageSet::new(class_names(), IMAGE_SIDE, IMAGE_SIDE, pixels, labels)
}
