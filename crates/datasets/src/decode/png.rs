//! PNG through the png crate: every colour type and depth, interlaced or not.

use std::io::Cursor;

use png::{ColorType, Decoder, Limits, Transformations};

use super::{Image, Region, broken, check_size, orientation};

/// A PNG whose header is read.
pub(super) struct Png<'a> {
    decoder: Decoder<Cursor<&'a [u8]>>,
    bytes: &'a [u8],
    width: usize,
    height: usize,
}

impl<'a> Png<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, String> {
        let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: 512 << 20 });
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        // Palette and low depths to 8-bit colour or gray, 16 bits to the high byte.
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        let info = decoder.read_header_info().map_err(|e| broken("PNG", &e))?;
        let (width, height) = (info.width as usize, info.height as usize);
        check_size(width, height)?;
        Ok(Self {
            decoder,
            bytes,
            width,
            height,
        })
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// From the first eXIf chunk, which may follow the pixels.
    pub(super) fn orientation(&self) -> u8 {
        let mut rest = self.bytes.get(8..).unwrap_or_default();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            let (Some(kind), Some(body)) = (after.get(..4), after.get(4..)) else {
                break;
            };
            if kind == b"eXIf" {
                return body.get(..length).map_or(1, orientation::from_tiff);
            }
            // A checksum of 4 bytes ends the chunk.
            rest = body.get(length.saturating_add(4)..).unwrap_or_default();
        }
        1
    }

    /// The pixels in `region`. The whole image is decoded for it: rows are coded from those above.
    pub(super) fn decode(self, region: Region) -> Result<Image, String> {
        let (width, height) = self.size();
        let mut reader = self.decoder.read_info().map_err(|e| broken("PNG", &e))?;
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
        let image = Image {
            width,
            height,
            pixels,
        };
        match region == Region::whole(width, height) {
            true => Ok(image),
            false => Ok(image.cut(region)),
        }
    }
}
