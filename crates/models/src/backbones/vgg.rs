//! The convolutions of VGG-11, 13, 16 and 19, configurations A, B, D and E (Simonyan and Zisserman
//! 2015, table 1), with torchvision's structure and parameter names (`features.0` and so on), without
//! and with batch norm.
//!
//! Options: `last_pool` (true; false keeps the resolution of the last stage) and `reduction` (a
//! 1x1 convolution to so many channels with batch norm and ReLU; none by default; names
//! `layer_reduce`, `layer_reduce_bn`). Covariance heads take `last_pool = false, reduction = 256`,
//! which gives 14x14x256 of a 224x224 image.

use isqrt_nn::ops::{Conv, Window};
use isqrt_nn::{Init, Scope};

use super::chain::{self, Chain, Keys};
use super::{Backbone, BackboneEntry, Options};
use crate::{ClassifierSpec, Layout, RepresentationSpec, Result};

pub(super) const VGG11: Entry = entry("vgg11", A, false);
pub(super) const VGG11_BN: Entry = entry("vgg11_bn", A, true);
pub(super) const VGG13: Entry = entry("vgg13", B, false);
pub(super) const VGG13_BN: Entry = entry("vgg13_bn", B, true);
pub(super) const VGG16: Entry = entry("vgg16", D, false);
pub(super) const VGG16_BN: Entry = entry("vgg16_bn", D, true);
pub(super) const VGG19: Entry = entry("vgg19", E, false);
pub(super) const VGG19_BN: Entry = entry("vgg19_bn", E, true);

/// Convolutions of each stage, with max-pooling between stages.
const A: [usize; 5] = [1, 1, 2, 2, 2];
const B: [usize; 5] = [2, 2, 2, 2, 2];
const D: [usize; 5] = [2, 2, 3, 3, 3];
const E: [usize; 5] = [2, 2, 4, 4, 4];

/// Channels of each stage.
const CHANNELS: [usize; 5] = [64, 128, 256, 512, 512];

pub(super) struct Entry {
    name: &'static str,
    depths: [usize; 5],
    /// Whether batch norm follows each convolution.
    norm: bool,
}

const fn entry(name: &'static str, depths: [usize; 5], norm: bool) -> Entry {
    Entry { name, depths, norm }
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.norm {
            false => {
                "convolutions of a VGG network; 224x224 images to 7x7x512; options last_pool (true or \
                 false), reduction (to so many channels)"
            }
            true => {
                "convolutions of a VGG network with batch norm; 224x224 images to 7x7x512; options \
                 last_pool (true or false), reduction (to so many channels)"
            }
        }
    }

    fn second_order(&self) -> Options {
        let mut options = Options::default();
        options.set("last_pool", false);
        options.set("reduction", 256);
        options
    }

    fn bilinear(&self) -> Options {
        let mut options = self.second_order();
        options.remove("reduction");
        options
    }

    fn own_head(&self) -> RepresentationSpec {
        RepresentationSpec::new("flat").with("side", 7)
    }

    fn classifier(&self) -> ClassifierSpec {
        ClassifierSpec::two_hidden(false)
    }

    fn layouts(&self) -> &'static [Layout] {
        chain::VGG_LAYOUTS
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name)?;
        let mut chain = Chain::new(&mut scope);
        for (stage, (outputs, depth)) in CHANNELS.into_iter().zip(self.depths).enumerate() {
            for _ in 0..depth {
                let options = Conv::new(1, 1);
                chain.conv(outputs, 3, options, Init::KaimingFanOut, self.norm)?;
            }
            if keys.last_pool || stage + 1 < self.depths.len() {
                chain.pool(HALVE);
            }
        }
        chain.finish(self.name, keys.reduction)
    }
}

const HALVE: Window = Window {
    kernel: 2,
    stride: 2,
    padding: 0,
};
