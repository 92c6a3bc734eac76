//! DropCov: in training, channels dropped at a rate that adapts to the features, then the plain
//! covariance; in evaluation the plain covariance (Wang, Gao, Zhang et al., *DropCov: A Simple yet
//! Effective Method for Improving Deep Architectures*, NeurIPS 2022).
//!
//! No options. As `acd/models/ResNet_ACD.py` and `eca_layer.py` of mingzeG/DropCov have it, for features
//! `X` of `d` channels in training:
//!
//! 1. Attention `y = softmax(w * mean X)`: a convolution with three taps `w` along the channels (the only
//!    parameter, `attention.weight`, zeros at the start), and `X ← X(1 + y)` channel by channel.
//! 2. Rate `p = 1 - 10/log₂d · ρ`, cut to `[0, 1]`, with `ρ` the mean over the batch of the cosine of `y` and
//!    the row sums of the covariance `Σ` of `X`. One number a pass, and no gradient flows through it.
//! 3. Each channel of each image is zero with probability `p` and divided by `1 - p` otherwise; then `Σ`,
//!    upper triangle.
//!
//! # Cost
//! Besides the plain covariance some `dM` operations. No matrix waits for the backward pass, only the
//! features before and after the two steps.
//!
//! # Known troubles
//! - `p` depends on the whole batch: an image's gradient depends on its companions.
//! - `p = 1` (features at right angles to their attention) drops everything: zeros and zero
//!   gradients for this pass.
//! - Attention scales features in training alone. Its `y` sum to 1, so each is of the order of `1/d`.

use candle_core::{D, DType, Tensor};
use isqrt_linalg::CovPool;
use isqrt_nn::layers::ChannelDropout;
use isqrt_nn::ops::{Conv, conv2d, global_avg_pool};
use isqrt_nn::{Init, Mode, Scope};

use super::{NoOptions, Options, Representation, RepresentationEntry};
use crate::Result;

pub(super) const DROPCOV: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "dropcov"
    }

    fn about(&self) -> &'static str {
        "plain covariance of channels that training drops at an adaptive rate (DropCov)"
    }

    fn second_order(&self) -> bool {
        true
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        mut scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        options.read::<NoOptions>(self.name())?;
        let mut attention = scope.sub("attention");
        Ok(Box::new(DropCov {
            taps: attention.parameter("weight", &[1, 1, TAPS], Init::Constant(0.0))?,
            dropout: ChannelDropout::new(scope.sub("dropout"))?,
            pool: CovPool::plain(),
            channels,
        }))
    }
}

const TAPS: usize = 3;

struct DropCov {
    taps: Tensor,
    dropout: ChannelDropout,
    pool: CovPool,
    channels: usize,
}

impl DropCov {
    /// Scaled features, and the attention `(batch, d)` that scales them.
    fn attend(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mean = global_avg_pool(x)?;
        let (batch, d) = mean.dims2()?;
        let along = Conv {
            padding: (0, TAPS / 2),
            ..Conv::default()
        };
        let row = mean.reshape((batch, 1, 1, d))?;
        let y = conv2d(&row, &self.taps.unsqueeze(0)?, None, along)?.reshape((batch, d))?;
        // Less the largest, for which the softmax is the same, so that nothing overflows.
        let powers = y.broadcast_sub(&y.max_keepdim(1)?.detach())?.exp()?;
        let y = powers.broadcast_div(&powers.sum_keepdim(1)?)?;
        let x = x.broadcast_mul(&(&y + 1.0)?.reshape((batch, d, 1, 1))?)?;
        Ok((x, y))
    }
}

/// The share of channels to drop, from features and attention without gradients.
fn rate(x: &Tensor, attention: &Tensor) -> Result<f64> {
    let x = x.flatten_from(2)?.to_dtype(DType::F64)?;
    let y = attention.to_dtype(DType::F64)?;
    let x = x.broadcast_sub(&x.mean_keepdim(2)?)?;
    // Row sums of XXᵀ/M: X(Xᵀ1)/M.
    let rows = x.broadcast_mul(&x.sum_keepdim(1)?)?.mean(2)?;
    let norm = |v: &Tensor| v.sqr()?.sum(1)?.sqrt();
    let cosine = ((&y * &rows)?.sum(1)? / (norm(&y)? * norm(&rows)?)?)?;
    let channels = y.dim(D::Minus1)? as f64;
    let share = 1.0 - 10.0 / channels.log2() * cosine.mean_all()?.to_scalar::<f64>()?;
    // Constant features have no angle, and bad ones are for the covariance to name: nothing dropped.
    Ok(if share.is_nan() {
        0.0
    } else {
        share.clamp(0.0, 1.0)
    })
}

impl Representation for DropCov {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        if !mode.is_training() {
            return Ok(self.pool.forward(x)?);
        }
        let (x, attention) = self.attend(x)?;
        let p = rate(&x.detach(), &attention.detach())?;
        Ok(self.pool.forward(&self.dropout.forward(&x, p, mode)?)?)
    }

    fn out_dim(&self) -> usize {
        self.pool.out_dim(self.channels)
    }

    fn triangle(&self) -> Option<usize> {
        Some(self.channels)
    }

    fn is_centred(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;
    use isqrt_nn::Vars;
    use isqrt_testkit::{Golden, Gradcheck, assert_close, gradcheck, uniform};

    fn head(vars: &mut Vars, channels: usize, taps: &Tensor) -> DropCov {
        let mut root = vars.root();
        DropCov {
            taps: taps.clone(),
            dropout: ChannelDropout::new(root.sub("dropout")).unwrap(),
            pool: CovPool::plain(),
            channels,
        }
    }

    fn golden() -> Golden {
        Golden::load("tests/golden/dropcov").unwrap()
    }

    fn maps(golden: &Golden, name: &str) -> Tensor {
        golden[name].unsqueeze(2).unwrap()
    }

    #[test]
    fn attention_and_rate_are_those_of_pytorch() {
        let golden = golden();
        let taps = candle_core::Var::from_tensor(&golden["training.weight"]).unwrap();
        let x = candle_core::Var::from_tensor(&maps(&golden, "training.x")).unwrap();
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        let few = head(&mut vars, 6, &taps);
        vars.set_step(0);
        let y = few.forward(&x, Mode::Train).unwrap();
        assert_close!(y, golden["training.y"], rtol = 1e-12, atol = 1e-14);
        let loss = (y * &golden["training.g"]).unwrap().sum_all().unwrap();
        let mut gradients = loss.backward().unwrap();
        let dx = gradients.remove(&x).unwrap().squeeze(2).unwrap();
        assert_close!(dx, golden["training.dx"], rtol = 1e-10, atol = 1e-12);
        let dw = gradients.remove(&taps).unwrap();
        assert_close!(dw, golden["training.dweight"], rtol = 1e-10, atol = 1e-12);

        for name in ["few", "many"] {
            let (x, y) = few.attend(&maps(&golden, &format!("{name}.x"))).unwrap();
            let known = golden[format!("{name}.p").as_str()]
                .to_scalar::<f64>()
                .unwrap();
            assert!((rate(&x, &y).unwrap() - known).abs() < 1e-12, "{name}");
        }
    }

    #[test]
    fn channels_are_dropped_in_training_and_kept_in_evaluation() {
        let golden = golden();
        let x = maps(&golden, "many.x");
        let taps = Tensor::zeros((1, 1, TAPS), DType::F64, &Device::Cpu).unwrap();
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        let head = head(&mut vars, 48, &taps);
        vars.set_step(3);
        let variances = |y: &Tensor| -> Vec<f64> {
            let rows = y.to_vec2::<f64>().unwrap();
            let mut out = vec![];
            for row in rows {
                let mut at = 0;
                for i in 0..48 {
                    out.push(row[at]);
                    at += 48 - i;
                }
            }
            out
        };
        let plain = variances(&head.forward(&x, Mode::Eval).unwrap());
        let known = CovPool::plain().forward(&x).unwrap();
        assert_eq!(plain, variances(&known));
        let first = variances(&head.forward(&x, Mode::Train).unwrap());
        assert_eq!(first, variances(&head.forward(&x, Mode::Train).unwrap()));
        vars.set_step(4);
        assert_ne!(first, variances(&head.forward(&x, Mode::Train).unwrap()));
        let (scaled, y) = head.attend(&x).unwrap();
        let p = rate(&scaled, &y).unwrap();
        let dropped = first.iter().filter(|&&v| v == 0.0).count() as f64 / first.len() as f64;
        assert!((dropped - p).abs() < 0.12, "{dropped} of {p}");
        let scale = ((1.0 + 1.0 / 48.0) / (1.0 - p)).powi(2);
        for (after, before) in first.iter().zip(&plain).filter(|(after, _)| **after > 0.0) {
            assert!((after / (before * scale) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn gradient_agrees_with_differences_where_nothing_is_dropped() {
        let x = uniform((2, 5, 3, 2), 0.1, 1.0, 1, DType::F64).unwrap();
        let taps = uniform((1, 1, TAPS), -1.0, 1.0, 2, DType::F64).unwrap();
        let forward = |inputs: &[Tensor]| {
            let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
            let head = head(&mut vars, 5, &inputs[1]);
            vars.set_step(0);
            Ok(head.forward(&inputs[0], Mode::Train)?)
        };
        gradcheck(forward, &[x, taps], Gradcheck::default()).unwrap();
    }

    #[test]
    fn constant_features_give_zeros_and_bad_ones_are_named() {
        let taps = Tensor::zeros((1, 1, TAPS), DType::F64, &Device::Cpu).unwrap();
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        let head = head(&mut vars, 3, &taps);
        vars.set_step(0);
        for value in [0.0, 0.7] {
            let x = Tensor::full(value, (2, 3, 2, 2), &Device::Cpu).unwrap();
            let x = candle_core::Var::from_tensor(&x).unwrap();
            let y = head.forward(&x, Mode::Train).unwrap();
            let dx = y.sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
            for zeros in [y.flatten_all().unwrap(), dx.flatten_all().unwrap()] {
                assert!(zeros.to_vec1::<f64>().unwrap().iter().all(|&v| v == 0.0));
            }
        }
        let mut values = vec![0.5; 2 * 3 * 4];
        values[3 * 4] = f64::NAN;
        let x = Tensor::from_vec(values, (2, 3, 2, 2), &Device::Cpu).unwrap();
        let message = head.forward(&x, Mode::Train).unwrap_err().to_string();
        assert!(message.contains("batch element 1"), "{message}");
    }
}
