//! The ops on a GPU, a file each; the kernels are in `crates/device/kernels`.
//!
//! candle shows an op its operands as storages; [`OnGpu`] makes an op of a function of them, so that a
//! backward pass too is an op, off the tape.

pub(crate) mod conv;
pub(crate) mod cross_entropy;
pub(crate) mod dropout;
pub(crate) mod ledger;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod optim;
pub(crate) mod relu;
pub(crate) mod residual;
pub(crate) mod shuffle;
pub(crate) mod windows;

use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, CustomOp3};
use candle_core::{Device, Layout, Result, Shape, Tensor};
use isqrt_device::cuda::{Argument, Grid, Module, Output, Real, int, launch, real};

use crate::ops::Activation;

/// A storage and where its values lie.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// Element types of feature maps, and what their parameters are of.
pub(crate) trait Maps: Real {
    /// f32 for bf16.
    type Parameter: Real;
}

impl Maps for f32 {
    type Parameter = f32;
}
impl Maps for f64 {
    type Parameter = f64;
}
impl Maps for half::bf16 {
    type Parameter = f32;
}

/// Memory of any type.
pub(crate) trait Held: Send + Sync {
    fn at(&self) -> u64;
}

impl<T: Real> Held for Output<T> {
    fn at(&self) -> u64 {
        Output::at(self)
    }
}

/// An activation, as kernels take it.
fn clip(activation: Activation) -> [Argument; 2] {
    let on = activation != Activation::None;
    [int(usize::from(on)), real(activation.upper())]
}

/// The GPU that a tensor is on.
pub(crate) fn device_of(x: &Tensor) -> Result<&CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device),
        _ => candle_core::bail!("operand of shape {:?} is not on the GPU", x.shape()),
    }
}

/// An op that only a GPU runs: its name and what it does.
pub(crate) struct OnGpu<F>(pub &'static str, pub F);

impl<F> OnGpu<F> {
    fn elsewhere<T>(&self) -> Result<T> {
        candle_core::bail!("{}: the operands are on different devices", self.0)
    }
}

impl<F: Fn([Operand<'_>; 1]) -> Result<(CudaStorage, Shape)>> CustomOp1 for OnGpu<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.elsewhere()
    }
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.1([(s, l)])
    }
}

impl<F: Fn([Operand<'_>; 2]) -> Result<(CudaStorage, Shape)>> CustomOp2 for OnGpu<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.elsewhere()
    }
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.1([(s1, l1), (s2, l2)])
    }
}

impl<F: Fn([Operand<'_>; 3]) -> Result<(CudaStorage, Shape)>> CustomOp3 for OnGpu<F> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.elsewhere()
    }
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.1([(s1, l1), (s2, l2), (s3, l3)])
    }
}

/// Runs a kernel on memory of this call.
fn run<T: Real>(
    device: &CudaDevice,
    module: &Module,
    name: &'static str,
    grid: Grid,
    arguments: &[Argument],
) -> Result<()> {
    // SAFETY: callers give the arguments of the kernel; operands are borrowed for the call, and what is
    // freed after it is freed behind the kernel.
    unsafe { launch::<T>(device, module, name, grid, arguments) }
}

fn allocate<T: Real>(op: &'static str, device: &CudaDevice, shape: &[usize]) -> Result<Output<T>> {
    Ok(Output::new(op, device, shape)?)
}

/// Runs `$body` with `$T` standing for the element type of this storage.
macro_rules! on_gpu {
    ($op:expr, $storage:expr, $T:ident => $body:expr) => {
        match candle_core::backend::BackendStorage::dtype($storage) {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(crate::element::bad_dtype($op, other)),
        }
    };
}
use on_gpu;

/// As [`on_gpu`], for maps, which may be bf16.
macro_rules! of_maps {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err(crate::element::bad_dtype($op, other)),
        }
    };
}
pub(crate) use of_maps;
