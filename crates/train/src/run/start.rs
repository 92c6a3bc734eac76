//! The weights that a run begins with.

use std::path::PathBuf;

use isqrt_models::Network;
use isqrt_models::checkpoint::{self, LoadOptions, Report, Triangle};

use crate::spec::TriangleOrder;
use crate::{Result, SpecFile};

impl From<TriangleOrder> for Triangle {
    fn from(order: TriangleOrder) -> Self {
        match order {
            TriangleOrder::Upper => Self::Upper,
            TriangleOrder::Lower => Self::Lower,
        }
    }
}

/// The weights that a run begins with.
#[derive(Debug)]
pub struct Start {
    /// Their file.
    pub path: PathBuf,
    /// What was taken.
    pub report: Report,
}

impl std::fmt::Display for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "starting from {}: {} tensors taken, {} of the network's stay at their initial values",
            self.path.display(),
            self.report.taken,
            self.left()
        )
    }
}

impl Start {
    /// Tensors of the network that the file does not have.
    pub(super) fn left(&self) -> usize {
        self.report.missing.len() + self.report.misshapen.len()
    }
}

/// Gives a network the weights that the spec begins with, if it names some.
///
/// # Errors
/// [`Error::Spec`](crate::Error::Spec) where they are not there or are of another network: have less than half of its tensors;
/// as [`checkpoint::load`].
pub fn start_from(file: &SpecFile, network: &mut Network) -> Result<Option<Start>> {
    let Some((start, path)) = file.spec.start.as_ref().zip(file.start_weights()?) else {
        return Ok(None);
    };
    let options = LoadOptions {
        partial: start.partial,
        triangle: start.triangle.map(Into::into),
    };
    let report = checkpoint::load(network, &path, &options)?;
    let start = Start { path, report };
    let (taken, left) = (start.report.taken, start.left());
    if taken < left {
        return Err(file.problem(
            "start.weights",
            &format!(
                "is {}, which has {taken} of the network's {} tensors: it is of another network",
                start.path.display(),
                taken + left
            ),
        ));
    }
    Ok(Some(start))
}
