//! Convolution of blocked feature maps.
//!
//! Forward, an output pixel is the sum over taps and panels of 16 channels times 16 rows of
//! weights ([`Gather`]). The gradient of the input is the same sum with the weights transposed:
//! an input pixel `y` with `(y + padding) mod stride = r` meets the taps `r, r + stride, …` at
//! output rows `(y + padding) / stride - t`, so each of the `stride²` phases is such a sum. The
//! gradient of the weights runs over the pixels ([`Correlate`]); there each thread owns weights,
//! so nothing is added up between threads. Weights are packed into blocks once a call. In f32 most
//! convolutions of stride 1 with a 3x3 kernel go through [`Winograd`] instead.

use candle_core::{
    CpuStorage, CustomOp2, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use isqrt_linalg::Kernel;
use rayon::prelude::*;
use std::borrow::Cow;

use super::kernel::{Correlate, Gather, Isa, Lanes};
use super::winograd::Winograd;
use super::{dims, width};
use crate::Result;
use crate::element::{Unwritten, dispatch, read, values};
use crate::error::shape_error;
use crate::ops::{Conv, dims4};

/// Output pixels that share a pass over the weights: several small images together.
const PIXELS: usize = 192;

/// As [`crate::ops::conv2d`] for blocked `x`; the output is blocked.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, options: Conv) -> Result<Tensor> {
    let geometry = Geometry::new(x, weight, options)?;
    Ok(x.contiguous()?.apply_op2(
        &weight.contiguous()?,
        Op {
            geometry,
            kernel: Kernel::Auto,
        },
    )?)
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub batch: usize,
    /// Panels of channels in and out.
    pub panels: (usize, usize),
    pub input: (usize, usize),
    pub output: (usize, usize),
    pub kernel: (usize, usize),
    pub stride: usize,
    pub padding: usize,
    pub width: usize,
}

/// A map with zeros around it.
#[derive(Debug, Clone, Copy)]
struct Padded {
    height: usize,
    width: usize,
    top: usize,
    left: usize,
}

impl Geometry {
    pub(super) fn new(x: &Tensor, weight: &Tensor, options: Conv) -> Result<Self> {
        let [batch, panels, height, columns] = dims("conv2d", x)?;
        let [out, channels, kh, kw] = dims4("conv2d weight", weight)?;
        let Conv { stride, padding } = options;
        options.check()?;
        let fits = height + 2 * padding >= kh && columns + 2 * padding >= kw;
        let lanes = width(x.dtype()).unwrap_or(1);
        if panels * lanes != channels || out % lanes != 0 || !fits {
            return shape_error(
                "conv2d",
                format!(
                    "weight {:?} with padding {padding} does not fit blocked input {:?} (output \
                     channels come in blocks of {lanes} too)",
                    weight.dims(),
                    x.dims()
                ),
            );
        }
        let side = |side: usize, kernel| (side + 2 * padding - kernel) / stride + 1;
        Ok(Self {
            batch,
            panels: (panels, out / lanes),
            input: (height, columns),
            output: (side(height, kh), side(columns, kw)),
            kernel: (kh, kw),
            stride,
            padding,
            width: lanes,
        })
    }

    /// Of the output, as a tensor.
    pub(super) fn shape(&self) -> Shape {
        let (height, columns) = self.output;
        Shape::from((self.batch, self.panels.1, height, columns, self.width))
    }

    fn taps(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    fn source(&self) -> Padded {
        let p = self.padding;
        Padded {
            height: self.input.0 + 2 * p,
            width: self.input.1 + 2 * p,
            top: p,
            left: p,
        }
    }

    pub(super) fn forward<T: Lanes>(&self, x: &[T], weight: &[T], isa: &Isa<T>) -> Vec<T> {
        if let Some(winograd) = Winograd::of::<T>(self) {
            return winograd.forward(x, weight, isa);
        }
        let source = self.source();
        let x = pad(x, self.input, source);
        let (inputs, outputs) = self.panels;
        let weight = pack(weight, (outputs, inputs, self.taps()), false);
        let (w, s) = (self.width, self.stride);
        let mut pixels = Vec::with_capacity(self.output.0 * self.output.1);
        for y in 0..self.output.0 {
            for x in 0..self.output.1 {
                let place = (y * self.output.1 + x) * w;
                pixels.push(((y * s * source.width + x * s) * w, place));
            }
        }
        let mut blocks = Vec::with_capacity(inputs * self.taps());
        for panel in 0..inputs {
            for tap in 0..self.taps() {
                let (ky, kx) = (tap / self.kernel.1, tap % self.kernel.1);
                let at = panel * source.height * source.width + ky * source.width + kx;
                blocks.push((at * w, (panel * self.taps() + tap) * w * w));
            }
        }
        let mut y = Unwritten::new(self.batch * outputs * w * self.output.0 * self.output.1);
        Pass {
            x: &x,
            x_image: inputs * source.height * source.width * w,
            weight: &weight,
            weight_panel: inputs * self.taps() * w * w,
            y_panel: self.output.0 * self.output.1 * w,
            y_panels: outputs,
            batch: self.batch,
        }
        .run(y.places(), &pixels, &blocks, isa);
        // SAFETY: every panel of every image has every output pixel as a row of a tile.
        unsafe { y.written() }
    }

    pub(super) fn input_gradient<T: Lanes>(&self, dy: &[T], weight: &[T], isa: &Isa<T>) -> Vec<T> {
        if let Some(winograd) = Winograd::of::<T>(self) {
            return winograd.input_gradient(dy, weight, isa);
        }
        let ((inputs, outputs), (w, s)) = (self.panels, (self.width, self.stride));
        // Input row y meets output row (y + padding) / stride - t, for t up to `reach`.
        let reach = ((self.kernel.0 - 1) / s, (self.kernel.1 - 1) / s);
        let most = |side: usize| (side - 1 + self.padding) / s + 1;
        let source = Padded {
            height: (most(self.input.0).max(self.output.0)) + reach.0,
            width: (most(self.input.1).max(self.output.1)) + reach.1,
            top: reach.0,
            left: reach.1,
        };
        let dy = pad(dy, self.output, source);
        let weight = pack(weight, (outputs, inputs, self.taps()), true);
        let mut dx = Unwritten::new(self.batch * inputs * w * self.input.0 * self.input.1);
        let pass = Pass {
            x: &dy,
            x_image: outputs * source.height * source.width * w,
            weight: &weight,
            weight_panel: outputs * self.taps() * w * w,
            y_panel: self.input.0 * self.input.1 * w,
            y_panels: inputs,
            batch: self.batch,
        };
        for phase in 0..s * s {
            let phase = (phase / s, phase % s);
            let mut pixels = Vec::new();
            for y in (0..self.input.0).filter(|y| (y + self.padding) % s == phase.0) {
                for x in (0..self.input.1).filter(|x| (x + self.padding) % s == phase.1) {
                    let (row, column) = ((y + self.padding) / s, (x + self.padding) / s);
                    let from = (row * source.width + column) * w;
                    pixels.push((from, (y * self.input.1 + x) * w));
                }
            }
            let mut blocks = Vec::new();
            for panel in 0..outputs {
                for ky in (phase.0..self.kernel.0).step_by(s) {
                    for kx in (phase.1..self.kernel.1).step_by(s) {
                        let (row, column) = (reach.0 - ky / s, reach.1 - kx / s);
                        let at = (panel * source.height + row) * source.width + column;
                        let tap = ky * self.kernel.1 + kx;
                        blocks.push((at * w, (panel * self.taps() + tap) * w * w));
                    }
                }
            }
            if !pixels.is_empty() {
                pass.run(dx.places(), &pixels, &blocks, isa);
            }
        }
        // SAFETY: the phases together have every input pixel, and each was written.
        unsafe { dx.written() }
    }

    pub(super) fn weight_gradient<T: Lanes>(&self, x: &[T], dy: &[T], isa: &Isa<T>) -> Vec<T> {
        if let Some(winograd) = Winograd::of::<T>(self) {
            return winograd.weight_gradient(x, dy, isa);
        }
        let ((inputs, outputs), (w, s)) = (self.panels, (self.width, self.stride));
        let source = self.source();
        let x = pad(x, self.input, source);
        // At stride 1 all rows of an image are one run, if the output has the source's width;
        // its extra columns are zeros, so the finite numbers that they meet count nothing.
        let line = if s == 1 { source.width } else { self.output.1 };
        let target = Padded {
            height: self.output.0,
            width: line,
            top: 0,
            left: 0,
        };
        let dy = pad(dy, self.output, target);
        let x_panel = source.height * source.width * w;
        let dy_panel = self.output.0 * line * w;
        let (runs, length) = if s == 1 {
            let of_image = |i: usize| (i * inputs * x_panel, i * outputs * dy_panel);
            let runs: Vec<_> = (0..self.batch).map(of_image).collect();
            (runs, (self.output.0 - 1) * line + self.output.1)
        } else {
            let mut runs = Vec::new();
            for image in 0..self.batch {
                for row in 0..self.output.0 {
                    let from = image * inputs * x_panel + row * s * source.width * w;
                    runs.push((from, image * outputs * dy_panel + row * line * w));
                }
            }
            (runs, self.output.1)
        };
        let jobs = pieces(&runs, length, s * w, w);
        let mut dw = vec![T::ZERO; inputs * outputs * self.taps() * w * w];
        // Panels of outputs that go together lie beside each other: [outputs][inputs][taps].
        let block = self.taps() * w * w;
        let groups = outputs.div_ceil(isa.panels);
        let place = Shared(dw.as_mut_ptr());
        (0..inputs * groups).into_par_iter().for_each(|task| {
            let (panel, first) = (task / groups, task % groups * isa.panels);
            let panels = isa.panels.min(outputs - first);
            let dw = place.at((first * inputs + panel) * block);
            for (runs, count) in &jobs {
                for tap in 0..self.taps() {
                    let (ky, kx) = (tap / self.kernel.1, tap % self.kernel.1);
                    let at = panel * x_panel + (ky * source.width + kx) * w;
                    let job = Correlate {
                        x: x[at..].as_ptr(),
                        dy: dy[first * dy_panel..].as_ptr(),
                        dw: dw.wrapping_add(tap * w * w),
                        runs,
                        count: *count,
                        step: s * w,
                        panels,
                        dw_panel: inputs * block,
                        dy_panel,
                    };
                    // SAFETY: a run's last pixel with the last tap is the last of its padded
                    // image; each task writes blocks of its own.
                    unsafe { isa.correlate(&job) };
                }
            }
        });
        unpack(&dw, (outputs, inputs, self.taps()))
    }
}

/// Equally long runs, cut into jobs of pieces that stay in the first-level cache.
fn pieces(
    runs: &[(usize, usize)],
    length: usize,
    x_step: usize,
    dy_step: usize,
) -> Vec<(Vec<(usize, usize)>, usize)> {
    let parts = length.div_ceil(PIXELS);
    let count = length / parts;
    let moved = |&(x, dy): &(usize, usize), by: usize| (x + by * x_step, dy + by * dy_step);
    let together = (PIXELS / count.max(1)).max(1);
    let mut jobs = Vec::new();
    if parts == 1 {
        jobs.extend(runs.chunks(together).map(|runs| (runs.to_vec(), count)));
        return jobs;
    }
    for run in runs {
        for part in 0..parts {
            jobs.push((vec![moved(run, part * count)], count));
        }
    }
    let rest = length - parts * count;
    if rest > 0 {
        let tails = runs.iter().map(|run| moved(run, parts * count)).collect();
        jobs.push((tails, rest));
    }
    jobs
}

/// A pointer that may cross threads; each task uses its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);
// SAFETY: tasks touch disjoint parts.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// A sum over blocks for the pixels of a batch.
struct Pass<'a, T> {
    x: &'a [T],
    x_image: usize,
    weight: &'a [T],
    weight_panel: usize,
    y_panel: usize,
    y_panels: usize,
    batch: usize,
}

impl<T: Lanes> Pass<'_, T> {
    /// `pixels` and `blocks` as in [`Gather`], of one image and one panel.
    fn run(&self, y: &mut [T], pixels: &[(usize, usize)], blocks: &[(usize, usize)], isa: &Isa<T>) {
        let together = PIXELS.div_ceil(pixels.len()).min(self.batch);
        let y_image = self.y_panel * self.y_panels;
        assert!(y.len() >= self.batch * y_image && self.x.len() >= self.batch * self.x_image);
        let table: Vec<(usize, usize)> = (0..together)
            .flat_map(|image| {
                let moved =
                    move |&(x, y): &(usize, usize)| (x + image * self.x_image, y + image * y_image);
                pixels.iter().map(moved)
            })
            .collect();
        let groups = self.y_panels.div_ceil(isa.panels);
        let place = Shared(y.as_mut_ptr());
        let tasks = self.batch.div_ceil(together) * groups;
        (0..tasks).into_par_iter().for_each(|task| {
            let (image, first) = (task / groups * together, task % groups * isa.panels);
            let images = together.min(self.batch - image);
            let job = Gather {
                x: self.x[image * self.x_image..].as_ptr(),
                weight: self.weight[first * self.weight_panel..].as_ptr(),
                y: place.at(image * y_image + first * self.y_panel),
                pixels: &table[..images * pixels.len()],
                blocks,
                panels: isa.panels.min(self.y_panels - first),
                weight_panel: self.weight_panel,
                y_panel: self.y_panel,
            };
            // SAFETY: a pixel's last block is the last of its padded image (the maps were padded
            // for that); tasks write panels and images of their own.
            unsafe { isa.gather(&job) };
        });
    }
}

/// Puts zeros around each plane of a blocked map.
fn pad<T: Lanes>(x: &[T], (height, columns): (usize, usize), to: Padded) -> Cow<'_, [T]> {
    if (height, columns) == (to.height, to.width) {
        return Cow::Borrowed(x);
    }
    let w = T::WIDTH;
    let (plane, padded) = (height * columns * w, to.height * to.width * w);
    let mut out = Unwritten::new(x.len() / plane * padded);
    out.places()
        .par_chunks_exact_mut(padded)
        .zip(x.par_chunks_exact(plane))
        .for_each(|(out, x)| {
            let line = to.width * w;
            for (row, out) in out.chunks_exact_mut(line).enumerate() {
                match row.checked_sub(to.top).filter(|&row| row < height) {
                    None => out.fill(T::ZERO),
                    Some(row) => {
                        let (left, end) = (to.left * w, (to.left + columns) * w);
                        out[..left].fill(T::ZERO);
                        out[left..end]
                            .copy_from_slice(&x[row * columns * w..(row + 1) * columns * w]);
                        out[end..].fill(T::ZERO);
                    }
                }
            }
        });
    // SAFETY: every row of every plane was written.
    Cow::Owned(unsafe { out.written() })
}

/// Weights `(out, in, taps)` into blocks: `[out panel][in panel][tap][in][out]`, or transposed
/// `[in panel][out panel][tap][out][in]`.
pub(super) fn pack<T: Lanes>(
    weight: &[T],
    (outputs, inputs, taps): (usize, usize, usize),
    transposed: bool,
) -> Vec<T> {
    let w = T::WIDTH;
    let mut packed = Unwritten::new(weight.len());
    let blocks = packed.places().par_chunks_exact_mut(taps * w * w);
    blocks.enumerate().for_each(|(index, blocks)| {
        let (out, panel) = match transposed {
            true => (index % outputs, index / outputs),
            false => (index / inputs, index % inputs),
        };
        let (o_apart, c_apart) = if transposed { (w, 1) } else { (1, w) };
        for o in 0..w {
            let row = ((out * w + o) * inputs + panel) * w * taps;
            let row = &weight[row..row + w * taps];
            for (tap, block) in blocks.chunks_exact_mut(w * w).enumerate() {
                for c in 0..w {
                    block[o * o_apart + c * c_apart] = row[c * taps + tap];
                }
            }
        }
    });
    // SAFETY: the blocks have a place for each weight, and each was written.
    unsafe { packed.written() }
}

/// The inverse of [`pack`] without transposition.
pub(super) fn unpack<T: Lanes>(
    packed: &[T],
    (outputs, inputs, taps): (usize, usize, usize),
) -> Vec<T> {
    let w = T::WIDTH;
    let mut weight = Unwritten::new(packed.len());
    debug_assert_eq!(packed.len(), outputs * inputs * taps * w * w);
    let row = inputs * w * taps;
    let panels = weight.places().par_chunks_exact_mut(row * w);
    panels
        .zip(packed.par_chunks_exact(row * w))
        .for_each(|(rows, packed)| {
            for (panel, blocks) in packed.chunks_exact(taps * w * w).enumerate() {
                for (o, row) in rows.chunks_exact_mut(row).enumerate() {
                    let row = &mut row[panel * w * taps..(panel + 1) * w * taps];
                    for (tap, block) in blocks.chunks_exact(w * w).enumerate() {
                        for c in 0..w {
                            row[c * taps + tap] = block[c * w + o];
                        }
                    }
                }
            }
        });
    // SAFETY: every row was written.
    unsafe { weight.written() }
}

struct Op {
    geometry: Geometry,
    kernel: Kernel,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let g = &self.geometry;
        let y = dispatch!("conv2d", s1.dtype(), T => {
            let y = g.forward::<T>(values(s1, l1)?, values(s2, l2)?, T::isa(self.kernel));
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, g.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let g = &self.geometry;
        let (xs, ws, dys) = (read(x), read(weight), read(&dy));
        dispatch!("conv2d", x.dtype(), T => {
            let (xs, ws, dys) = (xs.values::<T>()?, ws.values()?, dys.values()?);
            let isa = T::isa(self.kernel);
            let dx = match x.track_op() {
                true => {
                    let dx = g.input_gradient(dys, ws, isa);
                    Some(Tensor::from_vec(dx, x.shape(), x.device())?)
                }
                false => None,
            };
            let dw = g.weight_gradient(xs, dys, isa);
            Ok((dx, Some(Tensor::from_vec(dw, weight.shape(), x.device())?)))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::blocked::{block, unblock};
    use candle_core::{DType, Var};
    use isqrt_testkit::randn;

    /// Output and gradients of `sum(conv(x, w) * g)`, by this op or by the one that is not blocked.
    fn run(kernel: Option<Kernel>, x: &Tensor, w: &Tensor, options: Conv) -> [Tensor; 3] {
        let (x, w) = (Var::from_tensor(x).unwrap(), Var::from_tensor(w).unwrap());
        let y = match kernel {
            None => crate::ops::conv2d(&x, &w, options).unwrap(),
            Some(kernel) => {
                let x = block(&x).unwrap();
                let geometry = Geometry::new(&x, &w, options).unwrap();
                let op = Op { geometry, kernel };
                unblock(&x.apply_op2(&w, op).unwrap()).unwrap()
            }
        };
        let g = randn(y.dims(), 9, y.dtype()).unwrap();
        let loss = (&y * g).unwrap().sum_all().unwrap();
        let mut gradients = loss.backward().unwrap();
        let [dx, dw] = [x, w].map(|v| gradients.remove(&v).unwrap());
        [y, dx, dw]
    }

    #[test]
    fn equals_the_convolution_that_is_not_blocked_on_every_kernel() {
        // (batch, in, height, width), (out, kernel height, kernel width), stride, padding
        let cases = [
            ([2, 16, 5, 6], (32, 3, 3), 1, 1),
            ([3, 32, 7, 7], (16, 1, 1), 1, 0),
            ([1, 32, 9, 9], (48, 1, 1), 2, 0),
            ([5, 16, 7, 7], (16, 3, 3), 2, 1),
            ([2, 16, 12, 9], (16, 5, 3), 2, 2),
            ([1, 16, 6, 6], (16, 2, 2), 3, 0),
            ([2, 16, 20, 17], (48, 3, 3), 1, 0),
            ([1, 16, 3, 3], (16, 1, 1), 1, 2),
            ([2, 16, 4, 5], (16, 4, 5), 1, 0),
        ];
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6)] {
            for (i, (x, (out, kh, kw), stride, padding)) in cases.into_iter().enumerate() {
                let w = randn(&[out, x[1], kh, kw], 100 + i as u64, dtype).unwrap();
                let x = randn(&x, i as u64, dtype).unwrap();
                let options = Conv { stride, padding };
                let known = run(None, &x, &w, options);
                for kernel in [Kernel::Portable, Kernel::Avx2, Kernel::Avx512] {
                    if kernel.resolve().is_err() {
                        continue;
                    }
                    for (found, known) in run(Some(kernel), &x, &w, options).iter().zip(&known) {
                        let norm = |t: &Tensor| {
                            let t = t.to_dtype(DType::F64).unwrap().sqr().unwrap();
                            t.sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
                        };
                        let error = norm(&(found - known).unwrap()) / norm(known);
                        assert!(
                            error < tolerance,
                            "case {i} {dtype:?} {kernel:?} {:?}: {error}",
                            found.dims()
                        );
                    }
                }
            }
        }
    }
}
