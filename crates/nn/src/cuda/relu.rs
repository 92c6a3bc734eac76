//! Rectifiers and the end of a residual block.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape, Tensor};
use isqrt_device::cuda::kernels::RELU;
use isqrt_device::cuda::{Grid, input, long, pointer, real};

use super::{OnGpu, Operand, allocate, of_maps, run};

/// `min(max(x, 0), upper)`.
pub(crate) fn clip((s, l): Operand<'_>, upper: f64) -> Result<(CudaStorage, Shape)> {
    of_maps!("relu", s.dtype(), T => {
        let x = input::<T>(s, l)?;
        let y = allocate::<T>("relu", s.device(), l.dims())?;
        let arguments = [pointer(x.at), pointer(y.at()), long(x.len), real(upper)];
        run::<T>(s.device(), &RELU, "clip", Grid::over(x.len), &arguments)?;
        Ok((y.into_storage(), l.shape().clone()))
    })
}

/// `max(a + b, 0)`.
pub(crate) fn add_relu([(s, l), (s2, l2)]: [Operand<'_>; 2]) -> Result<(CudaStorage, Shape)> {
    of_maps!("add_relu", s.dtype(), T => {
        let (a, b) = (input::<T>(s, l)?, input::<T>(s2, l2)?);
        let y = allocate::<T>("add_relu", s.device(), l.dims())?;
        let arguments = [pointer(a.at), pointer(b.at), pointer(y.at()), long(a.len)];
        run::<T>(s.device(), &RELU, "add_relu", Grid::over(a.len), &arguments)?;
        Ok((y.into_storage(), l.shape().clone()))
    })
}

/// `dy` where `y` is positive and below `upper`.
pub(crate) fn between(y: &Tensor, dy: &Tensor, upper: f64) -> Result<Tensor> {
    let gradient = |[(s, l), (s2, l2)]: [Operand<'_>; 2]| {
        of_maps!("relu", s.dtype(), T => {
            let (y, dy) = (input::<T>(s, l)?, input::<T>(s2, l2)?);
            let dx = allocate::<T>("relu", s.device(), l.dims())?;
            let arguments = [pointer(y.at), pointer(dy.at), pointer(dx.at()), long(y.len), real(upper)];
            run::<T>(s.device(), &RELU, "clip_gradient", Grid::over(y.len), &arguments)?;
            Ok((dx.into_storage(), l.shape().clone()))
        })
    };
    y.apply_op2_no_bwd(dy, &OnGpu("relu-gradient", gradient))
}
