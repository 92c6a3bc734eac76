//! PNG through the png crate: every colour type and depth, interlaced or not.

use std::io::Cursor;

use png::{ColorType, Decoder, Limits, Transformations};

use super::{Image, broken, check_size};

pub(super) fn decode(bytes: &[u8]) -> Result<Image, String> {
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: 512 << 20 });
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Palette and low depths to 8-bit colour or gray, 16 bits to the high byte.
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let info = decoder.read_header_info().map_err(|e| broken("PNG", &e))?;
    let (width, height) = (info.width as usize, info.height as usize);
    check_size(width, height)?;
    let mut reader = decoder.read_info().map_err(|e| broken("PNG", &e))?;
    let size = reader
        .output_buffer_size()
        .ok_or("the image is too large")?;
    let mut raw = vec![0; size];
    reader.next_frame(&mut raw).map_err(|e| broken("PNG", &e))?;
    let pixels = match reader.output_color_type().0 {
        ColorType::Rgb => raw,
        ColorType::Rgba => raw
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]])
            .collect(),
        ColorType::Grayscale => raw.iter().flat_map(|&g| [g, g, g]).collect(),
        ColorType::GrayscaleAlpha => raw.chunks_exact(2).flat_map(|p| [p[0]; 3]).collect(),
        ColorType::Indexed => return Err("a palette that was not expanded".to_owned()),
    };
    if pixels.len() != width * height * 3 {
        return Err(format!(
            "{} bytes for {width}x{height} pixels",
            pixels.len()
        ));
    }
    Ok(Image {
        width,
        height,
        pixels,
    })
}
