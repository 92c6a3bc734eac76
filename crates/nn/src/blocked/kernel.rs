//! The two inner loops of a convolution over blocked channels, and the ways into blocks and out of them, compiled for
//! each instruction set.
//!
//! [`Gather`] computes output pixels: a tile of pixels by one or two panels of output channels is
//! held in registers, and for each block of 16 source channels a pixel's values are broadcast
//! against 16 rows of weights. [`Correlate`] computes gradients of weights: a tile of source by
//! output channels is held in registers while both operands run over the pixels.

// Plain index loops over register arrays are what the compiler unrolls for certain.
#![allow(clippy::needless_range_loop)]

use isqrt_linalg::Kernel;
use isqrt_linalg::simd::{Element, Quad, Vector};

use super::winograd::{self, Grid, Transforms};
use crate::ops::Clip;

/// `y[pixel] = bias + sum over blocks of x[pixel + block] . weight[block]`.
#[derive(Clone, Copy)]
pub(super) struct Gather<'a, T> {
    pub x: *const T,
    pub weight: *const T,
    pub y: *mut T,
    /// Of each output pixel: where its source begins, and its place in a panel of the output.
    pub pixels: &'a [(usize, usize)],
    /// Of each summand: its channels in the source, its weights (`WIDTH x WIDTH`).
    pub blocks: &'a [(usize, usize)],
    /// Panels of the output that are left to compute, and what lies between two of them in the
    /// weights and in the output.
    pub panels: usize,
    pub weight_panel: usize,
    pub y_panel: usize,
    /// A value for each channel of these panels, or null.
    pub bias: *const T,
    /// Where the sums are cut off.
    pub clip: Clip<T>,
}

/// `dw[c][o] += sum over pixels of x[pixel][c] dy[pixel][o]`, for `WIDTH` channels `c`.
#[derive(Clone, Copy)]
pub(super) struct Correlate<'a, T> {
    pub x: *const T,
    pub dy: *const T,
    pub dw: *mut T,
    /// Runs of `count` pixels: where they begin in the source and in the output.
    pub runs: &'a [(usize, usize)],
    pub count: usize,
    /// From one pixel of a run to the next, in the source.
    pub step: usize,
    /// As for [`Gather`].
    pub panels: usize,
    pub dw_panel: usize,
    pub dy_panel: usize,
}

/// [`Clip::of`].
///
/// # Safety
/// The processor has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn clipped<V: Vector>(values: V, clip: Clip<V::T>) -> V {
    match clip.on {
        // SAFETY: as promised by the caller.
        true => unsafe { values.relu().at_most(V::splat(clip.upper)) },
        false => values,
    }
}

/// Blocks whose weights stay in the first-level cache while the pixels pass by.
const CHUNK: usize = 16;

/// # Safety
/// The job describes memory that exists; `NV` registers hold whole panels, `job.panels` of them.
#[inline(always)]
unsafe fn gather<V: Vector, const MR: usize, const NV: usize>(job: &Gather<'_, V::T>) {
    let chunks = job.blocks.len().div_ceil(CHUNK).max(1);
    let length = job.blocks.len().div_ceil(chunks);
    for chunk in 0..chunks {
        let from = (chunk * length).min(job.blocks.len());
        let to = (from + length).min(job.blocks.len());
        let mut at = 0;
        while at < job.pixels.len() {
            // SAFETY: as promised by the caller.
            unsafe { gather_tile::<V, MR, NV>(job, (from, to), at) };
            at += MR;
        }
    }
}

#[inline(always)]
unsafe fn gather_tile<V: Vector, const MR: usize, const NV: usize>(
    job: &Gather<'_, V::T>,
    (from, to): (usize, usize),
    at: usize,
) {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    let per_panel = width / lanes;
    let count = MR.min(job.pixels.len() - at);
    // SAFETY (whole function): the job's tables stay inside its memory; rows beyond the last pixel
    // read the first one again and are not stored.
    unsafe {
        let mut x = [job.x; MR];
        let mut y = [job.y; MR];
        for r in 0..MR {
            let (source, place) = *job
                .pixels
                .get_unchecked(if r < count { at + r } else { at });
            x[r] = job.x.add(source);
            y[r] = job.y.add(place);
        }
        let mut acc = [[V::splat(V::T::default()); NV]; MR];
        if from == 0 && !job.bias.is_null() {
            for v in 0..NV {
                let bias = V::load(job.bias.add(v * lanes));
                for r in 0..MR {
                    acc[r][v] = bias;
                }
            }
        }
        if from > 0 {
            for r in 0..MR {
                for v in 0..NV {
                    let offset = v / per_panel * job.y_panel + v % per_panel * lanes;
                    acc[r][v] = V::load(y[r].add(offset));
                }
            }
        }
        for index in from..to {
            let (channels, weights) = *job.blocks.get_unchecked(index);
            let mut right = [job.weight; NV];
            for v in 0..NV {
                let offset = v / per_panel * job.weight_panel + v % per_panel * lanes;
                right[v] = job.weight.add(weights + offset);
            }
            for c in 0..width {
                let mut b = [V::splat(V::T::default()); NV];
                for v in 0..NV {
                    b[v] = V::load(right[v].add(c * width));
                }
                for r in 0..MR {
                    let a = V::splat(*x[r].add(channels + c));
                    for v in 0..NV {
                        acc[r][v] = acc[r][v].fma(a, b[v]);
                    }
                }
            }
        }
        if to == job.blocks.len() {
            for r in 0..MR {
                for v in 0..NV {
                    acc[r][v] = clipped(acc[r][v], job.clip);
                }
            }
        }
        for r in 0..MR {
            if r < count {
                for v in 0..NV {
                    let offset = v / per_panel * job.y_panel + v % per_panel * lanes;
                    acc[r][v].store(y[r].add(offset));
                }
            }
        }
    }
}

/// # Safety
/// As [`gather`]; `channel + MR` channels of a panel exist.
#[inline(always)]
unsafe fn correlate<V: Vector, const MR: usize, const NV: usize>(
    job: &Correlate<'_, V::T>,
    channel: usize,
) {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    let per_panel = width / lanes;
    // SAFETY (whole function): the runs stay inside the job's memory.
    unsafe {
        let dw = job.dw.add(channel * width);
        let mut acc = [[V::splat(V::T::default()); NV]; MR];
        for r in 0..MR {
            for v in 0..NV {
                let offset = v / per_panel * job.dw_panel + v % per_panel * lanes;
                acc[r][v] = V::load(dw.add(r * width + offset));
            }
        }
        for index in 0..job.runs.len() {
            let (source, place) = *job.runs.get_unchecked(index);
            let mut x = job.x.add(source + channel);
            let mut dy = job.dy.add(place);
            for _ in 0..job.count {
                let mut b = [V::splat(V::T::default()); NV];
                for v in 0..NV {
                    let offset = v / per_panel * job.dy_panel + v % per_panel * lanes;
                    b[v] = V::load(dy.wrapping_add(offset));
                }
                for r in 0..MR {
                    let a = V::splat(*x.wrapping_add(r));
                    for v in 0..NV {
                        acc[r][v] = acc[r][v].fma(a, b[v]);
                    }
                }
                x = x.wrapping_add(job.step);
                dy = dy.wrapping_add(width);
            }
        }
        for r in 0..MR {
            for v in 0..NV {
                let offset = v / per_panel * job.dw_panel + v % per_panel * lanes;
                acc[r][v].store(dw.add(r * width + offset));
            }
        }
    }
}

/// [`Gather`] of a depthwise convolution: channels do not mix, so a block has `WIDTH` weights and is
/// multiplied lane by lane. One panel.
///
/// # Safety
/// As [`gather`]; `NV` registers hold a panel.
#[inline(always)]
unsafe fn depthwise<V: Vector, const MR: usize, const NV: usize>(job: &Gather<'_, V::T>) {
    let lanes = V::LANES;
    for pixels in job.pixels.chunks(MR) {
        // SAFETY (whole loop): the job's tables stay inside its memory; rows beyond the last pixel
        // read the first one again and are not stored.
        unsafe {
            let mut x = [job.x; MR];
            for r in 0..MR {
                let (source, _) = pixels[if r < pixels.len() { r } else { 0 }];
                x[r] = job.x.add(source);
            }
            let mut acc = [[V::splat(V::T::default()); NV]; MR];
            if !job.bias.is_null() {
                for v in 0..NV {
                    let bias = V::load(job.bias.add(v * lanes));
                    for r in 0..MR {
                        acc[r][v] = bias;
                    }
                }
            }
            for &(source, weights) in job.blocks {
                for v in 0..NV {
                    let weight = V::load(job.weight.add(weights + v * lanes));
                    for r in 0..MR {
                        let a = V::load(x[r].add(source + v * lanes));
                        acc[r][v] = acc[r][v].fma(a, weight);
                    }
                }
            }
            for r in 0..MR.min(pixels.len()) {
                let y = job.y.add(pixels[r].1);
                for v in 0..NV {
                    let sum = acc[r][v];
                    clipped(sum, job.clip).store(y.add(v * lanes));
                }
            }
        }
    }
}

/// [`Correlate`] of a depthwise convolution: `dw[c] += sum over pixels of x[pixel][c] dy[pixel][c]`.
/// `MR` pixels are added up beside each other, then together.
///
/// # Safety
/// As [`correlate`]; `NV` registers hold a panel.
#[inline(always)]
unsafe fn correlate_depthwise<V: Vector, const MR: usize, const NV: usize>(
    job: &Correlate<'_, V::T>,
) {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    // SAFETY (whole function): the runs stay inside the job's memory.
    unsafe {
        let mut acc = [[V::splat(V::T::default()); NV]; MR];
        for v in 0..NV {
            acc[0][v] = V::load(job.dw.add(v * lanes));
        }
        for &(source, place) in job.runs {
            let (x, dy) = (job.x.add(source), job.dy.add(place));
            let mut pixel = 0;
            while pixel < job.count {
                for r in 0..MR.min(job.count - pixel) {
                    for v in 0..NV {
                        let a = V::load(x.add((pixel + r) * job.step + v * lanes));
                        let b = V::load(dy.add((pixel + r) * width + v * lanes));
                        acc[r][v] = acc[r][v].fma(a, b);
                    }
                }
                pixel += MR;
            }
        }
        let one = V::splat(<V::T as Element>::of(1.0));
        for v in 0..NV {
            let mut sum = acc[0][v];
            for r in 1..MR {
                sum = sum.fma(acc[r][v], one);
            }
            sum.store(job.dw.add(v * lanes));
        }
    }
}

/// Pixels whose channels change places at once.
const GROUP: usize = 8;

/// Planes of `pixels` to pixels of `WIDTH` channels. Returns how many pixels that was: whole groups of them.
///
/// # Safety
/// Both hold `pixels * WIDTH` values, and the processor has the instruction set.
#[inline(always)]
unsafe fn interleave<V: Vector>(planes: *const V::T, pixels: usize, panel: *mut V::T) -> usize {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    let done = pixels - pixels % lanes;
    for pixel in (0..done).step_by(lanes) {
        for channel in (0..width).step_by(GROUP) {
            // SAFETY: these channels and pixels are inside, as promised by the caller.
            unsafe {
                let mut rows = [V::splat(V::T::default()); GROUP];
                for r in 0..GROUP {
                    rows[r] = V::load(planes.add((channel + r) * pixels + pixel));
                }
                V::store_transposed(&rows, panel.add(pixel * width + channel), width);
            }
        }
    }
    done
}

/// The inverse of [`interleave`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn separate<V: Vector>(panel: *const V::T, pixels: usize, planes: *mut V::T) -> usize {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    let done = pixels - pixels % GROUP;
    for pixel in (0..done).step_by(GROUP) {
        for channel in (0..width).step_by(lanes) {
            // SAFETY: these channels and pixels are inside, as promised by the caller.
            unsafe {
                let mut rows = [V::splat(V::T::default()); GROUP];
                for r in 0..GROUP {
                    rows[r] = V::load(panel.add((pixel + r) * width + channel));
                }
                V::store_transposed(&rows, planes.add(channel * pixels + pixel), pixels);
            }
        }
    }
    done
}

/// The loops of one instruction set.
pub(crate) struct Isa<T: 'static> {
    /// Panels of output channels that one pass computes.
    pub panels: usize,
    gather: unsafe fn(&Gather<'_, T>),
    correlate: unsafe fn(&Correlate<'_, T>),
    depthwise: unsafe fn(&Gather<'_, T>),
    correlate_depthwise: unsafe fn(&Correlate<'_, T>),
    interleave: unsafe fn(*const T, usize, *mut T) -> usize,
    separate: unsafe fn(*const T, usize, *mut T) -> usize,
    pub(super) transforms: Transforms<T>,
}

impl<T: Element> Isa<T> {
    /// Planes of `pixels`, as many as a panel has channels, to that panel.
    pub(super) fn interleave(&self, planes: &[T], pixels: usize, panel: &mut [T]) {
        assert!(planes.len() == pixels * T::WIDTH && panel.len() == planes.len());
        // SAFETY: an `Isa` is handed out only where it is supported, and both are of this size.
        let done = unsafe { (self.interleave)(planes.as_ptr(), pixels, panel.as_mut_ptr()) };
        for pixel in done..pixels {
            for c in 0..T::WIDTH {
                panel[pixel * T::WIDTH + c] = planes[c * pixels + pixel];
            }
        }
    }

    /// A panel to planes of `pixels`.
    pub(super) fn separate(&self, panel: &[T], pixels: usize, planes: &mut [T]) {
        assert!(panel.len() == pixels * T::WIDTH && planes.len() == panel.len());
        // SAFETY: as above.
        let done = unsafe { (self.separate)(panel.as_ptr(), pixels, planes.as_mut_ptr()) };
        for pixel in done..pixels {
            for c in 0..T::WIDTH {
                planes[c * pixels + pixel] = panel[pixel * T::WIDTH + c];
            }
        }
    }

    /// # Safety
    /// The job describes memory that exists and that nobody else writes.
    pub(super) unsafe fn gather(&self, job: &Gather<'_, T>) {
        // SAFETY: an `Isa` is handed out only where it is supported; else as promised.
        unsafe { (self.gather)(job) }
    }
    /// # Safety
    /// As for [`Isa::gather`].
    pub(super) unsafe fn correlate(&self, job: &Correlate<'_, T>) {
        // SAFETY: as above.
        unsafe { (self.correlate)(job) }
    }
    /// # Safety
    /// As for [`Isa::gather`].
    pub(super) unsafe fn depthwise(&self, job: &Gather<'_, T>) {
        // SAFETY: as above.
        unsafe { (self.depthwise)(job) }
    }
    /// # Safety
    /// As for [`Isa::gather`].
    pub(super) unsafe fn correlate_depthwise(&self, job: &Correlate<'_, T>) {
        // SAFETY: as above.
        unsafe { (self.correlate_depthwise)(job) }
    }
}

macro_rules! transforms {
    ($(#[$feature:meta])? $name:ident $($rest:ident)*) => {
        $(#[$feature])?
        unsafe fn $name(grid: &Grid<T>) {
            unsafe { winograd::$name::<V>(grid) }
        }
        transforms!($(#[$feature])? $($rest)*);
    };
    ($(#[$feature:meta])?) => {};
}

macro_rules! isa {
    ($module:ident, $vector:ty, $element:ty, pixels $pixels:literal,
     panels $panels:literal: $full:literal, one: $one:literal,
     channels $($rows:literal)+, $(#[$feature:meta])?) => {
        mod $module {
            use super::*;
            type V = $vector;
            type T = $element;
            pub(super) static ISA: Isa<T> = Isa {
                panels: $panels,
                gather,
                correlate,
                depthwise,
                correlate_depthwise,
                interleave,
                separate,
                transforms: Transforms { source, result, weight, spread, collect },
            };
            // SAFETY (all): the caller promises the instruction set and the pointers.
            $(#[$feature])?
            unsafe fn gather(job: &Gather<'_, T>) {
                if job.panels == 1 {
                    unsafe { super::gather::<V, $pixels, $one>(job) }
                } else {
                    unsafe { super::gather::<V, $pixels, $full>(job) }
                }
            }
            $(#[$feature])?
            unsafe fn correlate(job: &Correlate<'_, T>) {
                let mut channel = 0;
                $(
                    if job.panels == 1 {
                        unsafe { super::correlate::<V, $rows, $one>(job, channel) };
                    } else {
                        unsafe { super::correlate::<V, $rows, $full>(job, channel) };
                    }
                    channel += $rows;
                )+
                debug_assert_eq!(channel, T::WIDTH);
            }
            $(#[$feature])?
            unsafe fn depthwise(job: &Gather<'_, T>) {
                unsafe { super::depthwise::<V, $pixels, $one>(job) }
            }
            $(#[$feature])?
            unsafe fn correlate_depthwise(job: &Correlate<'_, T>) {
                unsafe { super::correlate_depthwise::<V, 4, $one>(job) }
            }
            $(#[$feature])?
            unsafe fn interleave(planes: *const T, pixels: usize, panel: *mut T) -> usize {
                unsafe { super::interleave::<V>(planes, pixels, panel) }
            }
            $(#[$feature])?
            unsafe fn separate(panel: *const T, pixels: usize, planes: *mut T) -> usize {
                unsafe { super::separate::<V>(panel, pixels, planes) }
            }
            transforms!($(#[$feature])? source result weight spread collect);
        }
    };
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256d, __m512, __m512d};
#[cfg(target_arch = "x86_64")]
isa!(avx512_f32, __m512, f32, pixels 8, panels 2: 2, one: 1, channels 8 8,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
isa!(avx512_f64, __m512d, f64, pixels 8, panels 2: 2, one: 1, channels 8,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
isa!(avx2_f32, __m256, f32, pixels 6, panels 1: 2, one: 2, channels 6 6 4,
    #[target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
isa!(avx2_f64, __m256d, f64, pixels 6, panels 1: 2, one: 2, channels 4 4,
    #[target_feature(enable = "avx2,fma")]);
isa!(portable_f32, Quad<f32>, f32, pixels 2, panels 1: 4, one: 4, channels 2 2 2 2 2 2 2 2,);
isa!(portable_f64, Quad<f64>, f64, pixels 2, panels 1: 2, one: 2, channels 2 2 2 2,);

/// Element types that have these loops.
pub(crate) trait Lanes: Element + crate::element::Element {
    /// The loops of an instruction set, or of the best that this machine has.
    fn isa(kernel: Kernel) -> &'static Isa<Self>;
}

macro_rules! lanes {
    ($element:ty, $avx512:ident, $avx2:ident, $portable:ident) => {
        impl Lanes for $element {
            fn isa(kernel: Kernel) -> &'static Isa<Self> {
                match kernel.resolve() {
                    #[cfg(target_arch = "x86_64")]
                    Ok(Kernel::Avx512) => &$avx512::ISA,
                    #[cfg(target_arch = "x86_64")]
                    Ok(Kernel::Avx2) => &$avx2::ISA,
                    _ => &$portable::ISA,
                }
            }
        }
    };
}
lanes!(f32, avx512_f32, avx2_f32, portable_f32);
lanes!(f64, avx512_f64, avx2_f64, portable_f64);
