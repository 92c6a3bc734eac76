//! From the bytes of a file to 8-bit RGB pixels.
//!
//! The content decides the format, never the file's name. Pixels are those of Pillow's
//! `convert("RGB")`, so that statistics and scores agree with those of PyTorch pipelines: grayscale
//! becomes three equal channels, CMYK is converted plainly, profiles are ignored, transparency is
//! dropped. (16-bit gray is the exception: its high byte is kept, where Pillow clips.) Sizes are
//! bounded before anything is allocated for them.

mod cmyk;
mod jpeg;
mod orientation;
mod png;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use jpeg::Jpeg;
use png::Png;

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

impl Image {
    /// A part of it, which must lie inside.
    pub(crate) fn cut(&self, region: Region) -> Self {
        let mut pixels = Vec::with_capacity(region.width * region.height * 3);
        for y in region.top..region.top + region.height {
            let start = (y * self.width + region.left) * 3;
            pixels.extend_from_slice(&self.pixels[start..start + region.width * 3]);
        }
        Self {
            width: region.width,
            height: region.height,
            pixels,
        }
    }
}

/// How files are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecodeOptions {
    /// Turns an image upright as its EXIF orientation says. Off by default, as in torchvision. A broken
    /// EXIF block counts as none.
    pub exif_orientation: bool,
}

/// A rectangle of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Columns left of it.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Columns in it, at least 1.
    pub width: usize,
    /// Rows in it, at least 1.
    pub height: usize,
}

impl Region {
    /// A whole image.
    #[must_use]
    pub fn whole(width: usize, height: usize) -> Self {
        Self {
            left: 0,
            top: 0,
            width,
            height,
        }
    }

    fn inside(&self, (width, height): (usize, usize)) -> bool {
        let fits = |start: usize, length: usize, size: usize| {
            length > 0 && start.checked_add(length).is_some_and(|end| end <= size)
        };
        fits(self.left, self.width, width) && fits(self.top, self.height, height)
    }
}

/// Reads and decodes one file.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Decode`] where it is not an intact JPEG or PNG.
pub fn decode_file(path: &Path) -> Result<Image> {
    let mut bytes = Vec::new();
    crate::sample::read_file(path, &mut bytes)?;
    decode(&bytes, path)
}

/// Decodes the bytes of a JPEG or PNG file; `path` is only named in errors.
///
/// # Errors
/// [`Error::Decode`] for everything that is not an intact image within [`MAX_PIXELS`].
pub fn decode(bytes: &[u8], path: &Path) -> Result<Image> {
    Encoded::open(bytes, path, DecodeOptions::default())?.decode(None)
}

/// The bytes of a JPEG or PNG file whose header is read: its size is known, and a part of it can be
/// decoded alone.
pub struct Encoded<'a> {
    path: &'a Path,
    format: Format<'a>,
    orientation: u8,
}

enum Format<'a> {
    Jpeg(Box<Jpeg<'a>>),
    Png(Box<Png<'a>>),
}

impl std::fmt::Debug for Encoded<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (width, height) = self.size();
        write!(f, "Encoded({}, {width}x{height})", self.path.display())
    }
}

impl<'a> Encoded<'a> {
    /// Reads the header; `path` is only named in errors.
    ///
    /// # Errors
    /// [`Error::Decode`] for what is neither a JPEG nor a PNG file or has more than [`MAX_PIXELS`].
    pub fn open(bytes: &'a [u8], path: &'a Path, options: DecodeOptions) -> Result<Self> {
        guarded(path, || {
            let format = match bytes {
                [] => return Err("the file is empty".to_owned()),
                [0xFF, 0xD8, 0xFF, ..] => Format::Jpeg(Box::new(Jpeg::open(bytes)?)),
                [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => {
                    Format::Png(Box::new(Png::open(bytes)?))
                }
                _ => return Err(format!("not a JPEG or PNG file ({})", looks_like(bytes))),
            };
            let orientation = match &format {
                _ if !options.exif_orientation => 1,
                Format::Jpeg(jpeg) => jpeg.orientation(),
                Format::Png(png) => png.orientation(),
            };
            Ok(Self {
                path,
                format,
                orientation,
            })
        })
    }

    /// Width and height as the file has them.
    pub(crate) fn stored_size(&self) -> (usize, usize) {
        match &self.format {
            Format::Jpeg(jpeg) => jpeg.size(),
            Format::Png(png) => png.size(),
        }
    }

    /// Width and height, after turning upright if that is asked for.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        let (width, height) = self.stored_size();
        match orientation::swaps_sides(self.orientation) {
            true => (height, width),
            false => (width, height),
        }
    }

    /// Where a region of the pixels that the file has lies in the upright image.
    pub(crate) fn upright_region(&self, stored: Region) -> Region {
        orientation::upright_region(self.orientation, stored, self.stored_size())
    }

    /// The pixels of the whole image, or exactly those of them that lie in `region`, which costs less.
    ///
    /// # Errors
    /// [`Error::Decode`] for an image that is not intact and for a region that leaves it.
    pub fn decode(self, region: Option<Region>) -> Result<Image> {
        let (width, height) = self.size();
        let region = region.unwrap_or(Region::whole(width, height));
        guarded(self.path, || {
            if !region.inside((width, height)) {
                return Err(format!(
                    "{region:?} is not inside of {width}x{height} pixels"
                ));
            }
            let region = orientation::stored_region(self.orientation, region, self.stored_size());
            let image = match self.format {
                Format::Jpeg(jpeg) => jpeg.decode(region),
                Format::Png(png) => png.decode(region),
            }?;
            Ok(orientation::apply(self.orientation, image))
        })
    }
}

/// The decoders are other people's code on untrusted bytes: a panic in there must end as an error that
/// names the file, like any other corruption.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, String>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the decoder failed on it".to_owned()))
        .map_err(|problem| Error::Decode {
            path: path.to_path_buf(),
            problem,
        })
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
