//! candle's own ops on the tape of a training step, each with a gradient check: the next release
//! of candle, or another device, is judged by [`check_all`].
//!
//! # Keeping the list
//! On the tape lies every `Tensor` method that a forward pass (of a backbone, a head, a loss) calls
//! on a tensor that a gradient flows through; what custom ops do inside their own passes does not.
//! Such a method gets an entry in [`OPS`] before it is used. Where its check fails, the op stays
//! out: `isqrt-nn` gets one in its place, and `crates/nn/tests/candle.rs` shows why.

use candle_core::{DType, Device, Result, Tensor};

use crate::{Gradcheck, gradcheck, uniform};

/// An op of candle and how it is checked.
#[derive(Debug, Clone, Copy)]
pub struct CandleOp {
    /// Name of the method.
    pub name: &'static str,
    /// Who relies on it.
    pub used_by: &'static str,
    /// Shape of the input, whose values are positive.
    pub shape: &'static [usize],
    /// The op, in an expression of one input.
    pub f: fn(&Tensor) -> Result<Tensor>,
}

impl CandleOp {
    /// Compares its gradient with central differences on this device, in f64.
    ///
    /// # Errors
    /// A message with the op's name and the worst element.
    pub fn check(&self, device: &Device) -> std::result::Result<(), String> {
        let told = |message: String| format!("{}: {message}", self.name);
        // Positive for roots and logarithms, apart from 0 by far more than a step.
        let x = uniform(self.shape, 0.5, 2.0, 3, DType::F64)
            .and_then(|x| x.to_device(device))
            .map_err(|e| told(e.to_string()))?;
        gradcheck(|x| (self.f)(&x[0]), &[x], Gradcheck::default()).map_err(told)
    }
}

/// Checks all of [`OPS`] on this device.
///
/// # Errors
/// The messages of all that fail, a line each.
pub fn check_all(device: &Device) -> std::result::Result<(), String> {
    let failed: Vec<String> = OPS.iter().filter_map(|op| op.check(device).err()).collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("\n")),
    }
}

const HEADS: &str = "heads and losses written in candle's ops";

const fn op(
    name: &'static str,
    used_by: &'static str,
    shape: &'static [usize],
    f: fn(&Tensor) -> Result<Tensor>,
) -> CandleOp {
    CandleOp {
        name,
        used_by,
        shape,
        f,
    }
}

/// The ops that training relies on.
pub const OPS: &[CandleOp] = &[
    // What moves values.
    op("contiguous", "every op", &[2, 3, 4], |x| {
        x.permute((2, 0, 1))?.contiguous()
    }),
    op("reshape", HEADS, &[2, 3, 4], |x| x.reshape((4, 6))),
    op("flatten_from", "covariance heads", &[2, 3, 4], |x| {
        x.flatten_from(1)
    }),
    op("stack", "conv_norm", &[3, 4], |x| {
        Tensor::stack(&[x, &x.sqr()?], 0)
    }),
    op("cat", HEADS, &[2, 3, 4], |x| {
        Tensor::cat(&[x, &x.sqr()?], 1)
    }),
    op("unsqueeze", HEADS, &[3, 4], |x| x.unsqueeze(1)),
    op("squeeze", HEADS, &[3, 1, 4], |x| x.squeeze(1)),
    op("transpose", HEADS, &[2, 3, 4], |x| x.transpose(1, 2)),
    op("permute", HEADS, &[2, 3, 4], |x| x.permute((2, 0, 1))),
    op("narrow", HEADS, &[2, 5, 3], |x| x.narrow(1, 1, 3)),
    op("index_select", HEADS, &[4, 3], |x| {
        // One row twice: its gradients add up.
        x.index_select(&Tensor::new(&[2u32, 0, 2], x.device())?, 0)
    }),
    op("copy", HEADS, &[3, 4], Tensor::copy),
    // Arithmetic of two tensors.
    op("add", "sums of losses", &[3, 4], |x| x + x.sqr()?),
    op("sub", HEADS, &[3, 4], |x| x - x.sqr()?),
    op("mul", "weighted losses", &[3, 4], |x| x * x.sqr()?),
    op("div", HEADS, &[3, 4], |x| x.sqr()? / (x + 1.0)?),
    // Shortcuts depend on it: a tensor that two nodes use gets the sum of both gradients.
    op("a shared tensor", "residual blocks", &[3, 4], |x| {
        let y = x.sqr()?;
        y.mul(&y)? + &y
    }),
    op("broadcast_add", HEADS, &[2, 3, 4], |x| {
        x.broadcast_add(&x.narrow(0, 0, 1)?.narrow(2, 0, 1)?)
    }),
    op("broadcast_sub", HEADS, &[2, 3, 4], |x| {
        x.broadcast_sub(&x.sum_keepdim(2)?)
    }),
    op("broadcast_mul", HEADS, &[2, 3, 4], |x| {
        x.broadcast_mul(&x.sum_keepdim(2)?)
    }),
    op("broadcast_div", HEADS, &[2, 3, 4], |x| {
        x.broadcast_div(&x.sum_keepdim(2)?)
    }),
    op("matmul", HEADS, &[2, 3, 4], |x| {
        x.matmul(&x.transpose(1, 2)?.contiguous()?)
    }),
    // Of one tensor.
    op("affine", HEADS, &[3, 4], |x| (x * 3.0)? - 1.0),
    op("neg", HEADS, &[3, 4], Tensor::neg),
    op("sqr", HEADS, &[3, 4], Tensor::sqr),
    op("sqrt", HEADS, &[3, 4], Tensor::sqrt),
    op("powf", HEADS, &[3, 4], |x| x.powf(1.0 / 3.0)),
    op("exp", HEADS, &[3, 4], Tensor::exp),
    op("log", HEADS, &[3, 4], Tensor::log),
    // Reductions.
    op("sum_all", "losses", &[3, 4], Tensor::sum_all),
    op("mean_all", "losses", &[3, 4], Tensor::mean_all),
    op("sum", HEADS, &[2, 3, 4], |x| x.sum(1)),
    op("mean", HEADS, &[2, 3, 4], |x| x.mean(2)),
    op("sum_keepdim", HEADS, &[2, 3, 4], |x| x.sum_keepdim(1)),
    op("mean_keepdim", HEADS, &[2, 3, 4], |x| x.mean_keepdim(2)),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = OPS.iter().map(|op| op.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), OPS.len());
    }

    #[test]
    fn a_wrong_op_is_named() {
        let pool = op("max_pool2d", "nobody", &[1, 1, 2, 2], |x| x.max_pool2d(2));
        let message = pool.check(&Device::Cpu).unwrap_err();
        assert!(message.starts_with("max_pool2d: gradient"), "{message}");
    }
}
