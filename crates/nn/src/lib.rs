//! Training ops, losses, optimisers and schedules on candle, each with its own adjoint.
