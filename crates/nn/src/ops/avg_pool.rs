//! Average pooling over windows and over whole planes.
//!
//! candle's needs a kernel equal to its stride to be differentiated.

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::window::Windows;
use super::{Pool, dims4};
use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, dispatch, lane_sums, read, values};
use crate::record::note_op;
use crate::tape;

/// Mean of each window; padding counts as zeros unless `count_include_pad` is off.
///
/// # Shapes
/// As [`max_pool2d`](super::max_pool2d).
///
/// # Errors
/// As [`max_pool2d`](super::max_pool2d).
pub fn avg_pool2d(x: &Tensor, window: impl Into<Pool>) -> Result<Tensor> {
    let pool = window.into();
    let op = AvgPool {
        windows: Windows::new("avg_pool2d", x, pool)?,
        count_include_pad: pool.count_include_pad,
    };
    let y = tape::apply1(&x.contiguous()?, op)?;
    note_op("avg_pool2d", &y);
    Ok(y)
}

/// Mean of each of `rows x columns` windows that share the plane out as evenly as they can: window
/// `i` of `n` covers the places from `i·size / n`, rounded down, to `(i + 1)·size / n`, rounded up.
///
/// # Shapes
/// `(batch, channels, height, width)` to `(batch, channels, rows, columns)`
///
/// # Errors
/// [`crate::Error::Shape`] where `x` has another rank or is empty, [`crate::Error::Option`] for no
/// rows or columns.
pub fn adaptive_avg_pool2d(x: &Tensor, output: (usize, usize)) -> Result<Tensor> {
    let windows = Windows::adaptive("adaptive_avg_pool2d", x, output)?;
    if output == (x.dim(2)?, x.dim(3)?) {
        return Ok(x.clone());
    }
    let op = AvgPool {
        windows,
        count_include_pad: false,
    };
    let y = tape::apply1(&x.contiguous()?, op)?;
    note_op("adaptive_avg_pool2d", &y);
    Ok(y)
}

/// Mean of each plane: `(batch, channels, height, width)` to `(batch, channels)`.
///
/// # Errors
/// [`crate::Error::Shape`] where `x` has another rank or is empty.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    let [batch, channels, height, width] = dims4("global_avg_pool", x)?;
    let op = GlobalAvgPool {
        plane: height * width,
        shape: Shape::from((batch, channels)),
    };
    let y = tape::apply1(&x.contiguous()?, op)?;
    note_op("global_avg_pool", &y);
    Ok(y)
}

struct AvgPool {
    windows: Windows,
    count_include_pad: bool,
}

impl AvgPool {
    /// Calls `visit(place in the output, places in one row of the input, 1 / divisor)`.
    #[inline(always)]
    fn for_each_row(&self, mut visit: impl FnMut(usize, Range<usize>, f64)) {
        let Windows { rows, columns, .. } = self.windows;
        for oy in 0..rows.output {
            let down = rows.range(oy);
            for ox in 0..columns.output {
                let across = columns.range(ox);
                let divisor = match self.count_include_pad {
                    true => rows.padded_len(oy) * columns.padded_len(ox),
                    false => down.len() * across.len(),
                };
                for row in down.clone() {
                    let start = row * columns.input;
                    visit(
                        oy * columns.output + ox,
                        start + across.start..start + across.end,
                        1.0 / divisor as f64,
                    );
                }
            }
        }
    }

    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let mut y = vec![T::ZERO; self.windows.out_len()];
        y.par_chunks_exact_mut(self.windows.out_plane())
            .zip(x.par_chunks_exact(self.windows.plane()))
            .for_each(|(y, x)| {
                self.for_each_row(|to, from, share| {
                    let sum = x[from].iter().fold(T::ZERO, |sum, &v| sum + v);
                    y[to] += sum * T::from_f64(share);
                });
            });
        y
    }

    fn backward<T: Element>(&self, dy: &[T], len: usize) -> Vec<T> {
        let mut dx = vec![T::ZERO; len];
        dx.par_chunks_exact_mut(self.windows.plane())
            .zip(dy.par_chunks_exact(self.windows.out_plane()))
            .for_each(|(dx, dy)| {
                self.for_each_row(|from, to, share| {
                    let part = dy[from] * T::from_f64(share);
                    dx[to].iter_mut().for_each(|v| *v += part);
                });
            });
        dx
    }
}

impl CustomOp1 for AvgPool {
    fn name(&self) -> &'static str {
        "avg_pool2d"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("avg_pool2d", s.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.forward(values::<T>(s, l)?)))
        })?;
        Ok((y, self.windows.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        use isqrt_device::cuda::input;
        let windows = self.windows.on_gpu(self.count_include_pad);
        let y = cuda::of_maps!("avg_pool2d", s.dtype(), T => {
            let (x, batch) = (input::<T>(s, l)?, self.windows.batch);
            let y = cuda::windows::average_pool::<T>(s.device(), windows, batch, x.at, false)?;
            Ok(y.into_storage())
        })?;
        Ok((y, self.windows.shape()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            use isqrt_device::cuda::address;
            let windows = self.windows.on_gpu(self.count_include_pad);
            let (device, batch) = (cuda::device_of(x)?, self.windows.batch);
            return cuda::of_maps!("avg_pool2d", x.dtype(), T => {
                let at = address::<T>(&dy)?;
                let dx = cuda::windows::average_pool::<T>(device, windows, batch, at, true)?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let dys = read(&dy);
        dispatch!("avg_pool2d", x.dtype(), T => {
            let dx = self.backward(dys.values::<T>()?, x.elem_count());
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

struct GlobalAvgPool {
    plane: usize,
    shape: Shape,
}

impl CustomOp1 for GlobalAvgPool {
    fn name(&self) -> &'static str {
        "global_avg_pool"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("global_avg_pool", s.dtype(), T => {
            let planes = values::<T>(s, l)?.par_chunks_exact(self.plane).with_min_len(64);
            let n = self.plane as T;
            Ok(T::to_cpu_storage_owned(planes.map(|x| lane_sums([x], |[x]| [x])[0] / n).collect()))
        })?;
        Ok((y, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        use isqrt_device::cuda::input;
        let extent = (self.shape.elem_count(), self.plane);
        let y = cuda::of_maps!("global_avg_pool", s.dtype(), T => {
            let x = input::<T>(s, l)?;
            Ok(cuda::windows::plane_means::<T>(s.device(), x.at, extent)?.into_storage())
        })?;
        Ok((y, self.shape.clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            use isqrt_device::cuda::address;
            let (device, extent) = (cuda::device_of(x)?, (self.shape.elem_count(), self.plane));
            return cuda::of_maps!("global_avg_pool", x.dtype(), T => {
                let at = address::<T>(&dy)?;
                let dx = cuda::windows::plane_means_gradient::<T>(device, at, extent)?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let dys = read(&dy);
        dispatch!("global_avg_pool", x.dtype(), T => {
            let n = self.plane as T;
            let mut dx: Vec<T> = vec![0.0; x.elem_count()];
            dx.par_chunks_exact_mut(self.plane)
                .with_min_len(64)
                .zip(dys.values::<T>()?)
                .for_each(|(dx, dy)| dx.fill(dy / n));
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
