//! Chains of biased convolutions and max-pooling, the older networks, with torchvision's names:
//! `features.N`, where N counts convolutions, norms, ReLUs and poolings.

use candle_core::Tensor;
use isqrt_nn::layers::{BatchNorm2d, Conv2d, ConvNorm};
use isqrt_nn::ops::{Activation, Conv, Window, is_blocked, max_pool2d};
use isqrt_nn::{Init, Mode, Scope};
use serde::Deserialize;

use super::Backbone;
use super::reduction::{leave_blocks, reduce};
use crate::checkpoint::Triangle;
use crate::{Layout, Result};

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Keys {
    /// Whether max-pooling ends the last stage.
    pub last_pool: bool,
    pub reduction: Option<usize>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            last_pool: true,
            reduction: None,
        }
    }
}

/// torchvision's names and the authors' (`mpncovvgg16_bn`), whose later code it was that had them.
const FEATURES: &[(&str, &str)] = &[
    ("features.", "features."),
    ("layer_reduce_bn.", "representation.conv_dr_block.1."),
    ("layer_reduce.", "representation.conv_dr_block.0."),
];

const TORCHVISION_VGG: Layout = Layout {
    name: "torchvision",
    backbone: FEATURES,
    linear: "classifier.",
    hidden: &["classifier.0.", "classifier.3.", "classifier.6."],
    hidden_convolutions: false,
    triangle: Some(Triangle::Upper),
};

pub(super) const VGG_LAYOUTS: &[Layout] = &[
    TORCHVISION_VGG,
    Layout {
        name: "timm",
        linear: "head.fc.",
        hidden: &["pre_logits.fc1.", "pre_logits.fc2.", "head.fc."],
        hidden_convolutions: true,
        ..TORCHVISION_VGG
    },
];

pub(super) const ALEXNET_LAYOUTS: &[Layout] = &[Layout {
    hidden: &["classifier.1.", "classifier.4.", "classifier.6."],
    ..TORCHVISION_VGG
}];

enum Layer {
    Conv(Conv2d),
    Norm(BatchNorm2d),
    Pool(Window),
}

/// A chain in the making, from images on.
pub(super) struct Chain<'a, 'b> {
    scope: &'a mut Scope<'b>,
    layers: Vec<Layer>,
    channels: usize,
    /// Modules of torchvision so far.
    place: usize,
}

impl<'a, 'b> Chain<'a, 'b> {
    pub(super) fn new(scope: &'a mut Scope<'b>) -> Self {
        Self {
            scope,
            layers: Vec::new(),
            channels: 3,
            place: 0,
        }
    }

    /// A convolution with bias, which torchvision has before batch norm too (where it does
    /// nothing), the norm if there is one, and ReLU.
    pub(super) fn conv(
        &mut self,
        outputs: usize,
        kernel: usize,
        options: Conv,
        init: Init,
        norm: bool,
    ) -> Result<()> {
        let mut scope = self.scope.sub("features");
        let options = Conv {
            activation: match norm {
                true => Activation::None,
                false => Activation::Relu,
            },
            ..options
        };
        // PyTorch's default of a bias has the bound of its weight.
        let fan_in = (self.channels / options.groups.max(1) * kernel * kernel) as f64;
        let bias = match init {
            Init::UniformFanIn => Init::Uniform(1.0 / fan_in.sqrt()),
            _ => Init::Constant(0.0),
        };
        let (channels, init) = ((self.channels, outputs), (init, bias));
        let conv = Conv2d::with_bias(scope.sub(self.place), channels, kernel, options, init)?;
        self.layers.push(Layer::Conv(conv));
        if norm {
            self.place += 1;
            let norm = BatchNorm2d::new(scope.sub(self.place), outputs, Activation::Relu)?;
            self.layers.push(Layer::Norm(norm));
        }
        self.place += 2;
        self.channels = outputs;
        Ok(())
    }

    pub(super) fn pool(&mut self, window: Window) {
        self.layers.push(Layer::Pool(window));
        self.place += 1;
    }

    /// The backbone called `name`, with a reduction to so many channels if it is wanted.
    pub(super) fn finish(self, name: &str, reduction: Option<usize>) -> Result<Box<dyn Backbone>> {
        let (reduce, channels) = reduce(name, self.scope, self.channels, reduction)?;
        Ok(Box::new(Finished {
            layers: self.layers,
            reduce,
            channels,
        }))
    }
}

struct Finished {
    layers: Vec<Layer>,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for Finished {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = match layer {
                Layer::Conv(conv) if is_blocked(&x) => conv.forward(&x)?,
                Layer::Conv(conv) => conv.forward_into_blocks(&x)?,
                Layer::Norm(norm) => norm.forward(&x, mode)?,
                Layer::Pool(window) => max_pool2d(&x, *window)?,
            };
        }
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}
