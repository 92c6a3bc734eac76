//! Pooling over windows and local response normalisation.

use candle_core::{CudaDevice, Result};
use isqrt_device::cuda::kernels::WINDOWS;
use isqrt_device::cuda::{DeviceRepr, Grid, Module, Output, Real, int, launch_with, long, pointer};

use super::{Maps, allocate, run};

/// Windows along an axis, as `windows.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    pub input: i32,
    pub output: i32,
    pub kernel: i32,
    pub stride: i32,
    pub padding: i32,
    pub adaptive: i32,
}

/// The windows of a call, as `windows.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows {
    pub rows: Axis,
    pub columns: Axis,
    pub channels: i32,
    /// Whether the channels of a pixel lie beside each other.
    pub beside: i32,
    pub include_padding: i32,
    pub unused: i32,
}

impl Windows {
    fn values(&self, batch: usize, pixels: impl Fn(&Axis) -> i32) -> usize {
        batch
            * self.channels as usize
            * pixels(&self.rows) as usize
            * pixels(&self.columns) as usize
    }

    fn outputs(&self, batch: usize) -> usize {
        self.values(batch, |axis| axis.output)
    }

    fn inputs(&self, batch: usize) -> usize {
        self.values(batch, |axis| axis.input)
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MaxPool {
    x: u64,
    y: u64,
    winners: u64,
    count: i64,
    windows: Windows,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Pooled {
    x: u64,
    y: u64,
    count: i64,
    windows: Windows,
}

/// Local response normalisation, as `windows.cu` has it; `alpha` over the size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Response {
    pub alpha: f64,
    pub beta: f64,
    pub k: f64,
    pub size: i32,
    pub channels: i32,
    pub pixels: i32,
    pub unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Responded {
    x: u64,
    dy: u64,
    y: u64,
    count: i64,
    response: Response,
}

// SAFETY: structures of numbers, laid out as C does.
unsafe impl DeviceRepr for MaxPool {}
// SAFETY: as above.
unsafe impl DeviceRepr for Pooled {}
// SAFETY: as above.
unsafe impl DeviceRepr for Responded {}

fn run_with<T: Real, S: DeviceRepr>(
    device: &CudaDevice,
    name: &'static str,
    count: usize,
    argument: &S,
) -> Result<()> {
    const MODULE: &Module = &WINDOWS;
    // SAFETY: callers give the structure of the kernel, with memory of their call.
    unsafe { launch_with::<T, S>(device, MODULE, name, Grid::over(count), argument) }
}

/// The largest value of each window, and its place in its plane.
pub(crate) fn max_pool<T: Maps>(
    device: &CudaDevice,
    windows: Windows,
    batch: usize,
    x: u64,
) -> Result<(Output<T>, Output<f32>)> {
    let count = windows.outputs(batch);
    let y = allocate::<T>("max_pool2d", device, &[count])?;
    // Places are integers of the same size.
    let winners = allocate::<f32>("max_pool2d", device, &[count])?;
    let argument = MaxPool {
        x,
        y: y.at(),
        winners: winners.at(),
        count: count as i64,
        windows,
    };
    run_with::<T, _>(device, "max_pool", count, &argument)?;
    Ok((y, winners))
}

pub(crate) fn max_pool_gradient<T: Maps>(
    device: &CudaDevice,
    windows: Windows,
    batch: usize,
    (dy, winners): (u64, u64),
) -> Result<Output<T>> {
    let count = windows.inputs(batch);
    let dx = allocate::<T>("max_pool2d", device, &[count])?;
    let argument = MaxPool {
        x: dy,
        y: dx.at(),
        winners,
        count: count as i64,
        windows,
    };
    run_with::<T, _>(device, "max_pool_gradient", count, &argument)?;
    Ok(dx)
}

/// The mean of each window, or (`gradient`) the adjoint of that.
pub(crate) fn average_pool<T: Maps>(
    device: &CudaDevice,
    windows: Windows,
    batch: usize,
    x: u64,
    gradient: bool,
) -> Result<Output<T>> {
    let (name, count) = match gradient {
        false => ("average_pool", windows.outputs(batch)),
        true => ("average_pool_gradient", windows.inputs(batch)),
    };
    let y = allocate::<T>("avg_pool2d", device, &[count])?;
    let argument = Pooled {
        x,
        y: y.at(),
        count: count as i64,
        windows,
    };
    run_with::<T, _>(device, name, count, &argument)?;
    Ok(y)
}

/// The mean of each plane.
pub(crate) fn plane_means<T: Maps>(
    device: &CudaDevice,
    x: u64,
    (planes, pixels): (usize, usize),
) -> Result<Output<T>> {
    let y = allocate::<T>("global_avg_pool", device, &[planes])?;
    let arguments = [pointer(x), pointer(y.at()), long(planes), int(pixels)];
    let grid = Grid::blocks(planes.div_ceil(8), 256);
    run::<T>(device, &WINDOWS, "plane_means", grid, &arguments)?;
    Ok(y)
}

pub(crate) fn plane_means_gradient<T: Maps>(
    device: &CudaDevice,
    dy: u64,
    (planes, pixels): (usize, usize),
) -> Result<Output<T>> {
    let count = planes * pixels;
    let dx = allocate::<T>("global_avg_pool", device, &[count])?;
    let arguments = [pointer(dy), pointer(dx.at()), long(count), int(pixels)];
    run::<T>(
        device,
        &WINDOWS,
        "plane_means_gradient",
        Grid::over(count),
        &arguments,
    )?;
    Ok(dx)
}

/// Local response normalisation of `x`, or with `dy` the gradient.
pub(crate) fn response_norm<T: Maps>(
    device: &CudaDevice,
    response: Response,
    count: usize,
    (x, dy): (u64, Option<u64>),
) -> Result<Output<T>> {
    let y = allocate::<T>("local_response_norm", device, &[count])?;
    let argument = Responded {
        x,
        dy: dy.unwrap_or(0),
        y: y.at(),
        count: count as i64,
        response,
    };
    let name = match dy {
        None => "response_norm",
        Some(_) => "response_norm_gradient",
    };
    run_with::<T, _>(device, name, count, &argument)?;
    Ok(y)
}
