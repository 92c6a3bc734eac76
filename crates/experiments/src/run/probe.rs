//! A layer run once on made features in either precision, with the gradient of a fixed linear function of
//! its output.

use super::head::{Layer, failed};
use crate::error::Result;
use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::bench::synthetic_features;
use isqrt_models::RepresentationSpec;

/// Output `(B, out)` and gradient `(B, d, M)`, in double precision.
pub(super) struct Probe {
    pub(super) output: Tensor,
    pub(super) gradient: Tensor,
}

/// Features `(B, d, M)` of the layer's size.
pub(super) fn features(shape: [usize; 3]) -> Result<Tensor> {
    let [batch, dim, positions] = shape;
    synthetic_features(batch, dim, positions)
        .and_then(|x| Ok(x.to_dtype(DType::F64)?))
        .map_err(failed)
}

/// Runs the layer in a precision on features in double precision.
pub(super) fn probe(head: &RepresentationSpec, x: &Tensor, dtype: DType) -> Result<Probe> {
    let layer = Layer::new(head, x.dim(1).map_err(failed)?, dtype, &Device::Cpu)?;
    let x = Var::from_tensor(&x.to_dtype(dtype).map_err(failed)?).map_err(failed)?;
    let output = layer.forward(&x)?;
    let loss = weigh(&output)?;
    let mut gradients = loss.backward().map_err(failed)?;
    let gradient = gradients
        .remove(&x)
        .ok_or_else(|| failed("the layer gives no gradient"))?;
    Ok(Probe {
        output: output.to_dtype(DType::F64).map_err(failed)?,
        gradient: gradient.to_dtype(DType::F64).map_err(failed)?,
    })
}

/// A linear function of the output with weights between -1 and 1 that follow no pattern of it.
pub(super) fn weigh(output: &Tensor) -> Result<Tensor> {
    let (batch, width) = output.dims2().map_err(failed)?;
    let weights: Vec<f64> = (0..batch * width)
        .map(|i| ((i * 31 + i / 7 * 17) % 23) as f64 / 11.0 - 1.0)
        .collect();
    let weights = Tensor::from_vec(weights, (batch, width), output.device());
    weights
        .and_then(|w| output.mul(&w.to_dtype(output.dtype())?)?.sum_all())
        .map_err(failed)
}

/// Norm of the difference over that of the second.
pub(super) fn relative(found: &Tensor, known: &Tensor) -> Result<f64> {
    let norm = |x: &Tensor| -> candle_core::Result<f64> { x.sqr()?.sum_all()?.sqrt()?.to_scalar() };
    let difference = (found - known).and_then(|x| norm(&x)).map_err(failed)?;
    Ok(difference / norm(known).map_err(failed)?)
}
