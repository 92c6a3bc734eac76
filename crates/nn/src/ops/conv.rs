//! Two-dimensional convolution (cross-correlation, as everywhere in the field).
//!
//! Plain maps go through matrix products (`conv/plain.rs`), blocked ones through loops of their
//! own (`blocked/conv.rs`); options, shapes and the node of the tape are the same. Where one side is blocked, the other is
//! blocked for it, with channels of zeros where its own do not fill blocks; but images, of which these would be most, are
//! not. Depthwise convolutions take maps in either layout (`blocked/depthwise.rs`).

mod plain;

use std::borrow::Cow;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use isqrt_linalg::Kernel;
use rayon::prelude::*;

use super::dims4;
use super::{Activation, through_activation};
use crate::blocked::{self, Lanes, depthwise};
use crate::checkpoint::{Aside, past_the_tape};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{dispatch, lane_sums, read, values};
use crate::error::shape_error;
use crate::tape;
use crate::{Error, Result};

/// Options of a convolution, with PyTorch's defaults. Pairs are (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv {
    /// Distance of output pixels in the input.
    pub stride: (usize, usize),
    /// Zeros added above and below, left and right.
    pub padding: (usize, usize),
    /// Distance of the kernel's pixels in the input.
    pub dilation: (usize, usize),
    /// Parts of the channels that do not see each other: output channels of a part are made of
    /// the input channels of the same part.
    pub groups: usize,
    /// What follows.
    pub activation: Activation,
}

impl Default for Conv {
    fn default() -> Self {
        Self::new(1, 0)
    }
}

impl Conv {
    /// Of this stride and padding, both ways.
    #[must_use]
    pub fn new(stride: usize, padding: usize) -> Self {
        Self {
            stride: (stride, stride),
            padding: (padding, padding),
            dilation: (1, 1),
            groups: 1,
            activation: Activation::None,
        }
    }
}

/// Convolution of `x` with `weight`, plus `bias`.
///
/// # Shapes
/// - `x`: `(batch, in, height, width)`, or blocked ([`super::block`]), and so the result
/// - `weight`: `(out, in / groups, kernel height, kernel width)`
/// - `bias`: `(out)`
/// - returns `(batch, out, height', width')` with
///   `height' = (height + 2·padding − dilation·(kernel − 1) − 1) / stride + 1`
///
/// # Accuracy
/// With blocked maps on either side f32 may take Winograd's convolution (3x3, stride 1; by the shapes, the batch's
/// size too), whose rounding is about twice that of the direct sums (1e-6 in the 2-norm), and where
/// an infinity reaches a tile of 4x4 outputs as NaN.
///
/// # Errors
/// [`Error::Shape`] where these do not fit, padded maps have more than 2²⁰ rows or columns, or
/// outputs of blocked maps would not fill blocks; [`Error::Option`] for a stride, dilation or number
/// of groups of 0.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: Conv) -> Result<Tensor> {
    conv2d_of(x, weight, bias, options, None)
}

/// [`conv2d`] of plain maps into blocked ones, as one node: how a network enters blocks, since
/// images have too few channels for them. Maps with more channels are blocked for it; see there for accuracy.
///
/// # Errors
/// As there; [`Error::Shape`] for output channels that do not fill blocks too.
pub fn conv2d_into_blocks(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv,
) -> Result<Tensor> {
    into_blocks_of(x, weight, bias, options, None)
}

/// [`conv2d`] between some layouts, of a layer whose gradients may go past the tape.
pub(crate) type Convolve =
    fn(&Tensor, &Tensor, Option<&Tensor>, Conv, Option<&Aside>) -> Result<Tensor>;

/// [`conv2d_into_blocks`] of a layer whose gradients may go past the tape.
pub(crate) fn into_blocks_of(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv,
    aside: Option<&Aside>,
) -> Result<Tensor> {
    dims4("conv2d_into_blocks", x)?;
    let [out, ..] = dims4("conv2d weight", weight)?;
    blocked::check_fills("conv2d_into_blocks", "output channels", out, x)?;
    apply(x, weight, bias, (options, true), aside)
}

/// [`conv2d`] of blocked maps into plain ones, of a layer whose gradients may go past the tape: where a network leaves
/// blocks, since so many channels do not fill them.
pub(crate) fn out_of_blocks_of(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv,
    aside: Option<&Aside>,
) -> Result<Tensor> {
    blocked::dims("conv2d", x)?;
    // Channels of zeros are for one group, and at most as many as there are others.
    let width = blocked::width(x.dtype()).unwrap_or(1);
    if options.groups > 1 || 2 * weight.dim(0)? < width {
        return apply(&blocked::unblock(x)?, weight, bias, (options, false), aside);
    }
    apply(x, weight, bias, (options, false), aside)
}

/// [`conv2d`] of a layer whose gradients may go past the tape.
pub(crate) fn conv2d_of(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv,
    aside: Option<&Aside>,
) -> Result<Tensor> {
    if x.rank() == 5 && !blocked::fills_blocks(weight, options.groups) {
        let [out, ..] = dims4("conv2d weight", weight)?;
        blocked::check_fills("conv2d", "output channels", out, x)?;
        return apply(&blocked::unblock(x)?, weight, bias, (options, true), aside);
    }
    apply(x, weight, bias, (options, x.rank() == 5), aside)
}

fn apply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (options, into_blocks): (Conv, bool),
    aside: Option<&Aside>,
) -> Result<Tensor> {
    let shapes = Shapes::new(x, weight, options)?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = ConvOp {
        shapes,
        activation: options.activation,
        into_blocks,
        kernel: Kernel::Auto,
        aside: aside.cloned(),
    };
    let Some(bias) = bias else {
        return Ok(tape::apply2(&x, &weight, op)?);
    };
    if bias.dims() != [shapes.channels.1] {
        return shape_error(
            "conv2d",
            format!(
                "{} output channels need as many values of bias, got {:?}",
                shapes.channels.1,
                bias.dims()
            ),
        );
    }
    Ok(tape::apply3(&x, [&weight, &bias.contiguous()?], op)?)
}

/// A convolution along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Axis {
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
    pub dilation: usize,
}

impl Axis {
    /// From the first place of the kernel to the last one.
    pub(crate) fn reach(self) -> usize {
        (self.kernel - 1) * self.dilation
    }
}

/// What is convolved with what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shapes {
    pub batch: usize,
    /// Channels beside each other: 1, or those of a block.
    pub lanes: usize,
    /// In and out.
    pub channels: (usize, usize),
    pub groups: usize,
    pub rows: Axis,
    pub columns: Axis,
}

impl Shapes {
    pub(crate) fn new(x: &Tensor, weight: &Tensor, options: Conv) -> Result<Self> {
        Self::of(blocked::dims_of_any_layout("conv2d", x)?, weight, options)
    }

    /// For maps with so many channels beside each other, of `(batch, panels, height, width)`.
    pub(crate) fn of(
        (lanes, [batch, panels, height, width]): (usize, [usize; 4]),
        weight: &Tensor,
        options: Conv,
    ) -> Result<Self> {
        let channels = panels * lanes;
        let [out, in_group, kh, kw] = dims4("conv2d weight", weight)?;
        let Conv {
            stride,
            padding,
            dilation,
            groups,
            ..
        } = options;
        for (what, value) in [
            ("convolution stride", stride.0.min(stride.1)),
            ("convolution dilation", dilation.0.min(dilation.1)),
            ("convolution groups", groups),
        ] {
            if value == 0 {
                return Err(Error::Option {
                    what,
                    value: "0".to_owned(),
                    expected: "at least 1",
                });
            }
        }
        let axis = |input: usize, kernel: usize, stride, padding: usize, dilation: usize| {
            let padded = padding.checked_mul(2)?.checked_add(input)?;
            let covered = (kernel - 1).checked_mul(dilation)?.checked_add(1)?;
            // Beyond any image; products of smaller sizes do not overflow.
            let stride = (padded <= 1 << 20).then_some(usize::min(stride, 1 << 21))?;
            Some(Axis {
                input,
                output: padded.checked_sub(covered)? / stride + 1,
                kernel,
                stride,
                padding,
                dilation,
            })
        };
        let rows = axis(height, kh, stride.0, padding.0, dilation.0);
        let columns = axis(width, kw, stride.1, padding.1, dilation.1);
        let depthwise = groups == channels && groups == out;
        // On a GPU a block holds all channels, of whatever number.
        let in_blocks =
            depthwise || weight.device().is_cuda() || (channels / groups).is_multiple_of(lanes);
        let fits = Some(channels) == in_group.checked_mul(groups) && out % groups == 0 && in_blocks;
        match (rows, columns) {
            (Some(rows), Some(columns)) if fits => Ok(Self {
                batch,
                lanes,
                channels: (channels, out),
                groups,
                rows,
                columns,
            }),
            _ => shape_error(
                "conv2d",
                format!(
                    "weight {:?} with padding {padding:?}, dilation {dilation:?} and {groups} \
                     group(s) does not fit input {:?}{}",
                    weight.dims(),
                    [batch, channels, height, width],
                    if lanes > 1 {
                        ", whose channels come in blocks"
                    } else {
                        ""
                    }
                ),
            ),
        }
    }

    /// Whether each of several channels is convolved alone.
    pub(crate) fn is_depthwise(&self) -> bool {
        self.groups > 1 && (self.groups, self.groups) == self.channels
    }

    /// For blocked maps, with more channels where these do not fill blocks, of one group.
    fn filled<T: Lanes>(&self) -> Self {
        let lanes = <T as isqrt_linalg::simd::Element>::WIDTH;
        let (inputs, outputs) = self.channels;
        let channels = (
            inputs.next_multiple_of(lanes),
            outputs.next_multiple_of(lanes),
        );
        Self {
            lanes,
            channels,
            ..*self
        }
    }

    /// The weights for [`filled`](Self::filled) maps.
    fn fill_weight<'a, T: Lanes>(&self, filled: &Self, weight: &'a [T]) -> Cow<'a, [T]> {
        if filled.channels == self.channels {
            return Cow::Borrowed(weight);
        }
        let (from, to) = self.rows_of_weight(filled);
        let mut out = vec![T::ZERO; filled.channels.1 * to];
        for (to, from) in out.chunks_exact_mut(to).zip(weight.chunks_exact(from)) {
            to[..from.len()].copy_from_slice(from);
        }
        Cow::Owned(out)
    }

    /// The inverse of [`fill_weight`](Self::fill_weight).
    fn empty_weight<T: Lanes>(&self, filled: &Self, weight: Vec<T>) -> Vec<T> {
        if filled.channels == self.channels {
            return weight;
        }
        let (to, from) = self.rows_of_weight(filled);
        let rows = weight.chunks_exact(from).take(self.channels.1);
        rows.flat_map(|row| &row[..to]).copied().collect()
    }

    /// What an output channel has of weights, here and there.
    fn rows_of_weight(&self, filled: &Self) -> (usize, usize) {
        let row = |shapes: &Self| shapes.channels.0 / shapes.groups * shapes.taps();
        (row(self), row(filled))
    }

    /// Whether the convolution is by matrix products, between plain maps.
    fn is_plain<T: Lanes>(&self, into_blocks: bool) -> bool {
        let few = self.channels.0 < <T as isqrt_linalg::simd::Element>::WIDTH;
        self.lanes == 1 && (!into_blocks || few || self.groups > 1)
    }

    /// Pixels of an output plane.
    pub(crate) fn pixels(&self) -> usize {
        self.rows.output * self.columns.output
    }

    /// Pixels of an input plane.
    fn in_pixels(&self) -> usize {
        self.rows.input * self.columns.input
    }

    /// Size of an image of the input.
    pub(crate) fn image(&self) -> usize {
        self.channels.0 * self.rows.input * self.columns.input
    }

    /// Size of an image of the output.
    pub(crate) fn out_image(&self) -> usize {
        self.channels.1 * self.pixels()
    }

    pub(crate) fn taps(&self) -> usize {
        self.rows.kernel * self.columns.kernel
    }

    /// Of the output, as a tensor.
    pub(crate) fn shape(&self) -> Shape {
        let (rows, columns, out) = (self.rows.output, self.columns.output, self.channels.1);
        match self.lanes {
            1 => Shape::from((self.batch, out, rows, columns)),
            lanes => Shape::from((self.batch, out / lanes, rows, columns, lanes)),
        }
    }

    /// `bias` and activation after the convolution, where they are wanted.
    pub(crate) fn forward<T: Lanes>(
        &self,
        x: &[T],
        weight: &[T],
        (bias, activation): (Option<&[T]>, Activation),
        into_blocks: bool,
        kernel: Kernel,
    ) -> Vec<T> {
        let ((inputs, outputs), clip) = (self.channels, activation.clip());
        let isa = T::isa(kernel);
        if self.is_depthwise() {
            return depthwise::forward(self, x, weight, (bias, clip), into_blocks, isa);
        }
        if self.is_plain::<T>(into_blocks) {
            let y = plain::forward(self, x, weight, (bias, clip));
            return match into_blocks {
                true => blocked::relayout(&y, (outputs, self.pixels()), true, isa),
                false => y,
            };
        }
        let filled = self.filled::<T>();
        let x = match self.lanes {
            1 => Cow::Owned(blocked::relayout(x, (inputs, self.in_pixels()), true, isa)),
            _ => Cow::Borrowed(x),
        };
        let weight = self.fill_weight(&filled, weight);
        let bias = bias.map(|bias| {
            let mut bias = bias.to_vec();
            bias.resize(filled.channels.1, T::ZERO);
            bias
        });
        let after = (bias.as_deref(), clip);
        let y = blocked::conv::forward(&filled, &x, &weight, after, isa);
        match into_blocks {
            true => y,
            false => blocked::relayout(&y, (outputs, self.pixels()), false, isa),
        }
    }

    /// Gradients of input and weight; of the input only where it is wanted.
    pub(crate) fn backward<T: Lanes>(
        &self,
        x: &[T],
        weight: &[T],
        dy: &[T],
        wants_dx: bool,
        into_blocks: bool,
        kernel: Kernel,
    ) -> (Option<Vec<T>>, Vec<T>) {
        let ((inputs, outputs), pixels) = (self.channels, self.in_pixels());
        let isa = T::isa(kernel);
        if self.is_depthwise() {
            let dw = depthwise::weight_gradient(self, x, dy, into_blocks, isa);
            let dx = || depthwise::input_gradient(self, dy, weight, into_blocks, isa);
            return (wants_dx.then(dx), dw);
        }
        if self.is_plain::<T>(into_blocks) {
            let dy = match into_blocks {
                true => Cow::Owned(blocked::relayout(dy, (outputs, self.pixels()), false, isa)),
                false => Cow::Borrowed(dy),
            };
            return plain::backward(self, x, weight, &dy, wants_dx);
        }
        let filled = self.filled::<T>();
        let x = match self.lanes {
            1 => Cow::Owned(blocked::relayout(x, (inputs, pixels), true, isa)),
            _ => Cow::Borrowed(x),
        };
        let dy = match into_blocks {
            true => Cow::Borrowed(dy),
            false => Cow::Owned(blocked::relayout(dy, (outputs, self.pixels()), true, isa)),
        };
        let dw = blocked::conv::weight_gradient(&filled, &x, &dy, isa);
        let dx = wants_dx.then(|| {
            let weight = self.fill_weight(&filled, weight);
            let dx = blocked::conv::input_gradient(&filled, &dy, &weight, isa);
            match self.lanes {
                1 => blocked::relayout(&dx, (inputs, pixels), false, isa),
                _ => dx,
            }
        });
        (dx, self.empty_weight(&filled, dw))
    }

    /// Sums of each output channel of blocked or plain maps, plane by plane in the order of the images.
    fn bias_gradient<T: Lanes>(&self, dy: &[T], in_blocks: bool) -> Vec<T> {
        let lanes = match in_blocks {
            true => <T as isqrt_linalg::simd::Element>::WIDTH,
            false => 1,
        };
        let mut planes = vec![0.0; self.batch * self.channels.1];
        let dy = dy.par_chunks_exact(self.pixels() * lanes);
        planes
            .par_chunks_exact_mut(lanes)
            .zip(dy)
            .for_each(|(out, dy)| match lanes {
                1 => out[0] = lane_sums([dy], |[d]| [d])[0].to_f64(),
                _ => out.copy_from_slice(&blocked::norm::channel_sums(dy)),
            });
        let sum = |c: usize| planes.iter().skip(c).step_by(self.channels.1).sum();
        (0..self.channels.1).map(|c| T::from_f64(sum(c))).collect()
    }
}

/// The node on the tape, of two tensors or, with a bias, of three.
pub(crate) struct ConvOp {
    pub shapes: Shapes,
    pub activation: Activation,
    /// Whether maps come out blocked.
    pub into_blocks: bool,
    pub kernel: Kernel,
    pub aside: Option<Aside>,
}

impl ConvOp {
    fn forward(
        &self,
        (x, weight): ((&CpuStorage, &Layout), (&CpuStorage, &Layout)),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (y, shape) = dispatch!("conv2d", x.0.dtype(), T => {
            let (x, weight) = (values(x.0, x.1)?, values(weight.0, weight.1)?);
            let bias = bias.map(|(s, l)| values(s, l)).transpose()?;
            let after = (bias, self.activation);
            let y = self.shapes.forward::<T>(x, weight, after, self.into_blocks, self.kernel);
            let lanes = match self.into_blocks {
                true => <T as isqrt_linalg::simd::Element>::WIDTH,
                false => 1,
            };
            Ok((T::to_cpu_storage_owned(y), Shapes { lanes, ..self.shapes }.shape()))
        })?;
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn forward_on_gpu(
        &self,
        (x, weight): ((&CudaStorage, &Layout), (&CudaStorage, &Layout)),
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let activation = self.activation;
        cuda::conv::forward(
            &self.shapes,
            self.into_blocks,
            x,
            weight,
            &cuda::conv::After { bias, activation },
        )
    }

    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        y: &Tensor,
        dy: &Tensor,
        biased: bool,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = through_activation(self.activation, y, dy)?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw, db) = cuda::conv::backward(&self.shapes, (x, weight, &dy), biased)?;
            return Ok((dx, past_the_tape(self.aside.as_ref(), weight, dw)?, db));
        }
        let (xs, ws, dys) = (read(x), read(weight), read(&dy));
        let device = x.device();
        dispatch!("conv2d", x.dtype(), T => {
            let dys = dys.values::<T>()?;
            // The first layer's images need no gradient.
            let wants_dx = x.track_op();
            let (dx, dw) = self.shapes.backward(
                xs.values()?, ws.values()?, dys, wants_dx, self.into_blocks, self.kernel);
            let dw = Tensor::from_vec(dw, weight.shape(), device)?;
            let db = biased.then(|| self.shapes.bias_gradient(dys, self.into_blocks));
            Ok((
                dx.map(|dx| Tensor::from_vec(dx, x.shape(), device)).transpose()?,
                past_the_tape(self.aside.as_ref(), weight, dw)?,
                db.map(|db| Tensor::from_vec(db, self.shapes.channels.1, device)).transpose()?,
            ))
        })
    }
}

impl CustomOp2 for ConvOp {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward(((s1, l1), (s2, l2)), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.forward_on_gpu(((s1, l1), (s2, l2)), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.backward(x, weight, y, dy, false)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for ConvOp {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward(((s1, l1), (s2, l2)), Some((s3, l3)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.forward_on_gpu(((s1, l1), (s2, l2)), Some((s3, l3)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.backward(x, weight, y, dy, true)
    }
}
