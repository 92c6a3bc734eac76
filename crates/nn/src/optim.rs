//! Stochastic gradient descent with momentum, as in PyTorch.
//!
//! `v ← μ·v + g + λ·p`, then `p ← p − η·v`, or with Nesterov `p ← p − η·(g + λ·p + μ·v)`.
//! State is kept by parameter name.

use std::collections::BTreeMap;

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp3, Layout, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::element::{bad_dtype, values};
use crate::{Error, Result, Vars};

/// Which parameters weight decay applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Weights of convolutions and linear layers (rank 2 and more), not biases and norms.
    #[default]
    WeightsOnly,
    /// All.
    All,
}

/// Options of [`Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// μ.
    pub momentum: f64,
    /// Whether to look ahead.
    pub nesterov: bool,
    /// λ.
    pub weight_decay: f64,
    /// What λ applies to.
    pub decay: Decay,
}

/// The optimiser.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    slots: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    parameter: Var,
    velocity: Tensor,
    weight_decay: f64,
}

impl Sgd {
    /// For all parameters of `vars`.
    ///
    /// # Errors
    /// [`Error::Option`] for a momentum outside of `[0, 1)`, a negative decay, or Nesterov without
    /// momentum.
    pub fn new(vars: &Vars, config: SgdConfig) -> Result<Self> {
        let SgdConfig {
            momentum,
            weight_decay,
            nesterov,
            decay,
        } = config;
        let bad = |what, value: String, expected| {
            Err(Error::Option {
                what,
                value,
                expected,
            })
        };
        if !(0.0..1.0).contains(&momentum) {
            return bad(
                "momentum",
                momentum.to_string(),
                "at least 0 and less than 1",
            );
        }
        if !(weight_decay >= 0.0 && weight_decay.is_finite()) {
            return bad(
                "weight_decay",
                weight_decay.to_string(),
                "finite, at least 0",
            );
        }
        if nesterov && momentum == 0.0 {
            return bad("nesterov", "true".to_owned(), "momentum above 0 with it");
        }
        let slots = vars
            .parameters()
            .map(|(name, parameter)| {
                let decays = decay == Decay::All || parameter.rank() >= 2;
                let slot = Slot {
                    velocity: parameter.as_tensor().zeros_like()?,
                    parameter: parameter.clone(),
                    weight_decay: if decays { weight_decay } else { 0.0 },
                };
                Ok((name.to_owned(), slot))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, slots })
    }

    /// One update with this learning rate. Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// Where a gradient has another type than its parameter.
    pub fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        for slot in self.slots.values() {
            let Some(gradient) = gradients.get(slot.parameter.as_tensor()) else {
                continue;
            };
            let gradient = gradient.contiguous()?;
            let SgdConfig {
                momentum, nesterov, ..
            } = self.config;
            let weight_decay = slot.weight_decay;
            slot.velocity.inplace_op3(
                slot.parameter.as_tensor(),
                &gradient,
                &Velocity {
                    momentum,
                    weight_decay,
                },
            )?;
            slot.parameter.inplace_op3(
                &slot.velocity,
                &gradient,
                &Move {
                    rate,
                    lookahead: nesterov.then_some((momentum, weight_decay)),
                },
            )?;
        }
        Ok(())
    }

    /// Velocities by parameter name, sorted: what a checkpoint has to keep.
    pub fn state(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots
            .iter()
            .map(|(name, slot)| (name.as_str(), &slot.velocity))
    }
}

/// `v ← μ·v + g + λ·p`
struct Velocity {
    momentum: f64,
    weight_decay: f64,
}

/// `p ← p − η·v`, or `p ← p − η·(g + λ·p + μ·v)`
struct Move {
    rate: f64,
    lookahead: Option<(f64, f64)>,
}

/// Applies `$update` to each element of the first operand and those of the other two.
macro_rules! elementwise {
    ($name:literal, $target:expr, $l:expr, $a:expr, $b:expr, $update:expr) => {{
        let Some((start, end)) = $l.contiguous_offsets() else {
            candle_core::bail!("{}: the target is not contiguous", $name)
        };
        match $target {
            CpuStorage::F32(target) => {
                let (a, b) = (values::<f32>($a.0, $a.1)?, values::<f32>($b.0, $b.1)?);
                for ((t, &a), &b) in target[start..end].iter_mut().zip(a).zip(b) {
                    let updated: f64 = $update(f64::from(*t), f64::from(a), f64::from(b));
                    *t = updated as f32;
                }
                Ok(())
            }
            CpuStorage::F64(target) => {
                let (a, b) = (values::<f64>($a.0, $a.1)?, values::<f64>($b.0, $b.1)?);
                for ((t, &a), &b) in target[start..end].iter_mut().zip(a).zip(b) {
                    *t = $update(*t, a, b);
                }
                Ok(())
            }
            other => Err(bad_dtype($name, other.dtype())),
        }
    }};
}

impl InplaceOp3 for Velocity {
    fn name(&self) -> &'static str {
        "sgd-velocity"
    }

    fn cpu_fwd(
        &self,
        v: &mut CpuStorage,
        lv: &Layout,
        p: &CpuStorage,
        lp: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<()> {
        elementwise!("sgd", v, lv, (p, lp), (g, lg), |v: f64, p: f64, g: f64| {
            self.momentum * v + g + self.weight_decay * p
        })
    }
}

impl InplaceOp3 for Move {
    fn name(&self) -> &'static str {
        "sgd-move"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        lp: &Layout,
        v: &CpuStorage,
        lv: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<()> {
        elementwise!("sgd", p, lp, (v, lv), (g, lg), |p: f64, v: f64, g: f64| {
            match self.lookahead {
                None => p - self.rate * v,
                Some((momentum, decay)) => p - self.rate * (g + decay * p + momentum * v),
            }
        })
    }
}
