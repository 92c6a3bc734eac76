//! Training ops, losses, optimisers and schedules on candle, each op with its own adjoint.
//!
//! candle's autograd is the tape; the heavy nodes are the custom ops of [`ops`], because candle's
//! own are slow to differentiate or wrong (its max-pool gradient is). Layers that own parameters
//! are in [`layers`], parameters by name in [`Vars`].
//!
//! Every sum over a batch is cut into pieces that depend on shapes alone, so results are the same
//! bits for any number of threads.

mod blocked;
mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod error;
pub mod golden;
mod init;
pub mod layers;
mod ledger;
mod mode;
pub mod ops;
mod optim;
mod philox;
mod record;
mod schedule;
mod tape;
mod vars;

pub use error::{Error, Result};
pub use init::Init;
pub use ledger::{Entries, Ledger};
pub use mode::Mode;
pub use optim::{
    AdamW, AdamWConfig, Decay, Ema, Optimizer, ParamGroup, Sgd, SgdConfig, clip_grad_norm,
    clip_grad_value, grad_norm, grad_squares,
};
pub use record::{LayerRecord, LayerValues, largest_magnitude, record, record_values};
pub use schedule::Schedule;
pub use vars::{Buffer, Scope, Vars};
