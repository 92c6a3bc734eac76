//! The convolutions of VGG-16, configuration D (Simonyan and Zisserman 2015), with torchvision's
//! structure and parameter names (`features.0` and so on), without and with batch norm.
//!
//! Options: `last_pool` (true; false keeps the resolution of the last stage) and `reduction` (a
//! 1x1 convolution to so many channels with batch norm and ReLU; none by default; names
//! `layer_reduce`, `layer_reduce_bn`). Covariance heads take `last_pool = false, reduction = 256`,
//! which gives 14x14x256 of a 224x224 image.

use candle_core::Tensor;
use isqrt_nn::layers::{BatchNorm2d, Conv2d, ConvNorm};
use isqrt_nn::ops::{Conv, Window, block, is_blocked, max_pool2d};
use isqrt_nn::{Init, Mode, Scope};
use serde::Deserialize;

use super::reduction::{leave_blocks, reduce};
use super::{Backbone, BackboneEntry, Options};
use crate::Result;

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

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    last_pool: bool,
    reduction: Option<usize>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            last_pool: true,
            reduction: None,
        }
    }
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.norm {
            false => "convolutions of VGG-16; 224x224 images to 7x7x512",
            true => "convolutions of VGG-16 with batch norm; 224x224 images to 7x7x512",
        }
    }

    fn second_order(&self) -> Options {
        let mut options = Options::default();
        options.set("last_pool", false);
        options.set("reduction", 256);
        options
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let Keys {
            last_pool,
            reduction,
        } = options.read(self.name)?;
        let mut layers = Vec::new();
        let mut channels = 3;
        // torchvision counts every module: convolution, norm, ReLU, pooling.
        let mut place = 0;
        let mut features = scope.sub("features");
        for (stage, (outputs, count)) in STAGES.into_iter().enumerate() {
            for _ in 0..count {
                layers.push(Layer::Conv(BiasedConv::new(
                    &mut features,
                    place,
                    (channels, outputs),
                    self.norm,
                )?));
                channels = outputs;
                place += if self.norm { 3 } else { 2 };
            }
            if last_pool || stage + 1 < STAGES.len() {
                layers.push(Layer::Pool);
                place += 1;
            }
        }
        let (reduce, channels) = reduce(self.name, &mut scope, channels, reduction)?;
        Ok(Box::new(Vgg {
            layers,
            reduce,
            channels,
        }))
    }
}

const HALVE: Window = Window {
    kernel: 2,
    stride: 2,
    padding: 0,
};

enum Layer {
    Conv(BiasedConv),
    Pool,
}

struct Vgg {
    layers: Vec<Layer>,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for Vgg {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = match layer {
                Layer::Conv(conv) => conv.forward(&x, mode)?,
                Layer::Pool => max_pool2d(&x, HALVE)?,
            };
            // Blocked from the first convolution on: three input channels would fill no block.
            if !is_blocked(&x) {
                x = block(&x)?;
            }
        }
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}

/// A 3x3 convolution with bias, which torchvision has before batch norm too (where it does
/// nothing), the norm if there is one, and ReLU.
struct BiasedConv {
    conv: Conv2d,
    norm: Option<BatchNorm2d>,
}

impl BiasedConv {
    fn new(
        scope: &mut Scope<'_>,
        place: usize,
        channels: (usize, usize),
        norm: bool,
    ) -> Result<Self> {
        let options = Conv {
            relu: !norm,
            ..Conv::new(1, 1)
        };
        let init = (Init::KaimingFanOut, Init::Constant(0.0));
        let conv = Conv2d::with_bias(scope.sub(place), channels, 3, options, init)?;
        let mut after = None;
        if norm {
            after = Some(BatchNorm2d::new(scope.sub(place + 1), channels.1, true)?);
        }
        Ok(Self { conv, norm: after })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = self.conv.forward(x)?;
        match &self.norm {
            Some(norm) => Ok(norm.forward(&y, mode)?),
            None => Ok(y),
        }
    }
}
