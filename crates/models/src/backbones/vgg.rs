//! The convolutions of VGG-16, configuration D (Simonyan and Zisserman 2015), with torchvision's
//! structure and parameter names (`features.0` and so on), without and with batch norm.
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

pub(super) const VGG16: Entry = Entry {
    name: "vgg16",
    norm: false,
};
pub(super) const VGG16_BN: Entry = Entry {
    name: "vgg16_bn",
    norm: true,
};

/// Channels and number of the convolutions of each stage, with max-pooling between stages.
const STAGES: [(usize, usize); 5] = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)];

pub(super) struct Entry {
    name: &'static str,
    /// Whether batch norm follows each convolution.
    norm: bool,
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.norm {
            false => {
                "convolutions of VGG-16; 224x224 images to 7x7x512; options last_pool (true or false), \
                 reduction (to so many channels)"
            }
            true => {
                "convolutions of VGG-16 with batch norm; 224x224 images to 7x7x512; options last_pool \
                 (true or false), reduction (to so many channels)"
            }
        }
    }

    fn second_order(&self) -> Options {
        let mut options = Options::default();
        options.set("last_pool", false);
        options.set("reduction", 256);
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
        for (stage, (outputs, count)) in STAGES.into_iter().enumerate() {
            for _ in 0..count {
                let options = Conv::new(1, 1);
                chain.conv(outputs, 3, options, Init::KaimingFanOut, self.norm)?;
            }
            if keys.last_pool || stage + 1 < STAGES.len() {
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
