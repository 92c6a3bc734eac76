//! A file that appears under its name when it is whole, and leaves nothing otherwise.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file in the making, beside its place.
///
/// A pipe or a device (`/dev/null`, `/dev/stdout`) is written straight into: a new file under its
/// name would put it out of the world for everyone else.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    /// Nothing for a pipe or a device.
    partial: Option<PathBuf>,
    file: Option<File>,
}

impl WholeFile {
    /// A temporary file beside `path`; where that is a link, beside the file that it leads to.
    ///
    /// # Errors
    /// Those of the system.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Ok(meta) = std::fs::metadata(&path)
            && !meta.is_file()
            && !meta.is_dir()
        {
            return Ok(Self {
                file: Some(File::options().write(true).open(&path)?),
                partial: None,
                path,
            });
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(partial);
        // What a killed process of the same number left behind is written over.
        let file = Some(File::create(&partial)?);
        Ok(Self {
            path,
            partial: Some(partial),
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
        let Some(partial) = &self.partial else {
            return Ok(());
        };
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        std::fs::rename(partial, &self.path)?;
        self.file = None;
        sync_folder_of(&self.path);
        Ok(())
    }
}

/// So that a new name of a file outlives a power cut, where folders can be synced.
pub fn sync_folder_of(path: &Path) {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        // An error came before: half a file is of no use.
        if self.file.take().is_some()
            && let Some(partial) = &self.partial
        {
            let _ = std::fs::remove_file(partial);
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::FileTypeExt;

    #[test]
    fn a_device_stays_a_device() {
        let null = Path::new("/dev/null");
        let before = std::fs::metadata(null).unwrap().file_type();
        assert!(before.is_char_device());
        let mut file = WholeFile::create(null).unwrap();
        file.file().unwrap().write_all(b"gone").unwrap();
        file.finish().unwrap();
        drop(WholeFile::create(null).unwrap());
        assert!(
            std::fs::metadata(null)
                .unwrap()
                .file_type()
                .is_char_device()
        );
    }
}
