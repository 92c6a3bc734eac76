//! An interpreter for PTX, the assembly text that nvcc makes of device code.

pub mod decode;
mod float;
mod memory;
mod ops;
pub mod parse;
pub mod run;
mod warp;

pub use decode::{Globals, Program};
pub use float::{tf32_even, to_odd};
pub use parse::Module;
pub use run::{Failure, FailureKind, Launch, launch};
