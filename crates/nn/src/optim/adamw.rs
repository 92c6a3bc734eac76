//! Adam with decoupled weight decay (Loshchilov and Hutter 2019), as in PyTorch.
//!
//! `m ← β₁·m + (1 − β₁)·g`, `v ← β₂·v + (1 − β₂)·g²`, then with `m̂ = m / (1 − β₁ᵗ)` and
//! `v̂ = v / (1 − β₂ᵗ)` `p ← (1 − η·λ)·p − η·m̂ / (√v̂ + ε)`. `t` counts the updates of each parameter.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use super::group::members;
use super::state::{Slots, Update};
use super::{Decay, Optimizer, ParamGroup, check, check_share};
use crate::{Result, Vars};

/// Options of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// β₁ and β₂.
    pub betas: (f64, f64),
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
    /// What λ applies to.
    pub decay: Decay,
}

impl Default for AdamWConfig {
    /// PyTorch's numbers: β = (0.9, 0.999), ε = 1e-8, λ = 0.01. Only weights decay.
    fn default() -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay: Decay::default(),
        }
    }
}

/// Adam with decoupled weight decay.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Slots<2>,
}

impl AdamW {
    /// For all parameters of `vars`, in one group.
    ///
    /// # Errors
    /// As [`with_groups`](Self::with_groups).
    pub fn new(vars: &Vars, config: AdamWConfig) -> Result<Self> {
        Self::with_groups(vars, config, &[])
    }

    /// For all parameters of `vars`, those of `groups` with their factors.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for a β outside of `[0, 1)`, an ε that is not positive, a negative
    /// decay or factor, or a pattern that no parameter has.
    pub fn with_groups(vars: &Vars, config: AdamWConfig, groups: &[ParamGroup]) -> Result<Self> {
        let AdamWConfig {
            betas,
            epsilon,
            weight_decay,
            decay,
        } = config;
        check_share("betas.0", betas.0)?;
        check_share("betas.1", betas.1)?;
        let positive = epsilon > 0.0 && epsilon.is_finite();
        check(positive, "epsilon", epsilon, "finite, above 0")?;
        let members = members(vars, groups, weight_decay, decay)?;
        Ok(Self {
            config,
            slots: Slots::new("adamw", ["exp_avg", "exp_avg_sq"], true, members)?,
        })
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        let AdamWConfig {
            betas: (beta1, beta2),
            epsilon,
            ..
        } = self.config;
        #[cfg(feature = "cuda")]
        let mut table = self.slots.table("adamw");
        for slot in self.slots.iter_mut() {
            let Some(gradient) = gradients.get(slot.parameter.as_tensor()) else {
                continue;
            };
            slot.steps += 1;
            let rate = rate * slot.lr_factor;
            let keep = 1.0 - rate * slot.weight_decay;
            let t = slot.steps as f64;
            let size = rate / (1.0 - libm::pow(beta1, t));
            let unbias = 1.0 / (1.0 - libm::pow(beta2, t)).sqrt();
            let [mean, square] = &slot.tensors;
            #[cfg(feature = "cuda")]
            if let Some(table) = &mut table {
                let tensors = [slot.parameter.as_tensor(), mean, square, gradient];
                table.push(tensors, [keep, size, unbias])?;
                continue;
            }
            let gradient = gradient.contiguous()?;
            mean.inplace_op2(
                &gradient,
                &Update("adamw", |m, [g]: [f64; 1]| beta1 * m + (1.0 - beta1) * g),
            )?;
            square.inplace_op2(
                &gradient,
                &Update("adamw", |v, [g]: [f64; 1]| {
                    beta2 * v + (1.0 - beta2) * g * g
                }),
            )?;
            slot.parameter.inplace_op3(
                mean,
                square,
                &Update("adamw", |p, [m, v]: [f64; 2]| {
                    keep * p - size * m / (v.sqrt() * unbias + epsilon)
                }),
            )?;
        }
        #[cfg(feature = "cuda")]
        if let Some(table) = table {
            table.adamw((beta1, beta2), epsilon)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.slots.export()
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.slots.import(state)
    }
}
