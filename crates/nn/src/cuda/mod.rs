//! The ops on a GPU, a file each; the kernels are in `crates/device/kernels`.
//!
//! candle shows an op its operands as storages; [`OnGpu`] makes an op of a function of them, so that a
//! backward pass too is an op, off the tape.

pub(crate) mod cross_entropy;
pub(crate) mod linear;
pub(crate) mod relu;

use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, CustomOp3};
use candle_core::{Layout, Result, Shape};
use isqrt_device::cuda::{Argument, Grid, Module, Output, Real, launch};

/// A storage and where its values lie.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

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
