//! Convolutions: products by cuDNN, what is around them by kernels of ours.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Tensor, WithDType};
use isqrt_device::cuda::kernels::CONVOLUTION;
use isqrt_device::cuda::{
    Along, Convolution, Grid, Output, Pass, Real, address, can_convolve, convolve, input, int,
    long, pointer,
};

use super::norm::{Extent, channel_sums};
use super::{Maps, Operand, allocate, clip, device_of, of_maps, run};
use crate::blocked::is_blocked;
use crate::ops::{Activation, ConvAxis, ConvShapes};

const OP: &str = "conv2d";

/// A convolution in the layout that cuDNN gets.
struct Native<'a> {
    device: &'a CudaDevice,
    shapes: &'a ConvShapes,
    last: bool,
}

impl<'a> Native<'a> {
    /// For a pass over maps that have the channels of a pixel beside each other (`last`) or not. What cuDNN
    /// does not take so is turned before and after: f64, and where it has no algorithm.
    fn new<T: Real>(
        device: &'a CudaDevice,
        shapes: &'a ConvShapes,
        last: bool,
        pass: Pass,
    ) -> Result<Self> {
        let mut native = Self {
            device,
            shapes,
            last: last && T::DTYPE != DType::F64,
        };
        if native.last {
            native.last = can_convolve::<T>(device, &native.convolution(), pass)?;
        }
        Ok(native)
    }

    fn convolution(&self) -> Convolution {
        let along = |a: ConvAxis| Along {
            input: a.input,
            output: a.output,
            kernel: a.kernel,
            stride: a.stride,
            padding: a.padding,
            dilation: a.dilation,
        };
        Convolution {
            batch: self.shapes.batch,
            channels: self.shapes.channels,
            groups: self.shapes.groups,
            rows: along(self.shapes.rows),
            columns: along(self.shapes.columns),
            channels_last: self.last,
        }
    }

    /// Whether a pass must be made once more with turned maps: cuDNN had algorithms for channels last by its
    /// ranking alone, and has refused them all now.
    fn gives_way<T: Maps>(&self, pass: Pass, ran: &Result<()>) -> Result<bool> {
        Ok(
            ran.is_err()
                && self.last
                && !can_convolve::<T>(self.device, &self.convolution(), pass)?,
        )
    }

    /// # Safety
    /// Addresses of input, packed filter and output, see [`convolve`].
    unsafe fn run<T: Maps>(&self, pass: Pass, operands: (u64, u64, u64)) -> Result<()> {
        // SAFETY: the caller vouches for the operands.
        unsafe { convolve::<T>(self.device, &self.convolution(), pass, operands, false) }
    }

    /// Values of the filter, its inputs and taps; one input where nothing is turned.
    fn filter(&self) -> (usize, usize, usize) {
        let (inputs, taps) = (
            self.shapes.channels.0 / self.shapes.groups,
            self.shapes.taps(),
        );
        let count = self.shapes.channels.1 * inputs * taps;
        match self.last && taps > 1 {
            true => (count, inputs, taps),
            false => (count, 1, taps),
        }
    }

    /// The filter as cuDNN gets it: where it lies, and what holds it.
    fn packed<T: Maps>(&self, weight: u64) -> Result<(u64, Option<Output<T>>)> {
        let (count, inputs, taps) = self.filter();
        if T::DTYPE == T::Parameter::DTYPE && inputs == 1 {
            return Ok((weight, None));
        }
        let packed = allocate::<T>(OP, self.device, &[count])?;
        let arguments = [
            pointer(weight),
            pointer(packed.at()),
            long(count),
            int(inputs),
            int(taps),
        ];
        run::<T>(
            self.device,
            &CONVOLUTION,
            "pack_filter",
            Grid::over(count),
            &arguments,
        )?;
        Ok((packed.at(), Some(packed)))
    }

    /// Maps of channels and pixels in this layout: where they lie, and what holds them.
    fn turned<T: Real>(
        &self,
        at: u64,
        last: bool,
        (channels, pixels): (usize, usize),
    ) -> Result<(u64, Option<Output<T>>)> {
        if last == self.last {
            return Ok((at, None));
        }
        let turned = turn::<T>(self.device, at, self.shapes.batch, (channels, pixels), last)?;
        Ok((turned.at(), Some(turned)))
    }

    fn input_extent(&self) -> (usize, usize) {
        let pixels = self.shapes.rows.input * self.shapes.columns.input;
        (self.shapes.channels.0, pixels)
    }

    fn output_extent(&self) -> (usize, usize) {
        (self.shapes.channels.1, self.shapes.pixels())
    }

    fn output<T: Real>(&self) -> Result<Output<T>> {
        let (channels, pixels) = self.output_extent();
        allocate(OP, self.device, &[self.shapes.batch, channels, pixels])
    }
}

/// Maps with the channels of a pixel beside each other (`last`) as such with the pixels of a channel
/// beside each other, or the other way round.
fn turn<T: Real>(
    device: &CudaDevice,
    at: u64,
    batch: usize,
    (channels, pixels): (usize, usize),
    last: bool,
) -> Result<Output<T>> {
    let (rows, columns) = if last {
        (pixels, channels)
    } else {
        (channels, pixels)
    };
    let to = allocate::<T>(OP, device, &[batch, channels, pixels])?;
    let across = columns.div_ceil(32);
    // Blocks along y are at most 65535.
    const MOST: usize = 65535;
    for first in (0..batch).step_by(MOST) {
        let offset = (first * channels * pixels * size_of::<T>()) as u64;
        let grid = Grid {
            blocks: (across * rows.div_ceil(32), MOST.min(batch - first), 1),
            threads: 256,
            shared: 0,
        };
        let arguments = [
            pointer(at + offset),
            pointer(to.at() + offset),
            int(rows),
            int(columns),
            int(across),
        ];
        run::<T>(device, &CONVOLUTION, "transpose", grid, &arguments)?;
    }
    Ok(to)
}

/// Feature maps in the other layout: `(batch, channels, height, width)` and
/// `(batch, 1, height, width, channels)`.
pub(crate) fn relayout((s, l): Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let (last, [batch, channels, height, width]) = match *l.dims() {
        [b, 1, h, w, c] => (true, [b, c, h, w]),
        [b, c, h, w] => (false, [b, c, h, w]),
        ref other => candle_core::bail!("relayout: {other:?} are no feature maps"),
    };
    let turned = of_maps!("relayout", s.dtype(), T => {
        let x = input::<T>(s, l)?;
        let turned = turn::<T>(s.device(), x.at, batch, (channels, height * width), last)?;
        Ok(turned.into_storage())
    })?;
    let shape = match last {
        true => Shape::from((batch, channels, height, width)),
        false => Shape::from((batch, 1, height, width, channels)),
    };
    Ok((turned, shape))
}

/// The shape of the output.
fn shape(shapes: &ConvShapes, last: bool) -> Shape {
    let (b, c) = (shapes.batch, shapes.channels.1);
    let (h, w) = (shapes.rows.output, shapes.columns.output);
    match last {
        true => Shape::from((b, 1, h, w, c)),
        false => Shape::from((b, c, h, w)),
    }
}

/// Bias and activation after a convolution.
pub(crate) struct After<'a> {
    pub bias: Option<Operand<'a>>,
    pub activation: Activation,
}

/// A convolution; the result has the channels of a pixel beside each other (`last`) or not.
pub(crate) fn forward(
    shapes: &ConvShapes,
    last: bool,
    (x, lx): Operand<'_>,
    (w, lw): Operand<'_>,
    after: &After<'_>,
) -> Result<(CudaStorage, Shape)> {
    let y = of_maps!(OP, x.dtype(), T => {
        let (xs, ws) = (input::<T>(x, lx)?, parameter::<T>((w, lw))?);
        let bias = after.bias.map(parameter::<T>).transpose()?;
        let y = forward_of::<T>(x.device(), shapes, (lx.dims().len() == 5, last), (xs.at, ws), (bias, after.activation))?;
        Ok(y.into_storage())
    })?;
    Ok((y, shape(shapes, last)))
}

/// Where a parameter of maps of type `T` lies.
pub(crate) fn parameter<T: Maps>((s, l): Operand<'_>) -> Result<u64> {
    Ok(input::<T::Parameter>(s, l)?.at)
}

/// [`forward`] of addresses; of input and output is told whether channels are last.
pub(crate) fn forward_of<T: Maps>(
    device: &CudaDevice,
    shapes: &ConvShapes,
    (x_last, last): (bool, bool),
    from: (u64, u64),
    (bias, activation): (Option<u64>, Activation),
) -> Result<Output<T>> {
    let native = Native::new::<T>(device, shapes, last, Pass::Forward)?;
    let (x, _x) = native.turned::<T>(from.0, x_last, native.input_extent())?;
    let (weight, _weight) = native.packed::<T>(from.1)?;
    let mut y = native.output::<T>()?;
    // SAFETY: all of it was made for these shapes.
    let ran = unsafe { native.run::<T>(Pass::Forward, (x, weight, y.at())) };
    if native.gives_way::<T>(Pass::Forward, &ran)? {
        return forward_of(device, shapes, (x_last, last), from, (bias, activation));
    }
    ran?;
    let (channels, pixels) = native.output_extent();
    if bias.is_some() || activation != Activation::None {
        let [clips, upper] = clip(activation);
        let arguments = [
            pointer(y.at()),
            pointer(bias.unwrap_or(0)),
            long(y.len()),
            int(channels),
            int(if native.last { 1 } else { pixels }),
            clips,
            upper,
        ];
        run::<T>(
            device,
            &CONVOLUTION,
            "add_bias",
            Grid::over(y.len()),
            &arguments,
        )?;
    }
    if native.last != last {
        y = turn::<T>(
            device,
            y.at(),
            shapes.batch,
            (channels, pixels),
            native.last,
        )?;
    }
    Ok(y)
}

/// The gradient of the input, from that of the output.
pub(crate) fn input_gradient<T: Maps>(
    device: &CudaDevice,
    shapes: &ConvShapes,
    (x_last, last): (bool, bool),
    from: (u64, u64),
) -> Result<Output<T>> {
    let native = Native::new::<T>(device, shapes, last, Pass::Input)?;
    let (weight, _weight) = native.packed::<T>(from.0)?;
    let (dy, _dy) = native.turned::<T>(from.1, last, native.output_extent())?;
    let (channels, pixels) = native.input_extent();
    let dx = allocate::<T>(OP, device, &[shapes.batch, channels, pixels])?;
    // SAFETY: all of it was made for these shapes.
    let ran = unsafe { native.run::<T>(Pass::Input, (dx.at(), weight, dy)) };
    if native.gives_way::<T>(Pass::Input, &ran)? {
        return input_gradient(device, shapes, (x_last, last), from);
    }
    ran?;
    match native.last == x_last {
        true => Ok(dx),
        false => turn(
            device,
            dx.at(),
            shapes.batch,
            (channels, pixels),
            native.last,
        ),
    }
}

/// Adds the gradient of the input to what is there.
pub(crate) fn add_input_gradient<T: Maps>(
    device: &CudaDevice,
    shapes: &ConvShapes,
    from: (u64, u64),
    sum: &Output<T>,
) -> Result<()> {
    let native = Native::new::<T>(device, shapes, true, Pass::Input)?;
    if native.last {
        let (weight, _weight) = native.packed::<T>(from.0)?;
        let (convolution, operands) = (native.convolution(), (sum.at(), weight, from.1));
        // SAFETY: all of it was made for these shapes.
        let ran = unsafe { convolve::<T>(device, &convolution, Pass::Input, operands, true) };
        if !native.gives_way::<T>(Pass::Input, &ran)? {
            return ran;
        }
    }
    let dx = input_gradient::<T>(device, shapes, (true, true), from)?;
    let arguments = [pointer(dx.at()), pointer(sum.at()), long(dx.len())];
    run::<T>(
        device,
        &CONVOLUTION,
        "add_to",
        Grid::over(dx.len()),
        &arguments,
    )
}

/// The gradient of the filter, in the type of the parameters.
pub(crate) fn weight_gradient<T: Maps>(
    device: &CudaDevice,
    shapes: &ConvShapes,
    (x_last, last): (bool, bool),
    from: (u64, u64),
) -> Result<Output<T::Parameter>> {
    let native = Native::new::<T>(device, shapes, last, Pass::Filter)?;
    let (x, _x) = native.turned::<T>(from.0, x_last, native.input_extent())?;
    let (dy, _dy) = native.turned::<T>(from.1, last, native.output_extent())?;
    let (count, inputs, taps) = native.filter();
    let dw = allocate::<T::Parameter>(OP, device, &[count])?;
    let packed = match T::DTYPE == T::Parameter::DTYPE && inputs == 1 {
        true => None,
        false => Some(allocate::<T>(OP, device, &[count])?),
    };
    let to = packed.as_ref().map_or(dw.at(), Output::at);
    // SAFETY: all of it was made for these shapes.
    let ran = unsafe { native.run::<T>(Pass::Filter, (x, to, dy)) };
    if native.gives_way::<T>(Pass::Filter, &ran)? {
        return weight_gradient::<T>(device, shapes, (x_last, last), from);
    }
    ran?;
    let Some(packed) = packed else {
        return Ok(dw);
    };
    let arguments = [
        pointer(packed.at()),
        pointer(dw.at()),
        long(count),
        int(inputs),
        int(taps),
    ];
    run::<T>(
        device,
        &CONVOLUTION,
        "unpack_filter",
        Grid::over(count),
        &arguments,
    )?;
    Ok(dw)
}

/// Gradients of input (where it is wanted), filter and bias (where there is one).
pub(crate) fn backward(
    shapes: &ConvShapes,
    (x, weight, dy): (&Tensor, &Tensor, &Tensor),
    biased: bool,
) -> Result<(Option<Tensor>, Tensor, Option<Tensor>)> {
    let (device, last) = (device_of(x)?, is_blocked(dy));
    let layouts = (is_blocked(x), last);
    of_maps!(OP, x.dtype(), T => {
        let (at, up) = (address::<T>(x)?, address::<T>(dy)?);
        let w = address::<<T as Maps>::Parameter>(weight)?;
        let dx = match x.track_op() {
            true => Some(input_gradient::<T>(device, shapes, layouts, (w, up))?.into_tensor(x.shape())),
            false => None,
        };
        let dw = weight_gradient::<T>(device, shapes, layouts, (at, up))?;
        let db = match biased {
            true => Some(channel_sums::<T>(device, up, Extent::of(dy.dims())?)?.into_tensor(shapes.channels.1)),
            false => None,
        };
        Ok((dx, dw.into_tensor(weight.shape()), db))
    })
}
