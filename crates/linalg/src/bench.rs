//! Measurements of this crate as data: the layer beside the plain reference, iteration counts
//! and schedules, decompositions. Medians of interleaved repetitions; nothing is printed here.

#[cfg(feature = "cuda")]
mod device;

#[cfg(feature = "cuda")]
pub use device::{
    DeviceDecomposition, DeviceLayerTiming, decompose_on_device, device_decompositions,
    layer_on_device,
};

use crate::config::{CovPool, Root, Side};
use crate::eig::MpnCov;
use crate::reference::{self, Number};
use crate::{Error, Kernel, Result, Schedule};
use candle_core::{DType, Device, Tensor, Var};
use faer::{Mat, MatRef};
use rayon::prelude::*;
use std::time::{Duration, Instant};

/// Time of one implementation of the layer on one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerTiming {
    /// `ours` or `reference` (plain reverse mode, library products, parallel over the batch); on a GPU also
    /// the names of its kernels.
    pub implementation: &'static str,
    /// Threads used.
    pub threads: usize,
    /// Milliseconds of the forward pass of the whole batch.
    pub forward_ms: f64,
    /// Milliseconds of the backward pass of the whole batch.
    pub backward_ms: f64,
    /// Arithmetic of forward and backward that this implementation needs (a symmetric product
    /// counted half where it computes half), over time.
    pub gflops: f64,
    /// `gflops` over [`peak_gflops`] of as many threads, or over the peak of the GPU in f32.
    pub peak_share: f64,
    /// On a GPU, the bytes that any implementation moves over its bandwidth, as a share of the time.
    pub bandwidth_share: Option<f64>,
    /// Bytes that wait for the backward pass, an image.
    pub kept_bytes: usize,
    /// Instruction set.
    pub kernel: &'static str,
}

/// A batch to time the layer on.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCase {
    /// The layer; it must have a root.
    pub pool: CovPool,
    /// Images.
    pub batch: usize,
    /// Channels.
    pub d: usize,
    /// Positions.
    pub positions: usize,
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    match times.len() {
        0 => f64::NAN,
        n if n % 2 == 0 => 0.5 * (times[middle - 1] + times[middle]),
        _ => times[middle],
    }
}

/// Calls every task in turn until `budget` is over (at least three rounds after a warm-up);
/// each returns forward and backward seconds. Medians in milliseconds.
fn interleaved(
    tasks: &mut [&mut dyn FnMut() -> Result<(f64, f64)>],
    budget: Duration,
) -> Result<Vec<(f64, f64)>> {
    for task in tasks.iter_mut() {
        task()?;
    }
    let mut times = vec![(Vec::new(), Vec::new()); tasks.len()];
    let start = Instant::now();
    let mut round = 0;
    while round < 3 || start.elapsed() < budget {
        for (task, (forward, backward)) in tasks.iter_mut().zip(&mut times) {
            let (f, b) = task()?;
            forward.push(f * 1e3);
            backward.push(b * 1e3);
        }
        round += 1;
    }
    Ok(times
        .into_iter()
        .map(|(f, b)| (median(f), median(b)))
        .collect())
}

/// Seeded features with a decaying spectrum, like those at the end of a network:
/// `(batch, d, positions)` in f32.
///
/// # Errors
/// Those of candle.
pub fn synthetic_features(batch: usize, d: usize, positions: usize) -> Result<Tensor> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut uniform = move || {
        // SplitMix64; only the shape of the spectrum matters here.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut values = Vec::with_capacity(batch * d * positions);
    for _ in 0..batch {
        // Correlated channels: each leans on the one before; ReLU as after the last block.
        let mut previous = vec![0.0_f32; positions];
        for channel in 0..d {
            let strength = 1.0 / (1.0 + channel as f32 / 16.0);
            for value in &mut previous {
                let normal: f32 = (0..4).map(|_| uniform()).sum::<f32>() - 2.0;
                *value = 0.5 * *value + strength * normal * 1.7;
                values.push(value.max(0.0));
            }
        }
    }
    Ok(Tensor::from_vec(
        values,
        (batch, d, positions),
        &Device::Cpu,
    )?)
}

/// Multiply-add rate of the processor from registers, in GFLOP/s, on all threads of the current
/// pool at once: the ceiling of [`LayerTiming::peak_share`].
///
/// # Errors
/// [`Error::Kernel`].
pub fn peak_gflops(kernel: Kernel) -> Result<f64> {
    use crate::kernel::Dispatch;
    let isa = f32::isa(kernel)?;
    const STEPS: usize = 400_000;
    let mut best = 0.0_f64;
    for _ in 0..20 {
        let start = Instant::now();
        let count: f64 = rayon::broadcast(|_| isa.multiply_adds(STEPS)).iter().sum();
        best = best.max(2.0 * count / start.elapsed().as_secs_f64() / 1e9);
    }
    Ok(best)
}

/// Forward and backward of the layer through candle's autograd, as a training step does them.
fn time_pool(x: &Var, forward: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(f64, f64)> {
    let start = Instant::now();
    let y = forward(x)?;
    let forward = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let gradients = y.backward()?;
    let backward = start.elapsed().as_secs_f64();
    drop(gradients);
    Ok((forward, backward))
}

/// The images of a `(batch, d, M)` or `(batch, d, H, W)` tensor as matrices.
fn images<T: Number + candle_core::WithDType>(x: &Tensor) -> Result<Vec<Mat<T>>> {
    let x = x.flatten_from(2)?;
    let (batch, d, positions) = x.dims3()?;
    let values: Vec<T> = x.to_dtype(T::DTYPE)?.flatten_all()?.to_vec1()?;
    Ok((0..batch)
        .map(|at| &values[at * d * positions..(at + 1) * d * positions])
        .map(|image| MatRef::from_row_major_slice(image, d, positions).to_owned())
        .collect())
}

/// Times our layer and the plain reference on the same batch, in turn, on a device.
///
/// # Errors
/// As [`CovPool::forward`].
pub fn layer(case: &LayerCase, device: &Device, budget: Duration) -> Result<Vec<LayerTiming>> {
    let Some(root) = &case.pool.root else {
        let expected = "a layer with a root";
        return Err(crate::config::out_of_range("root", "none", expected));
    };
    let facts = case.pool.describe(case.d, case.positions)?;
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let rows = layer_on_device(case, device, budget)?.into_iter();
        let rows = rows.map(|row| LayerTiming {
            implementation: row.implementation,
            threads: rayon::current_num_threads(),
            forward_ms: row.forward_ms,
            backward_ms: row.backward_ms,
            gflops: row.gflops,
            peak_share: row.peak_share,
            bandwidth_share: Some(row.bandwidth_share),
            kept_bytes: facts.kept_bytes,
            kernel: "cuda",
        });
        return Ok(rows.collect());
    }
    let x = Var::from_tensor(&synthetic_features(case.batch, case.d, case.positions)?)?;
    let plain: Vec<Mat<f32>> = images(&x)?;
    let upstream = Mat::from_fn(case.d, case.d, |i, j| if i <= j { 1.0 } else { 0.0 });
    let peak = peak_gflops(case.pool.kernel)?;
    let times = interleaved(
        &mut [&mut || time_pool(&x, |x| case.pool.forward(x)), &mut || {
            let parts: Vec<(f64, f64)> = plain
                .par_iter()
                .map(|x| reference::timed_layer(root, x, &upstream))
                .collect::<Result<_>>()?;
            // Images run side by side: a batch takes the sum over the threads.
            let share = rayon::current_num_threads().min(case.batch) as f64;
            let total = parts.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
            Ok((total.0 / share, total.1 / share))
        }],
        budget,
    )?;
    let ours = facts.forward_multiply_adds + facts.backward_multiply_adds;
    let steps = root.schedule.coefficients()?;
    let timing = |implementation, (forward_ms, backward_ms), multiply_adds: f64, kept_bytes| {
        let flops = 2.0 * multiply_adds * case.batch as f64;
        let gflops = flops / (forward_ms + backward_ms) / 1e6;
        LayerTiming {
            implementation,
            threads: rayon::current_num_threads(),
            forward_ms,
            backward_ms,
            gflops,
            peak_share: gflops / peak,
            bandwidth_share: None,
            kept_bytes,
            kernel: facts.kernel,
        }
    };
    let (products, matrices) = reference::cost(&steps);
    let (d, m) = (case.d as f64, case.positions as f64);
    let plain_cost = products as f64 * d.powi(3) + 2.0 * d * d * m;
    let plain_kept = matrices * case.d * case.d * size_of::<f32>();
    Ok(vec![
        timing("ours", times[0], ours, facts.kept_bytes),
        timing("reference", times[1], plain_cost, plain_kept),
    ])
}

/// A row of the comparison of iteration counts and schedules.
#[derive(Clone, Debug, PartialEq)]
pub struct IterationRow {
    /// Name of the schedule; `exact (EIG)` for the eigendecomposition.
    pub schedule: String,
    /// Steps; 0 for the eigendecomposition.
    pub n: usize,
    /// Symmetric products of the forward pass on the side that was taken.
    pub products: usize,
    /// `‖C - √Σ‖_F / ‖√Σ‖_F`, mean over the images.
    pub root_error: f64,
    /// The same of the gradient of the features for a seeded upstream gradient.
    pub gradient_error: f64,
    /// Milliseconds of the forward pass of the batch.
    pub forward_ms: f64,
    /// Milliseconds of the backward pass of the batch.
    pub backward_ms: f64,
}

fn relative(found: &Mat<f64>, known: &Mat<f64>) -> f64 {
    let norm = known.norm_l2();
    if norm > 0.0 {
        (found - known).norm_l2() / norm
    } else {
        found.norm_l2()
    }
}

/// Compares schedules on features `(batch, d, M)` or `(batch, d, H, W)`: distance to the exact
/// root of the covariance and to its exact gradient (both in f64), and time in f32. The last row
/// is MPN-COV by eigendecomposition in f32.
///
/// # Errors
/// As [`CovPool::forward`]; [`Error::Decomposition`].
pub fn iterations(
    features: &Tensor,
    schedules: &[Schedule],
    budget: Duration,
) -> Result<Vec<IterationRow>> {
    let (_, d, positions) = crate::layer::feature_shape(features)?;
    let exact_images: Vec<Mat<f64>> = images(features)?;
    let upstream = Mat::from_fn(d, d, |i, j| {
        if i > j {
            0.0
        } else {
            ((i * 31 + j * 17) % 23) as f64 / 11.0 - 1.0
        }
    });
    let exact: Vec<(Mat<f64>, Mat<f64>)> = exact_images
        .par_iter()
        .enumerate()
        .map(|(image, x)| {
            reference::exact(x, &upstream).map_err(|error| match error {
                Error::Decomposition { what, .. } => Error::Decomposition { index: image, what },
                other => other,
            })
        })
        .collect::<Result<_>>()?;
    let seeded: Vec<f32> = reference::triangle(&upstream)
        .iter()
        .map(|&g| g as f32)
        .collect();
    let batch = exact_images.len();
    let g = Tensor::from_vec(seeded, (1, d * (d + 1) / 2), &Device::Cpu)?
        .broadcast_as((batch, d * (d + 1) / 2))?
        .contiguous()?;
    let x = Var::from_tensor(&features.to_dtype(DType::F32)?)?;
    let errors = |forward: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<(f64, f64)> {
        let y = forward(&x)?;
        let mut gradients = (&y * &g)?.sum_all()?.backward()?;
        let dx = gradients.remove(&x).ok_or(Error::Device)?;
        let roots: Vec<Vec<f32>> = y.to_vec2()?;
        let gradients: Vec<Mat<f64>> = images(&dx)?;
        let (mut root_error, mut gradient_error) = (0.0, 0.0);
        for ((root, gradient), (known_root, known_gradient)) in
            roots.iter().zip(&gradients).zip(&exact)
        {
            let upper = reference::from_triangle(d, root);
            let full = Mat::from_fn(d, d, |i, j| f64::from(upper[(i.min(j), i.max(j))]));
            root_error += relative(&full, known_root) / batch as f64;
            gradient_error += relative(gradient, known_gradient) / batch as f64;
        }
        Ok((root_error, gradient_error))
    };
    let mut rows = Vec::new();
    let share = budget / (schedules.len() as u32 + 1);
    for schedule in schedules {
        let pool = CovPool::with_schedule(schedule.clone());
        let (root_error, gradient_error) = errors(&|x| pool.forward(x))?;
        let time = interleaved(&mut [&mut || time_pool(&x, |x| pool.forward(x))], share)?[0];
        rows.push(IterationRow {
            schedule: schedule.name(),
            n: schedule.steps(),
            products: pool.describe(d, positions)?.products,
            root_error,
            gradient_error,
            forward_ms: time.0,
            backward_ms: time.1,
        });
    }
    let pool = MpnCov::default();
    let (root_error, gradient_error) = errors(&|x| pool.forward(x))?;
    let time = interleaved(&mut [&mut || time_pool(&x, |x| pool.forward(x))], share)?[0];
    rows.push(IterationRow {
        schedule: "exact (EIG)".into(),
        n: 0,
        products: 0,
        root_error,
        gradient_error,
        forward_ms: time.0,
        backward_ms: time.1,
    });
    Ok(rows)
}

/// The schedules that `isqrt iterations` compares.
pub fn usual_schedules() -> Vec<Schedule> {
    let newton = (1..=10).map(|iterations| Schedule::NewtonSchulz { iterations });
    let cubic = (2..=5).map(|steps| Schedule::Cubic { steps, lower: 0.1 });
    let fine = (3..=5).map(|steps| Schedule::Cubic { steps, lower: 0.03 });
    let quintic = (2..=3).map(|steps| Schedule::Quintic { steps, lower: 0.1 });
    let nonic = (1..=2).map(|steps| Schedule::Nonic { steps, lower: 0.1 });
    newton
        .chain(cubic)
        .chain(fine)
        .chain(quintic)
        .chain(nonic)
        .collect()
}

/// Time of a decomposition, or of our layer's forward pass, on `n x n` covariance matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct DecompositionRow {
    /// `eig`, `svd` (on a GPU with the name of cuSOLVER's function), or `isqrt N=5`.
    pub method: String,
    /// Side length.
    pub n: usize,
    /// Matrices at once.
    pub batch: usize,
    /// Milliseconds for all of them, f32.
    pub ms: f64,
}

/// EIG and SVD in f32 of the covariances of synthetic features, beside the root by iteration on
/// the same covariance (`Side::Covariance`, so that the same matrix is worked on): for each batch
/// size, images in parallel.
///
/// # Errors
/// [`Error::Decomposition`].
pub fn decompositions(
    n: usize,
    batches: &[usize],
    device: &Device,
    budget: Duration,
) -> Result<Vec<DecompositionRow>> {
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return device_decompositions(device, n, batches, budget);
    }
    // More positions than channels: a covariance of full rank.
    let positions = n + n / 4;
    let root = Root {
        side: Side::Covariance,
        ..Root::default()
    };
    let layer = CovPool::with_root(root);
    let mut rows = Vec::new();
    let share = budget / batches.len().max(1) as u32;
    for &batch in batches {
        let features = synthetic_features(batch, n, positions)?;
        let covariances: Vec<Mat<f32>> = images::<f32>(&features)?
            .iter()
            .map(|x| {
                let x = reference::centred(x);
                reference::product(&x, &x.transpose().to_owned())
            })
            .collect();
        let failed = |index, what| Error::Decomposition { index, what };
        let timed = |work: &(dyn Fn(usize, &Mat<f32>) -> Result<()> + Sync)| {
            let start = Instant::now();
            covariances
                .par_iter()
                .enumerate()
                .try_for_each(|(index, a)| work(index, a))?;
            Ok((start.elapsed().as_secs_f64(), 0.0))
        };
        let times = interleaved(
            &mut [
                &mut || {
                    timed(&|index, a| {
                        let found = reference::eigen(a);
                        std::hint::black_box(found.ok_or(failed(index, "eigendecomposition"))?);
                        Ok(())
                    })
                },
                &mut || {
                    timed(&|index, a| {
                        let found = reference::singular(a);
                        let what = "singular value decomposition";
                        std::hint::black_box(found.ok_or(failed(index, what))?);
                        Ok(())
                    })
                },
                &mut || {
                    let start = Instant::now();
                    std::hint::black_box(layer.forward(&features)?);
                    Ok((start.elapsed().as_secs_f64(), 0.0))
                },
            ],
            share,
        )?;
        for (method, (ms, _)) in ["eig", "svd", "isqrt N=5"].into_iter().zip(times) {
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
