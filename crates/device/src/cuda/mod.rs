//! What ops need of a GPU.

mod blas;
mod launch;
mod memory;
mod open;

pub use blas::{Gemm, Precision, gemm};
pub use cudarc::driver::DeviceRepr;
pub use launch::{Argument, Grid, Module, int, launch, launch_with, long, pointer, real};
pub use memory::{Input, Output, Real, input, input_of, read_back, with_bytes};
pub use open::{found, open};

pub(crate) use open::call;

/// The kernels of `kernels/*.cu`.
pub mod kernels {
    use super::Module;

    macro_rules! modules {
        ($($(#[$about:meta])* $name:ident = $file:literal;)*) => {$(
            $(#[$about])*
            pub const $name: Module = Module {
                name: $file,
                ptx: include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")),
            };
        )*};
    }

    modules! {
        /// Linear layer and loss.
        LINEAR = "linear";
        /// The covariance layer, but for its products.
        POOLING = "pooling";
        /// Rectifiers.
        RELU = "relu";
        /// Products of symmetric matrices.
        SYMMETRIC = "symmetric";
    }
}
