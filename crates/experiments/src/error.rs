//! The one error type of this crate. Each message is a single line for a person: what was wrong,
//! where, and what to do.

use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a TOML file and a report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key that no experiment has.
    #[error("{file}{}: unknown key `{key}`{}", line_of(*.line), hint(.nearest.as_deref()))]
    UnknownKey {
        /// File as named in `extends` or by the experiment's id.
        file: String,
        /// Line of the key, counted from 1.
        line: Option<usize>,
        /// The key as written.
        key: String,
        /// The known key closest to it.
        nearest: Option<String>,
    },
    /// A file that is no TOML, or a value of the wrong type.
    #[error("{file}{}: {message}", line_of(*.line))]
    Spec {
        /// File as named in `extends` or by the experiment's id.
        file: String,
        /// Line, counted from 1.
        line: Option<usize>,
        /// What is wrong with it.
        message: String,
    },
    /// An experiment id that does not exist.
    #[error("there is no experiment `{id}`{}; the experiments are {known}", hint(.nearest.as_deref()))]
    UnknownExperiment {
        /// The id asked for.
        id: String,
        /// The closest id.
        nearest: Option<String>,
        /// All ids, comma separated.
        known: String,
    },
    /// Reading or writing a file failed.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A second run in the same output folder.
    #[error("{} is in use by another run: wait for it, or give another folder with --out", .path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// A run folder without records.
    #[error("{} holds no run (no {missing}): give the folder that was passed as --out", .path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// The data set could not be used.
    #[error(transparent)]
    Data(#[from] isqrt_datasets::Error),
    /// A cell could not be run.
    #[error("{cell}: {message}")]
    Cell {
        /// Which cell.
        cell: String,
        /// Why, and what to do.
        message: String,
    },
    /// The request cannot be met by this build.
    #[error("{0}")]
    Unsupported(String),
    /// The page could not be rendered; a mistake in the template.
    #[error("cannot render the report: {0}")]
    Template(#[from] minijinja::Error),
    /// The progress observer asked to stop.
    #[error("stopped on request; run the same command again to go on")]
    Stopped,
}

impl Error {
    /// Wraps an I/O error with what was being done and where.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

fn line_of(line: Option<usize>) -> String {
    line.map(|l| format!(":{l}")).unwrap_or_default()
}

/// A question after a message, if there is a name to ask for.
pub fn hint(nearest: Option<&str>) -> String {
    nearest
        .map(|n| format!("; did you mean `{n}`?"))
        .unwrap_or_default()
}

/// The known name closest to `name`, if any is close at all.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k.to_owned())
}
