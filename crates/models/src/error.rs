//! What can go wrong in this crate.

use std::path::PathBuf;

use crate::names::{hint, nearest};

/// Errors of building and running networks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that is not in a registry.
    #[error(
        "there is no {what} called {name:?}{}; known are {known}",
        unknown_hint(name, known)
    )]
    Unknown {
        /// "backbone" or "representation".
        what: &'static str,
        /// The name given.
        name: String,
        /// The names in the registry.
        known: String,
    },
    /// Options that a backbone or a representation does not take.
    #[error("options of {name:?}: {message}")]
    Options {
        /// Name of the backbone or representation.
        name: String,
        /// What is wrong with them.
        message: String,
    },
    /// A pooling head where a network was asked for.
    #[error("{0:?} is a pooling head: name a backbone with it, `resnet50+{0}` for example")]
    HeadAlone(String),
    /// A classifier needs classes.
    #[error("a network needs at least 1 class, got 0")]
    Classes,
    /// A checkpoint that cannot be read, written, or does not fit the network.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An image that a network is not described for.
    #[error("images of 1 to {largest} pixels a side can be described, got {size}")]
    ImageSize {
        /// The side asked for.
        size: usize,
        /// The largest one.
        largest: usize,
    },
    /// A covariance of a single position.
    #[error(
        "{head} pools a covariance, and over the 1 position that {backbone} leaves of such images it is zero \
         whatever they show: take larger images, last_stride = 1 where the backbone has it, a backbone that \
         reduces them less, or the head gap"
    )]
    OnePosition {
        /// Name of the representation.
        head: String,
        /// Name of the backbone.
        backbone: String,
    },
    /// An error of a training op or of parameters.
    #[error(transparent)]
    Nn(#[from] isqrt_nn::Error),
    /// An error of covariance pooling.
    #[error(transparent)]
    Linalg(#[from] isqrt_linalg::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// What an unknown name may have meant: one that is known, or two names in one.
fn unknown_hint(name: &str, known: &str) -> String {
    match name.split_once('+') {
        Some((backbone, head)) if known.split(", ").any(|known| known == backbone) => {
            format!(": backbone and representation are named apart, {backbone:?} and {head:?}")
        }
        _ => hint(nearest(name, known.split(", ")).as_deref()),
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Nn(error) => error.into(),
            Error::Linalg(error) => error.into(),
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
