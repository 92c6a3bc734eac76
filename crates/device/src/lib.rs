//! Where tensors live: the choice of a device, and what ops need of a GPU.
//!
//! With the feature `cuda` there is `cuda`: what is installed ([`found`]), opening a device, the
//! kernels (`kernels/*.cu`, compiled to PTX when the crate is built), launches, and the calls of
//! cuBLAS, cuDNN and cuSOLVER that ops share. NVIDIA's libraries are opened when they are first used,
//! never when the program starts.

mod choice;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod found;
mod precision;

pub use choice::{Choice, Choices, Opened, beside, name};
pub use error::{Error, Result};
pub use found::{Found, Gpu, Library, found, gpu_of};
pub use precision::{Precision, precision, set_precision};
