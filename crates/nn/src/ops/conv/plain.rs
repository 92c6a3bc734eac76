//! Convolution of plain maps as matrix products.
//!
//! Each image is a product `W (O, K) · columns (K, P)` with `K = C·kh·kw` and `P` output pixels,
//! one for each group. A 1x1 kernel with stride 1 takes the image itself as its columns. Otherwise
//! the padded image is first split into its phases (rows and columns of equal remainder by the
//! stride), in which every row of `columns` is a run of contiguous pixels, whatever the stride.
//!
//! Backward, image by image: `dW += dY · columnsᵀ` and `columns' = Wᵀ · dY`, added back through
//! the same phases. Tasks take a fixed number of images each and their `dW` are added in order.

use rayon::prelude::*;

use super::{Axis, Shapes};
use crate::element::{
    Element, Matrix, Unwritten, images_per_task, product, sum_partials, vectorised, with_scratch,
};
use crate::ops::Clip;

impl Axis {
    /// Remainders that the kernel's pixels have.
    fn phases(self) -> usize {
        self.stride.min(self.reach() + 1)
    }

    /// Size of a phase.
    fn phase_len(self) -> usize {
        (self.input + 2 * self.padding).div_ceil(self.stride)
    }

    /// The remainder of a pixel of the kernel, and its place in that phase.
    fn phase_of(self, tap: usize) -> (usize, usize) {
        let at = tap * self.dilation;
        (at % self.stride, at / self.stride)
    }
}

impl Shapes {
    /// Rows of a group's column matrix.
    fn depth(&self) -> usize {
        self.channels.0 / self.groups * self.taps()
    }
    /// Whether an image is its own column matrix.
    fn direct(&self) -> bool {
        let direct = |axis: Axis| (axis.kernel, axis.stride, axis.padding) == (1, 1, 0);
        direct(self.rows) && direct(self.columns)
    }
    fn phases_len(&self) -> usize {
        let len = |axis: Axis| axis.phases() * axis.phase_len();
        self.channels.0 * len(self.rows) * len(self.columns)
    }
    fn columns_len(&self) -> usize {
        self.groups * self.depth() * self.pixels()
    }

    /// Calls `visit(pixel of the image, place in the phases, count)` for runs of every
    /// `stride`-th pixel of a row, which are neighbours in a phase.
    #[inline(always)]
    fn for_each_run(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let Self { rows, columns, .. } = *self;
        let (s, p) = (columns.stride, columns.padding);
        for c in 0..self.channels.0 {
            for y in 0..rows.input {
                let padded = y + rows.padding;
                let (row, a) = (padded / rows.stride, padded % rows.stride);
                if a >= rows.phases() {
                    continue;
                }
                for b in 0..columns.phases() {
                    // The first column x with (x + p) % s == b.
                    let first = (b + s - p % s) % s;
                    if first >= columns.input {
                        continue;
                    }
                    let phase = (c * rows.phases() + a) * columns.phases() + b;
                    let from = (c * rows.input + y) * columns.input + first;
                    let to = (phase * rows.phase_len() + row) * columns.phase_len();
                    let count = (columns.input - first).div_ceil(s);
                    visit(from, to + (first + p) / s, count);
                }
            }
        }
    }

    fn split<T: Element>(&self, image: &[T], phases: &mut [T]) {
        phases.fill(T::ZERO);
        let s = self.columns.stride;
        self.for_each_run(|from, to, count| {
            let to = &mut phases[to..to + count];
            if s == 1 {
                to.copy_from_slice(&image[from..from + count]);
            } else {
                let pixels = image[from..].iter().step_by(s);
                to.iter_mut().zip(pixels).for_each(|(to, &from)| *to = from);
            }
        });
    }

    fn join<T: Element>(&self, phases: &[T], image: &mut [T]) {
        let whole = |axis: Axis| axis.phases() == axis.stride;
        if !whole(self.rows) || !whole(self.columns) {
            image.fill(T::ZERO);
        }
        let s = self.columns.stride;
        self.for_each_run(|from, to, count| {
            let pixels = image[from..].iter_mut().step_by(s);
            pixels
                .zip(&phases[to..to + count])
                .for_each(|(to, &from)| *to = from);
        });
    }

    /// Calls `visit(place in the columns, place in the phases)` for each row of output pixels.
    #[inline(always)]
    fn for_each_row(&self, mut visit: impl FnMut(usize, usize)) {
        let Self { rows, columns, .. } = *self;
        let mut column = 0;
        for c in 0..self.channels.0 {
            for ky in 0..rows.kernel {
                for kx in 0..columns.kernel {
                    let ((a, row), (b, first)) = (rows.phase_of(ky), columns.phase_of(kx));
                    let phase = (c * rows.phases() + a) * columns.phases() + b;
                    let start = (phase * rows.phase_len() + row) * columns.phase_len() + first;
                    for y in 0..rows.output {
                        visit(column, start + y * columns.phase_len());
                        column += columns.output;
                    }
                }
            }
        }
    }

    fn gather<T: Element>(&self, phases: &[T], columns: &mut [T]) {
        let w = self.columns.output;
        self.for_each_row(|column, phase| {
            copy_run(&mut columns[column..column + w], &phases[phase..phase + w]);
        });
    }

    fn scatter<T: Element>(&self, columns: &[T], phases: &mut [T]) {
        let w = self.columns.output;
        phases.fill(T::ZERO);
        self.for_each_row(|column, phase| {
            let terms = &columns[column..column + w];
            phases[phase..phase + w]
                .iter_mut()
                .zip(terms)
                .for_each(|(to, &term)| *to += term);
        });
    }

    /// `Y = W · columns`, group by group.
    fn multiply<T: Element>(&self, weight: &[T], columns: &[T], y: &mut [T]) {
        let (out, depth, pixels) = (self.channels.1 / self.groups, self.depth(), self.pixels());
        let groups = y
            .chunks_exact_mut(out * pixels)
            .zip(weight.chunks_exact(out * depth))
            .zip(columns.chunks_exact(depth * pixels));
        for ((y, weight), columns) in groups {
            let weight = Matrix::new(weight, out, depth);
            product(y, weight, Matrix::new(columns, depth, pixels), false);
        }
    }

    /// `dW (+)= dY · columnsᵀ`, group by group.
    fn correlate<T: Element>(&self, dy: &[T], columns: &[T], dw: &mut [T], add: bool) {
        let (out, depth, pixels) = (self.channels.1 / self.groups, self.depth(), self.pixels());
        let groups = dw
            .chunks_exact_mut(out * depth)
            .zip(dy.chunks_exact(out * pixels))
            .zip(columns.chunks_exact(depth * pixels));
        for ((dw, dy), columns) in groups {
            let columns = Matrix::new(columns, depth, pixels).transposed();
            product(dw, Matrix::new(dy, out, pixels), columns, add);
        }
    }

    /// `columns' = Wᵀ · dY`, group by group.
    fn multiply_back<T: Element>(&self, weight: &[T], dy: &[T], columns: &mut [T]) {
        let (out, depth, pixels) = (self.channels.1 / self.groups, self.depth(), self.pixels());
        let groups = columns
            .chunks_exact_mut(depth * pixels)
            .zip(weight.chunks_exact(out * depth))
            .zip(dy.chunks_exact(out * pixels));
        for ((columns, weight), dy) in groups {
            let weight = Matrix::new(weight, out, depth).transposed();
            product(columns, weight, Matrix::new(dy, out, pixels), false);
        }
    }

    fn backward_image<T: Element>(
        &self,
        (x, weight, dy): (&[T], &[T], &[T]),
        dw: &mut [T],
        dx: Option<&mut [T]>,
        add: bool,
    ) {
        if self.direct() {
            self.correlate(dy, x, dw, add);
            if let Some(dx) = dx {
                self.multiply_back(weight, dy, dx);
            }
            return;
        }
        with_scratch(self.phases_len() + self.columns_len(), |scratch| {
            let (phases, columns) = scratch.split_at_mut(self.phases_len());
            self.split(x, phases);
            self.gather(phases, columns);
            self.correlate(dy, columns, dw, add);
            if let Some(dx) = dx {
                self.multiply_back(weight, dy, columns);
                self.scatter(columns, phases);
                self.join(phases, dx);
            }
        });
    }
}

/// See [`Shapes::forward`].
pub(super) fn forward<T: Element>(
    shapes: &Shapes,
    x: &[T],
    weight: &[T],
    (bias, clip): (Option<&[T]>, Clip<T>),
) -> Vec<T> {
    let mut y = Unwritten::new(shapes.batch * shapes.out_image());
    y.places()
        .par_chunks_exact_mut(shapes.out_image())
        .zip(x.par_chunks_exact(shapes.image()))
        .for_each(|(y, x)| {
            if shapes.direct() {
                shapes.multiply(weight, x, y);
            } else {
                with_scratch(shapes.phases_len() + shapes.columns_len(), |scratch| {
                    let (phases, columns) = scratch.split_at_mut(shapes.phases_len());
                    shapes.split(x, phases);
                    shapes.gather(phases, columns);
                    shapes.multiply(weight, columns, y);
                });
            }
            if bias.is_none() && !clip.on {
                return;
            }
            for (c, y) in y.chunks_exact_mut(shapes.pixels()).enumerate() {
                let shift = bias.map_or(T::ZERO, |bias| bias[c]);
                finish(y, shift, clip);
            }
        });
    // SAFETY: one image after the other, all written as products.
    unsafe { y.written() }
}

/// See [`Shapes::backward`].
pub(super) fn backward<T: Element>(
    shapes: &Shapes,
    x: &[T],
    weight: &[T],
    dy: &[T],
    wants_dx: bool,
) -> (Option<Vec<T>>, Vec<T>) {
    let (weights, image, out_image) = (weight.len(), shapes.image(), shapes.out_image());
    let per_task = images_per_task(shapes.batch, weights);
    let tasks = shapes.batch.div_ceil(per_task);
    let mut partials = vec![T::ZERO; tasks * weights];
    let mut dx = Unwritten::new(if wants_dx { x.len() } else { 0 });
    let mut dx_parts: Vec<Option<&mut [T]>> = match wants_dx {
        true => dx.places().chunks_mut(per_task * image).map(Some).collect(),
        false => (0..tasks).map(|_| None).collect(),
    };
    partials
        .par_chunks_exact_mut(weights)
        .zip(x.par_chunks(per_task * image))
        .zip(dy.par_chunks(per_task * out_image))
        .zip(&mut dx_parts)
        .for_each(|(((dw, x), dy), dx)| {
            let images = x.chunks_exact(image).zip(dy.chunks_exact(out_image));
            for (i, (x, dy)) in images.enumerate() {
                let place = i * image..(i + 1) * image;
                let dx = dx.as_deref_mut().map(|dx| &mut dx[place]);
                shapes.backward_image((x, weight, dy), dw, dx, i > 0);
            }
        });
    // SAFETY: every image's gradient has been written where it is wanted, else it is empty.
    let dx = unsafe { dx.written() };
    (wants_dx.then_some(dx), sum_partials(&partials, weights))
}

vectorised! {
    /// Bias and activation of a channel.
    fn finish<T: Element>(y: &mut [T], shift: T, clip: Clip<T>) {
        y.iter_mut().for_each(|y| *y = clip.of(*y + shift));
    }
}

/// `copy_from_slice` without a call for the short runs that small images have.
#[inline(always)]
fn copy_run<T: Copy>(to: &mut [T], from: &[T]) {
    let mut to = to.chunks_exact_mut(8);
    let mut from = from.chunks_exact(8);
    for (to, from) in to.by_ref().zip(from.by_ref()) {
        to.copy_from_slice(from);
    }
    for (to, from) in to.into_remainder().iter_mut().zip(from.remainder()) {
        *to = *from;
    }
}
