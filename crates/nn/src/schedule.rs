//! Learning rate over time, as a factor of the base rate.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate changes. In TOML: `schedule = { kind = "cosine", warmup_epochs = 5 }`.
///
/// Each kind may begin with `warmup_epochs` (0 by default) of linear growth to its first factor.
/// Milestones and steps count epochs from the start of the run; the other curves take what the
/// warm-up leaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// No change.
    Constant {
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// Half a cosine from 1 to 0, step by step (Loshchilov and Hutter 2017).
    Cosine {
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// `(1 − t)^power`, where `t` goes from 0 to 1 step by step.
    Polynomial {
        /// 1 for a straight line.
        power: f64,
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// Times `factor` after every so many epochs.
    Step {
        /// Epochs between drops.
        epochs: f64,
        /// What it is multiplied by.
        factor: f64,
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// Times `factor` at each milestone.
    MultiStep {
        /// Epochs after which the rate drops.
        milestones: Vec<f64>,
        /// What it is multiplied by.
        factor: f64,
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
    },
    /// From `10^from` in the first epoch to `10^to` in the last one, evenly in the logarithm: the
    /// `logspace(from, to, epochs)` of MatConvNet's recipes, which are rates where the base is 1.
    Logarithmic {
        /// Exponent of the first epoch.
        from: f64,
        /// Exponent of the last epoch, and of the only one.
        to: f64,
        /// Epochs of linear growth before it.
        #[serde(default)]
        warmup_epochs: f64,
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
    /// [`Error::Option`] for a number that is not finite, or negative where it must not be.
    pub fn check(&self) -> Result<()> {
        let check = |good: bool, what, value: f64, expected| match good {
            true => Ok(()),
            false => Err(Error::Option {
                what,
                value: value.to_string(),
                expected,
            }),
        };
        let size = |what, value: f64| {
            let good = value.is_finite() && value >= 0.0;
            check(good, what, value, "finite, at least 0")
        };
        size("schedule.warmup_epochs", self.warmup_epochs())?;
        match self {
            Self::Constant { .. } | Self::Cosine { .. } => Ok(()),
            Self::Polynomial { power, .. } => size("schedule.power", *power),
            Self::Step { epochs, factor, .. } => {
                let good = epochs.is_finite() && *epochs > 0.0;
                check(good, "schedule.epochs", *epochs, "finite, above 0")?;
                size("schedule.factor", *factor)
            }
            Self::MultiStep {
                milestones, factor, ..
            } => {
                size("schedule.factor", *factor)?;
                milestones
                    .iter()
                    .try_for_each(|&m| size("schedule.milestones", m))
            }
            Self::Logarithmic { from, to, .. } => {
                let sane = |x: &f64| x.abs() <= 30.0;
                check(
                    sane(from),
                    "schedule.from",
                    *from,
                    "a power of ten within ±30",
                )?;
                check(sane(to), "schedule.to", *to, "a power of ten within ±30")
            }
        }
    }

    /// Epochs of linear growth before the curve.
    #[must_use]
    pub fn warmup_epochs(&self) -> f64 {
        match self {
            Self::Constant { warmup_epochs }
            | Self::Cosine { warmup_epochs }
            | Self::Polynomial { warmup_epochs, .. }
            | Self::Step { warmup_epochs, .. }
            | Self::MultiStep { warmup_epochs, .. }
            | Self::Logarithmic { warmup_epochs, .. } => *warmup_epochs,
        }
    }

    /// Factor of the base rate for update number `step` (from 0) of `steps`, of which an epoch
    /// has `steps_per_epoch`.
    #[must_use]
    pub fn factor(&self, step: usize, steps: usize, steps_per_epoch: usize) -> f64 {
        let per_epoch = steps_per_epoch.max(1);
        let warmup = (self.warmup_epochs() * per_epoch as f64).round() as usize;
        if step < warmup {
            let first = self.curve(0, 0, steps.saturating_sub(warmup), per_epoch);
            return first * (step + 1) as f64 / warmup as f64;
        }
        let rest = steps.saturating_sub(warmup);
        self.curve(step, step - warmup, rest, per_epoch)
    }

    /// The factor at `step` from the start of the run, which is step `at` of the `steps` that
    /// follow the warm-up.
    fn curve(&self, step: usize, at: usize, steps: usize, per_epoch: usize) -> f64 {
        let epoch = step as f64 / per_epoch as f64;
        let part = (at as f64 / steps.max(1) as f64).min(1.0);
        match self {
            Self::Constant { .. } => 1.0,
            Self::Cosine { .. } => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * part)),
            Self::Polynomial { power, .. } => libm::pow(1.0 - part, *power),
            Self::Step { epochs, factor, .. } => {
                // 0.3 / 0.1 is less than 3 in doubles.
                factor.powi((epoch / epochs + 1e-9) as i32)
            }
            Self::MultiStep {
                milestones, factor, ..
            } => {
                let passed = milestones.iter().filter(|&&m| epoch >= m).count();
                factor.powi(passed as i32)
            }
            Self::Logarithmic { from, to, .. } => {
                let last = steps.div_ceil(per_epoch).saturating_sub(1);
                let epoch = (at / per_epoch).min(last) as f64;
                let exponent = match last {
                    0 => *to,
                    last => from + (to - from) * epoch / last as f64,
                };
                libm::pow(10.0, exponent)
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
            warmup_epochs: 0.0,
        };
        assert_eq!(s.factor(29, 100, 10), 1.0);
        assert!((s.factor(30, 100, 10) - 0.1).abs() < 1e-12);
        assert!((s.factor(50, 100, 10) - 0.01).abs() < 1e-12);
    }

    #[test]
    fn logarithmic_takes_what_the_warm_up_leaves() {
        let s = Schedule::Logarithmic {
            from: -1.0,
            to: -3.0,
            warmup_epochs: 2.0,
        };
        let near = |step, expected: f64| {
            let found = s.factor(step, 50, 10);
            assert!((found / expected - 1.0).abs() < 1e-12, "{step}: {found}");
        };
        near(0, 0.1 / 20.0);
        near(19, 0.1);
        near(20, 0.1);
        near(30, 0.01);
        near(49, 0.001);
    }

    #[test]
    fn milestones_count_from_the_start() {
        let s = Schedule::MultiStep {
            milestones: vec![3.0],
            factor: 0.1,
            warmup_epochs: 2.0,
        };
        assert_eq!(s.factor(9, 100, 10), 0.5);
        assert_eq!(s.factor(29, 100, 10), 1.0);
        assert!((s.factor(30, 100, 10) - 0.1).abs() < 1e-12);
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
                factor: f64::NAN,
                warmup_epochs: 0.0
            }
            .check()
            .is_err()
        );
    }
}
