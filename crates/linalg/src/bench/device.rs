//! Measurements on a GPU. Nothing is measured by events: many calls are made, then the GPU is waited for, so
//! that times are those of a program that does nothing else, with what the processor takes for its launches
//! where the GPU waits for them.

use super::{DecompositionRow, LayerCase, interleaved, synthetic_features};
use crate::config::{CovPool, PreNormalization, Root, Side, out_of_range};
use crate::gpu_kernel::{GpuKernel, Tf32};
use crate::program::{Program, Wanted};
use crate::{Error, Output as Form, Replayed, Result, Schedule};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use isqrt_device::cuda::{
    Eigensolver, Output, Precision, Real, SingularSolver, Squares, duplicate, eigen, input,
    singular,
};
use std::time::{Duration, Instant};

/// Forward and backward seconds of an implementation.
type Task<'a> = Box<dyn FnMut() -> Result<(f64, f64)> + 'a>;

/// Name of the row of [`Replayed`].
const REPLAYED: &str = "ours, replayed";

/// Time of one implementation of the layer on one batch on a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceLayerTiming {
    /// `ours` for [`GpuKernel::Auto`], `ours, replayed` for [`Replayed`], the names of the other kernels that run
    /// ([`GpuKernel::name`]), and `candle` for the layer composed of candle's ops.
    pub implementation: &'static str,
    /// Milliseconds of the forward pass of the whole batch.
    pub forward_ms: f64,
    /// Milliseconds of the backward pass of the whole batch.
    pub backward_ms: f64,
    /// Arithmetic of forward and backward that this implementation needs (a symmetric product
    /// counted half where it computes half), over time.
    pub gflops: f64,
    /// `gflops` over the rate of multiply-adds in f32 ([`isqrt_device::Gpu::peak_f32`]); tensor cores can be
    /// above it.
    pub peak_share: f64,
    /// Bytes that any implementation moves, over time and bandwidth
    /// ([`isqrt_device::Gpu::peak_bandwidth`]): forward reads the features and writes the output,
    /// backward reads the features and the output's gradient and writes that of the features.
    pub bandwidth_share: f64,
}

/// Calls at a time, so that the wait at the end is a small part of the time.
const CALLS: u32 = 10;

/// Seconds of a forward and of a backward pass of the layer: of several calls, and of as many backward passes
/// of the last one.
fn time(
    x: &Var,
    device: &Device,
    forward: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<(f64, f64)> {
    device.synchronize()?;
    let start = Instant::now();
    for _ in 1..CALLS {
        std::hint::black_box(forward(x)?);
    }
    let output = forward(x)?;
    device.synchronize()?;
    let forward = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for _ in 0..CALLS {
        std::hint::black_box(output.backward()?);
    }
    device.synchronize()?;
    let backward = start.elapsed().as_secs_f64();
    Ok((forward / f64::from(CALLS), backward / f64::from(CALLS)))
}

/// Multiply-adds of an image by whole products: our algebra, forward and backward.
fn whole_products(root: &Root, (d, m): (f64, f64), gram: bool) -> Result<f64> {
    let coefficients = root.schedule.coefficients()?;
    let products = |wanted| Program::new(&coefficients, wanted).products() as f64;
    Ok(match gram {
        true => 2.0 * d * d * m + 5.0 * m * m * d + 3.0 * products(Wanted::InverseRoot) * m.powi(3),
        false => 2.0 * d * d * m + 3.0 * products(Wanted::Root) * d.powi(3),
    })
}

/// The same of the authors' algorithm.
fn official_products(steps: usize, (d, m): (f64, f64)) -> f64 {
    let products = match steps {
        1 => 1 + 2,
        _ => 3 * (steps - 1) + 8 + 10 * (steps - 2),
    };
    2.0 * d * d * m + products as f64 * d.powi(3)
}

/// The layer composed of candle's ops, differentiated by candle: Newton-Schulz on the covariance,
/// trace, compensation, upper triangle.
fn composed(x: &Tensor, steps: usize, triangle: &Tensor) -> Result<Tensor> {
    let (batch, d, positions) = x.dims3()?;
    let x = (x.broadcast_sub(&x.mean_keepdim(2)?)? / (positions as f64).sqrt())?;
    let covariance = x.matmul(&x.transpose(1, 2)?)?;
    let unit = Tensor::eye(d, x.dtype(), x.device())?.unsqueeze(0)?;
    let diagonal = covariance.broadcast_mul(&unit)?;
    let trace = diagonal.sum_keepdim(2)?.sum_keepdim(1)?;
    let a = covariance.broadcast_div(&trace)?;
    let shift = (&unit * 1.5)?;
    let factor = |m: &Tensor| shift.broadcast_sub(&(m * 0.5)?);
    let t = factor(&a)?;
    let mut root = a.matmul(&t)?;
    let mut inverse = t;
    for step in 1..steps {
        let t = factor(&inverse.matmul(&root)?)?;
        root = root.matmul(&t)?;
        if step + 1 < steps {
            inverse = t.matmul(&inverse)?;
        }
    }
    let root = root.broadcast_mul(&trace.sqrt()?)?;
    Ok(root.reshape((batch, d * d))?.index_select(triangle, 1)?)
}

/// Times our layer on a GPU in f32, beside the same with products of cuBLAS, the authors' algorithm with
/// products of cuBLAS, and the layer composed of candle's ops, in turn. The last two only
/// for Newton–Schulz with trace and compensation, the last for the triangle alone.
///
/// # Errors
/// As [`CovPool::forward_on_gpu`]; [`Error::Device`] for the CPU.
pub fn layer_on_device(
    case: &LayerCase,
    device: &Device,
    budget: Duration,
) -> Result<Vec<DeviceLayerTiming>> {
    let gpu = isqrt_device::gpu_of(device).ok_or(Error::Device)?;
    let Some(root) = &case.pool.root else {
        let expected = "a layer with a root";
        return Err(out_of_range("root", "none", expected));
    };
    let (d, m) = (case.d, case.positions);
    let size = (d as f64, m as f64);
    let features = synthetic_features(case.batch, d, m)?.to_device(device)?;
    let x = Var::from_tensor(&features)?;
    let facts = case.pool.describe(d, m)?;
    let ours = facts.forward_multiply_adds + facts.backward_multiply_adds;
    let whole = whole_products(root, size, facts.gram)?;
    let by = |kernel: GpuKernel, multiply_adds| (kernel.name(), multiply_adds, Some(kernel));
    let mut rows: Vec<(&'static str, f64, Option<GpuKernel>)> = vec![
        (REPLAYED, ours, Some(GpuKernel::Auto)),
        ("ours", ours, Some(GpuKernel::Auto)),
        by(GpuKernel::Tiles, ours),
        by(GpuKernel::TensorCores(Tf32::Thrice), ours),
        by(GpuKernel::TensorCores(Tf32::Once), ours),
    ];
    // Only where the GPU and the matrices are such.
    for (kernel, multiply_adds) in [(GpuKernel::Fused, ours), (GpuKernel::Cluster, whole)] {
        if case.pool.forward_on_gpu(&x, kernel).is_ok() {
            rows.push(by(kernel, multiply_adds));
        }
    }
    for precision in [Precision::Full, Precision::Tf32] {
        rows.push(by(GpuKernel::Cublas(precision), whole));
    }
    let steps = root.schedule.steps();
    if matches!(root.schedule, Schedule::NewtonSchulz { .. })
        && root.pre_normalization == PreNormalization::Trace
        && root.post_compensation
        && root.side != Side::Gram
    {
        let official = official_products(steps, size);
        for precision in [Precision::Full, Precision::Tf32] {
            rows.push(by(GpuKernel::Reference(precision), official));
        }
        if case.pool.output == Form::Triangle {
            rows.push(("candle", official, None));
        }
    }
    let places: Vec<u32> = (0..d)
        .flat_map(|i| (i..d).map(move |j| (i * d + j) as u32))
        .collect();
    let triangle = Tensor::new(places, device)?;
    let (pool, x) = (&case.pool, &x);
    let replayed = Replayed::new(pool, (case.batch, d, m), GpuKernel::Auto, device)?;
    let mut tasks: Vec<Task<'_>> = Vec::new();
    for &(name, _, kernel) in &rows {
        let (triangle, replayed) = (&triangle, &replayed);
        tasks.push(match kernel {
            Some(_) if name == REPLAYED => {
                Box::new(move || time(x, device, &|x| replayed.forward(x)))
            }
            Some(kernel) => Box::new(move || time(x, device, &|x| pool.forward_on_gpu(x, kernel))),
            None => Box::new(move || time(x, device, &|x| composed(x, steps, triangle))),
        });
    }
    let mut tasks: Vec<&mut dyn FnMut() -> Result<(f64, f64)>> =
        tasks.iter_mut().map(|task| &mut **task as _).collect();
    let times = interleaved(&mut tasks, budget)?;
    let values = 3 * d * m + 2 * pool.out_dim(d);
    let bytes = (case.batch * values * size_of::<f32>()) as f64;
    let timing = |(implementation, multiply_adds, _): (&'static str, f64, _),
                  (forward_ms, backward_ms)| {
        let seconds = (forward_ms + backward_ms) * 1e-3;
        let flops = 2.0 * multiply_adds * case.batch as f64 / seconds;
        DeviceLayerTiming {
            implementation,
            forward_ms,
            backward_ms,
            gflops: flops * 1e-9,
            peak_share: flops / gpu.peak_f32(),
            bandwidth_share: bytes / seconds / gpu.peak_bandwidth(),
        }
    };
    Ok(rows
        .into_iter()
        .zip(times)
        .map(|(row, ms)| timing(row, ms))
        .collect())
}

/// EIG and SVD by cuSOLVER in f32 of the covariances of synthetic features, beside the root by
/// iteration on the same covariance, for each batch size. A function that the library lacks is left
/// out.
///
/// # Errors
/// [`Error::Device`] for the CPU, [`Error::Decomposition`], those of cuSOLVER.
pub fn device_decompositions(
    device: &Device,
    n: usize,
    batches: &[usize],
    budget: Duration,
) -> Result<Vec<DecompositionRow>> {
    if !device.is_cuda() {
        return Err(Error::Device);
    }
    // More positions than channels: a covariance of full rank.
    let positions = n + n / 4;
    let layer = CovPool::with_root(Root {
        side: Side::Covariance,
        ..Root::default()
    });
    let full = CovPool {
        output: Form::Full,
        ..CovPool::plain()
    };
    let mut rows = Vec::new();
    let share = budget / batches.len().max(1) as u32;
    for &batch in batches {
        let features = synthetic_features(batch, n, positions)?.to_device(device)?;
        let covariances = full.forward(&features)?;
        let (features, covariances) = (&features, &covariances);
        let timed = |work: &dyn Fn() -> Result<Tensor>| {
            device.synchronize()?;
            let start = Instant::now();
            std::hint::black_box(work()?);
            device.synchronize()?;
            Ok((start.elapsed().as_secs_f64(), 0.0))
        };
        let methods: Vec<DeviceDecomposition> = DeviceDecomposition::ALL
            .into_iter()
            .filter(|&how| {
                how != DeviceDecomposition::Eigen(Eigensolver::Batched)
                    || decompose_on_device(covariances, how).is_ok()
            })
            .collect();
        let mut tasks: Vec<Task<'_>> = Vec::new();
        for &how in &methods {
            tasks.push(Box::new(move || {
                timed(&|| decompose_on_device(covariances, how))
            }));
        }
        tasks.push(Box::new(|| timed(&|| layer.forward(features))));
        let mut tasks: Vec<&mut dyn FnMut() -> Result<(f64, f64)>> =
            tasks.iter_mut().map(|task| &mut **task as _).collect();
        let times = interleaved(&mut tasks, share)?;
        let names = methods.iter().map(|how| how.name()).chain(["isqrt N=5"]);
        for (method, (ms, _)) in names.zip(times) {
            let method = method.to_owned();
            rows.push(DecompositionRow {
                method,
                n,
                batch,
                ms,
            });
        }
    }
    Ok(rows)
}

/// A decomposition by cuSOLVER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceDecomposition {
    /// Eigenvalues and eigenvectors.
    Eigen(Eigensolver),
    /// Singular values and both factors.
    Singular(SingularSolver),
}

impl DeviceDecomposition {
    /// All of them.
    pub const ALL: [Self; 5] = {
        [
            Self::Eigen(Eigensolver::Divide),
            Self::Eigen(Eigensolver::Jacobi),
            Self::Eigen(Eigensolver::Batched),
            Self::Singular(SingularSolver::Jacobi),
            Self::Singular(SingularSolver::Approximate),
        ]
    };

    /// Name of cuSOLVER's function.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eigen(Eigensolver::Auto) => "eig",
            Self::Eigen(Eigensolver::Divide) => "eig syevd",
            Self::Eigen(Eigensolver::Jacobi) => "eig syevjBatched",
            Self::Eigen(Eigensolver::Batched) => "eig XsyevBatched",
            Self::Singular(SingularSolver::Jacobi) => "svd gesvdj",
            Self::Singular(SingularSolver::Approximate) => "svd gesvdaStridedBatched",
        }
    }
}

/// Decomposes symmetric matrices `(batch, n, n)`, f32 or f64, that lie on a GPU, with both factors, and
/// returns `(batch, n)`: eigenvalues in rising order, or singular values in falling order. Waits for
/// the GPU. No gradient.
///
/// # Errors
/// [`Error::Option`] for another shape, [`Error::Dtype`], [`Error::Device`]; [`Error::Decomposition`] names the image;
/// those of cuSOLVER, also where it lacks the function.
pub fn decompose_on_device(matrices: &Tensor, how: DeviceDecomposition) -> Result<Tensor> {
    let shape = match *matrices.dims() {
        [batch, n, columns] if n == columns => (batch, n),
        _ => return Err(out_of_range("shape", matrices.dims(), "(batch, n, n)")),
    };
    let matrices = matrices.contiguous()?;
    match matrices.dtype() {
        DType::F32 | DType::F64 => {}
        other => {
            let dtype = other.as_str();
            return Err(Error::Dtype { dtype });
        }
    }
    Ok(matrices.apply_op1_no_bwd(&Decompose { how, shape })?)
}

struct Decompose {
    how: DeviceDecomposition,
    shape: (usize, usize),
}

impl Decompose {
    fn run<T: Real>(&self, storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let device = storage.device();
        let (batch, n) = self.shape;
        let op = self.how.name();
        let failed = candle_core::Error::from;
        let from = input::<T>(storage, layout)?;
        // The library works in place.
        let copy = duplicate::<T>(op, device, from).map_err(failed)?;
        let values = Output::<T>::new(op, device, &[batch, n]).map_err(failed)?;
        let of = Squares {
            at: copy.at(),
            n,
            row: n,
            batch,
        };
        // SAFETY: matrices and values are of this call.
        let info = unsafe {
            match self.how {
                DeviceDecomposition::Eigen(solver) => {
                    eigen::<T>(op, device, solver, of, values.at())
                }
                DeviceDecomposition::Singular(solver) => {
                    singular::<T>(op, device, solver, of, values.at())
                }
            }
        }
        .map_err(failed)?;
        if let Some(index) = info.iter().position(|&info| info != 0) {
            return Err(Error::Decomposition { index, what: op });
        }
        Ok(values.into_storage())
    }
}

impl CustomOp1 for Decompose {
    fn name(&self) -> &'static str {
        "decomposition"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let values = match storage.dtype() {
            DType::F64 => self.run::<f64>(storage, layout)?,
            _ => self.run::<f32>(storage, layout)?,
        };
        Ok((values, Shape::from(self.shape)))
    }
}
