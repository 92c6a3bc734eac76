//! The error type of this crate.
//!
//! Every message is one line for a person: which path, what was wrong there, what was expected,
//! and what to do about it.

use std::path::{Path, PathBuf};

/// What can go wrong between a path on disk and a batch of pixels.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A folder or file is not laid out as a data set must be.
    #[error("{}: {problem}; expected {expected}", path.display())]
    Layout {
        /// Folder or file at fault.
        path: PathBuf,
        /// What was found.
        problem: String,
        /// What was expected there, and what to do.
        expected: String,
    },
    /// The operating system refused to read or write.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// Folder or file at fault.
        path: PathBuf,
        /// What was tried: "read the folder", "write the file", ...
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is not an image that this crate can read.
    #[error("{}: {problem}; expected a readable JPEG or PNG file: replace or remove it", path.display())]
    Decode {
        /// File at fault.
        path: PathBuf,
        /// What the decoder said.
        problem: String,
    },
    /// Images that must share one size do not.
    #[error(
        "{}: image is {}x{} but the set is {}x{} (width x height); expected one size for all: \
         choose a resize (short side and centre crop) or re-size the files",
        path.display(), found.0, found.1, expected.0, expected.1
    )]
    Size {
        /// File at fault.
        path: PathBuf,
        /// Its width and height.
        found: (usize, usize),
        /// Width and height of the set.
        expected: (usize, usize),
    },
    /// A setting makes no sense for this set.
    #[error("data settings: {0}")]
    Config(String),
    /// A thread of the loader panicked over an image.
    #[error("{name}: the loader failed on it ({problem}): please report this, with the file")]
    Worker {
        /// The image that it was at.
        name: String,
        /// What it said.
        problem: String,
    },
    /// The threads of the loader are gone.
    #[error("all threads of the loader have ended at {0}: please report this")]
    Lost(String),
    /// More images could not be read than the settings allow.
    #[error("{count} of {all} images could not be read, more than {most} %; the last one: {last}")]
    TooManyBroken {
        /// How many.
        count: usize,
        /// Of how many.
        all: usize,
        /// Share that the settings allow, in percent.
        most: f64,
        /// About the last one.
        last: Box<Error>,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn layout(
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Layout {
            path: path.into(),
            problem: problem.into(),
            expected: expected.into(),
        }
    }

    /// Whether a single image is at fault, which may be left out, and not the set or its settings.
    #[must_use]
    pub fn is_broken_image(&self) -> bool {
        matches!(self, Self::Decode { .. })
    }

    /// For `map_err`: remembers the path and what was tried.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}
