//! Options of the layer.

use crate::reference::{Number, from_row_major, from_triangle, row_major, triangle};
use crate::{Error, Result, Schedule};
use faer::Mat;

/// Covariance pooling, with or without a matrix square root.
///
/// The default layer of the paper is [`CovPool::isqrt`]`(5)`.
#[derive(Clone, Debug, PartialEq)]
pub struct CovPool {
    /// The root, or `None` for the plain covariance.
    pub root: Option<Root>,
    /// Form of the output.
    pub output: Output,
    /// Instruction set; [`Kernel::Auto`] takes the best that the processor has.
    pub kernel: Kernel,
}

/// The matrix square root by a coupled iteration.
#[derive(Clone, Debug, PartialEq)]
pub struct Root {
    /// Which polynomials, and how many steps.
    pub schedule: Schedule,
    /// What the covariance is divided by before the iteration.
    pub pre_normalization: PreNormalization,
    /// Multiply by the square root of that divisor afterwards.
    pub post_compensation: bool,
    /// Which matrix the iteration runs on; the result is the same up to rounding.
    pub side: Side,
    /// What waits for the backward pass.
    pub memory: Memory,
}

/// The divisor `s` of pre-normalisation, `A = Σ/s`. Schatten norms, so that all eigenvalues of
/// `A` lie in `[0, 1]`, as the iteration needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreNormalization {
    /// `s = tr Σ`, the paper's default.
    #[default]
    Trace,
    /// `s = ‖Σ‖_F`.
    Frobenius,
    /// `s = (tr Σ⁸)^(1/8)`, the bound on the largest eigenvalue after three squarings of a power
    /// iteration on the whole matrix (Gelfand). Never below it, at most `rank^(1/8)` above it,
    /// and differentiable everywhere, which a power iteration on a vector is not.
    Spectral,
    /// `s = 1`: the caller vouches for a spectrum within the schedule's range.
    None,
}

impl PreNormalization {
    /// `p` of the Schatten norm; 0 for none.
    pub(crate) fn order(self) -> i32 {
        match self {
            Self::None => 0,
            Self::Trace => 1,
            Self::Frobenius => 2,
            Self::Spectral => 8,
        }
    }
}

impl PreNormalization {
    /// Largest [`growth`](Schedule::growth) of a schedule with f32 features: 13, 12 and 11 steps of
    /// Newton–Schulz. Within it f32 was measured to stay within 3e-3 of f64 on covariances without full
    /// rank, mostly far below; a few steps beyond it results are finite and wrong (`docs/numerics.md`,
    /// "How many steps"). The smaller the divisor, the more is there to grow.
    pub fn most_growth_f32(self) -> f64 {
        match self {
            Self::Trace => 200.0,
            Self::Frobenius => 130.0,
            Self::Spectral | Self::None => 90.0,
        }
    }
}

impl Root {
    /// Whether f32 features bear so many steps, see [`PreNormalization::most_growth_f32`].
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check_f32(&self) -> Result<()> {
        if self.schedule.growth()? <= self.pre_normalization.most_growth_f32() {
            return Ok(());
        }
        let (option, steps) = (self.schedule.count(), self.schedule.steps());
        Err(out_of_range(
            option,
            steps,
            "f32 features bear at most 13 steps of Newton-Schulz (12 with the Frobenius norm, 11 with a smaller \
             divisor) and fewer of faster schedules, or rounding outgrows the result: take fewer steps, or f64 features",
        ))
    }
}

/// The matrix that the iteration runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Side {
    /// Whichever takes fewer multiply-adds.
    #[default]
    Auto,
    /// The `d x d` covariance.
    Covariance,
    /// The `M x M` Gram matrix of the positions: `f(XXᵀ) = X q(XᵀX) Xᵀ` for `f(λ) = λ q(λ)`.
    Gram,
}

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// The iterates: at most `3(N-1)` matrices of the smaller side an image for Newton–Schulz and
    /// cubic steps, at most two more a step for quintic ones, `5N - 2` for nonic ones.
    #[default]
    Keep,
    /// Nothing; the backward pass runs the forward pass again.
    Lean,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Output {
    /// Upper triangle with diagonal, row by row, entries as they are: `(B, d(d+1)/2)`.
    #[default]
    Triangle,
    /// The whole matrix: `(B, d, d)`.
    Full,
}

impl Output {
    /// Values an image of `d` channels.
    pub fn len(self, d: usize) -> usize {
        match self {
            Self::Triangle => d * (d + 1) / 2,
            Self::Full => d * d,
        }
    }

    /// Shape of an image's values.
    pub(crate) fn shape(self, d: usize) -> Vec<usize> {
        match self {
            Self::Triangle => vec![self.len(d)],
            Self::Full => vec![d, d],
        }
    }

    /// The values of a matrix.
    pub(crate) fn read<T: Number>(self, matrix: &Mat<T>) -> Vec<T> {
        match self {
            Self::Triangle => triangle(matrix),
            Self::Full => row_major(matrix),
        }
    }

    /// The matrix that has these values, and zeros where it has none.
    pub(crate) fn matrix<T: Number>(self, d: usize, values: &[T]) -> Mat<T> {
        match self {
            Self::Triangle => from_triangle(d, values),
            Self::Full => from_row_major(d, d, values),
        }
    }
}

/// Instruction set of the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// The best that this processor has.
    #[default]
    Auto,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Kernel {
    /// Name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// What [`Kernel::Auto`] means on this machine, or an error if the processor has no such
    /// instructions.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn resolve(self) -> Result<Self> {
        crate::kernel::resolve(self)
    }
}

impl Default for Root {
    fn default() -> Self {
        Self {
            schedule: Schedule::NewtonSchulz { iterations: 5 },
            pre_normalization: PreNormalization::default(),
            post_compensation: true,
            side: Side::default(),
            memory: Memory::default(),
        }
    }
}

impl CovPool {
    /// iSQRT-COV with `iterations` Newton–Schulz steps, trace normalisation, post-compensation,
    /// upper triangle.
    pub fn isqrt(iterations: usize) -> Self {
        Self::with_schedule(Schedule::NewtonSchulz { iterations })
    }

    /// As [`CovPool::isqrt`], with another schedule.
    pub fn with_schedule(schedule: Schedule) -> Self {
        Self::with_root(Root {
            schedule,
            ..Root::default()
        })
    }

    /// Covariance pooling with this root, upper triangle.
    pub fn with_root(root: Root) -> Self {
        Self {
            root: Some(root),
            output: Output::default(),
            kernel: Kernel::default(),
        }
    }

    /// The covariance without a root.
    pub fn plain() -> Self {
        Self {
            root: None,
            output: Output::default(),
            kernel: Kernel::default(),
        }
    }

    /// Values an image for `d` channels: `d(d+1)/2`, or `d²` for the whole matrix.
    pub fn out_dim(&self, d: usize) -> usize {
        self.output.len(d)
    }

    /// Checks the options; [`CovPool::forward`] does so too.
    ///
    /// # Errors
    /// [`Error::Option`] names the option, [`Error::Kernel`] a missing instruction set.
    pub fn validate(&self) -> Result<()> {
        self.kernel.resolve()?;
        match &self.root {
            Some(root) => root.schedule.coefficients().map(drop),
            None => Ok(()),
        }
    }
}

pub(crate) fn out_of_range(
    option: &'static str,
    value: impl std::fmt::Debug,
    expected: &'static str,
) -> Error {
    Error::Option {
        option,
        value: format!("{value:?}"),
        expected,
    }
}

/// Checks an option that must be finite and above 0.
pub(crate) fn positive(option: &'static str, value: f64) -> Result<()> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(out_of_range(option, value, "a number above 0")),
    }
}

/// Checks an option that must be finite and not below 0.
pub(crate) fn not_negative(option: &'static str, value: f64) -> Result<()> {
    match value >= 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(out_of_range(option, value, "a number of at least 0")),
    }
}

/// Checks the number of steps of an iteration: more than 20 add up what rounding leaves of zero
/// eigenvalues, which grow by 1.5 a step, until f32 does not bear it.
pub(crate) fn iterations(value: usize) -> Result<()> {
    match (1..=20).contains(&value) {
        true => Ok(()),
        false => Err(out_of_range("iterations", value, "a number from 1 to 20")),
    }
}
