//! Training a small network.

use super::{Data, Outcome, Tick};
use crate::error::{Error, Result};
use crate::plan::Training;

/// Trains and reports the error on the test part, or for a search on the validation part.
pub(super) fn run(
    _training: &Training,
    _seed: u64,
    _search: bool,
    _data: Option<&Data>,
    _tick: &mut Tick<'_>,
) -> Result<Outcome> {
    Err(Error::Unsupported(
        "training is not wired up yet".to_owned(),
    ))
}
