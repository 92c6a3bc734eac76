//! What can go wrong in this crate.

/// Errors of ops, parameters and optimisers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that do not fit an op or each other.
    #[error("{op}: {message}")]
    Shape {
        /// Name of the op.
        op: &'static str,
        /// The shapes found and what was expected.
        message: String,
    },
    /// An option of an op, optimiser or schedule that is out of range.
    #[error("{what} = {value} is out of range: {expected}")]
    Option {
        /// Name of the option.
        what: &'static str,
        /// The value given.
        value: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// Two parameters or buffers of one name.
    #[error("a parameter or buffer called {0:?} exists already: give each layer its own scope")]
    Duplicate(String),
    /// State of an optimiser or a layer that does not fit, or is not there yet.
    #[error("{what}: {message}")]
    State {
        /// Whose state.
        what: &'static str,
        /// What does not fit.
        message: String,
    },
    /// A gradient that is infinite or not a number.
    #[error("{op}: the gradient of {name:?} is not finite")]
    NonFinite {
        /// Name of the op.
        op: &'static str,
        /// Name of the parameter.
        name: String,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

pub(crate) fn shape_error<T>(op: &'static str, message: String) -> Result<T> {
    Err(Error::Shape { op, message })
}
