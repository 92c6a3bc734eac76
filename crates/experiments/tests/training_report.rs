//! The report of training runs, of folders as `isqrt train` writes them, whole and broken.
#![allow(clippy::unwrap_used)]

use isqrt_experiments::report;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const SPEC: &str = r#"
title = "Textures <e10>"
epochs = 4
seed = 7
[model]
backbone = "e10net"
representation = { name = "isqrt", iterations = 5 }
[data]
set = "e10"
"#;

fn epoch(epoch: u64, error: f64) -> Value {
    json!({
        "kind": "epoch", "epoch": epoch, "step": 20 * epoch, "train_loss": 2.125 / epoch as f64,
        "train_error": error + 3.0, "eval_loss": 1.5, "eval_error": error, "eval_error5": error / 4.0,
        "seconds": 61.0, "run_seconds": 61.0 * epoch as f64, "cpu_seconds": 119.0 * epoch as f64,
        "images_per_second": 87.25, "wait_share": 0.125,
    })
}

fn step(step: u64) -> Value {
    json!({
        "kind": "step", "step": step, "epoch": 1 + step / 21, "loss": 2.0, "learning_rate": 0.05,
        "gradient_norm": 1.5, "images_per_second": 80.0, "wait_share": 0.1, "seconds": step,
    })
}

fn look(step: u64) -> Value {
    json!({
        "kind": "diagnostics", "step": step, "epoch": 1, "seconds": 1.0, "spectrum": [0.9, 0.09, 0.01, 0.0],
        "root_distance": 0.03, "gradient_norms": { "backbone.layer1": 0.5, "classifier": 0.25 },
    })
}

fn text(lines: &[Value]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A folder with a spec and these metrics.
fn run(parent: &Path, name: &str, metrics: &str) -> PathBuf {
    let folder = parent.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("spec.toml"), SPEC).unwrap();
    fs::write(folder.join("metrics.jsonl"), metrics).unwrap();
    folder
}

/// The same with a result, an environment and a table of answers.
fn finished(parent: &Path, name: &str) -> PathBuf {
    let lines = [
        step(10),
        look(10),
        epoch(1, 40.0),
        look(30),
        epoch(2, 20.0),
        epoch(3, 24.0),
    ];
    let folder = run(parent, name, &text(&lines));
    let result = json!({
        "status": "finished", "epochs": 3, "steps": 60, "parameters": 123_456,
        "best": { "epoch": 2, "eval_error": 20.0, "test": { "error": 22.25, "correct": 156 } },
        "final": { "error": 24.5, "error5": 6.5, "correct": 151, "correct5": 187, "total": 200,
            "loss": 0.7125, "calibration_error": 0.0625, "per_class": [[80, 100], [71, 100]] },
        "wall_seconds": 200.0, "cpu_seconds": 390.0, "images_per_second": 91.5,
        "peak_memory_mb": 321.0, "spec_hash": "abc123",
    });
    let environment = json!({
        "commit": "0123456789ab", "dirty": true, "cpu": "A processor", "cores": 4, "threads": 2,
        "device": "cpu", "os": "linux x86_64", "version": "0.1.0", "started": 951_782_400,
        "data": { "name": "e10", "fingerprint": "feed", "train": 800, "eval": 200, "test": 200, "classes": 2 },
    });
    fs::write(folder.join("result.json"), result.to_string()).unwrap();
    fs::write(folder.join("environment.json"), environment.to_string()).unwrap();
    let answers = "label\\answer,wood,\"stone, wet\"\nwood,80,20\n\"stone, wet\",29,71\n";
    fs::write(folder.join("confusion.csv"), answers).unwrap();
    folder
}

/// Both forms of the report of these folders.
fn both(folders: &[PathBuf]) -> [String; 2] {
    let page = report::write_folders(folders, None).unwrap();
    assert_eq!(page, folders[0].join("report/index.html"));
    let markdown = fs::read_to_string(page.with_file_name("report.md")).unwrap();
    [fs::read_to_string(page).unwrap(), markdown]
}

fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_finished_run_shows_every_number_that_it_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let [page, markdown] = both(&[finished(folder.path(), "one")]);
    for text in [&page, &markdown] {
        holds(
            text,
            &[
                "finished",
                "e10net + isqrt (iterations = 5)",
                "123\u{202f}456",
                "3 of 4",
                "24.00 %", // last
                "20.00 %", // best
                "epoch 2",
                "6.00 %", // top-5
                "5.00 %",
                "22.25 %", // best, final part
                "on the test part, 156 of 200 right",
                "24.50 %", // final
                "151 of 200 right",
                "6.50 %",
                "187 of 200 right",
                "0.713", // loss to three digits, 0.7125 rounds to even or up
                "0.0625",
                "91.5",
                "12.5 %", // waiting
                "3 min 20 s",
                "6 min 30 s",
                "321 MB",
                "800 train, 200 eval, 200 test, 2 classes",
                "0123456789ab, with changes",
                "A processor",
                "4, 2 threads used",
                "2000-02-29 00:00 UTC",
                "abc123",
                "feed",
                "stone, wet",
                "71.00 %", // worst class
                "29.00 %", // largest confusion
            ],
        );
    }
    holds(
        &page,
        &[
            "Textures &lt;e10&gt;",
            "Evaluation error",
            "Training error",
            "Training loss",
            "Learning rate",
            "Spectrum of the covariance",
            "update 30 (epoch 1)",
            "Distance of the layer's output",
            "backbone.layer1",
            "time (min)",
        ],
    );
    assert!(!page.contains("<e10>") && !page.contains("NaN"));
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    for part in ["http://", "https://", "<script", "<link", "url("] {
        assert!(!outside.contains(part), "{part}");
    }
}

#[test]
fn a_run_that_goes_on_or_was_killed_shows_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let skipped = json!({ "kind": "skipped", "step": 7, "epoch": 1, "problem": "the loss is NaN" });
    let later = json!({ "kind": "of a later version", "step": 9 });
    let mut metrics = text(&[step(5), skipped, later, epoch(1, 55.5)]);
    metrics += "no line of ours\n";
    metrics += &text(&[step(25)]).replace("2.0", "null");
    let whole = text(&[epoch(2, 11.5)]);
    metrics += &whole[..whole.len() / 2];
    let one = run(folder.path(), "killed", &metrics);
    for text in both(&[one]) {
        holds(
            &text,
            &[
                "unfinished: still going, or killed",
                "1 of 4",
                "55.50 %",
                "1 min 1 s",
                "87.2",
                "the last line is half-written",
                "1 lines that cannot be read (the first is line 5)",
                "1 updates were left out, the first after update 7: the loss is NaN",
            ],
        );
        assert!(!text.contains("11.50"), "{text}");
        assert!(!text.contains("final top-1"), "{text}");
    }
}

#[test]
fn steps_that_were_written_again_after_a_restart_count_once() {
    let folder = tempfile::tempdir().unwrap();
    let lines = [
        epoch(1, 50.0),
        epoch(2, 77.75),
        epoch(2, 44.25),
        epoch(3, 33.0),
    ];
    let one = run(folder.path(), "again", &text(&lines));
    for text in both(&[one]) {
        holds(&text, &["50.00", "44.25", "33.00"]);
        assert!(!text.contains("77.75"), "{text}");
    }
}

#[test]
fn runs_lie_beside_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let first = finished(folder.path(), "isqrt");
    let second = run(folder.path(), "gap", &text(&[epoch(1, 66.75)]));
    let empty = run(folder.path(), "new", "");
    let [page, markdown] = both(&[first, second, empty]);
    holds(
        &page,
        &["3 runs", ">isqrt<", ">gap<", ">new<", "no numbers yet"],
    );
    let row = |name: &str| {
        markdown
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap()
    };
    assert_eq!(
        row("| top-1 error, last epoch"),
        "| top-1 error, last epoch | 24.00 % on the validation part | 66.75 % | – |"
    );
    assert_eq!(
        row("| epochs done"),
        "| epochs done | 3 of 4 | 1 of 4 | 0 of 4 |"
    );
    // A curve of each run in the plot of evaluation errors, each in its colour.
    let plot = page.split("<figure>").nth(1).unwrap();
    holds(plot, &["polyline class=\"s0\"", "circle class=\"s1 dot\""]);
}

#[test]
fn runs_of_the_same_name_are_told_apart_and_the_page_can_go_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let first = run(folder.path(), "a/run", &text(&[epoch(1, 10.0)]));
    let second = run(folder.path(), "b/run", &text(&[epoch(1, 20.0)]));
    let out = folder.path().join("comparison");
    let page = report::write_folders(&[first.clone(), second], Some(&out)).unwrap();
    assert_eq!(page, out.join("report/index.html"));
    assert!(!first.join("report").exists());
    holds(&fs::read_to_string(page).unwrap(), &["a/run", "b/run"]);
}

#[test]
fn files_that_are_none_of_ours_are_said_and_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let one = run(folder.path(), "odd", &text(&[epoch(1, 12.25)]));
    for (name, text) in [
        ("spec.toml", "title = \n"),
        ("result.json", "[1, 2"),
        ("environment.json", "\"text\""),
        ("confusion.csv", "label\\answer,a,b\na,1,2\n"),
    ] {
        fs::write(one.join(name), text).unwrap();
    }
    for text in both(&[one]) {
        holds(
            &text,
            &[
                "12.25 %",
                "spec.toml: ",
                "result.json: ",
                "1 rows for 2 classes",
            ],
        );
    }
}

#[test]
fn a_wrong_folder_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let good = run(folder.path(), "run", "");
    let message = |folders: &[PathBuf], out: Option<&Path>| {
        let message = report::write_folders(folders, out).unwrap_err().to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    };
    let nothing = folder.path().join("nothing");
    let text = message(&[good.clone(), nothing.clone()], None);
    let expected =
        "holds no run (no metrics.jsonl of `train`, no plan.json of `reproduce`): give the folder";
    holds(&text, &[nothing.to_str().unwrap(), expected]);
    let reproduced = folder.path().join("reproduced");
    fs::create_dir(&reproduced).unwrap();
    fs::write(reproduced.join("plan.json"), "{}").unwrap();
    for (folders, out) in [
        (vec![good, reproduced.clone()], None),
        (vec![reproduced.clone()], Some(folder.path())),
    ] {
        let text = message(&folders, out);
        holds(&text, &[reproduced.to_str().unwrap(), "give it alone"]);
    }
}
