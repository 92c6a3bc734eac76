//! Max-pooling that remembers where each maximum was.
//!
//! candle's own hands each window's gradient to all of its elements in equal shares, refuses a
//! kernel that differs from the stride, and has no padding; `tests/candle.rs` shows it. Of equal
//! maxima the first one gets the gradient; NaN wins over numbers, as in PyTorch.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::{Window, dims4};
use crate::Result;
use crate::element::{Element, dispatch, read, values};

/// Maximum of each window. Padding never wins.
///
/// # Shapes
/// - `x`: `(batch, channels, height, width)`
/// - returns `(batch, channels, height', width')` with
///   `height' = (height + 2·padding − kernel) / stride + 1`
///
/// # Errors
/// [`crate::Error::Option`] for a window out of range, [`crate::Error::Shape`] where it does not fit.
pub fn max_pool2d(x: &Tensor, window: Window) -> Result<Tensor> {
    let [batch, channels, height, width] = dims4("max_pool2d", x)?;
    let out = (
        window.output("max_pool2d", height)?,
        window.output("max_pool2d", width)?,
    );
    let op = MaxPool {
        window,
        input: (height, width),
        out,
        shape: Shape::from((batch, channels, out.0, out.1)),
        winners: OnceLock::new(),
    };
    Ok(x.contiguous()?.apply_op1(op)?)
}

struct MaxPool {
    window: Window,
    input: (usize, usize),
    out: (usize, usize),
    shape: Shape,
    /// For each output its place in the input plane.
    winners: OnceLock<Vec<u32>>,
}

impl MaxPool {
    fn forward<T: Element>(&self, x: &[T]) -> (Vec<T>, Vec<u32>) {
        let (plane, out_plane) = (self.input.0 * self.input.1, self.out.0 * self.out.1);
        let mut y = vec![T::ZERO; self.shape.elem_count()];
        let mut winners = vec![0u32; y.len()];
        y.par_chunks_exact_mut(out_plane)
            .zip(winners.par_chunks_exact_mut(out_plane))
            .zip(x.par_chunks_exact(plane))
            .for_each(|((y, winners), x)| {
                for oy in 0..self.out.0 {
                    let rows = self.window.range(oy, self.input.0);
                    for ox in 0..self.out.1 {
                        let columns = self.window.range(ox, self.input.1);
                        let mut winner = rows.start * self.input.1 + columns.start;
                        for row in rows.clone() {
                            for at in
                                row * self.input.1 + columns.start..row * self.input.1 + columns.end
                            {
                                // `v != v` holds for NaN alone.
                                #[allow(clippy::eq_op)]
                                if x[at] > x[winner] || x[at] != x[at] {
                                    winner = at;
                                }
                            }
                        }
                        y[oy * self.out.1 + ox] = x[winner];
                        winners[oy * self.out.1 + ox] = winner as u32;
                    }
                }
            });
        (y, winners)
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
        Ok((y, self.shape.clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Some(winners) = self.winners.get() else {
            candle_core::bail!("max_pool2d: backward before forward")
        };
        let dy = dy.contiguous()?;
        let dys = read(&dy);
        let (plane, out_plane) = (self.input.0 * self.input.1, self.out.0 * self.out.1);
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
