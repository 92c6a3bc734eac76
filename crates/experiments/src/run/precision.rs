//! How far single precision is from double, in a layer's output and in its gradient.

use super::probe::{features, probe, relative};
use crate::error::Result;
use crate::record::Measurement;
use crate::spec::LayerSettings;
use candle_core::DType;
use isqrt_models::RepresentationSpec;

/// Images that the distances are averaged over.
const IMAGES: usize = 4;

/// Relative distances over a few made feature maps.
pub(super) fn run(head: &RepresentationSpec, settings: &LayerSettings) -> Result<Vec<Measurement>> {
    let x = features([IMAGES, settings.dim, settings.positions])?;
    // What single precision makes of the features is no error of the layer.
    let x = x
        .to_dtype(DType::F32)
        .and_then(|x| x.to_dtype(DType::F64))
        .map_err(super::head::failed)?;
    let known = probe(head, &x, DType::F64)?;
    let errors = match probe(head, &x, DType::F32) {
        Ok(found) => [
            relative(&found.output, &known.output)?,
            relative(&found.gradient, &known.gradient)?,
        ],
        // What single precision does not bear is a result too: diverged.
        Err(error) => {
            tracing::warn!("{} in single precision: {error}", head.name);
            [f64::INFINITY; 2]
        }
    };
    let names = ["f32_error", "f32_gradient_error"];
    Ok(names
        .into_iter()
        .zip(errors)
        .map(|(name, error)| Measurement::new(name, error, "relative"))
        .collect())
}
