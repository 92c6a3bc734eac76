//! Image data sets: sources, formats, decoding, transforms, and batches for training. Knows no tensor
//! library.
//!
//! The way of an image: [`list`] names the samples of a folder, an archive or a list, [`split`](fn@split)
//! decides what trains, chooses and is reported on, a [`Pipeline`] makes the inputs of a network from the
//! bytes of a file, and a [`Loader`] batches of them, epoch after epoch. [`decode_all`] makes an
//! [`ImageSet`] in memory for a loader of small images; [`DataSet::open`] does all that for three parts.
//! [`verify`] checks what lies on disk; [`textures`], [`e10`] and [`miniature`] write small sets.
//!
//! One seed fixes splits, order, augmentation and embedded images, whatever the number of threads.

mod broken;
mod decode;
pub mod e10;
mod error;
pub mod formats;
mod lines;
mod listing;
mod loader;
mod manifest;
pub mod miniature;
mod random;
mod sample;
mod set;
mod sources;
mod split;
mod stats;
pub mod textures;
mod transforms;
pub mod verify;

pub use broken::{Broken, Skipped};
pub use decode::{
    DecodeOptions, Encoded, Image, MAX_FILE_BYTES, MAX_PIXELS, Region, decode, decode_file,
};
pub use error::{Error, Result};
pub use listing::list_images;
pub use loader::{Batch, Epoch, Images, Loader, LoaderConfig, Position, Remainder, Shard, levels};
pub use manifest::{Checksum, Manifest};
pub use sample::{Annotation, BoundingBox, Part, Root, Sample};
pub use set::{ChannelStats, DataSet, ImageSet, MAX_SET_BYTES, decode_all};
pub use sources::{
    IndexCache, ListOptions, Listing, SOURCES, Source, image_folder, list, list_with, recognise,
};
pub use split::{Split, TEST_SHARE, VAL_SHARE, split};
pub use stats::{PartStats, Spread, class_histogram, part_stats};
pub use transforms::{
    Filter, IMAGENET_MEAN, IMAGENET_STD, Key, MAX_SIDE, PRESETS, Pipeline, Preset, Scratch, Step,
};
