//! Rectifiers and the end of a residual block.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Tensor};
use isqrt_device::cuda::kernels::RELU;
use isqrt_device::cuda::{Grid, Output, Real, input, long, pointer, real};

use super::{Maps, OnGpu, Operand, allocate, of_maps, run};

/// A kernel of this module, one value at a time or those of sixteen bytes: its name and threads.
fn kernel<T: Real>(
    (one, wide): (&'static str, &'static str),
    len: usize,
    addresses: &[u64],
) -> (&'static str, Grid) {
    let beside = 16 / size_of::<T>();
    match len.is_multiple_of(beside) && addresses.iter().all(|at| at.is_multiple_of(16)) {
        true => (wide, Grid::over(len / beside)),
        false => (one, Grid::over(len)),
    }
}

/// `min(max(x, 0), upper)`.
pub(crate) fn clip((s, l): Operand<'_>, upper: f64) -> Result<(CudaStorage, Shape)> {
    of_maps!("relu", s.dtype(), T => {
        let x = input::<T>(s, l)?;
        let y = allocate::<T>("relu", s.device(), l.dims())?;
        let arguments = [pointer(x.at), pointer(y.at()), long(x.len), real(upper)];
        let (name, grid) = kernel::<T>(("clip", "clip_wide"), x.len, &[x.at, y.at()]);
        run::<T>(s.device(), &RELU, name, grid, &arguments)?;
        Ok((y.into_storage(), l.shape().clone()))
    })
}

/// `max(a + b, 0)`.
pub(crate) fn add_relu([(s, l), (s2, l2)]: [Operand<'_>; 2]) -> Result<(CudaStorage, Shape)> {
    of_maps!("add_relu", s.dtype(), T => {
        let (a, b) = (input::<T>(s, l)?, input::<T>(s2, l2)?);
        let y = allocate::<T>("add_relu", s.device(), l.dims())?;
        let arguments = [pointer(a.at), pointer(b.at), pointer(y.at()), long(a.len)];
        let (name, grid) = kernel::<T>(("add_relu", "add_relu_wide"), a.len, &[a.at, b.at, y.at()]);
        run::<T>(s.device(), &RELU, name, grid, &arguments)?;
        Ok((y.into_storage(), l.shape().clone()))
    })
}

/// `dy` where `y` is positive and below `upper`.
pub(crate) fn between(y: &Tensor, dy: &Tensor, upper: f64) -> Result<Tensor> {
    let gradient = |[(s, l), (s2, l2)]: [Operand<'_>; 2]| {
        of_maps!("relu", s.dtype(), T => {
            let (y, dy) = (input::<T>(s, l)?, input::<T>(s2, l2)?);
            let dx = between_of::<T>(s.device(), (y.at, dy.at), y.len, upper)?;
            Ok((dx.into_storage(), l.shape().clone()))
        })
    };
    y.apply_op2_no_bwd(dy, &OnGpu("relu-gradient", gradient))
}

/// [`between`] of so many values at these addresses.
pub(crate) fn between_of<T: Maps>(
    device: &CudaDevice,
    (y, dy): (u64, u64),
    len: usize,
    upper: f64,
) -> Result<Output<T>> {
    let dx = allocate::<T>("relu", device, &[len])?;
    let arguments = [
        pointer(y),
        pointer(dy),
        pointer(dx.at()),
        long(len),
        real(upper),
    ];
    let names = ("clip_gradient", "clip_gradient_wide");
    let (name, grid) = kernel::<T>(names, len, &[y, dy, dx.at()]);
    run::<T>(device, &RELU, name, grid, &arguments)?;
    Ok(dx)
}
