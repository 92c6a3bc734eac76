//! The 1x1 convolution that brings the channels down for covariance heads, with the names of the
//! authors' released weights (`layer_reduce`, `layer_reduce_bn`).

use isqrt_nn::Scope;
use isqrt_nn::layers::ConvNorm;

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
