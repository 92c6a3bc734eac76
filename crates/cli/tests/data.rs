//! `isqrt data` and `isqrt bench loader` on small sets in every layout.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn isqrt(dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isqrt"))
        .args(words)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a command that must work.
fn works(dir: &Path, words: &[&str]) -> String {
    let output = isqrt(dir, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Standard output and the one line of a command that must fail.
fn fails(dir: &Path, words: &[&str]) -> (String, String) {
    let output = isqrt(dir, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("error: "), "{error}");
    (String::from_utf8(output.stdout).unwrap(), error)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().next().unwrap()).unwrap()
}

#[test]
fn every_miniature_is_made_verified_and_listed() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    for (name, layout) in [
        ("imagenet", "imagenet-1k"),
        ("imagenet-folder", "folder"),
        ("imagenet-archives", "imagenet-archives"),
        ("kaggle", "imagenet-1k"),
        ("cub", "cub-200-2011"),
        ("cars", "stanford-cars"),
        ("cars-combined", "stanford-cars"),
        ("aircraft", "fgvc-aircraft-2013b"),
        ("shards", "shards"),
        ("list", "list"),
    ] {
        let made = json(&works(home, &["data", "make", name, name, "--json"]));
        assert_eq!((&made["train"], &made["classes"]), (&18.into(), &3.into()));
        let listed = json(&works(home, &["data", "index", name, "--json"]));
        assert_eq!(listed["train"], 18, "{name}");
        // A miniature is not the set that it is a miniature of, but a sound set of its layout.
        let words = [
            "data", "verify", layout, name, "--level", "decode", "--json",
        ];
        let known = layout.contains("1k") || layout.contains("20") || layout.contains("cars");
        if known {
            let (report, error) = fails(home, &words);
            let report = json(&report);
            assert_eq!(report["found"]["train"], 18, "{name}: {error}");
            let kinds: Vec<&str> = report["findings"]
                .as_array()
                .unwrap()
                .iter()
                .map(|finding| finding["kind"].as_str().unwrap())
                .collect();
            assert!(kinds.contains(&"count"), "{kinds:?}");
            assert!(!kinds.contains(&"broken-image"), "{kinds:?}");
            assert!(!kinds.contains(&"missing-file"), "{kinds:?}");
        } else {
            let report = json(&works(home, &words));
            assert_eq!(report["found"]["train"], 18, "{name}");
        }
    }
    let (_, error) = fails(home, &["data", "make", "cub", "cub"]);
    assert!(error.contains("not empty"), "{error}");
}

#[test]
fn what_is_broken_or_missing_is_told() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    works(home, &["data", "make", "list", "set"]);
    let images: Vec<_> = std::fs::read_dir(home.join("set/images"))
        .unwrap()
        .flatten()
        .collect();
    std::fs::write(images[0].path(), b"no image").unwrap();
    std::fs::remove_file(images[1].path()).unwrap();
    let words = ["data", "verify", "list", "set", "--level", "decode"];
    let (report, error) = fails(home, &words);
    assert!(error.contains("2 things are wrong"), "{error}");
    for image in &images[..2] {
        let name = image.file_name().into_string().unwrap();
        assert!(report.contains(&name), "{name} in {report}");
    }
    let text = works(home, &["data", "stats", "set"]);
    assert_eq!(text.matches("broken: ").count(), 2, "{text}");

    let (_, error) = fails(home, &["data", "verify", "nothing", "set"]);
    assert!(error.contains("cub-200-2011"), "{error}");
    let (_, error) = fails(home, &["data", "index", "nowhere"]);
    assert!(error.contains("nowhere"), "{error}");
}

#[test]
fn a_listing_can_be_written_and_is_a_set_itself() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    works(home, &["data", "make", "imagenet-folder", "set"]);
    let text = works(home, &["data", "index", "set", "--out", "set/all.tsv"]);
    assert!(text.contains("18 train, 9 val"), "{text}");
    let text = works(home, &["data", "index", "set/all.tsv"]);
    assert!(text.contains("18 train, 9 val"), "{text}");
}

#[test]
fn lists_replace_nothing_and_name_files_only() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    for name in ["cub", "kaggle", "shards"] {
        works(home, &["data", "make", name, name]);
    }
    let before = std::fs::read(home.join("cub/images.txt"));
    for out in ["cub/images.txt", "cub/list.txt", "cub/list.parquet"] {
        fails(home, &["data", "index", "cub", "--out", out]);
    }
    assert_eq!(std::fs::read(home.join("cub/images.txt")).ok(), before.ok());
    let (_, error) = fails(home, &["data", "index", "shards", "--out", "x.csv"]);
    assert!(error.contains("lies in an archive"), "{error}");
    // Paths are those on disk, whatever the samples are called.
    for name in ["cub", "kaggle"] {
        let list = format!("{name}/all.csv");
        works(home, &["data", "index", name, "--out", &list]);
        let report = works(
            home,
            &["data", "verify", "list", &list, "--level", "decode"],
        );
        assert!(report.contains("nothing is wrong"), "{report}");
    }
}

#[test]
fn a_set_is_not_what_it_is_called_and_parts_overlap() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    works(home, &["data", "make", "cub", "cub"]);
    let (report, _) = fails(home, &["data", "verify", "shards", "cub"]);
    assert!(report.contains("lies here as cub-200-2011"), "{report}");
    works(home, &["data", "make", "list", "list"]);
    let train = std::fs::read_to_string(home.join("list/train.csv")).unwrap();
    std::fs::write(home.join("list/test.csv"), &train).unwrap();
    let (report, _) = fails(home, &["data", "verify", "list", "list"]);
    assert!(
        report.contains("18 images are in more than one part"),
        "{report}"
    );
    works(home, &["data", "make", "imagenet-folder", "Folder"]);
    std::fs::rename(home.join("Folder/train"), home.join("Folder/Train")).unwrap();
    let listed = works(home, &["data", "index", "Folder"]);
    assert!(
        listed.contains("18 train, 9 val images in 3 classes"),
        "{listed}"
    );
}

#[test]
fn the_loader_is_timed_on_folders_and_archives() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    for name in ["imagenet-archives", "cub"] {
        works(home, &["data", "make", name, name]);
        let mut words = vec![
            "bench",
            "loader",
            "--data",
            name,
            "--json",
            "--workers",
            "2",
        ];
        words.extend(["--batch", "8", "--images", "40", "--rounds", "1"]);
        let row = json(&works(home, &words));
        assert!(row["images_per_s"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!((&row["threads"], &row["images"]), (&2.into(), &18.into()));
    }
    assert!(
        home.join("imagenet-archives/ILSVRC2012_img_train.tar.isqrt-index")
            .is_file()
    );
    let words = ["bench", "loader", "--data", "cub", "--preset", "cub-tran"];
    let (_, error) = fails(home, &words);
    assert!(error.contains("cub-train"), "{error}");
}

#[test]
fn networks_train_on_the_official_layouts() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    for name in ["cars", "imagenet-archives"] {
        works(home, &["data", "make", name, name]);
        let out = format!("out-{name}");
        let words = [
            "reproduce",
            "iterations",
            "--smoke",
            "--data",
            name,
            "--out",
            &out,
        ];
        works(home, &words);
        assert!(home.join(&out).join("report/index.html").is_file());
    }
}
