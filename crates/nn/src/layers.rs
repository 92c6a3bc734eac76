//! Layers that own parameters or a place in the network: an op of [`crate::ops`] with its weights,
//! or with its stream of random numbers.

use std::sync::Arc;

use candle_core::Tensor;

use crate::blocked::conv_norm_of;
use crate::checkpoint::Aside;
use crate::error::shape_error;
use crate::ops::{self, Activation, BatchNorm as Norm, Conv, MaskKey};
use crate::record::{note, note_op, wants_values};
use crate::vars::Source;
use crate::{Error, Init, Mode, Result, Scope};

pub use crate::checkpoint::GradientCheckpoint;

/// A convolution with a square kernel, without or with bias.
#[derive(Debug, Clone)]
pub struct Conv2d {
    path: Arc<str>,
    weight: Tensor,
    bias: Option<Tensor>,
    options: Conv,
    aside: Aside,
}

impl Conv2d {
    /// Kaiming fan-out initial weights, no bias; parameter `weight`.
    ///
    /// # Errors
    /// As [`with_bias`](Self::with_bias).
    pub fn new(
        scope: Scope<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: Conv,
    ) -> Result<Self> {
        Self::build(
            scope,
            (inputs, outputs),
            kernel,
            options,
            (Init::KaimingFanOut, None),
        )
    }

    /// As given by `init`: weights, bias; parameters `weight`, `bias`.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the scope has such names already, [`Error::Shape`] for channels
    /// that cannot be shared out among the groups.
    pub fn with_bias(
        scope: Scope<'_>,
        channels: (usize, usize),
        kernel: usize,
        options: Conv,
        init: (Init, Init),
    ) -> Result<Self> {
        Self::build(scope, channels, kernel, options, (init.0, Some(init.1)))
    }

    fn build(
        mut scope: Scope<'_>,
        (inputs, outputs): (usize, usize),
        kernel: usize,
        options: Conv,
        (weight, bias): (Init, Option<Init>),
    ) -> Result<Self> {
        let groups = options.groups.max(1);
        if inputs % groups != 0 || outputs % groups != 0 {
            return shape_error(
                "conv2d",
                format!("{inputs} to {outputs} channels cannot be shared among {groups} groups"),
            );
        }
        let shape = [outputs, inputs / groups, kernel, kernel];
        let weight = scope.parameter("weight", &shape, weight)?;
        let bias = bias.map(|init| scope.parameter("bias", &[outputs], init));
        Ok(Self {
            path: scope.name(),
            weight,
            bias: bias.transpose()?,
            options,
            aside: scope.aside(),
        })
    }

    /// See [`ops::conv2d`].
    ///
    /// # Errors
    /// As there.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(ops::conv2d_of, x)
    }

    /// See [`ops::conv2d_into_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn forward_into_blocks(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(ops::into_blocks_of, x)
    }

    /// Of blocked maps, plain: for channels that do not fill blocks.
    fn forward_out_of_blocks(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(ops::out_of_blocks_of, x)
    }

    fn forward_by(&self, convolve: ops::Convolve, x: &Tensor) -> Result<Tensor> {
        let (bias, aside) = (self.bias.as_ref(), Some(&self.aside));
        let y = convolve(x, &self.weight, bias, self.options, aside)?;
        self.note(&y);
        Ok(y)
    }

    /// For the record of a pass, where one is made.
    fn note(&self, y: &Tensor) {
        note("conv2d", y, || {
            let (weight, bias) = (self.weight.elem_count(), self.bias.as_ref());
            let products = y.elem_count() as u64 * (weight / self.outputs().max(1)) as u64;
            let parameters = weight + bias.map_or(0, Tensor::elem_count);
            (Arc::clone(&self.path), parameters, products)
        });
    }

    /// Channels of the result.
    fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }
}

/// Batch normalisation with its scale, shift and running statistics.
#[derive(Debug, Clone)]
pub struct BatchNorm2d {
    path: Arc<str>,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
}

impl BatchNorm2d {
    /// Scale 1, shift 0, momentum 0.1, ε 1e-5; parameters `weight`, `bias`; buffers
    /// `running_mean`, `running_var`. The activation follows in the same node.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] where the scope has such names already.
    pub fn new(scope: Scope<'_>, channels: usize, activation: Activation) -> Result<Self> {
        Self::with_scale(scope, channels, activation, 1.0)
    }

    fn with_scale(
        mut scope: Scope<'_>,
        channels: usize,
        activation: Activation,
        scale: f64,
    ) -> Result<Self> {
        Ok(Self {
            path: scope.name(),
            weight: scope.parameter("weight", &[channels], Init::Constant(scale))?,
            bias: scope.parameter("bias", &[channels], Init::Constant(0.0))?,
            norm: Norm {
                running_mean: scope.buffer("running_mean", &[channels], 0.0)?,
                running_var: scope.buffer("running_var", &[channels], 1.0)?,
                momentum: 0.1,
                epsilon: 1e-5,
                activation,
            },
        })
    }

    /// See [`ops::batch_norm`].
    ///
    /// # Errors
    /// As there.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = ops::batch_norm(x, &self.weight, &self.bias, &self.norm, mode)?;
        self.note(&y);
        Ok(y)
    }

    /// For the record of a pass, where one is made.
    fn note(&self, y: &Tensor) {
        note("batch_norm", y, || {
            let parameters = self.weight.elem_count() + self.bias.elem_count();
            (Arc::clone(&self.path), parameters, 0)
        });
    }
}

/// A convolution, its batch normalisation and an activation: the brick of every backbone.
#[derive(Debug, Clone)]
pub struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm2d,
}

impl ConvNorm {
    /// Padding keeps the size for stride 1 (`kernel / 2`). The names of its two parts are
    /// `{conv}` and `{norm}`.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] where the scope has such names already.
    pub fn new(
        scope: &mut Scope<'_>,
        names: (&str, &str),
        (inputs, outputs): (usize, usize),
        kernel: usize,
        stride: usize,
        activation: Activation,
    ) -> Result<Self> {
        let options = Conv::new(stride, kernel / 2);
        Self::build(
            scope,
            names,
            (inputs, outputs),
            kernel,
            options,
            (activation, 1.0),
        )
    }

    /// The same without activation and with a norm that gives zeros at first: at the end of a residual
    /// branch it makes the block begin as its shortcut (Goyal et al. 2017, section 5.1).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_zero(
        scope: &mut Scope<'_>,
        names: (&str, &str),
        (inputs, outputs): (usize, usize),
        kernel: usize,
        stride: usize,
    ) -> Result<Self> {
        let options = Conv::new(stride, kernel / 2);
        Self::build(
            scope,
            names,
            (inputs, outputs),
            kernel,
            options,
            (Activation::None, 0.0),
        )
    }

    /// The same, each channel alone: a depthwise convolution.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn depthwise(
        scope: &mut Scope<'_>,
        names: (&str, &str),
        channels: usize,
        kernel: usize,
        stride: usize,
        activation: Activation,
    ) -> Result<Self> {
        let options = Conv {
            groups: channels,
            ..Conv::new(stride, kernel / 2)
        };
        Self::build(
            scope,
            names,
            (channels, channels),
            kernel,
            options,
            (activation, 1.0),
        )
    }

    fn build(
        scope: &mut Scope<'_>,
        names: (&str, &str),
        (inputs, outputs): (usize, usize),
        kernel: usize,
        options: Conv,
        (activation, scale): (Activation, f64),
    ) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::new(scope.sub(names.0), inputs, outputs, kernel, options)?,
            norm: BatchNorm2d::with_scale(scope.sub(names.1), outputs, activation, scale)?,
        })
    }

    /// Channels of the result.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.conv.outputs()
    }

    #[cfg(feature = "cuda")]
    fn layer(&self) -> crate::cuda::residual::Layer<'_> {
        let (conv, norm) = (&self.conv, &self.norm);
        crate::cuda::residual::Layer {
            weight: &conv.weight,
            options: conv.options,
            affine: (&norm.weight, &norm.bias),
            norm: &norm.norm,
            aside: &conv.aside,
        }
    }

    /// Convolution, normalisation, activation.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where the input does not fit.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        if !wants_values() {
            let (conv, norm) = (&self.conv, &self.norm);
            let affine = (&norm.weight, &norm.bias);
            let (norm, aside) = ((&norm.norm, mode), Some(&conv.aside));
            let y = conv_norm_of(x, &conv.weight, conv.options, affine, norm, aside)?;
            // One node or two; in training the convolution's output is kept as well.
            conv.note(&y);
            self.norm.note(&y);
            return Ok(y);
        }
        self.norm.forward(&self.conv.forward(x)?, mode)
    }

    /// The same of plain maps, blocked: see [`ops::conv2d_into_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn forward_into_blocks(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward_into_blocks(x)?, mode)
    }

    /// The same of maps in either layout: blocked where the channels of the result fill blocks, else
    /// plain. For networks in which only some do.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_in_any_layout(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        match (ops::is_blocked(x), ops::can_block(self.outputs(), x)) {
            (false, true) => self.forward_into_blocks(x, mode),
            (true, false) => self
                .norm
                .forward(&self.conv.forward_out_of_blocks(x)?, mode),
            _ => self.forward(x, mode),
        }
    }
}

/// The end of a residual block is the sum of a branch and a shortcut, rectified: of `convs`, one after the
/// other, and of `shortcut`, or of `x` itself.
///
/// On a GPU a block that learns is one node of the tape, whose backward pass must be
/// [`Vars::backward`](crate::Vars::backward).
///
/// # Errors
/// [`crate::Error::Shape`] where input or sum do not fit.
pub fn residual(
    convs: &[ConvNorm],
    shortcut: Option<&ConvNorm>,
    x: &Tensor,
    mode: Mode,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && ops::is_blocked(x)
        && x.track_op()
        && mode != Mode::Eval
        && convs
            .last()
            .is_some_and(|last| last.norm.norm.activation == Activation::None)
        && !crate::record::is_recorded()
    {
        let layers: Vec<_> = convs.iter().map(ConvNorm::layer).collect();
        return crate::cuda::residual::forward(x, &layers, shortcut.map(ConvNorm::layer), mode);
    }
    let mut y = x.clone();
    for conv in convs {
        y = conv.forward(&y, mode)?;
    }
    match shortcut {
        Some(shortcut) => ops::add_relu(&y, &shortcut.forward(x, mode)?),
        None => ops::add_relu(&y, x),
    }
}

/// A linear layer with bias.
#[derive(Debug, Clone)]
pub struct Linear {
    path: Arc<str>,
    weight: Tensor,
    bias: Tensor,
    aside: Aside,
}

impl Linear {
    /// Uniform initial weights within `±1/√inputs` and bias too, as in PyTorch; parameters
    /// `weight`, `bias`.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] where the scope has such names already.
    pub fn new(mut scope: Scope<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        let bound = 1.0 / (inputs.max(1) as f64).sqrt();
        Ok(Self {
            path: scope.name(),
            weight: scope.parameter("weight", &[outputs, inputs], Init::UniformFanIn)?,
            bias: scope.parameter("bias", &[outputs], Init::Uniform(bound))?,
            aside: scope.aside(),
        })
    }

    /// See [`ops::linear`].
    ///
    /// # Errors
    /// As there.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::linear_of(x, &self.weight, &self.bias, Some(&self.aside))?;
        note("linear", &y, || {
            let (weight, bias) = (self.weight.elem_count(), self.bias.elem_count());
            let products = y.dims()[0] as u64 * weight as u64;
            (Arc::clone(&self.path), weight + bias, products)
        });
        Ok(y)
    }
}

/// Dropout with a mask of its own, made from the seed, the layer's name and the step.
#[derive(Debug, Clone)]
pub struct Dropout {
    p: f64,
    source: Source,
}

impl Dropout {
    /// Drops each value with probability `p`. No parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for a `p` outside of `[0, 1)`, [`Error::Duplicate`] where the scope has a
    /// source of random numbers already.
    pub fn new(mut scope: Scope<'_>, p: f64) -> Result<Self> {
        ops::dropout::check(p)?;
        Ok(Self {
            p,
            source: scope.source()?,
        })
    }

    /// See [`ops::dropout()`].
    ///
    /// # Errors
    /// [`Error::State`] in training before [`Vars::set_step`](crate::Vars::set_step): every step
    /// would have the same mask.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = ops::dropout(x, self.p, self.source.mask_key(mode)?, mode)?;
        note_op("dropout", &y);
        Ok(y)
    }
}

/// Dropout of whole channels, with a probability that each call gives; the mask as that of
/// [`Dropout`].
#[derive(Debug, Clone)]
pub struct ChannelDropout {
    source: Source,
}

impl ChannelDropout {
    /// No parameters.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the scope has a source of random numbers already.
    pub fn new(mut scope: Scope<'_>) -> Result<Self> {
        Ok(Self {
            source: scope.source()?,
        })
    }

    /// In training, zeroes each channel of each image `(batch, channels, ...)` with probability `p` and
    /// divides the others by `1 - p`, as PyTorch's `Dropout2d`; for `p = 1`, all of them. In evaluation,
    /// `x` itself.
    ///
    /// # Errors
    /// [`Error::Option`] for a `p` outside of `[0, 1]`, [`Error::Shape`] for an `x` without channels;
    /// [`Error::State`] as [`Dropout::forward`].
    pub fn forward(&self, x: &Tensor, p: f64, mode: Mode) -> Result<Tensor> {
        if p != 1.0 {
            ops::dropout::check(p)?;
        }
        let [batch, channels, rest @ ..] = x.dims() else {
            return shape_error(
                "channel dropout",
                format!("expects (batch, channels, ...), got {:?}", x.dims()),
            );
        };
        let key = self.source.mask_key(mode)?;
        if !mode.is_training() {
            return Ok(x.clone());
        }
        if p == 1.0 {
            return Ok((x * 0.0)?);
        }
        let ones = rest.iter().map(|_| 1);
        let shape: Vec<usize> = [*batch, *channels].into_iter().chain(ones).collect();
        let ones = Tensor::ones(shape, x.dtype(), x.device())?;
        Ok(x.broadcast_mul(&ops::dropout(&ones, p, key, mode)?)?)
    }
}

impl Source {
    /// What the mask of this pass is made from.
    ///
    /// # Errors
    /// [`Error::State`] in training before the step is set.
    fn mask_key(&self, mode: Mode) -> Result<MaskKey> {
        let step = match self.step.get() {
            Some(step) => step,
            None if !mode.is_training() => 0,
            None => {
                return Err(Error::State {
                    what: "dropout",
                    message: "the step is not set: call Vars::set_step before each training pass"
                        .to_owned(),
                });
            }
        };
        let (seed, layer) = (self.seed, self.layer);
        Ok(MaskKey { seed, layer, step })
    }
}
