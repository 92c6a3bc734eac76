//! The whole way from a folder of real photographs to batches.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::time::Instant;

use isqrt_datasets::{DataSet, Key, Loader, LoaderConfig, Pipeline, Scratch, decode_file};

/// Opens a set of `sizes` = (train, val, test) images in `classes` classes and checks its batches.
fn open(name: &str, pipeline: &Pipeline, classes: usize, sizes: (usize, usize, usize)) {
    let Some(dir) = common::shared_data(name) else {
        return;
    };
    let start = Instant::now();
    let set = DataSet::open(&dir, pipeline, 1).unwrap();
    let opened = start.elapsed().as_secs_f64();
    let found = (set.train.len(), set.val.len(), set.test.len());
    assert_eq!(found, sizes, "{name}");
    assert_eq!(set.train.class_count(), classes);
    assert_eq!(set.train.image_size(), (64, 64));
    assert!(set.note.contains("reported on as test"), "{}", set.note);
    for c in 0..3 {
        assert!((0.2..0.7).contains(&set.stats.mean[c]), "{:?}", set.stats);
        assert!((0.15..0.4).contains(&set.stats.std[c]), "{:?}", set.stats);
    }

    let (_, moved) = Pipeline::preset("small64-train").unwrap().split_random();
    let moved = moved.normalising(set.stats.mean, set.stats.std);
    let loader = Loader::new(set.train.clone(), moved, LoaderConfig::train(64, 1)).unwrap();
    let start = Instant::now();
    let (mut images, mut sum, mut values) = (0, 0.0, 0);
    for batch in loader.epoch(0).unwrap() {
        let batch = batch.unwrap();
        images += batch.len();
        let numbers = batch.normalised(loader.levels());
        sum += numbers.iter().map(|&v| f64::from(v)).sum::<f64>();
        values += numbers.len();
    }
    let rate = images as f64 / start.elapsed().as_secs_f64();
    assert_eq!(images, sizes.0 / 64 * 64);
    assert!(
        (sum / values as f64).abs() < 0.05,
        "normalised: {}",
        sum / values as f64
    );
    eprintln!("{name}: opened in {opened:.2} s, loader {rate:.0} images/s");
}

#[test]
fn tiny10() {
    open("tiny10", &Pipeline::identity(), 10, (3400, 600, 500));
}

#[test]
fn scenes64() {
    open("scenes64", &Pipeline::identity(), 6, (2040, 360, 600));
}

#[test]
fn dtd10_needs_a_resize() {
    open("dtd10_texture", &Pipeline::square(64), 10, (680, 120, 200));
    if let Some(dir) = common::shared_data("dtd10_texture") {
        let error = DataSet::open(&dir, &Pipeline::identity(), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("choose a resize"), "{error}");
    }
}

/// Eight crops that Pillow made with Resize(256) and CenterCrop(224), 1.2 million values.
#[test]
fn evaluation_crops_are_those_of_pillow() {
    let Some(dir) = common::shared_data("imagenet_samples") else {
        return;
    };
    let pipeline = Pipeline::preset("imagenet-eval").unwrap();
    let mut crops = 0;
    let (mut worst, mut off_by_any) = (0, 0);
    let (mut scratch, mut found) = (Scratch::default(), Vec::new());
    for entry in std::fs::read_dir(dir.join("reference_crops")).unwrap() {
        let reference = entry.unwrap().path();
        let name = reference.file_name().unwrap().to_str().unwrap();
        let stem = name.strip_suffix(".r256c224.png").unwrap();
        let wnid = stem.split('_').next().unwrap();
        let image = dir.join("train").join(wnid).join(format!("{stem}.JPEG"));
        let bytes = std::fs::read(&image).unwrap();
        let key = Key {
            seed: 0,
            epoch: 0,
            sample: 0,
        };
        let size = pipeline.run_encoded(&bytes, &image, None, key, &mut scratch, &mut found);
        let known = decode_file(&reference).unwrap();
        assert_eq!(size.unwrap(), (224, 224), "{name}");
        assert_eq!((known.width, known.height), (224, 224), "{name}");
        for (a, b) in found.iter().zip(&known.pixels) {
            worst = worst.max(a.abs_diff(*b));
            off_by_any += usize::from(a != b);
        }
        crops += 1;
    }
    assert_eq!(crops, 8);
    eprintln!(
        "evaluation crops: at most {worst} of 255 off, {off_by_any} of 1204224 values differ"
    );
    assert!(worst <= 2, "off by {worst}");
}
