//! Residual networks for images of 32 and 64 pixels: three stages of 16, 32 and 64 channels, a 3x3
//! convolution before them.
//!
//! `resnet8` to `resnet110`: depth 6n + 2, basic blocks (He et al. 2016, section 4.2; names as
//! torchvision's larger ones). Shortcuts that change the shape are 1x1 convolutions with batch norm, as
//! in the authors' code for CIFAR-100 (XuChunqiao/Tensorflow-Fast-MPNCOV,
//! `src/network/mpncov_cifar_model.py`); section 4.2 pads with zeros instead, which has 0.27 million
//! parameters at depth 20 too (2752 fewer).
//!
//! `preresnet20` to `preresnet110`, basic, and `preresnet164`, bottlenecks of 64, 128 and 256 channels:
//! norm and ReLU before each convolution (He et al. 2016b), and a norm with ReLU at the end (`bn`).
//! Shortcuts that change the shape are 1x1 convolutions of the normalised input, without norm, as in
//! that file.
//!
//! Options: `last_stride` (2, or 1: the last stage keeps the resolution), `reduction` (a 1x1
//! convolution to so many channels with batch norm and ReLU; none by default), `stem_stride` (1; 2 for
//! 64x64 images), `stem_kernel` (3; 5 or 7, as networks for large images begin), for `resnet8` to
//! `resnet110` `zero_init_residual` (false; torchvision's name: blocks begin as their shortcuts).
//! Covariance heads take `last_stride = 1`, which gives 16x16x64 of a 32x32 image, and for the 256
//! channels of bottlenecks `reduction = 128`, both as in that file.

use candle_core::Tensor;
use isqrt_nn::layers::{BatchNorm2d, Conv2d, ConvNorm};
use isqrt_nn::ops::{Activation, Conv, add};
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::reduction::{check_stride, leave_blocks, reduce};
use super::residual::Block;
use super::{Backbone, BackboneEntry, Options};
use crate::{Error, Result};

pub(super) const RESNET8: Entry = entry("resnet8", Kind::Basic, 1);
pub(super) const RESNET14: Entry = entry("resnet14", Kind::Basic, 2);
pub(super) const RESNET20: Entry = entry("resnet20", Kind::Basic, 3);
pub(super) const RESNET32: Entry = entry("resnet32", Kind::Basic, 5);
pub(super) const RESNET44: Entry = entry("resnet44", Kind::Basic, 7);
pub(super) const RESNET56: Entry = entry("resnet56", Kind::Basic, 9);
pub(super) const RESNET110: Entry = entry("resnet110", Kind::Basic, 18);
pub(super) const PRERESNET20: Entry = entry("preresnet20", Kind::PreBasic, 3);
pub(super) const PRERESNET56: Entry = entry("preresnet56", Kind::PreBasic, 9);
pub(super) const PRERESNET110: Entry = entry("preresnet110", Kind::PreBasic, 18);
pub(super) const PRERESNET164: Entry = entry("preresnet164", Kind::PreBottleneck, 18);

pub(super) struct Entry {
    name: &'static str,
    kind: Kind,
    /// Blocks of each stage.
    depth: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Basic,
    PreBasic,
    PreBottleneck,
}

const fn entry(name: &'static str, kind: Kind, depth: usize) -> Entry {
    Entry { name, kind, depth }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    last_stride: usize,
    reduction: Option<usize>,
    stem_stride: usize,
    stem_kernel: usize,
    zero_init_residual: bool,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            last_stride: 2,
            reduction: None,
            stem_stride: 1,
            stem_kernel: 3,
            zero_init_residual: false,
        }
    }
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn image_side(&self) -> usize {
        32
    }

    fn about(&self) -> &'static str {
        match self.kind {
            Kind::Basic => {
                "residual network of basic blocks for small images; 32x32 images to 8x8x64; options \
                 last_stride (2 or 1), reduction (to so many channels), stem_stride (1 or 2), stem_kernel (3, 5 or 7), \
                 zero_init_residual (false)"
            }
            Kind::PreBasic => {
                "pre-activation network of basic blocks for small images; 32x32 images to 8x8x64; \
                 options last_stride (2 or 1), reduction (to so many channels), stem_stride (1 or 2), stem_kernel (3, 5 or 7)"
            }
            Kind::PreBottleneck => {
                "pre-activation network of bottlenecks for small images; 32x32 images to 8x8x256; \
                 options last_stride (2 or 1), reduction (to so many channels), stem_stride (1 or 2), stem_kernel (3, 5 or 7)"
            }
        }
    }

    fn second_order(&self) -> Options {
        let mut options = Options::default();
        options.set("last_stride", 1);
        if self.kind == Kind::PreBottleneck {
            options.set("reduction", 128);
        }
        options
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name)?;
        check_stride(self.name, "last_stride", keys.last_stride)?;
        check_stride(self.name, "stem_stride", keys.stem_stride)?;

        if keys.zero_init_residual && self.kind != Kind::Basic {
            return Err(Error::Options {
                name: self.name.to_owned(),
                message: "zero_init_residual: blocks of this network end in no norm".to_owned(),
            });
        }
        let kernel = keys.stem_kernel;
        if !matches!(kernel, 3 | 5 | 7) {
            return Err(Error::Options {
                name: self.name.to_owned(),
                message: format!("stem_kernel = {kernel}: expected 3, 5 or 7"),
            });
        }
        let options = Conv::new(keys.stem_stride, kernel / 2);
        let stem = match self.kind {
            Kind::Basic => {
                let names = ("conv1", "bn1");
                let stride = keys.stem_stride;
                Stem::Norm(ConvNorm::new(
                    &mut scope,
                    names,
                    (3, 16),
                    kernel,
                    stride,
                    Activation::Relu,
                )?)
            }
            _ => Stem::Plain(Conv2d::new(scope.sub("conv1"), 3, 16, kernel, options)?),
        };
        let expansion = if self.kind == Kind::PreBottleneck {
            4
        } else {
            1
        };
        let mut channels = 16;
        let mut blocks = Vec::with_capacity(3 * self.depth);
        for stage in 0..3 {
            let outputs = (16 << stage) * expansion;
            let mut scope = scope.sub(format!("layer{}", stage + 1));
            for i in 0..self.depth {
                let stride = match (i, stage) {
                    (0, 1) => 2,
                    (0, 2) => keys.last_stride,
                    _ => 1,
                };
                let (scope, shape) = (scope.sub(i), (channels, outputs));
                blocks.push(match self.kind {
                    Kind::Basic => {
                        let zero = keys.zero_init_residual;
                        AnyBlock::Post(Block::basic(scope, shape, stride, zero)?)
                    }
                    Kind::PreBasic => AnyBlock::Pre(PreBlock::basic(scope, shape, stride)?),
                    Kind::PreBottleneck => {
                        AnyBlock::Pre(PreBlock::bottleneck(scope, shape, stride)?)
                    }
                });
                channels = outputs;
            }
        }
        let norm = match self.kind {
            Kind::Basic => None,
            _ => Some(BatchNorm2d::new(
                scope.sub("bn"),
                channels,
                Activation::Relu,
            )?),
        };
        let (reduce, channels) = reduce(self.name, &mut scope, channels, keys.reduction)?;
        Ok(Box::new(SmallResNet {
            stem,
            blocks,
            norm,
            reduce,
            channels,
        }))
    }
}

enum Stem {
    Norm(ConvNorm),
    Plain(Conv2d),
}

enum AnyBlock {
    Post(Block),
    Pre(PreBlock),
}

struct SmallResNet {
    stem: Stem,
    blocks: Vec<AnyBlock>,
    /// After pre-activation blocks, whose sums have none.
    norm: Option<BatchNorm2d>,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for SmallResNet {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = match &self.stem {
            Stem::Norm(stem) => stem.forward_into_blocks(x, mode)?,
            Stem::Plain(stem) => stem.forward_into_blocks(x)?,
        };
        for block in &self.blocks {
            x = match block {
                AnyBlock::Post(block) => block.forward(&x, mode)?,
                AnyBlock::Pre(block) => block.forward(&x, mode)?,
            };
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(&x, mode)?;
        }
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}

/// Norm and ReLU before each convolution, nothing after the sum.
struct PreBlock {
    norm: BatchNorm2d,
    /// All convolutions but the last, each with the norm before the next one.
    convs: Vec<ConvNorm>,
    last: Conv2d,
    downsample: Option<Conv2d>,
}

impl PreBlock {
    /// Two 3x3 convolutions; the first has the stride. `channels` are those of input and output.
    fn basic(mut scope: Scope<'_>, channels: (usize, usize), stride: usize) -> Result<Self> {
        let (inputs, outputs) = channels;
        let first = [((inputs, outputs), 3, stride)];
        Self::new(&mut scope, channels, stride, &first, (outputs, 3))
    }

    /// 1x1 to a quarter of the output's channels, 3x3 with the stride, 1x1.
    fn bottleneck(mut scope: Scope<'_>, channels: (usize, usize), stride: usize) -> Result<Self> {
        let (inputs, outputs) = channels;
        let width = outputs / 4;
        let first = [((inputs, width), 1, 1), ((width, width), 3, stride)];
        Self::new(&mut scope, channels, stride, &first, (width, 1))
    }

    /// From the channels, kernel and stride of all convolutions but the last, and from the input
    /// channels and kernel of that.
    fn new(
        scope: &mut Scope<'_>,
        (inputs, outputs): (usize, usize),
        stride: usize,
        first: &[((usize, usize), usize, usize)],
        (width, kernel): (usize, usize),
    ) -> Result<Self> {
        let norm = BatchNorm2d::new(scope.sub("bn1"), inputs, Activation::Relu)?;
        let mut convs = Vec::with_capacity(first.len());
        for (i, &(channels, kernel, stride)) in (1..).zip(first) {
            let names = (&*format!("conv{i}"), &*format!("bn{}", i + 1));
            convs.push(ConvNorm::new(
                scope,
                names,
                channels,
                kernel,
                stride,
                Activation::Relu,
            )?);
        }
        let last = scope.sub(format!("conv{}", first.len() + 1));
        let options = Conv::new(1, kernel / 2);
        let last = Conv2d::new(last, width, outputs, kernel, options)?;
        let mut downsample = None;
        if stride != 1 || inputs != outputs {
            let (scope, options) = (scope.sub("downsample"), Conv::new(stride, 0));
            downsample = Some(Conv2d::new(scope, inputs, outputs, 1, options)?);
        }
        Ok(Self {
            norm,
            convs,
            last,
            downsample,
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut y = self.norm.forward(x, mode)?;
        let shortcut = match &self.downsample {
            Some(downsample) => downsample.forward(&y)?,
            None => x.clone(),
        };
        for conv in &self.convs {
            y = conv.forward(&y, mode)?;
        }
        Ok(add(&self.last.forward(&y)?, &shortcut)?)
    }
}
