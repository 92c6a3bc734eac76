//! Small relatives of AlexNet and VGG for 32x32 images, whose last maps are 8x8x64: as many positions as
//! channels, so that covariances have no full rank, as the paper's at 13x13x256 and 14x14x256.
//!
//! `alexnet_small`: a large first kernel with stride, then 3x3 convolutions. `vgg_small`: 3x3 convolutions
//! alone, max-pooling between them. Each convolution has batch norm and ReLU. Option: `reduction` (a 1x1
//! convolution to so many channels with batch norm and ReLU; none by default).

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{Activation, Window, is_blocked, max_pool2d};
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::reduction::{leave_blocks, reduce};
use super::{Backbone, BackboneEntry, Options};
use crate::Result;

pub(super) const ALEXNET_SMALL: Entry = Entry {
    name: "alexnet_small",
    about: "conv 7x7 stride 2 to 32 channels, conv 3x3 stride 2 to 64, conv 3x3, each with batch norm; \
            32x32 images to 8x8x64; option reduction (to so many channels)",
    layers: &[conv(32, 7, 2), conv(64, 3, 2), conv(64, 3, 1)],
};

pub(super) const VGG_SMALL: Entry = Entry {
    name: "vgg_small",
    about: "conv 3x3 of 16, 32, 32, 64 and 64 channels with batch norm, max-pooling after the first and the \
            third; 32x32 images to 8x8x64; option reduction (to so many channels)",
    layers: &[
        pooled(conv(16, 3, 1)),
        conv(32, 3, 1),
        pooled(conv(32, 3, 1)),
        conv(64, 3, 1),
        conv(64, 3, 1),
    ],
};

const POOL: Window = Window {
    kernel: 2,
    stride: 2,
    padding: 0,
};

/// A convolution with batch norm and ReLU, and whether max-pooling follows.
#[derive(Clone, Copy)]
struct Layer {
    outputs: usize,
    kernel: usize,
    stride: usize,
    pool: bool,
}

const fn conv(outputs: usize, kernel: usize, stride: usize) -> Layer {
    Layer {
        outputs,
        kernel,
        stride,
        pool: false,
    }
}

const fn pooled(layer: Layer) -> Layer {
    Layer {
        pool: true,
        ..layer
    }
}

pub(super) struct Entry {
    name: &'static str,
    about: &'static str,
    layers: &'static [Layer],
}

/// The keys in a spec.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    reduction: Option<usize>,
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn image_side(&self) -> usize {
        32
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name)?;
        let mut channels = 3;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in (1..).zip(self.layers) {
            let (conv, norm) = (format!("conv{i}"), format!("bn{i}"));
            let shape = (channels, layer.outputs);
            let names = (&*conv, &*norm);
            let conv = ConvNorm::new(
                &mut scope,
                names,
                shape,
                layer.kernel,
                layer.stride,
                Activation::Relu,
            )?;
            layers.push((conv, layer.pool));
            channels = layer.outputs;
        }
        let (reduce, channels) = reduce(self.name, &mut scope, channels, keys.reduction)?;
        Ok(Box::new(SmallChain {
            layers,
            reduce,
            channels,
        }))
    }
}

struct SmallChain {
    layers: Vec<(ConvNorm, bool)>,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for SmallChain {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for (conv, pool) in &self.layers {
            x = match is_blocked(&x) {
                true => conv.forward(&x, mode)?,
                false => conv.forward_into_blocks(&x, mode)?,
            };
            if *pool {
                x = max_pool2d(&x, POOL)?;
            }
        }
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}
