//! What a run folder holds, read with patience: files and values may be missing, lines half-written.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The file by which a run folder is known.
pub(super) const METRICS: &str = "metrics.jsonl";

/// More than any run writes; what is larger is no file of a run.
const LARGEST: u64 = 1 << 30;

/// A run folder.
pub(super) struct Run {
    /// As given.
    pub folder: PathBuf,
    /// The folder's own name, or more of its path where several runs have the same.
    pub name: String,
    /// `spec.toml`, empty where it cannot be read.
    pub spec: toml::Table,
    /// The same as text.
    pub spec_text: String,
    /// `environment.json`, null where it cannot be read.
    pub environment: Value,
    /// `result.json`, likewise.
    pub result: Value,
    /// Means over some steps, in order.
    pub steps: Vec<StepLine>,
    /// Epochs, in order.
    pub epochs: Vec<EpochLine>,
    /// Looks into the network, in order.
    pub looks: Vec<Look>,
    /// Updates that were left out, each with its reason.
    pub skipped: Vec<(u64, String)>,
    /// `confusion.csv`.
    pub confusion: Option<Confusion>,
    /// What could not be read.
    pub warnings: Vec<String>,
}

/// A line of `metrics.jsonl`. [`isqrt_train::Line`] is what is written; here every number may be missing
/// (null stands for NaN), and kinds that are not known are passed over.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line {
    Step(StepLine),
    Epoch(EpochLine),
    Diagnostics(Look),
    Skipped {
        step: u64,
        #[serde(default)]
        problem: String,
    },
    #[serde(other)]
    Other,
}

/// As [`isqrt_train::StepLine`].
#[derive(Deserialize)]
pub(super) struct StepLine {
    pub step: u64,
    pub loss: Option<f64>,
    pub learning_rate: Option<f64>,
    pub images_per_second: Option<f64>,
    pub seconds: Option<f64>,
}

/// As [`isqrt_train::EpochMetrics`].
#[derive(Deserialize)]
pub(super) struct EpochLine {
    pub epoch: u64,
    #[serde(default)]
    pub step: u64,
    pub train_loss: Option<f64>,
    pub train_error: Option<f64>,
    pub eval_loss: Option<f64>,
    pub eval_error: Option<f64>,
    pub eval_error5: Option<f64>,
    pub seconds: Option<f64>,
    pub run_seconds: Option<f64>,
    pub cpu_seconds: Option<f64>,
    pub images_per_second: Option<f64>,
    pub wait_share: Option<f64>,
}

/// As [`isqrt_train::Diagnostics`].
#[derive(Deserialize)]
pub(super) struct Look {
    pub step: u64,
    #[serde(default)]
    pub epoch: u64,
    #[serde(default)]
    pub spectrum: Vec<Option<f64>>,
    pub root_distance: Option<f64>,
    #[serde(default)]
    pub gradient_norms: BTreeMap<String, Option<f64>>,
}

/// Answers to the images of each class.
pub(super) struct Confusion {
    /// Names in label order.
    pub classes: Vec<String>,
    /// Row: label, column: answer.
    pub counts: Vec<Vec<u64>>,
}

impl Run {
    /// Reads a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if a file is there and cannot be read; what it says is never an error.
    pub fn read(folder: &Path) -> Result<Self> {
        let name = folder.canonicalize().ok().and_then(|full| {
            let name = full.file_name()?;
            Some(name.to_string_lossy().into_owned())
        });
        let mut run = Self {
            folder: folder.to_owned(),
            name: name.unwrap_or_else(|| folder.display().to_string()),
            spec: toml::Table::new(),
            spec_text: String::new(),
            environment: Value::Null,
            result: Value::Null,
            steps: Vec::new(),
            epochs: Vec::new(),
            looks: Vec::new(),
            skipped: Vec::new(),
            confusion: None,
            warnings: Vec::new(),
        };
        run.read_spec()?;
        run.environment = run.json("environment.json")?.unwrap_or_default();
        run.result = run.json("result.json")?.unwrap_or_default();
        run.read_metrics()?;
        if let Some(bytes) = run.file("confusion.csv")? {
            match Confusion::parse(&bytes) {
                Ok(confusion) => run.confusion = Some(confusion),
                Err(problem) => run.warn("confusion.csv", &problem),
            }
        }
        Ok(run)
    }

    fn warn(&mut self, file: &str, problem: &str) {
        self.warnings
            .push(format!("{file}: {problem}; passed over"));
    }

    /// The bytes of a file; none where it is missing, or larger than any that a run writes.
    fn file(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.folder.join(name);
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(Error::io("read", &path))?,
        };
        let mut bytes = Vec::new();
        let read = file.take(LARGEST + 1).read_to_end(&mut bytes);
        read.map_err(Error::io("read", &path))?;
        if bytes.len() as u64 > LARGEST {
            self.warn(name, "larger than 1 GiB");
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    fn json(&mut self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.file(name)? else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&bytes);
        if let Err(error) = &value {
            self.warn(name, &error.to_string());
        }
        Ok(value.ok())
    }

    fn read_spec(&mut self) -> Result<()> {
        let Some(bytes) = self.file("spec.toml")? else {
            return Ok(());
        };
        self.spec_text = String::from_utf8_lossy(&bytes).into_owned();
        match self.spec_text.parse() {
            Ok(spec) => self.spec = spec,
            Err(error) => self.warn("spec.toml", error.message()),
        }
        Ok(())
    }

    fn read_metrics(&mut self) -> Result<()> {
        let bytes = self.file(METRICS)?.unwrap_or_default();
        let mut unread: Vec<usize> = Vec::new();
        for (number, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
            if line.last() != Some(&b'\n') {
                self.warn(METRICS, "the last line is half-written");
                continue;
            }
            match serde_json::from_slice(line) {
                Ok(line) => self.take(line),
                Err(_) => unread.push(number + 1),
            }
        }
        if let Some(first) = unread.first() {
            let count = unread.len();
            let problem = format!("{count} lines that cannot be read (the first is line {first})");
            self.warn(METRICS, &problem);
        }
        Ok(())
    }

    /// Adds a line. A run that went on from a checkpoint may have written steps twice: the later ones
    /// count.
    fn take(&mut self, line: Line) {
        match line {
            Line::Step(line) => add(&mut self.steps, line, |l| l.step),
            Line::Epoch(line) => add(&mut self.epochs, line, |l| l.epoch),
            Line::Diagnostics(line) => add(&mut self.looks, line, |l| l.step),
            Line::Skipped { step, problem } => add(&mut self.skipped, (step, problem), |l| l.0),
            Line::Other => {}
        }
    }
}

/// Adds what comes at its place, in front of nothing.
fn add<T>(all: &mut Vec<T>, next: T, place: impl Fn(&T) -> u64) {
    while all.last().is_some_and(|last| place(last) >= place(&next)) {
        all.pop();
    }
    all.push(next);
}

/// Gives runs whose folders have the same name their paths as names.
pub(super) fn tell_apart(runs: &mut [Run]) {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in runs {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = run.folder.display().to_string();
        }
    }
}

impl Confusion {
    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut reader = csv::Reader::from_reader(bytes);
        let head = reader.headers().map_err(|e| e.to_string())?;
        let classes: Vec<String> = head.iter().skip(1).map(str::to_owned).collect();
        let mut counts = Vec::with_capacity(classes.len());
        for row in reader.records() {
            let row = row.map_err(|e| e.to_string())?;
            let numbers = row.iter().skip(1).map(str::parse);
            let numbers = numbers.collect::<std::result::Result<Vec<u64>, _>>();
            counts.push(numbers.map_err(|e| format!("row {}: {e}", counts.len() + 1))?);
        }
        if counts.len() != classes.len() {
            let (rows, columns) = (counts.len(), classes.len());
            return Err(format!("{rows} rows for {columns} classes"));
        }
        Ok(Self { classes, counts })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_table_of_answers_is_square_and_whole() {
        let good = Confusion::parse(b"label\\answer,\"a, b\",c\n\"a, b\",3,1\nc,0,2\n").unwrap();
        assert_eq!(good.classes, ["a, b", "c"]);
        assert_eq!(good.counts, [[3, 1], [0, 2]]);
        for (text, part) in [
            ("label\\answer,a,b\na,1,2\n", "1 rows for 2 classes"),
            ("label\\answer,a,b\na,1,2\nb,3\n", "record 2"),
            ("label\\answer,a\na,-1\n", "row 1"),
        ] {
            let problem = Confusion::parse(text.as_bytes()).err().unwrap();
            assert!(problem.contains(part), "{problem}");
        }
        assert!(Confusion::parse(b"").unwrap().classes.is_empty());
    }

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        use proptest::prelude::*;
        let folder = tempfile::tempdir().unwrap();
        let bytes = proptest::collection::vec(any::<u8>(), 0..200);
        proptest!(|(bytes in bytes, kind in 0..4_usize)| {
            let names = [METRICS, "spec.toml", "result.json", "confusion.csv"];
            std::fs::write(folder.path().join(names[kind]), bytes).unwrap();
            Run::read(folder.path()).unwrap();
        });
    }
}
