//! Time of eigen- and singular value decompositions beside the layer.
//!
//! All methods are timed in turn on the same matrices, so the first cell measures for the others
//! as well; they take their numbers from the cache.

use super::head::failed;
use super::layer::summary;
use crate::error::Result;
use crate::record::Measurement;
use crate::spec::{DecompositionSettings, Head, HeadName};
use isqrt_linalg::bench::{DecompositionRow, decompositions};
use std::time::Duration;

/// Time of a measurement, of which `repeats` give the quartiles.
const BUDGET: Duration = Duration::from_millis(100);

/// What was measured for some settings.
#[derive(Debug, Default)]
pub(super) struct Cache {
    known: Option<(DecompositionSettings, Vec<DecompositionRow>)>,
}

impl Cache {
    /// Milliseconds a matrix: one alone, and in a batch.
    pub(super) fn run(
        &mut self,
        head: &Head,
        settings: &DecompositionSettings,
    ) -> Result<Vec<Measurement>> {
        let rows = match &self.known {
            Some((known, rows)) if known == settings => rows,
            _ => {
                let mut rows = Vec::new();
                for _ in 0..settings.repeats.max(3) {
                    let batches = [1, settings.batch];
                    rows.extend(decompositions(settings.dim, &batches, BUDGET).map_err(failed)?);
                }
                &self.known.insert((settings.clone(), rows)).1
            }
        };
        let method = match head.name {
            HeadName::Eig => "eig",
            HeadName::Svd => "svd",
            HeadName::Isqrt if head.iterations == Some(5) => "isqrt N=5",
            _ => {
                return Err(failed(
                    "decompositions are timed beside `isqrt` with 5 iterations only",
                ));
            }
        };
        let times = |batch: usize| -> Vec<f64> {
            rows.iter()
                .filter(|r| r.method == method && r.batch == batch)
                .map(|r| r.ms / batch as f64)
                .collect()
        };
        Ok(vec![
            summary("single_ms", times(1), "ms"),
            summary("batch_ms", times(settings.batch), "ms/matrix"),
        ])
    }
}
