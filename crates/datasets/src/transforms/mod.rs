//! From the bytes of a file to the pixels that a network sees.
//!
//! A [`Pipeline`] is data: a list of [`Step`]s, which experiment files can spell out, and the numbers
//! for normalisation, which the loader applies. What happens to an image depends on its [`Key`] and on
//! nothing else, on every machine. Steps follow torchvision on Pillow images, whose pixels they match
//! within 1 of 255 where they resize, and exactly where not; the random numbers are our own.
//!
//! Crops before the first resizing decide which part of a file is decoded at all; flips cost nothing,
//! since they are made while pixels are written.

mod canvas;
mod check;
mod colour;
mod crops;
mod presets;
mod run;
mod scratch;

use serde::{Deserialize, Serialize};

pub use check::MAX_SIDE;
pub use presets::{PRESETS, Preset};
pub use scratch::Scratch;

/// How images become inputs of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// What is done, in this order.
    pub steps: Vec<Step>,
    /// Subtracted from each channel (red, green, blue; pixels scaled to 0..1). ImageNet's by default.
    #[serde(default = "imagenet_mean")]
    pub mean: [f32; 3],
    /// Each channel is divided by this afterwards. ImageNet's by default.
    #[serde(default = "imagenet_std")]
    pub std: [f32; 3],
    /// Turns images upright as their EXIF block says, before the first step. Off by default.
    #[serde(default)]
    pub exif_orientation: bool,
}

/// Means of ImageNet's channels, as torchvision's recipes have them.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviations of ImageNet's channels, from the same place.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

fn imagenet_mean() -> [f32; 3] {
    IMAGENET_MEAN
}

fn imagenet_std() -> [f32; 3] {
    IMAGENET_STD
}

/// One thing that is done to an image. Sizes are in pixels. Written in experiment files as
/// `{ step = "center_crop", size = 224 }`. Steps without numbers have braces all the same: only so does
/// serde refuse a number that they do not have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A random part of the image, brought to a square: torchvision's `RandomResizedCrop`.
    RandomResizedCrop {
        /// Side of the square.
        size: usize,
        /// Range of the part's share of the area.
        #[serde(default = "crops::default_scale")]
        scale: (f64, f64),
        /// Range of its width over its height, uniform in the logarithm.
        #[serde(default = "crops::default_ratio")]
        ratio: (f64, f64),
        /// How it is resized.
        #[serde(default)]
        filter: Filter,
    },
    /// MatConvNet's crop: a part of the image as large as fits, times `fraction` and a random scale,
    /// brought to a square. In `vl_imreadjpeg` these are `CropSize`, `CropAnisotropy`, `CropLocation`.
    JitterCrop {
        /// Side of the square.
        size: usize,
        /// Part of the short side without jitter, such as 224/256.
        fraction: f64,
        /// Range of what the fraction is multiplied with; its square is uniform.
        #[serde(default = "crops::no_jitter")]
        scale: (f64, f64),
        /// Range of the part's width over its height, uniform in the logarithm.
        #[serde(default = "crops::no_jitter")]
        ratio: (f64, f64),
        /// In the middle of the image instead of anywhere.
        #[serde(default)]
        centred: bool,
        /// How it is resized; bicubic in MatConvNet's ImageNet example.
        #[serde(default)]
        filter: Filter,
    },
    /// The short side brought to `short` pixels, the long one in proportion and rounded down:
    /// torchvision's `Resize` with one number.
    Resize {
        /// Pixels of the short side.
        short: usize,
        /// How it is resized.
        #[serde(default)]
        filter: Filter,
    },
    /// Both sides brought to given lengths; proportions are lost.
    ResizeTo {
        /// Columns afterwards.
        width: usize,
        /// Rows afterwards.
        height: usize,
        /// How it is resized.
        #[serde(default)]
        filter: Filter,
    },
    /// The square in the middle, as large as the short side.
    CenterSquare {},
    /// A square in the middle, black where it leaves the image: torchvision's `CenterCrop`.
    CenterCrop {
        /// Side of the square.
        size: usize,
    },
    /// A square at a random place of the image with a border around it: torchvision's `RandomCrop`
    /// with `pad_if_needed`.
    RandomCrop {
        /// Side of the square.
        size: usize,
        /// Width of the border on each side.
        #[serde(default)]
        padding: usize,
        /// A border that mirrors the image without repeating its edge, instead of a black one.
        #[serde(default)]
        reflect: bool,
    },
    /// Mirrors left to right.
    HorizontalFlip {
        /// How often, 0 to 1.
        #[serde(default = "crops::half")]
        p: f64,
    },
    /// Brightness, contrast, saturation and hue in random order, as torchvision's `ColorJitter` changes
    /// Pillow images. The first three are multiplied by a factor from 1 - x (at least 0) to 1 + x, the
    /// hue is turned by -x to x of a full circle.
    ColorJitter {
        /// Largest change of brightness.
        #[serde(default)]
        brightness: f64,
        /// Largest change of contrast.
        #[serde(default)]
        contrast: f64,
        /// Largest change of saturation.
        #[serde(default)]
        saturation: f64,
        /// Largest turn of the hue, at most 0.5.
        #[serde(default)]
        hue: f64,
    },
    /// AlexNet's colour noise: a normal number for each principal component of ImageNet's colours
    /// (Krizhevsky et al. 2012, section 4.1; values of facebook/fb.resnet.torch), rounded to 8 bits.
    Lighting {
        /// Standard deviation of the numbers; 0.1 is usual.
        std: f64,
    },
    /// MatConvNet's brightness noise: a normal number is added to each channel, rounded to 8 bits.
    Brightness {
        /// Standard deviation for red, green, blue; pixels scaled to 0..1.
        deviation: [f64; 3],
    },
    /// Cuts rows off at the bottom (images of FGVC-Aircraft have a banner of 20 there).
    TrimBottom {
        /// How many.
        rows: usize,
    },
    /// The bounding box of the object. The first step, since boxes are in pixels of the file.
    BoxCrop {
        /// Widens it on each side by this part of its own width and height.
        #[serde(default)]
        margin: f64,
    },
    /// The four corners and the middle, each an input of its own: torchvision's `FiveCrop`. Last step.
    FiveCrop {
        /// Side of the squares.
        size: usize,
    },
    /// Those five of the image, then those of its mirror image: torchvision's `TenCrop`. Last step.
    TenCrop {
        /// Side of the squares.
        size: usize,
    },
    /// The image, then its mirror image. Last step.
    Mirror {},
}

/// How pixels between pixels are made. Both widen with the scale (antialiasing), as in Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Triangle filter.
    #[default]
    Bilinear,
    /// Cubic with a = -0.5.
    Bicubic,
}

/// What the random numbers of an image depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Of the run.
    pub seed: u64,
    /// Pass over the set.
    pub epoch: u64,
    /// Index in the set.
    pub sample: u64,
}
