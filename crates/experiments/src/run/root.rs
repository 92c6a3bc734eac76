//! Distance of an iterated root from the exact one, and of its gradient from the exact gradient.

use super::head::failed;
use crate::error::Result;
use crate::record::Measurement;
use crate::spec::{LayerSettings, schedule};
use isqrt_linalg::bench::{iterations, synthetic_features};
use isqrt_models::RepresentationSpec;
use std::time::Duration;

/// Images that the distances are averaged over.
const IMAGES: usize = 4;

/// Relative distances, mean over a few synthetic feature maps, and symmetric products of the
/// forward pass.
pub(super) fn run(head: &RepresentationSpec, settings: &LayerSettings) -> Result<Vec<Measurement>> {
    let features = synthetic_features(IMAGES, settings.dim, settings.positions).map_err(failed)?;
    let schedules: Vec<_> = schedule(head).map_err(failed)?.into_iter().collect();
    // The rows of the schedules, then that of the eigendecomposition: the first is the one wanted.
    let rows = iterations(&features, &schedules, Duration::ZERO).map_err(failed)?;
    let row = rows.first().ok_or_else(|| failed("nothing was measured"))?;
    Ok(vec![
        Measurement::new("root_error", row.root_error, "relative"),
        Measurement::new("gradient_error", row.gradient_error, "relative"),
        Measurement::new("products", row.products as f64, "symmetric products"),
    ])
}
