//! Training or evaluation.

/// What a forward pass is for. Only layers that behave differently look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Batch statistics, which also update the running ones; dropout drops.
    Train,
    /// Running statistics, nothing is updated; dropout does nothing.
    Eval,
}
