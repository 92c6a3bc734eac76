//! Batch normalisation over batch, height and width of each channel, with the activation that follows, in one
//! node. Backward, what the activation let pass is computed anew, which takes less time than to read it.
//!
//! `y = γ·(x − μ)/√(σ² + ε) + β`. In training μ, σ² are the batch's (biased) and the running ones
//! move towards them by `momentum`, with the unbiased variance, as in PyTorch. In evaluation, and in
//! training with frozen statistics, the running ones are constants. Mean and squared deviations are
//! taken plane by plane (in cache, two passes) and combined in f64 in the order of the images (Chan,
//! Golub, LeVeque 1983), so that a large mean costs no accuracy.

use std::sync::{Arc, OnceLock};

use candle_core::{
    CpuStorage, CustomOp3, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, CudaStorage};
#[cfg(feature = "cuda")]
use isqrt_device::cuda::{Output, address, input};
use rayon::prelude::*;

use crate::blocked::{self, Lanes, norm};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, Unwritten, dispatch, lane_sums, read, values, vectorised};
use crate::error::shape_error;
use crate::ops::{Activation, Clip};
use crate::tape;
use crate::{Buffer, Mode, Result};

/// Options and running statistics of a batch normalisation.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// Running mean, `(channels)`.
    pub running_mean: Buffer,
    /// Running variance (unbiased), `(channels)`.
    pub running_var: Buffer,
    /// Share of the batch in an update of the running statistics; PyTorch's default is 0.1.
    pub momentum: f64,
    /// Added to the variance; PyTorch's default is 1e-5.
    pub epsilon: f64,
    /// What follows.
    pub activation: Activation,
}

/// Batch normalisation of `x` with scale `gamma` and shift `beta`.
///
/// # Shapes
/// - `x`: `(batch, channels, height, width)` or blocked ([`super::block`]), and so the result
/// - `gamma`, `beta`: `(channels)`
///
/// # Errors
/// [`crate::Error::Shape`] where these do not fit, or for a single value a channel where the
/// batch's statistics are used (its variance is 0 and its unbiased variance undefined).
pub fn batch_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    norm: &BatchNorm,
    mode: Mode,
) -> Result<Tensor> {
    let (lanes, [batch, panels, height, width]) = blocked::dims_of_any_layout("batch_norm", x)?;
    check_affine("batch_norm", panels * lanes, gamma, beta)?;
    let op = BatchNormOp::new((batch, panels * lanes, lanes), height * width, norm, mode)?;
    let pending = op.pending();
    let affine = [&gamma.contiguous()?, &beta.contiguous()?];
    let y = tape::apply3(&x.contiguous()?, affine, op)?;
    norm.update(&pending, batch * height * width, mode)?;
    Ok(y)
}

/// Checks scale and shift of `channels`.
pub(crate) fn check_affine(
    op: &'static str,
    channels: usize,
    gamma: &Tensor,
    beta: &Tensor,
) -> Result<()> {
    if gamma.dims() == [channels] && beta.dims() == [channels] {
        return Ok(());
    }
    shape_error(
        op,
        format!(
            "{channels} channels need as many values of scale and shift, got {:?} and {:?}",
            gamma.dims(),
            beta.dims()
        ),
    )
}

impl BatchNorm {
    /// Moves the running statistics towards those of a batch of `count` values a channel.
    pub(crate) fn update(&self, pending: &Pending, count: usize, mode: Mode) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some((mean, variance)) = pending.on_gpu.as_ref().and_then(|norm| norm.moved()) {
            self.running_mean.set(mean);
            self.running_var.set(variance);
            return Ok(());
        }
        let Some(batch) = pending.used.get().filter(|_| mode.updates_statistics()) else {
            return Ok(());
        };
        let unbiased = count as f64 / (count as f64 - 1.0);
        self.running_mean.blend(self.momentum, |c| batch.mean[c])?;
        self.running_var
            .blend(self.momentum, |c| batch.variance[c] * unbiased)
    }
}

/// Mean and biased variance of each channel.
#[derive(Debug, Clone)]
pub(crate) struct Statistics {
    mean: Vec<f64>,
    variance: Vec<f64>,
}

/// What a forward pass leaves for the running statistics.
pub(crate) struct Pending {
    used: Arc<OnceLock<Statistics>>,
    #[cfg(feature = "cuda")]
    on_gpu: Option<Arc<cuda::norm::Norm>>,
}

pub(crate) struct BatchNormOp {
    channels: usize,
    /// Channels beside each other: 1, or a block.
    lanes: usize,
    plane: usize,
    epsilon: f64,
    pub activation: Activation,
    /// Running statistics, where these are used.
    fixed: Option<Statistics>,
    /// The statistics that the forward pass used.
    used: Arc<OnceLock<Statistics>>,
    /// The same op for maps on a GPU, and what its forward pass left.
    #[cfg(feature = "cuda")]
    on_gpu: Option<Arc<cuda::norm::Norm>>,
    #[cfg(feature = "cuda")]
    kept: OnceLock<cuda::norm::Kept>,
}

impl BatchNormOp {
    /// For maps of `(batch, channels, lanes)` with `plane` pixels.
    pub(crate) fn new(
        (batch, channels, lanes): (usize, usize, usize),
        plane: usize,
        norm: &BatchNorm,
        mode: Mode,
    ) -> Result<Self> {
        if mode.uses_batch_statistics() && batch * plane < 2 {
            return shape_error(
                "batch_norm",
                format!(
                    "training needs more than one value a channel, got {batch} images of {plane} \
                     pixel"
                ),
            );
        }
        for (name, buffer) in [
            ("mean", &norm.running_mean),
            ("variance", &norm.running_var),
        ] {
            if buffer.get().dims() != [channels] {
                return shape_error(
                    "batch_norm",
                    format!(
                        "{channels} channels need as many values of the running {name}, got {:?}",
                        buffer.get().dims()
                    ),
                );
            }
        }
        let on_gpu = norm.running_mean.get().device().is_cuda();
        let fixed = match mode.uses_batch_statistics() || on_gpu {
            true => None,
            false => Some(Statistics {
                mean: norm.running_mean.values()?,
                variance: norm.running_var.values()?,
            }),
        };
        Ok(Self {
            channels,
            lanes,
            plane,
            epsilon: norm.epsilon,
            activation: norm.activation,
            fixed,
            used: Arc::default(),
            #[cfg(feature = "cuda")]
            on_gpu: match on_gpu {
                true => {
                    let constant = !mode.uses_batch_statistics();
                    let updates = mode.updates_statistics();
                    Some(Arc::new(cuda::norm::Norm::new(norm, constant, updates)?))
                }
                false => None,
            },
            #[cfg(feature = "cuda")]
            kept: OnceLock::new(),
        })
    }

    /// What [`BatchNorm::update`] needs once the op has run.
    pub(crate) fn pending(&self) -> Pending {
        Pending {
            used: Arc::clone(&self.used),
            #[cfg(feature = "cuda")]
            on_gpu: self.on_gpu.clone(),
        }
    }

    /// Normalises maps on a GPU; with maps `beside`, adds them and rectifies the sum.
    #[cfg(feature = "cuda")]
    pub(crate) fn forward_on_gpu<T: cuda::Maps>(
        &self,
        device: &CudaDevice,
        (extent, maps): (cuda::norm::Extent, (u64, Option<u64>)),
        affine: (u64, u64),
    ) -> candle_core::Result<Output<T>> {
        let Some(norm) = &self.on_gpu else {
            candle_core::bail!("batch_norm: the running statistics are not on the GPU")
        };
        let (y, kept) = norm.forward::<T>(device, extent, maps, affine)?;
        // candle runs an op value once.
        let _ = self.kept.set(kept);
        Ok(y)
    }

    /// Gradients of the maps `x`, and of scale and shift, on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn backward_on_gpu<T: cuda::Maps>(
        &self,
        device: &CudaDevice,
        extent: cuda::norm::Extent,
        (x, dy): (u64, u64),
    ) -> candle_core::Result<cuda::norm::Gradients<T>> {
        match (&self.on_gpu, self.kept.get()) {
            (Some(norm), Some(kept)) => norm.backward::<T>(device, extent, kept, (x, dy)),
            _ => candle_core::bail!("batch_norm: backward before forward"),
        }
    }

    fn image(&self) -> usize {
        self.channels * self.plane
    }

    fn measure<T: Lanes>(&self, x: &[T]) -> Statistics {
        let n = self.plane as f64;
        let mut planes = vec![(0.0, 0.0); x.len() / self.plane];
        planes
            .par_chunks_mut(self.channels)
            .zip(x.par_chunks_exact(self.image()))
            .for_each(|(planes, x)| {
                if self.lanes > 1 {
                    let panels = x.chunks_exact(self.plane * self.lanes);
                    for (out, x) in planes.chunks_exact_mut(self.lanes).zip(panels) {
                        out.copy_from_slice(&norm::statistics(x));
                    }
                    return;
                }
                for (out, x) in planes.iter_mut().zip(x.chunks_exact(self.plane)) {
                    *out = plane_statistics(x);
                }
            });
        let mut mean = vec![0.0; self.channels];
        let mut squares = vec![0.0; self.channels];
        for (image, planes) in planes.chunks_exact(self.channels).enumerate() {
            let seen = image as f64 * n;
            for (c, &(plane_mean, plane_squares)) in planes.iter().enumerate() {
                let delta = plane_mean - mean[c];
                mean[c] += delta * n / (seen + n);
                squares[c] += plane_squares + delta * delta * seen * n / (seen + n);
            }
        }
        let count = x.len() as f64 / self.channels as f64;
        Statistics {
            mean,
            variance: squares.iter().map(|s| s.max(0.0) / count).collect(),
        }
    }

    /// Mean and `1/√(σ² + ε)` of each channel.
    fn normalisers(&self) -> candle_core::Result<Vec<(f64, f64)>> {
        let Some(used) = self.used.get() else {
            candle_core::bail!("batch_norm: backward before forward")
        };
        let inverse = |v: &f64| 1.0 / (v + self.epsilon).sqrt();
        Ok(used
            .mean
            .iter()
            .zip(&used.variance)
            .map(|(&m, v)| (m, inverse(v)))
            .collect())
    }

    pub(crate) fn forward<T: Lanes>(
        &self,
        x: &[T],
        gamma: &[T],
        beta: &[T],
    ) -> candle_core::Result<Vec<T>> {
        self.used
            .get_or_init(|| self.fixed.clone().unwrap_or_else(|| self.measure(x)));
        let lines = self.lines(&self.normalisers()?, gamma, beta);
        let clip = self.activation.clip();
        let mut y = Unwritten::new(x.len());
        let images = y.places().par_chunks_exact_mut(self.image());
        images
            .zip(x.par_chunks_exact(self.image()))
            .for_each(|(y, x)| {
                if self.lanes > 1 {
                    let size = self.plane * self.lanes;
                    let panels = y.chunks_exact_mut(size).zip(x.chunks_exact(size));
                    for ((y, x), lines) in panels.zip(lines.chunks_exact(self.lanes)) {
                        norm::normalise(y, x, lines, clip);
                    }
                    return;
                }
                let planes = y
                    .chunks_exact_mut(self.plane)
                    .zip(x.chunks_exact(self.plane));
                for ((y, x), &line) in planes.zip(&lines) {
                    normalise(y, x, line, clip);
                }
            });
        // SAFETY: `x` consists of whole images and these of whole planes, all written.
        Ok(unsafe { y.written() })
    }

    /// What the forward pass makes of the values of each channel.
    fn lines<T: Lanes>(&self, normalisers: &[(f64, f64)], gamma: &[T], beta: &[T]) -> Vec<Line<T>> {
        let affine = gamma.iter().zip(beta);
        let lines = normalisers.iter().zip(affine);
        let line = |(&(mean, inverse), (gamma, &shift)): (&(f64, f64), (&T, &T))| Line {
            mean: T::from_f64(mean),
            scale: T::from_f64(gamma.to_f64() * inverse),
            shift,
            offset: T::ZERO,
            slope: T::ZERO,
        };
        lines.map(line).collect()
    }

    /// With running statistics: `weight` (`channels` rows) and bias of the convolution that gives
    /// what this norm makes of the convolution with `weight`.
    pub(crate) fn folded<T: Element>(
        &self,
        weight: &[T],
        gamma: &[T],
        beta: &[T],
    ) -> candle_core::Result<(Vec<T>, Vec<T>)> {
        if let Some(fixed) = &self.fixed {
            self.used.get_or_init(|| fixed.clone());
        }
        let normalisers = self.normalisers()?;
        let scale = |c: usize| gamma[c].to_f64() * normalisers[c].1;
        let shift = |c: usize| beta[c].to_f64() - normalisers[c].0 * scale(c);
        let row = weight.len() / self.channels;
        let mut scaled = Unwritten::new(weight.len());
        let rows = scaled.places().par_chunks_exact_mut(row);
        rows.zip(weight.par_chunks_exact(row))
            .enumerate()
            .for_each(|(c, (to, from))| {
                let scale = T::from_f64(scale(c));
                to.iter_mut()
                    .zip(from)
                    .for_each(|(to, &from)| *to = from * scale);
            });
        let bias = (0..self.channels).map(|c| T::from_f64(shift(c)));
        // SAFETY: the weights are whole rows, and each was written.
        Ok((unsafe { scaled.written() }, bias.collect()))
    }

    /// Gradients of `x`, `gamma` and `beta`, through this activation of what the forward pass computes.
    pub(crate) fn backward<T: Lanes>(
        &self,
        x: &[T],
        (gamma, beta): (&[T], &[T]),
        dy: &[T],
        activation: Activation,
    ) -> candle_core::Result<(Vec<T>, Vec<T>, Vec<T>)> {
        let normalisers = self.normalisers()?;
        let mut lines = self.lines(&normalisers, gamma, beta);
        let clip = activation.clip();
        let (image, plane) = (self.image(), self.plane);

        // Of each plane: Σ dy and Σ dy·(x − μ).
        let mut planes = vec![(0.0, 0.0); x.len() / plane];
        planes
            .par_chunks_mut(self.channels)
            .zip(x.par_chunks_exact(image).zip(dy.par_chunks_exact(image)))
            .for_each(|(planes, (x, dy))| {
                let size = plane * self.lanes;
                let maps = x.chunks_exact(size).zip(dy.chunks_exact(size));
                if self.lanes > 1 {
                    let panels = planes.chunks_exact_mut(self.lanes);
                    let panels = panels.zip(lines.chunks_exact(self.lanes));
                    for ((out, lines), (x, dy)) in panels.zip(maps) {
                        out.copy_from_slice(&norm::sums(x, dy, lines, clip));
                    }
                    return;
                }
                for ((out, &line), (x, dy)) in planes.iter_mut().zip(&lines).zip(maps) {
                    *out = plane_sums(x, dy, line, clip);
                }
            });
        let mut sums = vec![(0.0, 0.0); self.channels];
        for planes in planes.chunks_exact(self.channels) {
            for (sum, plane) in sums.iter_mut().zip(planes) {
                sum.0 += plane.0;
                sum.1 += plane.1;
            }
        }
        let count = x.len() as f64 / self.channels as f64;
        // Statistics of the batch move with x:
        // dx = γ/σ · (dy − mean(dy) − (x − μ)/σ² · mean(dy·(x − μ))).
        if self.fixed.is_none() {
            let channels = sums.iter().zip(&normalisers);
            for (line, (sum, (_, inverse))) in lines.iter_mut().zip(channels) {
                line.offset = T::from_f64(sum.0 / count);
                line.slope = T::from_f64(sum.1 * inverse * inverse / count);
            }
        }
        let mut dx = Unwritten::new(x.len());
        dx.places()
            .par_chunks_exact_mut(image)
            .zip(x.par_chunks_exact(image).zip(dy.par_chunks_exact(image)))
            .for_each(|(dx, (x, dy))| {
                let size = plane * self.lanes;
                let maps = x.chunks_exact(size).zip(dy.chunks_exact(size));
                let maps = dx.chunks_exact_mut(size).zip(maps);
                for ((dx, (x, dy)), lines) in maps.zip(lines.chunks_exact(self.lanes)) {
                    match *lines {
                        [line] => plane_gradient(dx, x, dy, line, clip),
                        _ => norm::gradient(dx, x, dy, lines, clip),
                    }
                }
            });
        // SAFETY: whole images of whole planes, all written.
        let dx = unsafe { dx.written() };
        let dgamma = sums
            .iter()
            .zip(&normalisers)
            .map(|(s, n)| T::from_f64(s.1 * n.1))
            .collect();
        let dbeta = sums.iter().map(|s| T::from_f64(s.0)).collect();
        Ok((dx, dgamma, dbeta))
    }
}

/// What becomes of a channel's values, `(x − mean)·scale + shift`, and of their gradients,
/// `scale·(dy − offset − (x − mean)·slope)`.
#[derive(Clone, Copy)]
pub(crate) struct Line<T> {
    pub mean: T,
    pub scale: T,
    pub shift: T,
    pub offset: T,
    pub slope: T,
}

impl<T: Element> Line<T> {
    #[inline(always)]
    pub(crate) fn value(self, x: T) -> T {
        (x - self.mean) * self.scale + self.shift
    }

    /// What comes from above, through the activation.
    #[inline(always)]
    pub(crate) fn upstream(self, x: T, dy: T, clip: Clip<T>) -> T {
        match clip.on {
            true => clip.gradient(self.value(x), dy),
            false => dy,
        }
    }

    #[inline(always)]
    pub(crate) fn gradient(self, x: T, dy: T, clip: Clip<T>) -> T {
        let upstream = self.upstream(x, dy, clip);
        self.scale * (upstream - self.offset - (x - self.mean) * self.slope)
    }
}

vectorised! {
    /// Mean of a plane and the sum of its squared deviations from it.
    fn plane_statistics<T: Element>(x: &[T]) -> (f64, f64) {
        let n = x.len() as f64;
        let [sum] = lane_sums([x], |[x]| [x]);
        let center = T::from_f64(sum.to_f64() / n);
        let [rest, squares] = lane_sums([x], |[x]| [x - center, (x - center) * (x - center)]);
        // `center` is the mean rounded: correct the mean, keep the squares about it.
        let rest = rest.to_f64() / n;
        (center.to_f64() + rest, squares.to_f64() - n * rest * rest)
    }

    fn normalise<T: Element>(y: &mut [T], x: &[T], line: Line<T>, clip: Clip<T>) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = clip.of(line.value(x));
        }
    }

    /// Σ dy and Σ dy·(x − mean) of a plane.
    fn plane_sums<T: Element>(x: &[T], dy: &[T], line: Line<T>, clip: Clip<T>) -> (f64, f64) {
        let [sum, product] = lane_sums([x, dy], |[x, dy]| {
            let upstream = line.upstream(x, dy, clip);
            [upstream, upstream * (x - line.mean)]
        });
        (sum.to_f64(), product.to_f64())
    }

    fn plane_gradient<T: Element>(dx: &mut [T], x: &[T], dy: &[T], line: Line<T>, clip: Clip<T>) {
        for (dx, (&x, &dy)) in dx.iter_mut().zip(x.iter().zip(dy)) {
            *dx = line.gradient(x, dy, clip);
        }
    }
}

impl CustomOp3 for BatchNormOp {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("batch_norm", s1.dtype(), T => {
            let y = self.forward::<T>(values(s1, l1)?, values(s2, l2)?, values(s3, l3)?)?;
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let extent = cuda::norm::Extent::of(l1.dims())?;
        let y = cuda::of_maps!("batch_norm", s1.dtype(), T => {
            let affine = (cuda::conv::parameter::<T>((s2, l2))?, cuda::conv::parameter::<T>((s3, l3))?);
            let x = input::<T>(s1, l1)?;
            Ok(self.forward_on_gpu::<T>(s1.device(), (extent, (x.at, None)), affine)?.into_storage())
        })?;
        Ok((y, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (device, extent) = (cuda::device_of(x)?, cuda::norm::Extent::of(x.dims())?);
            return cuda::of_maps!("batch_norm", x.dtype(), T => {
                let from = (address::<T>(x)?, address::<T>(&dy)?);
                let (dx, [dgamma, dbeta]) = self.backward_on_gpu::<T>(device, extent, from)?;
                Ok((
                    Some(dx.into_tensor(x.shape())),
                    Some(dgamma.into_tensor(self.channels)),
                    Some(dbeta.into_tensor(self.channels)),
                ))
            });
        }
        let (xs, gammas, betas, dys) = (read(x), read(gamma), read(beta), read(&dy));
        let device = x.device();
        dispatch!("batch_norm", x.dtype(), T => {
            let affine = (gammas.values()?, betas.values()?);
            let (dx, dgamma, dbeta) = self.backward::<T>(
                xs.values()?, affine, dys.values()?, self.activation)?;
            Ok((
                Some(Tensor::from_vec(dx, x.shape(), device)?),
                Some(Tensor::from_vec(dgamma, self.channels, device)?),
                Some(Tensor::from_vec(dbeta, self.channels, device)?),
            ))
        })
    }
}
