//! Random numbers that are the same on every machine and for ever.
//!
//! A [`Stream`] is ChaCha8 keyed by four words (seed, purpose, and two more such as epoch and
//! sample index), so every image has its own numbers whatever thread works on it. The conversions
//! to ranges and normal variates are written out here, with `libm` instead of the platform's
//! mathematics, because those of the `rand` crate may change between versions and the platform's
//! `cos` and `ln` differ in the last bit.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream is for. Part of its key: no two uses share numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Order of the samples in an epoch: (epoch, 0).
    Order = 1,
    /// Augmentation of one sample: (epoch, sample).
    Augment = 2,
    /// Carving a part off another: (label, which carve).
    Split = 3,
    /// An image of the embedded set: (part and class, index).
    E10 = 4,
    /// Which images are looked at for statistics.
    Stats = 5,
    /// Size and box of an image of a miniature set: (part and class, index).
    Miniature = 9,
    /// An image of a family of materials: (family, part and class, index).
    Material = 10,
}

/// A stream of random numbers with its own key.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    rng: ChaCha8Rng,
    spare: Option<f64>,
}

impl Stream {
    /// The stream with this key, from its start.
    pub(crate) fn new(seed: u64, purpose: Purpose, a: u64, b: u64) -> Self {
        let mut key = [0u8; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, a, b]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self {
            rng: ChaCha8Rng::from_seed(key),
            spare: None,
        }
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `[low, high)`.
    pub(crate) fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Uniform in `0..n`, without bias (Lemire's multiplication with rejection). `n` must be > 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.rng.next_u64()) * u128::from(n);
            if wide as u64 >= threshold {
                return (wide >> 64) as usize;
            }
        }
    }

    /// True half of the time.
    pub(crate) fn coin(&mut self) -> bool {
        self.rng.next_u64() >> 63 == 1
    }

    /// Standard normal variate (Box-Muller; the second of each pair is kept for the next call).
    pub(crate) fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * libm::log(1.0 - self.unit())).sqrt();
        let angle = std::f64::consts::TAU * self.unit();
        self.spare = Some(radius * libm::sin(angle));
        radius * libm::cos(angle)
    }

    /// Shuffles in place (Fisher-Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_pinned() {
        // A change here changes every split, order and embedded image: bump their versions.
        let mut stream = Stream::new(7, Purpose::Order, 1, 2);
        let drawn: Vec<usize> = (0..6).map(|_| stream.below(1000)).collect();
        assert_eq!(drawn, [89, 961, 315, 654, 846, 79]);
    }

    #[test]
    fn moments_are_right() {
        let mut stream = Stream::new(1, Purpose::E10, 0, 0);
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03, "{mean}");
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        let heads = (0..n).filter(|_| stream.coin()).count();
        assert!((heads as f64 / n as f64 - 0.5).abs() < 0.02, "{heads}");
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first = |s, p, a, b| Stream::new(s, p, a, b).below(usize::MAX);
        let base = first(0, Purpose::Order, 0, 0);
        for other in [
            first(1, Purpose::Order, 0, 0),
            first(0, Purpose::Augment, 0, 0),
            first(0, Purpose::Order, 1, 0),
            first(0, Purpose::Order, 0, 1),
        ] {
            assert_ne!(base, other);
        }
    }
}
