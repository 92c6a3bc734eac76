//! Files that are never half-written: a temporary file beside the target, fsync, rename.

use crate::error::{Error, Result};
use std::fs::{self, File};
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
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = std::path::PathBuf::from(temporary);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // Nothing to do if this fails too: the first error is the one to report.
        let _ = fs::remove_file(&temporary);
        Error::Io {
            action: "write",
            path: path.to_owned(),
            source,
        }
    })
}
