//! Two-dimensional convolution (cross-correlation, as everywhere in the field), without bias.
//!
//! Each image is a matrix product `W (O, K) · columns (K, P)` with `K = C·kh·kw` and `P` output
//! pixels. A 1x1 kernel with stride 1 takes the image itself as its columns. Otherwise the padded
//! image is first split into its `stride²` phases (rows and columns of equal remainder), in which
//! every row of `columns` is a run of contiguous pixels, whatever the stride.
//!
//! Backward, image by image: `dW += dY · columnsᵀ` and `columns' = Wᵀ · dY`, added back through
//! the same phases. Tasks take a fixed number of images each and their `dW` are added in order.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

use super::dims4;
use crate::element::{
    Element, Matrix, Unwritten, dispatch, images_per_task, product, read, sum_partials, values,
    with_scratch,
};
use crate::error::shape_error;
use crate::{Error, Result};

/// Options of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv {
    /// Distance of output pixels in the input.
    pub stride: usize,
    /// Zeros added on each side.
    pub padding: usize,
}

impl Default for Conv {
    fn default() -> Self {
        Self {
            stride: 1,
            padding: 0,
        }
    }
}

impl Conv {
    pub(crate) fn check(self) -> Result<()> {
        if self.stride > 0 {
            return Ok(());
        }
        Err(Error::Option {
            what: "convolution stride",
            value: "0".to_owned(),
            expected: "at least 1",
        })
    }
}

/// Convolution of `x` with `weight`.
///
/// # Shapes
/// - `x`: `(batch, in, height, width)`, or blocked ([`super::block`]), and so the result
/// - `weight`: `(out, in, kernel height, kernel width)`
/// - returns `(batch, out, height', width')` with `height' = (height + 2·padding − kernel) / stride + 1`
///
/// # Errors
/// [`Error::Shape`] where these do not fit, [`Error::Option`] for a stride of 0.
pub fn conv2d(x: &Tensor, weight: &Tensor, options: Conv) -> Result<Tensor> {
    if x.rank() == 5 {
        return crate::blocked::conv2d(x, weight, options);
    }
    let geometry = Geometry::new(x, weight, options)?;
    Ok(x.contiguous()?
        .apply_op2(&weight.contiguous()?, ConvOp(geometry))?)
}

#[derive(Debug, Clone, Copy)]
struct Geometry {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
    out: usize,
    kernel: (usize, usize),
    stride: usize,
    padding: usize,
    out_height: usize,
    out_width: usize,
}

impl Geometry {
    fn new(x: &Tensor, weight: &Tensor, options: Conv) -> Result<Self> {
        let [batch, channels, height, width] = dims4("conv2d", x)?;
        let [out, expected, kh, kw] = dims4("conv2d weight", weight)?;
        let Conv { stride, padding } = options;
        options.check()?;
        if expected != channels || height + 2 * padding < kh || width + 2 * padding < kw {
            return shape_error(
                "conv2d",
                format!(
                    "weight {:?} with padding {padding} does not fit input {:?}",
                    weight.dims(),
                    x.dims()
                ),
            );
        }
        Ok(Self {
            batch,
            channels,
            height,
            width,
            out,
            kernel: (kh, kw),
            stride,
            padding,
            out_height: (height + 2 * padding - kh) / stride + 1,
            out_width: (width + 2 * padding - kw) / stride + 1,
        })
    }

    fn image(&self) -> usize {
        self.channels * self.height * self.width
    }
    fn pixels(&self) -> usize {
        self.out_height * self.out_width
    }
    fn rows(&self) -> usize {
        self.channels * self.kernel.0 * self.kernel.1
    }
    /// Whether an image is its own column matrix.
    fn direct(&self) -> bool {
        self.kernel == (1, 1) && self.stride == 1 && self.padding == 0
    }
    /// Phases down and across that the kernel reaches.
    fn phases(&self) -> (usize, usize) {
        (
            self.stride.min(self.kernel.0),
            self.stride.min(self.kernel.1),
        )
    }
    /// Height and width of a phase.
    fn plane(&self) -> (usize, usize) {
        (
            (self.height + 2 * self.padding).div_ceil(self.stride),
            (self.width + 2 * self.padding).div_ceil(self.stride),
        )
    }
    fn phases_len(&self) -> usize {
        let ((a, b), (h, w)) = (self.phases(), self.plane());
        self.channels * a * b * h * w
    }
    fn columns_len(&self) -> usize {
        self.rows() * self.pixels()
    }

    /// Calls `visit(pixel of the image, place in the phases, count)` for runs of every
    /// `stride`-th pixel of a row, which are neighbours in a phase.
    #[inline(always)]
    fn for_each_run(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let ((down, across), (ph, pw)) = (self.phases(), self.plane());
        let (s, p) = (self.stride, self.padding);
        for c in 0..self.channels {
            for y in 0..self.height {
                let (row, a) = ((y + p) / s, (y + p) % s);
                if a >= down {
                    continue;
                }
                for b in 0..across {
                    // The first column x with (x + p) % s == b.
                    let first = (b + s - p % s) % s;
                    if first >= self.width {
                        continue;
                    }
                    let from = (c * self.height + y) * self.width + first;
                    let to = (((c * down + a) * across + b) * ph + row) * pw + (first + p) / s;
                    visit(from, to, (self.width - first).div_ceil(s));
                }
            }
        }
    }

    fn split<T: Element>(&self, image: &[T], phases: &mut [T]) {
        phases.fill(T::ZERO);
        let s = self.stride;
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
        if self.phases() != (self.stride, self.stride) {
            image.fill(T::ZERO);
        }
        let s = self.stride;
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
        let ((down, across), (ph, pw)) = (self.phases(), self.plane());
        let s = self.stride;
        let mut column = 0;
        for c in 0..self.channels {
            for ky in 0..self.kernel.0 {
                for kx in 0..self.kernel.1 {
                    let phase = (c * down + ky % s) * across + kx % s;
                    let start = (phase * ph + ky / s) * pw + kx / s;
                    for y in 0..self.out_height {
                        visit(column, start + y * pw);
                        column += self.out_width;
                    }
                }
            }
        }
    }

    fn gather<T: Element>(&self, phases: &[T], columns: &mut [T]) {
        let w = self.out_width;
        self.for_each_row(|column, phase| {
            copy_run(&mut columns[column..column + w], &phases[phase..phase + w]);
        });
    }

    fn scatter<T: Element>(&self, columns: &[T], phases: &mut [T]) {
        let w = self.out_width;
        phases.fill(T::ZERO);
        self.for_each_row(|column, phase| {
            let terms = &columns[column..column + w];
            phases[phase..phase + w]
                .iter_mut()
                .zip(terms)
                .for_each(|(to, &term)| *to += term);
        });
    }

    fn forward<T: Element>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let out_len = self.out * self.pixels();
        let mut y = Unwritten::new(self.batch * out_len);
        let weight = Matrix::new(weight, self.out, self.rows());
        y.places()
            .par_chunks_exact_mut(out_len)
            .zip(x.par_chunks_exact(self.image()))
            .for_each(|(y, x)| {
                if self.direct() {
                    return product(y, weight, Matrix::new(x, self.rows(), self.pixels()), false);
                }
                with_scratch(self.phases_len() + self.columns_len(), |scratch| {
                    let (phases, columns) = scratch.split_at_mut(self.phases_len());
                    self.split(x, phases);
                    self.gather(phases, columns);
                    product(
                        y,
                        weight,
                        Matrix::new(columns, self.rows(), self.pixels()),
                        false,
                    );
                });
            });
        // SAFETY: one image after the other, all written as products.
        unsafe { y.written() }
    }

    /// Gradients of input and weight; of the input only where it is wanted.
    fn backward<T: Element>(
        &self,
        x: &[T],
        weight: &[T],
        dy: &[T],
        wants_dx: bool,
    ) -> (Option<Vec<T>>, Vec<T>) {
        let weights = weight.len();
        let per_task = images_per_task(self.batch, weights);
        let tasks = self.batch.div_ceil(per_task);
        let mut partials = vec![T::ZERO; tasks * weights];
        let mut dx = Unwritten::new(if wants_dx { x.len() } else { 0 });
        let weight = Matrix::new(weight, self.out, self.rows());
        let mut dx_parts: Vec<Option<&mut [T]>> = match wants_dx {
            true => dx
                .places()
                .chunks_mut(per_task * self.image())
                .map(Some)
                .collect(),
            false => (0..tasks).map(|_| None).collect(),
        };
        let out_len = self.out * self.pixels();
        partials
            .par_chunks_exact_mut(weights)
            .zip(x.par_chunks(per_task * self.image()))
            .zip(dy.par_chunks(per_task * out_len))
            .zip(&mut dx_parts)
            .for_each(|(((dw, x), dy), dx)| {
                let images = x.chunks_exact(self.image()).zip(dy.chunks_exact(out_len));
                for (i, (x, dy)) in images.enumerate() {
                    let place = i * self.image()..(i + 1) * self.image();
                    let dx = dx.as_deref_mut().map(|dx| &mut dx[place]);
                    self.backward_image(x, weight, dy, dw, dx, i > 0);
                }
            });
        // SAFETY: every image's gradient has been written where it is wanted, else it is empty.
        let dx = unsafe { dx.written() };
        (wants_dx.then_some(dx), sum_partials(&partials, weights))
    }

    fn backward_image<T: Element>(
        &self,
        x: &[T],
        weight: Matrix<'_, T>,
        dy: &[T],
        dw: &mut [T],
        dx: Option<&mut [T]>,
        add: bool,
    ) {
        let dy = Matrix::new(dy, self.out, self.pixels());
        let (rows, pixels) = (self.rows(), self.pixels());
        if self.direct() {
            product(dw, dy, Matrix::new(x, rows, pixels).transposed(), add);
            if let Some(dx) = dx {
                product(dx, weight.transposed(), dy, false);
            }
            return;
        }
        with_scratch(self.phases_len() + self.columns_len(), |scratch| {
            let (phases, columns) = scratch.split_at_mut(self.phases_len());
            self.split(x, phases);
            self.gather(phases, columns);
            product(dw, dy, Matrix::new(columns, rows, pixels).transposed(), add);
            if let Some(dx) = dx {
                product(columns, weight.transposed(), dy, false);
                self.scatter(columns, phases);
                self.join(phases, dx);
            }
        });
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

struct ConvOp(Geometry);

impl CustomOp2 for ConvOp {
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
        let g = &self.0;
        let y = dispatch!("conv2d", s1.dtype(), T => {
            let y = g.forward::<T>(values(s1, l1)?, values(s2, l2)?);
            Ok(candle_core::WithDType::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from((g.batch, g.out, g.out_height, g.out_width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (read(x), read(weight), read(&dy));
        dispatch!("conv2d", x.dtype(), T => {
            let (xs, ws, dys) = (xs.values::<T>()?, ws.values()?, dys.values()?);
            // The first layer's images need no gradient.
            let (dx, dw) = self.0.backward(xs, ws, dys, x.track_op());
            let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
            Ok((dx, Some(Tensor::from_vec(dw, weight.shape(), x.device())?)))
        })
    }
}
