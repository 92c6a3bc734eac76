//! Winograd's convolution F(4x4, 3x3) of blocked maps: 36 multiplications where 144 were.

use isqrt_linalg::simd::{Element, Vector};
use rayon::prelude::*;

use super::conv::{Geometry, Shared, pack, unpack};
use super::kernel::{Correlate, Gather, Isa, Lanes};
use crate::element::{Unwritten, with_scratch};

/// Output pixels of a tile, on a side.
const TILE: usize = 4;
/// Input pixels of a tile, on a side; neighbours overlap by two.
const REACH: usize = 6;
/// Values of a transformed tile, each a matrix product of its own.
const POINTS: usize = REACH * REACH;

/// The finite points of interpolation besides 0 are `±A` and `±B`.
const A: f64 = 0.625;
const B: f64 = 1.5;
const AA: f64 = A * A;
const BB: f64 = B * B;
/// Products of a point's differences to the others.
const N0: f64 = AA * BB;
const NA: f64 = 2.0 * AA * (AA - BB);
const NB: f64 = 2.0 * BB * (BB - AA);

/// A square of vectors to transform into another, `WIDTH` channels each.
#[derive(Clone, Copy)]
pub(super) struct Grid<T> {
    pub from: *const T,
    /// Between rows and columns.
    pub from_apart: (isize, isize),
    pub to: *mut T,
    pub to_apart: (isize, isize),
}

/// The transforms, compiled for an instruction set.
pub(super) struct Transforms<T> {
    /// `Bᵀ d B`: an input tile to its points.
    pub source: unsafe fn(&Grid<T>),
    /// `Aᵀ m A`: points to an output tile.
    pub result: unsafe fn(&Grid<T>),
    /// `G g Gᵀ`: a kernel to its points.
    pub weight: unsafe fn(&Grid<T>),
    /// `A y Aᵀ`, the adjoint of `result`.
    pub spread: unsafe fn(&Grid<T>),
    /// `Gᵀ u G`, the adjoint of `weight`; adds to what is there.
    pub collect: unsafe fn(&Grid<T>),
}

/// Applies `line` to the columns and then to the rows of a grid.
///
/// # Safety
/// The grid describes memory that exists.
#[inline(always)]
unsafe fn transform<V: Vector, const IN: usize, const OUT: usize>(
    grid: &Grid<V::T>,
    add: bool,
    line: impl Fn([V; IN]) -> [V; OUT],
) {
    // SAFETY (whole function): as promised by the caller.
    unsafe {
        for lane in (0..V::T::WIDTH).step_by(V::LANES) {
            let mut between = [[V::splat(V::T::default()); IN]; OUT];
            for j in 0..IN {
                let mut column = [between[0][0]; IN];
                for i in 0..IN {
                    let (down, across) = grid.from_apart;
                    let at = i as isize * down + j as isize * across;
                    column[i] = V::load(grid.from.offset(at).add(lane));
                }
                let column = line(column);
                for i in 0..OUT {
                    between[i][j] = column[i];
                }
            }
            for i in 0..OUT {
                let row = line(between[i]);
                for j in 0..OUT {
                    let (down, across) = grid.to_apart;
                    let at = i as isize * down + j as isize * across;
                    let to = grid.to.offset(at).add(lane);
                    let sum = if add {
                        V::load(to).fma(row[j], V::splat(V::T::of(1.0)))
                    } else {
                        row[j]
                    };
                    sum.store(to);
                }
            }
        }
    }
}

/// `x + factor * y`
#[inline(always)]
unsafe fn plus<V: Vector>(x: V, factor: f64, y: V) -> V {
    // SAFETY: as promised by the caller.
    unsafe { x.fma(V::splat(V::T::of(factor)), y) }
}

#[inline(always)]
unsafe fn times<V: Vector>(factor: f64, x: V) -> V {
    // SAFETY: as promised by the caller.
    unsafe { x.mul(V::splat(V::T::of(factor))) }
}

// SAFETY (the five): the caller promises the instruction set and the grid.
#[inline(always)]
pub(super) unsafe fn source<V: Vector>(grid: &Grid<V::T>) {
    unsafe {
        transform(grid, false, |d: [V; 6]| {
            let even = |squared: f64| plus(d[4], -squared, d[2]);
            let odd = |squared: f64| plus(d[3], -squared, d[1]);
            let ((ea, oa), (eb, ob)) = ((even(BB), odd(BB)), (even(AA), odd(AA)));
            [
                plus(plus(d[4], -(AA + BB), d[2]), N0, d[0]),
                plus(ea, A, oa),
                plus(ea, -A, oa),
                plus(eb, B, ob),
                plus(eb, -B, ob),
                plus(plus(d[5], -(AA + BB), d[3]), N0, d[1]),
            ]
        });
    }
}

#[inline(always)]
pub(super) unsafe fn result<V: Vector>(grid: &Grid<V::T>) {
    unsafe {
        transform(grid, false, |m: [V; 6]| {
            let (sa, sb) = (plus(m[1], 1.0, m[2]), plus(m[3], 1.0, m[4]));
            let (da, db) = (plus(m[1], -1.0, m[2]), plus(m[3], -1.0, m[4]));
            [
                plus(plus(m[0], 1.0, sa), 1.0, sb),
                plus(times(A, da), B, db),
                plus(times(AA, sa), BB, sb),
                plus(plus(m[5], A * AA, da), B * BB, db),
            ]
        });
    }
}

#[inline(always)]
pub(super) unsafe fn weight<V: Vector>(grid: &Grid<V::T>) {
    unsafe {
        transform(grid, false, |g: [V; 3]| {
            let at = |point: f64, norm: f64| {
                let even = plus(times(1.0 / norm, g[0]), point * point / norm, g[2]);
                plus(even, point / norm, g[1])
            };
            [
                times(1.0 / N0, g[0]),
                at(A, NA),
                at(-A, NA),
                at(B, NB),
                at(-B, NB),
                g[2],
            ]
        });
    }
}

#[inline(always)]
pub(super) unsafe fn spread<V: Vector>(grid: &Grid<V::T>) {
    unsafe {
        transform(grid, false, |y: [V; 4]| {
            let at = |point: f64| {
                let even = plus(y[0], point * point, y[2]);
                plus(plus(even, point, y[1]), point * point * point, y[3])
            };
            [y[0], at(A), at(-A), at(B), at(-B), y[3]]
        });
    }
}

#[inline(always)]
pub(super) unsafe fn collect<V: Vector>(grid: &Grid<V::T>) {
    unsafe {
        transform(grid, true, |u: [V; 6]| {
            let (sa, sb) = (plus(u[1], 1.0, u[2]), plus(u[3], 1.0, u[4]));
            let (da, db) = (plus(u[1], -1.0, u[2]), plus(u[3], -1.0, u[4]));
            [
                plus(plus(times(1.0 / N0, u[0]), 1.0 / NA, sa), 1.0 / NB, sb),
                plus(times(A / NA, da), B / NB, db),
                plus(plus(u[5], AA / NA, sa), BB / NB, sb),
            ]
        });
    }
}

/// A convolution of stride 1 with a 3x3 kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Winograd {
    batch: usize,
    panels: (usize, usize),
    input: (usize, usize),
    output: (usize, usize),
    padding: usize,
}

pub(super) static mut TUNE: [usize; 6] = [96, 24, 4, 192, 4, 0];

impl Winograd {
    /// Where the kernel is 3x3 and the stride 1.
    pub(super) fn new(g: &Geometry) -> Option<Self> {
        (g.kernel == (3, 3) && g.stride == 1 && g.padding <= 2).then_some(Self {
            batch: g.batch,
            panels: g.panels,
            input: g.input,
            output: g.output,
            padding: g.padding,
        })
    }

    fn tiles(&self) -> usize {
        self.batch * self.output.0.div_ceil(TILE) * self.output.1.div_ceil(TILE)
    }

    /// `(image, row, column)` of a tile's first output pixel.
    fn tile(&self, index: usize) -> (usize, usize, usize) {
        let (down, across) = (self.output.0.div_ceil(TILE), self.output.1.div_ceil(TILE));
        let place = index % (down * across);
        (
            index / (down * across),
            place / across * TILE,
            place % across * TILE,
        )
    }

    pub(super) fn forward<T: Lanes>(&self, x: &[T], weight: &[T], isa: &Isa<T>) -> Vec<T> {
        let (inputs, outputs) = self.panels;
        let packed = pack(weight, (outputs, inputs, 9), false);
        self.convolve(x, &packed, false, isa)
    }

    /// A convolution as well: of `dy`, with the kernel rotated and transposed.
    pub(super) fn input_gradient<T: Lanes>(&self, dy: &[T], weight: &[T], isa: &Isa<T>) -> Vec<T> {
        let (inputs, outputs) = self.panels;
        let packed = pack(weight, (outputs, inputs, 9), true);
        Self {
            panels: (outputs, inputs),
            input: self.output,
            output: self.input,
            padding: 2 - self.padding,
            ..*self
        }
        .convolve(dy, &packed, true, isa)
    }

    /// Transformed weights: `[out panel][point][in panel][in][out]`.
    fn weights<T: Lanes>(&self, packed: &[T], rotated: bool, isa: &Isa<T>) -> Vec<T> {
        let w = T::WIDTH;
        let (inputs, outputs) = self.panels;
        let point = inputs * w * w + w;
        let mut out = Unwritten::new(outputs * POINTS * point);
        out.places()
            .par_chunks_exact_mut(POINTS * point)
            .zip(packed.par_chunks_exact(inputs * 9 * w * w))
            .for_each(|(out, packed)| {
                for panel in 0..inputs {
                    for c in 0..w {
                        let block = (w * w) as isize;
                        let first = panel * 9 * w * w + c * w;
                        let (first, sign) = match rotated {
                            true => (first + 8 * w * w, -1),
                            false => (first, 1),
                        };
                        let grid = Grid {
                            from: packed[first..].as_ptr(),
                            from_apart: (3 * sign * block, sign * block),
                            to: out[panel * w * w + c * w..].as_mut_ptr(),
                            to_apart: ((REACH * point) as isize, point as isize),
                        };
                        unsafe { (isa.transforms.weight)(&grid) };
                    }
                }
            });
        unsafe { out.written() }
    }

    /// Transforms the tiles `range` of panel `panel` of maps to `to`.
    #[allow(clippy::too_many_arguments)]
    fn tiles_in<T: Lanes, const SIDE: usize>(
        &self,
        x: &[T],
        size: (usize, usize),
        margin: usize,
        (panel, panels): (usize, usize),
        range: std::ops::Range<usize>,
        to: *mut T,
        point: usize,
        transform: unsafe fn(&Grid<T>),
    ) {
        let w = T::WIDTH;
        let plane = size.0 * size.1 * w;
        let mut edge = [T::ZERO; REACH * REACH * 16];
        for (i, index) in range.enumerate() {
            let (image, row, column) = self.tile(index);
            let x = &x[(image * panels + panel) * plane..][..plane];
            let inside = row >= margin
                && column >= margin
                && row + SIDE <= size.0 + margin
                && column + SIDE <= size.1 + margin;
            let (from, apart) = if inside {
                let at = ((row - margin) * size.1 + column - margin) * w;
                (x[at..].as_ptr(), size.1 * w)
            } else {
                edge.fill(T::ZERO);
                for r in 0..SIDE {
                    let y = (row + r).wrapping_sub(margin);
                    if y >= size.0 {
                        continue;
                    }
                    let left = margin.saturating_sub(column);
                    let end = SIDE.min((size.1 + margin).saturating_sub(column));
                    if left < end {
                        let at = (y * size.1 + column + left - margin) * w;
                        edge[(r * SIDE + left) * w..(r * SIDE + end) * w]
                            .copy_from_slice(&x[at..at + (end - left) * w]);
                    }
                }
                (edge.as_ptr(), SIDE * w)
            };
            let grid = Grid {
                from,
                from_apart: (apart as isize, w as isize),
                to: to.wrapping_add(i * w),
                to_apart: ((REACH * point) as isize, point as isize),
            };
            unsafe { transform(&grid) };
        }
    }

    fn convolve<T: Lanes>(
        &self,
        x: &[T],
        packed: &[T],
        rotated: bool,
        isa: &Isa<T>,
    ) -> Vec<T> {
        let w = T::WIDTH;
        let (inputs, outputs) = self.panels;
        let t0 = std::time::Instant::now();
        let weight = self.weights(packed, rotated, isa);
        let t1 = t0.elapsed();
        let weight_point = inputs * w * w + w;
        let [budget, piece, group, ..] = unsafe { TUNE };
        let total = self.tiles();
        let chunk = budget.min(total);
        let chunk = total.div_ceil(total.div_ceil(chunk));
        let group = group.min(outputs);
        let (groups, pieces) = (outputs.div_ceil(group), chunk.div_ceil(piece));
        let point = inputs * chunk * w + w;
        let mut points = Unwritten::<T>::new(POINTS * point);
        let points = Shared(points.places().as_mut_ptr());
        let out_point = group * piece * w + w;
        let out_plane = self.output.0 * self.output.1 * w;
        let mut y = Unwritten::new(self.batch * outputs * out_plane);
        let place = Shared(y.places().as_mut_ptr());
        let pixels: Vec<_> = (0..piece).map(|t| (t * w, t * w)).collect();
        let blocks: Vec<_> = (0..inputs).map(|p| (p * chunk * w, p * w * w)).collect();
        let (mut ta, mut tb) = (0.0, 0.0);
        for first in (0..total).step_by(chunk) {
            let count = chunk.min(total - first);
            let t2 = std::time::Instant::now();
            (0..inputs * pieces).into_par_iter().for_each(|task| {
                let (panel, from) = (task % inputs, task / inputs * piece);
                let end = (from + piece).min(count);
                self.tiles_in::<T, REACH>(
                    x,
                    self.input,
                    self.padding,
                    (panel, inputs),
                    first + from..first + end.max(from),
                    points.at((panel * chunk + from) * w),
                    point,
                    isa.transforms.source,
                );
            });
            ta += t2.elapsed().as_secs_f64();
            let t2 = std::time::Instant::now();
            (0..groups * pieces).into_par_iter().for_each(|task| {
                let (from, panel) = (task % pieces * piece, task / pieces * group);
                let here = piece.min(count.saturating_sub(from));
                let group = group.min(outputs - panel);
                with_scratch(POINTS * out_point, |scratch: &mut [T]| {
                    let out = scratch.as_mut_ptr();
                    for p in 0..POINTS {
                        for q in (0..group).step_by(isa.panels) {
                            let job = Gather {
                                x: points.at(p * point + from * w),
                                weight: weight
                                    [((panel + q) * POINTS + p) * weight_point..]
                                    .as_ptr(),
                                y: out.wrapping_add(p * out_point + q * piece * w),
                                pixels: &pixels[..here],
                                blocks: &blocks,
                                panels: isa.panels.min(group - q),
                                weight_panel: POINTS * weight_point,
                                y_panel: piece * w,
                            };
                            unsafe { isa.gather(&job) };
                        }
                    }
                    let mut edge = [T::ZERO; TILE * TILE * 16];
                    for t in 0..here {
                        let (image, row, column) = self.tile(first + from + t);
                        let (h, c) = (
                            TILE.min(self.output.0 - row),
                            TILE.min(self.output.1 - column),
                        );
                        let whole = (h, c) == (TILE, TILE);
                        for q in 0..group {
                            let at = (image * outputs + panel + q) * out_plane
                                + (row * self.output.1 + column) * w;
                            let to = place.at(at);
                            let (to_, apart) = match whole {
                                true => (to, self.output.1 * w),
                                false => (edge.as_mut_ptr(), TILE * w),
                            };
                            let grid = Grid {
                                from: out.wrapping_add((q * piece + t) * w).cast_const(),
                                from_apart: (
                                    (REACH * out_point) as isize,
                                    out_point as isize,
                                ),
                                to: to_,
                                to_apart: (apart as isize, w as isize),
                            };
                            unsafe { (isa.transforms.result)(&grid) };
                            if !whole {
                                for r in 0..h {
                                    unsafe {
                                        to.add(r * self.output.1 * w)
                                            .copy_from_nonoverlapping(
                                                edge.as_ptr().add(r * TILE * w),
                                                c * w,
                                            )
                                    };
                                }
                            }
                        }
                    }
                });
            });
            tb += t2.elapsed().as_secs_f64();
        }
        if unsafe { TUNE[5] } == 1 {
            eprintln!(
                "      weights {:.2} source {:.2} products {:.2}",
                t1.as_secs_f64() * 1e3,
                ta * 1e3,
                tb * 1e3
            );
        }
        unsafe { y.written() }
    }

    pub(super) fn weight_gradient<T: Lanes>(&self, x: &[T], dy: &[T], isa: &Isa<T>) -> Vec<T> {
        let w = T::WIDTH;
        let (inputs, outputs) = self.panels;
        let [_, piece, _, budget, group, _] = unsafe { TUNE };
        let total = self.tiles();
        let chunk = budget.min(total);
        let chunk = total.div_ceil(total.div_ceil(chunk));
        let pieces = chunk.div_ceil(piece);
        let point = (inputs + outputs) * chunk * w + w;
        let mut points = Unwritten::<T>::new(POINTS * point);
        let points = Shared(points.places().as_mut_ptr());
        let group = group.min(outputs);
        let groups = outputs.div_ceil(group);
        let sum_point = group * w * w;
        let mut dw = vec![T::ZERO; inputs * outputs * 9 * w * w];
        let place = Shared(dw.as_mut_ptr());
        let (mut ta, mut tb) = (0.0, 0.0);
        for first in (0..total).step_by(chunk) {
            let count = chunk.min(total - first);
            let t2 = std::time::Instant::now();
            (0..(inputs + outputs) * pieces)
                .into_par_iter()
                .for_each(|task| {
                    let (panel, from) = (task / pieces, task % pieces * piece);
                    let end = (from + piece).min(count);
                    let range = first + from..first + end.max(from);
                    let to = points.at((panel * chunk + from) * w);
                    if panel < inputs {
                        self.tiles_in::<T, REACH>(
                            x,
                            self.input,
                            self.padding,
                            (panel, inputs),
                            range,
                            to,
                            point,
                            isa.transforms.source,
                        );
                    } else {
                        self.tiles_in::<T, TILE>(
                            dy,
                            self.output,
                            0,
                            (panel - inputs, outputs),
                            range,
                            to,
                            point,
                            isa.transforms.spread,
                        );
                    }
                });
            ta += t2.elapsed().as_secs_f64();
            let t2 = std::time::Instant::now();
            (0..inputs * groups).into_par_iter().for_each(|task| {
                let (panel, out) = (task % inputs, task / inputs * group);
                let group = group.min(outputs - out);
                with_scratch(POINTS * sum_point, |sums: &mut [T]| {
                    sums.fill(T::ZERO);
                    for p in 0..POINTS {
                        for q in (0..group).step_by(isa.panels) {
                            let job = Correlate {
                                x: points.at(p * point + panel * chunk * w),
                                dy: points.at(p * point + (inputs + out + q) * chunk * w),
                                dw: sums[p * sum_point + q * w * w..].as_mut_ptr(),
                                runs: &[(0, 0)],
                                count,
                                step: w,
                                panels: isa.panels.min(group - q),
                                dw_panel: w * w,
                                dy_panel: chunk * w,
                            };
                            unsafe { isa.correlate(&job) };
                        }
                    }
                    for q in 0..group {
                        for c in 0..w {
                            let block = (w * w) as isize;
                            let grid = Grid {
                                from: sums[q * w * w + c * w..].as_ptr(),
                                from_apart: ((REACH * sum_point) as isize, sum_point as isize),
                                to: place.at(((out + q) * inputs + panel) * 9 * w * w + c * w),
                                to_apart: (3 * block, block),
                            };
                            unsafe { (isa.transforms.collect)(&grid) };
                        }
                    }
                });
            });
            tb += t2.elapsed().as_secs_f64();
        }
        if unsafe { TUNE[5] } == 1 {
            eprintln!("      dw transforms {:.2} products {:.2}", ta * 1e3, tb * 1e3);
        }
        unpack(&dw, (outputs, inputs, 9))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::Conv;
    use candle_core::{DType, Tensor};
    use isqrt_linalg::Kernel;
    use isqrt_testkit::randn;

    fn error(a: &[f64], b: &[f64]) -> (f64, f64) {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let max = |x: &mut dyn Iterator<Item = f64>| x.fold(0f64, |m, x| m.max(x.abs()));
        let d = || a.iter().zip(b).map(|(a, b)| a - b);
        (
            norm(&mut d()) / norm(&mut b.iter().copied()),
            max(&mut d()) / max(&mut b.iter().copied()),
        )
    }

    fn blocked(x: &Tensor) -> Tensor {
        crate::blocked::block(x).unwrap()
    }
    fn vec<T: Lanes>(x: &Tensor) -> Vec<T> {
        x.flatten_all().unwrap().to_vec1::<T>().unwrap()
    }

    #[test]
    fn exact() {
        for (shape, out, padding) in [
            ([2, 16, 5, 6], 32, 1),
            ([1, 32, 8, 8], 48, 1),
            ([2, 16, 1, 9], 16, 1),
            ([3, 48, 7, 7], 16, 2),
            ([1, 16, 3, 3], 16, 0),
            ([2, 16, 13, 6], 40, 0),
        ] {
            let x = randn(&shape, 1, DType::F64).unwrap();
            let wt = randn(&[out, shape[1], 3, 3], 2, DType::F64).unwrap();
            let x = blocked(&x);
            let g = Geometry::new(&x, &wt, Conv { stride: 1, padding }).unwrap();
            let dy = randn(g.shape().dims(), 3, DType::F64).unwrap();
            let (x, wt, dy) = (vec::<f64>(&x), vec::<f64>(&wt), vec::<f64>(&dy));
            let w = Winograd::new(&g).unwrap();
            for kernel in [Kernel::Portable, Kernel::Avx2] {
                let isa = f64::isa(kernel);
                let a = [
                    w.forward(&x, &wt, isa),
                    w.input_gradient(&dy, &wt, isa),
                    w.weight_gradient(&x, &dy, isa),
                ];
                let b = [
                    g.forward(&x, &wt, isa),
                    g.input_gradient(&dy, &wt, isa),
                    g.weight_gradient(&x, &dy, isa),
                ];
                for (a, b) in a.iter().zip(&b) {
                    assert_eq!(a.len(), b.len());
                    let e = error(a, b);
                    assert!(e.0 < 1e-13, "{shape:?} {e:?}");
                }
            }
        }
    }

    #[test]
    fn bench() {
        let var = |k: &str| std::env::var(k).ok();
        if let Some(t) = var("TUNE") {
            let v: Vec<usize> = t.split(',').map(|x| x.parse().unwrap()).collect();
            unsafe { TUNE = v.try_into().unwrap() };
        }
        let only = var("ONLY").unwrap_or_default();
        let reps: usize = var("REPS").map_or(7, |x| x.parse().unwrap());
        for (c, s, batch) in [
            (64, 56, 8),
            (128, 28, 8),
            (256, 14, 8),
            (512, 7, 8),
            (64, 224, 2),
            (128, 112, 8),
            (256, 56, 8),
            (512, 28, 8),
            (512, 14, 8),
        ] {
            let name = format!("{c}@{s}");
            if !only.is_empty() && !only.split(',').any(|o| o == name) {
                continue;
            }
            let x = randn(&[batch, c, s, s], 1, DType::F32).unwrap().relu().unwrap();
            let x = blocked(&x);
            let scale = (2.0 / (9 * c) as f64).sqrt();
            let wt = (randn(&[c, c, 3, 3], 2, DType::F32).unwrap() * scale).unwrap();
            let g = Geometry::new(&x, &wt, Conv { stride: 1, padding: 1 }).unwrap();
            let dy = randn(g.shape().dims(), 3, DType::F32).unwrap();
            let (x, wt, dy) = (vec::<f32>(&x), vec::<f32>(&wt), vec::<f32>(&dy));
            let w = Winograd::new(&g).unwrap();
            let isa = f32::isa(Kernel::Auto);
            let flops = 2.0 * (batch * s * s * c * c * 9) as f64;
            let which = var("WHICH").unwrap_or("fxw".into());
            let run = |name: &str, direct: &dyn Fn() -> Vec<f32>, wino: &dyn Fn() -> Vec<f32>| {
                if !which.contains(&name[..1]) {
                    return;
                }
                let (mut a, mut b) = (vec![], vec![]);
                for _ in 0..reps {
                    let t = std::time::Instant::now();
                    std::hint::black_box(direct());
                    a.push(t.elapsed().as_secs_f64() * 1e3);
                    let t = std::time::Instant::now();
                    std::hint::black_box(wino());
                    b.push(t.elapsed().as_secs_f64() * 1e3);
                }
                a.sort_by(f64::total_cmp);
                b.sort_by(f64::total_cmp);
                println!(
                    "{c}@{s} {name:8} direct min {:.2} med {:.2} ({:.0} GF/s)  wino min {:.2} med {:.2} ({:.0} GF/s) ratio {:.2} {:.2}",
                    a[0], a[reps / 2], flops / a[0] / 1e6,
                    b[0], b[reps / 2], flops / b[0] / 1e6, b[0] / a[0], b[reps / 2] / a[reps / 2]
                );
            };
            run("forward", &|| g.forward(&x, &wt, isa), &|| w.forward(&x, &wt, isa));
            run("xgrad", &|| g.input_gradient(&dy, &wt, isa), &|| {
                w.input_gradient(&dy, &wt, isa)
            });
            run("wgrad", &|| g.weight_gradient(&x, &dy, isa), &|| {
                w.weight_gradient(&x, &dy, isa)
            });
        }
    }
}
