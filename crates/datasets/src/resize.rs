//! Bringing the images of a set to one size.
//!
//! Bilinear with antialiasing (the triangle filter widened by the scale, as in Pillow). The crop
//! is cut out first and the cut resized: fast_image_resize's own crop reads pixels outside it.

use fast_image_resize::images::{Image as ImageView, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::decode::Image;

/// How the images of a set come to one size. Named by the experiment, never by the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// As they are; all must have the same size.
    Keep,
    /// The centre square of each image, its side brought to this many pixels.
    ShortSideCrop(usize),
    /// The short side brought to `short` pixels with the long one in proportion (rounded down), then
    /// the centre square of `crop` pixels: torchvision's `Resize` and `CenterCrop`.
    Evaluation {
        /// Pixels of the short side.
        short: usize,
        /// Side of the square, at most `short`.
        crop: usize,
    },
}

/// Largest side that [`Resize`] accepts.
pub const MAX_SIDE: usize = 4096;
/// Largest long side of a resized image: 64 times the largest short one.
const MAX_LONG: usize = 64 * MAX_SIDE;

impl Resize {
    /// Applies this to one image.
    ///
    /// # Errors
    /// A sentence without the path, which the caller adds.
    pub(crate) fn apply(self, image: Image) -> Result<Image, String> {
        match self {
            Self::Keep => Ok(image),
            Self::ShortSideCrop(side) if side == 0 || side > MAX_SIDE => Err(format!(
                "cannot resize to a side of {side} (1 to {MAX_SIDE} is possible)"
            )),
            Self::ShortSideCrop(side) => {
                let square = image.width.min(image.height);
                let (left, top) = ((image.width - square) / 2, (image.height - square) / 2);
                scale(cut(image, left, top, square), (side, side))
            }
            Self::Evaluation { short, crop } if crop == 0 || crop > short || short > MAX_SIDE => {
                Err(format!(
                    "cannot cut a square of {crop} out of a short side of {short} (1 to {short}, at \
                     most {MAX_SIDE}, is possible)"
                ))
            }
            Self::Evaluation { short, crop } => {
                let (width, height) = (image.width, image.height);
                let long = |long: usize, of: usize| short.saturating_mul(long) / of.max(1);
                let (width, height) = match width <= height {
                    true => (short, long(height, width)),
                    false => (long(width, height), short),
                };
                if width.max(height) > MAX_LONG {
                    return Err(format!(
                        "an image of {}x{} cannot be brought to a short side of {short}: its long \
                         side would have {} pixels",
                        image.width,
                        image.height,
                        width.max(height)
                    ));
                }
                // torchvision rounds the half, and Python's halves go to the even number.
                let margin = |size: usize| ((size - crop) as f64 / 2.0).round_ties_even() as usize;
                let image = scale(image, (width, height))?;
                Ok(cut(image, margin(width), margin(height), crop))
            }
        }
    }
}

/// A square of `side` pixels whose corner is at `left` and `top`, all within the image.
fn cut(image: Image, left: usize, top: usize, side: usize) -> Image {
    let Image {
        width,
        height,
        pixels,
    } = image;
    if (width, height) == (side, side) {
        return Image {
            width,
            height,
            pixels,
        };
    }
    let rows = pixels.chunks_exact(width * 3).skip(top).take(side);
    let pixels = rows
        .flat_map(|row| &row[left * 3..(left + side) * 3])
        .copied()
        .collect();
    Image {
        width: side,
        height: side,
        pixels,
    }
}

fn scale(image: Image, (width, height): (usize, usize)) -> Result<Image, String> {
    if (image.width, image.height) == (width, height) {
        return Ok(image);
    }
    let from = (image.width as u32, image.height as u32);
    let source =
        ImageRef::new(from.0, from.1, &image.pixels, PixelType::U8x3).map_err(|e| e.to_string())?;
    let mut target = ImageView::new(width as u32, height as u32, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    Resizer::new()
        .resize(&source, &mut target, &options)
        .map_err(|e| e.to_string())?;
    Ok(Image {
        width,
        height,
        pixels: target.into_vec(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ramp(width: usize, height: usize) -> Image {
        let pixels = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 7]))
            .collect();
        Image {
            width,
            height,
            pixels,
        }
    }

    #[test]
    fn crops_the_centre_without_resampling() {
        let out = Resize::ShortSideCrop(4).apply(ramp(9, 4)).unwrap();
        assert_eq!((out.width, out.height), (4, 4));
        assert_eq!(&out.pixels[..6], [2, 0, 7, 3, 0, 7]);
        let out = Resize::ShortSideCrop(3).apply(ramp(3, 8)).unwrap();
        assert_eq!(&out.pixels[..3], [0, 2, 7]);
    }

    #[test]
    fn averages_when_it_shrinks() {
        // Halving with the triangle filter: a ramp stays a ramp, away from the border.
        let out = Resize::ShortSideCrop(16).apply(ramp(32, 32)).unwrap();
        for x in 2..14 {
            let got = f64::from(out.pixels[(5 * 16 + x) * 3]);
            assert!((got - (2.0 * x as f64 + 0.5)).abs() <= 1.0, "{x}: {got}");
        }
    }

    #[test]
    fn any_shape_and_only_sane_sides() {
        for (w, h) in [(1, 1), (1, 1000), (1000, 1), (7, 5)] {
            let out = Resize::ShortSideCrop(8).apply(ramp(w, h)).unwrap();
            assert_eq!(out.pixels.len(), 8 * 8 * 3);
        }
        assert!(Resize::ShortSideCrop(0).apply(ramp(2, 2)).is_err());
        assert!(
            Resize::ShortSideCrop(MAX_SIDE + 1)
                .apply(ramp(2, 2))
                .is_err()
        );
    }
}
