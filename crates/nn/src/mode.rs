//! What a forward pass is for.

/// What a forward pass is for. Only layers that behave differently look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Batch statistics, which also update the running ones; dropout drops.
    Train,
    /// Training with the running statistics, for fine-tuning: they are constants, nothing updates
    /// them; dropout drops.
    Frozen,
    /// A pass of [`Train`](Self::Train) once more, for its gradients: the same values, and the
    /// running statistics, which the first pass has updated, stay what they are.
    Replay,
    /// Running statistics, nothing is updated; dropout does nothing.
    Eval,
}

impl Mode {
    /// Whether a backward pass follows and dropout drops.
    #[must_use]
    pub fn is_training(self) -> bool {
        self != Self::Eval
    }

    /// Whether batch norm takes the statistics of the batch and not the running ones.
    #[must_use]
    pub fn uses_batch_statistics(self) -> bool {
        matches!(self, Self::Train | Self::Replay)
    }

    /// Whether the running statistics move towards those of the batch.
    #[must_use]
    pub fn updates_statistics(self) -> bool {
        self == Self::Train
    }

    /// The mode in which a pass of this mode is computed again.
    #[must_use]
    pub fn replayed(self) -> Self {
        match self {
            Self::Train => Self::Replay,
            other => other,
        }
    }
}
