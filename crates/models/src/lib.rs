//! Backbones, representations (pooling heads) and the networks made of them.
//!
//! A network is backbone + representation + classifier, described by a [`ModelSpec`] and
//! built by [`Network::new`]. To add a backbone, write one file in `backbones/` and add one line to
//! [`BACKBONES`]; a representation likewise, in `representations/` and [`REPRESENTATIONS`]. A test
//! builds, differentiates, saves and loads every combination (deep backbones with one head each).

pub mod backbones;
pub mod bench;
pub mod checkpoint;
mod classifier;
mod describe;
mod error;
mod names;
mod network;
mod options;
pub mod representations;
mod whole_file;

pub use backbones::{BACKBONES, Backbone, BackboneEntry, BackboneSpec};
pub use checkpoint::Layout;
pub use classifier::ClassifierSpec;
pub use describe::{Description, Stage, stage_of};
pub use error::{Error, Result};
pub use names::{hint, in_words, nearest};
pub use network::{ModelSpec, Network};
pub use options::Options;
pub use representations::{
    REPRESENTATIONS, Representation, RepresentationEntry, RepresentationSpec,
};
pub use whole_file::{WholeFile, sync_folder_of};
