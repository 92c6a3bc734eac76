//! Looking whether a data set is whole: the official lists against the manifests, and what is found
//! where it is not.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Mutex;

use common::{png_bytes, put, shared_data, tree};
use isqrt_datasets::verify::{Kind, Level, Report, verify};
use isqrt_datasets::{ListOptions, Manifest};

fn look(name: &str, dir: &Path, level: Level) -> Report {
    verify(name, dir, level, &ListOptions::default(), &|_| ()).unwrap()
}

fn kinds(report: &Report) -> Vec<Kind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

#[test]
fn official_lists_without_images() {
    for (part, name, images) in [
        ("cub_metadata/CUB_200_2011", "cub-200-2011", 11_788),
        ("cars_metadata", "stanford-cars", 16_185),
        (
            "aircraft_metadata/fgvc-aircraft-2013b",
            "fgvc-aircraft-2013b",
            10_000,
        ),
    ] {
        let Some(dir) = shared_data(part) else {
            return;
        };
        let report = look(name, &dir, Level::Layout);
        assert!(report.is_ok() && report.layout == Some(name), "{report:?}");
        // Nothing but the images is missing: all counts are right.
        let report = look(name, &dir, Level::Count);
        assert_eq!(kinds(&report), [Kind::MissingFile], "{report:?}");
        assert_eq!(
            (report.findings[0].count, report.findings[0].examples.len()),
            (images, 5)
        );
        assert_eq!(Some(report.found), report.expected);
    }
}

#[test]
fn official_checksums() {
    for (part, name, expected) in [
        ("cub_metadata", "cub-200-2011", 5),
        ("cars_metadata", "stanford-cars", 3),
        ("imagenet_devkit", "imagenet-1k", 2),
    ] {
        let Some(dir) = shared_data(part) else {
            return;
        };
        let report = look(name, &dir, Level::Checksum);
        assert!(report.is_ok(), "{report:?}");
        assert_eq!(report.matching_files.len(), expected, "{report:?}");
    }
}

#[test]
fn a_part_of_a_set_is_not_the_set() {
    let Some(dir) = shared_data("cub_mini") else {
        return;
    };
    let report = look("cub-200-2011", &dir, Level::Decode);
    let found = kinds(&report);
    // The ten classes are called as in the whole set, so only the others are missing.
    assert!(
        found.contains(&Kind::Classes) && found.contains(&Kind::Count),
        "{report:?}"
    );
    assert!(
        !found.contains(&Kind::MissingFile) && !found.contains(&Kind::BrokenImage),
        "{report:?}"
    );
    let text = report.findings[0].to_string();
    assert!(
        text.contains("190 of 200 classes are missing") && text.contains("and 185 more"),
        "{text}"
    );
    assert!(
        report
            .findings
            .iter()
            .any(|f| f.problem == "train: 300 images instead of 5994")
    );
    let report = look("cub-200-2011", &dir, Level::Checksum);
    assert_eq!(
        (kinds(&report), report.findings[0].count),
        (vec![Kind::Checksum], 5)
    );
}

#[test]
fn a_folder_has_no_expectations_but_sound_images() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    tree(root, &["train", "test"], 3);
    let steps = Mutex::new(Vec::new());
    let progress = |p: isqrt_datasets::verify::Progress| steps.lock().unwrap().push(p);
    let report = verify(
        "folder",
        root,
        Level::Decode,
        &ListOptions::default(),
        &progress,
    )
    .unwrap();
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(
        (report.layout, report.expected.as_ref()),
        (Some("folder"), None)
    );
    assert_eq!((report.found["train"], report.found["test"]), (6, 6));
    let mut steps = steps.into_inner().unwrap();
    assert_eq!(steps.len(), 24);
    steps.sort_by_key(|p| (p.step, p.done));
    assert_eq!(
        (steps[11].step, steps[11].done, steps[11].total),
        ("decoding", 12, 12)
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        (&json["level"], &json["found"]["test"]),
        (&"decode".into(), &6.into())
    );

    for i in 0..7 {
        put(
            &root.join(format!("train/cat/{i}.png")),
            b"\x89PNG\r\n\x1a\nnot at all",
        );
    }
    put(&root.join("train/dog/7.png"), &png_bytes(8, 8, 1));
    let report = look("folder", root, Level::Decode);
    assert_eq!(
        (kinds(&report), report.findings[0].count),
        (vec![Kind::BrokenImage], 7)
    );
    assert!(
        report.findings[0]
            .to_string()
            .contains("train/cat/0.png: broken PNG"),
        "{report:?}"
    );
    assert!(look("folder", root, Level::Count).is_ok());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["findings"][0]["kind"], "broken-image");
}

#[test]
fn a_known_set_in_class_folders_is_held_to_its_counts() {
    let home = tempfile::tempdir().unwrap();
    let manifest = Manifest::of("imagenet-1k").unwrap().unwrap();
    for (wnid, _) in &manifest.classes {
        for part in ["train", "val"] {
            put(&home.path().join(part).join(wnid).join("x.JPEG"), b"x");
        }
    }
    let report = look("imagenet-1k", home.path(), Level::Layout);
    assert!(
        report.is_ok() && report.layout == Some("folder"),
        "{report:?}"
    );
    let report = look("imagenet-1k", home.path(), Level::Count);
    assert_eq!(
        kinds(&report),
        [Kind::ClassCount, Kind::ClassCount, Kind::Count, Kind::Count]
    );
    let text = report.findings[0].to_string();
    assert!(
        text.contains("n01440764 1 instead of 1300") && text.contains("and 995 more"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_looked_at_says_what_was_expected() {
    let home = tempfile::tempdir().unwrap();
    for dir in [home.path().to_path_buf(), home.path().join("none")] {
        for name in Manifest::names() {
            let report = look(name, &dir, Level::Count);
            assert_eq!((kinds(&report), report.layout), (vec![Kind::Layout], None));
            let text = report.findings[0].to_string();
            let named = dir.display().to_string();
            assert!(
                text.contains(&named) && text.contains(&format!("expected {name}: ")),
                "{text}"
            );
            let report = look(name, &dir, Level::Checksum);
            assert_eq!(kinds(&report), [Kind::Checksum], "{report:?}");
        }
    }
    let error = |name: &str, level| {
        let options = ListOptions::default();
        verify(name, home.path(), level, &options, &|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(error("coco", Level::Count).contains("known are: cub-200-2011, stanford-cars"));
    assert!(error("folder", Level::Checksum).contains("no checksums of folder are known"));
}

#[test]
fn archives_beside_the_folder_are_hashed() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("set");
    std::fs::create_dir(&root).unwrap();
    put(&home.path().join("ILSVRC2012_img_val.tar"), b"half of it");
    let report = look("imagenet-1k", &root, Level::Checksum);
    assert_eq!(kinds(&report), [Kind::Checksum]);
    let text = report.findings[0].to_string();
    // md5 of the ten bytes, by md5sum.
    assert!(text.contains("c480aa5bbf7247d48d87b46fa064c71e instead of 29b22e2961454d5413ddabcf34fc5622 (torchvision"), "{text}");
}
