//! DeepO²P: the matrix logarithm of the second moment.

use super::{Scalar, Spectral};
use crate::Result;
use crate::config::{Output, positive};
use crate::moment::{Moment, pool};
use candle_core::Tensor;

/// Second-order pooling with a matrix logarithm.
///
/// Ionescu, Vantzos, Sminchisescu, *Matrix Backpropagation for Deep Networks with Structured Layers*
/// (ICCV 2015): `C = log(XXᵀ/M + εI) = U diag(log(λ + ε)) Uᵀ`.
///
/// # Choices
/// - The moment is about zero, not about the mean: second-order pooling averages the outer products
///   `xxᵀ` of the features as they are, here (the method names `o2p_avg_...` of the authors' tests,
///   `my_test_nnlayers.m`) as in O2P before it.
/// - `ε = 1e-3`, the value with which the same tests check the logarithm.
/// - Computed from the `d x d` moment. The paper takes the decomposition of `X` itself, with the same
///   singular vectors.
///
/// # Known troubles
/// The logarithm makes much of small eigenvalues: of the `d - M` zero ones it makes `log ε` (-6.9),
/// so `ε` decides on most of the output where features are few.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeepO2P {
    /// What is added to the eigenvalues, above 0.
    pub epsilon: f64,
    /// Form of the output.
    pub output: Output,
}

impl Default for DeepO2P {
    fn default() -> Self {
        Self {
            epsilon: 1e-3,
            output: Output::Triangle,
        }
    }
}

impl DeepO2P {
    /// Checks the options; `forward` does so too.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) names the option.
    pub fn validate(&self) -> Result<()> {
        positive("epsilon", self.epsilon)
    }

    /// Pools feature maps, differentiably. Zero features give `log ε` on the diagonal, and zero
    /// gradients.
    ///
    /// # Shapes
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Errors
    /// As there, and [`Error::Decomposition`](crate::Error::Decomposition).
    ///
    /// # Cost
    /// See [the module](super).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.validate()?;
        let function = ShiftedLog(self.epsilon);
        let output = self.output;
        pool(x, Moment::ABOUT_ZERO, Spectral { function, output })
    }
}

/// `log(λ + ε)`.
struct ShiftedLog(f64);

impl Scalar for ShiftedLog {
    fn value(&self, eigenvalue: f64) -> f64 {
        (eigenvalue + self.0).ln()
    }

    fn divided_difference(&self, a: f64, b: f64) -> f64 {
        let (low, high) = if a < b { (a, b) } else { (b, a) };
        let (gap, base) = (high - low, low + self.0);
        match gap == 0.0 {
            true => 1.0 / base,
            false => (gap / base).ln_1p() / gap,
        }
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> super::gpu::Function {
        super::gpu::Function::Log { epsilon: self.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_differences_are_finite_and_right() {
        let function = ShiftedLog(1e-3);
        super::super::tests::check(&function, |x| 1.0 / (x + 1e-3));
        assert!((function.divided_difference(0.0, 0.0) - 1e3).abs() < 1e-9);
    }
}
