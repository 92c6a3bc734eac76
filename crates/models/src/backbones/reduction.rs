//! The 1x1 convolution that brings the channels down for covariance heads, with the names of the
//! authors' released weights (`layer_reduce`, `layer_reduce_bn`).

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{Activation, is_blocked, unblock};
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use crate::{Error, Options, Result};

/// The keys in a spec of backbones with no others.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Keys {
    pub last_stride: usize,
    pub reduction: Option<usize>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            last_stride: 2,
            reduction: None,
        }
    }
}

/// What covariance heads need of backbones for images of 224 pixels: more positions, 256 channels.
pub(super) fn finer() -> Options {
    let mut options = Options::default();
    options.set("last_stride", 1);
    options.set("reduction", 256);
    options
}

/// Channels beyond any use, whose weights still fit into memory.
const MOST: usize = 1 << 16;

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
    if !(1..=MOST).contains(&reduced) {
        return Err(Error::Options {
            name: name.to_owned(),
            message: format!("reduction needs at least 1 channel and at most {MOST}"),
        });
    }
    let (names, shape) = (("layer_reduce", "layer_reduce_bn"), (channels, reduced));
    let layer = ConvNorm::new(scope, names, shape, 1, 1, Activation::Relu)?;
    Ok((Some(layer), reduced))
}

/// Maps in either layout through the reduction, if there is one, to plain ones.
pub(super) fn leave_blocks(x: &Tensor, reduce: Option<&ConvNorm>, mode: Mode) -> Result<Tensor> {
    let x = match reduce {
        Some(reduce) => reduce.forward_in_any_layout(x, mode)?,
        None => x.clone(),
    };
    match is_blocked(&x) {
        true => Ok(unblock(&x)?),
        false => Ok(x),
    }
}

/// Checks a stride that is an option of the backbone `name`.
pub(super) fn check_stride(name: &str, key: &str, stride: usize) -> Result<()> {
    if (1..=2).contains(&stride) {
        return Ok(());
    }
    Err(Error::Options {
        name: name.to_owned(),
        message: format!("{key} must be 1 or 2"),
    })
}
