//! Covariance pooling and functions of batched symmetric positive semi-definite matrices, forward
//! and adjoint.
//!
//! Start with [`CovPool`]: the iSQRT-COV layer of Li et al. (CVPR 2018) as one differentiable op
//! on candle tensors. `docs/method.md` derives what it computes.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use isqrt_linalg::CovPool;
//!
//! let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (2, 8, 4, 4), &Device::Cpu)?)?;
//! let pooled = CovPool::isqrt(5).forward(&x)?;
//! assert_eq!(pooled.dims(), [2, 36]);
//! let gradient = pooled.sum_all()?.backward()?;
//! assert!(gradient.get(&x).is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod approximant;
pub mod bench;
pub mod bilinear;
mod config;
mod count;
pub mod eig;
mod error;
pub mod golden;
#[cfg(feature = "cuda")]
mod gpu;
mod gpu_kernel;
mod kernel;
mod layer;
mod lyapunov;
mod moment;
mod program;
pub mod reference;
mod schedule;

/// Numbers and registers of an instruction set, for the kernels of `isqrt-nn`; not for users.
#[doc(hidden)]
pub mod simd {
    pub use crate::kernel::vector::{Element, Quad, Vector};
}

pub use config::{CovPool, Kernel, Memory, Output, PreNormalization, Root, Side};
pub use count::Factorisations;
pub use error::{Error, Result};
pub use gpu_kernel::{GpuKernel, Tf32, gpu_kernel, set_gpu_kernel};
pub use isqrt_device::Precision;
pub use layer::Description;
#[cfg(feature = "cuda")]
pub use layer::Replayed;
pub use layer::measured_kernels;
pub use schedule::{Polynomial, Schedule};
