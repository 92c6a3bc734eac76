//! From the bytes of a file to 8-bit RGB pixels.
//!
//! The content decides the format, never the file's name. Grayscale becomes three equal channels,
//! transparency is dropped, 16 bits are cut to their high byte: what Pillow's `convert("RGB")`
//! does, so that statistics agree with those of PyTorch pipelines. Sizes are bounded before
//! anything is allocated for them.

mod jpeg;
mod png;

use std::path::Path;

use crate::{Error, Result};

/// Most pixels that an image may have (the largest ImageNet image has 61 million).
pub const MAX_PIXELS: usize = 1 << 26;
/// Largest file that is read.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// A decoded image: 8-bit RGB, row by row, channels interleaved (HWC).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

/// Reads and decodes one file.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Decode`] where it is not an intact JPEG or PNG.
pub fn decode_file(path: &Path) -> Result<Image> {
    let meta = std::fs::metadata(path).map_err(Error::io(path, "read the file"))?;
    if meta.len() > MAX_FILE_BYTES {
        return Err(Error::Decode {
            path: path.to_path_buf(),
            problem: format!(
                "the file has {} MiB and the limit is {} MiB",
                meta.len() >> 20,
                MAX_FILE_BYTES >> 20
            ),
        });
    }
    let bytes = std::fs::read(path).map_err(Error::io(path, "read the file"))?;
    decode(&bytes, path)
}

/// Decodes the bytes of a JPEG or PNG file; `path` is only named in errors.
///
/// # Errors
/// [`Error::Decode`] for everything that is not an intact image within [`MAX_PIXELS`].
pub fn decode(bytes: &[u8], path: &Path) -> Result<Image> {
    // The decoders are other people's code on untrusted bytes: a panic in there must end as an
    // error that names the file, like any other corruption.
    let outcome = std::panic::catch_unwind(|| decode_any(bytes))
        .unwrap_or_else(|_| Err("the decoder failed on it".to_owned()));
    outcome.map_err(|problem| Error::Decode {
        path: path.to_path_buf(),
        problem,
    })
}

fn decode_any(bytes: &[u8]) -> Result<Image, String> {
    match bytes {
        [] => Err("the file is empty".to_owned()),
        [0xFF, 0xD8, 0xFF, ..] => jpeg::decode(bytes),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => png::decode(bytes),
        _ => Err(format!("not a JPEG or PNG file ({})", looks_like(bytes))),
    }
}

/// A guess for the error line: most wrong files are one of these.
fn looks_like(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'G', b'I', b'F', b'8', ..] => "it is a GIF, which is not supported",
        [b'B', b'M', ..] => "it looks like a BMP, which is not supported",
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => "it is a WebP, which is not supported",
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => "it is a TIFF, which is not supported",
        _ if bytes.iter().take(512).all(|b| b.is_ascii() && *b != 0) => "it looks like text",
        _ => "unknown content",
    }
}

/// Refuses an image whose header promises more than [`MAX_PIXELS`], or nothing.
fn check_size(width: usize, height: usize) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("the header says {width}x{height} pixels"));
    }
    match width.checked_mul(height) {
        Some(n) if n <= MAX_PIXELS => Ok(()),
        _ => Err(format!(
            "the header says {width}x{height} pixels and the limit is {} million",
            MAX_PIXELS / 1_000_000
        )),
    }
}

/// What a decoder said, on one line.
fn broken(format: &str, error: &dyn std::fmt::Display) -> String {
    let said = error.to_string();
    let words: Vec<&str> = said.split_whitespace().collect();
    format!("broken {format}: {}", words.join(" ").trim_matches('"'))
}
