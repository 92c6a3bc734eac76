//! Batch normalisation of a panel: the sums and the lines of `ops/batch_norm.rs`, for channels
//! that lie beside each other.
//!
//! A panel is read 16 values at a time, one pixel in f32 and two in f64; value `i` belongs to
//! channel `i mod W`.

use super::Lanes;
use crate::element::{Element, vectorised};
use crate::ops::{Clip, Line};

/// Values that are worked on at once.
const ROW: usize = 16;
/// Rows that are added up in the element type before the sum goes on in f64.
const RUN: usize = 256;

/// Sums over the rows of a panel, for each channel.
fn by_channel<T: Lanes>(sums: &[f64; ROW]) -> Vec<f64> {
    (0..T::WIDTH)
        .map(|c| sums.iter().skip(c).step_by(T::WIDTH).sum())
        .collect()
}

/// A value for each channel, repeated to a row.
fn row<T: Lanes>(values: impl Fn(usize) -> f64) -> [T; ROW] {
    std::array::from_fn(|i| <T as candle_core::WithDType>::from_f64(values(i % T::WIDTH)))
}

/// Sums of the pixels of a panel, for each channel.
pub(crate) fn channel_sums<T: Lanes>(x: &[T]) -> Vec<f64> {
    by_channel::<T>(&deviations(x, &[T::ZERO; ROW]).0)
}

/// Mean and squared deviations from it, for each channel of a panel.
pub(crate) fn statistics<T: Lanes>(x: &[T]) -> Vec<(f64, f64)> {
    let pixels = (x.len() / T::WIDTH) as f64;
    let sums = channel_sums(x);
    let center: [T; ROW] = row(|c| sums[c] / pixels);
    let (rest, squares) = deviations(x, &center);
    let (rest, squares) = (by_channel::<T>(&rest), by_channel::<T>(&squares));
    (0..T::WIDTH)
        .map(|c| {
            // `center` is the mean rounded: correct the mean, keep the squares about it.
            let rest = rest[c] / pixels;
            (center[c].to_f64() + rest, squares[c] - pixels * rest * rest)
        })
        .collect()
}

/// The lines of a panel's channels, each repeated to a row.
struct Lines<T> {
    mean: [T; ROW],
    scale: [T; ROW],
    shift: [T; ROW],
    offset: [T; ROW],
    slope: [T; ROW],
}

impl<T: Lanes> Lines<T> {
    fn of(lines: &[Line<T>]) -> Self {
        let row = |of: fn(&Line<T>) -> T| std::array::from_fn(|i| of(&lines[i % T::WIDTH]));
        Self {
            mean: row(|line| line.mean),
            scale: row(|line| line.scale),
            shift: row(|line| line.shift),
            offset: row(|line| line.offset),
            slope: row(|line| line.slope),
        }
    }
}

impl<T: Element> Lines<T> {
    #[inline(always)]
    fn at(&self, i: usize) -> Line<T> {
        Line {
            mean: self.mean[i],
            scale: self.scale[i],
            shift: self.shift[i],
            offset: self.offset[i],
            slope: self.slope[i],
        }
    }
}

/// `Σ dy` and `Σ dy·(x − mean)` for each channel of a panel, of what its activation let pass.
pub(crate) fn sums<T: Lanes>(
    x: &[T],
    dy: &[T],
    lines: &[Line<T>],
    clip: Clip<T>,
) -> Vec<(f64, f64)> {
    let (first, second) = products(x, dy, &Lines::of(lines), clip);
    let (first, second) = (by_channel::<T>(&first), by_channel::<T>(&second));
    first.into_iter().zip(second).collect()
}

/// What becomes of a panel, with a line for each channel.
pub(crate) fn normalise<T: Lanes>(y: &mut [T], x: &[T], lines: &[Line<T>], clip: Clip<T>) {
    apply(y, x, &Lines::of(lines), clip);
}

/// The gradient of a panel.
pub(crate) fn gradient<T: Lanes>(
    dx: &mut [T],
    x: &[T],
    dy: &[T],
    lines: &[Line<T>],
    clip: Clip<T>,
) {
    write_gradient(dx, x, dy, &Lines::of(lines), clip);
}

vectorised! {
    /// Sums of `x - center` and of its square over the rows.
    fn deviations<T: Element>(x: &[T], center: &[T; ROW]) -> ([f64; ROW], [f64; ROW]) {
        let mut totals = ([0.0; ROW], [0.0; ROW]);
        for run in x.chunks(ROW * RUN) {
            let mut sums = ([T::ZERO; ROW], [T::ZERO; ROW]);
            let (rows, rest) = run.as_chunks::<ROW>();
            for row in rows {
                for i in 0..ROW {
                    let d = row[i] - center[i];
                    sums.0[i] += d;
                    sums.1[i] += d * d;
                }
            }
            for (i, &x) in rest.iter().enumerate() {
                let d = x - center[i];
                sums.0[i] += d;
                sums.1[i] += d * d;
            }
            for i in 0..ROW {
                totals.0[i] += sums.0[i].to_f64();
                totals.1[i] += sums.1[i].to_f64();
            }
        }
        totals
    }

    fn products<T: Element>(
        x: &[T],
        dy: &[T],
        lines: &Lines<T>,
        clip: Clip<T>,
    ) -> ([f64; ROW], [f64; ROW]) {
        let mut totals = ([0.0; ROW], [0.0; ROW]);
        for (x, dy) in x.chunks(ROW * RUN).zip(dy.chunks(ROW * RUN)) {
            let mut sums = ([T::ZERO; ROW], [T::ZERO; ROW]);
            let ((xs, x), (dys, dy)) = (x.as_chunks::<ROW>(), dy.as_chunks::<ROW>());
            for (x, dy) in xs.iter().zip(dys) {
                for i in 0..ROW {
                    let upstream = lines.at(i).upstream(x[i], dy[i], clip);
                    sums.0[i] += upstream;
                    sums.1[i] += upstream * (x[i] - lines.mean[i]);
                }
            }
            for i in 0..x.len() {
                let upstream = lines.at(i).upstream(x[i], dy[i], clip);
                sums.0[i] += upstream;
                sums.1[i] += upstream * (x[i] - lines.mean[i]);
            }
            for i in 0..ROW {
                totals.0[i] += sums.0[i].to_f64();
                totals.1[i] += sums.1[i].to_f64();
            }
        }
        totals
    }

    fn apply<T: Element>(y: &mut [T], x: &[T], lines: &Lines<T>, clip: Clip<T>) {
        let ((ys, y), (xs, x)) = (y.as_chunks_mut::<ROW>(), x.as_chunks::<ROW>());
        for (y, x) in ys.iter_mut().zip(xs) {
            for i in 0..ROW {
                y[i] = clip.of(lines.at(i).value(x[i]));
            }
        }
        for i in 0..y.len() {
            y[i] = clip.of(lines.at(i).value(x[i]));
        }
    }

    fn write_gradient<T: Element>(
        dx: &mut [T],
        x: &[T],
        dy: &[T],
        lines: &Lines<T>,
        clip: Clip<T>,
    ) {
        let (dxs, dx) = dx.as_chunks_mut::<ROW>();
        let ((xs, x), (dys, dy)) = (x.as_chunks::<ROW>(), dy.as_chunks::<ROW>());
        for ((dx, x), dy) in dxs.iter_mut().zip(xs).zip(dys) {
            for i in 0..ROW {
                dx[i] = lines.at(i).gradient(x[i], dy[i], clip);
            }
        }
        for i in 0..dx.len() {
            dx[i] = lines.at(i).gradient(x[i], dy[i], clip);
        }
    }
}
