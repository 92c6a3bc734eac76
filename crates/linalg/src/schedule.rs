//! The polynomials of the coupled iteration.
//!
//! A step multiplies `Y` and `Z` by `T = aI + bM + cM²` with `M = ZY`. On an eigenvalue `λ` of
//! `A`, with `x² = λ·(product of earlier T)²`, it maps `x` to `p(x) = ax + bx³ + cx⁵`; the root is
//! exact where `x` has come to 1. Newton–Schulz is the Taylor choice `(3/2, -1/2, 0)`. A minimax
//! schedule takes, step by step, the odd polynomial that is closest to 1 on the interval in which
//! `x` can still lie, given a lower bound of `x = √λ` at the start.

use crate::Result;
use crate::config::out_of_range;

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
    /// Given `(a, b, c)` of each step.
    Given(Vec<[f64; 3]>),
}

/// Steps that a schedule may have; more only grow the null space (`1.5^N`) beyond f32.
const MOST: usize = 60;

impl Schedule {
    /// `(a, b, c)` of each step.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for no steps, more than 60, a lower bound outside `(0, 1)`, or
    /// coefficients that are not finite.
    pub fn coefficients(&self) -> Result<Vec<[f64; 3]>> {
        let count = |option, steps: usize| {
            if (1..=MOST).contains(&steps) {
                Ok(steps)
            } else {
                Err(out_of_range(option, steps, "1 to 60 steps"))
            }
        };
        match self {
            Self::NewtonSchulz { iterations } => {
                Ok(vec![[1.5, -0.5, 0.0]; count("iterations", *iterations)?])
            }
            Self::Cubic { steps, lower } => {
                minimax(count("steps", *steps)?, check_lower(*lower)?, cubic)
            }
            Self::Quintic { steps, lower } => {
                minimax(count("steps", *steps)?, check_lower(*lower)?, quintic)
            }
            Self::Given(coefficients) => {
                count("the number of coefficients", coefficients.len())?;
                if coefficients.iter().flatten().any(|x| !x.is_finite()) {
                    return Err(out_of_range("coefficients", coefficients, "finite numbers"));
                }
                Ok(coefficients.clone())
            }
        }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        match self {
            Self::NewtonSchulz { iterations } => *iterations,
            Self::Cubic { steps, .. } | Self::Quintic { steps, .. } => *steps,
            Self::Given(coefficients) => coefficients.len(),
        }
    }

    /// A short name such as `newton-schulz` or `cubic(0.1)`.
    pub fn name(&self) -> String {
        match self {
            Self::NewtonSchulz { .. } => "newton-schulz".into(),
            Self::Cubic { lower, .. } => format!("cubic({lower})"),
            Self::Quintic { lower, .. } => format!("quintic({lower})"),
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
type Step = fn(f64, f64) -> ([f64; 3], f64);

fn minimax(steps: usize, lower: f64, step: Step) -> Result<Vec<[f64; 3]>> {
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
fn cubic(l: f64, u: f64) -> ([f64; 3], f64) {
    let squares = u * u + u * l + l * l;
    let top = (squares / 3.0).sqrt();
    // With p = b(squares·x - x³): p(l) + p(top) = 2 fixes b.
    let end = squares * l - l * l * l;
    let b = 2.0 / (end + squares * top - top * top * top);
    ([b * squares, -b, 0.0], (1.0 - b * end).max(0.0))
}

/// `ax + bx³ + cx⁵` closest to 1 on `[l, u]`, by the Remez exchange on four points.
fn quintic(l: f64, u: f64) -> ([f64; 3], f64) {
    if u - l < 1e-3 * u {
        // Four points so close to each other leave the system below without digits, and the
        // Taylor polynomial about the middle is as good: 1 - p(x) = 5/2 (1 - x)³ + ...
        let m = 2.0 / (l + u);
        let [a, b, c] = [15.0 / 8.0, -10.0 / 8.0, 3.0 / 8.0];
        let error = 3.0 * (0.5 * (u - l) * m).powi(3);
        return ([a * m, b * m.powi(3), c * m.powi(5)], error);
    }
    // Two interior extrema; Chebyshev nodes to start with.
    let mut nodes = [0.25, 0.75].map(|t| l + (u - l) * t);
    let mut coefficients = [0.0; 3];
    let mut error = 0.0;
    for _ in 0..100 {
        let points = [l, nodes[0], nodes[1], u];
        // p(x_i) + (-1)^i e = 1: with p(l) = 1 - e first, i.e. signs +, -, +, -.
        let mut system = [[0.0; 5]; 4];
        for (i, (row, x)) in system.iter_mut().zip(points).enumerate() {
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            *row = [x, x.powi(3), x.powi(5), sign, 1.0];
        }
        let [a, b, c, e] = solve(system);
        (coefficients, error) = ([a, b, c], e.abs());
        // p'(x) = a + 3bx² + 5cx⁴ = 0
        let discriminant = (9.0 * b * b - 20.0 * a * c).max(0.0).sqrt();
        let mut moved = [(-3.0 * b - discriminant), (-3.0 * b + discriminant)]
            .map(|numerator| (numerator / (10.0 * c)).max(0.0).sqrt().clamp(l, u));
        moved.sort_by(f64::total_cmp);
        let change = (moved[0] - nodes[0]).abs() + (moved[1] - nodes[1]).abs();
        nodes = moved;
        if change <= 1e-14 * u {
            break;
        }
    }
    (coefficients, error)
}

/// Gaussian elimination with partial pivoting of a 4x4 system with its right-hand side.
fn solve(mut system: [[f64; 5]; 4]) -> [f64; 4] {
    for column in 0..4 {
        let pivot = (column..4)
            .max_by(|&i, &j| system[i][column].abs().total_cmp(&system[j][column].abs()))
            .unwrap_or(column);
        system.swap(column, pivot);
        let pivot_row = system[column];
        for row in system.iter_mut().skip(column + 1) {
            let factor = row[column] / pivot_row[column];
            for (value, above) in row.iter_mut().zip(pivot_row) {
                *value -= factor * above;
            }
        }
    }
    let mut solution = [0.0; 4];
    for row in (0..4).rev() {
        let known: f64 = (row + 1..4).map(|j| system[row][j] * solution[j]).sum();
        solution[row] = (system[row][4] - known) / system[row][row];
    }
    solution
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Error;

    fn apply(coefficients: &[[f64; 3]], mut x: f64) -> f64 {
        for [a, b, c] in coefficients {
            x = a * x + b * x.powi(3) + c * x.powi(5);
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
        for ([a, b, _], (ka, kb)) in found.into_iter().zip(known) {
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
            [7.362528, -20.743396, 15.160552],
            [2.917538, -2.182405, 0.475529],
            [2.04631, -1.429475, 0.393352],
        ];
        for (found, known) in found.iter().flatten().zip(known.iter().flatten()) {
            assert!(
                (found - known).abs() < 2e-5 * known.abs().max(1.0),
                "{found} {known}"
            );
        }
    }

    #[test]
    fn minimax_equioscillates_and_converges() {
        for lower in [0.5, 0.1, 0.01, 1e-3] {
            for schedule in [
                Schedule::Cubic { steps: 30, lower },
                Schedule::Quintic { steps: 20, lower },
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
