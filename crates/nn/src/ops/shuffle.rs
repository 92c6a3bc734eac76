//! The channels of two maps in turns: what ends a unit of ShuffleNetV2.

use candle_core::Tensor;

use super::dims4;
use crate::Result;
use crate::error::shape_error;
use crate::record::note_op;

/// Concatenation of two maps and a channel shuffle in two groups (Zhang et al. 2018): channel `2c` is
/// channel `c` of the first, channel `2c + 1` that of the second. Two ops of candle.
///
/// # Shapes
/// `(batch, channels, height, width)` each, to `(batch, 2 channels, height, width)`; not blocked
///
/// # Errors
/// [`crate::Error::Shape`] where the shapes differ or are not of that form.
pub fn channel_shuffle(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let [batch, channels, height, width] = dims4("channel_shuffle", first)?;
    if first.dims() != second.dims() {
        let (first, second) = (first.dims(), second.dims());
        let message = format!("expects equal shapes, got {first:?} and {second:?}");
        return shape_error("channel_shuffle", message);
    }
    let pairs = Tensor::stack(&[first, second], 2)?;
    let y = pairs.reshape((batch, 2 * channels, height, width))?;
    note_op("channel_shuffle", &y);
    Ok(y)
}
