//! From the head of a row to a layer that can be run and timed alone.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use isqrt_models::{Representation, RepresentationSpec};
use isqrt_nn::{Mode, Vars};

/// A pooling head without a network.
pub(super) struct Layer {
    head: Box<dyn Representation>,
    /// Its parameters, if it has any.
    _vars: Vars,
}

impl Layer {
    /// The layer of a head for maps of so many channels.
    ///
    /// # Errors
    /// [`Error::Cell`] for a head that does not exist.
    pub(super) fn new(
        head: &RepresentationSpec,
        channels: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut vars = Vars::new(1, dtype, device);
        let built = head
            .entry()
            .and_then(|entry| entry.build(&head.options, channels, vars.root()));
        let head = built.map_err(failed)?;
        // Masks of dropout follow the step.
        vars.set_step(0);
        Ok(Self { head, _vars: vars })
    }

    /// Features `(B, d, M)` to representation.
    ///
    /// # Errors
    /// [`Error::Cell`] with the layer's message.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, positions) = x.dims3().map_err(failed)?;
        let maps = x.reshape((batch, channels, positions, 1)).map_err(failed)?;
        self.head.forward(&maps, Mode::Train).map_err(failed)
    }
}

/// An error of the layer as an error of a cell.
pub(super) fn failed(message: impl std::fmt::Display) -> Error {
    Error::Cell {
        cell: "layer".to_owned(),
        message: message.to_string(),
    }
}
