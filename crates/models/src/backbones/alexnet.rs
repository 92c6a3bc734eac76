//! The convolutions of AlexNet as torchvision has them (Krizhevsky 2014, one tower), with its
//! parameter names (`features.0` and so on).
//!
//! Options: `last_pool` (true; false keeps the resolution of the last stage) and `reduction` (a
//! 1x1 convolution to so many channels with batch norm and ReLU; none by default). Covariance
//! heads take `last_pool = false`, which gives 13x13x256 of a 224x224 image.

use isqrt_nn::ops::{Conv, Window};
use isqrt_nn::{Init, Scope};

use super::chain::{self, Chain, Keys};
use super::{Backbone, BackboneEntry, Options};
use crate::{ClassifierSpec, Layout, RepresentationSpec, Result};

pub(super) const ALEXNET: Entry = Entry;

pub(super) struct Entry;

/// Channels, kernel, stride and padding of each convolution, and whether max-pooling follows.
const CONVOLUTIONS: [(usize, usize, usize, usize, bool); 5] = [
    (64, 11, 4, 2, true),
    (192, 5, 1, 2, true),
    (384, 3, 1, 1, false),
    (256, 3, 1, 1, false),
    (256, 3, 1, 1, true),
];

const POOL: Window = Window {
    kernel: 3,
    stride: 2,
    padding: 0,
};

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        "alexnet"
    }

    fn about(&self) -> &'static str {
        "convolutions of AlexNet (one tower); 224x224 images to 6x6x256; options last_pool (true or \
         false), reduction (to so many channels)"
    }

    fn second_order(&self) -> Options {
        let mut options = Options::default();
        options.set("last_pool", false);
        options
    }

    fn own_head(&self) -> RepresentationSpec {
        RepresentationSpec::new("flat").with("side", 6)
    }

    fn classifier(&self) -> ClassifierSpec {
        ClassifierSpec::two_hidden(true)
    }

    fn layouts(&self) -> &'static [Layout] {
        chain::ALEXNET_LAYOUTS
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name())?;
        let mut chain = Chain::new(&mut scope);
        for (i, (outputs, kernel, stride, padding, pooled)) in CONVOLUTIONS.into_iter().enumerate()
        {
            let options = Conv::new(stride, padding);
            chain.conv(outputs, kernel, options, Init::UniformFanIn, false)?;
            if pooled && (keys.last_pool || i + 1 < CONVOLUTIONS.len()) {
                chain.pool(POOL);
            }
        }
        chain.finish(self.name(), keys.reduction)
    }
}
