//! JPEG through zune-jpeg: baseline and progressive, 1, 3 or 4 components.

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::{Image, check_size};

pub(super) fn decode(bytes: &[u8]) -> Result<Image, String> {
    // Strict: a file that ends in the middle is an error, not an image with a gray lower half.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(broken)?;
    let info = decoder.info().ok_or("the header is missing")?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check_size(width, height)?;
    let mut pixels = vec![0; width * height * 3];
    decoder.decode_into(&mut pixels).map_err(broken)?;
    Ok(Image {
        width,
        height,
        pixels,
    })
}

fn broken(error: impl std::fmt::Display) -> String {
    format!("broken JPEG: {error}")
}
