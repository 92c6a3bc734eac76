//! iSQRT-COV: covariance pooling with a matrix square root by a coupled iteration (Li et al. 2018).
//!
//! # Equation
//! `A = Σ/tr Σ`; `Y₀ = A, Z₀ = I`; `Y ← ½Y(3I - ZY)`, `Z ← ½(3I - ZY)Z`, `N` times; `C = √(tr Σ) Y_N`, upper
//! triangle row by row (sections 3.1 to 3.3 of the paper). The adjoint is the tangent of the same
//! iteration: `docs/method.md`, [`CovPool`].
//!
//! # Shapes
//! `(B, d, H, W)` to `(B, d(d+1)/2)`, or `d²` with `output = "full"`.
//!
//! # Options
//! The steps in one of four ways: `iterations = 5` (Newton-Schulz, the default); `schedule = "cubic"`,
//! `"quintic"` or `"nonic"` with `steps` and `lower`; `coefficients = [[a, b, c], ...]`. Further
//! `pre_normalization` (`"trace"`, `"frobenius"`, `"spectral"`, `"none"`), `post_compensation` (true, false, or
//! `"batch_norm"`: each entry normalised over the batch instead, which the paper tried),
//! `side` (`"auto"`, `"covariance"`, `"gram"`), `memory` (`"keep"`, `"lean"`), `output`.
//!
//! # Cost and memory
//! At `N = 5` ten symmetric products of the smaller of `d` and `M` forward and twice that backward, beside
//! the covariance. Kept are at most `3(N-1)` matrices of the smaller side, with `memory = "lean"` none.
//! `CovPool::describe` counts both.
//!
//! # Known troubles
//! `N = 5` is far from the exact root where `d` is large: it damps small eigenvalues, and released weights
//! rely on that. Zero eigenvalues grow in `Z` by 1.5 a step, and rounding with them: f32 bears 13 steps
//! (12 with the Frobenius norm, 11 with a smaller divisor), more are refused (`docs/numerics.md`).

use candle_core::{DType, Tensor};
use isqrt_linalg::{CovPool, Memory, PreNormalization, Root, Schedule, Side};
use isqrt_nn::layers::BatchNorm2d;
use isqrt_nn::ops::Activation;
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::cov::Covariance;
use super::{Form, Options, Representation, RepresentationEntry};
use crate::{Error, Result};

pub(super) const ISQRT: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "isqrt"
    }

    fn about(&self) -> &'static str {
        "covariance with an iterated square root (iSQRT-COV)"
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
        let keys = options.read::<Keys>(self.name())?;
        let normalised = matches!(keys.post_compensation, Compensation::Word(Word::BatchNorm));
        let pool = keys.pool()?;
        pool.validate()?;
        if let (Some(root), DType::F32) = (&pool.root, scope.dtype()) {
            root.check_f32()?;
        }
        let root = Covariance { pool, channels };
        if !normalised {
            return Ok(Box::new(root));
        }
        let norm = BatchNorm2d::new(scope.sub("bn"), root.out_dim(), Activation::None)?;
        Ok(Box::new(Normalised { root, norm }))
    }
}

/// The layer that options describe, without the batch norm that may follow.
///
/// # Errors
/// [`Error::Options`] for an option that there is not or whose value it cannot take.
pub fn layer(options: &Options) -> Result<CovPool> {
    let pool = options.read::<Keys>(ISQRT.name())?.pool()?;
    pool.validate()?;
    Ok(pool)
}

/// A root whose entries are normalised over the batch, where others are multiplied by `√(tr Σ)`.
struct Normalised {
    root: Covariance,
    norm: BatchNorm2d,
}

impl Representation for Normalised {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = self.root.forward(x, mode)?;
        let (batch, width) = y.dims2()?;
        let y = self.norm.forward(&y.reshape((batch, width, 1, 1))?, mode)?;
        Ok(y.flatten_from(1)?)
    }

    fn out_dim(&self) -> usize {
        self.root.out_dim()
    }

    fn triangle(&self) -> Option<usize> {
        self.root.triangle()
    }

    fn is_centred(&self) -> bool {
        self.root.is_centred()
    }
}

/// The keys in a spec.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    iterations: Option<usize>,
    schedule: Option<Minimax>,
    steps: Option<usize>,
    lower: Option<f64>,
    coefficients: Option<Vec<[f64; 3]>>,
    pre_normalization: Norm,
    post_compensation: Compensation,
    side: RunsOn,
    memory: Keeps,
    output: Form,
}

/// What follows the iteration.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Compensation {
    /// Multiplication by the root of the divisor, or nothing.
    Is(bool),
    Word(Word),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    BatchNorm,
}

impl Default for Compensation {
    fn default() -> Self {
        Self::Is(true)
    }
}

words!(Norm => PreNormalization { Trace, Frobenius, Spectral, None });
words!(RunsOn => Side { Auto, Covariance, Gram });
words!(Keeps => Memory { Keep, Lean });

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Minimax {
    Cubic,
    Quintic,
    Nonic,
}

impl Keys {
    fn pool(self) -> Result<CovPool> {
        let root = Root {
            schedule: self.schedule()?,
            pre_normalization: self.pre_normalization.into(),
            post_compensation: matches!(self.post_compensation, Compensation::Is(true)),
            side: self.side.into(),
            memory: self.memory.into(),
        };
        Ok(CovPool {
            output: self.output.into(),
            ..CovPool::with_root(root)
        })
    }

    fn schedule(&self) -> Result<Schedule> {
        let bounds = (self.steps, self.lower);
        match (self.iterations, self.schedule, &self.coefficients, bounds) {
            (iterations, None, None, (None, None)) => Ok(Schedule::NewtonSchulz {
                iterations: iterations.unwrap_or(5),
            }),
            (None, Some(Minimax::Cubic), None, (Some(steps), Some(lower))) => {
                Ok(Schedule::Cubic { steps, lower })
            }
            (None, Some(Minimax::Quintic), None, (Some(steps), Some(lower))) => {
                Ok(Schedule::Quintic { steps, lower })
            }
            (None, Some(Minimax::Nonic), None, (Some(steps), Some(lower))) => {
                Ok(Schedule::Nonic { steps, lower })
            }
            (None, None, Some(coefficients), (None, None)) => {
                Ok(Schedule::Given(coefficients.clone()))
            }
            _ => Err(Error::Options {
                name: ISQRT.name().to_owned(),
                message: "give one of: iterations; schedule (cubic, quintic or nonic) with steps \
                          and lower; coefficients"
                    .to_owned(),
            }),
        }
    }
}
