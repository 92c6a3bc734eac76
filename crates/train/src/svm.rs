//! Linear support vector machines, one against all: the classifier of the paper's fine-grained results
//! (`C = 1` on l2-normalised representations), by dual coordinate descent.
//!
//! # Problem
//! For each class, with `y = 1` for its rows and -1 for all others, a constant feature 1 beside `x` and the bias
//! as its weight (so the bias is regularised too, as in LIBLINEAR and scikit-learn's `LinearSVC`):
//! `min ½‖w‖² + C Σ ξ(y wᵀx)` with `ξ(m) = max(0, 1 - m)` or its square.
//!
//! # Method
//! Hsieh, Chang, Lin, Keerthi, Sundararajan, *A Dual Coordinate Descent Method for Large-scale Linear SVM*
//! (ICML 2008), with shrinking (section 3.2): exact steps along one dual variable after another, in a
//! new random order each epoch. Sums in f64.
//!
//! # Cost
//! An epoch of a class is at most a product and a sum of rows with the weights, `2 rows · dim`
//! multiply-adds, less what shrinking leaves out; classes run in parallel, each with weights of its own in
//! f64 besides the rows, which are only read.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a margin below 1 costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SvmLoss {
    /// `max(0, 1 - m)`.
    #[default]
    Hinge,
    /// `max(0, 1 - m)²`.
    SquaredHinge,
}

/// How a machine is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SvmConfig {
    /// Weight of the losses against that of `½‖w‖²`; 1 by default.
    pub c: f64,
    /// The loss; hinge by default.
    pub loss: SvmLoss,
    /// A class is done where the largest and the smallest projected gradient of its dual are at most so far
    /// apart, as LIBLINEAR's `-e` and scikit-learn's `tol`; 1e-4 by default.
    pub tolerance: f64,
    /// Passes over the rows after which a class ends unfinished, see [`Svm::unconverged`]; 1000 by default.
    pub max_epochs: usize,
    /// Fixes the order of the steps.
    pub seed: u64,
}

impl Default for SvmConfig {
    fn default() -> Self {
        Self {
            c: 1.0,
            loss: SvmLoss::default(),
            tolerance: 1e-4,
            max_epochs: 1000,
            seed: 0,
        }
    }
}

/// How the fit of one class ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ClassFit {
    /// Passes over its rows.
    pub epochs: usize,
    /// Whether it reached the tolerance.
    pub converged: bool,
    /// `½‖w‖² + C Σ ξ`, the bias included.
    pub objective: f64,
    /// Objective less that of the dual: no weights have an objective that is smaller by more.
    pub gap: f64,
}

/// Fitted machines, one a class.
#[derive(Debug, Clone, PartialEq)]
pub struct Svm {
    dim: usize,
    /// `(classes, dim)`.
    weights: Vec<f32>,
    bias: Vec<f32>,
    fits: Vec<ClassFit>,
}

impl Svm {
    /// Fits `rows`, `(labels.len(), dim)` row by row, with a label below `classes` each. The same bits for
    /// any number of threads.
    ///
    /// A class that does not reach the tolerance is no error: see [`unconverged`](Self::unconverged).
    ///
    /// # Errors
    /// [`Error::Config`] for options out of range, sizes that do not fit each other, labels that are too
    /// large, and rows that are not finite.
    pub fn fit(
        rows: &[f32],
        dim: usize,
        labels: &[u32],
        classes: usize,
        config: &SvmConfig,
    ) -> Result<Self> {
        check(rows, dim, labels, classes, config)?;
        let squares: Vec<f64> = rows
            .par_chunks(dim)
            .map(|x| x.iter().map(|&v| f64::from(v).powi(2)).sum())
            .collect();
        let problem = Problem {
            rows,
            dim,
            labels,
            squares,
            config,
        };
        let fitted: Vec<(Vec<f32>, f32, ClassFit)> = (0..classes)
            .into_par_iter()
            .map(|class| problem.fit(class))
            .collect();
        let mut svm = Self {
            dim,
            weights: Vec::with_capacity(classes * dim),
            bias: Vec::with_capacity(classes),
            fits: Vec::with_capacity(classes),
        };
        for (weights, bias, fit) in fitted {
            svm.weights.extend(weights);
            svm.bias.push(bias);
            svm.fits.push(fit);
        }
        Ok(svm)
    }

    /// `wᵀx + b` of each class.
    ///
    /// # Errors
    /// [`Error::Config`] for a row of another length, or one that is not finite.
    pub fn decision(&self, row: &[f32]) -> Result<Vec<f32>> {
        if row.len() != self.dim {
            let expected = format!("{}, as the rows that were fitted", self.dim);
            return bad("length of a row", row.len(), expected);
        }
        if let Some(value) = row.iter().find(|v| !v.is_finite()) {
            return bad("a value of a row", value, "finite");
        }
        let weights = self.weights.chunks_exact(self.dim).zip(&self.bias);
        let decision = |(w, b): (&[f32], &f32)| {
            let sum: f64 = w
                .iter()
                .zip(row)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            (sum + f64::from(*b)) as f32
        };
        Ok(weights.map(decision).collect())
    }

    /// The class of the largest decision, the first of equals.
    ///
    /// # Errors
    /// As [`decision`](Self::decision).
    pub fn predict(&self, row: &[f32]) -> Result<u32> {
        let decisions = self.decision(row)?;
        let better =
            |best: usize, (k, x): (usize, &f32)| if *x > decisions[best] { k } else { best };
        Ok(decisions.iter().enumerate().fold(0, better) as u32)
    }

    /// `(classes, dim)`, row by row.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// One a class.
    #[must_use]
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// How the fit of each class ended.
    #[must_use]
    pub fn fits(&self) -> &[ClassFit] {
        &self.fits
    }

    /// The classes that did not reach the tolerance, with their [`gap`](ClassFit::gap).
    pub fn unconverged(&self) -> impl Iterator<Item = (usize, ClassFit)> {
        let fits = self.fits.iter().copied().enumerate();
        fits.filter(|(_, fit)| !fit.converged)
    }
}

/// Divides each row of `dim` values by its 2-norm. Rows of zeros stay.
pub fn l2_normalise(rows: &mut [f32], dim: usize) {
    rows.par_chunks_mut(dim.max(1)).for_each(|row| {
        let squares: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
        if squares > 0.0 {
            let norm = squares.sqrt();
            row.iter_mut()
                .for_each(|v| *v = (f64::from(*v) / norm) as f32);
        }
    });
}

fn bad<T>(what: &'static str, value: impl ToString, expected: impl Into<String>) -> Result<T> {
    Err(Error::Config {
        what,
        value: value.to_string(),
        expected: expected.into(),
    })
}

fn check(
    rows: &[f32],
    dim: usize,
    labels: &[u32],
    classes: usize,
    config: &SvmConfig,
) -> Result<()> {
    for (what, value) in [("c", config.c), ("tolerance", config.tolerance)] {
        if !(value > 0.0 && value.is_finite()) {
            return bad(what, value, "a number above 0");
        }
    }
    for (what, value) in [("max_epochs", config.max_epochs), ("classes", classes)] {
        if value == 0 {
            return bad(what, value, "at least 1");
        }
    }
    if dim == 0 || labels.is_empty() || labels.len().checked_mul(dim) != Some(rows.len()) {
        let expected = format!("{} rows of {dim}, at least one of each", labels.len());
        return bad("number of values", rows.len(), expected);
    }
    if u32::try_from(labels.len()).is_err() {
        return bad(
            "number of rows",
            labels.len(),
            format!("at most {}", u32::MAX),
        );
    }
    if let Some(row) = labels.iter().position(|&label| label as usize >= classes) {
        let expected = format!("below {classes}, the number of classes (row {row})");
        return bad("label", labels[row], expected);
    }
    match rows.iter().position(|v| !v.is_finite()) {
        Some(at) => {
            let expected = format!("finite (row {}, column {})", at / dim, at % dim);
            bad("a value of a row", rows[at], expected)
        }
        None => Ok(()),
    }
}

struct Problem<'a> {
    rows: &'a [f32],
    dim: usize,
    labels: &'a [u32],
    /// `‖x‖²` of each row.
    squares: Vec<f64>,
    config: &'a SvmConfig,
}

/// Projected gradients that are smaller are 0: no step would change anything.
const NO_STEP: f64 = 1e-12;

impl Problem<'_> {
    fn row(&self, i: usize) -> &[f32] {
        &self.rows[i * self.dim..][..self.dim]
    }

    /// Weights, bias, and how it went. The dual: `min ½ αᵀ(Q + D)α - Σα`, `0 ≤ α ≤ U`, `Q_ij = y_i y_j x_iᵀx_j`,
    /// and `w = Σ y α x`.
    fn fit(&self, class: usize) -> (Vec<f32>, f32, ClassFit) {
        let SvmConfig { c, loss, .. } = *self.config;
        let (upper, diagonal) = match loss {
            SvmLoss::Hinge => (c, 0.0),
            SvmLoss::SquaredHinge => (f64::INFINITY, 0.5 / c),
        };
        let rows = self.labels.len();
        let sign = |i: usize| {
            if self.labels[i] as usize == class {
                1.0
            } else {
                -1.0
            }
        };
        let mut random = order(self.config.seed, class);
        let mut alpha = vec![0.0_f64; rows];
        let mut w = vec![0.0_f64; self.dim];
        let mut bias = 0.0;
        // The first `active` of these take part; bounds of the epoch before say who leaves.
        let mut places: Vec<usize> = (0..rows).collect();
        let mut active = rows;
        let mut before = Range::WHOLE;
        let (mut epochs, mut converged) = (0, false);
        while epochs < self.config.max_epochs && !converged {
            epochs += 1;
            shuffle(&mut places[..active], &mut random);
            let mut range = Range::EMPTY;
            let mut at = 0;
            while at < active {
                let i = places[at];
                let (x, y) = (self.row(i), sign(i));
                let gradient = y * (dot(x, &w) + bias) - 1.0 + diagonal * alpha[i];
                let (projected, leaves) = match alpha[i] {
                    0.0 => (gradient.min(0.0), gradient > before.most),
                    a if a == upper => (gradient.max(0.0), gradient < before.least),
                    _ => (gradient, false),
                };
                if leaves {
                    active -= 1;
                    places.swap(at, active);
                    continue;
                }
                at += 1;
                range.add(projected);
                if projected.abs() > NO_STEP {
                    let curvature = self.squares[i] + 1.0 + diagonal;
                    let next = (alpha[i] - gradient / curvature).clamp(0.0, upper);
                    let step = (next - alpha[i]) * y;
                    alpha[i] = next;
                    add(step, x, &mut w);
                    bias += step;
                }
            }
            before = range.as_bounds();
            if range.most - range.least <= self.config.tolerance {
                // All rows must agree before it is done.
                converged = active == rows;
                active = rows;
                before = Range::WHOLE;
            }
        }
        let norm = w.iter().map(|v| v * v).sum::<f64>() + bias * bias;
        let losses = (0..rows).map(|i| {
            let short = (1.0 - sign(i) * (dot(self.row(i), &w) + bias)).max(0.0);
            match loss {
                SvmLoss::Hinge => short,
                SvmLoss::SquaredHinge => short * short,
            }
        });
        let objective = 0.5 * norm + c * losses.sum::<f64>();
        let terms = alpha.iter().map(|a| a - 0.5 * diagonal * a * a);
        let dual = terms.sum::<f64>() - 0.5 * norm;
        let fit = ClassFit {
            epochs,
            converged,
            objective,
            gap: objective - dual,
        };
        let weights = w.into_iter().map(|v| v as f32).collect();
        (weights, bias as f32, fit)
    }
}

/// Smallest and largest projected gradient of an epoch.
#[derive(Clone, Copy)]
struct Range {
    least: f64,
    most: f64,
}

impl Range {
    const WHOLE: Self = Self {
        least: f64::NEG_INFINITY,
        most: f64::INFINITY,
    };
    const EMPTY: Self = Self {
        least: f64::INFINITY,
        most: f64::NEG_INFINITY,
    };

    fn add(&mut self, value: f64) {
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    /// Beyond which a variable at its bound leaves in the next epoch; without meaning, infinite, on the
    /// wrong side of 0.
    fn as_bounds(self) -> Self {
        Self {
            least: if self.least < 0.0 {
                self.least
            } else {
                f64::NEG_INFINITY
            },
            most: if self.most > 0.0 {
                self.most
            } else {
                f64::INFINITY
            },
        }
    }
}

/// Random numbers of a class.
fn order(seed: u64, class: usize) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(class as u64).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Fisher and Yates; written out, since `rand`'s may change between versions.
fn shuffle(places: &mut [usize], random: &mut ChaCha8Rng) {
    for last in (1..places.len()).rev() {
        let below = (u64::from(random.next_u32()) * (last as u64 + 1)) >> 32;
        places.swap(last, below as usize);
    }
}

const LANES: usize = 8;

/// `xᵀw`, in lanes of a fixed number: vectorises, and the order is fixed.
fn dot(x: &[f32], w: &[f64]) -> f64 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (w_blocks, w_rest) = w.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (x, w) in blocks.iter().zip(w_blocks) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(x[lane]) * w[lane];
        }
    }
    let tail: f64 = rest
        .iter()
        .zip(w_rest)
        .map(|(x, w)| f64::from(*x) * w)
        .sum();
    lanes.iter().sum::<f64>() + tail
}

/// `w ← w + step x`
fn add(step: f64, x: &[f32], w: &mut [f64]) {
    for (w, x) in w.iter_mut().zip(x) {
        *w += step * f64::from(*x);
    }
}
