//! Image data sets: sources, decoding, one size, and batches for training. Knows no tensor library.
//!
//! The way of an image: [`list`] (or [`image_folder`] for that layout) lists a tree,
//! [`split`](fn@split) decides what trains, chooses and is reported on, [`decode_all`] makes an [`ImageSet`] of one size, a [`Loader`] makes
//! normalised batches of it. [`DataSet::open`] does the first three. [`e10`] writes the embedded
//! set, a tree like any other.
//!
//! One seed fixes splits, order, augmentation and embedded images, whatever the number of threads.

mod augment;
mod decode;
pub mod e10;
mod error;
mod folder;
mod listing;
mod loader;
mod random;
mod resize;
mod set;
mod source;
mod split;

pub use augment::Augment;
pub use decode::{Image, MAX_FILE_BYTES, MAX_PIXELS, decode, decode_file};
pub use error::{Error, Result};
pub use folder::{Folder, Sample, image_folder};
pub use listing::list_images;
pub use loader::{Batch, Epoch, Loader, LoaderConfig, levels};
pub use resize::{MAX_SIDE, Resize};
pub use set::{ChannelStats, DataSet, ImageSet, MAX_SET_BYTES, decode_all, open_image};
pub use source::{SOURCES, Source, list};
pub use split::{Split, TEST_SHARE, VAL_SHARE, split};
