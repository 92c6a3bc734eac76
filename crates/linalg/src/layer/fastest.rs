//! Which way of computing the layer is the fastest for features of a shape.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, DeviceLocation, Tensor, Var};

use crate::Result;
use crate::config::CovPool;
use crate::gpu_kernel::GpuKernel;

/// What the answer depends on.
#[derive(Clone, PartialEq)]
struct Case {
    pool: CovPool,
    shape: Vec<usize>,
    dtype: DType,
    /// Whether a backward pass comes after.
    tracked: bool,
    at: DeviceLocation,
}

/// What was measured before: the kernel, and what there is to say of it.
static KNOWN: Mutex<Vec<(Case, GpuKernel, String)>> = Mutex::new(Vec::new());

/// Rounds of measuring, and passes a round.
const ROUNDS: usize = 5;
const PASSES: u32 = 4;

/// The fastest kernel for these features of those that compute in f32 (or f64). It is measured at the first
/// call for a shape, and other threads wait meanwhile; a call that waits for another thread must not come between.
pub(super) fn find(pool: &CovPool, x: &Tensor) -> Result<GpuKernel> {
    let case = Case {
        pool: pool.clone(),
        shape: x.dims().to_vec(),
        dtype: x.dtype(),
        tracked: x.track_op(),
        at: x.device().location(),
    };
    // What a thread leaves that panicked is whole.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernel, _)) = known.iter().find(|(other, ..)| *other == case) {
        return Ok(*kernel);
    }
    let (kernel, said) = match measure(pool, x) {
        Ok(times) => {
            let fastest = times.iter().min_by_key(|(_, time)| *time);
            let kernel = fastest.map_or(GpuKernel::Auto, |(kernel, _)| *kernel);
            let said = times.iter().map(|(kernel, time)| {
                let ms = time.as_secs_f64() * 1e3;
                format!("{kernel} {ms:.3} ms")
            });
            (kernel, said.collect::<Vec<_>>().join(", "))
        }
        // A pass of the layer beside the network's own.
        Err(error) if isqrt_device::is_out_of_memory(&error.to_string()) => {
            (GpuKernel::Auto, "no memory to measure".to_owned())
        }
        Err(error) => return Err(error),
    };
    let passes = match case.tracked {
        true => "forward and backward",
        false => "forward",
    };
    let line = format!(
        "{}: covariance layer of {:?}, {passes}: {kernel} ({said})",
        isqrt_device::name(x.device()),
        case.shape
    );
    known.push((case, kernel, line));
    Ok(kernel)
}

/// What was said of the measurements.
pub(super) fn known() -> Vec<String> {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.iter().map(|(_, _, line)| line.clone()).collect()
}

/// The best time of a forward pass, with its backward pass where one will come, by each kernel that runs here.
fn measure(pool: &CovPool, x: &Tensor) -> Result<Vec<(GpuKernel, Duration)>> {
    let device = x.device();
    let features = match x.track_op() {
        true => Var::from_tensor(&x.detach())?.into_inner(),
        false => x.detach(),
    };
    let pass = |kernel| -> Result<()> {
        let y = pool.forward_on_gpu(&features, kernel)?;
        if features.track_op() {
            y.backward()?;
        }
        Ok(())
    };
    let mut times = vec![];
    let candidates = GpuKernel::ALL.into_iter().filter(|k| k.is_ours_in_f32());
    for kernel in candidates {
        // f64 has no tensor cores here.
        if matches!(kernel, GpuKernel::TensorCores(_)) && x.dtype() == DType::F64 {
            continue;
        }
        match (kernel, pass(kernel)) {
            // What always runs.
            (GpuKernel::Tiles, ran) => ran?,
            // Too large for it, or another GPU.
            (_, Err(_)) => continue,
            (_, Ok(())) => {}
        }
        times.push((kernel, Duration::MAX));
    }
    for _ in 0..ROUNDS {
        for (kernel, best) in &mut times {
            device.synchronize()?;
            let start = Instant::now();
            for _ in 0..PASSES {
                pass(*kernel)?;
            }
            device.synchronize()?;
            *best = (*best).min(start.elapsed() / PASSES);
        }
    }
    Ok(times)
}
