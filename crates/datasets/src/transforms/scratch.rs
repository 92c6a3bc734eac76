//! Memory of one worker, used again from image to image.

use fast_image_resize::images::{Image as Target, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::Filter;
use crate::decode::MAX_PIXELS;

/// Largest buffer that is kept for the next image. There are at most [`KEPT_BUFFERS`] of them and the
/// resizer's own, so that a worker holds no more than 64 MiB between images.
const KEPT_BYTES: usize = 16 << 20;
const KEPT_BUFFERS: usize = 3;

/// Most pixels between the passes of a resizing; only images of extreme proportions come near it.
const MAX_BETWEEN: usize = 2 * MAX_PIXELS;

/// Buffers and resizer of one worker. What an image leaves in it changes no other image, and it keeps at
/// most 64 MiB.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: Resizer,
    spare: Vec<Vec<u8>>,
}

impl Scratch {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let spare: usize = self.spare.iter().map(Vec::capacity).sum();
        spare + self.resizer.size_of_internal_buffers()
    }

    /// An empty buffer.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    /// Keeps a buffer for later, if it is not too large.
    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() <= KEPT_BYTES && self.spare.len() < KEPT_BUFFERS {
            self.spare.push(buffer);
        }
    }

    /// Ends the work on an image.
    pub(super) fn trim(&mut self) {
        if self.resizer.size_of_internal_buffers() > KEPT_BYTES {
            self.resizer.reset_internal_buffers();
        }
    }

    /// Resizes a whole image (HWC, RGB). The caller cuts first: the resizer's own crop reads pixels
    /// outside of it, which Pillow's does not.
    pub(super) fn resize(
        &mut self,
        pixels: &[u8],
        from: (usize, usize),
        to: (usize, usize),
        filter: Filter,
    ) -> Result<Vec<u8>, String> {
        // Between the two passes there is an image with one side of each.
        let between = from.0.max(to.0).saturating_mul(from.1.max(to.1));
        if between > MAX_BETWEEN {
            return Err(format!(
                "{}x{} pixels cannot be resized to {}x{}: too much memory on the way",
                from.0, from.1, to.0, to.1
            ));
        }
        if filter == Filter::Bilinear || from.0 == to.0 || from.1 == to.1 {
            return self.resize_at_once(pixels, from, to, filter);
        }
        // Rows first, as Pillow: the cubic overshoots at edges, and what is cut to 8 bits between the two
        // passes depends on their order. The resizer would take columns first.
        let between = self.resize_at_once(pixels, from, (to.0, from.1), filter)?;
        let resized = self.resize_at_once(&between, (to.0, from.1), to, filter);
        self.give(between);
        resized
    }

    fn resize_at_once(
        &mut self,
        pixels: &[u8],
        from: (usize, usize),
        to: (usize, usize),
        filter: Filter,
    ) -> Result<Vec<u8>, String> {
        let source = ImageRef::new(from.0 as u32, from.1 as u32, pixels, PixelType::U8x3)
            .map_err(|e| e.to_string())?;
        let mut buffer = self.take();
        buffer.resize(to.0 * to.1 * 3, 0);
        let mut target =
            Target::from_slice_u8(to.0 as u32, to.1 as u32, &mut buffer, PixelType::U8x3)
                .map_err(|e| e.to_string())?;
        let filter = match filter {
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Bicubic => FilterType::CatmullRom,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        self.resizer
            .resize(&source, &mut target, &options)
            .map_err(|e| e.to_string())?;
        Ok(buffer)
    }
}
