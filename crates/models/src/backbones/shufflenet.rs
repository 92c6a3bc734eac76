//! ShuffleNetV2 of width 1 (Ma et al. 2018) with torchvision's structure and parameter names
//! (`conv1.0`, `stage2.0.branch1.0` and so on).
//!
//! Options: `last_stride` (2, or 1: the last stage keeps the resolution) and `reduction` (a 1x1
//! convolution to so many channels with batch norm and ReLU after the last one; none by default; names
//! `layer_reduce`, `layer_reduce_bn`). Covariance heads take `last_stride = 1, reduction = 256`, which
//! gives 14x14x256 of a 224x224 image.
//!
//! On the CPU maps stay plain up to the last convolution: the 58 and 116 channels of a branch do not fill blocks. On a
//! GPU all channels are one block.

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{Activation, Window, channel_shuffle, max_pool2d, shuffle_unit};
use isqrt_nn::{Mode, Scope};

use super::reduction::{Keys, check_stride, finer, leave_blocks, reduce};
use super::{Backbone, BackboneEntry, Options};
use crate::Result;

pub(super) const SHUFFLENET_V2_X1_0: Entry = Entry;

pub(super) struct Entry;

/// Channels and units of each stage (the paper's table 5).
const STAGES: [(usize, usize); 3] = [(116, 4), (232, 8), (464, 4)];

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        "shufflenet_v2_x1_0"
    }

    fn about(&self) -> &'static str {
        "depthwise convolutions and channel shuffles; 224x224 images to 7x7x1024; options last_stride \
         (2 or 1), reduction (to so many channels)"
    }

    fn second_order(&self) -> Options {
        finer()
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name())?;
        check_stride(self.name(), "last_stride", keys.last_stride)?;

        let stem = &mut scope.sub("conv1");
        let stem = ConvNorm::new(stem, ("0", "1"), (3, 24), 3, 2, Activation::Relu)?;
        let mut channels = 24;
        let mut units = Vec::new();
        for (stage, (outputs, count)) in STAGES.into_iter().enumerate() {
            let mut scope = scope.sub(format!("stage{}", stage + 2));
            for i in 0..count {
                let scope = &mut scope.sub(i);
                let last = stage + 1 == STAGES.len();
                units.push(match i {
                    0 => {
                        let stride = if last { keys.last_stride } else { 2 };
                        Unit::wider(scope, (channels, outputs), stride)?
                    }
                    _ => Unit::split(scope, outputs)?,
                });
            }
            channels = outputs;
        }
        let last = &mut scope.sub("conv5");
        let last = ConvNorm::new(last, ("0", "1"), (channels, 1024), 1, 1, Activation::Relu)?;
        let (reduce, channels) = reduce(self.name(), &mut scope, 1024, keys.reduction)?;
        Ok(Box::new(ShuffleNetV2 {
            stem,
            units,
            last,
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

struct ShuffleNetV2 {
    stem: ConvNorm,
    units: Vec<Unit>,
    last: ConvNorm,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for ShuffleNetV2 {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = match x.device().is_cuda() {
            true => self.stem.forward_into_blocks(x, mode)?,
            false => self.stem.forward(x, mode)?,
        };
        let mut x = max_pool2d(&x, POOL)?;
        for unit in &self.units {
            x = unit.forward(&x, mode)?;
        }
        let x = self.last.forward_in_any_layout(&x, mode)?;
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}

/// Two branches whose channels are shuffled. The first is half of the input as it is, or, where the
/// shape changes, convolutions of all of it (none otherwise).
struct Unit {
    first: Vec<ConvNorm>,
    second: Vec<ConvNorm>,
}

impl Unit {
    /// Both branches see the whole input, which is `channels.0` wide.
    fn wider(scope: &mut Scope<'_>, channels: (usize, usize), stride: usize) -> Result<Self> {
        let (inputs, half) = (channels.0, channels.1 / 2);
        let branch = &mut scope.sub("branch1");
        let first = vec![
            ConvNorm::depthwise(branch, ("0", "1"), inputs, 3, stride, Activation::None)?,
            ConvNorm::new(branch, ("2", "3"), (inputs, half), 1, 1, Activation::Relu)?,
        ];
        let second = Self::second(scope, (inputs, half), stride)?;
        Ok(Self { first, second })
    }

    /// Each branch sees half of the input.
    fn split(scope: &mut Scope<'_>, channels: usize) -> Result<Self> {
        let half = channels / 2;
        Ok(Self {
            first: Vec::new(),
            second: Self::second(scope, (half, half), 1)?,
        })
    }

    fn second(
        scope: &mut Scope<'_>,
        (inputs, half): (usize, usize),
        stride: usize,
    ) -> Result<Vec<ConvNorm>> {
        let branch = &mut scope.sub("branch2");
        Ok(vec![
            ConvNorm::new(branch, ("0", "1"), (inputs, half), 1, 1, Activation::Relu)?,
            ConvNorm::depthwise(branch, ("3", "4"), half, 3, stride, Activation::None)?,
            ConvNorm::new(branch, ("5", "6"), (half, half), 1, 1, Activation::Relu)?,
        ])
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let through = |convs: &[ConvNorm], x: Tensor| {
            let mut convs = convs.iter();
            convs.try_fold(x, |x, conv| conv.forward(&x, mode))
        };
        if self.first.is_empty() {
            return Ok(shuffle_unit(x, |half| through(&self.second, half))?);
        }
        let first = through(&self.first, x.clone())?;
        Ok(channel_shuffle(&first, &through(&self.second, x.clone())?)?)
    }
}
