//! JPEG through zune-jpeg: baseline and progressive; gray, YCbCr, RGB, CMYK and YCCK.
//!
//! Not read: arithmetic coding, 12 bits, lossless, and baseline files whose subsampled colours come
//! in scans of their own (zune-jpeg 0.5 gets their colours wrong without an error).

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::{JpegDecoder, SampleRatios};

use super::{Image, broken, check_size};

pub(super) fn decode(bytes: &[u8]) -> Result<Image, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| broken("JPEG", &e))?;
    let info = decoder.info().ok_or("the header is missing")?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check_size(width, height)?;
    if matches!(
        decoder.input_colorspace(),
        None | Some(ColorSpace::MultiBand(_) | ColorSpace::Unknown)
    ) {
        return Err(format!("{} colour components", info.components));
    }
    if info.sample_ratio != SampleRatios::None
        && info.sof.is_sequential_dct()
        && components_in_first_scan(bytes) < Some(info.components)
    {
        return Err("subsampled colours in separate scans, which is not supported".to_owned());
    }
    // Lenient so far, since cameras leave junk between headers; strict from here on: a file that
    // ends in the middle is an error, not an image with a gray lower half.
    decoder.set_options(options.set_strict_mode(true));
    let mut pixels = vec![0; width * height * 3];
    decoder
        .decode_into(&mut pixels)
        .map_err(|e| broken("JPEG", &e))?;
    Ok(Image {
        width,
        height,
        pixels,
    })
}

/// Number of components in the first scan, from its header.
fn components_in_first_scan(bytes: &[u8]) -> Option<u8> {
    let mut at = 2;
    loop {
        match (*bytes.get(at)?, *bytes.get(at + 1)?) {
            (0xFF, 0xDA) => return bytes.get(at + 4).copied(),
            // Neither junk between segments, nor fill bytes, nor markers without a segment.
            (0xFF, 0x02..=0xCF | 0xDB..=0xFE) => {
                let length = bytes.get(at + 2..at + 4)?;
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
            _ => at += 1,
        }
    }
}
