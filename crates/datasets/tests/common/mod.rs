//! What the tests of this crate share.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

use std::path::{Path, PathBuf};

/// The folder of real data beside the checkout, or the one that ISQRT_SHARED_DATA names. None with
/// a message where there is none: tests on real data are then passed over.
pub fn shared_data(part: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ISQRT_SHARED_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
        PathBuf::from,
    );
    let dir = root.join(part);
    if !dir.is_dir() {
        eprintln!("passed over: no folder {}", dir.display());
        return None;
    }
    Some(dir)
}

/// A small RGB PNG with a colour gradient that depends on `salt`.
pub fn png_bytes(width: u32, height: u32, salt: u8) -> Vec<u8> {
    let pixels: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| [x as u8 ^ salt, (y * 3) as u8, salt]))
        .collect();
    encode(
        width,
        height,
        png::ColorType::Rgb,
        png::BitDepth::Eight,
        &pixels,
    )
}

/// A PNG with the given raw samples.
pub fn encode(
    width: u32,
    height: u32,
    color: png::ColorType,
    depth: png::BitDepth,
    samples: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(samples).unwrap();
    writer.finish().unwrap();
    bytes
}

/// A grayscale baseline JPEG, 128 everywhere, put together by hand: one quantisation table of ones,
/// Huffman tables with the single codes "DC difference 0" and "end of block", each one bit long.
pub fn jpeg_bytes(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = vec![0xFF, 0xD8];
    let mut segment = |marker: u8, body: &[u8]| {
        bytes.extend([0xFF, marker]);
        bytes.extend((body.len() as u16 + 2).to_be_bytes());
        bytes.extend(body);
    };
    segment(0xDB, &[&[0u8][..], &[1; 64]].concat());
    let [(h1, h0), (w1, w0)] = [height, width].map(|n| ((n >> 8) as u8, n as u8));
    segment(0xC0, &[8, h1, h0, w1, w0, 1, 1, 0x11, 0]);
    for table in [0x00, 0x10] {
        let mut body = [0; 18];
        (body[0], body[1]) = (table, 1);
        segment(0xC4, &body);
    }
    segment(0xDA, &[1, 1, 0, 0, 63, 0]);
    let blocks = usize::from(width.div_ceil(8)) * usize::from(height.div_ceil(8));
    // Two zero bits a block, the last byte filled with ones.
    bytes.extend(std::iter::repeat_n(0, blocks / 4));
    if blocks % 4 > 0 {
        bytes.push(0xFF >> (2 * (blocks % 4)));
    }
    bytes.extend([0xFF, 0xD9]);
    bytes
}

/// Writes a file, and the folders above it.
pub fn put(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A tree with `parts`, classes `cat` and `dog`, `n` 8x8 images each.
pub fn tree(root: &Path, parts: &[&str], n: usize) {
    for part in parts {
        for (c, class) in ["cat", "dog"].iter().enumerate() {
            for i in 0..n {
                let path = root.join(part).join(class).join(format!("{i}.png"));
                put(&path, &png_bytes(8, 8, (i * 2 + c) as u8));
            }
        }
    }
}

/// A tab-separated table with a header line.
pub struct Table {
    header: Vec<String>,
    /// One list of cells a line.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text
            .lines()
            .map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
        let header = lines.next().unwrap();
        Self {
            header,
            rows: lines.collect(),
        }
    }

    pub fn cell<'a>(&self, row: &'a [String], column: &str) -> &'a str {
        &row[self.header.iter().position(|h| h == column).unwrap()]
    }

    pub fn number(&self, row: &[String], column: &str) -> f64 {
        self.cell(row, column).parse().unwrap()
    }
}

/// An image made by formula: slow waves, edges and a little noise in three channels, HWC.
pub fn pattern(width: usize, height: usize) -> Vec<u8> {
    let pixel = |x: usize, y: usize| {
        let noise = (x * 7919 + y * 104_729) % 31;
        let square = if (x / 5 + y / 7).is_multiple_of(2) {
            60
        } else {
            0
        };
        let red = x * 255 / width.max(1);
        [
            (red / 2 + square + noise) as u8,
            (y * 200 / height.max(1) + noise) as u8,
            (((x + 2 * y) * 3) % 256) as u8,
        ]
    };
    (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| pixel(x, y)))
        .collect()
}
