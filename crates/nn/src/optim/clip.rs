//! Gradient clipping. Gradients of several tensors may share their memory, so they are replaced,
//! not changed in place.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, WithDType};
use rayon::prelude::*;

use super::check;
#[cfg(feature = "cuda")]
use crate::cuda::optim::Table;
use crate::element::{Element, dispatch, read};
use crate::{Error, Result, Vars};

/// Values that one task works through.
const BLOCK: usize = 1 << 14;

/// Scales the gradients of all parameters so that together their norm is at most `max_norm`, and
/// returns the norm before (PyTorch's `clip_grad_norm_`).
///
/// # Errors
/// [`Error::Option`] for a `max_norm` that is not positive; [`Error::NonFinite`] with the first
/// parameter whose gradient is not finite, and then nothing changes.
pub fn clip_grad_norm(vars: &Vars, gradients: &mut GradStore, max_norm: f64) -> Result<f64> {
    check(max_norm > 0.0, "max_norm", max_norm, "above 0")?;
    let norm = norm_of("clip_grad_norm", vars, gradients)?;
    // PyTorch's, whose 1e-6 keeps a norm of 0 harmless.
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        replace(vars, gradients, (factor, f64::INFINITY))?;
    }
    Ok(norm)
}

/// Norm of the gradients of all parameters together, which stay as they are: in f64, the same for any
/// number of threads.
///
/// # Errors
/// [`Error::NonFinite`] with the first parameter whose gradient is not finite.
pub fn grad_norm(vars: &Vars, gradients: &GradStore) -> Result<f64> {
    norm_of("grad_norm", vars, gradients)
}

/// Sum of the squares of each parameter's gradient, sorted by name, of those parameters that have one.
///
/// # Errors
/// As [`grad_norm`].
pub fn grad_squares<'a>(vars: &'a Vars, gradients: &GradStore) -> Result<Vec<(&'a str, f64)>> {
    squares_of("grad_squares", vars, gradients)
}

fn norm_of(op: &'static str, vars: &Vars, gradients: &GradStore) -> Result<f64> {
    let squares = squares_of(op, vars, gradients)?;
    Ok(squares.iter().map(|(_, sum)| sum).sum::<f64>().sqrt())
}

fn squares_of<'a>(
    op: &'static str,
    vars: &'a Vars,
    gradients: &GradStore,
) -> Result<Vec<(&'a str, f64)>> {
    let given = vars.parameters().filter_map(|(name, parameter)| {
        let gradient = gradients.get(parameter.as_tensor())?;
        Some((name, gradient))
    });
    let given: Vec<(&str, &Tensor)> = given.collect();
    let mut squares = Vec::with_capacity(given.len());
    for (name, sum) in sums_of_squares(op, &given)? {
        if !sum.is_finite() {
            let name = name.to_owned();
            return Err(Error::NonFinite { op, name });
        }
        squares.push((name, sum));
    }
    Ok(squares)
}

/// Limits each value of the gradients to `[−value, value]` (PyTorch's `clip_grad_value_`). NaN
/// stays.
///
/// # Errors
/// [`Error::Option`] for a `value` that is not positive.
pub fn clip_grad_value(vars: &Vars, gradients: &mut GradStore, value: f64) -> Result<()> {
    check(value > 0.0, "clip value", value, "above 0")?;
    replace(vars, gradients, (1.0, value))
}

/// The sum of squares of each gradient; from a GPU all come at once.
fn sums_of_squares<'a>(
    op: &'static str,
    gradients: &[(&'a str, &Tensor)],
) -> Result<Vec<(&'a str, f64)>> {
    let names = gradients.iter().map(|&(name, _)| name);
    #[cfg(feature = "cuda")]
    if let Some(mut table) = gradients
        .first()
        .and_then(|(_, first)| Table::new(op, first))
    {
        for (_, gradient) in gradients {
            table.push([*gradient], [])?;
        }
        return Ok(names.zip(table.squares()?).collect());
    }
    let sums = gradients
        .iter()
        .map(|(_, gradient)| sum_of_squares(op, gradient));
    Ok(names.zip(sums.collect::<Result<Vec<f64>>>()?).collect())
}

/// In f64; blocks of fixed length, added up in order.
fn sum_of_squares(op: &'static str, gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.contiguous()?;
    let held = read(&gradient);
    let sum = dispatch!(op, gradient.dtype(), T => {
        let blocks = held.values::<T>()?.par_chunks(BLOCK);
        let sums: Vec<f64> = blocks
            .map(|block| block.iter().map(|v| v.to_f64() * v.to_f64()).sum())
            .collect();
        Ok::<f64, candle_core::Error>(sums.iter().sum())
    })?;
    Ok(sum)
}

/// [`clip_grad_norm`] without waiting for the GPU; norm and factor go to the ledger, see
/// `images.cu`.
#[cfg(feature = "cuda")]
pub(crate) fn clip_on_gpu(
    vars: &Vars,
    gradients: &mut GradStore,
    max_norm: f64,
    ledger: &Tensor,
) -> Result<()> {
    check(max_norm > 0.0, "max_norm", max_norm, "above 0")?;
    let op = "clip_grad_norm";
    let given = vars.parameters().filter_map(|(_, parameter)| {
        let gradient = gradients.get(parameter.as_tensor())?;
        Some((parameter.as_tensor(), gradient.clone()))
    });
    let given: Vec<(&Tensor, Tensor)> = given.collect();
    let Some(first) = given.first() else {
        return Ok(());
    };
    let (Some(mut squares), Some(mut scaled)) =
        (Table::new(op, &first.1), Table::new(op, &first.1))
    else {
        return Ok(());
    };
    for (_, gradient) in &given {
        squares.push([gradient], [])?;
    }
    let at = isqrt_device::cuda::address::<f64>(ledger)?;
    squares.limit_norm(at, max_norm)?;
    if max_norm.is_infinite() {
        return Ok(());
    }
    for (parameter, gradient) in &given {
        // SAFETY: written by the launch below, before anybody reads.
        let to = unsafe { gradient.empty_like()? };
        scaled.push([gradient, &to], [])?;
        gradients.insert(parameter, to);
    }
    // The fifth of the ledger.
    scaled.scale(at + 4 * size_of::<f64>() as u64)?;
    Ok(())
}

/// Each gradient times a factor, then between `-limit` and `limit`.
fn replace(vars: &Vars, gradients: &mut GradStore, (factor, limit): (f64, f64)) -> Result<()> {
    #[cfg(feature = "cuda")]
    let mut table: Option<Table> = None;
    for (_, parameter) in vars.parameters() {
        let Some(gradient) = gradients.get(parameter.as_tensor()) else {
            continue;
        };
        let gradient = gradient.contiguous()?;
        #[cfg(feature = "cuda")]
        if gradient.device().is_cuda() {
            if table.is_none() {
                table = Table::new("gradient clipping", &gradient);
            }
            if let Some(table) = &mut table {
                // SAFETY: written by the launch below, before anybody reads.
                let replaced = unsafe { gradient.empty_like()? };
                table.push([&gradient, &replaced], [])?;
                gradients.insert(parameter.as_tensor(), replaced);
            }
            continue;
        }
        let update = |v: f64| (v * factor).clamp(-limit, limit);
        let replaced = dispatch!("gradient clipping", gradient.dtype(), T => {
            updated::<T>(&gradient, &update)
        })?;
        gradients.insert(parameter.as_tensor(), replaced);
    }
    #[cfg(feature = "cuda")]
    if let Some(table) = table {
        table.clip(factor, limit)?;
    }
    Ok(())
}

fn updated<T: Element>(
    gradient: &Tensor,
    update: &(impl Fn(f64) -> f64 + Sync),
) -> candle_core::Result<Tensor> {
    let held = read(gradient);
    let values = held.values::<T>()?.par_iter().with_min_len(BLOCK);
    let values: Vec<T> = values.map(|v| T::from_f64(update(v.to_f64()))).collect();
    Tensor::from_vec(values, gradient.shape(), gradient.device())
}
