//! The layouts of files that can be listed, in one table.
//!
//! A layout is one file with a [`Source`] in it and one line in [`SOURCES`]; splitting, decoding and
//! batches are the same for all. `docs/adding-a-dataset.md` walks through it.

use std::path::Path;

use crate::folder::{self, Folder};
use crate::{Error, Result};

/// A way in which a data set lies on disk.
#[derive(Debug)]
pub struct Source {
    /// Short name, as in records.
    pub name: &'static str,
    /// What is expected under the root, for people.
    pub layout: &'static str,
    /// Whether a folder looks like this layout. Looks at names only and never fails.
    pub recognises: fn(&Path) -> bool,
    /// Lists the samples of such a folder without opening an image.
    pub list: fn(&Path) -> Result<Folder>,
}

/// All layouts, the particular ones first. The last takes whatever no other recognises.
pub const SOURCES: &[Source] = &[folder::SOURCE];

/// Lists a data set of any known layout.
///
/// # Errors
/// Those of the layout's own listing: a line with the path and what was expected there.
pub fn list(root: &Path) -> Result<Folder> {
    let source = SOURCES
        .iter()
        .find(|source| (source.recognises)(root))
        .ok_or_else(|| Error::layout(root, "no known layout", folder::SOURCE.layout))?;
    tracing::debug!(root = %root.display(), layout = source.name, "listing");
    (source.list)(root)
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
                let text = (source.list)(root).unwrap_err().to_string();
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
