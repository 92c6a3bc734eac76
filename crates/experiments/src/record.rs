//! Records: one JSON line for each cell that was done, in `records.jsonl` of the run folder.
//!
//! The file only grows. A line is written with one call and flushed to the disk; a last line that a
//! kill or a full disk cut short is recognised by its missing line feed and dropped, so that a run
//! loses at most the cells that were running.

use crate::error::{Error, Result};
use crate::files::make_dir;
use crate::machine::Machine;
use crate::plan::Cell;
use serde::{Deserialize, Deserializer, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Name of the file in a run folder.
pub const FILE: &str = "records.jsonl";

/// The result of one cell.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Experiment id.
    pub experiment: String,
    /// `row/measure`, for a search followed by `@rate`.
    pub cell: String,
    /// Row id.
    pub row: String,
    /// What was done, as in [`crate::spec::Measure::name`], or `search` or `pretrain`.
    pub measure: String,
    /// Recipe of a training, or the data set of a run of the paper profile.
    pub on: String,
    /// `mini` or `paper`.
    pub profile: String,
    /// Smallest size, only to see that everything runs.
    pub smoke: bool,
    /// Seed of weights, order and augmentation; none for timings.
    pub seed: Option<u64>,
    /// The main number and the paper's beside it.
    #[serde(flatten)]
    pub main: Measurement,
    /// Further numbers of the same cell.
    pub more: Vec<Measurement>,
    /// Metrics after each epoch of a training.
    pub epochs: Vec<EpochRecord>,
    /// Everything that decides the result, resolved.
    pub config: serde_json::Value,
    /// SHA-256 of the configuration, the data and, for timings, the machine.
    pub key: String,
    /// Commit of the code, `unknown` without git.
    pub commit: String,
    /// Version of the program.
    pub version: String,
    /// Where it ran.
    pub machine: Machine,
    /// What it was trained on.
    pub data: Option<DataInfo>,
    /// Seconds since 1970.
    pub started: u64,
    /// Seconds since 1970.
    pub finished: u64,
    /// Time that the cell took.
    pub seconds: f64,
}

/// One number with its unit, spread and counterpart in the paper.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measurement {
    /// Name of what was measured, such as `top1_error`.
    pub metric: String,
    /// The result where it is no number.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub words: String,
    /// The number; NaN (null in the file) where training diverged.
    #[serde(deserialize_with = "nan_if_null")]
    pub value: f64,
    /// Unit of the number.
    pub unit: String,
    /// Lower quartile of repeated timings.
    pub low: Option<f64>,
    /// Upper quartile of repeated timings.
    pub high: Option<f64>,
    /// The paper's number, the first where it gives several.
    pub paper: Option<f64>,
    /// Where the paper's number comes from.
    pub paper_source: Option<String>,
    /// Whether it was checked against that source.
    pub paper_verified: Option<bool>,
}

impl Measurement {
    /// A number without spread.
    pub fn new(metric: &str, value: f64, unit: &str) -> Self {
        Self {
            metric: metric.to_owned(),
            value,
            unit: unit.to_owned(),
            ..Self::default()
        }
    }

    /// A result in words.
    pub fn in_words(metric: &str, words: impl Into<String>) -> Self {
        Self {
            words: words.into(),
            ..Self::new(metric, f64::NAN, "")
        }
    }

    /// A median with its quartiles.
    pub fn with_spread(metric: &str, value: f64, low: f64, high: f64, unit: &str) -> Self {
        Self {
            low: Some(low),
            high: Some(high),
            ..Self::new(metric, value, unit)
        }
    }
}

/// Metrics after one epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EpochRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// Mean loss over the epoch.
    #[serde(deserialize_with = "nan_if_null")]
    pub train_loss: f64,
    /// Percent.
    #[serde(deserialize_with = "nan_if_null")]
    pub train_error: f64,
    /// Percent, on the images that the cell is evaluated on.
    #[serde(deserialize_with = "nan_if_null")]
    pub eval_error: f64,
    /// Time of the epoch.
    pub seconds: f64,
}

impl From<&isqrt_train::EpochMetrics> for EpochRecord {
    fn from(m: &isqrt_train::EpochMetrics) -> Self {
        Self {
            epoch: m.epoch,
            train_loss: m.train_loss,
            train_error: m.train_error,
            eval_error: m.eval_error.unwrap_or(f64::NAN),
            seconds: m.seconds,
        }
    }
}

/// The data that a network was trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataInfo {
    /// Name of the folder, or of the embedded set.
    pub name: String,
    /// How the parts came about.
    pub note: String,
    /// SHA-256 over classes, labels and pixels.
    pub fingerprint: String,
    /// Number of classes.
    pub classes: usize,
    /// Training images.
    pub train: usize,
    /// Validation images; rates are chosen on these.
    pub val: usize,
    /// Test images; errors are reported on these.
    pub test: usize,
    /// Side of the square images in pixels.
    pub side: u32,
    /// Recipe that the size of the images selects.
    pub recipe: String,
    /// Broken images that were left out, by request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<isqrt_datasets::Skipped>,
}

/// serde_json writes NaN as null; reading gives it back.
fn nan_if_null<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

impl Record {
    /// All numbers of the cell, the main one first.
    pub fn measurements(&self) -> impl Iterator<Item = &Measurement> {
        std::iter::once(&self.main).chain(&self.more)
    }

    /// One of its numbers.
    pub fn get(&self, metric: &str) -> Option<&Measurement> {
        self.measurements().find(|m| m.metric == metric)
    }
}

/// The records of a run folder.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    file: Option<File>,
    records: Vec<Record>,
    warnings: Vec<String>,
}

impl Store {
    /// Reads the records of a folder without changing anything; a folder without the file has none.
    ///
    /// # Errors
    /// [`Error::Io`] if the file is there and cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let (records, warnings) = parse(&path, &text);
        Ok(Self {
            path,
            file: None,
            records,
            warnings,
        })
    }

    /// Opens the records of a folder to add to them: makes the folder, takes its lock, and removes
    /// a last line that was cut short.
    ///
    /// # Errors
    /// [`Error::Locked`] if another run has the folder; [`Error::Io`] otherwise.
    pub fn open(dir: &Path) -> Result<Self> {
        make_dir(dir)?;
        let path = dir.join(FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        lock(&file, dir)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)
            .map_err(Error::io("read", &path))?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if whole < text.len() {
            file.set_len(whole as u64)
                .map_err(Error::io("repair", &path))?;
        }
        file.seek(SeekFrom::End(0))
            .map_err(Error::io("read", &path))?;
        let (records, warnings) = parse(&path, &text);
        Ok(Self {
            path,
            file: Some(file),
            records,
            warnings,
        })
    }

    /// All records, oldest first.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Lines that could not be read, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The latest record with this key.
    pub fn latest(&self, key: &str) -> Option<&Record> {
        self.records.iter().rev().find(|r| r.key == key)
    }

    /// The latest record of a cell, that under the experiment's own name where there is one.
    pub fn latest_of(&self, experiment: &str, cell: &Cell) -> Option<&Record> {
        let name = cell.name();
        let latest = self.latest(&cell.key)?;
        let own = self.records.iter().rev().find(|r| {
            r.key == cell.key
                && r.experiment == experiment
                && r.cell == name
                && (r.started, r.finished) == (latest.started, latest.finished)
        });
        Some(own.unwrap_or(latest))
    }

    /// Adds a record and waits until it is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] if the store was only read, or the disk is full; what was written of the line
    /// is taken back.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let Some(file) = &mut self.file else {
            let e = std::io::Error::other("opened for reading only");
            return Err(Error::io("write", &self.path)(e));
        };
        let mut line = serde_json::to_vec(&record)
            .map_err(|e| Error::io("write", &self.path)(std::io::Error::other(e)))?;
        line.push(b'\n');
        let start = file
            .stream_position()
            .map_err(Error::io("write", &self.path))?;
        if let Err(e) = file.write_all(&line).and_then(|()| file.sync_data()) {
            // Best effort: the next open would drop the fragment as well.
            let _ = file.set_len(start);
            let _ = file.seek(SeekFrom::Start(start));
            return Err(Error::io("write", &self.path)(e));
        }
        self.records.push(record);
        Ok(())
    }
}

/// Takes the lock of a run folder. A run that is just ending may still hold it for a moment.
fn lock(file: &File, dir: &Path) -> Result<()> {
    for attempt in 0.. {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if attempt < 20 => {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Locked {
                    path: dir.to_owned(),
                });
            }
            // A file system without locks: go on without.
            Ok(()) | Err(TryLockError::Error(_)) => break,
        }
    }
    Ok(())
}

fn parse(path: &Path, text: &[u8]) -> (Vec<Record>, Vec<String>) {
    let (mut records, mut warnings) = (Vec::new(), Vec::new());
    let mut lines: Vec<&[u8]> = text.split(|b| *b == b'\n').collect();
    // What follows the last line feed is nothing, or a line that was cut short.
    if let Some(rest) = lines.pop().filter(|rest| !rest.is_empty()) {
        warnings.push(format!(
            "{}: the last line was cut short ({} bytes) and is ignored; its cell runs again",
            path.display(),
            rest.len()
        ));
    }
    for (index, line) in lines.iter().enumerate() {
        match serde_json::from_slice(line) {
            Ok(record) => records.push(record),
            Err(_) if line.is_empty() => {}
            Err(e) => warnings.push(format!(
                "{}:{}: not a record ({e}); the line is ignored",
                path.display(),
                index + 1
            )),
        }
    }
    (records, warnings)
}
