//! JPEG through libjpeg-turbo-rs, a port of the library that Pillow uses: every process of 8 bits,
//! gray, YCbCr, RGB, CMYK and YCCK, pixel for pixel.
//!
//! Damage is treated as Pillow treats it. A file that ends too early is refused. One with an end, but
//! with a code that no table has or a marker where data should be, is read as far as it makes sense:
//! real sets have a few of those, and PyTorch's pipelines train on them.

use libjpeg_turbo_rs::{DecodeLimits, DecodeWarning, Decoder, Image as Decoded, PixelFormat};

use super::{Image, MAX_PIXELS, Region, broken, check_size, cmyk, orientation};

/// Real progressive files have some ten scans. Each costs a pass over all coefficients, so that a
/// small file with thousands of them would keep a thread busy for hours.
const MAX_SCANS: usize = 100;
/// Most pixels that the scans of a file may pass over together, for the same reason.
const MAX_SCANNED_PIXELS: usize = 16 * MAX_PIXELS;
/// Most memory that the decoder may need, by its own estimate.
const MAX_MEMORY: u64 = 1 << 30;

/// A JPEG whose header is read.
pub(super) struct Jpeg<'a> {
    decoder: Decoder<'a>,
    bytes: &'a [u8],
    limits: DecodeLimits,
    /// Columns of a block of pixels that is coded together (an iMCU).
    unit: usize,
}

impl<'a> Jpeg<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, String> {
        let mut limits = DecodeLimits {
            max_width: usize::from(u16::MAX),
            max_height: usize::from(u16::MAX),
            max_pixels: MAX_PIXELS as u64,
            max_scans: MAX_SCANS,
            max_memory: Some(MAX_MEMORY),
        };
        // Up to the first scan only: its size decides how many scans are looked for.
        let head = Decoder::new_header_only(bytes, limits).map_err(|e| broken("JPEG", &e))?;
        let frame = head.header();
        let (width, height) = frame.dimensions();
        check_size(width, height)?;
        let components = &frame.components;
        if !matches!(components.len(), 1 | 3 | 4) {
            return Err(format!(
                "a JPEG with {} components, not 1, 3 or 4",
                components.len()
            ));
        }
        if frame.precision != 8 {
            return Err(format!("a JPEG of {} bits, not 8", frame.precision));
        }
        let factors = components.iter().map(|c| c.horizontal_sampling);
        let unit = 8 * usize::from(factors.max().unwrap_or(1));
        limits.max_scans = MAX_SCANS.min(MAX_SCANNED_PIXELS / (width * height));
        Ok(Self {
            decoder: new_decoder(bytes, limits)?,
            bytes,
            limits,
            unit,
        })
    }

    pub(super) fn size(&self) -> (usize, usize) {
        self.decoder.header().dimensions()
    }

    pub(super) fn orientation(&self) -> u8 {
        self.decoder.exif_data().map_or(1, orientation::from_tiff)
    }

    /// The pixels of the whole image that lie in `region`.
    pub(super) fn decode(self, region: Region) -> Result<Image, String> {
        let (width, height) = self.size();
        let whole = Region::whole(width, height);
        if self.decoder.header().components.len() == 4 {
            let frame = self.decoder.header().clone();
            let space = self.decoder.jpeg_color_space();
            let planes = self.tolerantly(|decoder| decoder.decode_raw_with_warnings())?;
            let image = cmyk::to_rgb(&planes, &frame, space)?;
            return Ok(match region == whole {
                true => image,
                false => image.cut(region),
            });
        }
        // Upsampled colours depend on their neighbours: one block more on each side. The decoder adds
        // those above and below by itself.
        let (left, right) = (region.left / self.unit, region.left + region.width);
        let left = left.saturating_sub(1) * self.unit;
        let right = ((right.div_ceil(self.unit) + 1) * self.unit).min(width);
        let decoded = self.tolerantly(|mut decoder| {
            if region != whole {
                decoder.set_crop_region(left, region.top, right - left, region.height);
            }
            let mut decoded = decoder.decode_image()?;
            let warnings = std::mem::take(&mut decoded.warnings);
            Ok((decoded, warnings))
        })?;
        // Whole images start at 0, and lossless ones are not cut at the sides.
        let left = if decoded.width == width { 0 } else { left };
        let size = decoded.pixel_format.bytes_per_pixel();
        if left + decoded.width < region.left + region.width
            || decoded.height != region.height
            || decoded.data.len() != decoded.width * decoded.height * size
        {
            return Err(format!(
                "{}x{} pixels in {} bytes for {region:?}",
                decoded.width,
                decoded.height,
                decoded.data.len()
            ));
        }
        Ok(Image {
            width: region.width,
            height: region.height,
            pixels: to_rgb(decoded, region.left - left, region.width),
        })
    }

    /// What `decode` gives, as far as it comes where the file is damaged but not cut off.
    fn tolerantly<T>(
        self,
        decode: impl Fn(Decoder) -> libjpeg_turbo_rs::Result<(T, Vec<DecodeWarning>)>,
    ) -> Result<T, String> {
        let error = match decode(self.decoder) {
            Ok((decoded, _)) => return Ok(decoded),
            Err(error) => error,
        };
        if !has_end(self.bytes) {
            return Err("the file is truncated".to_owned());
        }
        let mut decoder = new_decoder(self.bytes, self.limits)?;
        decoder.set_lenient(true);
        match decode(decoder) {
            Ok((decoded, warnings)) if !warnings.iter().any(is_blank) => Ok(decoded),
            _ => Err(broken("JPEG", &error)),
        }
    }
}

fn new_decoder(bytes: &[u8], limits: DecodeLimits) -> Result<Decoder<'_>, String> {
    let mut decoder = Decoder::new_with_limits(bytes, limits).map_err(|e| broken("JPEG", &e))?;
    // As libjpeg does where a progressive file leaves coefficients open.
    decoder.set_block_smoothing(true);
    if decoder.header().components.len() == 3 {
        decoder.set_output_format(PixelFormat::Rgb);
    }
    Ok(decoder)
}

/// Whether the decoder left out what it cannot do, where Pillow's would refuse the file.
fn is_blank(warning: &DecodeWarning) -> bool {
    matches!(warning, DecodeWarning::UnsupportedRecovered { .. })
}

/// Cuts `width` columns out and makes them RGB.
fn to_rgb(decoded: Decoded, left: usize, width: usize) -> Vec<u8> {
    let size = decoded.pixel_format.bytes_per_pixel();
    if size == 3 && width == decoded.width {
        return decoded.data;
    }
    let mut pixels = Vec::with_capacity(width * decoded.height * 3);
    for row in decoded.data.chunks_exact(decoded.width * size) {
        let row = &row[left * size..(left + width) * size];
        match size {
            3 => pixels.extend_from_slice(row),
            _ => pixels.extend(row.iter().flat_map(|&gray| [gray; 3])),
        }
    }
    pixels
}

/// Whether an end marker follows the header of the first scan (the header may hold a small JPEG of its
/// own, with an end).
fn has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[first, second]) = bytes.get(at..at + 2) {
        match (first, second) {
            (0xFF, 0xDA) => break,
            // Neither junk between segments, nor fill bytes, nor markers without a segment.
            (0xFF, 0x02..=0xCF | 0xDB..=0xFE) => {
                let length = bytes.get(at + 2..at + 4).map_or(2, |length| {
                    usize::from(u16::from_be_bytes([length[0], length[1]]))
                });
                at += 2 + length;
            }
            _ => at += 1,
        }
    }
    let rest = bytes.get(at..).unwrap_or_default();
    rest.windows(2).any(|pair| pair == [0xFF, 0xD9])
}
