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

/// What was measured before.
static KNOWN: Mutex<Vec<(Case, GpuKernel)>> = Mutex::new(Vec::new());

/// Rounds of measuring, and passes a round.
const ROUNDS: usize = 5;
const PASSES: u32 = 4;

/// The fastest kernel for these features of those that round as f32 (or f64) does. It is measured at the first
/// call for a shape; other threads wait meanwhile.
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
    if let Some((_, kernel)) = known.iter().find(|(other, _)| *other == case) {
        return Ok(*kernel);
    }
    let times = measure(pool, x)?;
    let fastest = times.iter().min_by_key(|(_, time)| *time);
    let kernel = fastest.map_or(GpuKernel::Auto, |(kernel, _)| *kernel);
    let said = times.iter().map(|(kernel, time)| {
        let ms = time.as_secs_f64() * 1e3;
        format!("{kernel} {ms:.3} ms")
    });
    tracing::info!(
        "covariance layer of {:?}: {kernel} is the fastest ({})",
        case.shape,
        said.collect::<Vec<_>>().join(", ")
    );
    known.push((case, kernel));
    Ok(kernel)
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
    let candidates = GpuKernel::ALL.into_iter().filter(|k| k.rounds_as_f32());
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
