//! A small residual network for 64x64 photographs: a 5x5 stem, three basic blocks (He et al. 2016)
//! and a 1x1 convolution to 32 channels, so that every representation sees 8x8x32.

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{Activation, unblock};
use isqrt_nn::{Mode, Scope};

use super::residual::Block;
use super::{Backbone, BackboneEntry, NoOptions, Options};
use crate::Result;

pub(super) const TINY_RESNET: Entry = Entry;

pub(super) struct Entry;

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        "tinyresnet"
    }

    fn image_side(&self) -> usize {
        64
    }

    fn about(&self) -> &'static str {
        "conv 5x5 stride 2, basic blocks of 16 (stride 2), 32 and 64 (stride 2) channels, \
         conv 1x1; 64x64 images to 8x8x32"
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        options.read::<NoOptions>(self.name())?;
        Ok(Box::new(TinyResNet {
            stem: ConvNorm::new(
                &mut scope,
                ("conv1", "bn1"),
                (3, 16),
                5,
                2,
                Activation::Relu,
            )?,
            blocks: vec![
                Block::basic(scope.sub("layer1"), (16, 16), 2, false)?,
                Block::basic(scope.sub("layer2"), (16, 32), 1, false)?,
                Block::basic(scope.sub("layer3"), (32, 64), 2, false)?,
            ],
            reduction: ConvNorm::new(
                &mut scope,
                ("conv2", "bn2"),
                (64, 32),
                1,
                1,
                Activation::Relu,
            )?,
        }))
    }
}

struct TinyResNet {
    stem: ConvNorm,
    blocks: Vec<Block>,
    reduction: ConvNorm,
}

impl Backbone for TinyResNet {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.stem.forward_into_blocks(x, mode)?;
        for block in &self.blocks {
            x = block.forward(&x, mode)?;
        }
        Ok(unblock(&self.reduction.forward(&x, mode)?)?)
    }

    fn out_channels(&self) -> usize {
        32
    }
}
