//! ReLU, alone, in the node of another op and after a residual sum, and ReLU6. The derivative at 0 (and 6) is 0,
//! as in PyTorch (candle: 1).

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

/// What follows a convolution or a normalisation in its node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Relu, Self::Relu6];

    /// Where it cuts values off; NaN, which no value is above, for a bound that it does not have.
    pub(crate) fn upper(self) -> f64 {
        match self {
            Self::None | Self::Relu => f64::NAN,
            Self::Relu6 => 6.0,
        }
    }

    pub(crate) fn clip<T: WithDType>(self) -> Clip<T> {
        Clip {
            on: self != Self::None,
            upper: T::from_f64(self.upper()),
        }
    }
}

/// An activation as loops have it.
#[derive(Clone, Copy)]
pub(crate) struct Clip<T> {
    /// Whether it does anything.
    pub on: bool,
    pub upper: T,
}

impl<T: Copy + Default + PartialOrd> Clip<T> {
    /// That does nothing.
    pub(crate) fn off() -> Self {
        let (on, upper) = (false, T::default());
        Self { on, upper }
    }

    /// Not by `max` and `min`: a NaN must stay one.
    #[inline(always)]
    pub(crate) fn of(self, x: T) -> T {
        if !self.on {
            return x;
        }
        let positive = if x <= T::default() { T::default() } else { x };
        if positive >= self.upper {
            self.upper
        } else {
            positive
        }
    }

    /// What comes from above, where it let `x` pass; its result tells that as well.
    #[inline(always)]
    pub(crate) fn gradient(self, x: T, dy: T) -> T {
        if self.on && (x <= T::default() || x >= self.upper) {
            T::default()
        } else {
            dy
        }
    }
}

/// `max(x, 0)`, of any shape.
///
/// # Errors
/// Where `x` is not f32 or f64 on the CPU.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let y = tape::apply1(&x.contiguous()?, Alone(Activation::Relu))?;
    note_op("relu", &y);
    Ok(y)
}

/// `min(max(x, 0), 6)`, of any shape (Krizhevsky 2010; MobileNetV2, Sandler et al. 2018).
///
/// # Errors
/// Where `x` is not f32 or f64 on the CPU.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    let y = tape::apply1(&x.contiguous()?, Alone(Activation::Relu6))?;
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

/// `dy` where the activation let its result `y` pass.
pub(crate) fn backward(
    activation: Activation,
    y: &Tensor,
    dy: &Tensor,
) -> candle_core::Result<Tensor> {
    let dy = dy.contiguous()?;
    if activation == Activation::None {
        return Ok(dy);
    }
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        return cuda::relu::between(y, &dy, activation.upper());
    }
    let (ys, dys) = (read(y), read(&dy));
    dispatch!("relu", y.dtype(), T => {
        let (ys, dys) = (ys.values::<T>()?, dys.values::<T>()?);
        let clip = activation.clip::<T>();
        let mut dx = vec![T::ZERO; ys.len()];
        dx.par_chunks_mut(BLOCK).zip(ys.par_chunks(BLOCK).zip(dys.par_chunks(BLOCK))).for_each(
            |(dx, (y, dy))| {
                for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = clip.gradient(y, dy);
                }
            },
        );
        Tensor::from_vec(dx, y.shape(), y.device())
    })
}

/// An activation, but none, as a node of its own.
struct Alone(Activation);

impl CustomOp1 for Alone {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("relu", s.dtype(), T => {
            let x = values::<T>(s, l)?;
            let clip = self.0.clip::<T>();
            let mut y = vec![T::ZERO; x.len()];
            y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| {
                y.iter_mut().zip(x).for_each(|(y, &x)| *y = clip.of(x));
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, l.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::relu::clip((s, l), self.0.upper())
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(backward(self.0, y, dy)?))
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
            let clip = Activation::Relu.clip::<T>();
            let mut y = vec![T::ZERO; a.len()];
            y.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK))).for_each(
                |(y, (a, b))| {
                    let terms = a.iter().zip(b);
                    y.iter_mut().zip(terms).for_each(|(y, (&a, &b))| *y = clip.of(a + b));
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
        let dx = backward(Activation::Relu, y, dy)?;
        Ok((Some(dx.clone()), Some(dx)))
    }
}
