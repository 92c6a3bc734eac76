//! Every miniature: read by the source that it is made for, whole, and the same each time.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isqrt_datasets::miniature::{MINIATURES, Options, write};
use isqrt_datasets::verify::{Kind, Level, Report, verify_against};
use isqrt_datasets::{ListOptions, Listing, Manifest, SOURCES, list, list_with, split};

/// All files below a folder with their bytes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                found.insert(path.strip_prefix(dir).unwrap().to_owned(), bytes);
            }
        }
    }
    found
}

fn check(manifest: &Manifest, dir: &Path, level: Level) -> Report {
    let options = ListOptions::default();
    verify_against(
        &manifest.name,
        Some(manifest),
        dir,
        level,
        &options,
        &|_| (),
    )
    .unwrap()
}

fn all(listing: &Listing) -> Vec<&isqrt_datasets::Sample> {
    let held_out = listing.val.iter().chain(&listing.test).flatten();
    listing.train.iter().chain(held_out).collect()
}

#[test]
fn every_miniature_is_recognised_whole_and_decodes() {
    let home = tempfile::tempdir().unwrap();
    for miniature in MINIATURES {
        let dir = home.path().join(miniature.name);
        let manifest = write(miniature.name, &dir, &Options::default()).unwrap();
        let source = SOURCES.iter().find(|s| (s.recognises)(&dir)).unwrap();
        assert_eq!(source.name, miniature.source);
        let report = check(&manifest, &dir, Level::Decode);
        assert!(report.is_ok(), "{report:?}");
        assert_eq!(report.layout, Some(miniature.source));
        assert_eq!((report.classes, report.found["train"]), (3, 18));
        assert_eq!(report.found.values().sum::<usize>(), 27);

        let listing = list(&dir).unwrap();
        let mut sizes = Vec::new();
        for sample in all(&listing) {
            let image = sample.decode().unwrap();
            assert!((80..=120).contains(&image.width) && (80..=120).contains(&image.height));
            if let Some(found) = sample.annotation.as_ref().map(|a| a.bounding_box.unwrap()) {
                assert!(found.left >= 0.0 && found.top >= 0.0);
                assert!(found.width >= 40.0 && found.left + found.width <= image.width as f32);
                assert!(found.height >= 40.0 && found.top + found.height <= image.height as f32);
            }
            sizes.push((image.width, image.height));
        }
        sizes.sort_unstable();
        sizes.dedup();
        assert!(sizes.len() > 10, "{sizes:?}");
        let boxes = all(&listing)
            .iter()
            .filter(|s| s.annotation.is_some())
            .count();
        let has_boxes = ["cub", "cars", "cars-combined", "aircraft"].contains(&miniature.name);
        assert_eq!(boxes, if has_boxes { 27 } else { 0 });
        let parts = split(listing, 1).unwrap();
        assert_eq!(
            (parts.train.len(), parts.val.len(), parts.test.len()),
            (15, 3, 9)
        );
    }
    let left = std::fs::read_dir(home.path()).unwrap().count();
    assert_eq!(left, MINIATURES.len());
}

#[test]
fn a_seed_gives_the_same_files() {
    let home = tempfile::tempdir().unwrap();
    let small = Options {
        classes: 2,
        train: 2,
        held_out: 1,
        ..Options::default()
    };
    for miniature in MINIATURES {
        let written = |place: &str, options: &Options| {
            let dir = home.path().join(place).join(miniature.name);
            write(miniature.name, &dir, options).unwrap();
            dir
        };
        let first = written("a", &small);
        assert_eq!(
            files(&first),
            files(&written("b", &small)),
            "{}",
            miniature.name
        );
        let other = written("c", &Options { seed: 1, ..small });
        let images = |dir: &Path| -> Vec<Vec<u8>> {
            let read = |sample: &isqrt_datasets::Sample| {
                let mut bytes = Vec::new();
                sample.read(&mut bytes).unwrap();
                bytes
            };
            all(&list(dir).unwrap()).into_iter().map(read).collect()
        };
        let (first, other) = (images(&first), images(&other));
        assert_eq!(first.len(), 6);
        assert!(first.iter().all(|image| !other.contains(image)));
    }
}

#[test]
fn imagenet_is_the_same_set_in_every_layout() {
    let home = tempfile::tempdir().unwrap();
    let seen = ["imagenet", "imagenet-folder", "kaggle", "imagenet-archives"].map(|name| {
        let dir = home.path().join(name);
        write(name, &dir, &Options::default()).unwrap();
        let listing = list(&dir).unwrap();
        let sample = |s: &&isqrt_datasets::Sample| (s.name.clone(), s.label, s.decode().unwrap());
        (
            listing.classes.clone(),
            all(&listing).iter().map(sample).collect::<Vec<_>>(),
        )
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
}

#[test]
fn aircraft_has_three_kinds_of_labels() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("a");
    let options = Options {
        classes: 5,
        train: 2,
        held_out: 1,
        ..Options::default()
    };
    write("aircraft", &dir, &options).unwrap();
    for (labels, classes) in [("variant", 5), ("family", 3), ("manufacturer", 2)] {
        let labels = ListOptions {
            labels: Some(labels.into()),
            ..ListOptions::default()
        };
        let listing = list_with(&dir, &labels).unwrap();
        assert_eq!(listing.classes.len(), classes);
        assert_eq!((listing.train.len(), listing.test.unwrap().len()), (10, 5));
    }
}

#[test]
fn what_is_damaged_is_found() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("cub");
    let manifest = write("cub", &dir, &Options::default()).unwrap();
    let listing = list(&dir).unwrap();
    std::fs::remove_file(listing.train[0].path()).unwrap();
    let image = listing.train[1].path();
    let bytes = std::fs::read(&image).unwrap();
    std::fs::write(&image, &bytes[..bytes.len() / 2]).unwrap();
    let kinds = |report: &Report| report.findings.iter().map(|f| f.kind).collect::<Vec<_>>();

    assert!(check(&manifest, &dir, Level::Layout).is_ok());
    let report = check(&manifest, &dir, Level::Count);
    assert_eq!(kinds(&report), [Kind::MissingFile]);
    let missing = listing.train[0].path().display().to_string();
    assert_eq!(report.findings[0].examples, [missing]);
    let report = check(&manifest, &dir, Level::Decode);
    assert_eq!(kinds(&report), [Kind::MissingFile, Kind::BrokenImage]);
    let text = report.findings[1].to_string();
    assert!(text.contains(&image.display().to_string()), "{text}");

    // Another class than in its folder, in the lists only.
    let labels = dir.join("image_class_labels.txt");
    let text = std::fs::read_to_string(&labels).unwrap();
    std::fs::write(&labels, text.replacen(" 1\n", " 2\n", 1)).unwrap();
    let report = check(&manifest, &dir, Level::Count);
    assert!(kinds(&report).contains(&Kind::ClassCount), "{report:?}");
    let finding = &report.findings[0];
    assert_eq!((finding.kind, finding.count), (Kind::ClassCount, 2));
    assert!(
        finding
            .to_string()
            .contains("001.Texture_01-23-45 5 instead of 6"),
        "{finding}"
    );

    let classes = dir.join("classes.txt");
    let text = std::fs::read_to_string(&classes).unwrap();
    std::fs::write(&classes, text.replace("003.", "300.")).unwrap();
    let report = check(&manifest, &dir, Level::Layout);
    assert_eq!(kinds(&report), [Kind::Classes, Kind::Classes]);
    std::fs::write(&classes, "1\n").unwrap();
    let report = check(&manifest, &dir, Level::Decode);
    assert_eq!(kinds(&report), [Kind::Layout]);
    assert!(
        report.findings[0].problem.contains("classes.txt: line 1"),
        "{report:?}"
    );
}

#[test]
fn nothing_is_overwritten_and_nonsense_refused() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("x");
    std::fs::create_dir(&dir).unwrap();
    write("cars", &dir, &Options::default()).unwrap();
    let before = files(&dir);
    let error = write("cub", &dir, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("not empty") && error.contains(&dir.display().to_string()),
        "{error}"
    );
    assert_eq!(files(&dir), before);
    let dir = home.path().join("y");
    let error = write("coco", &dir, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("there are: imagenet, imagenet-folder"),
        "{error}"
    );
    let good = Options::default();
    for bad in [
        Options {
            classes: 11,
            ..good
        },
        Options { classes: 1, ..good },
        Options { train: 0, ..good },
        Options {
            held_out: 1 << 40,
            ..good
        },
        Options {
            sides: (100, 90),
            ..good
        },
        Options {
            sides: (1, 90),
            ..good
        },
        Options {
            sides: (16, 1 << 20),
            ..good
        },
    ] {
        assert!(write("cub", &dir, &bad).is_err(), "{bad:?}");
    }
    assert!(!dir.exists());
}
