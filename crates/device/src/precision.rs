//! How products are rounded.

use std::sync::atomic::{AtomicBool, Ordering};

/// How products of f32 are computed on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// In f32.
    #[default]
    Full,
    /// On tensor cores, whose operands have 10 bits of mantissa (TF32).
    Tf32,
}

/// Whether networks may round to TF32.
static TF32: AtomicBool = AtomicBool::new(false);

/// How convolutions and linear layers of the whole program round products of f32 on a GPU from now on; in
/// full at first. The covariance layer has its own choice, the CPU none.
pub fn set_precision(precision: Precision) {
    TF32.store(precision == Precision::Tf32, Ordering::Relaxed);
}

/// What [`set_precision`] said last.
#[must_use]
pub fn precision() -> Precision {
    match TF32.load(Ordering::Relaxed) {
        true => Precision::Tf32,
        false => Precision::Full,
    }
}
