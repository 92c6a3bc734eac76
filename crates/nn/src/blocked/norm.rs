//! Batch normalisation of a panel: the sums and the lines of `ops/batch_norm.rs`, for channels
//! that lie beside each other.
//!
//! A panel is read 16 values at a time, one pixel in f32 and two in f64; value `i` belongs to
//! channel `i mod W`.

use super::Lanes;
use crate::element::{Element, vectorised};
use crate::ops::{Line, through};

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

/// `Σ dy` and `Σ dy·(x − mean)` for each channel of a panel.
pub(crate) fn sums<T: Lanes>(
    x: &[T],
    y: &[T],
    dy: &[T],
    mean: impl Fn(usize) -> f64,
    relu: bool,
) -> Vec<(f64, f64)> {
    let (first, second) = products(x, y, dy, &row(mean), relu);
    let (first, second) = (by_channel::<T>(&first), by_channel::<T>(&second));
    first.into_iter().zip(second).collect()
}

/// `(x - mean)·scale + shift`, for each channel of a panel.
pub(crate) fn normalise<T: Lanes>(
    y: &mut [T],
    x: &[T],
    line: impl Fn(usize) -> (f64, f64, f64),
    relu: bool,
) {
    let (mean, scale, shift) = (row(|c| line(c).0), row(|c| line(c).1), row(|c| line(c).2));
    apply(y, x, &mean, &scale, &shift, relu);
}

/// The gradient of a panel.
pub(crate) fn gradient<T: Lanes>(
    dx: &mut [T],
    (x, y, dy): (&[T], &[T], &[T]),
    line: impl Fn(usize) -> Line<T>,
    relu: bool,
) {
    let lines: [Line<T>; ROW] = std::array::from_fn(|i| line(i % T::WIDTH));
    write_gradient(dx, x, y, dy, &lines, relu);
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
        y: &[T],
        dy: &[T],
        mean: &[T; ROW],
        relu: bool,
    ) -> ([f64; ROW], [f64; ROW]) {
        let mut totals = ([0.0; ROW], [0.0; ROW]);
        let runs = x.chunks(ROW * RUN).zip(y.chunks(ROW * RUN)).zip(dy.chunks(ROW * RUN));
        for ((x, y), dy) in runs {
            let mut sums = ([T::ZERO; ROW], [T::ZERO; ROW]);
            let ((xs, x), (ys, y)) = (x.as_chunks::<ROW>(), y.as_chunks::<ROW>());
            let (dys, dy) = dy.as_chunks::<ROW>();
            for ((x, y), dy) in xs.iter().zip(ys).zip(dys) {
                for i in 0..ROW {
                    let upstream = through(y[i], dy[i], relu);
                    sums.0[i] += upstream;
                    sums.1[i] += upstream * (x[i] - mean[i]);
                }
            }
            for i in 0..x.len() {
                let upstream = through(y[i], dy[i], relu);
                sums.0[i] += upstream;
                sums.1[i] += upstream * (x[i] - mean[i]);
            }
            for i in 0..ROW {
                totals.0[i] += sums.0[i].to_f64();
                totals.1[i] += sums.1[i].to_f64();
            }
        }
        totals
    }

    fn apply<T: Element>(
        y: &mut [T],
        x: &[T],
        mean: &[T; ROW],
        scale: &[T; ROW],
        shift: &[T; ROW],
        relu: bool,
    ) {
        for (y, x) in y.chunks_mut(ROW).zip(x.chunks(ROW)) {
            for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                let value = (x - mean[i]) * scale[i] + shift[i];
                // Not `max`: a NaN must stay one.
                *y = if relu && value <= T::ZERO { T::ZERO } else { value };
            }
        }
    }

    fn write_gradient<T: Element>(
        dx: &mut [T],
        x: &[T],
        y: &[T],
        dy: &[T],
        lines: &[Line<T>; ROW],
        relu: bool,
    ) {
        let rows = dx.chunks_mut(ROW).zip(x.chunks(ROW)).zip(y.chunks(ROW)).zip(dy.chunks(ROW));
        for (((dx, x), y), dy) in rows {
            for i in 0..dx.len() {
                let line = lines[i];
                let upstream = through(y[i], dy[i], relu);
                dx[i] = line.scale * (upstream - line.offset - (x[i] - line.mean) * line.slope);
            }
        }
    }
}
