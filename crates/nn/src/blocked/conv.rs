//! Convolution of blocked feature maps.
//!
//! Forward, an output pixel is the sum over taps and panels of 16 channels times 16 rows of
//! weights ([`Gather`]). The gradient of the input is the same sum with the weights transposed:
//! an input pixel `y` with `(y + padding) mod stride = r` meets the taps `k` with
//! `k·dilation mod stride = r` at output rows `(y + padding) / stride - k·dilation / stride`, so
//! each phase `r` is such a sum. The gradient of the weights runs over the pixels ([`Correlate`]);
//! there each thread owns weights, so nothing is added up between threads. Weights are packed into
//! blocks once a call. In f32 most convolutions of stride 1 with a 3x3 kernel go through
//! [`Winograd`] instead.
//!
//! Depthwise convolutions are in [`super::depthwise`].

use rayon::prelude::*;
use std::borrow::Cow;

use super::kernel::{Correlate, Gather, Isa, Lanes};
use super::winograd::Winograd;
use crate::element::Unwritten;
use crate::ops::{Clip, ConvAxis, ConvShapes as Shapes};

/// Output pixels that share a pass over the weights: several small images together.
const PIXELS: usize = 192;

/// Bytes that stay in the second-level cache (in tests, of small maps, a few).
const NEAR: usize = if cfg!(test) { 1 << 12 } else { 1 << 18 };

/// Values that do.
fn near<T>() -> usize {
    NEAR / size_of::<T>()
}

/// Whole tiles of pixels, on any instruction set.
const TILES: usize = 48;

/// Padded maps that are in memory at once, as values: of large maps an image after the other (in
/// tests of some small ones too).
const PADDED: usize = if cfg!(test) { 1 << 12 } else { 1 << 22 };

/// A map with zeros around it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Padded {
    pub height: usize,
    pub width: usize,
    top: usize,
    left: usize,
}

impl Padded {
    /// Pixels of a plane.
    pub(super) fn plane(self) -> usize {
        self.height * self.width
    }

    /// Whether a plane of this size has no zeros around it.
    pub(super) fn is_size(self, (height, width): (usize, usize)) -> bool {
        (height, width) == (self.height, self.width)
    }

    /// A plane of `WIDTH` channels with its zeros.
    pub(super) fn pad<T: Lanes>(self, x: &[T], (height, columns): (usize, usize), out: &mut [T]) {
        let w = T::WIDTH;
        for (row, out) in out.chunks_exact_mut(self.width * w).enumerate() {
            match row.checked_sub(self.top).filter(|&row| row < height) {
                None => out.fill(T::ZERO),
                Some(row) => {
                    let (left, end) = (self.left * w, (self.left + columns) * w);
                    out[..left].fill(T::ZERO);
                    out[left..end].copy_from_slice(&x[row * columns * w..(row + 1) * columns * w]);
                    out[end..].fill(T::ZERO);
                }
            }
        }
    }
}

impl Shapes {
    /// Panels of channels in and out, of each group.
    pub(super) fn panels(&self) -> (usize, usize) {
        let width = self.lanes * self.groups;
        (self.channels.0 / width, self.channels.1 / width)
    }

    pub(super) fn input(&self) -> (usize, usize) {
        (self.rows.input, self.columns.input)
    }

    pub(super) fn output(&self) -> (usize, usize) {
        (self.rows.output, self.columns.output)
    }

    /// Images that go together, if one takes so much padded.
    fn images(&self, padded: usize) -> usize {
        (PADDED / padded.max(1)).clamp(1, self.batch)
    }

    /// The input with its padding.
    pub(super) fn source(&self) -> Padded {
        Padded {
            height: self.rows.input + 2 * self.rows.padding,
            width: self.columns.input + 2 * self.columns.padding,
            top: self.rows.padding,
            left: self.columns.padding,
        }
    }

    /// For each tap where it is in the padded input, in pixels.
    pub(super) fn tap_places(&self) -> Vec<usize> {
        let width = self.source().width;
        let row = |ky: usize| ky * self.rows.dilation * width;
        let column = |kx: usize| kx * self.columns.dilation;
        let taps = |ky| (0..self.columns.kernel).map(move |kx| row(ky) + column(kx));
        (0..self.rows.kernel).flat_map(taps).collect()
    }
}

/// Pixels of an image and a panel, and what is summed up for them, as in [`Gather`].
type Phase = (Vec<(usize, usize)>, Vec<(usize, usize)>);

/// A convolution as sums over blocks of a padded map.
pub(super) struct Sums {
    pub source: Padded,
    pub phases: Vec<Phase>,
}

impl Sums {
    /// Outputs, of so many panels and with so many weights of a tap.
    pub(super) fn forward<T: Lanes>(shapes: &Shapes, panels: usize, block: usize) -> Self {
        let (source, taps) = (shapes.source(), shapes.tap_places());
        let mut pixels = Vec::with_capacity(shapes.pixels());
        for y in 0..shapes.rows.output {
            for x in 0..shapes.columns.output {
                let from = y * shapes.rows.stride * source.width + x * shapes.columns.stride;
                pixels.push((from * T::WIDTH, pixels.len() * T::WIDTH));
            }
        }
        let mut blocks = Vec::with_capacity(panels * taps.len());
        for panel in 0..panels {
            for tap in &taps {
                let from = panel * source.plane() + tap;
                blocks.push((from * T::WIDTH, blocks.len() * block));
            }
        }
        let phases = vec![(pixels, blocks)];
        Self { source, phases }
    }

    /// Gradients of inputs, of those of so many panels.
    pub(super) fn input_gradient<T: Lanes>(shapes: &Shapes, panels: usize, block: usize) -> Self {
        let Shapes { rows, columns, .. } = *shapes;
        // Input row y meets output row (y + padding) / stride - t, for t up to `reach`.
        let reach = (rows.reach() / rows.stride, columns.reach() / columns.stride);
        let most = |axis: ConvAxis| (axis.input - 1 + axis.padding) / axis.stride + 1;
        let source = Padded {
            height: most(rows).max(rows.output) + reach.0,
            width: most(columns).max(columns.output) + reach.1,
            top: reach.0,
            left: reach.1,
        };
        let mut phases = Vec::new();
        let phases_of = |axis: ConvAxis| axis.stride.min(axis.input + axis.padding);
        for a in 0..phases_of(rows) {
            for b in 0..phases_of(columns) {
                let mut pixels = Vec::new();
                for y in (0..rows.input).filter(|y| (y + rows.padding) % rows.stride == a) {
                    for x in
                        (0..columns.input).filter(|x| (x + columns.padding) % columns.stride == b)
                    {
                        let row = (y + rows.padding) / rows.stride;
                        let column = (x + columns.padding) / columns.stride;
                        let from = row * source.width + column;
                        pixels.push((from * T::WIDTH, (y * columns.input + x) * T::WIDTH));
                    }
                }
                let mut blocks = Vec::new();
                for panel in 0..panels {
                    for ky in (0..rows.kernel).filter(|ky| ky * rows.dilation % rows.stride == a) {
                        let row = reach.0 - ky * rows.dilation / rows.stride;
                        for kx in 0..columns.kernel {
                            let at = kx * columns.dilation;
                            if at % columns.stride != b {
                                continue;
                            }
                            let column = reach.1 - at / columns.stride;
                            let from = panel * source.plane() + row * source.width + column;
                            let tap = panel * shapes.taps() + ky * columns.kernel + kx;
                            blocks.push((from * T::WIDTH, tap * block));
                        }
                    }
                }
                if !pixels.is_empty() {
                    phases.push((pixels, blocks));
                }
            }
        }
        Self { source, phases }
    }
}

/// See [`Shapes::forward`].
pub(crate) fn forward<T: Lanes>(
    shapes: &Shapes,
    x: &[T],
    weight: &[T],
    (bias, clip): (Option<&[T]>, Clip<T>),
    isa: &Isa<T>,
) -> Vec<T> {
    if let Some(winograd) = Winograd::of::<T>(shapes) {
        return winograd.forward(x, weight, (bias, clip), isa);
    }
    let (inputs, outputs) = shapes.panels();
    let block = T::WIDTH * T::WIDTH;
    let weight = pack(shapes, weight, false);
    let sums = Sums::forward::<T>(shapes, inputs, block);
    let pass = Pass {
        x_group: inputs * sums.source.plane() * T::WIDTH,
        weight: &weight,
        weight_panel: inputs * shapes.taps() * block,
        y_panel: shapes.pixels() * T::WIDTH,
        y_panels: outputs,
        groups: shapes.groups,
        bias,
        clip,
    };
    let mut y = Unwritten::new(shapes.batch * shapes.out_image());
    let images = shapes.images(pass.x_group * pass.groups);
    let x = x.chunks(images * shapes.image());
    for (x, y) in x.zip(y.places().chunks_mut(images * shapes.out_image())) {
        let x = pad(x, shapes.input(), sums.source);
        for phase in &sums.phases {
            pass.run(&x, y, phase, isa);
        }
    }
    // SAFETY: every panel of every image has every output pixel as a row of a tile.
    unsafe { y.written() }
}

/// The gradient of the input.
pub(crate) fn input_gradient<T: Lanes>(
    shapes: &Shapes,
    dy: &[T],
    weight: &[T],
    isa: &Isa<T>,
) -> Vec<T> {
    if let Some(winograd) = Winograd::of::<T>(shapes) {
        return winograd.input_gradient(dy, weight, isa);
    }
    let (inputs, outputs) = shapes.panels();
    let block = T::WIDTH * T::WIDTH;
    let weight = pack(shapes, weight, true);
    let sums = Sums::input_gradient::<T>(shapes, outputs, block);
    let pass = Pass {
        x_group: outputs * sums.source.plane() * T::WIDTH,
        weight: &weight,
        weight_panel: outputs * shapes.taps() * block,
        y_panel: shapes.rows.input * shapes.columns.input * T::WIDTH,
        y_panels: inputs,
        groups: shapes.groups,
        bias: None,
        clip: Clip::off(),
    };
    let mut dx = Unwritten::new(shapes.batch * shapes.image());
    let images = shapes.images(pass.x_group * pass.groups);
    let dy = dy.chunks(images * shapes.out_image());
    for (dy, dx) in dy.zip(dx.places().chunks_mut(images * shapes.image())) {
        let dy = pad(dy, shapes.output(), sums.source);
        for phase in &sums.phases {
            pass.run(&dy, dx, phase, isa);
        }
    }
    // SAFETY: the phases together have every input pixel, and each was written.
    unsafe { dx.written() }
}

/// The gradient of the weights.
pub(crate) fn weight_gradient<T: Lanes>(
    shapes: &Shapes,
    x: &[T],
    dy: &[T],
    isa: &Isa<T>,
) -> Vec<T> {
    if let Some(winograd) = Winograd::of::<T>(shapes) {
        return winograd.weight_gradient(x, dy, isa);
    }
    let ((inputs, outputs), groups) = (shapes.panels(), shapes.groups);
    let (w, taps) = (T::WIDTH, shapes.tap_places());
    let source = shapes.source();
    let correlation = Correlation::of(shapes);
    let target = correlation.target;
    let x_panel = source.plane() * w;
    let dy_panel = target.plane() * w;
    let step = shapes.columns.stride * w;
    let tap_block = w * w;
    let block = taps.len() * tap_block;
    let mut dw = vec![T::ZERO; groups * inputs * outputs * block];
    // Panels of outputs that go together lie beside each other: [outputs][inputs][taps].
    let passes = outputs.div_ceil(isa.panels);
    let place = Shared(dw.as_mut_ptr());
    // Each task has weights of its own, of several panels, which take turns at the pixels that are in the cache.
    let (panels_in, passes_out) = rectangle(
        (inputs, passes),
        groups,
        near::<T>() / 2 / (block * isa.panels),
    );
    let (tasks_in, tasks_out) = (inputs.div_ceil(panels_in), passes.div_ceil(passes_out));
    let tasks = groups * tasks_in * tasks_out;
    let images = shapes.images(groups * (inputs * x_panel + outputs * dy_panel));
    let x = x.chunks(images * shapes.image());
    for (x, dy) in x.zip(dy.chunks(images * shapes.out_image())) {
        let panels = |image| (image * groups * inputs, image * groups * outputs);
        let starts = (0..x.len() / shapes.image())
            .map(panels)
            .map(|(from, to)| (from * x_panel, to * dy_panel));
        let jobs = correlation.jobs::<T>(starts, source);
        let (x, dy) = (
            pad(x, shapes.input(), source),
            pad(dy, shapes.output(), target),
        );
        (0..tasks).into_par_iter().for_each(|task| {
            let (group, task) = (task / (tasks_in * tasks_out), task % (tasks_in * tasks_out));
            let (input, output) = (task / tasks_out * panels_in, task % tasks_out * passes_out);
            let (last, end) = (
                inputs.min(input + panels_in),
                passes.min(output + passes_out),
            );
            for (runs, count) in &jobs {
                for (pass, panel) in (output..end).flat_map(|p| (input..last).map(move |i| (p, i)))
                {
                    let first = pass * isa.panels;
                    let panels = isa.panels.min(outputs - first);
                    let first = group * outputs + first;
                    let dw = place.at((first * inputs + panel) * block);
                    for (tap, at) in taps.iter().enumerate() {
                        let job = Correlate {
                            x: x[(group * inputs + panel) * x_panel + at * w..].as_ptr(),
                            dy: dy[first * dy_panel..].as_ptr(),
                            dw: dw.wrapping_add(tap * tap_block),
                            runs,
                            count: *count,
                            step,
                            panels,
                            dw_panel: inputs * block,
                            dy_panel,
                        };
                        // SAFETY: a run's last pixel with the last tap is the last of its padded
                        // image; each task writes blocks of its own.
                        unsafe { isa.correlate(&job) };
                    }
                }
            }
        });
    }
    unpack(shapes, &dw)
}

/// How many input panels and passes over outputs, of `size`, go into a task: as many blocks of weights as stay in the
/// cache, but two tasks a thread. The weights' sums do not depend on it.
fn rectangle(size: (usize, usize), groups: usize, cached: usize) -> (usize, usize) {
    let tasks = 2 * rayon::current_num_threads();
    let most = (groups * size.0 * size.1 / tasks).min(cached);
    let passes = most.isqrt().clamp(1, size.1);
    (usize::clamp(most / passes, 1, size.0), passes)
}

/// Which pixels of a padded map meet which of a gradient of the output.
pub(super) struct Correlation {
    /// The gradient with its zeros.
    pub target: Padded,
    rows: ConvAxis,
    columns: ConvAxis,
    one_run: bool,
}

impl Correlation {
    pub(super) fn of(shapes: &Shapes) -> Self {
        let Shapes { rows, columns, .. } = *shapes;
        // At stride 1 all rows of an image are one run, if the output has the source's width;
        // its extra columns are zeros, so the finite numbers that they meet count nothing.
        let one_run = (rows.stride, columns.stride) == (1, 1);
        let width = match one_run {
            true => shapes.source().width,
            false => columns.output,
        };
        let target = Padded {
            height: rows.output,
            width,
            top: 0,
            left: 0,
        };
        Self {
            target,
            rows,
            columns,
            one_run,
        }
    }

    /// Runs of pixels and their lengths, of images that begin at these places.
    pub(super) fn jobs<T: Lanes>(
        &self,
        starts: impl Iterator<Item = (usize, usize)>,
        source: Padded,
    ) -> Vec<(Vec<(usize, usize)>, usize)> {
        let (w, line) = (T::WIDTH, self.target.width);
        let (rows, length) = match self.one_run {
            true => (1, (self.rows.output - 1) * line + self.columns.output),
            false => (self.rows.output, self.columns.output),
        };
        let runs = starts.flat_map(|(from, place)| {
            (0..rows).map(move |row| {
                let from = from + row * self.rows.stride * source.width * w;
                (from, place + row * line * w)
            })
        });
        pieces(
            &runs.collect::<Vec<_>>(),
            length,
            self.columns.stride * w,
            w,
        )
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
    /// Size of a group of an image.
    x_group: usize,
    weight: &'a [T],
    weight_panel: usize,
    y_panel: usize,
    /// Of a group.
    y_panels: usize,
    groups: usize,
    /// Of all output channels.
    bias: Option<&'a [T]>,
    clip: Clip<T>,
}

impl<T: Lanes> Pass<'_, T> {
    fn run(&self, x: &[T], y: &mut [T], (pixels, blocks): &Phase, isa: &Isa<T>) {
        let x_image = self.x_group * self.groups;
        let y_image = self.y_panel * self.y_panels * self.groups;
        let batch = y.len() / y_image;
        assert!(y.len() == batch * y_image && x.len() == batch * x_image);
        let together = PIXELS.div_ceil(pixels.len()).min(batch);
        let table: Vec<(usize, usize)> = (0..together)
            .flat_map(|image| {
                let moved =
                    move |&(x, y): &(usize, usize)| (x + image * x_image, y + image * y_image);
                pixels.iter().map(moved)
            })
            .collect();
        let passes = self.y_panels.div_ceil(isa.panels);
        // The passes over a piece follow each other, so that all but the first find it in the cache.
        let near = (near::<T>() / (self.x_group / pixels.len()).max(1)).max(PIXELS);
        let pieces = table.len().div_ceil(near);
        let piece_len = table.len().div_ceil(pieces).next_multiple_of(TILES);
        let place = Shared(y.as_mut_ptr());
        let tasks = batch.div_ceil(together) * self.groups * pieces * passes;
        (0..tasks).into_par_iter().for_each(|task| {
            let (task, first) = (task / passes, task % passes * isa.panels);
            let (task, piece) = (task / pieces, task % pieces * piece_len);
            let (image, group) = (task / self.groups * together, task % self.groups);
            let images = together.min(batch - image);
            let table = &table[..images * pixels.len()];
            let panel = group * self.y_panels + first;
            let bias = self.bias.map(|bias| bias[panel * T::WIDTH..].as_ptr());
            let job = Gather {
                x: x[image * x_image + group * self.x_group..].as_ptr(),
                weight: self.weight[panel * self.weight_panel..].as_ptr(),
                y: place.at(image * y_image + panel * self.y_panel),
                pixels: &table[piece.min(table.len())..(piece + piece_len).min(table.len())],
                blocks,
                panels: isa.panels.min(self.y_panels - first),
                weight_panel: self.weight_panel,
                y_panel: self.y_panel,
                bias: bias.unwrap_or(std::ptr::null()),
                clip: self.clip,
            };
            // SAFETY: a pixel's last block is the last of its padded image (the maps were padded
            // for that); tasks write panels and pixels of their own.
            unsafe { isa.gather(&job) }
        });
    }
}

/// Puts zeros around each plane of a blocked map.
fn pad<T: Lanes>(x: &[T], size: (usize, usize), to: Padded) -> Cow<'_, [T]> {
    if to.is_size(size) {
        return Cow::Borrowed(x);
    }
    let (plane, padded) = (size.0 * size.1 * T::WIDTH, to.plane() * T::WIDTH);
    let mut out = Unwritten::new(x.len() / plane * padded);
    out.places()
        .par_chunks_exact_mut(padded)
        .zip(x.par_chunks_exact(plane))
        .for_each(|(out, x)| to.pad(x, size, out));
    // SAFETY: every row of every plane was written.
    Cow::Owned(unsafe { out.written() })
}

/// Weights `(out, in / groups, taps)` into blocks: `[out panel][in panel][tap][in][out]`, or
/// transposed `[in panel][out panel][tap][out][in]`, where the second panel runs over a group.
pub(super) fn pack<T: Lanes>(shapes: &Shapes, weight: &[T], transposed: bool) -> Vec<T> {
    let w = T::WIDTH;
    let ((inputs, outputs), taps) = (shapes.panels(), shapes.taps());
    let mut packed = Unwritten::new(weight.len());
    let blocks = packed.places().par_chunks_exact_mut(taps * w * w);
    blocks.enumerate().for_each(|(index, blocks)| {
        let (out, panel) = match transposed {
            true => {
                let (panel, out) = (index / outputs, index % outputs);
                (panel / inputs * outputs + out, panel % inputs)
            }
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
pub(super) fn unpack<T: Lanes>(shapes: &Shapes, packed: &[T]) -> Vec<T> {
    let w = T::WIDTH;
    let ((inputs, _), taps) = (shapes.panels(), shapes.taps());
    let mut weight = Unwritten::new(packed.len());
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{DType, Tensor, Var};
    use isqrt_linalg::Kernel;
    use isqrt_testkit::{randn, relative_error};

    use super::Shapes;
    use crate::blocked::{block, can_block, unblock};
    use crate::ops::{Activation, Conv, ConvOp, conv2d};

    /// Output and gradients of `sum(conv(x, w, b) * g)`, by this op, with maps in blocks where they fill them, or by the one
    /// of plain maps.
    fn run(kernel: Option<Kernel>, tensors: [&Tensor; 3], options: Conv) -> [Tensor; 4] {
        let [x, w, b] = tensors.map(|t| Var::from_tensor(t).unwrap());
        let y = match kernel {
            // A group at a time.
            None => {
                let part = |t: &Tensor, dim: usize, group: usize| {
                    let size = t.dim(dim).unwrap() / options.groups;
                    t.narrow(dim, group * size, size).unwrap()
                };
                let alone = Conv {
                    groups: 1,
                    ..options
                };
                let parts = (0..options.groups).map(|group| {
                    let (x, w, b) = (part(&x, 1, group), part(&w, 0, group), part(&b, 0, group));
                    conv2d(&x, &w, Some(&b), alone).unwrap()
                });
                Tensor::cat(&parts.collect::<Vec<_>>(), 1).unwrap()
            }
            Some(kernel) => {
                let mut x = x.as_tensor().clone();
                if can_block(x.dim(1).unwrap(), &x) {
                    x = block(&x).unwrap();
                }
                let into_blocks = can_block(w.dim(0).unwrap(), &w);
                let op = ConvOp {
                    shapes: Shapes::new(&x, &w, options).unwrap(),
                    activation: options.activation,
                    into_blocks,
                    kernel,
                    aside: None,
                };
                let y = x.apply_op3(&w, &b, op).unwrap();
                if into_blocks { unblock(&y).unwrap() } else { y }
            }
        };
        let g = randn(y.dims(), 9, y.dtype()).unwrap();
        let loss = (&y * g).unwrap().sum_all().unwrap();
        let mut gradients = loss.backward().unwrap();
        let [dx, dw, db] = [x, w, b].map(|v| gradients.remove(&v).unwrap());
        [y, dx, dw, db]
    }

    #[test]
    fn equals_the_convolution_of_plain_maps_on_every_kernel() {
        let conv = Conv::new;
        let dilated = |dilation, conv| Conv { dilation, ..conv };
        let grouped = |groups, conv| Conv { groups, ..conv };
        let uneven = Conv {
            stride: (2, 3),
            padding: (0, 4),
            dilation: (3, 2),
            ..conv(1, 0)
        };
        // (batch, in, height, width), (out, in / groups, kernel height, kernel width)
        let cases = [
            ([2, 16, 5, 6], [32, 16, 3, 3], conv(1, 1)),
            ([3, 32, 7, 7], [16, 32, 1, 1], conv(1, 0)),
            ([1, 32, 9, 9], [48, 32, 1, 1], conv(2, 0)),
            ([5, 16, 7, 7], [16, 16, 3, 3], conv(2, 1)),
            ([2, 16, 12, 9], [16, 16, 5, 3], conv(2, 2)),
            ([1, 16, 6, 6], [16, 16, 2, 2], conv(3, 0)),
            ([2, 16, 20, 17], [48, 16, 3, 3], conv(1, 0)),
            ([1, 16, 3, 3], [16, 16, 1, 1], conv(1, 2)),
            ([2, 16, 4, 5], [16, 16, 4, 5], conv(1, 0)),
            // Several images in pieces, and fewer at the end.
            ([5, 16, 10, 5], [16, 16, 1, 1], conv(1, 0)),
            ([2, 96, 9, 8], [112, 96, 1, 1], conv(1, 0)),
            ([2, 16, 9, 8], [16, 16, 3, 3], dilated((2, 2), conv(1, 2))),
            ([2, 16, 11, 9], [16, 16, 3, 3], dilated((2, 3), conv(2, 3))),
            ([2, 16, 11, 9], [16, 16, 2, 3], uneven),
            ([2, 64, 6, 5], [32, 32, 3, 3], grouped(2, conv(1, 1))),
            ([1, 96, 7, 6], [144, 32, 3, 3], grouped(3, conv(2, 1))),
            ([3, 32, 5, 5], [96, 16, 1, 1], grouped(2, conv(1, 0))),
            // Depthwise.
            ([2, 32, 7, 9], [32, 1, 3, 3], grouped(32, conv(1, 1))),
            ([2, 16, 8, 7], [16, 1, 3, 3], grouped(16, conv(2, 1))),
            ([1, 48, 6, 5], [48, 1, 5, 2], grouped(48, conv(1, 2))),
            ([3, 16, 11, 9], [16, 1, 2, 3], grouped(16, uneven)),
            ([5, 16, 40, 8], [16, 1, 3, 3], grouped(16, conv(1, 1))),
            // Into blocks, out of them, neither.
            ([2, 24, 7, 5], [96, 24, 1, 1], conv(1, 0)),
            ([2, 96, 5, 7], [24, 96, 1, 1], conv(1, 0)),
            ([1, 20, 9, 8], [32, 20, 3, 3], conv(2, 1)),
            ([1, 32, 9, 8], [12, 32, 3, 3], conv(2, 1)),
            ([3, 20, 7, 9], [20, 1, 3, 3], grouped(20, conv(1, 1))),
            ([19, 20, 6, 5], [20, 1, 3, 3], grouped(20, conv(2, 1))),
            ([2, 12, 9, 8], [12, 1, 2, 3], grouped(12, uneven)),
            ([2, 20, 6, 5], [12, 20, 3, 3], conv(1, 1)),
            // In f32 by Winograd's convolution.
            ([2, 20, 21, 17], [48, 20, 3, 3], conv(1, 1)),
            ([2, 32, 16, 20], [20, 32, 3, 3], conv(1, 1)),
            ([2, 32, 21, 17], [48, 32, 3, 3], conv(1, 1)),
            ([2, 16, 16, 20], [16, 16, 3, 3], conv(1, 2)),
        ];
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6)] {
            let all = Activation::ALL.map(|activation| {
                cases.map(|(x, w, options)| {
                    (
                        x,
                        w,
                        Conv {
                            activation,
                            ..options
                        },
                    )
                })
            });
            for (i, (x, w, options)) in all.into_iter().flatten().enumerate() {
                let seed = i as u64;
                let (b, w) = (
                    randn(&[w[0]], 200 + seed, dtype),
                    randn(&w, 100 + seed, dtype),
                );
                let tensors = [&randn(&x, seed, dtype).unwrap(), &w.unwrap(), &b.unwrap()];
                let known = run(None, tensors, options);
                for kernel in [Kernel::Portable, Kernel::Avx2, Kernel::Avx512] {
                    if kernel.resolve().is_err() {
                        continue;
                    }
                    for (found, known) in run(Some(kernel), tensors, options).iter().zip(&known) {
                        let error = relative_error(found, known).unwrap();
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

    #[test]
    fn nan_passes_through_every_activation() {
        let x = Tensor::full(f32::NAN, (2, 16, 16, 16), &candle_core::Device::Cpu).unwrap();
        let weight = |inputs, side| Tensor::ones((16, inputs, side, side), DType::F32, x.device());
        // Direct, depthwise, by Winograd's convolution.
        let kinds = [(16, 1, 1), (1, 3, 16), (16, 3, 1)];
        let all = Activation::ALL.map(|activation| kinds.map(|kind| (activation, kind)));
        for (activation, (inputs, side, groups)) in all.into_iter().flatten() {
            let w = weight(inputs, side).unwrap();
            let options = Conv {
                activation,
                groups,
                ..Conv::new(1, side / 2)
            };
            for x in [block(&x).unwrap(), x.clone()] {
                let y = conv2d(&x, &w, None, options).unwrap();
                let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
                assert!(y.into_iter().all(f32::is_nan));
            }
        }
    }
}
