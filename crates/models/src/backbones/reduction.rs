//! The 1x1 convolution that brings the channels down for covariance heads, with the names of the
//! authors' released weights (`layer_reduce`, `layer_reduce_bn`).

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{can_block, unblock};
use isqrt_nn::{Mode, Scope};

use crate::{Error, Result};

/// The reduction of the backbone `name` from `channels` to `reduction` ones, if it is wanted, and
/// the channels after it.
pub(super) fn reduce(
    name: &str,
    scope: &mut Scope<'_>,
    channels: usize,
    reduction: Option<usize>,
) -> Result<(Option<ConvNorm>, usize)> {
    let Some(reduced) = reduction else {
        return Ok((None, channels));
    };
    if reduced == 0 {
        return Err(Error::Options {
            name: name.to_owned(),
            message: "reduction needs at least 1 channel".to_owned(),
        });
    }
    let (names, shape) = (("layer_reduce", "layer_reduce_bn"), (channels, reduced));
    let layer = ConvNorm::new(scope, names, shape, 1, 1, true)?;
    Ok((Some(layer), reduced))
}

/// Blocked maps through the reduction, if there is one, to plain ones.
pub(super) fn leave_blocks(x: &Tensor, reduce: Option<&ConvNorm>, mode: Mode) -> Result<Tensor> {
    match reduce {
        Some(reduce) if can_block(reduce.outputs(), x.dtype()) => {
            Ok(unblock(&reduce.forward(x, mode)?)?)
        }
        Some(reduce) => Ok(reduce.forward(&unblock(x)?, mode)?),
        None => Ok(unblock(x)?),
    }
}
