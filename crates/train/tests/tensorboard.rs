//! TensorBoard's own reader reads what we write. Left out, with a word on stderr, where python3 or the
//! package `tensorboard` is missing.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use isqrt_train::{EventWriter, Line};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// Everything that TensorBoard holds of a folder, by both of its readers: the one of its Python
/// interface, and the one behind its pages.
const READ: &str = r"
import json, sys
from tensorboard.backend.event_processing import event_accumulator as plain
from tensorboard.backend.event_processing import plugin_event_accumulator as pages
from tensorboard.util import tensor_util

old = plain.EventAccumulator(sys.argv[1], size_guidance={plain.SCALARS: 0, plain.HISTOGRAMS: 0})
old.Reload()
new = pages.EventAccumulator(sys.argv[1], size_guidance={pages.TENSORS: 0})
new.Reload()

def number(event):
    return tensor_util.make_ndarray(event.tensor_proto).tolist()

def histogram(event):
    h = event.histogram_value
    return [event.step, [h.min, h.max, h.num, sum(h.bucket), len(h.bucket_limit)]]

print(json.dumps({
    'scalars': {t: [[e.step, e.value] for e in old.Scalars(t)] for t in old.Tags()['scalars']},
    'histograms': {t: [histogram(e) for e in old.Histograms(t)] for t in old.Tags()['histograms']},
    'pages': {t: [[e.step, number(e)] for e in new.Tensors(t)] for t in new.Tags()['tensors']},
}))
";

fn tensorboard(folder: &Path) -> Option<Value> {
    let python = |arguments: &[&str]| Command::new("python3").args(arguments).output();
    let there = python(&["-c", "import tensorboard.backend.event_processing"]);
    if !there.is_ok_and(|o| o.status.success()) {
        eprintln!("left out: needs python3 with the package tensorboard (pip install tensorboard)");
        return None;
    }
    let read = python(&["-c", READ, folder.to_str().unwrap()]).unwrap();
    let said = String::from_utf8_lossy(&read.stderr);
    assert!(read.status.success(), "{said}");
    Some(serde_json::from_slice(&read.stdout).unwrap())
}

fn line(value: Value) -> Line {
    serde_json::from_value(value).unwrap()
}

fn step(step: u64) -> Line {
    let x = step as f64;
    line(json!({
        "kind": "step", "step": step, "epoch": 1, "seconds": x, "loss": 2.0 / x,
        "learning_rate": 0.1 / x, "gradient_norm": 3.0 * x, "images_per_second": 100.0 + x,
        "wait_share": 0.01 * x,
    }))
}

fn epoch(epoch: usize, step: u64) -> Line {
    let x = epoch as f64;
    line(json!({
        "kind": "epoch", "epoch": epoch, "step": step, "train_loss": 9.0, "train_error": 90.0 / x,
        "eval_loss": 4.0 / x, "eval_error": 80.0 / x, "eval_error5": 40.0 / x, "seconds": 1.0,
        "run_seconds": 1.0, "cpu_seconds": 1.0, "images_per_second": 1.0, "wait_share": 0.0,
    }))
}

fn look(step: u64) -> Line {
    line(json!({
        "kind": "diagnostics", "step": step, "epoch": 1, "seconds": 1.0,
        "spectrum": [0.9, 0.09, 0.009, 0.0], "root_distance": 0.25,
        "gradient_norms": { "classifier": step },
    }))
}

fn write(folder: &Path, from_step: u64, lines: &[Line]) {
    let mut writer = EventWriter::create(folder, from_step).unwrap();
    lines.iter().for_each(|line| writer.line(line).unwrap());
}

/// Asserts that a tag has these steps and numbers, as near as 32 bits hold them, for both readers.
fn assert_scalars(read: &Value, tag: &str, expected: &[(u64, f64)]) {
    for reader in ["scalars", "pages"] {
        let found: Vec<(u64, f64)> = serde_json::from_value(read[reader][tag].clone()).unwrap();
        assert_eq!(found.len(), expected.len(), "{reader} {tag} {found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.0, expected.0, "{reader} {tag}");
            assert_eq!(found.1 as f32, expected.1 as f32, "{reader} {tag}");
        }
    }
}

#[test]
fn tensorboard_reads_every_number_with_its_step() {
    let folder = tempfile::tempdir().unwrap();
    let lines = [
        step(10),
        step(20),
        epoch(1, 20),
        look(20),
        step(30),
        epoch(2, 40),
    ];
    write(folder.path(), 0, &lines);
    let Some(read) = tensorboard(folder.path()) else {
        return;
    };
    let of_steps = |value: fn(f64) -> f64| [10, 20, 30].map(|s| (s, value(s as f64)));
    assert_scalars(&read, "train/loss", &of_steps(|x| 2.0 / x));
    assert_scalars(&read, "train/learning_rate", &of_steps(|x| 0.1 / x));
    assert_scalars(&read, "train/gradient_norm", &of_steps(|x| 3.0 * x));
    assert_scalars(&read, "train/images_per_second", &of_steps(|x| 100.0 + x));
    assert_scalars(&read, "train/wait_share", &of_steps(|x| 0.01 * x));
    let of_epochs = |first: f64| [(20, first), (40, first / 2.0)];
    assert_scalars(&read, "train/error", &of_epochs(90.0));
    assert_scalars(&read, "eval/error", &of_epochs(80.0));
    assert_scalars(&read, "eval/error5", &of_epochs(40.0));
    assert_scalars(&read, "eval/loss", &of_epochs(4.0));
    assert_scalars(&read, "diagnostics/root_distance", &[(20, 0.25)]);
    assert_scalars(&read, "diagnostics/gradient_norm/classifier", &[(20, 20.0)]);
    assert_eq!(read["scalars"].as_object().unwrap().len(), 11);

    let spectrum = &read["histograms"]["diagnostics/spectrum"];
    let [(at, [low, high, number, counted, _])]: [(u64, [f64; 5]); 1] =
        serde_json::from_value(spectrum.clone()).unwrap();
    assert_eq!((at, number, counted), (20, 3.0, 3.0));
    assert_eq!((low, high), (0.009_f64.log10(), 0.9_f64.log10()));
    // The pages take a histogram apart into rows of left, right and count.
    let rows: [(u64, Vec<[f64; 3]>); 1] =
        serde_json::from_value(read["pages"]["diagnostics/spectrum"].clone()).unwrap();
    assert_eq!(rows[0].1.iter().map(|r| r[2]).sum::<f64>(), 3.0);
}

#[test]
fn what_an_interrupted_run_wrote_beyond_its_checkpoint_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let first = [
        step(10),
        step(20),
        epoch(1, 20),
        step(30),
        step(40),
        look(40),
    ];
    write(folder.path(), 0, &first);
    // On from the checkpoint after step 20, at another pace: nothing of steps 30 and 40 stays.
    write(folder.path(), 20, &[step(25), step(35), epoch(2, 40)]);
    let Some(read) = tensorboard(folder.path()) else {
        return;
    };
    let loss = [10, 20, 25, 35].map(|s| (s, 2.0 / s as f64));
    assert_scalars(&read, "train/loss", &loss);
    assert_scalars(&read, "eval/error", &[(20, 80.0), (40, 40.0)]);
    let look = &read["scalars"]["diagnostics/root_distance"];
    assert!(look.as_array().is_none_or(Vec::is_empty), "{look}");
}

#[test]
fn a_run_begun_again_leaves_nothing_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 0, &[step(10), step(20)]);
    write(folder.path(), 0, &[step(5)]);
    let Some(read) = tensorboard(folder.path()) else {
        return;
    };
    assert_scalars(&read, "train/loss", &[(5, 0.4)]);
}
