//! The two-layer network for 32x32 textures: a 7x7 convolution with stride 2, which sees a whole
//! wavelength of the embedded set, and a 1x1 convolution that mixes its 32 filters.

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::Activation;
use isqrt_nn::{Mode, Scope};

use super::{Backbone, BackboneEntry, NoOptions, Options};
use crate::Result;

pub(super) const E10NET: Entry = Entry;

pub(super) struct Entry;

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        "e10net"
    }

    fn image_side(&self) -> usize {
        32
    }

    fn about(&self) -> &'static str {
        "conv 7x7 stride 2 to 32 channels, conv 1x1; 32x32 images to 16x16x32"
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        options.read::<NoOptions>(self.name())?;
        Ok(Box::new(E10Net {
            first: ConvNorm::new(
                &mut scope,
                ("conv1", "bn1"),
                (3, 32),
                7,
                2,
                Activation::Relu,
            )?,
            second: ConvNorm::new(
                &mut scope,
                ("conv2", "bn2"),
                (32, 32),
                1,
                1,
                Activation::Relu,
            )?,
        }))
    }
}

struct E10Net {
    first: ConvNorm,
    second: ConvNorm,
}

impl Backbone for E10Net {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(self.second.forward(&self.first.forward(x, mode)?, mode)?)
    }

    fn out_channels(&self) -> usize {
        32
    }
}
