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
mod search;

pub use choice::{Choice, Choices, Opened, beside, name};
pub use error::{Error, Result, is_out_of_memory};
pub use found::{Found, Gpu, Library, found, gpu_of, peak_memory};
pub use precision::{Precision, precision, set_precision};
pub use search::{Search, search, set_search};
