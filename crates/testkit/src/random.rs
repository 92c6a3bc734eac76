//! Random tensors from a seeded ChaCha stream, the same on every machine.
//!
//! candle's CPU generator cannot be seeded, so tests draw here.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Standard normal values of the given shape.
///
/// # Errors
/// Where `dtype` is not a float type that f64 converts to.
pub fn randn(shape: impl Into<Shape>, seed: u64, dtype: DType) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    build(shape.into(), dtype, || {
        // Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - unit(&mut rng)).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit(&mut rng)).cos()
    })
}

/// Values uniform in `[low, high)`.
///
/// # Errors
/// As [`randn`].
pub fn uniform(
    shape: impl Into<Shape>,
    low: f64,
    high: f64,
    seed: u64,
    dtype: DType,
) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    build(shape.into(), dtype, || low + (high - low) * unit(&mut rng))
}

fn build(shape: Shape, dtype: DType, mut draw: impl FnMut() -> f64) -> Result<Tensor> {
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| draw()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
