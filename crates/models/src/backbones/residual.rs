//! Residual blocks (He et al. 2016) with torchvision's parameter names.

use candle_core::Tensor;
use isqrt_nn::layers::{ConvNorm, residual};
use isqrt_nn::ops::Activation;
use isqrt_nn::{Mode, Result, Scope};

/// Convolutions beside a shortcut, which is a 1x1 convolution where the shape changes. ReLU after
/// each convolution but the last, and after the sum.
pub(super) struct Block {
    convs: Vec<ConvNorm>,
    downsample: Option<ConvNorm>,
}

impl Block {
    /// Two 3x3 convolutions; the first has the stride. `channels` are those of input and output; with
    /// `from_zero` the block begins as its shortcut.
    pub(super) fn basic(
        scope: Scope<'_>,
        channels: (usize, usize),
        stride: usize,
        from_zero: bool,
    ) -> Result<Self> {
        let (inputs, outputs) = channels;
        let shapes = [((inputs, outputs), 3, stride), ((outputs, outputs), 3, 1)];
        Self::new(scope, channels, stride, &shapes, from_zero)
    }

    /// 1x1 to a quarter of the output's channels, 3x3 with the stride, 1x1. The original has the
    /// stride on the first 1x1; torchvision and the authors' PyTorch code have it here.
    pub(super) fn bottleneck(
        scope: Scope<'_>,
        channels: (usize, usize),
        stride: usize,
        from_zero: bool,
    ) -> Result<Self> {
        let (inputs, outputs) = channels;
        let width = outputs / 4;
        let shapes = [
            ((inputs, width), 1, 1),
            ((width, width), 3, stride),
            ((width, outputs), 1, 1),
        ];
        Self::new(scope, channels, stride, &shapes, from_zero)
    }

    /// From the channels, kernel and stride of each convolution.
    fn new(
        mut scope: Scope<'_>,
        channels: (usize, usize),
        stride: usize,
        shapes: &[((usize, usize), usize, usize)],
        from_zero: bool,
    ) -> Result<Self> {
        let mut convs = Vec::with_capacity(shapes.len());
        for (i, &(channels, kernel, stride)) in (1..).zip(shapes) {
            let names = (&*format!("conv{i}"), &*format!("bn{i}"));
            let scope = &mut scope;
            let activation = match i < shapes.len() {
                true => Activation::Relu,
                false => Activation::None,
            };
            convs.push(match activation {
                Activation::None if from_zero => {
                    ConvNorm::from_zero(scope, names, channels, kernel, stride)?
                }
                _ => ConvNorm::new(scope, names, channels, kernel, stride, activation)?,
            });
        }
        let mut downsample = None;
        if stride != 1 || channels.0 != channels.1 {
            let scope = &mut scope.sub("downsample");
            downsample = Some(ConvNorm::new(
                scope,
                ("0", "1"),
                channels,
                1,
                stride,
                Activation::None,
            )?);
        }
        Ok(Self { convs, downsample })
    }

    /// # Shapes
    /// `(batch, inputs, height, width)` to `(batch, outputs, height / stride, width / stride)`,
    /// rounded up.
    pub(super) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        residual(&self.convs, self.downsample.as_ref(), x, mode)
    }
}
