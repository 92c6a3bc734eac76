//! Where crops lie. Each function gives a region inside an image of `(width, height)`.

use crate::decode::Region;
use crate::random::Stream;
use crate::sample::BoundingBox;

pub(super) fn default_scale() -> (f64, f64) {
    (0.08, 1.0)
}

pub(super) fn default_ratio() -> (f64, f64) {
    (3.0 / 4.0, 4.0 / 3.0)
}

pub(super) fn no_jitter() -> (f64, f64) {
    (1.0, 1.0)
}

pub(super) fn half() -> f64 {
    0.5
}

/// Python's `round`: halves go to the even number.
fn round(value: f64) -> usize {
    value.round_ties_even() as usize
}

fn log_uniform(stream: &mut Stream, (low, high): (f64, f64)) -> f64 {
    libm::exp(stream.range(libm::log(low), libm::log(high)))
}

fn middle(size: usize, part: usize) -> usize {
    (size - part) / 2
}

/// torchvision's `RandomResizedCrop.get_params`: ten tries, then the largest part in the middle whose
/// ratio is within the range.
pub(super) fn random_resized(
    (width, height): (usize, usize),
    scale: (f64, f64),
    ratio: (f64, f64),
    stream: &mut Stream,
) -> Region {
    let area = width as f64 * height as f64;
    for _ in 0..10 {
        let target = area * stream.range(scale.0, scale.1);
        let aspect = log_uniform(stream, ratio);
        let w = round((target * aspect).sqrt());
        let h = round((target / aspect).sqrt());
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = stream.below(height - h + 1);
            let left = stream.below(width - w + 1);
            return Region {
                left,
                top,
                width: w,
                height: h,
            };
        }
    }
    let aspect = width as f64 / height as f64;
    let (w, h) = if aspect < ratio.0 {
        (width, round(width as f64 / ratio.0).clamp(1, height))
    } else if aspect > ratio.1 {
        (round(height as f64 * ratio.1).clamp(1, width), height)
    } else {
        (width, height)
    };
    Region {
        left: middle(width, w),
        top: middle(height, h),
        width: w,
        height: h,
    }
}

/// MatConvNet's crop (`vl_imreadjpeg.cu` of vlfeat/matconvnet from 1.0-beta21 on, the part that
/// determines aspect ratio, size and location).
pub(super) fn jitter(
    (width, height): (usize, usize),
    fraction: f64,
    scale: (f64, f64),
    ratio: (f64, f64),
    centred: bool,
    stream: &mut Stream,
) -> Region {
    let aspect = log_uniform(stream, ratio).sqrt();
    let fit = (width as f64 / aspect).min(height as f64 * aspect);
    let (low, high) = (fraction * scale.0, fraction * scale.1);
    let side = fit * stream.range(low * low, high * high).sqrt();
    let w = ((side * aspect).round() as usize).clamp(1, width);
    let h = ((side / aspect).round() as usize).clamp(1, height);
    let (left, top) = match centred {
        true => (middle(width, w), middle(height, h)),
        false => (stream.below(width - w + 1), stream.below(height - h + 1)),
    };
    Region {
        left,
        top,
        width: w,
        height: h,
    }
}

/// The square in the middle, as large as the short side.
pub(super) fn square((width, height): (usize, usize)) -> Region {
    let side = width.min(height);
    Region {
        left: middle(width, side),
        top: middle(height, side),
        width: side,
        height: side,
    }
}

/// Column and row where torchvision's `center_crop` of a square starts. Negative where the image is
/// padded first: one pixel less on the left than on the right where they differ.
pub(super) fn center((width, height): (usize, usize), side: usize) -> (isize, isize) {
    let start = |size: usize| match size >= side {
        true => round((size - side) as f64 / 2.0) as isize,
        false => -(((side - size) / 2) as isize),
    };
    (start(width), start(height))
}

/// The pixels that a box touches, widened by `margin` times its own size on each side; None where
/// nothing of it is inside.
pub(super) fn bounding_box(
    size: (usize, usize),
    found: BoundingBox,
    margin: f64,
) -> Option<Region> {
    let side = |start: f32, length: f32, size: usize| -> Option<(usize, usize)> {
        let (start, length) = (f64::from(start), f64::from(length));
        let more = length * margin;
        let low = (start - more).floor().max(0.0);
        let high = (start + length + more).ceil().min(size as f64);
        let sound = start.is_finite() && length.is_finite() && length > 0.0;
        (sound && high > low).then_some((low as usize, (high - low) as usize))
    };
    let (left, width) = side(found.left, found.width, size.0)?;
    let (top, height) = side(found.top, found.height, size.1)?;
    Some(Region {
        left,
        top,
        width,
        height,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    #[test]
    fn shares_and_ratios_lie_in_their_ranges() {
        let mut stream = Stream::new(1, Purpose::Augment, 0, 0);
        let (mut smallest, mut largest, mut sum) = (f64::MAX, 0f64, 0.0);
        let n = 4000;
        for _ in 0..n {
            let part = random_resized((500, 400), (0.08, 1.0), (0.75, 4.0 / 3.0), &mut stream);
            let (w, h) = (part.width as f64, part.height as f64);
            let share = w * h / 200_000.0;
            assert!((0.07..=1.0).contains(&share), "{part:?}");
            assert!((0.74..=1.35).contains(&(w / h)), "{part:?}");
            assert!(part.left + part.width <= 500 && part.top + part.height <= 400);
            smallest = smallest.min(share);
            largest = largest.max(share);
            sum += share;
        }
        assert!(smallest < 0.09 && largest > 0.95, "{smallest} {largest}");
        // Uniform from 0.08 to 1 would be 0.54; what does not fit is drawn again.
        assert!((0.45..0.54).contains(&(sum / f64::from(n))), "{sum}");
    }

    #[test]
    fn long_images_get_the_largest_part_in_the_middle() {
        let mut stream = Stream::new(1, Purpose::Augment, 0, 0);
        for _ in 0..50 {
            let part = random_resized((1000, 10), (0.9, 1.0), (0.75, 4.0 / 3.0), &mut stream);
            assert_eq!((part.left, part.width, part.height), (493, 13, 10));
            let part = random_resized((10, 1000), (0.9, 1.0), (0.75, 4.0 / 3.0), &mut stream);
            assert_eq!((part.top, part.width, part.height), (493, 10, 13));
            let part = random_resized((1, 300), (0.5, 1.0), (3.0, 4.0), &mut stream);
            assert_eq!((part.width, part.height), (1, 1));
        }
    }

    #[test]
    fn matconvnet_crops_a_part_of_what_fits() {
        let mut stream = Stream::new(1, Purpose::Augment, 0, 0);
        let still = jitter((500, 400), 0.875, (1.0, 1.0), (1.0, 1.0), true, &mut stream);
        assert_eq!((still.left, still.top), (75, 25));
        assert_eq!((still.width, still.height), (350, 350));
        let mut widest = 0f64;
        for _ in 0..2000 {
            let part = jitter(
                (500, 400),
                0.875,
                (0.4, 1.1),
                (0.75, 4.0 / 3.0),
                false,
                &mut stream,
            );
            let (w, h) = (part.width as f64, part.height as f64);
            assert!(part.left + part.width <= 500 && part.top + part.height <= 400);
            assert!((0.74..=1.35).contains(&(w / h)), "{part:?}");
            // One side is the fraction of the image's.
            let share = (w / 500.0).max(h / 400.0);
            assert!((0.345..=0.965).contains(&share), "{part:?}");
            widest = widest.max(share);
        }
        assert!(widest > 0.95, "{widest}");
    }

    #[test]
    fn boxes_are_widened_and_kept_inside() {
        let found = BoundingBox {
            left: 10.2,
            top: 5.0,
            width: 20.0,
            height: 10.0,
        };
        let region = |margin| bounding_box((40, 18), found, margin);
        let part = |left, top, width, height| {
            Some(Region {
                left,
                top,
                width,
                height,
            })
        };
        assert_eq!(region(0.0), part(10, 5, 21, 10));
        assert_eq!(region(0.1), part(8, 4, 25, 12));
        assert_eq!(region(10.0), part(0, 0, 40, 18));
    }
}
