//! The polynomials of the coupled iteration.
//!
//! A step multiplies `Y` and `Z` by a polynomial `T = c₀I + c₁M + … + c₄M⁴` in `M = ZY`. On an
//! eigenvalue `λ` of `A`, with `x² = λ·(product of earlier T)²`, it maps `x` to the odd polynomial
//! `p(x) = c₀x + c₁x³ + … + c₄x⁹`; the root is exact where `x` has come to 1. Newton–Schulz is the
//! Taylor choice `(3/2, -1/2)`. A minimax schedule takes, step by step, the odd polynomial that is
//! closest to 1 on the interval in which `x` can still lie, given a lower bound of `x = √λ` at the
//! start.

use crate::Result;
use crate::config::out_of_range;

/// Coefficients of a step's `T` by powers of `M`.
pub type Polynomial = [f64; 5];

/// The highest power of `M` in a step's `T`.
pub fn degree(step: &Polynomial) -> usize {
    step.iter().rposition(|&c| c != 0.0).unwrap_or(0)
}

/// A sequence of steps.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// The paper's: `a = 3/2`, `b = -1/2`.
    NewtonSchulz {
        /// `N`, at least 1.
        iterations: usize,
    },
    /// Minimax with cubic steps, as many products a step as Newton–Schulz.
    Cubic {
        /// At least 1.
        steps: usize,
        /// Lower bound of the square roots of the eigenvalues of `A` that matter, in (0, 1).
        lower: f64,
    },
    /// Minimax with quintic steps, one product a step more.
    Quintic {
        /// At least 1.
        steps: usize,
        /// As for the cubic schedule.
        lower: f64,
    },
    /// Minimax with steps of degree nine, one product a step more than quintic ones. The first
    /// step alone takes as many products as two cubic ones on the Gram side, of which it is the
    /// best common polynomial.
    Nonic {
        /// At least 1.
        steps: usize,
        /// As for the cubic schedule.
        lower: f64,
    },
    /// Given `(a, b, c)` of each step, `T = aI + bM + cM²`.
    Given(Vec<[f64; 3]>),
}

impl Schedule {
    /// Steps that a schedule may have.
    pub const MOST_STEPS: usize = 60;

    /// The polynomial of each step.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for no steps, more than 60, a lower bound outside `(0, 1)`, or
    /// coefficients that are not finite.
    pub fn coefficients(&self) -> Result<Vec<Polynomial>> {
        let count = |option, steps: usize| {
            if (1..=Self::MOST_STEPS).contains(&steps) {
                Ok(steps)
            } else {
                Err(out_of_range(option, steps, "1 to 60 steps"))
            }
        };
        match self {
            Self::NewtonSchulz { iterations } => Ok(vec![
                [1.5, -0.5, 0.0, 0.0, 0.0];
                count("iterations", *iterations)?
            ]),
            Self::Cubic { steps, lower } => {
                minimax(count("steps", *steps)?, check_lower(*lower)?, cubic)
            }
            Self::Quintic { steps, lower } => {
                minimax(count("steps", *steps)?, check_lower(*lower)?, quintic)
            }
            Self::Nonic { steps, lower } => {
                minimax(count("steps", *steps)?, check_lower(*lower)?, nonic)
            }
            Self::Given(coefficients) => {
                count("the number of coefficients", coefficients.len())?;
                if coefficients.iter().flatten().any(|x| !x.is_finite()) {
                    return Err(out_of_range("coefficients", coefficients, "finite numbers"));
                }
                let padded = |&[a, b, c]: &[f64; 3]| [a, b, c, 0.0, 0.0];
                Ok(coefficients.iter().map(padded).collect())
            }
        }
    }

    /// By how much what rounding leaves in a direction where the covariance vanishes grows in all
    /// steps together: the product of their first coefficients, `1.5^N` for Newton–Schulz.
    ///
    /// # Errors
    /// As [`coefficients`](Self::coefficients).
    pub fn growth(&self) -> Result<f64> {
        let steps = self.coefficients()?;
        Ok(steps.iter().map(|step| step[0].abs()).product())
    }

    /// The option that says how many steps there are.
    pub(crate) fn count(&self) -> &'static str {
        match self {
            Self::NewtonSchulz { .. } => "iterations",
            Self::Given(_) => "coefficients",
            _ => "steps",
        }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        match self {
            Self::NewtonSchulz { iterations } => *iterations,
            Self::Cubic { steps, .. } | Self::Quintic { steps, .. } | Self::Nonic { steps, .. } => {
                *steps
            }
            Self::Given(coefficients) => coefficients.len(),
        }
    }

    /// A short name such as `newton-schulz` or `cubic(0.1)`.
    pub fn name(&self) -> String {
        match self {
            Self::NewtonSchulz { .. } => "newton-schulz".into(),
            Self::Cubic { lower, .. } => format!("cubic({lower})"),
            Self::Quintic { lower, .. } => format!("quintic({lower})"),
            Self::Nonic { lower, .. } => format!("nonic({lower})"),
            Self::Given(_) => "given".into(),
        }
    }
}

fn check_lower(lower: f64) -> Result<f64> {
    if lower > 0.0 && lower < 1.0 {
        Ok(lower)
    } else {
        Err(out_of_range("lower", lower, "a number in (0, 1)"))
    }
}

/// Minimax step for an interval: coefficients and the error `max |p - 1|`.
type Step = fn(f64, f64) -> (Polynomial, f64);

fn minimax(steps: usize, lower: f64, step: Step) -> Result<Vec<Polynomial>> {
    let (mut low, mut high) = (lower, 1.0);
    Ok((0..steps)
        .map(|_| {
            let (coefficients, error) = step(low, high);
            (low, high) = (1.0 - error, 1.0 + error);
            coefficients
        })
        .collect())
}

/// `ax + bx³` closest to 1 on `[l, u]`: equal at both ends, and as far above 1 at its maximum as
/// below at the ends.
fn cubic(l: f64, u: f64) -> (Polynomial, f64) {
    let squares = u * u + u * l + l * l;
    let top = (squares / 3.0).sqrt();
    // With p = b(squares·x - x³): p(l) + p(top) = 2 fixes b.
    let end = squares * l - l * l * l;
    let b = 2.0 / (end + squares * top - top * top * top);
    let coefficients = [b * squares, -b, 0.0, 0.0, 0.0];
    (coefficients, (1.0 - b * end).max(0.0))
}

/// `c₀x + c₁x³ + c₂x⁵` closest to 1 on `[l, u]`.
fn quintic(l: f64, u: f64) -> (Polynomial, f64) {
    remez([15.0, -10.0, 3.0, 0.0, 0.0].map(|c| c / 8.0), 2.5, (l, u))
}

/// `c₀x + … + c₄x⁹` closest to 1 on `[l, u]`.
fn nonic(l: f64, u: f64) -> (Polynomial, f64) {
    let taylor = [315.0, -420.0, 378.0, -180.0, 35.0].map(|c| c / 128.0);
    remez(taylor, 7.875, (l, u))
}

/// The odd polynomial closest to 1 on an interval, with as many terms as `taylor`, by the Remez
/// exchange. `taylor` is the one that agrees with 1 as closely as possible at 1, where its error
/// is `first (1 - x)^terms + ...`.
fn remez(taylor: Polynomial, first: f64, (l, u): (f64, f64)) -> (Polynomial, f64) {
    let terms = degree(&taylor) + 1;
    let half = 0.5 * (u - l) / (0.5 * (u + l));
    let narrow = first * half.powi(terms as i32);
    if narrow < 1e-9 {
        // Points so close to each other leave the system below without digits, and the Taylor
        // polynomial about the middle is good enough.
        let m: f64 = 2.0 / (l + u);
        let mut coefficients = taylor;
        for (power, c) in coefficients.iter_mut().enumerate() {
            *c *= m.powi(2 * power as i32 + 1);
        }
        return (coefficients, 1.2 * narrow);
    }
    let value = |c: &Polynomial, x: f64| {
        let square = x * x;
        x * c.iter().rev().fold(0.0, |sum, c| sum * square + c)
    };
    let slope = |c: &Polynomial, x: f64| {
        let weighted = |(power, c): (usize, &f64)| (2 * power + 1) as f64 * c;
        let terms = c.iter().enumerate().map(weighted);
        terms.rev().fold(0.0, |sum, c| sum * x * x + c)
    };
    // Chebyshev nodes to start with; both ends stay, the others move to the extrema.
    let chebyshev = |i: usize| (std::f64::consts::PI * i as f64 / terms as f64).cos();
    let mut nodes: Vec<f64> = (0..=terms)
        .map(|i| l + (u - l) * 0.5 * (1.0 - chebyshev(i)))
        .collect();
    let mut coefficients = taylor;
    for _ in 0..100 {
        // p(x_i) + (-1)^i e = 1: with p(l) = 1 - e first, i.e. signs +, -, +, -, ...
        let system = nodes.iter().enumerate().map(|(i, x)| {
            let mut row: Vec<f64> = (0..terms).map(|k| x.powi(2 * k as i32 + 1)).collect();
            row.extend([if i % 2 == 0 { 1.0 } else { -1.0 }, 1.0]);
            row
        });
        let solution = solve(system.collect());
        coefficients = Polynomial::default();
        coefficients[..terms].copy_from_slice(&solution[..terms]);
        // Extrema lie where the slope changes its sign, one between the nodes' neighbours each.
        let moved = extrema((l, u), |x| slope(&coefficients, x));
        if moved.len() + 2 != nodes.len() {
            break;
        }
        let mut change = 0.0_f64;
        for (node, x) in nodes[1..].iter_mut().zip(moved) {
            change = change.max((*node - x).abs());
            *node = x;
        }
        // The error at an extremum changes with the square of its place.
        if change <= 1e-9 * u {
            break;
        }
    }
    let error = |x: &f64| (1.0 - value(&coefficients, *x)).abs();
    let worst = nodes.iter().map(error).fold(0.0, f64::max);
    (coefficients, worst)
}

/// Zeros of a slope inside an interval, by bisection between the points of a grid.
fn extrema((l, u): (f64, f64), slope: impl Fn(f64) -> f64) -> Vec<f64> {
    const GRID: usize = 100;
    let point = |i: usize| {
        let angle = std::f64::consts::PI * i as f64 / GRID as f64;
        l + (u - l) * 0.5 * (1.0 - angle.cos())
    };
    let crossing = |i: usize| {
        let (mut from, mut to) = (point(i), point(i + 1));
        let rising = slope(from) < 0.0;
        if rising == (slope(to) < 0.0) {
            return None;
        }
        for _ in 0..60 {
            let middle = 0.5 * (from + to);
            if (slope(middle) < 0.0) == rising {
                from = middle;
            } else {
                to = middle;
            }
        }
        Some(0.5 * (from + to))
    };
    (0..GRID).filter_map(crossing).collect()
}

/// Gaussian elimination with partial pivoting of a square system with its right-hand side.
fn solve(mut system: Vec<Vec<f64>>) -> Vec<f64> {
    let n = system.len();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&i, &j| system[i][column].abs().total_cmp(&system[j][column].abs()))
            .unwrap_or(column);
        system.swap(column, pivot);
        let pivot_row = system[column].clone();
        for row in system.iter_mut().skip(column + 1) {
            let factor = row[column] / pivot_row[column];
            for (value, above) in row.iter_mut().zip(&pivot_row) {
                *value -= factor * above;
            }
        }
    }
    let mut solution = vec![0.0; n];
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|j| system[row][j] * solution[j]).sum();
        solution[row] = (system[row][n] - known) / system[row][row];
    }
    solution
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Error;

    fn apply(steps: &[Polynomial], mut x: f64) -> f64 {
        for step in steps {
            let term = |(power, c): (usize, &f64)| c * x.powi(2 * power as i32 + 1);
            x = step.iter().enumerate().map(term).sum();
        }
        x
    }

    #[test]
    fn cubic_agrees_with_published_coefficients() {
        // Independent numpy experiment on [0.1, 1].
        let found = Schedule::Cubic {
            steps: 3,
            lower: 0.1,
        }
        .coefficients()
        .unwrap();
        let known = [
            (3.963405, -3.570635),
            (1.84974, -0.549092),
            (1.584018, -0.511949),
        ];
        for ([a, b, ..], (ka, kb)) in found.into_iter().zip(known) {
            assert!((a - ka).abs() < 2e-5 && (b - kb).abs() < 2e-5, "{a} {b}");
        }
    }

    #[test]
    fn quintic_agrees_with_published_coefficients() {
        let found = Schedule::Quintic {
            steps: 3,
            lower: 0.03,
        }
        .coefficients()
        .unwrap();
        let known = [
            [7.362528, -20.743396, 15.160552, 0.0, 0.0],
            [2.917538, -2.182405, 0.475529, 0.0, 0.0],
            [2.04631, -1.429475, 0.393352, 0.0, 0.0],
        ];
        for (found, known) in found.iter().flatten().zip(known.iter().flatten()) {
            assert!(
                (found - known).abs() < 2e-5 * known.abs().max(1.0),
                "{found} {known}"
            );
        }
    }

    /// Numbers of an independent Remez exchange in double precision.
    #[test]
    fn nonic_agrees_with_an_independent_computation() {
        let lower = 0.1;
        let found = Schedule::Nonic { steps: 1, lower }.coefficients().unwrap()[0];
        let known = [7.93444, -55.99974, 166.63797, -202.47327, 85.16151];
        for (found, known) in found.iter().zip(known) {
            assert!((found - known).abs() < 1e-4, "{found} {known}");
        }
    }

    #[test]
    fn minimax_equioscillates_and_converges() {
        for lower in [0.5, 0.1, 0.01, 1e-3] {
            for schedule in [
                Schedule::Cubic { steps: 30, lower },
                Schedule::Quintic { steps: 20, lower },
                Schedule::Nonic { steps: 12, lower },
            ] {
                let all = schedule.coefficients().unwrap();
                // The first step: the error at both ends and inside is the same.
                let errors: Vec<f64> = (0..=10_000)
                    .map(|i| 1.0 - apply(&all[..1], lower + (1.0 - lower) * i as f64 / 1e4))
                    .collect();
                let most = errors.iter().fold(0.0_f64, |m, e| m.max(e.abs()));
                assert!((errors[0] - most).abs() < 1e-6, "{lower} {most}");
                assert!((errors[10_000].abs() - most).abs() < 1e-6);
                for i in 0..=100 {
                    let x = lower + (1.0 - lower) * f64::from(i) / 100.0;
                    assert!((apply(&all, x) - 1.0).abs() < 1e-12, "{schedule:?} {x}");
                }
            }
        }
    }

    #[test]
    fn refuses_nonsense() {
        for schedule in [
            Schedule::NewtonSchulz { iterations: 0 },
            Schedule::NewtonSchulz { iterations: 1000 },
            Schedule::Cubic {
                steps: 3,
                lower: 0.0,
            },
            Schedule::Quintic {
                steps: 0,
                lower: 0.1,
            },
            Schedule::Cubic {
                steps: 3,
                lower: f64::NAN,
            },
            Schedule::Given(vec![]),
            Schedule::Given(vec![[f64::INFINITY, 0.0, 0.0]]),
        ] {
            assert!(
                matches!(schedule.coefficients(), Err(Error::Option { .. })),
                "{schedule:?}"
            );
        }
    }
}
