//! Differentiable ops on candle tensors, in f32 and f64, one file each.
//!
//! Each is a candle custom op with its own adjoint, parallel over the batch. Inputs may have any
//! strides; they are made contiguous first.

mod avg_pool;
mod batch_norm;
mod conv;
mod cross_entropy;
pub(crate) mod dropout;
mod linear;
mod local_response_norm;
mod max_pool;
mod relu;
mod shuffle;
mod window;

pub use avg_pool::{adaptive_avg_pool2d, avg_pool2d, global_avg_pool};
pub use batch_norm::{BatchNorm, batch_norm};
#[cfg(test)]
pub(crate) use conv::ConvOp;
pub(crate) use conv::{
    Axis as ConvAxis, Convolve, Shapes as ConvShapes, conv2d_of, into_blocks_of, out_of_blocks_of,
};
pub use conv::{Conv, conv2d, conv2d_into_blocks};
pub use cross_entropy::cross_entropy;
pub use dropout::{MaskKey, dropout};
pub use linear::linear;
pub(crate) use linear::linear_of;
pub use local_response_norm::{LocalResponseNorm, local_response_norm};
pub use max_pool::max_pool2d;
pub use relu::{Activation, add, add_relu, relu, relu6};
pub(crate) use relu::{Clip, backward as through_activation};
pub use shuffle::{channel_shuffle, shuffle_unit};
pub use window::{Pool, Window};

pub use crate::blocked::{block, can_block, conv_norm, is_blocked, unblock};
pub(crate) use batch_norm::{BatchNormOp, Line, check_affine};

use candle_core::Tensor;

use crate::Result;
use crate::error::shape_error;

pub(crate) fn dims4(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [b, c, h, w] if b > 0 && c > 0 && h > 0 && w > 0 => Ok([b, c, h, w]),
        ref other => shape_error(
            op,
            format!("expects (batch, channels, height, width), none of them 0, got {other:?}"),
        ),
    }
}
