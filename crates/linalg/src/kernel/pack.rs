//! Everything that is not a product: features into panels, gradients into symmetric panels,
//! sums, dot products. Memory-bound, so one pass each.

// Index loops over lanes vectorise for certain.
#![allow(clippy::needless_range_loop)]

use super::product::Matrix;
use super::vector::{Element, Vector};

/// Centres and scales feature rows into panels, as they are, transposed, or both.
#[derive(Clone, Copy)]
pub(crate) struct Pack<'a, T> {
    /// `channels` rows of `positions` values.
    pub features: &'a [T],
    pub positions: usize,
    /// The columns to take.
    pub range: (usize, usize),
    pub means: &'a [T],
    pub scale: T,
    /// Panels over the taken positions; a row is a channel.
    pub plain: Option<Matrix<T>>,
    /// Panels over the channels; a row is a taken position.
    pub transposed: Option<Matrix<T>>,
}

#[inline(always)]
pub(crate) unsafe fn pack<V: Vector>(job: &Pack<'_, V::T>) {
    let (width, lanes) = (V::T::WIDTH, V::LANES);
    let channels = job.means.len();
    let taken = job.range.1 - job.range.0;
    // SAFETY: the targets have room for padded rows and columns; reads stay inside `features`,
    // a partial vector goes through a buffer.
    unsafe {
        let one = V::splat(V::T::of(1.0));
        let scale = V::splat(job.scale);
        for channel in (0..channels).step_by(4) {
            for column in (0..taken.next_multiple_of(width)).step_by(lanes) {
                let mut rows = [V::splat(V::T::default()); 4];
                for (r, row) in rows.iter_mut().enumerate() {
                    if channel + r >= channels || column >= taken {
                        continue;
                    }
                    let at = (channel + r) * job.positions + job.range.0 + column;
                    let value = if column + lanes <= taken {
                        V::load(job.features.as_ptr().add(at))
                    } else {
                        let mut buffer = [job.means[channel + r]; 16];
                        buffer[..taken - column]
                            .copy_from_slice(&job.features[at..at + taken - column]);
                        V::load(buffer.as_ptr())
                    };
                    // x - mean exactly rounded, so that constant features become zeros.
                    let mean = V::T::default() - job.means[channel + r];
                    *row = V::splat(mean).fma(value, one).mul(scale);
                }
                if let Some(matrix) = job.plain {
                    for (r, row) in rows.iter().enumerate() {
                        row.store(matrix.element(channel + r, column));
                    }
                }
                if let Some(matrix) = job.transposed
                    && column < taken
                {
                    if column + lanes <= taken.next_multiple_of(4) {
                        V::store_transposed(&rows, matrix.element(column, channel), width);
                    } else {
                        let mut buffer = [[V::T::default(); 16]; 4];
                        for (line, row) in buffer.iter_mut().zip(&rows) {
                            row.store(line.as_mut_ptr());
                        }
                        for position in column..taken {
                            for (r, line) in buffer.iter().enumerate() {
                                *matrix.element(position, channel + r) = line[position - column];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Upstream gradient as the symmetric matrix that the adjoint reads.
#[derive(Clone, Copy)]
pub(crate) struct Upstream<'a, T> {
    /// Upper triangle row by row, or a full `d x d` matrix.
    pub gradient: &'a [T],
    pub d: usize,
    pub triangle: bool,
    pub scale: T,
    pub target: Matrix<T>,
}

#[inline(always)]
pub(crate) unsafe fn upstream<V: Vector>(job: &Upstream<'_, V::T>) {
    let (d, width) = (job.d, V::T::WIDTH);
    let half = job.scale * V::T::of(0.5);
    // SAFETY: the target is d x d with padding; indices below stay in it.
    unsafe {
        if !job.triangle {
            for i in 0..d {
                for j in 0..d {
                    let sum = job.gradient[i * d + j] + job.gradient[j * d + i];
                    *job.target.element(i, j) = sum * half;
                }
            }
            return;
        }
        let start = |i: usize| i * (2 * d - i + 1) / 2;
        for first in (0..d).step_by(4) {
            let rows = 4.min(d - first);
            // The panel that holds the diagonal, and a last partial panel: one by one.
            let diagonal_end = ((first / width + 1) * width).min(d);
            let vector_end = diagonal_end.max(d / width * width);
            for i in first..first + rows {
                for j in (i..diagonal_end).chain(vector_end..d) {
                    let value = job.gradient[start(i) + j - i];
                    let value = if i == j {
                        value * job.scale
                    } else {
                        value * half
                    };
                    *job.target.element(i, j) = value;
                    *job.target.element(j, i) = value;
                }
            }
            for column in (diagonal_end..vector_end).step_by(V::LANES) {
                let mut lines = [V::splat(V::T::default()); 4];
                for (r, line) in lines.iter_mut().enumerate().take(rows) {
                    let i = first + r;
                    let at = job.gradient.as_ptr().add(start(i) + column - i);
                    *line = V::load(at).mul(V::splat(half));
                    line.store(job.target.element(i, column));
                }
                V::store_transposed(&lines, job.target.element(column, first), width);
            }
        }
    }
}

/// `target = sum of weighted matrices + diagonal * I`, over `n x n` symmetric storage.
#[derive(Clone, Copy)]
pub(crate) struct Combine<'a, T> {
    pub n: usize,
    pub target: Matrix<T>,
    pub terms: &'a [(T, Matrix<T>)],
    pub diagonal: T,
}

#[inline(always)]
pub(crate) unsafe fn combine<V: Vector>(job: &Combine<'_, V::T>) {
    let length = Matrix::<V::T>::len(job.n, job.n);
    // SAFETY: every matrix is n x n with padding, its panels beside each other.
    unsafe {
        for at in (0..length).step_by(V::LANES) {
            let mut sum = V::splat(V::T::default());
            for &(weight, matrix) in job.terms {
                sum = sum.fma(V::splat(weight), V::load(matrix.at.add(at)));
            }
            sum.store(job.target.at.add(at));
        }
        for i in 0..job.n {
            *job.target.element(i, i) += job.diagonal;
        }
    }
}

/// `sum of a_ij b_ij` over an `n x n` panel matrix.
#[inline(always)]
pub(crate) unsafe fn dot<V: Vector>(n: usize, a: Matrix<V::T>, b: Matrix<V::T>) -> f64 {
    let width = V::T::WIDTH;
    let mut total = 0.0;
    // SAFETY: both are n x n with padding; padding columns are left out.
    unsafe {
        for panel in 0..n / width {
            let (a, b) = (a.at.add(panel * a.stride), b.at.add(panel * b.stride));
            let mut sums = [V::splat(V::T::default()); 4];
            for at in (0..n * width).step_by(4 * V::LANES) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let at = at + lane * V::LANES;
                    if at < n * width {
                        *sum = sum.fma(V::load(a.add(at)), V::load(b.add(at)));
                    }
                }
            }
            let mut buffer = [V::T::default(); 16];
            for sum in sums {
                sum.store(buffer.as_mut_ptr());
                total += buffer[..V::LANES].iter().map(|x| x.wide()).sum::<f64>();
            }
        }
        for column in n / width * width..n {
            for row in 0..n {
                total += (*a.element(row, column)).wide() * (*b.element(row, column)).wide();
            }
        }
    }
    total
}

/// Mean (in f64, so its sum cannot overflow for f32) of a row and the largest distance from it.
///
/// Differences from the first value are summed, so that the mean of equal values is exact. The
/// mean is not finite exactly if a value of the row is not.
#[inline(always)]
pub(crate) fn row_statistics<T: Element>(row: &[T]) -> (f64, f64) {
    let first = row.first().copied().unwrap_or_default();
    let base = first.wide();
    let mut sums = [0.0; 16];
    let (mut least, mut most) = ([first; 16], [first; 16]);
    let chunks = row.chunks_exact(16);
    let rest = chunks.remainder();
    let mut sum: f64 = rest.iter().map(|x| x.wide() - base).sum();
    for (lane, &x) in rest.iter().enumerate() {
        (least[lane], most[lane]) = (least[lane].smaller(x), most[lane].larger(x));
    }
    for chunk in chunks {
        for lane in 0..16 {
            sums[lane] += chunk[lane].wide() - base;
            least[lane] = least[lane].smaller(chunk[lane]);
            most[lane] = most[lane].larger(chunk[lane]);
        }
    }
    sum += sums.iter().sum::<f64>();
    let mean = base + sum / row.len().max(1) as f64;
    let least = least.iter().fold(first, |a, &b| a.smaller(b)).wide();
    let most = most.iter().fold(first, |a, &b| a.larger(b)).wide();
    (mean, (most - mean).max(mean - least))
}

/// Whether every value is finite.
#[inline(always)]
pub(crate) fn all_finite<T: Element>(values: &[T]) -> bool {
    // 0 x is 0 for a finite x and NaN otherwise.
    let zero = T::default();
    let mut sums = [T::default(); 64];
    let chunks = values.chunks_exact(64);
    let rest = chunks.remainder().iter().all(|x| x.wide().is_finite());
    for chunk in chunks {
        for lane in 0..64 {
            sums[lane] += zero * chunk[lane];
        }
    }
    rest && sums.iter().all(|x| x.wide() == 0.0)
}

/// `sum of a_i b_i` in f64, where products of f32 neither overflow nor vanish.
#[inline(always)]
pub(crate) fn flat_dot<T: Element>(a: &[T], b: &[T]) -> f64 {
    let mut sums = [0.0; 32];
    let (a, b) = (a.chunks_exact(32), b.chunks_exact(32));
    let rest = a.remainder().iter().zip(b.remainder());
    let rest: f64 = rest.map(|(a, b)| a.wide() * b.wide()).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..32 {
            sums[lane] += a[lane].wide() * b[lane].wide();
        }
    }
    rest + sums.iter().sum::<f64>()
}
