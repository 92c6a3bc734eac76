//! Average pooling over windows and over whole planes.
//!
//! candle's needs a kernel equal to its stride to be differentiated.

use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::{Window, dims4};
use crate::Result;
use crate::element::{Element, dispatch, lane_sums, read, values};

/// Mean of each window; padding counts as zeros, as is PyTorch's default.
///
/// # Shapes
/// As [`max_pool2d`](super::max_pool2d).
///
/// # Errors
/// As [`max_pool2d`](super::max_pool2d).
pub fn avg_pool2d(x: &Tensor, window: Window) -> Result<Tensor> {
    let [batch, channels, height, width] = dims4("avg_pool2d", x)?;
    let out = (
        window.output("avg_pool2d", height)?,
        window.output("avg_pool2d", width)?,
    );
    let op = AvgPool {
        window,
        input: (height, width),
        out,
        shape: Shape::from((batch, channels, out.0, out.1)),
    };
    Ok(x.contiguous()?.apply_op1(op)?)
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
    Ok(x.contiguous()?.apply_op1(op)?)
}

struct AvgPool {
    window: Window,
    input: (usize, usize),
    out: (usize, usize),
    shape: Shape,
}

impl AvgPool {
    /// Calls `visit(place in the output, places in one row of the input)`.
    #[inline(always)]
    fn for_each_row(&self, mut visit: impl FnMut(usize, std::ops::Range<usize>)) {
        for oy in 0..self.out.0 {
            for ox in 0..self.out.1 {
                let columns = self.window.range(ox, self.input.1);
                for row in self.window.range(oy, self.input.0) {
                    let start = row * self.input.1;
                    visit(
                        oy * self.out.1 + ox,
                        start + columns.start..start + columns.end,
                    );
                }
            }
        }
    }

    fn share<T: Element>(&self) -> T {
        T::from_f64(1.0 / (self.window.kernel * self.window.kernel) as f64)
    }

    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let share = self.share::<T>();
        let mut y = vec![T::ZERO; self.shape.elem_count()];
        y.par_chunks_exact_mut(self.out.0 * self.out.1)
            .zip(x.par_chunks_exact(self.input.0 * self.input.1))
            .for_each(|(y, x)| {
                self.for_each_row(|to, from| x[from].iter().for_each(|&v| y[to] += v * share));
            });
        y
    }

    fn backward<T: Element>(&self, dy: &[T], len: usize) -> Vec<T> {
        let share = self.share::<T>();
        let mut dx = vec![T::ZERO; len];
        dx.par_chunks_exact_mut(self.input.0 * self.input.1)
            .zip(dy.par_chunks_exact(self.out.0 * self.out.1))
            .for_each(|(dx, dy)| {
                self.for_each_row(|from, to| {
                    dx[to].iter_mut().for_each(|v| *v += dy[from] * share)
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
        Ok((y, self.shape.clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
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

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
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
