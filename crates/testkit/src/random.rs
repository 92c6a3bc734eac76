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
/// Weights of a network from their names ([`hashed`]): kernels by the fan-in, scales and variances of
/// norms near 1, the rest near 0, as `fill` of the scripts in `tools/golden` makes them.
///
/// # Panics
/// As [`hashed`].
#[must_use]
pub fn hashed_weights(name: &str, shape: &[usize]) -> Tensor {
    let (scale, shift) = match shape {
        [_, fan @ ..] if !fan.is_empty() => {
            ((3.0 / fan.iter().product::<usize>() as f64).sqrt(), 0.0)
        }
        _ if name.ends_with("weight") || name.ends_with("running_var") => (0.25, 1.0),
        _ => (0.25, 0.0),
    };
    let weights = hashed(name, shape).affine(scale, shift);
    weights.expect("a tensor of floats")
}

/// In [-1, 1), from the name alone: FNV-1a of the name, then SplitMix64 at each place, the same
/// numbers as `uniform` of `tools/golden/torchvision_nets.py`.
///
/// # Panics
/// For a shape that does not fit into memory.
#[must_use]
pub fn hashed(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    let value = |i: u64| {
        let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let count = shape.iter().product::<usize>() as u64;
    let values = (0..count).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape says")
}
