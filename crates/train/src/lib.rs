//! The training engine: from an experiment file to a finished run.
//!
//! - [`spec`]: what an experiment file for `isqrt train` may say; [`layers`]: files laid over each other
//! - [`train`], [`Trainer`]: the loop, from a [`Job`] (a [`TrainConfig`] and images) to a trained network,
//!   which the experiments use too; an [`Observer`] hears of every step and epoch and can stop it
//! - [`Collective`]: what the ranks of a run say to each other; [`Rank`]: ranks with a device and a thread each
//! - [`Snapshot`], [`Saved`]: the state of a run, from which it goes on bit for bit
//! - [`run`](mod@run): a run folder with its lock, checkpoints, metrics and result
//!
//! One seed fixes weights, order and augmentation; results are the same bits for any number of
//! threads. Nothing here prints.

mod collective;
mod config;
pub mod data;
mod diagnostics;
mod engine;
mod error;
mod evaluate;
mod events;
mod feature_file;
mod feeder;
pub mod layers;
mod log;
pub mod machine;
mod metrics;
mod observer;
pub mod plan;
mod predict;
mod ranks;
pub mod run;
pub mod spec;
mod state;
mod svm;
mod svm_eval;
mod transforms;
mod trouble;
mod words;

pub use collective::{Collective, Named, Single};
pub use config::{GpuSpec, NonFinite, OptimiserSpec, Precision, TrainConfig};
pub use diagnostics::{root_distance, spectrum, stage_norms};
pub use engine::{Feed, Job, Trainer, train};
pub use error::{Error, Result, without_backtrace};
pub use evaluate::evaluate;
pub use events::EventWriter;
pub use feature_file::FeatureFile;
pub use log::{Diagnostics, Line, StepLine};
pub use metrics::{EpochMetrics, Evaluation, Tally, TrainResult};
pub use observer::{Moment, Observer, Silent, StepInfo};
pub use predict::{Prediction, lacks_means, predict, told_pipeline};
pub use ranks::Rank;
pub use spec::{Spec, SpecFile};
pub use state::{Progress, Saved, Snapshot};
pub use svm::{ClassFit, Svm, SvmConfig, SvmLoss, l2_normalise};
pub use transforms::Transforms;
pub use trouble::{Trouble, first_bad_gradient, first_non_finite};
pub use words::counted;
