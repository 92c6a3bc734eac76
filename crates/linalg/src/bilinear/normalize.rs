//! Signed square root and l2 normalisation of vectors, which end bilinear pooling.

use crate::layer::{Layered, values};
use crate::reference::Number;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor};
use rayon::prelude::*;

/// What is added below the root, as in `BCNN.py` and `CBP.py` of jiangtaoxie/fast-MPN-COV.
pub const ROOT_EPSILON: f64 = 1e-8;

/// `y = sign(x) √(|x| + ε)`, then `y / ‖y‖`, of each vector along the last dimension, with
/// `ε = 1e-8` ([`ROOT_EPSILON`]).
///
/// At `x = 0` the root jumps from `-√ε` to `√ε` (1e-4); there the value and the gradient are 0, as
/// PyTorch has them. Elsewhere the derivative is at most `1/(2√ε)`, before the division by `‖y‖`. A vector
/// of zeros stays zeros.
///
/// # Shapes
/// `(batch, n)` to `(batch, n)`, f32 or f64; those of a GPU go through the CPU.
///
/// # Errors
/// [`Error::Dtype`].
pub fn normalize(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(normalize(&x.to_device(&Device::Cpu)?)?.to_device(x.device())?);
    }
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.contiguous()?.apply_op1(Normalize)?),
        other => Err(Error::Dtype {
            dtype: other.as_str(),
        }),
    }
}

struct Normalize;

fn root<T: Number>(x: T) -> T {
    let (zero, epsilon) = (T::nearest(0.0), T::nearest(ROOT_EPSILON));
    if x > zero {
        (x + epsilon).root()
    } else if x < zero {
        -(epsilon - x).root()
    } else {
        // Zero, or not a number.
        x
    }
}

fn norm<T: Number>(y: impl Iterator<Item = T>) -> f64 {
    y.map(|y| y.widened() * y.widened()).sum::<f64>().sqrt()
}

fn forward<T: Number>(x: &[T], n: usize) -> Vec<T> {
    let row = |x: &[T]| -> Vec<T> {
        let y: Vec<T> = x.iter().map(|&x| root(x)).collect();
        match norm(y.iter().copied()) {
            0.0 => y,
            norm => y.iter().map(|y| T::nearest(y.widened() / norm)).collect(),
        }
    };
    x.par_chunks_exact(n).flat_map_iter(row).collect()
}

/// Of `z = y/‖y‖`: `dy = (dz - z⟨z, dz⟩)/‖y‖`, and `dx = dy / (2|y|)`.
fn backward<T: Number>(x: &[T], z: &[T], dz: &[T], n: usize) -> Vec<T> {
    let row = |((x, z), dz): ((&[T], &[T]), &[T])| -> Vec<T> {
        let norm = norm(x.iter().map(|&x| root(x)));
        let along: f64 = z
            .iter()
            .zip(dz)
            .map(|(z, g)| z.widened() * g.widened())
            .sum();
        let terms = x.iter().zip(z).zip(dz);
        terms
            .map(|((&x, z), dz)| {
                let y = root(x).widened().abs();
                match y == 0.0 {
                    true => T::nearest(0.0),
                    false => T::nearest((dz.widened() - z.widened() * along) / (norm * 2.0 * y)),
                }
            })
            .collect()
    };
    x.par_chunks_exact(n)
        .zip(z.par_chunks_exact(n))
        .zip(dz.par_chunks_exact(n))
        .flat_map_iter(row)
        .collect()
}

impl CustomOp1 for Normalize {
    fn name(&self) -> &'static str {
        "bilinear-normalization"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        l: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let n = last(l.shape());
        let out = match storage {
            CpuStorage::F32(_) => f32::storage(forward(values::<f32>(storage, l)?, n)),
            _ => f64::storage(forward(values::<f64>(storage, l)?, n)),
        };
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, z: &Tensor, dz: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = match x.dtype() {
            DType::F32 => gradient::<f32>(x, z, dz)?,
            _ => gradient::<f64>(x, z, dz)?,
        };
        Ok(Some(dx))
    }
}

fn last(shape: &Shape) -> usize {
    shape.dims().last().copied().unwrap_or(1).max(1)
}

fn gradient<T: Number + Layered + candle_core::WithDType>(
    x: &Tensor,
    z: &Tensor,
    dz: &Tensor,
) -> candle_core::Result<Tensor> {
    let (x, dz) = (x.contiguous()?, dz.contiguous()?);
    let (xs, x_layout) = x.storage_and_layout();
    let (zs, z_layout) = z.storage_and_layout();
    let (gs, g_layout) = dz.storage_and_layout();
    let (Storage::Cpu(xs), Storage::Cpu(zs), Storage::Cpu(gs)) = (&*xs, &*zs, &*gs) else {
        return Err(Error::Device.into());
    };
    let (xs, zs) = (values::<T>(xs, x_layout)?, values::<T>(zs, z_layout)?);
    let dx = backward(xs, zs, values::<T>(gs, g_layout)?, last(x.shape()));
    Tensor::from_vec(dx, x.shape(), x.device())
}
