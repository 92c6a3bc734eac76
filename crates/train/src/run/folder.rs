//! The folder of a run: the names in it, its lock and its log.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use isqrt_models::WholeFile;

use super::{Console, Environment};
use crate::data::DataInfo;
use crate::machine;
use crate::{Error, Result};

/// Names below a run folder.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The folder.
    pub root: PathBuf,
}

impl Paths {
    /// `spec.toml`
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.root.join("spec.toml")
    }

    /// `checkpoints/NAME.safetensors`
    #[must_use]
    pub fn checkpoint(&self, name: &str) -> PathBuf {
        self.root
            .join("checkpoints")
            .join(format!("{name}.safetensors"))
    }

    /// The weights of this checkpoint, or those that the result reports on; of a run that goes on, its last.
    ///
    /// # Errors
    /// [`Error::Run`] with those that there are.
    pub fn weights(&self, name: Option<&str>) -> Result<PathBuf> {
        let wanted = name.map_or_else(|| vec![FINAL, "last"], |name| vec![name]);
        let paths = wanted.iter().map(|name| self.checkpoint(name));
        if let Some(found) = paths.into_iter().find(|path| path.exists()) {
            return Ok(found);
        }
        let files = std::fs::read_dir(self.root.join("checkpoints"));
        let files = files.into_iter().flatten().flatten();
        let mut there: Vec<String> = files
            .filter_map(|file| {
                Some(
                    file.file_name()
                        .to_str()?
                        .strip_suffix(".safetensors")?
                        .to_owned(),
                )
            })
            .collect();
        there.sort();
        let there = match there.is_empty() {
            true => "none yet".to_owned(),
            false => there.join(", "),
        };
        Err(Error::Run {
            path: self.root.clone(),
            message: format!(
                "has no checkpoint {}; there are: {there}",
                wanted.join(" or ")
            ),
        })
    }

    /// `metrics.jsonl`
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `result.json`
    #[must_use]
    pub fn result(&self) -> PathBuf {
        self.root.join("result.json")
    }

    pub(super) fn environment(&self) -> PathBuf {
        self.root.join("environment.json")
    }

    /// The images of the run, as it recorded them; none where it did not.
    ///
    /// # Errors
    /// [`Error::File`] where the record cannot be read.
    pub fn data(&self) -> Result<Option<DataInfo>> {
        let path = self.environment();
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|error| failed(&path, &error))?;
        let told: Environment =
            serde_json::from_slice(&bytes).map_err(|error| failed(&path, &error))?;
        Ok(Some(told.data))
    }
}

/// The file with the weights: itself, or of a run's folder the one that its result reports on.
///
/// # Errors
/// As [`Paths::weights`].
pub fn weights_file(path: &Path) -> Result<PathBuf> {
    let paths = Paths {
        root: path.to_owned(),
    };
    match paths.spec().exists() {
        true => paths.weights(None),
        false => Ok(path.to_owned()),
    }
}

/// Name of the checkpoint with the weights that a finished run reports on.
pub const FINAL: &str = "final";

/// Says things to people and writes them to `console.log`.
pub(super) struct Log<'a> {
    pub(super) file: File,
    pub(super) console: &'a mut dyn Console,
}

impl<'a> Log<'a> {
    pub(super) fn open(root: &Path, console: &'a mut dyn Console) -> Result<Self> {
        let path = root.join("console.log");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        Ok(Self {
            file: file.map_err(|error| failed(&path, &error))?,
            console,
        })
    }

    pub(super) fn say(&mut self, text: &str) {
        self.note(text);
        self.console.say(text);
    }

    /// For the file alone. A full disk is told by what matters more than this.
    pub(super) fn note(&mut self, text: &str) {
        let _ = writeln!(self.file, "{} {text}", machine::date(machine::now()));
    }
}

/// One process at a time in a folder, for as long as this lives, however it ends.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn take(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| failed(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut by = String::new();
                let _ = file.read_to_string(&mut by);
                let by = match by.trim() {
                    "" => String::new(),
                    by => format!(" (process {by})"),
                };
                return Err(Error::Run {
                    path: root.to_owned(),
                    message: format!(
                        "another process{by} is training in this folder: wait for it, or choose another \
                         folder with --out"
                    ),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(&path, &error)),
        }
        // For people; the lock itself is the system's.
        let _ = file.set_len(0);
        let _ = write!(file, "{}", std::process::id());
        Ok(Self { _file: file })
    }
}

/// What killed processes left half-written.
pub(super) fn remove_partial(folder: &Path) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".partial") {
            let _ = std::fs::remove_file(&path);
        }
    }
}

pub(super) fn write_whole(path: &Path, text: &[u8]) -> Result<()> {
    let write = || {
        let mut file = WholeFile::create(path)?;
        file.file()?.write_all(text)?;
        file.finish()
    };
    write().map_err(|error| failed(path, &error))
}

pub(super) fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::File {
        path: path.to_owned(),
        message: error.to_string(),
    }
}
