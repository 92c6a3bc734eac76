//! From the head of an experiment to the layer of `isqrt-linalg`.

use crate::error::{Error, Result};
use crate::spec::{Head, HeadName, Minimax};
use candle_core::Tensor;
use isqrt_linalg::eig::MpnCov;
use isqrt_linalg::{CovPool, Schedule};

/// A pooling layer that can be timed.
pub(super) enum Layer {
    /// Covariance, with or without an iterated root.
    Pool(CovPool),
    /// Exact root by eigendecomposition.
    Mpn(MpnCov),
}

impl Layer {
    /// The layer of a head.
    ///
    /// # Errors
    /// [`Error::Cell`] for a head that is no covariance layer.
    pub(super) fn new(head: &Head) -> Result<Self> {
        match head.name {
            HeadName::Cov => Ok(Self::Pool(CovPool::plain())),
            HeadName::Isqrt => Ok(Self::Pool(CovPool::with_schedule(schedule(head)?))),
            HeadName::Mpn => Ok(Self::Mpn(MpnCov::default())),
            HeadName::Gap | HeadName::Eig | HeadName::Svd => Err(failed(
                "only the covariance layers `cov`, `isqrt` and `mpn` can be timed",
            )),
        }
    }

    /// Features to representation.
    ///
    /// # Errors
    /// [`Error::Cell`] with the layer's message.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Pool(pool) => pool.forward(x),
            Self::Mpn(mpn) => mpn.forward(x),
        }
        .map_err(failed)
    }
}

/// The schedule of an `isqrt` head.
///
/// # Errors
/// [`Error::Cell`] where it has none.
pub(super) fn schedule(head: &Head) -> Result<Schedule> {
    let steps = head.steps.unwrap_or(0);
    let lower = head.lower.unwrap_or(0.0);
    match (head.iterations, head.schedule) {
        (Some(iterations), None) => Ok(Schedule::NewtonSchulz { iterations }),
        (None, Some(Minimax::Cubic)) => Ok(Schedule::Cubic { steps, lower }),
        (None, Some(Minimax::Quintic)) => Ok(Schedule::Quintic { steps, lower }),
        (None, Some(Minimax::Nonic)) => Ok(Schedule::Nonic { steps, lower }),
        _ => Err(failed(
            "head `isqrt` needs either `iterations` or `schedule`",
        )),
    }
}

/// An error of the layer as an error of a cell.
pub(super) fn failed(message: impl std::fmt::Display) -> Error {
    Error::Cell {
        cell: "layer".to_owned(),
        message: message.to_string(),
    }
}
