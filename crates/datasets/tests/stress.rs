//! Odd, rare and broken files: what Pillow opens must decode to the same mean colour; what Pillow
//! refuses must be an error; nothing may panic.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use isqrt_datasets::{Error, Image, decode, decode_file};
use proptest::prelude::*;

/// Pillow clips 16-bit grayscale to 255 instead of scaling it, so its means are not comparable.
const CLIPPED_BY_PILLOW: [&str; 2] = ["pillow__i_trns.png", "image-rs__basi0g16.png"];

fn mean(image: &Image) -> [f64; 3] {
    let n = (image.width * image.height) as f64;
    let sum = |c| {
        image
            .pixels
            .iter()
            .skip(c)
            .step_by(3)
            .map(|&v| f64::from(v))
            .sum::<f64>()
    };
    std::array::from_fn(|c| sum(c) / n)
}

#[test]
fn agrees_with_pillow() {
    let Some(dir) = common::shared_data("decoder_stress") else {
        return;
    };
    let table = common::Table::read(&dir.join("expected.tsv"));
    assert!(table.rows.len() > 50);
    for row in &table.rows {
        let file = table.cell(row, "file");
        let got = decode_file(&dir.join(file));
        let read_by_pillow = table.cell(row, "pillow_decode") == "ok";
        if !read_by_pillow {
            let error = got.expect_err(file).to_string();
            assert!(error.contains(file) && !error.contains('\n'), "{error}");
            continue;
        }
        let image = got.unwrap_or_else(|e| panic!("{e}"));
        let size = (table.number(row, "width"), table.number(row, "height"));
        assert_eq!((image.width as f64, image.height as f64), size, "{file}");
        if CLIPPED_BY_PILLOW.contains(&file) {
            continue;
        }
        for (got, column) in mean(&image).into_iter().zip(["mean_r", "mean_g", "mean_b"]) {
            let want = table.number(row, column);
            // The pixels are Pillow's; the table has three places.
            assert!(
                (got - want).abs() <= 0.001,
                "{file} {column}: {got} and {want}"
            );
        }
    }
}

#[test]
fn agrees_with_pillow_on_full_images() {
    let Some(dir) = common::shared_data("imagenet_samples") else {
        return;
    };
    let table = common::Table::read(&dir.join("reference_pillow.tsv"));
    for row in &table.rows {
        let file = table.cell(row, "file");
        let image = decode_file(&dir.join(file)).unwrap_or_else(|e| panic!("{e}"));
        for (got, column) in mean(&image).into_iter().zip(["mean_r", "mean_g", "mean_b"]) {
            let want = 255.0 * table.number(row, column);
            assert!(
                (got - want).abs() <= 0.001,
                "{file} {column}: {got} and {want}"
            );
        }
    }
}

/// Flips, cuts and repeats bytes of real files: an image or an error, never a panic or a hang.
#[test]
fn damaged_files_are_errors_or_images() {
    let mut seeds = vec![common::png_bytes(17, 9, 3), common::jpeg_bytes(16, 8)];
    if let Some(dir) = common::shared_data("decoder_stress") {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let bytes = std::fs::read(entry.path()).unwrap();
            if bytes.len() < 7000 && !entry.path().ends_with("expected.tsv") {
                seeds.push(bytes);
            }
        }
    }
    seeds.sort();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below.max(1)
    };
    for seed in &seeds {
        for _ in 0..60 {
            let mut bytes = seed.clone();
            for _ in 0..1 + next(4) {
                if bytes.is_empty() {
                    break;
                }
                let at = next(bytes.len());
                match next(4) {
                    0 => bytes.truncate(at),
                    1 => bytes[at] ^= 1 << next(8),
                    2 => bytes[at] = [0x00, 0x01, 0x7F, 0x80, 0xFF][next(5)],
                    _ => {
                        let end = (at + 1 + next(16)).min(bytes.len());
                        let piece = bytes[at..end].to_vec();
                        bytes.splice(at..at, piece);
                    }
                }
            }
            check(&bytes);
        }
    }
}

fn check(bytes: &[u8]) {
    match decode(bytes, Path::new("damaged")) {
        Ok(image) => assert_eq!(image.pixels.len(), image.width * image.height * 3),
        Err(Error::Decode { problem, .. }) => {
            assert!(!problem.contains("the decoder failed"), "panicked inside");
        }
        Err(other) => panic!("{other}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn anything_after_a_signature(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&[&[0xFF, 0xD8, 0xFF], &bytes[..]].concat());
        check(&[&b"\x89PNG\r\n\x1a\n"[..], &bytes[..]].concat());
        check(&bytes);
    }
}
