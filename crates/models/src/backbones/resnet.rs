//! ResNet-18 to ResNet-152 (He et al. 2016) with torchvision's structure and parameter names.
//!
//! Options: `last_stride` (2, or 1: the last stage keeps the resolution, without dilation) and
//! `reduction` (a 1x1 convolution to so many channels with batch norm and ReLU after the last
//! stage; none by default). iSQRT-COV takes `last_stride = 1, reduction = 256`, which gives
//! 14x14x256 of a 224x224 image; names `layer_reduce`, `layer_reduce_bn` as in the authors' code.
//! `checkpoint` (false) keeps the inputs of blocks alone for the backward pass and computes the
//! rest again: less memory, one more forward pass of time. `zero_init_residual` (false), as in
//! torchvision: blocks begin as their shortcuts.

use std::sync::Arc;

use candle_core::Tensor;
use isqrt_nn::layers::{ConvNorm, GradientCheckpoint};
use isqrt_nn::ops::{Activation, Window, max_pool2d};
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::reduction::{check_stride, finer, leave_blocks, reduce};
use super::residual::Block;
use super::{Backbone, BackboneEntry, Options};
use crate::checkpoint::Triangle;
use crate::{Layout, Result};

pub(super) const RESNET18: Entry = entry("resnet18", Kind::Basic, [2, 2, 2, 2]);
pub(super) const RESNET34: Entry = entry("resnet34", Kind::Basic, [3, 4, 6, 3]);
pub(super) const RESNET50: Entry = entry("resnet50", Kind::Bottleneck, [3, 4, 6, 3]);
pub(super) const RESNET101: Entry = entry("resnet101", Kind::Bottleneck, [3, 4, 23, 3]);
pub(super) const RESNET152: Entry = entry("resnet152", Kind::Bottleneck, [3, 8, 36, 3]);

pub(super) struct Entry {
    name: &'static str,
    kind: Kind,
    /// Blocks of each stage.
    depths: [usize; 4],
}

/// Names in files that the authors' `main.py` wrote: parts by number, and the reduction's convolution
/// and norm.
const fn by_number(reduction: [&'static str; 2]) -> [(&'static str, &'static str); 8] {
    [
        ("conv1.", "features.0."),
        ("bn1.", "features.1."),
        ("layer1.", "features.4."),
        ("layer2.", "features.5."),
        ("layer3.", "features.6."),
        ("layer4.", "features.7."),
        ("layer_reduce.", reduction[0]),
        ("layer_reduce_bn.", reduction[1]),
    ]
}

/// Of networks trained from scratch, whose representation has the reduction.
const TRAINED: Layout = Layout {
    name: "trained",
    backbone: &by_number([
        "representation.conv_dr_block.0.",
        "representation.conv_dr_block.1.",
    ]),
    linear: "classifier.",
    hidden: &[],
    hidden_convolutions: false,
    // `main.py` came after the order of triangles had changed.
    triangle: Some(Triangle::Upper),
};

/// Of networks fine-tuned from released weights, whose features have it.
const FINE_TUNED: Layout = Layout {
    name: "fine-tuned",
    backbone: &by_number(["features.8.", "features.9."]),
    ..TRAINED
};

const LAYOUTS: &[Layout] = &[Layout::FLAT, TRAINED, FINE_TUNED];

enum Kind {
    Basic,
    Bottleneck,
}

/// A block in a scope, of these channels in and out, with this stride; whether it begins as its shortcut.
type MakeBlock = fn(Scope<'_>, (usize, usize), usize, bool) -> isqrt_nn::Result<Block>;

const fn entry(name: &'static str, kind: Kind, depths: [usize; 4]) -> Entry {
    Entry { name, kind, depths }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    last_stride: usize,
    reduction: Option<usize>,
    checkpoint: bool,
    zero_init_residual: bool,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            last_stride: 2,
            reduction: None,
            checkpoint: false,
            zero_init_residual: false,
        }
    }
}

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        match self.kind {
            Kind::Basic => {
                "residual network of basic blocks; 224x224 images to 7x7x512; options last_stride (2 or \
                 1), reduction (to so many channels), checkpoint (false), \
                 zero_init_residual (false)"
            }
            Kind::Bottleneck => {
                "residual network of bottlenecks; 224x224 images to 7x7x2048; options last_stride (2 or \
                 1), reduction (to so many channels), checkpoint (false), \
                 zero_init_residual (false)"
            }
        }
    }

    fn second_order(&self) -> Options {
        finer()
    }

    fn layouts(&self) -> &'static [Layout] {
        LAYOUTS
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let Keys {
            last_stride,
            reduction,
            checkpoint,
            zero_init_residual,
        } = options.read(self.name)?;
        check_stride(self.name, "last_stride", last_stride)?;

        let stem = ConvNorm::new(
            &mut scope,
            ("conv1", "bn1"),
            (3, 64),
            7,
            2,
            Activation::Relu,
        )?;
        let (block, expansion): (MakeBlock, usize) = match self.kind {
            Kind::Basic => (Block::basic, 1),
            Kind::Bottleneck => (Block::bottleneck, 4),
        };
        let mut channels = 64;
        let mut blocks = Vec::with_capacity(self.depths.iter().sum());
        for (stage, depth) in self.depths.into_iter().enumerate() {
            let outputs = (64 << stage) * expansion;
            let mut scope = scope.sub(format!("layer{}", stage + 1));
            for i in 0..depth {
                let stride = match (i, stage) {
                    (0, 1 | 2) => 2,
                    (0, 3) => last_stride,
                    _ => 1,
                };
                let shape = (channels, outputs);
                let block = block(scope.sub(i), shape, stride, zero_init_residual)?;
                blocks.push(Arc::new(block));
                channels = outputs;
            }
        }
        let (reduce, channels) = reduce(self.name, &mut scope, channels, reduction)?;
        Ok(Box::new(ResNet {
            stem,
            blocks,
            checkpoint: checkpoint.then(|| GradientCheckpoint::new(&scope)),
            reduce,
            channels,
        }))
    }
}

const POOL: Window = Window {
    kernel: 3,
    stride: 2,
    padding: 1,
};

struct ResNet {
    stem: ConvNorm,
    blocks: Vec<Arc<Block>>,
    /// Where blocks are to keep their inputs alone.
    checkpoint: Option<GradientCheckpoint>,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for ResNet {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = max_pool2d(&self.stem.forward_into_blocks(x, mode)?, POOL)?;
        for block in &self.blocks {
            x = match &self.checkpoint {
                Some(checkpoint) => {
                    let block = Arc::clone(block);
                    checkpoint.forward(&x, mode, move |x, mode| block.forward(x, mode))?
                }
                None => block.forward(&x, mode)?,
            };
        }
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}
