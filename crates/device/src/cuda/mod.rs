//! What ops need of a GPU.

mod blas;
mod dnn;
mod graph;
mod launch;
mod memory;
mod nccl;
mod open;
mod solver;
mod upload;

pub use crate::Precision;
pub use blas::{Gemm, gemm};
pub use cudarc::driver::DeviceRepr;
pub use dnn::{Along, Convolution, Pass, can_convolve, convolve};
pub use graph::{Recording, record};
pub use half::bf16;
pub use launch::{Argument, Grid, Module, int, launch, launch_with, launches, long, pointer, real};
pub use memory::{
    Input, Output, Real, address, copy, duplicate, input, input_of, read_back, with_bytes,
    with_table,
};
pub use nccl::{Communicator, Exchange, Moved};
pub use open::{capability, found, multiprocessors, open, shared_memory};
pub use solver::{Eigensolver, SingularSolver, Squares, eigen, singular};
pub use upload::Uploads;

pub(crate) use open::{call, peak_memory};

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
        /// The iteration of the covariance layer in one launch of clusters; for compute capability 9.0.
        CLUSTER = "cluster";
        /// What convolutions need beside cuDNN, and layouts.
        CONVOLUTION = "convolution";
        /// Dropout.
        DROPOUT = "dropout";
        /// What follows cuBLAS in the baselines of the covariance layer.
        EPILOGUE = "epilogue";
        /// The iteration of the covariance layer in one launch.
        FUSED = "fused";
        /// Images before the first layer, and what is kept of a step.
        IMAGES = "images";
        /// Linear layer and loss.
        LINEAR = "linear";
        /// Batch normalisation.
        NORM = "norm";
        /// Optimisers, over all parameters at once.
        OPTIMISER = "optimiser";
        /// The covariance layer, but for its products.
        POOLING = "pooling";
        /// Rectifiers.
        RELU = "relu";
        /// The channels of two maps as those of one.
        SHUFFLE = "shuffle";
        /// Functions by eigendecomposition, but for that and for products.
        SPECTRAL = "spectral";
        /// Products of symmetric matrices.
        SYMMETRIC = "symmetric";
        /// Pooling over windows and local response normalisation.
        WINDOWS = "windows";
    }
}
