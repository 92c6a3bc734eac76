//! The convolutions of AlexNet in two forms.
//!
//! `alexnet`: as torchvision has them (Krizhevsky 2014, one tower), with its parameter names
//! (`features.0` and so on). A 224x224 image gives 6x6x256, without the last pooling 13x13x256.
//!
//! `alexnet_bn`: as the paper's own code has them (`MPN_COV_init_simplenn.m` in the folder MatConvNet of
//! jiangtaoxie/fast-MPN-COV at ee8c4a6, `alexnet_cov_pooling`), names in torchvision's manner. Read there:
//! the shapes of the five convolutions, two groups in the second, fourth and fifth (Krizhevsky et al.
//! 2012), biases, batch norm and ReLU after each, no local response norm beside batch norm, Gaussian
//! initial weights of deviation 0.01, no pooling after the fifth, 227x227 images, which give
//! 13x13x256. Different here: ε of batch norm is 1e-5 (there 1e-4), and norms and biases learn at the rate
//! of all parameters (there at twice that). Not verified: that the paper's tables were made with these
//! files, and pooling and hidden layers of the plain network that they compare with, for which the
//! original's are taken (dropout left out, as beside batch norm there).
//!
//! Options: `last_pool` (true; false keeps the resolution of the last stage) and `reduction` (a
//! 1x1 convolution to so many channels with batch norm and ReLU; none by default). Covariance
//! heads take `last_pool = false`.

use isqrt_nn::ops::{Conv, Window};
use isqrt_nn::{Init, Scope};

use super::chain::{self, Chain, Keys};
use super::{Backbone, BackboneEntry, Options};
use crate::{ClassifierSpec, Layout, RepresentationSpec, Result};

pub(super) const ALEXNET: Entry = Entry {
    name: "alexnet",
    convolutions: [
        (64, 11, (4, 2), 1),
        (192, 5, (1, 2), 1),
        (384, 3, (1, 1), 1),
        (256, 3, (1, 1), 1),
        (256, 3, (1, 1), 1),
    ],
    norm: false,
};
pub(super) const ALEXNET_BN: Entry = Entry {
    name: "alexnet_bn",
    convolutions: [
        (96, 11, (4, 0), 1),
        (256, 5, (1, 2), 2),
        (384, 3, (1, 1), 1),
        (384, 3, (1, 1), 2),
        (256, 3, (1, 1), 2),
    ],
    norm: true,
};

pub(super) struct Entry {
    name: &'static str,
    /// Channels, kernel, stride and padding, groups of each convolution.
    convolutions: [(usize, usize, (usize, usize), usize); 5],
    /// Whether batch norm follows each convolution.
    norm: bool,
}

/// Whether max-pooling follows each convolution.
const POOLED: [bool; 5] = [true, true, false, false, true];

const POOL: Window = Window {
    kernel: 3,
    stride: 2,
    padding: 0,
};

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn image_side(&self) -> usize {
        if self.norm { 227 } else { 224 }
    }

    fn about(&self) -> &'static str {
        match self.norm {
            false => {
                "convolutions of AlexNet (one tower); 224x224 images to 6x6x256; options last_pool \
                 (true or false), reduction (to so many channels)"
            }
            true => {
                "convolutions of AlexNet (two groups) with batch norm, the paper's; 227x227 images to \
                 6x6x256; options last_pool (true or false), reduction (to so many channels)"
            }
        }
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
        match self.norm {
            false => ClassifierSpec::two_hidden(true),
            true => ClassifierSpec {
                dropout: 0.0,
                ..ClassifierSpec::two_hidden(false)
            },
        }
    }

    fn layouts(&self) -> &'static [Layout] {
        // No program that we know writes the network with batch norm in PyTorch.
        if self.norm {
            &[]
        } else {
            chain::ALEXNET_LAYOUTS
        }
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name)?;
        let mut chain = Chain::new(&mut scope);
        let last = POOLED.len() - 1;
        for (i, (layer, pooled)) in self.convolutions.into_iter().zip(POOLED).enumerate() {
            let (outputs, kernel, (stride, padding), groups) = layer;
            let options = Conv {
                groups,
                ..Conv::new(stride, padding)
            };
            let init = match self.norm {
                false => Init::UniformFanIn,
                true => Init::Normal(0.01),
            };
            chain.conv(outputs, kernel, options, init, self.norm)?;
            if pooled && (keys.last_pool || i < last) {
                chain.pool(POOL);
            }
        }
        chain.finish(self.name, keys.reduction)
    }
}
