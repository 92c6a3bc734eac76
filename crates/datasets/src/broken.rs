//! What becomes of images that cannot be read.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What becomes of images that cannot be read or decoded.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Broken {
    /// The first one is an error.
    #[default]
    Fail,
    /// They are left out and listed; more of them than this share of the set (of a rank's part of it) are an error.
    Skip {
        /// Between 0 and 1.
        most: f64,
    },
}

/// An image that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its name in the set.
    pub name: String,
    /// Why.
    pub problem: String,
}

impl Broken {
    /// # Errors
    /// [`Error::Config`] for a share that is none.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Skip { most } if !(0.0..=1.0).contains(&most) => Err(Error::Config(format!(
                "a share of {most} broken images (0 to 1 is possible)"
            ))),
            _ => Ok(()),
        }
    }

    /// Why the image may be left out, the `count`-th of `all`.
    ///
    /// # Errors
    /// The error itself where it must not be, or [`Error::TooManyBroken`].
    pub(crate) fn leave_out(
        self,
        name: &str,
        error: Error,
        count: usize,
        all: usize,
    ) -> Result<String> {
        let Self::Skip { most } = self else {
            return Err(error);
        };
        // A disk that is gone or a mistake in the settings is no broken image.
        if !error.is_broken_image() {
            return Err(error);
        }
        if count as f64 > most * all as f64 {
            return Err(Error::TooManyBroken {
                count,
                all,
                most: most * 100.0,
                last: Box::new(error),
            });
        }
        let problem = error.to_string();
        tracing::debug!(image = name, problem, "left out");
        Ok(problem)
    }
}
