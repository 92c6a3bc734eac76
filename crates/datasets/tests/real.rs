//! The whole way from a folder of real photographs to batches.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::time::Instant;

use isqrt_datasets::{Augment, DataSet, Loader, LoaderConfig, Resize, open_image};

/// Opens a set of `sizes` = (train, val, test) images in `classes` classes and checks its batches.
fn open(name: &str, resize: Resize, classes: usize, sizes: (usize, usize, usize)) {
    let Some(dir) = common::shared_data(name) else {
        return;
    };
    let start = Instant::now();
    let set = DataSet::open(&dir, resize, 1).unwrap();
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

    let augment = Augment {
        flip: true,
        pad_crop: 4,
    };
    let config = LoaderConfig::train(64, 1, set.stats);
    let loader = Loader::new(set.train.clone(), LoaderConfig { augment, ..config }).unwrap();
    let start = Instant::now();
    let (mut images, mut sum, mut values) = (0, 0.0, 0);
    for batch in loader.epoch(0) {
        let batch = batch.unwrap();
        images += batch.batch;
        sum += batch.images.iter().map(|&v| f64::from(v)).sum::<f64>();
        values += batch.images.len();
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
    open("tiny10", Resize::Keep, 10, (3400, 600, 500));
}

#[test]
fn scenes64() {
    open("scenes64", Resize::Keep, 6, (2040, 360, 600));
}

#[test]
fn dtd10_needs_a_resize() {
    open(
        "dtd10_texture",
        Resize::ShortSideCrop(64),
        10,
        (680, 120, 200),
    );
    if let Some(dir) = common::shared_data("dtd10_texture") {
        let error = DataSet::open(&dir, Resize::Keep, 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("choose a resize"), "{error}");
    }
}

/// Eight crops that Pillow made with Resize(256) and CenterCrop(224), 1.2 million values: JPEG decoders
/// differ in the last places.
#[test]
fn evaluation_crops_are_those_of_pillow() {
    let Some(dir) = common::shared_data("imagenet_samples") else {
        return;
    };
    let resize = Resize::Evaluation {
        short: 256,
        crop: 224,
    };
    let mut crops = 0;
    let (mut worst, mut beyond) = (0, 0);
    for entry in std::fs::read_dir(dir.join("reference_crops")).unwrap() {
        let reference = entry.unwrap().path();
        let name = reference.file_name().unwrap().to_str().unwrap();
        let stem = name.strip_suffix(".r256c224.png").unwrap();
        let wnid = stem.split('_').next().unwrap();
        let image = dir.join("train").join(wnid).join(format!("{stem}.JPEG"));
        let found = open_image(&image, resize).unwrap();
        let known = open_image(&reference, Resize::Keep).unwrap();
        assert_eq!((found.width, found.height), (224, 224), "{name}");
        assert_eq!((known.width, known.height), (224, 224), "{name}");
        let off = found
            .pixels
            .iter()
            .zip(&known.pixels)
            .map(|(a, b)| a.abs_diff(*b));
        let off: Vec<u8> = off.collect();
        worst = worst.max(off.iter().copied().max().unwrap());
        beyond += off.iter().filter(|&&off| off > 2).count();
        crops += 1;
    }
    assert_eq!(crops, 8);
    eprintln!("evaluation crops: at most {worst} of 255 off, {beyond} values more than 2");
    assert!(
        worst <= 3 && beyond <= 300,
        "off by {worst}, {beyond} values by more than 2"
    );
}
