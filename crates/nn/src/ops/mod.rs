//! Differentiable ops on candle tensors, in f32 and f64, one file each.
//!
//! Each is a candle custom op with its own adjoint, parallel over the batch. Inputs may have any
//! strides; they are made contiguous first.

mod avg_pool;
mod batch_norm;
mod conv;
mod cross_entropy;
mod linear;
mod max_pool;
mod relu;

pub use avg_pool::{avg_pool2d, global_avg_pool};
pub use batch_norm::{BatchNorm, batch_norm};
pub use conv::{Conv, conv2d};
pub use cross_entropy::cross_entropy;
pub use linear::linear;
pub use max_pool::max_pool2d;
pub use relu::{add_relu, relu};

pub use crate::blocked::{block, can_block, conv_norm, is_blocked, unblock};
pub(crate) use batch_norm::{BatchNormOp, Line, check_affine, through};

use candle_core::Tensor;

use crate::error::shape_error;
use crate::{Error, Result};

/// The window of a pooling op, square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Side of the window.
    pub kernel: usize,
    /// Distance of windows.
    pub stride: usize,
    /// Rows and columns added on each side.
    pub padding: usize,
}

impl Window {
    /// The output's side for an input of this side, or an error that names the op.
    fn output(self, op: &'static str, side: usize) -> Result<usize> {
        let Self {
            kernel,
            stride,
            padding,
        } = self;
        let range = |what, value: usize, expected| {
            Err(Error::Option {
                what,
                value: value.to_string(),
                expected,
            })
        };
        if kernel == 0 {
            return range("pooling kernel", kernel, "at least 1");
        }
        if stride == 0 {
            return range("pooling stride", stride, "at least 1");
        }
        if padding > kernel / 2 {
            return range("pooling padding", padding, "at most half of the kernel");
        }
        if side + 2 * padding < kernel {
            return shape_error(
                op,
                format!("a window of {kernel} does not fit into {side} with padding {padding}"),
            );
        }
        Ok((side + 2 * padding - kernel) / stride + 1)
    }

    /// Rows (or columns) of the input that the window at `index` covers.
    fn range(self, index: usize, side: usize) -> std::ops::Range<usize> {
        let start = index * self.stride;
        let end = (start + self.kernel).saturating_sub(self.padding).min(side);
        start.saturating_sub(self.padding)..end
    }
}

pub(crate) fn dims4(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [b, c, h, w] if b > 0 && c > 0 && h > 0 && w > 0 => Ok([b, c, h, w]),
        ref other => shape_error(
            op,
            format!("expects (batch, channels, height, width), none of them 0, got {other:?}"),
        ),
    }
}
