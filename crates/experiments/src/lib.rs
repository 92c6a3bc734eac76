//! Experiments as data: a TOML file becomes a plan of cells, cells become records, records become
//! a report.
//!
//! - [`spec`]: what a TOML file under `experiments/` may say, and reading it with its `extends` parts
//! - [`plan`]: rows x measures x seeds, the key of each cell, what is done already, how long it takes
//! - [`run`]: doing one cell: train a network, time a layer or a decomposition, measure a root
//! - [`record`]: the append-only `records.jsonl` of a run folder
//! - [`results`]: the records of one experiment, by row and metric
//! - [`claims`]: sentences about the paper's claims, decided by the numbers
//! - [`report`]: `report/index.html`, `report/report.md` and tables for other programs
//! - [`archive`]: results that stay in the repository, and the pages made of them
//!
//! Nothing here prints or exits: progress goes to a [`run::Progress`], errors are [`Error`]s.

pub mod archive;
pub mod claims;
pub mod doctor;
mod error;
pub mod files;
pub use isqrt_train::machine;
pub mod plan;
pub mod record;
pub mod report;
pub mod results;
pub mod run;
pub mod spec;
pub mod stats;

pub use error::{Error, Result};
