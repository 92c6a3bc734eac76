//! Initial values of parameters, the same on every machine.
//!
//! Each parameter draws from its own ChaCha stream, keyed by the seed and its name: adding a layer
//! changes no other layer's weights, and two networks that share a backbone start from the same
//! backbone.

use candle_core::WithDType;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// One value everywhere.
    Constant(f64),
    /// Normal with standard deviation `√(2 / fan_out)`: convolutions before a ReLU (He et al. 2015).
    KaimingFanOut,
    /// Normal with standard deviation `√(2 / fan_in)`.
    KaimingFanIn,
    /// Uniform within `±√(6 / (fan_in + fan_out))` (Glorot and Bengio 2010).
    XavierUniform,
    /// Normal with standard deviation `√(2 / (fan_in + fan_out))`.
    XavierNormal,
    /// Uniform within `±√(6 / fan_in)`: Kaiming's for a ReLU.
    KaimingUniform,
    /// Uniform within `±1/√fan_in` of a weight of `fan_in` inputs: PyTorch's default for
    /// convolutions and linear layers (its `kaiming_uniform_` with `a = √5`).
    UniformFanIn,
    /// Uniform within this bound.
    Uniform(f64),
    /// Normal with this standard deviation (Gaussian).
    Normal(f64),
    /// -1 or 1, as often.
    Signs,
    /// Whole numbers from 0 to below this one, all as often.
    Below(u32),
}

impl Init {
    /// Values for a parameter of this name and shape, rounded to `T` one by one: in f64 all of a
    /// large layer's would take twice its memory.
    pub(crate) fn draw<T: WithDType>(self, seed: u64, name: &str, shape: &[usize]) -> Vec<T> {
        let count = shape.iter().product();
        // (out, in, kernel...): the kernel's area multiplies both fans.
        let area: usize = shape.iter().skip(2).product();
        let out = (shape.first().copied().unwrap_or(1) * area) as f64;
        let inputs = (shape.get(1).copied().unwrap_or(1) * area) as f64;
        let mut stream = Stream::new(seed, name);
        match self {
            Self::Constant(value) => vec![T::from_f64(value); count],
            Self::KaimingFanOut => stream.normal(count, (2.0 / out).sqrt()),
            Self::KaimingFanIn => stream.normal(count, (2.0 / inputs).sqrt()),
            Self::XavierUniform => stream.uniform(count, (6.0 / (inputs + out)).sqrt()),
            Self::XavierNormal => stream.normal(count, (2.0 / (inputs + out)).sqrt()),
            Self::KaimingUniform => stream.uniform(count, (6.0 / inputs).sqrt()),
            Self::UniformFanIn => stream.uniform(count, 1.0 / inputs.sqrt()),
            Self::Uniform(bound) => stream.uniform(count, bound),
            Self::Normal(deviation) => stream.normal(count, deviation),
            Self::Signs => stream.units(count, |u| if u < 0.5 { -1.0 } else { 1.0 }),
            Self::Below(limit) => stream.units(count, |u| (u * f64::from(limit)).floor()),
        }
    }
}

struct Stream(ChaCha8Rng);

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..24].copy_from_slice(&fnv1a(name.as_bytes()).to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// In `[0, 1)`, 53 bits.
    fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    fn uniform<T: WithDType>(&mut self, count: usize, bound: f64) -> Vec<T> {
        self.units(count, |u| bound * (2.0 * u - 1.0))
    }

    /// `f` of numbers in `[0, 1)`.
    fn units<T: WithDType>(&mut self, count: usize, f: impl Fn(f64) -> f64) -> Vec<T> {
        (0..count).map(|_| T::from_f64(f(self.unit()))).collect()
    }

    /// Box-Muller with `libm`, because the platform's `ln` and `cos` differ in the last bit.
    fn normal<T: WithDType>(&mut self, count: usize, deviation: f64) -> Vec<T> {
        let draw = |_| {
            let radius = (-2.0 * libm::log(1.0 - self.unit())).sqrt();
            T::from_f64(deviation * radius * libm::cos(std::f64::consts::TAU * self.unit()))
        };
        (0..count).map(draw).collect()
    }
}

/// The 128-bit FNV-1a hash.
pub(crate) fn fnv1a(bytes: &[u8]) -> u128 {
    bytes
        .iter()
        .fold(0x6c62272e07bb014262b821756295c58d, |hash, &byte| {
            (hash ^ u128::from(byte)).wrapping_mul(0x0000000001000000000000000000013b)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_pinned() {
        // A change here changes every result of every experiment.
        let drawn = Init::KaimingFanOut.draw::<f64>(1, "conv1.weight", &[4, 3, 2, 2]);
        assert_eq!(drawn.len(), 48);
        assert_eq!(drawn[0].to_bits(), PINNED, "{:#x}", drawn[0].to_bits());
    }
    const PINNED: u64 = 0x3fe8_d447_116f_7504;

    #[test]
    fn signs_and_whole_numbers_are_as_often() {
        let signs = Init::Signs.draw::<f32>(1, "s", &[1000]);
        assert!(signs.iter().all(|s| s.abs() == 1.0));
        assert!(signs.iter().sum::<f32>().abs() < 120.0);
        let numbers = Init::Below(5).draw::<f32>(1, "h", &[1000]);
        for number in 0..5 {
            let count = numbers.iter().filter(|&&n| n == number as f32).count();
            assert!((150..250).contains(&count), "{number}: {count}");
        }
    }

    #[test]
    fn deviation_and_independence() {
        let a = Init::KaimingFanOut.draw::<f64>(1, "a", &[64, 32, 3, 3]);
        let b = Init::KaimingFanOut.draw::<f64>(1, "b", &[64, 32, 3, 3]);
        assert_ne!(a[0], b[0]);
        assert_ne!(
            a[0],
            Init::KaimingFanOut.draw::<f64>(2, "a", &[64, 32, 3, 3])[0]
        );
        let variance = a.iter().map(|v| v * v).sum::<f64>() / a.len() as f64;
        assert!((variance / (2.0 / 576.0) - 1.0).abs() < 0.05, "{variance}");
        let bound = Init::UniformFanIn.draw::<f64>(1, "c", &[10, 100]);
        assert!(bound.iter().all(|v| v.abs() <= 0.1) && bound.iter().any(|v| v.abs() > 0.09));
    }
}
