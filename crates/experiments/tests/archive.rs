//! Kept results, and the pages of this repository that show them.
#![allow(clippy::unwrap_used)]

mod common;

use common::run_small;
use isqrt_experiments::archive;
use isqrt_experiments::plan::Request;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn pages_show_what_the_records_say() {
    let (root, records) = (root(), root().join("experiments/records"));
    let again =
        "isqrt report --archive experiments/records --results docs/results.md --tables README.md";
    let found = fs::read_to_string(root.join("docs/results.md")).unwrap();
    let made = archive::results_page(&records).unwrap();
    assert!(
        found == made,
        "docs/results.md differs from the records: {again}"
    );
    let found = fs::read_to_string(root.join("README.md")).unwrap();
    let made = archive::put_tables(&found, &records).unwrap();
    assert!(found == made, "README.md differs from the records: {again}");
    assert!(found.contains("<!-- records: "));
}

#[test]
fn kept_records_are_whole_and_name_no_machine_of_ours() {
    let records = root().join("experiments/records");
    let all = archive::read(&records).unwrap();
    assert!(!all.is_empty());
    for (name, plan, store) in all {
        assert_eq!(store.warnings(), [""; 0], "{name}");
        let text = fs::read_to_string(records.join(&name).join("plan.json")).unwrap();
        for part in ["/work", "/home", "/tmp", "/root"] {
            assert!(!text.contains(part), "{part} in {name}");
        }
        for planned in &plan.experiments {
            for cell in planned.cells.iter().filter(|c| !c.key.is_empty()) {
                assert!(store.latest(&cell.key).is_some(), "{name}: {}", cell.name());
            }
        }
        for file in ["spec.toml", "environment.json"] {
            assert!(records.join(&name).join(file).is_file(), "{name}");
        }
    }
}

#[test]
fn a_run_is_kept_whole_or_not_at_all() {
    let home = tempfile::tempdir().unwrap();
    let (run, kept) = (home.path().join("run"), home.path().join("kept"));
    assert!(run_small(&run, &Request::default(), 2).is_err());
    let error = archive::save(&run, &kept, None).unwrap_err().to_string();
    assert!(error.contains("is not done yet"), "{error}");
    run_small(&run, &Request::default(), 99).unwrap();
    assert_eq!(archive::save(&run, &kept, None).unwrap(), ["small"]);
    assert_eq!(
        archive::save(&run, &kept, Some("birds")).unwrap(),
        ["small.birds"]
    );
    let request = Request {
        rows: vec!["gap".to_owned()],
        ..Request::default()
    };
    let part = home.path().join("part");
    run_small(&part, &request, 99).unwrap();
    let error = archive::save(&part, &kept, None).unwrap_err().to_string();
    assert!(error.contains("row five was left out by --row"), "{error}");
    let lines = fs::read_to_string(kept.join("small/records.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 5);
    let spec = fs::read_to_string(kept.join("small/spec.toml")).unwrap();
    let again: isqrt_experiments::spec::Experiment = toml::from_str(&spec).unwrap();
    assert_eq!(again.rows.len(), 3);
    // The report of a kept folder is that of the run.
    isqrt_experiments::report::write(&kept.join("small")).unwrap();
    let page = archive::results_page(&kept).unwrap();
    assert!(
        page.contains("`small`") && page.contains("`small.birds`"),
        "{page}"
    );
    let text = "before\n<!-- records: small -->\nold\n<!-- end -->\nafter";
    let made = archive::put_tables(text, &kept).unwrap();
    assert!(
        made.contains("| N = 5 |") && !made.contains("old"),
        "{made}"
    );
    assert!(
        made.starts_with("before\n") && made.ends_with("\nafter"),
        "{made}"
    );
    assert_eq!(archive::put_tables(&made, &kept).unwrap(), made);
    assert!(archive::put_tables("<!-- records: small -->", &kept).is_err());
    let smoke = home.path().join("smoke");
    let request = Request {
        smoke: true,
        ..Request::default()
    };
    run_small(&smoke, &request, 99).unwrap();
    let error = archive::save(&smoke, &kept, None).unwrap_err().to_string();
    assert!(error.contains("smallest size"), "{error}");
}
