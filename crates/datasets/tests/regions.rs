//! A region of a file is what the whole image has there, whatever the way in which it is coded; and
//! files that would take for ever or that end too early are errors.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use isqrt_datasets::{DecodeOptions, Encoded, Image, MAX_PIXELS, Region, Result, decode};
use libjpeg_turbo_rs::{Encoder, PixelFormat, Subsampling};
use proptest::prelude::*;

fn part(bytes: &[u8], options: DecodeOptions, region: Option<Region>) -> Result<Image> {
    Encoded::open(bytes, Path::new("x"), options)?.decode(region)
}

fn cut(image: &Image, region: Region) -> Vec<u8> {
    (region.top..region.top + region.height)
        .flat_map(|y| {
            let start = (y * image.width + region.left) * 3;
            image.pixels[start..start + 3 * region.width].to_vec()
        })
        .collect()
}

/// Four numbers below 1 to a region inside of an image.
fn region_in(image: &Image, [a, b, c, d]: [f64; 4]) -> Region {
    let side = |share: f64, size: usize| 1 + (share * size as f64) as usize;
    let (width, height) = (side(a, image.width), side(b, image.height));
    let start = |share: f64, room: usize| (share * (room + 1) as f64) as usize;
    Region {
        left: start(c, image.width - width),
        top: start(d, image.height - height),
        width,
        height,
    }
}

fn check(name: &str, bytes: &[u8], shares: [f64; 4]) {
    for exif_orientation in [false, true] {
        let options = DecodeOptions { exif_orientation };
        let Ok(whole) = part(bytes, options, None) else {
            return;
        };
        let region = region_in(&whole, shares);
        let found = part(bytes, options, Some(region)).unwrap();
        assert_eq!((found.width, found.height), (region.width, region.height));
        assert!(
            found.pixels == cut(&whole, region),
            "{name}: {region:?} of {}x{}",
            whole.width,
            whole.height
        );
    }
}

#[test]
fn of_real_files() {
    let mut files = Vec::new();
    if let Some(dir) = common::shared_data("decoder_stress") {
        files.extend(std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()));
    }
    if let Some(dir) = common::shared_data("imagenet_samples") {
        let table = common::Table::read(&dir.join("reference_pillow.tsv"));
        let rows = table.rows.iter().step_by(5);
        files.extend(rows.map(|row| dir.join(table.cell(row, "file"))));
    }
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        for shares in [
            [0.5, 0.5, 0.3, 0.6],
            [0.1, 0.9, 0.99, 0.0],
            [0.9, 0.2, 0.0, 0.99],
            [0.33, 0.01, 0.5, 0.5],
        ] {
            check(&file.display().to_string(), &bytes, shares);
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Baseline,
    Progressive,
    Arithmetic,
    Restarts,
}

const SAMPLINGS: [Subsampling; 6] = [
    Subsampling::S444,
    Subsampling::S422,
    Subsampling::S420,
    Subsampling::S440,
    Subsampling::S411,
    Subsampling::S410,
];

/// A TIFF block that holds an orientation alone.
fn exif(orientation: u8) -> Vec<u8> {
    let mut tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    tiff.extend([orientation, 0, 0]);
    tiff
}

fn jpeg(
    (width, height): (usize, usize),
    sampling: Subsampling,
    kind: Kind,
    orientation: u8,
) -> Vec<u8> {
    let pixels = common::pattern(width, height);
    let exif = exif(orientation);
    let encoder = Encoder::new(&pixels, width, height, PixelFormat::Rgb)
        .quality(80)
        .subsampling(sampling)
        .exif_data(&exif);
    let encoder = match kind {
        Kind::Baseline => encoder,
        Kind::Progressive => encoder.progressive(true),
        Kind::Arithmetic => encoder.arithmetic(true),
        Kind::Restarts => encoder.restart_blocks(3),
    };
    encoder.encode().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn of_any_file(
        size in (1usize..90, 1usize..90),
        sampling in proptest::sample::select(&SAMPLINGS),
        kind in proptest::sample::select(&[Kind::Baseline, Kind::Progressive, Kind::Arithmetic, Kind::Restarts]),
        orientation in 1u8..=8,
        shares in [0.0..1.0, 0.0..1.0, 0.0..1.0, 0.0..1.0],
    ) {
        let bytes = jpeg(size, sampling, kind, orientation);
        check("made", &bytes, shares);
        check("made", &common::png_bytes(size.0 as u32, size.1 as u32, orientation), shares);
    }

    #[test]
    fn outside_is_an_error(left in 0usize..200, top in 0usize..200, width in 0usize..200, height in 0usize..200) {
        let bytes = common::jpeg_bytes(100, 60);
        let region = Region { left, top, width, height };
        let inside = width > 0 && height > 0 && left + width <= 100 && top + height <= 60;
        let found = part(&bytes, DecodeOptions::default(), Some(region));
        prop_assert_eq!(found.is_ok(), inside);
    }
}

#[test]
fn cut_off_files_are_errors_whatever_the_region() {
    let options = DecodeOptions::default();
    for kind in [Kind::Baseline, Kind::Progressive, Kind::Restarts] {
        let bytes = jpeg((61, 47), Subsampling::S420, kind, 1);
        let top = Region::whole(61, 10);
        assert!(part(&bytes, options, Some(top)).is_ok());
        for length in (0..bytes.len() - 2).step_by(3) {
            assert!(
                decode(&bytes[..length], Path::new("x")).is_err(),
                "{length}"
            );
            assert!(
                part(&bytes[..length], options, Some(top)).is_err(),
                "{length}"
            );
        }
    }
}

#[test]
fn a_marker_in_the_data_is_survived_as_pillow_does() {
    // The second half of the data is gone, but the end is there.
    let bytes = jpeg((64, 64), Subsampling::S444, Kind::Baseline, 1);
    let half = [&bytes[..bytes.len() * 3 / 4], &[0xFF, 0xD9]].concat();
    let (whole, half) = (
        decode(&bytes, Path::new("x")).unwrap(),
        decode(&half, Path::new("x")).unwrap(),
    );
    assert_eq!(half.pixels[..64 * 3 * 8], whole.pixels[..64 * 3 * 8]);
    assert_ne!(half.pixels, whole.pixels);
}

#[test]
fn orientations_turn_the_image_upright() {
    let upright = DecodeOptions {
        exif_orientation: true,
    };
    let stored = decode(&common::png_bytes(5, 3, 1), Path::new("x")).unwrap();
    let mut png = common::png_bytes(5, 3, 1);
    // Before the last chunk (IEND, 12 bytes): the checksum is not looked at.
    let at = png.len() - 12;
    let block = exif(6);
    let chunk = [
        &(block.len() as u32).to_be_bytes(),
        &b"eXIf"[..],
        &block,
        &[0; 4],
    ]
    .concat();
    png.splice(at..at, chunk);
    let plain = part(&png, DecodeOptions::default(), None).unwrap();
    assert_eq!(plain, stored);
    let turned = part(&png, upright, None).unwrap();
    assert_eq!((turned.width, turned.height), (3, 5));
    // A quarter turn to the right: the last row is the first column.
    assert_eq!(turned.pixels[..3], stored.pixels[2 * 5 * 3..2 * 5 * 3 + 3]);

    let Some(dir) = common::shared_data("decoder_stress") else {
        return;
    };
    // The same portrait, stored in all ways.
    let known = isqrt_datasets::decode_file(&dir.join("pillow__hopper.jpg")).unwrap();
    for orientation in 2..=8 {
        let file = dir.join(format!("pillow__hopper_orientation_{orientation}.jpg"));
        let bytes = std::fs::read(file).unwrap();
        let off = |options| {
            let image = part(&bytes, options, None).unwrap();
            let off = image.pixels.iter().zip(&known.pixels);
            let sum: u64 = off.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            sum as f64 / known.pixels.len() as f64
        };
        let (turned, plain) = (off(upright), off(DecodeOptions::default()));
        assert!(
            turned < 6.0 && plain > 20.0,
            "{orientation}: {turned}, {plain}"
        );
    }
    let broken = std::fs::read(dir.join("pillow__invalid-exif.jpg")).unwrap();
    assert_eq!(
        part(&broken, upright, None).unwrap(),
        part(&broken, DecodeOptions::default(), None).unwrap()
    );
}

#[test]
fn bombs_end_soon() {
    let start = Instant::now();
    // Thousands of scans: the last one, repeated.
    let bytes = jpeg((64, 64), Subsampling::S420, Kind::Progressive, 1);
    let scan = bytes.windows(2).rposition(|w| w == [0xFF, 0xDA]).unwrap();
    let tables = bytes[..scan]
        .windows(2)
        .rposition(|w| w == [0xFF, 0xC4])
        .unwrap();
    let last = &bytes[tables..bytes.len() - 2];
    let mut bomb = bytes[..bytes.len() - 2].to_vec();
    for _ in 0..5000 {
        bomb.extend_from_slice(last);
    }
    bomb.extend([0xFF, 0xD9]);
    let error = decode(&bomb, Path::new("x")).unwrap_err().to_string();
    assert!(error.contains("scan"), "{error}");
    // A small file that promises very many pixels.
    for (width, height) in [(65_535u16, 65_535u16), (65_500, 1025)] {
        let mut huge = common::jpeg_bytes(16, 8);
        let frame = huge.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        huge[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
        huge[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
        assert!(usize::from(width) * usize::from(height) > MAX_PIXELS);
        let error = decode(&huge, Path::new("x")).unwrap_err().to_string();
        assert!(error.contains("the limit is"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20));
}
