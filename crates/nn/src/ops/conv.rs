//! Two-dimensional convolution (cross-correlation, as everywhere in the field).
//!
//! Plain maps go through matrix products (`conv/plain.rs`), blocked ones through loops of their
//! own (`blocked/conv.rs`); options, shapes and the node of the tape are the same. A depthwise
//! convolution of plain maps would be products of one row: its maps are blocked for it, with channels
//! of zeros where theirs do not fill blocks.

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
use super::relu::backward as through_relu;
use crate::blocked::{self, Lanes};
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
    /// Whether a ReLU follows, with derivative 0 at 0.
    pub relu: bool,
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
            relu: false,
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
/// Blocked maps in f32 may take Winograd's convolution (3x3, stride 1; by the shapes, the batch's
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
/// images have too few channels for them.
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
        let y = conv2d_of(&blocked::unblock(x)?, weight, bias, options, aside)?;
        return blocked::block(&y);
    }
    apply(x, weight, bias, (options, false), aside)
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
        relu: options.relu,
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
        let in_blocks = depthwise
            || weight.device().is_cuda()
            || (channels / groups).is_multiple_of(lanes) && (out / groups).is_multiple_of(lanes);
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

    /// A depthwise convolution with more channels, so many that they fill blocks.
    fn filled<T: Lanes>(&self) -> Self {
        let lanes = <T as isqrt_linalg::simd::Element>::WIDTH;
        let channels = self.channels.0.next_multiple_of(lanes);
        Self {
            lanes,
            channels: (channels, channels),
            groups: channels,
            ..*self
        }
    }

    /// Plain maps of `pixels` as those of `filled`, blocked.
    fn fill<T: Lanes>(&self, filled: &Self, x: &[T], pixels: usize) -> Vec<T> {
        let (from, to) = (self.channels.0 * pixels, filled.channels.0 * pixels);
        blocked::relayout(&resized(x, from, to), pixels, true)
    }

    /// The inverse of [`fill`](Self::fill).
    fn empty<T: Lanes>(&self, filled: &Self, y: &[T], pixels: usize) -> Vec<T> {
        let (from, to) = (filled.channels.0 * pixels, self.channels.0 * pixels);
        resized(&blocked::relayout(y, pixels, false), from, to).into_owned()
    }

    /// Pixels of an output plane.
    pub(crate) fn pixels(&self) -> usize {
        self.rows.output * self.columns.output
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

    /// `bias` and ReLU after the convolution, where they are wanted.
    pub(crate) fn forward<T: Lanes>(
        &self,
        x: &[T],
        weight: &[T],
        (bias, relu): (Option<&[T]>, bool),
        kernel: Kernel,
    ) -> Vec<T> {
        match self.lanes {
            1 if self.is_depthwise() => {
                let (filled, channels) = (self.filled::<T>(), self.channels.0);
                let x = self.fill(&filled, x, self.rows.input * self.columns.input);
                let taps = self.taps();
                let weight = resized(weight, channels * taps, filled.groups * taps);
                let bias = bias.map(|bias| resized(bias, channels, filled.groups));
                let y = filled.forward(&x, &weight, (bias.as_deref(), relu), kernel);
                self.empty(&filled, &y, self.pixels())
            }
            1 => plain::forward(self, x, weight, (bias, relu)),
            _ => blocked::conv::forward(self, x, weight, (bias, relu), T::isa(kernel)),
        }
    }

    /// Gradients of input and weight; of the input only where it is wanted.
    pub(crate) fn backward<T: Lanes>(
        &self,
        x: &[T],
        weight: &[T],
        dy: &[T],
        wants_dx: bool,
        kernel: Kernel,
    ) -> (Option<Vec<T>>, Vec<T>) {
        if self.lanes == 1 && self.is_depthwise() {
            let (filled, channels) = (self.filled::<T>(), self.channels.0);
            let (plane, taps) = (self.rows.input * self.columns.input, self.taps());
            let x = self.fill(&filled, x, plane);
            let dy = self.fill(&filled, dy, self.pixels());
            let (from, to) = (channels * taps, filled.groups * taps);
            let weight = resized(weight, from, to);
            let (dx, dw) = filled.backward(&x, &weight, &dy, wants_dx, kernel);
            let dx = dx.map(|dx| self.empty(&filled, &dx, plane));
            return (dx, resized(&dw, to, from).into_owned());
        }
        if self.lanes == 1 {
            return plain::backward(self, x, weight, dy, wants_dx);
        }
        let isa = T::isa(kernel);
        let dw = blocked::conv::weight_gradient(self, x, dy, isa);
        let dx = wants_dx.then(|| blocked::conv::input_gradient(self, dy, weight, isa));
        (dx, dw)
    }

    /// Sums of each output channel, plane by plane in the order of the images.
    fn bias_gradient<T: Lanes>(&self, dy: &[T]) -> Vec<T> {
        let mut planes = vec![0.0; self.batch * self.channels.1];
        let dy = dy.par_chunks_exact(self.pixels() * self.lanes);
        planes
            .par_chunks_exact_mut(self.lanes)
            .zip(dy)
            .for_each(|(out, dy)| match self.lanes {
                1 => out[0] = lane_sums([dy], |[d]| [d])[0].to_f64(),
                _ => out.copy_from_slice(&blocked::norm::channel_sums(dy)),
            });
        let sum = |c: usize| planes.iter().skip(c).step_by(self.channels.1).sum();
        (0..self.channels.1).map(|c| T::from_f64(sum(c))).collect()
    }
}

/// Rows of `from` values with `to` of them each: the first ones, or zeros after them.
fn resized<T: Lanes>(values: &[T], from: usize, to: usize) -> Cow<'_, [T]> {
    if from == to {
        return Cow::Borrowed(values);
    }
    let mut out = Vec::with_capacity(values.len() / from.max(1) * to);
    for (i, row) in (1..).zip(values.chunks_exact(from)) {
        out.extend_from_slice(&row[..from.min(to)]);
        out.resize(i * to, T::from_f64(0.0));
    }
    Cow::Owned(out)
}

/// The node on the tape, of two tensors or, with a bias, of three.
pub(crate) struct ConvOp {
    pub shapes: Shapes,
    pub relu: bool,
    /// Whether plain maps come out blocked.
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
            let mut y = self.shapes.forward::<T>(x, weight, (bias, self.relu), self.kernel);
            let mut shape = self.shapes.shape();
            if self.into_blocks {
                y = blocked::relayout(&y, self.shapes.pixels(), true);
                let lanes = <T as isqrt_linalg::simd::Element>::WIDTH;
                shape = Shapes { lanes, ..self.shapes }.shape();
            }
            Ok((T::to_cpu_storage_owned(y), shape))
        })?;
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn forward_on_gpu(
        &self,
        (x, weight): ((&CudaStorage, &Layout), (&CudaStorage, &Layout)),
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let last = self.into_blocks || x.1.dims().len() == 5;
        let relu = self.relu;
        cuda::conv::forward(
            &self.shapes,
            last,
            x,
            weight,
            &cuda::conv::After { bias, relu },
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
        let dy = if self.relu {
            through_relu(y, dy)?
        } else {
            dy.contiguous()?
        };
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw, db) = cuda::conv::backward(&self.shapes, (x, weight, &dy), biased)?;
            return Ok((dx, past_the_tape(self.aside.as_ref(), weight, dw)?, db));
        }
        let (xs, ws, dys) = (read(x), read(weight), read(&dy));
        let device = x.device();
        dispatch!("conv2d", x.dtype(), T => {
            let mut dys = Cow::Borrowed(dys.values::<T>()?);
            if self.into_blocks {
                dys = Cow::Owned(blocked::relayout(&dys, self.shapes.pixels(), false));
            }
            // The first layer's images need no gradient.
            let wants_dx = x.track_op();
            let (dx, dw) =
                self.shapes.backward(xs.values()?, ws.values()?, &dys, wants_dx, self.kernel);
            let dw = Tensor::from_vec(dw, weight.shape(), device)?;
            let db = biased.then(|| self.shapes.bias_gradient(&dys));
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
