//! What the tests of this workspace and `isqrt doctor` share: gradient checks, comparisons that say where two
//! tensors differ, golden files, and random tensors that are the same on every machine.
//!
//! Start with [`gradcheck`] and [`assert_close!`].

pub mod candle_ops;
mod close;
mod golden;
mod gradcheck;
mod random;

pub use close::{Tolerance, Values, compare, relative_error};
pub use golden::Golden;
pub use gradcheck::{Gradcheck, gradcheck};
pub use random::{hashed, hashed_weights, randn, uniform};
