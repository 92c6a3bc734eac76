//! Max-pooling that remembers where each maximum was.
//!
//! candle's own hands each window's gradient to all of its elements in equal shares, refuses a
//! kernel that differs from the stride, and has no padding; `tests/candle.rs` shows it. Of equal
//! maxima the first one gets the gradient; NaN wins over numbers, as in PyTorch.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::Pool;
use super::window::{Axis, Windows};
use crate::Result;
use crate::blocked::Lanes;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, dispatch, read, values, vectorised, with_scratch};
use crate::record::note_op;
use crate::tape;

/// Maximum of each window. Padding never wins.
///
/// # Shapes
/// - `x`: `(batch, channels, height, width)`, or blocked ([`super::block`]), and so the result
/// - returns `(batch, channels, height', width')` with
///   `height' = (height + 2·padding − kernel) / stride + 1`, rounded up in ceil mode unless the
///   last window would start past the input
///
/// # Errors
/// [`crate::Error::Option`] for a window out of range, [`crate::Error::Shape`] where it does not fit.
pub fn max_pool2d(x: &Tensor, window: impl Into<Pool>) -> Result<Tensor> {
    let op = MaxPool {
        windows: Windows::of_any_layout("max_pool2d", x, window.into())?,
        winners: OnceLock::new(),
        #[cfg(feature = "cuda")]
        on_gpu: OnceLock::new(),
    };
    let y = tape::apply1(&x.contiguous()?, op)?;
    note_op("max_pool2d", &y);
    Ok(y)
}

struct MaxPool {
    windows: Windows,
    /// For each output its place in the input plane.
    winners: OnceLock<Vec<u32>>,
    /// The same in the memory of a GPU.
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<Box<dyn cuda::Held>>,
}

impl MaxPool {
    fn forward<T: Lanes>(&self, x: &[T]) -> (Vec<T>, Vec<u32>) {
        let out_plane = self.windows.out_plane();
        let mut y = vec![T::ZERO; self.windows.out_len()];
        let mut winners = vec![0u32; y.len()];
        y.par_chunks_exact_mut(out_plane)
            .zip(winners.par_chunks_exact_mut(out_plane))
            .zip(x.par_chunks_exact(self.windows.plane()))
            .for_each(|((y, winners), x)| match self.windows.lanes {
                1 if is_within(self.windows.columns) => {
                    with_scratch(phases_len(&self.windows), |phases| {
                        plain_plane(&self.windows, phases, y, winners, x);
                    });
                }
                1 => wide_plane(&self.windows, y, winners, x),
                // Two widths: single and double precision.
                16 => blocked_plane::<T, 16>(&self.windows, y, winners, x),
                _ => blocked_plane::<T, 8>(&self.windows, y, winners, x),
            });
        (y, winners)
    }
}

/// Whether windows and their distance are within the input: others would mostly sort padding.
fn is_within(columns: Axis) -> bool {
    columns.kernel.max(columns.stride) <= columns.input
}

/// A plane, window by window.
fn wide_plane<T: Element>(windows: &Windows, y: &mut [T], winners: &mut [u32], x: &[T]) {
    let Windows { rows, columns, .. } = windows;
    for (i, (y, place)) in y.iter_mut().zip(winners).enumerate() {
        let (down, across) = (
            rows.range(i / columns.output),
            columns.range(i % columns.output),
        );
        let mut winner = down.start * columns.input + across.start;
        for row in down {
            let start = row * columns.input;
            for at in start + across.start..start + across.end {
                // `v != v` holds for NaN alone.
                #[allow(clippy::eq_op)]
                if x[at] > x[winner] || x[at] != x[at] {
                    winner = at;
                }
            }
        }
        (*y, *place) = (x[winner], winner as u32);
    }
}

/// Remainders of columns by the stride that windows reach, and places of each in a row.
fn phases_of(columns: Axis) -> (usize, usize) {
    let (kernel, stride) = (columns.kernel, columns.stride);
    (stride.min(kernel), columns.output + (kernel - 1) / stride)
}

/// What [`plain_plane`] needs of scratch memory.
fn phases_len(windows: &Windows) -> usize {
    let (phases, len) = phases_of(windows.columns);
    windows.rows.input * phases * len
}

vectorised! {
    /// A plane. Its columns are first sorted by their remainders by the stride, with -infinity for the padding, so that what
    /// neighbouring windows have at the same place lies side by side.
    fn plain_plane<T: Element>(
        windows: &Windows,
        phases: &mut [T],
        y: &mut [T],
        winners: &mut [u32],
        x: &[T],
    ) {
        let Windows { rows, columns, .. } = windows;
        let (count, len) = phases_of(*columns);
        let (stride, padding) = (columns.stride, columns.padding);
        let lowest = T::from_f64(f64::NEG_INFINITY);
        phases.fill(lowest);
        let lines = phases.chunks_exact_mut(count * len);
        for (line, x) in lines.zip(x.chunks_exact(columns.input)) {
            for (phase, line) in line.chunks_exact_mut(len).enumerate() {
                // The first column of this remainder.
                let first = (phase + stride - padding % stride) % stride;
                let Some(x) = x.get(first..) else { continue };
                let Some(line) = line.get_mut((first + padding) / stride..) else { continue };
                if stride == 1 {
                    let inside = x.len().min(line.len());
                    line[..inside].copy_from_slice(&x[..inside]);
                } else {
                    line.iter_mut().zip(x.iter().step_by(stride)).for_each(|(to, &from)| *to = from);
                }
            }
        }
        let outputs = y.chunks_exact_mut(columns.output);
        for (oy, (best, place)) in outputs.zip(winners.chunks_exact_mut(columns.output)).enumerate() {
            let down = rows.range(oy);
            best.fill(lowest);
            // Where all are -infinity, the first one in the window.
            for (ox, place) in place.iter_mut().enumerate() {
                *place = (down.start * columns.input + columns.range(ox).start) as u32;
            }
            for row in down {
                for tap in 0..columns.kernel {
                    let from = (row * count + tap % stride) * len + tap / stride;
                    let taps = &phases[from..from + columns.output];
                    // Of a place in the padding, which never wins, below nothing.
                    let mut at = ((row * columns.input + tap) as u32).wrapping_sub(padding as u32);
                    for ((best, place), &value) in best.iter_mut().zip(place.iter_mut()).zip(taps) {
                        // `v != v` holds for NaN alone.
                        #[allow(clippy::eq_op)]
                        let wins = (value > *best) | (value != value);
                        *best = if wins { value } else { *best };
                        *place = if wins { at } else { *place };
                        at = at.wrapping_add(stride as u32);
                    }
                }
            }
        }
    }

    /// A plane of `L` channels beside each other.
    fn blocked_plane<T: Element, const L: usize>(
        windows: &Windows,
        y: &mut [T],
        winners: &mut [u32],
        x: &[T],
    ) {
        let Windows { rows, columns, .. } = windows;
        let (x, _) = x.as_chunks::<L>();
        let outputs = y.as_chunks_mut::<L>().0.iter_mut();
        let mut outputs = outputs.zip(winners.as_chunks_mut::<L>().0);
        for oy in 0..rows.output {
            for ox in 0..columns.output {
                let (down, across) = (rows.range(oy), columns.range(ox));
                let Some((y, winners)) = outputs.next() else {
                    return;
                };
                let first = down.start * columns.input + across.start;
                let (mut best, mut place) = (x[first], [first as u32; L]);
                for row in down {
                    let start = row * columns.input;
                    let pixels = &x[start + across.start..start + across.end];
                    for (at, pixel) in (start + across.start..).zip(pixels) {
                        for lane in 0..L {
                            // `v != v` holds for NaN alone.
                            #[allow(clippy::eq_op)]
                            let wins = (pixel[lane] > best[lane]) | (pixel[lane] != pixel[lane]);
                            best[lane] = if wins { pixel[lane] } else { best[lane] };
                            place[lane] = if wins { at as u32 } else { place[lane] };
                        }
                    }
                }
                *y = best;
                // From a pixel to a place in the plane.
                for lane in 0..L {
                    winners[lane] = place[lane] * L as u32 + lane as u32;
                }
            }
        }
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool2d"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("max_pool2d", s.dtype(), T => {
            let (y, winners) = self.forward(values::<T>(s, l)?);
            self.winners.get_or_init(|| winners);
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, self.windows.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        use isqrt_device::cuda::input;
        let (windows, batch) = (self.windows.on_gpu(false), self.windows.batch);
        let y = cuda::of_maps!("max_pool2d", s.dtype(), T => {
            let x = input::<T>(s, l)?;
            let (y, winners) = cuda::windows::max_pool::<T>(s.device(), windows, batch, x.at)?;
            // candle runs an op value once.
            let _ = self.on_gpu.set(Box::new(winners));
            Ok(y.into_storage())
        })?;
        Ok((y, self.windows.shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if let Some(winners) = self.on_gpu.get() {
            use isqrt_device::cuda::address;
            let (windows, batch) = (self.windows.on_gpu(false), self.windows.batch);
            let (device, dy) = (cuda::device_of(x)?, dy.contiguous()?);
            return cuda::of_maps!("max_pool2d", x.dtype(), T => {
                let from = (address::<T>(&dy)?, winners.at());
                let dx = cuda::windows::max_pool_gradient::<T>(device, windows, batch, from)?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let Some(winners) = self.winners.get() else {
            candle_core::bail!("max_pool2d: backward before forward")
        };
        let dy = dy.contiguous()?;
        let dys = read(&dy);
        let (plane, out_plane) = (self.windows.plane(), self.windows.out_plane());
        dispatch!("max_pool2d", x.dtype(), T => {
            let dys = dys.values::<T>()?;
            let mut dx = vec![T::ZERO; x.elem_count()];
            dx.par_chunks_exact_mut(plane)
                .zip(dys.par_chunks_exact(out_plane).zip(winners.par_chunks_exact(out_plane)))
                .for_each(|(dx, (dy, winners))| {
                    for (&dy, &winner) in dy.iter().zip(winners) {
                        dx[winner as usize] += dy;
                    }
                });
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{Device, Tensor};
    use isqrt_testkit::randn;

    use super::{MaxPool, OnceLock, Pool, Windows};
    use crate::ops::Window;

    /// The definition: of equal values the first, of NaN the last.
    fn winner(windows: &Windows, x: &[f32], oy: usize, ox: usize) -> u32 {
        let (rows, columns) = (windows.rows, windows.columns);
        let places = rows.range(oy).flat_map(|row| {
            let start = row * columns.input;
            columns.range(ox).map(move |column| start + column)
        });
        let best = places.reduce(|best, at| match x[at] > x[best] || x[at].is_nan() {
            true => at,
            false => best,
        });
        best.unwrap() as u32
    }

    #[test]
    fn the_first_of_equal_maxima_and_the_last_nan_win() {
        let mut windows = Vec::new();
        for (kernel, stride, padding) in [
            (2, 2, 0),
            (3, 2, 1),
            (3, 1, 1),
            (3, 3, 0),
            (2, 3, 1),
            (5, 2, 2),
            (7, 4, 3),
        ] {
            let window = Window {
                kernel,
                stride,
                padding,
            };
            windows.extend([false, true].map(|ceil_mode| Pool {
                ceil_mode,
                ..Pool::from(window)
            }));
        }
        let special = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 0.0];
        for (case, pool) in windows.into_iter().enumerate() {
            for (height, width) in [(7, 9), (12, 20), (8, 33), (9, 4)] {
                let x = randn(&[2, 3, height, width], case as u64, candle_core::DType::F32);
                // Few different values, so that many are equal.
                let mut x: Vec<f32> = x.unwrap().flatten_all().unwrap().to_vec1().unwrap();
                for (i, x) in x.iter_mut().enumerate() {
                    *x = x.round();
                    if i * 7 % 23 < 4 && i % 5 != 0 {
                        *x = special[i % 4];
                    }
                    // A plane of nothing but the lowest value.
                    if i / (height * width) == 1 {
                        *x = f32::NEG_INFINITY;
                    }
                }
                let tensor = Tensor::new(&*x, &Device::Cpu).unwrap();
                let tensor = tensor.reshape((2, 3, height, width)).unwrap();
                let op = MaxPool {
                    windows: Windows::of_any_layout("max_pool2d", &tensor, pool).unwrap(),
                    winners: OnceLock::new(),
                    #[cfg(feature = "cuda")]
                    on_gpu: OnceLock::new(),
                };
                let (y, winners) = op.forward(&x);
                let (planes, outs) = (op.windows.plane(), op.windows.out_plane());
                for (i, (&y, &found)) in y.iter().zip(&winners).enumerate() {
                    let (plane, at) = (&x[i / outs * planes..][..planes], i % outs);
                    let columns = op.windows.columns.output;
                    let known = winner(&op.windows, plane, at / columns, at % columns);
                    let of = plane[known as usize];
                    assert_eq!(found, known, "{pool:?} {height}x{width} at {i}");
                    assert!(y == of || (y.is_nan() && of.is_nan()));
                }
            }
        }
    }
}
