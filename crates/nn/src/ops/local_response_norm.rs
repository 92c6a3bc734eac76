//! Local response normalisation across channels (Krizhevsky et al. 2012), in PyTorch's form.
//!
//! `y_c = x_c · s_c^−β` with `s_c = k + α/size · Σ x_j²` over the `size` channels around `c`, of
//! which an even size has one more before `c` than after it; those outside of the input are zeros.
//! Adjoint: `dx_i = dy_i · s_i^−β − 2αβ/size · x_i · Σ dy_c · x_c · s_c^(−β−1)` over the channels
//! whose windows hold `i`. Nothing is kept for it: `s` is computed again.

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::dims4;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, Unwritten, dispatch, read, values, vectorised, with_scratch};
use crate::record::note_op;
use crate::tape;
use crate::{Error, Result};

/// Options of a local response normalisation. Note that α is divided by the size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LocalResponseNorm {
    /// Channels in a window.
    pub size: usize,
    /// α.
    pub alpha: f64,
    /// β.
    pub beta: f64,
    /// k.
    pub k: f64,
}

impl LocalResponseNorm {
    /// This size with PyTorch's defaults: α = 1e-4, β = 0.75, k = 1.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            alpha: 1e-4,
            beta: 0.75,
            k: 1.0,
        }
    }
}

/// Local response normalisation of `x`.
///
/// # Shapes
/// - `x`: `(batch, channels, height, width)`, and so the result
///
/// # Errors
/// [`crate::Error::Shape`] for another rank, [`crate::Error::Option`] for a size of 0, a negative
/// or non-finite α or β, or a k that is not positive.
pub fn local_response_norm(x: &Tensor, norm: LocalResponseNorm) -> Result<Tensor> {
    let [_, channels, height, width] = dims4("local_response_norm", x)?;
    let LocalResponseNorm {
        size,
        alpha,
        beta,
        k,
    } = norm;
    let range = |what, value: f64, expected| {
        Err(Error::Option {
            what,
            value: value.to_string(),
            expected,
        })
    };
    if size == 0 {
        return range("local_response_norm size", 0.0, "at least 1");
    }
    for (what, value) in [
        ("local_response_norm alpha", alpha),
        ("local_response_norm beta", beta),
    ] {
        if !(value >= 0.0 && value.is_finite()) {
            return range(what, value, "finite, at least 0");
        }
    }
    if !(k > 0.0 && k.is_finite()) {
        return range("local_response_norm k", k, "finite, above 0");
    }
    let op = LrnOp {
        norm,
        channels,
        plane: height * width,
    };
    let y = tape::apply1(&x.contiguous()?, op)?;
    note_op("local_response_norm", &y);
    Ok(y)
}

struct LrnOp {
    norm: LocalResponseNorm,
    channels: usize,
    plane: usize,
}

impl LrnOp {
    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> cuda::windows::Response {
        cuda::windows::Response {
            alpha: self.norm.alpha / self.norm.size as f64,
            beta: self.norm.beta,
            k: self.norm.k,
            size: self.norm.size as i32,
            channels: self.channels as i32,
            pixels: self.plane as i32,
            unused: 0,
        }
    }

    fn image(&self) -> usize {
        self.channels * self.plane
    }

    /// Channels in the window of `c`.
    fn window(&self, c: usize) -> Range<usize> {
        let after = (self.norm.size - 1) / 2;
        c.saturating_sub(self.norm.size / 2)..(c + after + 1).min(self.channels)
    }

    /// Channels whose windows hold `c`.
    fn holders(&self, c: usize) -> Range<usize> {
        let before = (self.norm.size - 1) / 2;
        c.saturating_sub(before)..(c + self.norm.size / 2 + 1).min(self.channels)
    }

    /// `s` of channel `c` of an image, into `s`.
    fn scale<T: Element>(&self, s: &mut [T], x: &[T], c: usize) {
        s.fill(T::ZERO);
        for j in self.window(c) {
            add_squares(s, &x[j * self.plane..(j + 1) * self.plane]);
        }
        let alpha = T::from_f64(self.norm.alpha / self.norm.size as f64);
        axpb(s, alpha, T::from_f64(self.norm.k));
    }

    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let mut y = Unwritten::new(x.len());
        y.places()
            .par_chunks_exact_mut(self.image())
            .zip(x.par_chunks_exact(self.image()))
            .for_each(|(y, x)| {
                for (c, y) in y.chunks_exact_mut(self.plane).enumerate() {
                    self.scale(y, x, c);
                    let x = &x[c * self.plane..(c + 1) * self.plane];
                    times_power(y, x, self.norm.beta);
                }
            });
        // SAFETY: whole images of whole planes, all written.
        unsafe { y.written() }
    }

    fn backward<T: Element>(&self, x: &[T], dy: &[T]) -> Vec<T> {
        let LocalResponseNorm {
            size, alpha, beta, ..
        } = self.norm;
        let factor = T::from_f64(-2.0 * alpha * beta / size as f64);
        let plane = self.plane;
        let mut dx = Unwritten::new(x.len());
        dx.places()
            .par_chunks_exact_mut(self.image())
            .zip(x.par_chunks_exact(self.image()))
            .zip(dy.par_chunks_exact(self.image()))
            .for_each(|((dx, x), dy)| {
                // The terms dy·x·s^(−β−1) of all channels, and s of one.
                with_scratch(self.image() + plane, |scratch| {
                    let (terms, s) = scratch.split_at_mut(self.image());
                    for c in 0..self.channels {
                        let place = c * plane..(c + 1) * plane;
                        self.scale(s, x, c);
                        let (x, dy) = (&x[place.clone()], &dy[place.clone()]);
                        own_terms(&mut dx[place.clone()], &mut terms[place], s, x, dy, beta);
                    }
                    for c in 0..self.channels {
                        s.fill(T::ZERO);
                        for j in self.holders(c) {
                            add(s, &terms[j * plane..(j + 1) * plane]);
                        }
                        let place = c * plane..(c + 1) * plane;
                        add_products(&mut dx[place.clone()], factor, &x[place], s);
                    }
                });
            });
        // SAFETY: whole images of whole planes, all written.
        unsafe { dx.written() }
    }
}

/// `s^−β`; the usual β = 3/4 by square roots, which vectorise.
#[inline(always)]
fn power<T: Element>(s: T, beta: f64) -> T {
    if beta == 0.75 {
        let root = s.sqrt();
        T::ONE / (root * root.sqrt())
    } else {
        T::from_f64(libm::pow(s.to_f64(), -beta))
    }
}

vectorised! {
    fn add_squares<T: Element>(to: &mut [T], x: &[T]) {
        to.iter_mut().zip(x).for_each(|(to, &x)| *to += x * x);
    }

    fn add<T: Element>(to: &mut [T], x: &[T]) {
        to.iter_mut().zip(x).for_each(|(to, &x)| *to += x);
    }

    /// `x ← a·x + b`
    fn axpb<T: Element>(x: &mut [T], a: T, b: T) {
        x.iter_mut().for_each(|x| *x = a * *x + b);
    }

    /// `s ← x · s^−β`
    fn times_power<T: Element>(s: &mut [T], x: &[T], beta: f64) {
        s.iter_mut().zip(x).for_each(|(s, &x)| *s = x * power(*s, beta));
    }

    /// `own = dy · s^−β` and `terms = dy · x · s^(−β−1)`
    fn own_terms<T: Element>(own: &mut [T], terms: &mut [T], s: &[T], x: &[T], dy: &[T], beta: f64) {
        let terms = &mut terms[..own.len()];
        let (s, x, dy) = (&s[..own.len()], &x[..own.len()], &dy[..own.len()]);
        for i in 0..own.len() {
            own[i] = dy[i] * power(s[i], beta);
            terms[i] = own[i] * x[i] / s[i];
        }
    }

    /// `to += factor · a · b`
    fn add_products<T: Element>(to: &mut [T], factor: T, a: &[T], b: &[T]) {
        to.iter_mut().zip(a.iter().zip(b)).for_each(|(to, (&a, &b))| *to += factor * a * b);
    }
}

impl CustomOp1 for LrnOp {
    fn name(&self) -> &'static str {
        "local_response_norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("local_response_norm", s.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.forward(values::<T>(s, l)?)))
        })?;
        Ok((y, l.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::of_maps!("local_response_norm", s.dtype(), T => {
            let x = isqrt_device::cuda::input::<T>(s, l)?;
            let (device, from) = (s.device(), (x.at, None));
            let y = cuda::windows::response_norm::<T>(device, self.on_gpu(), x.len, from)?;
            Ok(y.into_storage())
        })?;
        Ok((y, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            use isqrt_device::cuda::address;
            let (device, len) = (cuda::device_of(x)?, x.elem_count());
            return cuda::of_maps!("local_response_norm", x.dtype(), T => {
                let from = (address::<T>(x)?, Some(address::<T>(&dy)?));
                let dx = cuda::windows::response_norm::<T>(device, self.on_gpu(), len, from)?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let (xs, dys) = (read(x), read(&dy));
        dispatch!("local_response_norm", x.dtype(), T => {
            let dx = self.backward::<T>(xs.values()?, dys.values()?);
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
