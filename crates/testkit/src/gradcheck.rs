//! Check of a gradient by central differences.
//!
//! The scalar `L(x) = Σ w·f(x)` with random weights `w` is differentiated twice: by candle's
//! backward pass, and as `Σ w·(f(x + h e_i) - f(x - h e_i)) / 2h` for every element `i`, in f64.

use candle_core::{DType, Result, Tensor, Var};

use crate::close::{Tolerance, compare, position};
use crate::random::randn;

/// How [`gradcheck`] works.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gradcheck {
    /// Step of the differences, times `max(1, |x|)`.
    pub step: f64,
    /// Tolerance relative to the largest gradient of the input (not to each element, whose
    /// difference quotient carries the rounding of the whole sum).
    pub rtol: f64,
    /// Absolute tolerance.
    pub atol: f64,
    /// Seed of the weights.
    pub seed: u64,
}

impl Default for Gradcheck {
    fn default() -> Self {
        Self {
            step: 1e-5,
            rtol: 1e-7,
            atol: 1e-9,
            seed: 0x6ad,
        }
    }
}

/// Checks the gradient of `f` with respect to each of `inputs` (f64).
///
/// Works on the inputs' device. `f` must be smooth within one step of the inputs: keep them away from kinks.
///
/// # Errors
/// A message that names the input and the worst element: no gradient where one is expected, a
/// gradient outside of the tolerance, an error of `f`, or inputs that are not f64.
pub fn gradcheck(
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    options: Gradcheck,
) -> std::result::Result<(), String> {
    for (i, input) in inputs.iter().enumerate() {
        if input.dtype() != DType::F64 {
            return Err(format!(
                "input {i} is {:?}: a gradient check needs F64",
                input.dtype()
            ));
        }
    }
    let text = |what: &str| {
        let what = what.to_owned();
        move |error: candle_core::Error| format!("{what}: {error}")
    };
    let variables: Vec<Var> = inputs
        .iter()
        .map(|x| x.copy().and_then(|x| Var::from_tensor(&x)))
        .collect::<Result<_>>()
        .map_err(text("inputs"))?;
    let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tracked).map_err(text("forward"))?;
    let weights = randn(out.shape(), options.seed, DType::F64)
        .and_then(|w| w.to_device(out.device()))
        .map_err(text("weights"))?;
    let gradients = (&out * &weights)
        .and_then(|l| l.sum_all())
        .and_then(|l| l.backward())
        .map_err(text("backward"))?;

    let weights = flat(&weights)?;
    let evaluate = |which: usize, values: Vec<f64>| -> std::result::Result<Vec<f64>, String> {
        let mut moved = inputs.to_vec();
        moved[which] = Tensor::from_vec(values, inputs[which].shape(), inputs[which].device())
            .map_err(text("inputs"))?;
        flat(&f(&moved).map_err(text("forward"))?)
    };
    for (which, variable) in variables.iter().enumerate() {
        let Some(analytic) = gradients.get(variable.as_tensor()) else {
            return Err(format!("input {which} got no gradient"));
        };
        if analytic.dims() != inputs[which].dims() {
            return Err(format!(
                "the gradient of input {which} has shape {:?}, the input {:?}",
                analytic.dims(),
                inputs[which].dims()
            ));
        }
        let analytic = flat(analytic)?;
        let values = flat(&inputs[which])?;
        let mut numeric = vec![0.0; values.len()];
        for i in 0..values.len() {
            let h = options.step * values[i].abs().max(1.0);
            let mut moved = values.clone();
            moved[i] = values[i] + h;
            let above = evaluate(which, moved.clone())?;
            let upper = moved[i];
            moved[i] = values[i] - h;
            let width = upper - moved[i];
            let below = evaluate(which, moved)?;
            let changes = above.iter().zip(&below).zip(&weights);
            numeric[i] = changes.map(|((a, b), w)| (a - b) * w).sum::<f64>() / width;
        }
        let largest = numeric.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let tolerance = Tolerance {
            rtol: 0.0,
            atol: options.atol + options.rtol * largest,
        };
        compare(&analytic, &numeric, tolerance).map_err(|message| {
            let worst = (0..values.len())
                .max_by(|&a, &b| {
                    let off = |i: usize| (analytic[i] - numeric[i]).abs();
                    off(a).total_cmp(&off(b))
                })
                .unwrap_or(0);
            format!(
                "gradient of input {which} (shape {:?}, largest {largest:e}) is wrong at {:?}: {message}",
                inputs[which].dims(),
                position(worst, inputs[which].dims()),
            )
        })?;
    }
    Ok(())
}

fn flat(tensor: &Tensor) -> std::result::Result<Vec<f64>, String> {
    tensor
        .flatten_all()
        .and_then(|t| t.to_vec1::<f64>())
        .map_err(|error| format!("values of a tensor of type {:?}: {error}", tensor.dtype()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_right_gradient_passes() {
        let x = randn((2, 3), 1, DType::F64).unwrap();
        let w = randn((3, 4), 2, DType::F64).unwrap();
        gradcheck(
            |t| t[0].matmul(&t[1])?.tanh(),
            &[x, w],
            Gradcheck::default(),
        )
        .unwrap();
    }

    #[test]
    fn a_wrong_gradient_is_found_and_named() {
        // candle's max_pool2d spreads the gradient over the window (1/4 each) instead of handing
        // it to the maximum: the reason why isqrt-nn has its own.
        let x = Tensor::new(&[[[[1.0f64, 2.0], [3.0, 4.0]]]], &Device::Cpu).unwrap();
        let message = gradcheck(|t| t[0].max_pool2d(2), &[x], Gradcheck::default()).unwrap_err();
        assert!(message.contains("input 0"), "{message}");
        assert!(message.contains("[0, 0, 1, 1]"), "{message}");
    }

    #[test]
    fn a_missing_gradient_is_found() {
        let x = randn(3, 1, DType::F64).unwrap();
        let message = gradcheck(|t| t[0].detach().sqr(), &[x], Gradcheck::default()).unwrap_err();
        assert!(
            message.contains("backward") || message.contains("no gradient"),
            "{message}"
        );
    }

    #[test]
    fn f32_is_refused() {
        let x = randn(3, 1, DType::F32).unwrap();
        assert!(gradcheck(|t| t[0].sqr(), &[x], Gradcheck::default()).is_err());
    }
}
