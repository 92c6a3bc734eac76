//! A run that was stopped goes on where it was, whatever state the files are in.
#![allow(clippy::unwrap_used)]

mod common;

use common::{plan_small, run_small};
use isqrt_experiments::Error;
use isqrt_experiments::plan::{Profile, Request, State};
use isqrt_experiments::record::{FILE, Store};
use std::fs;
use std::io::Write;

const ALL: usize = 5;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_second_run_skips_everything() {
    let dir = dir();
    let request = Request::default();
    let first = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((first.ran, first.skipped), (ALL, 0));
    let before = fs::read(dir.path().join(FILE)).unwrap();
    let second = run_small(dir.path(), &request, 0).unwrap();
    assert_eq!((second.ran, second.skipped), (0, ALL));
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), before);
}

#[test]
fn a_stopped_run_keeps_what_was_done() {
    let dir = dir();
    let request = Request::default();
    assert!(matches!(
        run_small(dir.path(), &request, 2),
        Err(Error::Stopped)
    ));
    let again = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (ALL - 2, 2));
}

#[test]
fn a_last_line_cut_short_is_dropped_and_its_cell_runs_again() {
    let request = Request::default();
    for cut in [1, 2, 10, 200] {
        let dir = dir();
        run_small(dir.path(), &request, 99).unwrap();
        let path = dir.path().join(FILE);
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - cut]).unwrap();
        let read = Store::read(dir.path()).unwrap();
        assert_eq!(read.records().len(), ALL - 1);
        assert!(
            read.warnings()[0].contains("cut short"),
            "{:?}",
            read.warnings()
        );
        let again = run_small(dir.path(), &request, 99).unwrap();
        assert_eq!((again.ran, again.skipped), (1, ALL - 1));
        let whole = Store::read(dir.path()).unwrap();
        assert_eq!((whole.records().len(), whole.warnings().len()), (ALL, 0));
    }
}

#[test]
fn a_broken_line_in_the_middle_is_named_and_the_rest_is_kept() {
    let dir = dir();
    let request = Request::default();
    run_small(dir.path(), &request, 99).unwrap();
    let path = dir.path().join(FILE);
    let mut lines: Vec<String> = fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines[1] = "{\"seed\": \"x\"}".to_owned();
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    let store = Store::read(dir.path()).unwrap();
    assert_eq!(store.records().len(), ALL - 1);
    assert!(store.warnings()[0].contains("records.jsonl:2: not a record"));
}

#[test]
fn a_damaged_plan_is_written_anew() {
    let dir = dir();
    let request = Request::default();
    run_small(dir.path(), &request, 99).unwrap();
    let mut file = fs::File::create(dir.path().join("plan.json")).unwrap();
    file.write_all(b"{\"experiments\": [").unwrap();
    assert_eq!(run_small(dir.path(), &request, 0).unwrap().skipped, ALL);
}

#[test]
fn fresh_runs_everything_again_and_the_latest_record_counts() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let fresh = Request {
        fresh: true,
        ..Request::default()
    };
    assert_eq!(run_small(dir.path(), &fresh, 99).unwrap().ran, ALL);
    let store = Store::read(dir.path()).unwrap();
    assert_eq!(store.records().len(), 2 * ALL);
}

#[test]
fn more_seeds_run_only_the_new_ones() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let more = Request {
        seeds: Some(4),
        ..Request::default()
    };
    let again = run_small(dir.path(), &more, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (4, ALL));
}

#[test]
fn the_plan_knows_what_is_done_and_how_long_the_rest_takes() {
    let dir = dir();
    let request = Request::default();
    let store = Store::read(dir.path()).unwrap();
    let plan = plan_small(&request, &store);
    assert_eq!(plan.todo().count(), ALL);
    assert!(plan.seconds_left() > 0.0);
    run_small(dir.path(), &request, 99).unwrap();
    let store = Store::read(dir.path()).unwrap();
    let plan = plan_small(&request, &store);
    assert!(
        plan.experiments[0]
            .cells
            .iter()
            .all(|c| c.state == State::Done)
    );
    assert_eq!(plan.seconds_left(), 0.0);
}

#[test]
fn a_search_chooses_each_rate_on_the_validation_part_and_is_resumed_too() {
    let dir = dir();
    let request = Request {
        search: true,
        ..Request::default()
    };
    // Two heads, two rates each, and what a plain run does.
    let all = ALL + 4;
    assert!(run_small(dir.path(), &request, 3).is_err());
    let again = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (all - 3, 3));
    let store = Store::read(dir.path()).unwrap();
    let trained = || store.records().iter().filter(|r| r.measure == "train");
    assert_eq!(trained().count(), 4);
    // The made-up error grows with the rate, so 0.1 is best for both heads.
    assert!(
        trained().all(|r| r.config["lr"] == 0.1),
        "{:?}",
        trained().collect::<Vec<_>>()
    );
    assert_eq!(run_small(dir.path(), &request, 0).unwrap().skipped, all);
    let rates = fs::read_to_string(dir.path().join("rates.toml")).unwrap();
    assert!(rates.contains("[rates.small.heads]\n"), "{rates}");
    assert!(
        rates.contains("gap = { lr = 0.1, outcome = [[0.1, 21.10], [0.2, 21.20]] }"),
        "{rates}"
    );
}

#[test]
fn the_paper_profile_times_but_does_not_train() {
    let dir = dir();
    let request = Request {
        profile: Profile::Paper,
        ..Request::default()
    };
    let summary = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((summary.ran, summary.not_run), (1, 2));
    let page = fs::read_to_string(dir.path().join("report/index.html")).unwrap();
    assert!(page.contains("needs ImageNet and a later version"));
}

#[test]
fn a_folder_in_use_is_refused() {
    let dir = dir();
    let _held = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("in use by another run"), "{error}");
}

#[test]
fn a_record_holds_what_is_needed_to_judge_it() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
    for line in text.lines() {
        let r: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in [
            "experiment",
            "cell",
            "profile",
            "seed",
            "metric",
            "value",
            "unit",
            "paper",
            "paper_source",
            "paper_verified",
            "config",
            "commit",
            "machine",
            "data",
            "epochs",
            "started",
            "finished",
            "key",
        ] {
            assert!(r.get(key).is_some(), "{key} in {line}");
        }
        if r["measure"] == "train" {
            assert_eq!(r["epochs"].as_array().unwrap().len(), 3);
            assert_eq!(r["data"]["fingerprint"], "abc");
        } else {
            assert_eq!(r["more"][0]["paper"], 0.41);
            assert_eq!(r["more"][0]["paper_verified"], false);
        }
    }
}
