//! Dropout whose mask is never stored: the backward pass makes it again from its key.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, Unwritten, dispatch, read, values, vectorised};
use crate::tape;
use crate::{Error, Mode, Result, philox};

/// Values that one task works through; a multiple of what the generator makes at once.
const BLOCK: usize = 1 << 14;

/// What a mask is made from, besides the place of each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the layer, so that no two share a mask.
    pub layer: u64,
    /// Number of the forward pass.
    pub step: u64,
}

/// In training, zeroes each element with probability `p` and divides the others by `1 − p`
/// (Srivastava et al. 2014); in evaluation, `x` itself. Any shape.
///
/// The same key gives the same mask, on any number of threads; masks of f32 and f64 are equal.
///
/// # Errors
/// [`Error::Option`] for a `p` outside of `[0, 1)`.
pub fn dropout(x: &Tensor, p: f64, key: MaskKey, mode: Mode) -> Result<Tensor> {
    check(p)?;
    if !mode.is_training() || p == 0.0 {
        return Ok(x.clone());
    }
    let op = Dropout {
        key: philox::key(key.seed, key.layer),
        step: key.step,
        // Rounding to the nearest of 2^32 chances; the largest p below 1 must still fit.
        threshold: (p * (1u64 << 32) as f64).round() as u32,
        scale: 1.0 / (1.0 - p),
    };
    Ok(tape::apply1(&x.contiguous()?, op)?)
}

/// Refuses a probability that leaves nothing or is none.
pub(crate) fn check(p: f64) -> Result<()> {
    match (0.0..1.0).contains(&p) {
        true => Ok(()),
        false => Err(Error::Option {
            what: "dropout p",
            value: p.to_string(),
            expected: "at least 0 and less than 1",
        }),
    }
}

struct Dropout {
    key: u64,
    step: u64,
    threshold: u32,
    scale: f64,
}

impl Dropout {
    #[cfg(feature = "cuda")]
    fn mask(&self) -> cuda::dropout::Mask {
        cuda::dropout::Mask {
            key: self.key,
            step: self.step,
            threshold: self.threshold,
            scale: self.scale,
        }
    }

    fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        let mut y = Unwritten::new(x.len());
        y.places()
            .par_chunks_mut(BLOCK)
            .zip(x.par_chunks(BLOCK))
            .enumerate()
            .for_each(|(task, (y, x))| {
                let first = (task * (BLOCK / philox::BLOCK)) as u64;
                let scale = T::from_f64(self.scale);
                mask(y, x, self.key, self.step, first, self.threshold, scale);
            });
        // SAFETY: as many values as `x` has, all written.
        unsafe { y.written() }
    }
}

vectorised! {
    /// `y = x · scale` where the random word reaches the threshold, else 0.
    fn mask<T: Element>(
        y: &mut [T],
        x: &[T],
        key: u64,
        step: u64,
        first: u64,
        threshold: u32,
        scale: T,
    ) {
        for (i, (y, x)) in y.chunks_mut(philox::BLOCK).zip(x.chunks(philox::BLOCK)).enumerate() {
            let words = philox::block(key, step, first + i as u64);
            let pairs = y.iter_mut().zip(x).zip(words.as_flattened());
            for ((y, &x), &word) in pairs {
                *y = if word >= threshold { x * scale } else { T::ZERO };
            }
        }
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("dropout", s.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.apply(values::<T>(s, l)?)))
        })?;
        Ok((y, l.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::of_maps!("dropout", s.dtype(), T => {
            let x = isqrt_device::cuda::input::<T>(s, l)?;
            Ok(cuda::dropout::apply::<T>(s.device(), x.at, x.len, self.mask())?.into_storage())
        })?;
        Ok((y, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (device, len) = (cuda::device_of(x)?, x.elem_count());
            return cuda::of_maps!("dropout", x.dtype(), T => {
                let at = isqrt_device::cuda::address::<T>(&dy)?;
                let dx = cuda::dropout::apply::<T>(device, at, len, self.mask())?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let dys = read(&dy);
        dispatch!("dropout", x.dtype(), T => {
            let dx = self.apply(dys.values::<T>()?);
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
