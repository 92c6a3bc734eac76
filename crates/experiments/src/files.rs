//! Files that are never half-written: a temporary file beside the target, fsync, rename.

use crate::error::{Error, Result};
use isqrt_models::WholeFile;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Makes a folder and those above it.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("make the folder", dir))
}

/// Writes a whole file so that a reader sees the old or the new text and nothing between.
///
/// # Errors
/// [`Error::Io`] naming the file, on a full disk or a missing permission.
pub fn write_atomically(path: &Path, text: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    let write = || {
        let mut whole = WholeFile::create(path)?;
        whole.file()?.write_all(text)?;
        whole.finish()
    };
    write().map_err(Error::io("write", path))
}
