//! ReLU, alone and after a residual sum, and ReLU6. The derivative at 0 (and 6) is 0, as in PyTorch
//! (candle: 1).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
    op::Add,
};
use rayon::prelude::*;

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, dispatch, read, values};
use crate::error::shape_error;
use crate::record::note_op;
use crate::tape;

/// Values that one task works through.
const BLOCK: usize = 1 << 14;

/// `max(x, 0)`, of any shape.
///
/// # Errors
/// Where `x` is not f32 or f64 on the CPU.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let y = tape::apply1(&x.contiguous()?, Clip { upper: UNBOUNDED })?;
    note_op("relu", &y);
    Ok(y)
}

/// `min(max(x, 0), 6)`, of any shape (Krizhevsky 2010; MobileNetV2, Sandler et al. 2018).
///
/// # Errors
/// Where `x` is not f32 or f64 on the CPU.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    let y = tape::apply1(&x.contiguous()?, Clip { upper: 6.0 })?;
    note_op("relu6", &y);
    Ok(y)
}

/// `x + shortcut`: the end of a residual block without an activation.
///
/// # Errors
/// [`crate::Error::Shape`] where the shapes differ.
pub fn add(x: &Tensor, shortcut: &Tensor) -> Result<Tensor> {
    same_shape("add", x, shortcut)?;
    let y = tape::join(&x.contiguous()?, &shortcut.contiguous()?, Sum)?;
    note_op("add", &y);
    Ok(y)
}

/// `max(x + shortcut, 0)`: the end of a residual block.
///
/// # Errors
/// [`crate::Error::Shape`] where the shapes differ.
pub fn add_relu(x: &Tensor, shortcut: &Tensor) -> Result<Tensor> {
    same_shape("add_relu", x, shortcut)?;
    let y = tape::join(&x.contiguous()?, &shortcut.contiguous()?, AddRelu)?;
    note_op("add_relu", &y);
    Ok(y)
}

fn same_shape(op: &'static str, x: &Tensor, shortcut: &Tensor) -> Result<()> {
    if x.dims() == shortcut.dims() {
        return Ok(());
    }
    shape_error(
        op,
        format!(
            "expects equal shapes, got {:?} and {:?}",
            x.dims(),
            shortcut.dims()
        ),
    )
}

pub(super) fn clip<T: Element>(value: T) -> T {
    // Not `max`: a NaN must stay one.
    if value <= T::ZERO { T::ZERO } else { value }
}

/// `dy` where `y` is positive.
pub(super) fn backward(y: &Tensor, dy: &Tensor) -> candle_core::Result<Tensor> {
    between(y, dy, UNBOUNDED)
}

/// `dy` where `y` is positive and below `upper`.
fn between(y: &Tensor, dy: &Tensor, upper: f64) -> candle_core::Result<Tensor> {
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        return cuda::relu::between(y, &dy, upper);
    }
    let (ys, dys) = (read(y), read(&dy));
    dispatch!("relu", y.dtype(), T => {
        let (ys, dys) = (ys.values::<T>()?, dys.values::<T>()?);
        let upper = <T as WithDType>::from_f64(upper);
        let mut dx = vec![T::ZERO; ys.len()];
        dx.par_chunks_mut(BLOCK).zip(ys.par_chunks(BLOCK).zip(dys.par_chunks(BLOCK))).for_each(
            |(dx, (y, dy))| {
                for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = if y <= 0.0 || y >= upper { 0.0 } else { dy };
                }
            },
        );
        Tensor::from_vec(dx, y.shape(), y.device())
    })
}

/// No value is above or at it.
const UNBOUNDED: f64 = f64::NAN;

struct Clip {
    upper: f64,
}

impl CustomOp1 for Clip {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("relu", s.dtype(), T => {
            let x = values::<T>(s, l)?;
            let upper = <T as WithDType>::from_f64(self.upper);
            let bounded = |x: T| if x >= upper { upper } else { clip(x) };
            let mut y = vec![T::ZERO; x.len()];
            y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| {
                y.iter_mut().zip(x).for_each(|(y, &x)| *y = bounded(x));
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, l.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::relu::clip((s, l), self.upper)
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(between(y, dy, self.upper)?))
    }
}

/// candle's sum; its gradient is that of both, as it is.
struct Sum;

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((s1.binary_impl::<Add>(s2, l1, l2)?, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((s1.binary_impl::<Add>(s2, l1, l2)?, l1.shape().clone()))
    }

    fn bwd(
        &self,
        _a: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.clone()), Some(dy.clone())))
    }
}

struct AddRelu;

impl CustomOp2 for AddRelu {
    fn name(&self) -> &'static str {
        "add_relu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("add_relu", s1.dtype(), T => {
            let (a, b) = (values::<T>(s1, l1)?, values::<T>(s2, l2)?);
            let mut y = vec![T::ZERO; a.len()];
            y.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK))).for_each(
                |(y, (a, b))| {
                    let terms = a.iter().zip(b);
                    y.iter_mut().zip(terms).for_each(|(y, (&a, &b))| *y = clip(a + b));
                },
            );
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::relu::add_relu([(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        _a: &Tensor,
        _b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = backward(y, dy)?;
        Ok((Some(dx.clone()), Some(dx)))
    }
}
