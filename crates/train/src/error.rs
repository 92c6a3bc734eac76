//! What can go wrong in training.

/// Errors of the training engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting out of its range, or that does not fit the data.
    #[error("{what} = {value}: {expected}")]
    Config {
        /// Name of the setting.
        what: &'static str,
        /// The value given.
        value: String,
        /// What it has to be.
        expected: String,
    },
    /// The loss left the numbers.
    #[error(
        "the loss is {loss} at step {step} of epoch {epoch}: training diverged; a smaller learning \
         rate may help"
    )]
    NonFinite {
        /// From 1.
        epoch: usize,
        /// Step within the epoch, from 1.
        step: usize,
        /// NaN or infinite.
        loss: f32,
    },
    /// An error within a step.
    #[error("step {step} of epoch {epoch}: {source}")]
    Step {
        /// From 1.
        epoch: usize,
        /// Step within the epoch, from 1.
        step: usize,
        /// What failed.
        source: Box<Error>,
    },
    /// An error of the data.
    #[error(transparent)]
    Data(#[from] isqrt_datasets::Error),
    /// An error of the network.
    #[error(transparent)]
    Model(#[from] isqrt_models::Error),
    /// An error of an op or the optimiser.
    #[error(transparent)]
    Nn(#[from] isqrt_nn::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
