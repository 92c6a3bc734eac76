//! The layouts of data sets that can be listed, in one table.
//!
//! A layout is one file with a [`Source`] in it and one line in [`SOURCES`]; splitting, decoding and
//! batches are the same for all. `docs/adding-a-dataset.md` walks through it.

mod aircraft;
mod cars;
mod cub;
mod folder;
pub(crate) mod imagenet;
mod imagenet_archives;
mod list;
mod parts;
mod shards;
mod toy;

use std::path::{Path, PathBuf};

pub use folder::image_folder;
pub(crate) use folder::{MAX_DEPTH, collect, is_image_name};

use crate::sample::Sample;
use crate::{Error, Result};

/// A way in which a data set lies on disk.
#[derive(Debug)]
pub struct Source {
    /// Short name, as in records and for `isqrt data verify NAME`.
    pub name: &'static str,
    /// What is expected under the root, for people.
    pub layout: &'static str,
    /// Whether a folder or file looks like this layout. Looks at names only and never fails.
    pub recognises: fn(&Path) -> bool,
    /// Lists the samples of such a folder or file without opening an image.
    pub list: fn(&Path, &ListOptions) -> Result<Listing>,
}

/// What can be chosen when a data set is listed. The defaults are those of the literature.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListOptions {
    /// Which of several labels a data set is read with (FGVC-Aircraft: `variant`, `family`,
    /// `manufacturer`); none is the usual one.
    pub labels: Option<String>,
    /// Where indices of archives are kept.
    pub cache: IndexCache,
}

/// Where the index of an archive is kept, so that it is read through only once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum IndexCache {
    /// Beside the archive; not at all where that folder cannot be written, which is said in the log.
    #[default]
    Beside,
    /// In this folder.
    Folder(PathBuf),
    /// Nowhere.
    Off,
}

/// A data set as it lies on disk. [`crate::split`](fn@crate::split) turns it into train, val and test.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The folder or file that was asked for.
    pub root: PathBuf,
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Training samples.
    pub train: Vec<Sample>,
    /// Samples of the validation part, where the set has one.
    pub val: Option<Vec<Sample>>,
    /// Samples of the test part, where the set has one.
    pub test: Option<Vec<Sample>>,
}

impl Listing {
    /// The parts that the set has, with their names: train, then val and test where there are any.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &[Sample])> {
        [
            Some(("train", self.train.as_slice())),
            self.val.as_deref().map(|samples| ("val", samples)),
            self.test.as_deref().map(|samples| ("test", samples)),
        ]
        .into_iter()
        .flatten()
    }
}

/// All layouts, the particular ones first. The last takes whatever no other recognises.
pub const SOURCES: &[Source] = &[
    cub::SOURCE,
    cars::SOURCE,
    aircraft::SOURCE,
    imagenet_archives::SOURCE,
    imagenet::SOURCE,
    shards::SOURCE,
    toy::SOURCE,
    list::SOURCE,
    folder::SOURCE,
];

/// Lists a data set of any known layout, with the usual options.
///
/// # Errors
/// Those of the layout's own listing: a line with the path and what was expected there.
pub fn list(root: &Path) -> Result<Listing> {
    list_with(root, &ListOptions::default())
}

/// The layout that a folder or file looks like: the first in the table that recognises it.
#[must_use]
pub fn recognise(root: &Path) -> Option<&'static Source> {
    SOURCES.iter().find(|source| (source.recognises)(root))
}

/// Lists a data set of any known layout.
///
/// # Errors
/// As [`list`].
pub fn list_with(root: &Path, options: &ListOptions) -> Result<Listing> {
    let source = recognise(root)
        .ok_or_else(|| Error::layout(root, "no known layout", folder::SOURCE.layout))?;
    tracing::debug!(root = %root.display(), layout = source.name, "listing");
    (source.list)(root, options)
}

/// The first of some folders below `root` in which a file of one of these names lies.
fn folder_with(root: &Path, folders: &[&str], files: &[&str]) -> Option<PathBuf> {
    let folders = folders.iter().map(|folder| match *folder {
        "" => root.to_path_buf(),
        folder => root.join(folder),
    });
    let mut with_file =
        folders.filter(|folder| files.iter().any(|file| folder.join(file).is_file()));
    with_file.next()
}

/// Refuses a choice of labels for a data set that has one kind of them.
fn one_kind_of_labels(options: &ListOptions, set: &str) -> Result<()> {
    match &options.labels {
        None => Ok(()),
        Some(labels) => Err(Error::Config(format!(
            "labels = {labels:?}, but {set} has one kind of labels: leave the setting out"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_source_names_the_folder_that_it_cannot_read() {
        let empty = tempfile::tempdir().unwrap();
        let missing = empty.path().join("missing");
        for source in SOURCES {
            for root in [empty.path(), &missing] {
                let text = (source.list)(root, &ListOptions::default())
                    .unwrap_err()
                    .to_string();
                let named = root.display().to_string();
                assert!(text.contains(&named), "{}: {text}", source.name);
            }
        }
    }

    #[test]
    fn names_differ_and_only_the_last_source_takes_everything() {
        let empty = tempfile::tempdir().unwrap();
        let (last, others) = SOURCES.split_last().unwrap();
        assert!((last.recognises)(empty.path()));
        for (i, source) in others.iter().enumerate() {
            assert!(!(source.recognises)(empty.path()), "{}", source.name);
            assert!(SOURCES[i + 1..].iter().all(|s| s.name != source.name));
        }
    }
}
