//! The real binary, from outside: help, errors, plan, a run and its repetition.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn isqrt(dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isqrt"))
        .args(words)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// One line `error: ...` that says all of `parts`, nothing on standard output, exit code 1.
fn fails(words: &[&str], parts: &[&str]) {
    let dir = scratch();
    let output = isqrt(dir.path(), words);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {}", err(&output));
    let text = err(&output);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(out(&output), "");
}

#[test]
fn every_command_has_help_with_an_example() {
    let dir = scratch();
    for words in [
        &["--help"][..],
        &["reproduce", "--help"],
        &["iterations", "--help"],
        &["bench", "--help"],
        &["bench", "layer", "--help"],
        &["bench", "decomposition", "--help"],
        &["bench", "network", "--help"],
        &["bench", "loader", "--help"],
        &["data", "--help"],
        &["data", "verify", "--help"],
        &["data", "index", "--help"],
        &["data", "stats", "--help"],
        &["data", "make", "--help"],
        &["data", "presets", "--help"],
        &["report", "--help"],
        &["models", "--help"],
        &["convert", "--help"],
        &["features", "--help"],
        &["classify", "--help"],
    ] {
        let output = isqrt(dir.path(), words);
        assert!(output.status.success());
        let text = out(&output);
        assert!(text.contains("Example"), "{words:?}: {text}");
        assert!(text.contains("  isqrt "), "{words:?}: {text}");
    }
    // Paragraphs behind the first line are there too.
    for (words, part) in [
        (&["reproduce", "--help"][..], "at most the running cells"),
        (&["bench", "network", "--help"], "last stage at stride 1"),
        (&["convert", "--help"], "nothing in them is run"),
        (&["features", "--help"], "one a line, as bytes"),
    ] {
        let text = out(&isqrt(dir.path(), words)).replace('\n', " ");
        assert!(text.contains(part), "{words:?}: {text}");
    }
}

#[test]
fn wrong_usage_exits_with_two() {
    let dir = scratch();
    for words in [
        &["reproduce", "--sedes", "3"][..],
        &["bench", "layer", "--threads", "0"],
        &["reproduce", "--device", "gpu"],
        &[],
    ] {
        assert_eq!(isqrt(dir.path(), words).status.code(), Some(2), "{words:?}");
    }
}

#[test]
fn wrong_input_is_one_clear_line() {
    fails(
        &["reproduce", "--data", "no/such/folder"],
        &["no/such/folder"],
    );
    fails(
        &["reproduce", "iteratons"],
        &["`iteratons`", "did you mean `iterations`?"],
    );
    fails(
        &["reproduce", "--device", "cuda:0"],
        &["cuda:0", "without CUDA", "choose cpu"],
    );
    fails(
        &[
            "reproduce",
            "--profile",
            "paper",
            "--data",
            "no/such/folder",
        ],
        &["no/such/folder"],
    );
    fails(&["report", "."], &["holds no run"]);
    fails(
        &["models", "resnet50x"],
        &["\"resnet50x\"", "did you mean `resnet50`?"],
    );
    fails(
        &["models", "resnet50+isqr"],
        &["\"isqr\"", "did you mean `isqrt`?"],
    );
    fails(&["models", "isqrt"], &["pooling head", "resnet50+isqrt"]);
    fails(
        &["models", "e10net", "--size", "0"],
        &["1 to 2048", "got 0"],
    );
    fails(
        &["iterations", "--features", "none.safetensors"],
        &["none.safetensors"],
    );
    fails(&["bench", "layer", "--iterations", "0"], &["iterations"]);
    fails(
        &["bench", "network", "--model", "resnet5"],
        &["resnet5", "resnet50"],
    );
    fails(&["bench", "network", "--head", "max"], &["max", "isqrt"]);
    let huge = ["--dim", "3000000000", "--positions", "3000000000"];
    let parts = ["dim 3000000000", "2^31", "choose smaller sizes"];
    fails(&[&["iterations"][..], &huge].concat(), &parts);
    fails(&[&["bench", "layer"][..], &huge].concat(), &parts);
    fails(
        &["bench", "layer", "--batch", "18446744073709551615"],
        &["batch 18446744073709551615"],
    );
    fails(&["bench", "decomposition", "--dim", "3000000000"], &parts);
    fails(&["iterations", "--dim", "0"], &["dim 0", "at least 1"]);
    fails(&["iterations", "--plot", "a.png"], &["a.png", ".svg"]);
    fails(&["reproduce", "--experiments", "nowhere"], &["nowhere"]);
}

#[test]
fn an_empty_or_broken_folder_names_its_path() {
    let dir = scratch();
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let output = isqrt(
        dir.path(),
        &["reproduce", "iterations", "--smoke", "--data", "empty"],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("empty"), "{}", err(&output));
    for class in ["cat", "dog"] {
        let class = dir.path().join("broken/train").join(class);
        std::fs::create_dir_all(&class).unwrap();
        for i in 0..4 {
            std::fs::write(class.join(format!("{i}.png")), b"not an image").unwrap();
        }
    }
    let output = isqrt(
        dir.path(),
        &["reproduce", "iterations", "--smoke", "--data", "broken"],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains(".png"), "{}", err(&output));
}

#[test]
fn a_dry_run_shows_the_plan_and_writes_nothing() {
    let dir = scratch();
    let output = isqrt(dir.path(), &["reproduce", "--dry-run"]);
    assert!(output.status.success(), "{}", err(&output));
    let text = out(&output);
    for part in [
        "meta-layer-time",
        "iterations",
        "decomposition-time",
        "estimate",
        "seed 2",
        "mini-cub",
        "side by side",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // Images of one's own that no experiment of the plan can take.
    let here = ["reproduce", "fine-grained", "--data", ".", "--dry-run"];
    let output = isqrt(dir.path(), &here);
    assert!(output.status.success(), "{}", err(&output));
    assert!(
        out(&output).contains("not run: fine-grained"),
        "{}",
        out(&output)
    );
    let output = isqrt(
        dir.path(),
        &["reproduce", "--dry-run", "--json", "--search"],
    );
    for line in out(&output).lines() {
        let cell: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(
            cell["experiment"].is_string() && cell["seconds"].is_number(),
            "{line}"
        );
    }
    assert!(out(&output).contains("search@0.05"));
}

#[test]
fn the_paper_profile_says_what_training_needs() {
    let dir = scratch();
    let output = isqrt(
        dir.path(),
        &["reproduce", "--profile", "paper", "--dry-run"],
    );
    assert!(output.status.success(), "{}", err(&output));
    assert!(
        out(&output).contains("needs --data ROOT with the data set in ROOT/imagenet"),
        "{}",
        out(&output)
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// The recipe of a row of the table, on a miniature of the data set that it is for.
#[test]
fn the_paper_profile_trains_what_the_recipes_say_and_tells_the_hours() {
    let dir = scratch();
    let made = isqrt(dir.path(), &["data", "make", "imagenet", "root/imagenet"]);
    assert!(made.status.success(), "{}", err(&made));
    let words = [
        "reproduce",
        "resnet50",
        "--row",
        "isqrt-n5",
        "--profile",
        "paper",
        "--data",
        "root",
    ];
    let plan = isqrt(dir.path(), &[&words[..], &["--dry-run"]].concat());
    assert!(plan.status.success(), "{}", err(&plan));
    let text = out(&plan);
    let hours = text.split("estimate: ").nth(1).unwrap().split(' ').next();
    // 65 epochs of 1.3 million images on any processor.
    assert!(hours.unwrap().parse::<f64>().unwrap() > 10.0, "{text}");
    let run = isqrt(
        dir.path(),
        &[&words[..], &["--smoke", "--out", "run"]].concat(),
    );
    assert!(run.status.success(), "{}", err(&run));
    assert!(out(&run).contains("1 cell run"), "{}", out(&run));
    let records = std::fs::read_to_string(dir.path().join("run/records.jsonl")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&records).unwrap();
    assert_eq!(record["profile"], "paper");
    assert_eq!(record["on"], "imagenet");
    assert_eq!(record["config"]["spec"], "imagenet/resnet50-isqrt.toml");
    assert!(record["value"].is_number());
}

#[test]
fn a_smoke_run_writes_records_and_report_and_a_second_one_has_nothing_to_do() {
    let dir = scratch();
    let output = isqrt(
        dir.path(),
        &["reproduce", "--smoke", "--out", "run", "--json"],
    );
    assert!(output.status.success(), "{}", err(&output));
    let lines = out(&output);
    assert!(lines.lines().count() > 20, "{lines}");
    for line in lines.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["profile"], "mini");
        let told = record["value"].is_number() || record["words"].is_string();
        assert!(told, "{line}");
    }
    let page = std::fs::read_to_string(dir.path().join("run/report/index.html")).unwrap();
    for part in [
        "unverified",
        "not implemented here",
        "smallest size",
        "global average pooling",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // The smallest size decides nothing.
    for part in [
        "class=\"claims\"",
        "class=\"order\"",
        "Learning rates (",
        "<small>Δ",
    ] {
        assert!(!page.contains(part), "{part}");
    }
    let again = isqrt(dir.path(), &["reproduce", "--smoke", "--out", "run"]);
    assert!(again.status.success(), "{}", err(&again));
    assert!(out(&again).contains("0 cells run"), "{}", out(&again));
    let report = isqrt(dir.path(), &["report", "run"]);
    assert!(out(&report).contains("index.html"));
    let rendered = std::fs::read_to_string(dir.path().join("run/report/index.html")).unwrap();
    assert_eq!(rendered, page);
    // A dry run mends no images.
    let lost = dir.path().join("run/data/e10-smoke/val/01-23-45/0000.png");
    std::fs::remove_file(&lost).unwrap();
    let dry = isqrt(
        dir.path(),
        &["reproduce", "--smoke", "--out", "run", "--dry-run"],
    );
    assert!(dry.status.success(), "{}", err(&dry));
    assert!(!lost.exists());
}

#[test]
fn a_read_only_output_folder_is_one_clear_line() {
    let dir = scratch();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let output = isqrt(
        dir.path(),
        &["reproduce", "meta-layer-time", "--smoke", "--out", "file/x"],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err(&output).contains("cannot make the folder file/x"),
        "{}",
        err(&output)
    );
}

#[test]
fn a_closed_pipe_is_no_error() {
    let dir = scratch();
    let mut child = Command::new(env!("CARGO_BIN_EXE_isqrt"))
        .args(["reproduce", "--dry-run"])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", err(&output));
    assert_eq!(err(&output), "");
}

#[test]
fn iterations_gives_rows_a_plot_and_json() {
    let dir = scratch();
    let words = [
        "iterations",
        "--dim",
        "12",
        "--positions",
        "30",
        "--batch",
        "2",
        "--budget",
        "0",
    ];
    let output = isqrt(
        dir.path(),
        &[&words[..], &["--plot", "errors.svg"]].concat(),
    );
    assert!(output.status.success(), "{}", err(&output));
    for part in ["gradient_error", "newton-schulz", "cubic(0.1)", "└"] {
        assert!(out(&output).contains(part), "{part} in {}", out(&output));
    }
    let svg = std::fs::read_to_string(dir.path().join("errors.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("newton-schulz"));
    let output = isqrt(dir.path(), &[&words[..], &["--json"]].concat());
    let rows: Vec<serde_json::Value> = out(&output)
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let error = |n: u64| {
        let found = |r: &&serde_json::Value| r["schedule"] == "newton-schulz" && r["n"] == n;
        rows.iter().find(found).unwrap()["root_error"]
            .as_f64()
            .unwrap()
    };
    assert!(error(7) < error(5) && error(5) < error(1));
}

#[test]
fn bench_prints_both_implementations() {
    let dir = scratch();
    let words = [
        "bench",
        "layer",
        "--batch",
        "2",
        "--dim",
        "16",
        "--positions",
        "9",
    ];
    let output = isqrt(
        dir.path(),
        &[&words[..], &["--budget", "0", "--json"]].concat(),
    );
    assert!(output.status.success(), "{}", err(&output));
    let rows: Vec<serde_json::Value> = out(&output)
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(rows[0]["implementation"], "ours");
    assert_eq!(rows[1]["implementation"], "reference");
    for key in [
        "case",
        "threads",
        "forward_ms",
        "backward_ms",
        "gflops",
        "peak_share",
    ] {
        assert!(!rows[0][key].is_null(), "{key}");
    }
    let output = isqrt(
        dir.path(),
        &[
            "bench",
            "decomposition",
            "--dim",
            "16",
            "--batch",
            "2",
            "--budget",
            "0",
        ],
    );
    assert!(output.status.success(), "{}", err(&output));
    assert!(out(&output).contains("svd"), "{}", out(&output));
}

#[test]
fn bench_network_times_a_step_and_its_ops() {
    let dir = scratch();
    let words = [
        "bench", "network", "--model", "e10net", "--head", "isqrt", "--batch", "2", "--size", "32",
        "--budget", "0",
    ];
    let run = |more: &[&str]| {
        let output = isqrt(dir.path(), &[&words[..], more].concat());
        assert!(output.status.success(), "{}", err(&output));
        out(&output)
    };
    let rows: Vec<serde_json::Value> = run(&["--ops", "--json", "--threads", "1"])
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(rows[0]["case"], "network e10net isqrt batch=2 size=32");
    assert_eq!(rows[0]["implementation"], "ours");
    assert_eq!(rows[0]["threads"], 1);
    for key in ["forward_ms", "backward_ms", "step_ms", "images_per_s"] {
        assert!(rows[0][key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(rows.len(), 12);
    for row in &rows[1..9] {
        for key in ["forward_ms", "backward_ms", "dw_ms", "gflops", "peak_share"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
    }
    let text = run(&[]);
    assert!(
        text.contains("training step") && text.contains("images/s"),
        "{text}"
    );
}

#[test]
fn models_lists_the_registry_or_the_stages_of_one_network() {
    let dir = scratch();
    let run = |words: &[&str]| {
        let output = isqrt(dir.path(), words);
        assert!(output.status.success(), "{}", err(&output));
        out(&output)
    };
    let list = run(&["models"]);
    assert!(
        list.contains("resnet50") && list.contains("isqrt"),
        "{list}"
    );

    let words = ["models", "resnet18+isqrt", "--size", "64", "--classes", "7"];
    let text = run(&words);
    assert!(
        text.starts_with("resnet18 (last_stride = 1, reduction = 256) + isqrt; 7 classes"),
        "{text}"
    );
    let text = run(&[&words[..], &["--json"]].concat());
    let rows: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let (total, stages) = rows.split_last().unwrap();
    assert_eq!(total["stage"], "total");
    assert_eq!(stages.last().unwrap()["stage"], "classifier");
    assert_eq!(
        stages.last().unwrap()["parameters"],
        7 * (256 * 257 / 2 + 1)
    );
    for key in ["parameters", "multiply_adds", "activation_bytes"] {
        let sum: u64 = stages.iter().map(|s| s[key].as_u64().unwrap()).sum();
        assert_eq!(total[key], sum, "{key}");
    }
}
