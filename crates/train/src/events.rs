//! The lines of a run as TensorBoard event files.
//!
//! A file is a row of records, each `length (u64) | masked CRC-32C of it (u32) | data | masked CRC-32C
//! of the data (u32)`, all little-endian; the data are one `Event` in the protobuf wire format.
//!
//! Sources: `core/lib/io/record_writer.cc` (the framing), `core/lib/hash/crc32c.h` (the mask),
//! `core/util/event.proto` (`Event`, `SessionLog`) and `core/framework/summary.proto` (`Summary`,
//! `HistogramProto`) of the repository tensorflow/tensorflow; field numbers are theirs.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Result, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Diagnostics, EpochMetrics, Line, StepLine};

/// Buckets of the spectrum's histogram.
const BUCKETS: usize = 30;

/// Writes one event file.
///
/// Tags: `train/loss`, `train/learning_rate`, `train/gradient_norm`, `train/images_per_second` and
/// `train/wait_share` of steps; `train/error`, `eval/error`, `eval/error5` and `eval/loss` of epochs;
/// `diagnostics/root_distance`, `diagnostics/gradient_norm/<stage>` and, as a histogram,
/// `diagnostics/spectrum`: log10 of the eigenvalues that are above 0, since they spread over many
/// decades and would all fall into one bucket as they are. Skipped updates have no tag.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts `events.out.tfevents.<unix seconds>.<host>.<process>` in the folder, which is made where
    /// it is missing. Files of earlier parts of the run stay beside it: TensorBoard reads them one
    /// after another and drops what they say of steps after `from_step`, the number of updates that
    /// the run goes on from (0 at its beginning).
    ///
    /// # Errors
    /// Where the folder or the file cannot be written.
    pub fn create(folder: &Path, from_step: u64) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let (path, file) = new_file(folder)?;
        let mut writer = Self { path, file };
        let mut version = event(0);
        bytes(&mut version, 3, b"brain.Event:2");
        // `SessionLog` with status START: what was read before loses all from this step on.
        let mut start = event(from_step.saturating_add(1));
        bytes(&mut start, 7, &[1 << 3, 1]);
        writer.write(&[version, start])?;
        Ok(writer)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a line, whole and at once, so that a killed run loses none.
    ///
    /// # Errors
    /// Where the disk is full, for one.
    pub fn line(&mut self, line: &Line) -> Result<()> {
        let summary = match line {
            Line::Step(line) => steps(line),
            Line::Epoch(metrics) => epoch(metrics),
            Line::Diagnostics(line) => diagnostics(line),
            Line::Skipped { .. } => return Ok(()),
        };
        if summary.is_empty() {
            return Ok(());
        }
        let mut event = event(line.step());
        bytes(&mut event, 5, &summary);
        self.write(&[event])
    }

    fn write(&mut self, events: &[Vec<u8>]) -> Result<()> {
        let records: Vec<u8> = events.iter().flat_map(|e| record(e)).collect();
        self.file.write_all(&records)
    }
}

/// A file that was not there before: a second one of the same second and process gets a number.
fn new_file(folder: &Path) -> Result<(PathBuf, File)> {
    let (seconds, process) = (now() as u64, std::process::id());
    let name = format!("events.out.tfevents.{seconds}.{}.{process}", host());
    let mut path = folder.join(&name);
    let mut number = 0;
    loop {
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                number += 1;
                path = folder.join(format!("{name}.{number}"));
            }
            opened => return opened.map(|file| (path, file)),
        }
    }
}

/// The machine's name in the letters that a file name can bear anywhere.
fn host() -> String {
    let name = gethostname::gethostname();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name = name.to_string_lossy();
    name.chars().filter(|&c| plain(c)).take(64).collect()
}

/// Seconds since 1970.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}

fn steps(line: &StepLine) -> Vec<u8> {
    let mut summary = Vec::new();
    scalar(&mut summary, "train/loss", line.loss);
    scalar(&mut summary, "train/learning_rate", line.learning_rate);
    scalar(&mut summary, "train/gradient_norm", line.gradient_norm);
    scalar(
        &mut summary,
        "train/images_per_second",
        line.images_per_second,
    );
    scalar(&mut summary, "train/wait_share", line.wait_share);
    summary
}

fn epoch(metrics: &EpochMetrics) -> Vec<u8> {
    let mut summary = Vec::new();
    scalar(&mut summary, "train/error", metrics.train_error);
    scalar(&mut summary, "eval/error", metrics.eval_error);
    scalar(&mut summary, "eval/error5", metrics.eval_error5);
    scalar(&mut summary, "eval/loss", metrics.eval_loss);
    summary
}

fn diagnostics(line: &Diagnostics) -> Vec<u8> {
    let mut summary = Vec::new();
    scalar(
        &mut summary,
        "diagnostics/root_distance",
        line.root_distance,
    );
    for (stage, norm) in &line.gradient_norms {
        let tag = format!("diagnostics/gradient_norm/{stage}");
        scalar(&mut summary, &tag, *norm);
    }
    let positive = line.spectrum.iter().filter(|x| **x > 0.0 && x.is_finite());
    let logs: Vec<f64> = positive.map(|x| x.log10()).collect();
    if !logs.is_empty() {
        let mut value = Vec::new();
        bytes(&mut value, 1, b"diagnostics/spectrum");
        bytes(&mut value, 5, &histogram(&logs));
        bytes(&mut summary, 1, &value);
    }
    summary
}

/// `Event` with its time and step.
fn event(step: u64) -> Vec<u8> {
    let mut out = Vec::new();
    double(&mut out, 1, now());
    varint(&mut out, 2 << 3);
    varint(&mut out, step);
    out
}

/// Adds a `Summary.Value` with a `simple_value`, which has 32 bits; nothing for a number that is not there.
fn scalar(summary: &mut Vec<u8>, tag: &str, number: impl Into<Option<f64>>) {
    if let Some(number) = number.into() {
        let mut value = Vec::new();
        bytes(&mut value, 1, tag.as_bytes());
        varint(&mut value, 2 << 3 | 5);
        value.extend((number as f32).to_le_bytes());
        bytes(summary, 1, &value);
    }
}

/// `HistogramProto` with buckets of equal width. The values are finite and at least one.
fn histogram(values: &[f64]) -> Vec<u8> {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let width = (high - low) / BUCKETS as f64;
    let mut counts = [0.0; BUCKETS];
    for value in values {
        // All in the first bucket where the width is 0: a cast takes NaN for 0.
        let bucket = ((value - low) / width) as usize;
        counts[bucket.min(BUCKETS - 1)] += 1.0;
    }
    let limits: Vec<f64> = (1..=BUCKETS).map(|i| low + width * i as f64).collect();
    let mut out = Vec::new();
    double(&mut out, 1, low);
    double(&mut out, 2, high);
    double(&mut out, 3, values.len() as f64);
    double(&mut out, 4, values.iter().sum());
    double(&mut out, 5, values.iter().map(|x| x * x).sum());
    for (field, numbers) in [(6, &limits[..]), (7, &counts)] {
        let packed: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes(&mut out, field, &packed);
    }
    out
}

/// A record of the file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// CRC-32C, rotated and shifted so that a checksum of data that hold checksums stays a good one.
fn masked_crc(data: &[u8]) -> u32 {
    let crc = crc32c::crc32c(data);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    varint(out, field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;

    type Fields = Vec<(u64, Vec<u8>)>;

    /// Takes `n` bytes off the front.
    fn take<'a>(data: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, rest) = data.split_at(n);
        *data = rest;
        head
    }

    fn long(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = take(data, 1)[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }

    /// Field numbers and contents of a message: bytes, or a varint's eight.
    fn fields(mut data: &[u8]) -> Fields {
        let mut all = Vec::new();
        while !data.is_empty() {
            let key = long(&mut data);
            let content = match key & 7 {
                0 => long(&mut data).to_le_bytes().to_vec(),
                1 => take(&mut data, 8).to_vec(),
                2 => {
                    let n = long(&mut data) as usize;
                    take(&mut data, n).to_vec()
                }
                5 => take(&mut data, 4).to_vec(),
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, content));
        }
        all
    }

    fn doubles(content: &[u8]) -> Vec<f64> {
        let (numbers, rest) = content.as_chunks::<8>();
        assert!(rest.is_empty());
        numbers.iter().map(|b| f64::from_le_bytes(*b)).collect()
    }

    /// Checksum by its definition, a bit at a time: shares nothing with the writer.
    fn crc_by_bits(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
            }
        }
        !crc
    }

    fn unmask(masked: &[u8]) -> u32 {
        let masked = u32::from_le_bytes(masked.try_into().unwrap());
        masked.wrapping_sub(0xa282_ead8).rotate_left(15)
    }

    /// The events of a file: step and fields, with all checksums checked.
    fn read(path: &Path) -> Vec<(u64, Fields)> {
        let file = fs::read(path).unwrap();
        let mut rest = &file[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = take(&mut rest, 8);
            assert_eq!(unmask(take(&mut rest, 4)), crc_by_bits(length));
            let n = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let data = take(&mut rest, n);
            assert_eq!(unmask(take(&mut rest, 4)), crc_by_bits(data));
            let mut all = fields(data);
            assert!((doubles(&all.remove(0).1)[0] - now()).abs() < 60.0);
            let (field, step) = all.remove(0);
            assert_eq!(field, 2);
            events.push((u64::from_le_bytes(step.try_into().unwrap()), all));
        }
        events
    }

    /// Tags and numbers of an event, those of a histogram as they lie there.
    fn values(event: &[(u64, Vec<u8>)]) -> BTreeMap<String, Vec<u8>> {
        assert_eq!((event.len(), event[0].0), (1, 5));
        let values = fields(&event[0].1).into_iter().map(|(field, value)| {
            assert_eq!(field, 1);
            let value = fields(&value);
            assert_eq!((value[0].0, value.len()), (1, 2));
            assert!([2, 5].contains(&value[1].0));
            let tag = String::from_utf8(value[0].1.clone()).unwrap();
            (tag, value[1].1.clone())
        });
        values.collect()
    }

    fn float(value: &[u8]) -> f32 {
        f32::from_le_bytes(value.try_into().unwrap())
    }

    #[test]
    fn known_checksums() {
        // RFC 3720, B.4, and the usual check value.
        for (data, crc) in [
            (&b"123456789"[..], 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (b"", 0),
        ] {
            assert_eq!(crc32c::crc32c(data), crc);
            assert_eq!(crc_by_bits(data), crc);
            assert_eq!(unmask(&masked_crc(data).to_le_bytes()), crc);
        }
    }

    #[test]
    fn a_file_begins_with_its_version_and_the_step_from_which_older_ones_end() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("deep/within");
        let first = EventWriter::create(&folder, 0).unwrap();
        let second = EventWriter::create(&folder, 300).unwrap();
        assert_ne!(first.path(), second.path());
        let name = first.path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        for (writer, step) in [(first, 1), (second, 301)] {
            let events = read(writer.path());
            assert_eq!(events[0], (0, vec![(3, b"brain.Event:2".to_vec())]));
            // Field 1, the status, is 1, START.
            assert_eq!(events[1], (step, vec![(7, vec![8, 1])]));
            assert_eq!(events.len(), 2);
        }
    }

    #[test]
    fn numbers_come_back_under_their_tags() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 0).unwrap();
        // As in metrics.jsonl. An update that was left out has no number of its own.
        for text in [
            r#"{"kind": "step", "step": 1099511627776, "epoch": 1, "loss": 2.5, "learning_rate": 0.1,
                "gradient_norm": 1e40, "images_per_second": 12, "wait_share": 0.25, "seconds": 9}"#,
            r#"{"kind": "skipped", "step": 2, "epoch": 1, "problem": "the loss"}"#,
            r#"{"kind": "diagnostics", "step": 2, "epoch": 1, "seconds": 9}"#,
            r#"{"kind": "epoch", "epoch": 1, "step": 3, "train_loss": 2, "train_error": 60,
                "eval_loss": 1.5, "eval_error": 50, "eval_error5": 10, "seconds": 1, "run_seconds": 1,
                "cpu_seconds": 1, "images_per_second": 1, "wait_share": 0}"#,
        ] {
            writer.line(&serde_json::from_str(text).unwrap()).unwrap();
        }
        let events = read(writer.path());
        assert_eq!(events.len(), 4);
        assert_eq!((events[2].0, events[3].0), (1 << 40, 3));
        let step = values(&events[2].1);
        assert_eq!(float(&step["train/loss"]), 2.5);
        assert_eq!(float(&step["train/learning_rate"]), 0.1);
        assert_eq!(float(&step["train/gradient_norm"]), f32::INFINITY);
        assert_eq!(float(&step["train/images_per_second"]), 12.0);
        assert_eq!(float(&step["train/wait_share"]), 0.25);
        assert_eq!(step.len(), 5);
        let epoch = values(&events[3].1);
        assert_eq!(float(&epoch["train/error"]), 60.0);
        assert_eq!(float(&epoch["eval/error"]), 50.0);
        assert_eq!(float(&epoch["eval/error5"]), 10.0);
        assert_eq!(float(&epoch["eval/loss"]), 1.5);
        assert_eq!(epoch.len(), 4);
    }

    #[test]
    fn a_spectrum_is_a_histogram_of_its_logarithms() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 0).unwrap();
        let spectra = [
            vec![1e3, 1.0, 1e-3, 0.0, -1.0, f64::NAN],
            vec![0.5, 0.5],
            vec![0.0],
        ];
        for spectrum in &spectra {
            let line = Line::Diagnostics(Diagnostics {
                step: 7,
                spectrum: spectrum.clone(),
                root_distance: Some(0.5),
                gradient_norms: [("backbone.layer1".to_owned(), 0.75)].into(),
                ..Diagnostics::default()
            });
            writer.line(&line).unwrap();
        }
        let events = read(writer.path());
        let first = values(&events[2].1);
        assert_eq!(float(&first["diagnostics/root_distance"]), 0.5);
        assert_eq!(
            float(&first["diagnostics/gradient_norm/backbone.layer1"]),
            0.75
        );
        let of = |event: usize| -> BTreeMap<u64, Vec<f64>> {
            let values = values(&events[event].1);
            let parts = fields(&values["diagnostics/spectrum"]).into_iter();
            parts.map(|(k, v)| (k, doubles(&v))).collect()
        };
        let wide = of(2);
        // min, max, num, sum, sum_squares, then limits and counts.
        let summary: Vec<f64> = (1..=5).map(|k| wide[&k][0]).collect();
        assert_eq!(summary, [-3.0, 3.0, 3.0, 0.0, 18.0]);
        assert_eq!((wide[&6].len(), wide[&7].len()), (BUCKETS, BUCKETS));
        let held: Vec<usize> = (0..BUCKETS).filter(|i| wide[&7][*i] > 0.0).collect();
        assert_eq!(held, [0, BUCKETS / 2, BUCKETS - 1]);
        assert_eq!(wide[&7].iter().sum::<f64>(), 3.0);
        assert!(wide[&6].is_sorted() && (wide[&6][BUCKETS - 1] - 3.0).abs() < 1e-12);
        let narrow = of(3);
        assert_eq!((narrow[&7][0], narrow[&3][0]), (2.0, 2.0));
        assert!(!values(&events[4].1).contains_key("diagnostics/spectrum"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(EventWriter::create(&file.path().join("folder"), 0).is_err());
    }
}
