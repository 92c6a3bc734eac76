//! A stand-in for NVIDIA's CUDA libraries that runs on the CPU; see README.md.

// The exported functions have C's names and C's contracts about their pointers.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

pub mod blas;
pub mod device;
pub mod dnn;
pub mod driver;
pub mod memory;
pub mod nccl;
pub mod nvrtc;
pub mod ptx;
pub mod rand;
pub mod solver;
pub mod stream;
