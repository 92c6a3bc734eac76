//! The training engine: from a [`TrainConfig`] and two image sets to a trained network and its
//! error, epoch by epoch.
//!
//! One seed fixes weights, order and augmentation; results are the same bits for any number of
//! threads. The engine prints nothing: an [`Observer`] hears of every step and epoch, and can stop
//! the run.

mod config;
mod engine;
mod error;
mod feature_file;
mod metrics;
mod observer;
mod predict;

pub use config::TrainConfig;
pub use engine::{evaluate, train, train_network};
pub use error::{Error, Result};
pub use feature_file::FeatureFile;
pub use metrics::{EpochMetrics, Evaluation, TrainResult};
pub use observer::{Observer, Silent};
pub use predict::{Prediction, predict};
