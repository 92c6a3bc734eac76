//! Learning rate over time, as a factor of the base rate.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate changes. In TOML: `schedule = { kind = "cosine" }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// No change.
    Constant,
    /// Half a cosine from 1 to 0, step by step (Loshchilov and Hutter 2017).
    Cosine {
        /// Epochs of linear growth from 0 before it; the cosine takes the rest.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// Times `factor` at each milestone.
    MultiStep {
        /// Epochs after which the rate drops.
        milestones: Vec<f64>,
        /// What it is multiplied by.
        factor: f64,
    },
}

impl Default for Schedule {
    /// Cosine without warm-up.
    fn default() -> Self {
        Self::Cosine { warmup_epochs: 0.0 }
    }
}

impl Schedule {
    /// # Errors
    /// [`Error::Option`] for a negative or non-finite number.
    pub fn check(&self) -> Result<()> {
        let bad = |what, value: f64| {
            Err(Error::Option {
                what,
                value: value.to_string(),
                expected: "finite, at least 0",
            })
        };
        let good = |v: f64| v.is_finite() && v >= 0.0;
        match self {
            Self::Constant => Ok(()),
            Self::Cosine { warmup_epochs } if good(*warmup_epochs) => Ok(()),
            Self::Cosine { warmup_epochs } => bad("schedule.warmup_epochs", *warmup_epochs),
            Self::MultiStep { factor, .. } if !good(*factor) => bad("schedule.factor", *factor),
            Self::MultiStep { milestones, .. } => match milestones.iter().find(|&&m| !good(m)) {
                Some(&milestone) => bad("schedule.milestones", milestone),
                None => Ok(()),
            },
        }
    }

    /// Factor of the base rate for update number `step` (from 0) of `steps`, of which an epoch
    /// has `steps_per_epoch`.
    #[must_use]
    pub fn factor(&self, step: usize, steps: usize, steps_per_epoch: usize) -> f64 {
        let epoch = step as f64 / steps_per_epoch.max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Cosine { warmup_epochs } => {
                let warmup = (warmup_epochs * steps_per_epoch as f64).round() as usize;
                if step < warmup {
                    return (step + 1) as f64 / warmup as f64;
                }
                let whole = steps.saturating_sub(warmup).max(1) as f64;
                let part = ((step - warmup) as f64 / whole).min(1.0);
                0.5 * (1.0 + libm::cos(std::f64::consts::PI * part))
            }
            Self::MultiStep { milestones, factor } => {
                let passed = milestones.iter().filter(|&&m| epoch >= m).count();
                factor.powi(passed as i32)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_goes_from_one_to_almost_zero() {
        let s = Schedule::default();
        assert_eq!(s.factor(0, 100, 10), 1.0);
        assert!((s.factor(50, 100, 10) - 0.5).abs() < 1e-12);
        assert!(s.factor(99, 100, 10) < 1e-3);
    }

    #[test]
    fn warm_up_comes_first() {
        let s = Schedule::Cosine { warmup_epochs: 1.0 };
        assert_eq!(s.factor(0, 100, 10), 0.1);
        assert_eq!(s.factor(9, 100, 10), 1.0);
        assert_eq!(s.factor(10, 100, 10), 1.0);
    }

    #[test]
    fn steps_at_milestones() {
        let s = Schedule::MultiStep {
            milestones: vec![3.0, 5.0],
            factor: 0.1,
        };
        assert_eq!(s.factor(29, 100, 10), 1.0);
        assert!((s.factor(30, 100, 10) - 0.1).abs() < 1e-12);
        assert!((s.factor(50, 100, 10) - 0.01).abs() < 1e-12);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(
            Schedule::Cosine {
                warmup_epochs: -1.0
            }
            .check()
            .is_err()
        );
        assert!(
            Schedule::MultiStep {
                milestones: vec![],
                factor: f64::NAN
            }
            .check()
            .is_err()
        );
    }
}
