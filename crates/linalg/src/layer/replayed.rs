//! The layer on a GPU by launches that are recorded once: for small batches, where a launch takes
//! longer than what it starts.

use super::gpu::{Batch, State};
use super::plan::Plan;
use super::{feature_shape, out_shape};
use crate::config::{CovPool, out_of_range};
use crate::gpu::Arena;
use crate::gpu_kernel::GpuKernel;
use crate::kernel::Dispatch;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape, Tensor,
};
use isqrt_device::cuda::{Input, Output, Recording, copy, duplicate, input, record};
use std::sync::{Arc, Mutex, PoisonError};

const OP: &str = "covariance-pooling";

/// A layer for features of one shape on a GPU, whose launches were recorded (a CUDA graph): a forward pass is a
/// copy of the features, one replay, and a copy of the output; so is a backward pass. Clones share it.
///
/// It has memory of its own for everything between, which later passes use again: a backward pass must come
/// before the next forward pass, and is an error after it.
#[derive(Clone, Debug)]
pub struct Replayed(Arc<Passes>);

struct Passes {
    plan: Plan,
    batch: usize,
    device: CudaDevice,
    features: Output<f32>,
    output: Output<f32>,
    upstream: Output<f32>,
    gradient: Output<f32>,
    forward: Recording,
    backward: Recording,
    /// Forward passes so far; also keeps passes apart that are started by several threads.
    turn: Mutex<u64>,
    /// What the recordings work on.
    _memory: (State<f32>, Arena),
}

impl std::fmt::Debug for Passes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passes").field("plan", &self.plan).finish()
    }
}

fn whole(of: &Output<f32>) -> Input {
    Input {
        at: of.at(),
        len: of.len(),
    }
}

impl Replayed {
    /// Records the passes of a layer for features of this shape, `(batch, d, M)`, in f32.
    ///
    /// # Errors
    /// [`Error::Device`] for the CPU, [`Error::Empty`], [`Error::GpuKernel`] also for kernels of cuBLAS, which are
    /// not recorded, and for [`GpuKernel::Fastest`]; those of [`CovPool::forward_on_gpu`].
    ///
    /// # Cost
    /// Memory for every matrix of a forward and a backward pass, none of which is used twice.
    pub fn new(
        pool: &CovPool,
        (batch, d, positions): (usize, usize, usize),
        kernel: GpuKernel,
        device: &Device,
    ) -> Result<Self> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::Device);
        };
        if d * positions * batch == 0 {
            let shape = vec![batch, d, positions];
            return Err(Error::Empty { shape });
        }
        use GpuKernel::{Cublas, Fastest, Reference};
        if matches!(kernel, Cublas(_) | Reference(_) | Fastest) {
            return Err(Error::GpuKernel {
                kernel,
                expected: "features call by call",
                got: "a recording of launches".to_owned(),
            });
        }
        if let Some(root) = &pool.root {
            root.check_f32()?;
        }
        let plan = Plan::new(pool, d, positions, f32::isa(pool.kernel)?)?;
        let new = |shape: &[usize]| Output::<f32>::zeros(OP, gpu, shape);
        let memory = |shape: &[usize]| new(shape).map_err(candle_core::Error::from);
        let outputs = plan.output.len(d);
        let (features, gradient) = (
            memory(&[batch, d, positions])?,
            memory(&[batch, d, positions])?,
        );
        let (output, upstream) = (memory(&[batch, outputs])?, memory(&[batch, outputs])?);
        let arena = Arena::default();
        let passes = Batch {
            plan: &plan,
            kernel,
            narrow: false,
            batch,
            device: gpu,
            arena: Some(&arena),
        };
        let forward = || passes.forward::<f32>(whole(&features), true, output.at());
        let backward = |state: &State<f32>| {
            let (y, g) = (whole(&output), whole(&upstream));
            passes.backward_to(state, whole(&features), y, g, gradient.at())
        };
        // Once as they are, which loads the kernels and finds the memory; then the same again, recorded.
        let state = forward()?;
        let between = arena.used();
        backward(&state)?;
        arena.rewind(0);
        // SAFETY: the arena and the buffers live as long as the recordings.
        let (forward, backward) = unsafe {
            let forward = record(OP, gpu, || Ok(forward().map(drop)?))?;
            arena.rewind(between);
            let backward = record(OP, gpu, || Ok(backward(&state)?))?;
            (forward, backward)
        };
        Ok(Self(Arc::new(Passes {
            batch,
            device: gpu.clone(),
            features,
            output,
            upstream,
            gradient,
            forward,
            backward,
            turn: Mutex::new(0),
            _memory: (state, arena),
            plan,
        })))
    }

    /// As [`CovPool::forward`], differentiably.
    ///
    /// # Errors
    /// [`Error::Option`] for features of another shape, [`Error::Dtype`] for those not in f32, [`Error::Device`] for
    /// those of another device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let passes = &self.0;
        if feature_shape(x)? != (passes.batch, passes.plan.d, passes.plan.positions) {
            let expected = "features of the shape that was recorded";
            return Err(out_of_range("shape", x.dims(), expected));
        }
        if x.dtype() != DType::F32 {
            let dtype = x.dtype().as_str();
            return Err(Error::Dtype { dtype });
        }
        if !x.device().same_device(&Device::Cuda(passes.device.clone())) {
            return Err(Error::Device);
        }
        let op = Pass {
            passes: Arc::clone(passes),
            turn: Mutex::new(0),
        };
        Ok(x.contiguous()?.apply_op1(op)?)
    }
}

/// One forward pass, and its turn.
struct Pass {
    passes: Arc<Passes>,
    turn: Mutex<u64>,
}

fn locked(turn: &Mutex<u64>) -> std::sync::MutexGuard<'_, u64> {
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CustomOp1 for Pass {
    fn name(&self) -> &'static str {
        "covariance-pooling-replayed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let passes = &self.passes;
        let device = storage.device();
        let mut turn = locked(&passes.turn);
        copy(OP, device, input::<f32>(storage, layout)?, &passes.features)?;
        passes.forward.replay(OP)?;
        *turn += 1;
        *locked(&self.turn) = *turn;
        let out = duplicate::<f32>(OP, device, whole(&passes.output))?;
        let shape = out_shape(passes.plan.output, passes.batch, passes.plan.d);
        Ok((out.into_storage(), shape))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let (arg, grad_res) = (arg.contiguous()?, grad_res.contiguous()?);
        Ok(Some(arg.apply_op2_no_bwd(&grad_res, &Back(self))?))
    }
}

struct Back<'a>(&'a Pass);

impl CustomOp2 for Back<'_> {
    fn name(&self) -> &'static str {
        "covariance-pooling-replayed-gradient"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        g: &CudaStorage,
        g_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let passes = &self.0.passes;
        let device = x.device();
        let turn = locked(&passes.turn);
        if *turn != *locked(&self.0.turn) {
            candle_core::bail!(
                "{OP}: a replayed layer went forward again before this backward pass"
            )
        }
        copy(OP, device, input::<f32>(g, g_layout)?, &passes.upstream)?;
        passes.backward.replay(OP)?;
        let out = duplicate::<f32>(OP, device, whole(&passes.gradient))?;
        Ok((out.into_storage(), x_layout.shape().clone()))
    }
}
