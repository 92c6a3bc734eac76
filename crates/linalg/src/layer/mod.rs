//! The layer as one custom op: covariance, normalisation, iteration, compensation and triangle,
//! with its adjoint.

#[cfg(feature = "cuda")]
mod baseline;
#[cfg(feature = "cuda")]
mod fastest;
#[cfg(feature = "cuda")]
mod fused;
#[cfg(feature = "cuda")]
mod gpu;
mod image;
mod plan;
#[cfg(feature = "cuda")]
mod replayed;

#[cfg(feature = "cuda")]
pub use replayed::Replayed;

use crate::config::{CovPool, Output, PreNormalization, Side};
use crate::gpu_kernel::{GpuKernel, gpu_kernel};
use crate::kernel::buffer::Kept;
use crate::kernel::{Dispatch, Isa};
use crate::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, CustomOp3};
use image::{Image, Summary};
#[cfg(feature = "cuda")]
use isqrt_device::cuda;
use plan::Plan;
use rayon::prelude::*;
use std::sync::OnceLock;

impl CovPool {
    /// Pools feature maps, differentiably (Li et al. 2018, section 3).
    ///
    /// # Shapes
    /// - `x`: `(batch, channels, height, width)` or `(batch, channels, positions)`, f32 or f64, or bf16
    ///   on a GPU, whose gradient is bf16 too
    /// - returns `(batch, d(d+1)/2)`, or `(batch, d, d)` for [`Output::Full`](crate::Output::Full),
    ///   of the same type (f32 for bf16); covariance with divisor `M = height * width`
    ///
    /// Constant features (and so `M = 1`) give zeros, and zero gradients.
    ///
    /// # Devices
    /// The CPU, and CUDA with the feature `cuda`, where it computes as [`set_gpu_kernel`](crate::set_gpu_kernel)
    /// says and nothing waits for the GPU: features that are not finite give NaN there, and no error.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Empty`], [`Error::Dtype`], [`Error::Device`],
    /// [`Error::Option`], also for more steps than f32 bears ([`Root::check_f32`](crate::Root::check_f32));
    /// [`Error::NonFinite`] names the first bad element of the batch.
    ///
    /// # Cost
    /// `docs/method.md` counts the products; at `d = 256`, `M = 196`, `N = 5` on the Gram side
    /// about 59 million multiply-adds forward and 113 million backward an image.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match x.device().is_cuda() {
            true => self.forward_on_gpu(x, gpu_kernel()),
            false => self.forward_as(x, GpuKernel::Auto),
        }
    }

    /// As [`CovPool::forward`], on a GPU in the way that is given.
    ///
    /// # Errors
    /// As there; [`Error::Device`] on the CPU, [`Error::GpuKernel`] for what the way does not have.
    pub fn forward_on_gpu(&self, x: &Tensor, kernel: GpuKernel) -> Result<Tensor> {
        if !x.device().is_cuda() {
            return Err(Error::Device);
        }
        #[cfg(feature = "cuda")]
        let kernel = match kernel {
            GpuKernel::Fastest => fastest::find(self, x)?,
            kernel => kernel,
        };
        let (GpuKernel::Reference(_), Some(root)) = (kernel, &self.root) else {
            return self.forward_as(x, kernel);
        };
        let official = matches!(root.schedule, crate::Schedule::NewtonSchulz { .. })
            && root.pre_normalization == PreNormalization::Trace
            && root.post_compensation
            && root.side != Side::Gram;
        if !official {
            return Err(Error::GpuKernel {
                kernel,
                expected: "Newton-Schulz on the covariance, by trace and with compensation",
                got: format!(
                    "{:?} on the {:?} side, {:?}, compensation {}",
                    root.schedule, root.side, root.pre_normalization, root.post_compensation
                ),
            });
        }
        let on_covariance = crate::Root {
            side: Side::Covariance,
            ..root.clone()
        };
        let pool = CovPool {
            root: Some(on_covariance),
            ..self.clone()
        };
        pool.forward_as(x, kernel)
    }

    fn forward_as(&self, x: &Tensor, kernel: GpuKernel) -> Result<Tensor> {
        let shape = feature_shape(x)?;
        match x.dtype() {
            DType::F64 => return self.apply::<f64>(x, shape, kernel),
            DType::F32 => {}
            // Computed in f32, there alone.
            DType::BF16 if x.device().is_cuda() => {}
            other => {
                return Err(Error::Dtype {
                    dtype: other.as_str(),
                });
            }
        }
        if let Some(root) = &self.root {
            root.check_f32()?;
        }
        self.apply::<f32>(x, shape, kernel)
    }

    fn apply<T: Layered>(
        &self,
        x: &Tensor,
        shape: (usize, usize, usize),
        kernel: GpuKernel,
    ) -> Result<Tensor> {
        let (batch, d, positions) = shape;
        let isa = T::isa(self.kernel)?;
        let op = Op::<T> {
            plan: Plan::new(self, d, positions, isa)?,
            isa,
            batch,
            tracked: x.track_op(),
            state: OnceLock::new(),
            kernel,
            #[cfg(feature = "cuda")]
            narrow: x.dtype() == DType::BF16,
            #[cfg(feature = "cuda")]
            on_gpu: OnceLock::new(),
        };
        // Without a gradient to come, the op is dropped here and its memory is free again.
        Ok(x.contiguous()?.apply_op1(op)?)
    }

    /// Facts of the plan for features of this shape, without computing anything.
    ///
    /// # Errors
    /// [`Error::Option`] and [`Error::Kernel`] as for [`CovPool::forward`].
    pub fn describe(&self, d: usize, positions: usize) -> Result<Description> {
        let isa = f32::isa(self.kernel)?;
        let plan = Plan::new(self, d, positions, isa)?;
        let (forward, backward) = plan.multiply_adds();
        Ok(Description {
            gram: plan.iteration.as_ref().is_some_and(|i| i.gram),
            products: plan.iteration.as_ref().map_or(0, |i| i.program.products()),
            forward_multiply_adds: forward,
            backward_multiply_adds: backward,
            kept_bytes: plan.kept_len::<f32>() * size_of::<f32>(),
            kernel: isa.name,
        })
    }
}

/// What [`GpuKernel::Fastest`] has measured in this program, a line a shape.
#[must_use]
pub fn measured_kernels() -> Vec<String> {
    #[cfg(feature = "cuda")]
    return fastest::known();
    #[cfg(not(feature = "cuda"))]
    vec![]
}

/// `(batch, d, M)` of feature maps.
pub(crate) fn feature_shape(x: &Tensor) -> Result<(usize, usize, usize)> {
    let shape = || x.dims().to_vec();
    let (batch, d, positions) = match *x.dims() {
        [batch, d, height, width] => (batch, d, height * width),
        [batch, d, positions] => (batch, d, positions),
        _ => return Err(Error::Shape { shape: shape() }),
    };
    if d == 0 || positions == 0 {
        return Err(Error::Empty { shape: shape() });
    }
    Ok((batch, d, positions))
}

/// Shape of the pooled output.
pub(crate) fn out_shape(output: Output, batch: usize, d: usize) -> Shape {
    match output {
        Output::Triangle => Shape::from((batch, output.len(d))),
        Output::Full => Shape::from((batch, d, d)),
    }
}

/// The values of a contiguous tensor.
pub(crate) fn values<'a, T: Layered>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    let all = T::slice(storage).ok_or(Error::Dtype {
        dtype: "another type than at the start of the call",
    })?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => candle_core::bail!("covariance pooling needs contiguous tensors"),
    }
}

/// What a layer will do with feature maps of one shape; figures are for one image in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Description {
    /// Whether the iteration runs on the Gram matrix of the positions.
    pub gram: bool,
    /// Symmetric products of the iteration, forward.
    pub products: usize,
    /// Multiply-adds forward, symmetric products counted half.
    pub forward_multiply_adds: f64,
    /// Multiply-adds backward.
    pub backward_multiply_adds: f64,
    /// Bytes that wait for the backward pass.
    pub kept_bytes: usize,
    /// Instruction set.
    pub kernel: &'static str,
}

#[cfg(feature = "cuda")]
pub(crate) use isqrt_device::cuda::Real as OnGpu;

/// Without GPUs nothing is asked of element types.
#[cfg(not(feature = "cuda"))]
pub(crate) trait OnGpu {}
#[cfg(not(feature = "cuda"))]
impl OnGpu for f32 {}
#[cfg(not(feature = "cuda"))]
impl OnGpu for f64 {}

/// Element types of the layer, with their place in candle's storage.
pub(crate) trait Layered: Dispatch + OnGpu {
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    fn storage(values: Vec<Self>) -> CpuStorage;
}

impl Layered for f32 {
    fn slice(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F32(values)
    }
}

impl Layered for f64 {
    fn slice(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::F64(values) => Some(values),
            _ => None,
        }
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F64(values)
    }
}

/// What the forward pass leaves for the backward pass.
struct State<T> {
    summaries: Vec<Summary<T>>,
    kept: Option<Kept>,
}

/// One call of the layer: candle shows an op only its argument and result, so the iterates live
/// in the op itself.
struct Op<T: 'static> {
    plan: Plan,
    isa: &'static Isa<T>,
    batch: usize,
    tracked: bool,
    state: OnceLock<State<T>>,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "of a GPU"))]
    kernel: GpuKernel,
    #[cfg(feature = "cuda")]
    narrow: bool,
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<gpu::State<T>>,
}

/// A pointer that may cross threads; each image uses its own part.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: images touch disjoint parts.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn part(self, index: usize, length: usize) -> *mut T {
        self.0.wrapping_add(index * length)
    }
}

impl<T: Layered> Op<T> {
    /// Runs `work` for every image: whole images side by side as long as every thread has one;
    /// the last ones, and a batch of one, share the threads inside their products.
    fn each<O: Send>(
        &self,
        features: &[T],
        out: &mut [T],
        work: impl Fn(Image<'_, T>, &mut [T]) -> Result<O> + Sync,
    ) -> Result<Vec<O>> {
        let (size, out_size) = (
            self.plan.d * self.plan.positions,
            out.len() / self.batch.max(1),
        );
        let image = |index: usize, team: bool| Image {
            plan: &self.plan,
            isa: self.isa,
            index,
            team,
            features: &features[index * size..(index + 1) * size],
        };
        let threads = rayon::current_num_threads();
        let together = if threads == 1 {
            self.batch
        } else {
            self.batch / threads * threads
        };
        let (front, back) = out.split_at_mut(together * out_size);
        let results: Vec<Result<O>> = front
            .par_chunks_mut(out_size.max(1))
            .enumerate()
            .map(|(index, out)| work(image(index, false), out))
            .collect();
        // In order, so that the first bad image of the batch is the one that is named.
        let mut results: Vec<O> = results.into_iter().collect::<Result<_>>()?;
        for (at, out) in back.chunks_mut(out_size.max(1)).enumerate() {
            results.push(work(image(together + at, true), out)?);
        }
        Ok(results)
    }

    fn forward(&self, features: &[T]) -> Result<Vec<T>> {
        let mut out = vec![T::default(); self.batch * self.plan.output.len(self.plan.d)];
        let length = self.plan.kept_len::<T>();
        let kept = (self.tracked && length > 0).then(|| Kept::new::<T>(length * self.batch));
        let start = kept.as_ref().map(|kept| Shared(kept.pointer::<T>()));
        let summaries = self.each(features, &mut out, |image, out| {
            let index = image.index;
            image.forward(out, start.map(|start| start.part(index, length)))
        })?;
        // candle runs an op value once; read-only from here on, so no lock is held across threads.
        let _ = self.state.set(State { summaries, kept });
        Ok(out)
    }

    fn backward(&self, features: &[T], output: &[T], gradient: &[T]) -> Result<Vec<T>> {
        let mut out = vec![T::default(); features.len()];
        let Some(state) = self.state.get() else {
            return Ok(out);
        };
        let length = self.plan.kept_len::<T>();
        let start = state.kept.as_ref().map(|kept| Shared(kept.pointer::<T>()));
        let summaries = &state.summaries;
        let size = self.plan.output.len(self.plan.d);
        self.each(features, &mut out, |image, out| {
            let index = image.index;
            let part = index * size..(index + 1) * size;
            let kept = start.map(|start| start.part(index, length));
            image.backward(
                &summaries[index],
                kept,
                &output[part.clone()],
                &gradient[part],
                out,
            )
        })?;
        Ok(out)
    }
}

#[cfg(feature = "cuda")]
impl<T: Layered> Op<T> {
    fn on_device<'a>(&'a self, device: &'a candle_core::CudaDevice) -> gpu::Batch<'a> {
        gpu::Batch {
            plan: &self.plan,
            kernel: self.kernel,
            narrow: self.narrow,
            batch: self.batch,
            device,
            arena: None,
        }
    }
}

/// The backward pass on a GPU, as an op of features, output and gradient.
#[cfg(feature = "cuda")]
struct Gradient<'a, T: 'static>(&'a Op<T>);

#[cfg(feature = "cuda")]
impl<T: Layered> CustomOp3 for Gradient<'_, T> {
    fn name(&self) -> &'static str {
        "covariance-pooling-gradient"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
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
        y: &CudaStorage,
        y_layout: &Layout,
        g: &CudaStorage,
        g_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some(state) = self.0.on_gpu.get() else {
            candle_core::bail!("covariance-pooling: backward before forward")
        };
        let batch = self.0.on_device(x.device());
        let out = batch.backward(
            state,
            batch.features::<T>(x, x_layout)?,
            cuda::input::<T>(y, y_layout)?,
            cuda::input::<T>(g, g_layout)?,
        )?;
        Ok((out, x_layout.shape().clone()))
    }
}

impl<T: Layered> CustomOp1 for Op<T> {
    fn name(&self) -> &'static str {
        "covariance-pooling"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = self.forward(values(storage, layout)?)?;
        let shape = out_shape(self.plan.output, self.batch, self.plan.d);
        Ok((T::storage(out), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let batch = self.on_device(storage.device());
        let shape = [self.batch, self.plan.output.len(self.plan.d)];
        let out = batch.images().output::<T>(&shape)?;
        let features = batch.features::<T>(storage, layout)?;
        let state = batch.forward::<T>(features, self.tracked, out.at())?;
        let _ = self.on_gpu.set(state);
        let shape = out_shape(self.plan.output, self.batch, self.plan.d);
        Ok((out.into_storage(), shape))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let (arg, grad_res) = (arg.contiguous()?, grad_res.contiguous()?);
        #[cfg(feature = "cuda")]
        if arg.device().is_cuda() {
            return Ok(Some(arg.apply_op3_no_bwd(
                res,
                &grad_res,
                &Gradient(self),
            )?));
        }
        let (x, x_layout) = arg.storage_and_layout();
        let (y, y_layout) = res.storage_and_layout();
        let (g, g_layout) = grad_res.storage_and_layout();
        let (Storage::Cpu(x), Storage::Cpu(y), Storage::Cpu(g)) = (&*x, &*y, &*g) else {
            return Err(Error::Device.into());
        };
        let out = self.backward(
            values(x, x_layout)?,
            values(y, y_layout)?,
            values(g, g_layout)?,
        )?;
        Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
    }
}
