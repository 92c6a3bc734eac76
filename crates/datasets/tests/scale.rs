//! As many images as ImageNet has, made up: a tar of 1000 tars, and a list. Slow, so they run with
//! `just test-all` only; each says what it took.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use isqrt_datasets::formats::tar::header;
use isqrt_datasets::{
    IndexCache, ListOptions, Listing, Loader, LoaderConfig, Pipeline, list_with, split,
};

const CLASSES: usize = 1000;
const IMAGES: usize = 1_300_000;
/// Far more than it takes (docs/benchmarks/loader-cpu.md).
const SECONDS: u64 = 10;
const MEMORY_MB: f64 = 500.0;

/// Memory of this process: the most so far if `peak`.
fn memory_mb(peak: bool) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let key = if peak { "VmHWM:" } else { "VmRSS:" };
    let line = status.lines().find(|line| line.starts_with(key));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) / 1024.0
}

fn timed<T>(what: &str, task: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = task();
    let (took, peak) = (start.elapsed(), memory_mb(true));
    eprintln!(
        "{what}: {:.2} s, peak memory {peak:.0} MB",
        took.as_secs_f64()
    );
    assert!(took < Duration::from_secs(SECONDS), "{what}: {took:?}");
    assert!(peak < MEMORY_MB, "{what}: {peak} MB");
    result
}

/// What follows a listing before the first batch.
fn go_on(listing: Listing) {
    assert_eq!(
        (listing.train.len(), listing.classes.len()),
        (IMAGES, CLASSES)
    );
    let parts = timed("validation and test parts carved", || {
        split(listing, 1).unwrap()
    });
    let pipeline = Pipeline::preset("imagenet-train").unwrap();
    let loader = Loader::new(parts.train, pipeline, LoaderConfig::train(256, 1)).unwrap();
    let before = memory_mb(false);
    timed("ten orders of an epoch", || {
        for epoch in 0..10 {
            assert!(loader.order(epoch).len() > 800_000);
        }
    });
    let grown = memory_mb(false) - before;
    assert!(grown < 30.0, "memory grew by {grown} MB over epochs");
}

fn write_archive(path: &Path) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    let each = IMAGES / CLASSES;
    for class in 0..CLASSES {
        let class = format!("n{class:08}");
        let length = each as u64 * 1024 + 1024;
        out.write_all(&header(&format!("{class}.tar"), length).unwrap())
            .unwrap();
        for image in 0..each {
            out.write_all(&header(&format!("{class}_{image}.JPEG"), 100).unwrap())
                .unwrap();
            out.write_all(&[0; 512]).unwrap();
        }
        out.write_all(&[0; 1024]).unwrap();
    }
    out.write_all(&[0; 1024]).unwrap();
    out.flush().unwrap();
}

#[test]
#[ignore = "writes 1.3 GB"]
fn a_tar_of_a_thousand_tars() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("train.tar");
    write_archive(&path);
    let cache = IndexCache::Beside;
    let options = ListOptions {
        cache,
        ..ListOptions::default()
    };
    drop(timed("archive read through", || {
        list_with(&path, &options).unwrap()
    }));
    let listing = timed("index read", || list_with(&path, &options).unwrap());
    go_on(listing);
}

#[test]
#[ignore = "a second or two of work beside the other"]
fn a_list() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("train.tsv");
    let mut out = BufWriter::new(File::create(&path).unwrap());
    for i in 0..IMAGES {
        let class = i % CLASSES;
        writeln!(out, "train/n{class:08}/n{class:08}_{i}.JPEG\tn{class:08}").unwrap();
    }
    out.flush().unwrap();
    let options = ListOptions::default();
    go_on(timed("list read", || list_with(&path, &options).unwrap()));
}
