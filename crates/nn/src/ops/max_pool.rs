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
use super::window::Windows;
use crate::Result;
use crate::blocked::Lanes;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, dispatch, read, values, vectorised};
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
        let Windows { rows, columns, .. } = self.windows;
        let out_plane = self.windows.out_plane();
        let mut y = vec![T::ZERO; self.windows.out_len()];
        let mut winners = vec![0u32; y.len()];
        y.par_chunks_exact_mut(out_plane)
            .zip(winners.par_chunks_exact_mut(out_plane))
            .zip(x.par_chunks_exact(self.windows.plane()))
            .for_each(|((y, winners), x)| {
                if self.windows.lanes > 1 {
                    // Two widths: single and double precision.
                    match self.windows.lanes {
                        16 => blocked_plane::<T, 16>(&self.windows, y, winners, x),
                        _ => blocked_plane::<T, 8>(&self.windows, y, winners, x),
                    }
                    return;
                }
                for oy in 0..rows.output {
                    let down = rows.range(oy);
                    for ox in 0..columns.output {
                        let across = columns.range(ox);
                        let mut winner = down.start * columns.input + across.start;
                        for row in down.clone() {
                            let start = row * columns.input;
                            for at in start + across.start..start + across.end {
                                // `v != v` holds for NaN alone.
                                #[allow(clippy::eq_op)]
                                if x[at] > x[winner] || x[at] != x[at] {
                                    winner = at;
                                }
                            }
                        }
                        y[oy * columns.output + ox] = x[winner];
                        winners[oy * columns.output + ox] = winner as u32;
                    }
                }
            });
        (y, winners)
    }
}

vectorised! {
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
