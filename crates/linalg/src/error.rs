//! What can go wrong in this crate, told so that the caller can mend it.

use crate::gpu_kernel::GpuKernel;

/// Errors of the covariance ops; each names the offending value and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is not `(B, C, H, W)` or `(B, C, M)`.
    #[error(
        "covariance pooling expects (batch, channels, height, width) or (batch, channels, positions), got shape {shape:?}"
    )]
    Shape {
        /// Shape of the input.
        shape: Vec<usize>,
    },
    /// The input has no channels or no positions.
    #[error("covariance pooling needs at least one channel and one position, got shape {shape:?}")]
    Empty {
        /// Shape of the input.
        shape: Vec<usize>,
    },
    /// The data type is neither `f32` nor `f64`.
    #[error("covariance pooling computes in f32 or f64, got {dtype}; convert the features first")]
    Dtype {
        /// Name of the data type.
        dtype: &'static str,
    },
    /// A value of the features is NaN or infinite.
    #[error("{what} of batch element {index} is not finite")]
    NonFinite {
        /// Position in the batch.
        index: usize,
        /// "a feature", "the gradient", ...
        what: &'static str,
    },
    /// An option is out of its range.
    #[error("{option} = {value} is out of range: {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The value given.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A way of computing on a GPU that does not have these options, or not for these features.
    #[error(
        "the layer's kernel `{kernel}` (gpu.layer) takes {expected}, got {got}; `auto` takes everything"
    )]
    GpuKernel {
        /// The kernel.
        kernel: GpuKernel,
        /// What it would take.
        expected: &'static str,
        /// What it was given.
        got: String,
    },
    /// The instruction set that was asked for is not there.
    #[error("the {kernel} kernel was asked for, but this processor has no {kernel}; choose auto")]
    Kernel {
        /// Name of the kernel.
        kernel: &'static str,
    },
    /// The device has no implementation.
    #[error(
        "covariance pooling needs all its tensors on one device, the CPU or (with the feature cuda) a GPU"
    )]
    Device,
    /// A dense decomposition did not converge.
    #[error("the {what} of batch element {index} did not converge")]
    Decomposition {
        /// Position in the batch.
        index: usize,
        /// "eigendecomposition", ...
        what: &'static str,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
