//! The report says everything that the plan and the records say, and nothing more.
#![allow(clippy::unwrap_used)]

mod common;

use common::run_small;
use isqrt_experiments::plan::Request;
use isqrt_experiments::report;
use std::fs;
use std::path::Path;

fn page(dir: &Path) -> String {
    fs::read_to_string(dir.join("report/index.html")).unwrap()
}

fn markdown(dir: &Path) -> String {
    fs::read_to_string(dir.join("report/report.md")).unwrap()
}

#[test]
fn both_forms_show_every_cell_the_paper_and_what_was_not_run() {
    let dir = tempfile::tempdir().unwrap();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    for text in [page(dir.path()), markdown(dir.path())] {
        for part in [
            "A small experiment",
            "Table 0",
            "N = 5",
            "G²DeNet", // rows
            "20.2",
            "5.1",
            "(2 runs)",
            "0.500", // ours
            "0.41",
            "4.76",
            "unverified", // the paper's
            "not yet run",
            "comes later", // not run
            "seen here",
            "second order is ahead of first order",
            "2 pairs", // claims
            "31.5",
            "25.5",
            "recorded before", // rates
            "made up",
            "isqrt reproduce small",
            "5 of 5 cells done",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}

#[test]
fn only_unverified_values_are_marked() {
    let dir = tempfile::tempdir().unwrap();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let text = markdown(dir.path());
    assert!(text.contains("0.41 (unverified)"));
    assert!(text.contains("4.76 |"), "{text}");
}

#[test]
fn the_page_is_one_file_that_escapes_what_it_shows() {
    let dir = tempfile::tempdir().unwrap();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let text = page(dir.path());
    assert!(text.contains("average &lt;pooling&gt;") && !text.contains("<pooling>"));
    let allowed = text.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
        assert!(!allowed.contains(outside), "{outside}");
    }
    assert!(text.contains("<svg") && text.contains("prefers-color-scheme: dark"));
}

#[test]
fn a_run_that_was_stopped_shows_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let _stopped = run_small(dir.path(), &Request::default(), 2);
    let text = markdown(dir.path());
    assert!(text.contains("2 of 5 cells done"), "{text}");
    assert!(text.contains("not yet run, 2 cells"), "{text}");
    assert!(text.contains("**not decided**"), "{text}");
}

#[test]
fn rendering_again_gives_the_same_page() {
    let dir = tempfile::tempdir().unwrap();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let before = page(dir.path());
    report::write(dir.path()).unwrap();
    assert_eq!(page(dir.path()), before);
}

#[test]
fn tables_are_written_for_other_programs() {
    let dir = tempfile::tempdir().unwrap();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let read =
        |name: &str| fs::read_to_string(dir.path().join("report/tables").join(name)).unwrap();
    let csv = read("small.csv");
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let head = reader.headers().unwrap().clone();
    let lines: Vec<csv::StringRecord> = reader.records().map(|r| r.unwrap()).collect();
    let find = |row: &str, metric: &str, column: &str| {
        let at = |name| head.iter().position(|h| h == name).unwrap();
        let line = lines
            .iter()
            .find(|l| &l[at("row")] == row && &l[at("metric")] == metric);
        line.unwrap()[at(column)].to_owned()
    };
    assert_eq!(find("five", "forward_ms", "ours"), "0.5");
    assert_eq!(find("five", "forward_ms", "paper"), "0.41");
    assert_eq!(find("five", "forward_ms", "paper_verified"), "false");
    assert_eq!(
        find("five", "forward_ms", "difference"),
        (0.5 - 0.41_f64).to_string()
    );
    assert_eq!(find("later", "forward_ms", "paper_source"), "README");
    assert_eq!(find("gap", "top1_error", "runs"), "2");
    let tex = read("small.tex");
    for part in [
        "\\toprule",
        "\\midrule",
        "\\bottomrule",
        "N = 5",
        "G$^2$DeNet",
        "0.41$^{*}$",
    ] {
        assert!(tex.contains(part), "{part} in {tex}");
    }
}

#[test]
fn a_folder_without_a_run_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = report::write(dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds no run (no plan.json)"), "{error}");
}
