//! A file that appears under its name when it is whole, and leaves nothing otherwise.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file in the making, beside its place.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    partial: PathBuf,
    file: Option<File>,
}

impl WholeFile {
    /// A temporary file beside `path`; where that is a link, beside the file that it leads to.
    ///
    /// # Errors
    /// Those of the system.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(partial);
        // What a killed process of the same number left behind is written over.
        let file = Some(File::create(&partial)?);
        Ok(Self {
            path,
            partial,
            file,
        })
    }

    /// What to write to.
    ///
    /// # Errors
    /// None while the file is in the making.
    pub fn file(&mut self) -> std::io::Result<&mut File> {
        self.file
            .as_mut()
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Gives the file its name, synced.
    ///
    /// # Errors
    /// Those of the system.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.file()?.flush()?;
        self.file()?.sync_all()?;
        std::fs::rename(&self.partial, &self.path)?;
        self.file = None;
        // So that the name lasts too, where folders can be synced.
        if let Some(folder) = self.path.parent()
            && let Ok(folder) = File::open(folder)
        {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // An error came before: half a file is of no use.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}
