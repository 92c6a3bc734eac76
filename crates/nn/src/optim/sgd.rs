//! Stochastic gradient descent with momentum, as in PyTorch.
//!
//! `v ← μ·v + g + λ·p`, then `p ← p − η·v`, or with Nesterov `p ← p − η·(g + λ·p + μ·v)`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use super::group::members;
use super::state::{Slots, Update};
use super::{Decay, Optimizer, ParamGroup, check, check_share};
use crate::{Result, Vars};

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

/// Stochastic gradient descent.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    slots: Slots<1>,
}

impl Sgd {
    /// For all parameters of `vars`, in one group.
    ///
    /// # Errors
    /// As [`with_groups`](Self::with_groups).
    pub fn new(vars: &Vars, config: SgdConfig) -> Result<Self> {
        Self::with_groups(vars, config, &[])
    }

    /// For all parameters of `vars`, those of `groups` with their factors.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for a momentum outside of `[0, 1)`, a negative decay or factor,
    /// Nesterov without momentum, or a pattern that no parameter has.
    pub fn with_groups(vars: &Vars, config: SgdConfig, groups: &[ParamGroup]) -> Result<Self> {
        let SgdConfig {
            momentum,
            weight_decay,
            nesterov,
            decay,
        } = config;
        check_share("momentum", momentum)?;
        let has_momentum = !nesterov || momentum > 0.0;
        check(has_momentum, "nesterov", true, "momentum above 0 with it")?;
        let members = members(vars, groups, weight_decay, decay)?;
        Ok(Self {
            config,
            slots: Slots::new("sgd", ["momentum_buffer"], false, members)?,
        })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        let SgdConfig {
            momentum, nesterov, ..
        } = self.config;
        #[cfg(feature = "cuda")]
        if let Some(mut table) = self.slots.table("sgd") {
            for slot in self.slots.iter_mut() {
                let Some(gradient) = gradients.get(slot.parameter.as_tensor()) else {
                    continue;
                };
                let [velocity] = &slot.tensors;
                let tensors = [slot.parameter.as_tensor(), velocity, gradient];
                table.push(tensors, [rate * slot.lr_factor, slot.weight_decay])?;
            }
            return Ok(table.sgd(momentum, nesterov)?);
        }
        for slot in self.slots.iter_mut() {
            let Some(gradient) = gradients.get(slot.parameter.as_tensor()) else {
                continue;
            };
            let gradient = gradient.contiguous()?;
            let decay = slot.weight_decay;
            let rate = rate * slot.lr_factor;
            let [velocity] = &slot.tensors;
            velocity.inplace_op3(
                slot.parameter.as_tensor(),
                &gradient,
                &Update("sgd", |v, [p, g]: [f64; 2]| momentum * v + g + decay * p),
            )?;
            slot.parameter.inplace_op3(
                velocity,
                &gradient,
                &Update("sgd", |p, [v, g]: [f64; 2]| match nesterov {
                    false => p - rate * v,
                    true => p - rate * (g + decay * p + momentum * v),
                }),
            )?;
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
