//! From the four planes of a CMYK or YCCK file to RGB, as libjpeg and Pillow together do it.
//!
//! Here because libjpeg-turbo-rs takes the black plane for one of full size, which in the files that
//! Pillow writes with subsampling it is not.

use libjpeg_turbo_rs::{ColorSpace, FrameHeader, RawImage};

use super::Image;

/// The image of decoded planes.
pub(super) fn to_rgb(
    raw: &RawImage,
    frame: &FrameHeader,
    space: ColorSpace,
) -> Result<Image, String> {
    let (width, height) = frame.dimensions();
    let largest = |horizontal: bool| {
        let factors = frame.components.iter().map(|c| match horizontal {
            true => c.horizontal_sampling,
            false => c.vertical_sampling,
        });
        usize::from(factors.max().unwrap_or(1))
    };
    let (most_h, most_v) = (largest(true), largest(false));
    let mut planes = Vec::with_capacity(4);
    for (index, component) in frame.components.iter().enumerate() {
        let h = usize::from(component.horizontal_sampling);
        let v = usize::from(component.vertical_sampling);
        if h == 0 || v == 0 || most_h % h > 0 || most_v % v > 0 {
            return Err(format!("a sampling of {h}x{v} in {most_h}x{most_v}"));
        }
        let plane = Plane {
            samples: raw.planes.get(index).ok_or("a plane is missing")?,
            stride: *raw.plane_widths.get(index).ok_or("a plane is missing")?,
            width: (width * h).div_ceil(most_h),
            height: (height * v).div_ceil(most_v),
            times: (most_h / h, most_v / v),
        };
        if plane.width > plane.stride || plane.samples.len() < plane.stride * plane.height {
            return Err("a plane is too small".to_owned());
        }
        planes.push(plane);
    }
    let [first, second, third, black] = &planes[..] else {
        return Err(format!("{} planes, not 4", planes.len()));
    };
    let mut rows = [const { Vec::new() }; 4];
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for (plane, row) in [first, second, third, black].into_iter().zip(&mut rows) {
            plane.row(y, row);
        }
        let [first, second, third, black] = &rows;
        let samples = first.iter().zip(second).zip(third).zip(black);
        for (((&a, &b), &c), &key) in samples.take(width) {
            let colours = match space {
                ColorSpace::Ycck => ycc_to_rgb(a, b, c).map(|v| 255 - v),
                _ => [a, b, c],
            };
            // Pillow takes all such files as Adobe writes them, inverted: 255 is no ink.
            pixels.extend(colours.map(|colour| {
                let ink = u32::from(255 - colour) * u32::from(key) + 128;
                key.saturating_sub(((ink + (ink >> 8)) >> 8) as u8)
            }));
        }
    }
    Ok(Image {
        width,
        height,
        pixels,
    })
}

/// One component at its own resolution.
struct Plane<'a> {
    samples: &'a [u8],
    stride: usize,
    width: usize,
    height: usize,
    /// How many columns and rows of the image one sample stands for.
    times: (usize, usize),
}

impl Plane<'_> {
    /// Row `y` of the image: libjpeg's triangle filter where it has one (three parts of the nearest
    /// sample, one of the next; ties go up and down by turns), otherwise repeated samples.
    fn row(&self, y: usize, out: &mut Vec<u8>) {
        let (times_x, times_y) = self.times;
        let smooth_x = times_x == 2 && times_y <= 2 && self.width > 2;
        let smooth_y = times_y == 2 && (times_x == 1 || smooth_x);
        let samples = |y: usize| {
            let start = y.min(self.height - 1) * self.stride;
            &self.samples[start..start + self.width]
        };
        let near = samples(y / times_y);
        let far = samples(match y % 2 {
            0 => (y / 2).saturating_sub(1),
            _ => y / 2 + 1,
        });
        let down = |x: usize| match smooth_y {
            true => 3 * u32::from(near[x]) + u32::from(far[x]),
            false => u32::from(near[x]),
        };
        out.clear();
        for (x, &sample) in near.iter().enumerate() {
            match (smooth_x, smooth_y) {
                (true, _) => {
                    let here = 3 * down(x);
                    let left = here + down(x.saturating_sub(1));
                    let right = here + down((x + 1).min(self.width - 1));
                    let (left, right) = match smooth_y {
                        true => ((left + 8) >> 4, (right + 7) >> 4),
                        false => ((left + 1) >> 2, (right + 2) >> 2),
                    };
                    out.extend([left as u8, right as u8]);
                }
                (false, true) => out.push(((down(x) + 1 + y as u32 % 2) >> 2) as u8),
                (false, false) => out.extend(std::iter::repeat_n(sample, times_x)),
            }
        }
    }
}

/// ITU-R BT.601 in libjpeg's fixed point.
fn ycc_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    [
        y + ((91_881 * cr + HALF) >> 16),
        y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16),
        y + ((116_130 * cb + HALF) >> 16),
    ]
    .map(|v| v.clamp(0, 255) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(times: (usize, usize), width: usize, samples: &[u8]) -> Vec<Vec<u8>> {
        let plane = Plane {
            samples,
            stride: width,
            width,
            height: samples.len() / width,
            times,
        };
        let row = |y| {
            let mut out = Vec::new();
            plane.row(y, &mut out);
            out
        };
        (0..plane.height * times.1).map(row).collect()
    }

    #[test]
    fn samples_are_spread_as_libjpeg_spreads_them() {
        // Three parts of the nearest, one of the next; the borders repeat themselves.
        assert_eq!(
            rows((2, 1), 4, &[0, 4, 8, 12]),
            [[0, 1, 3, 5, 7, 9, 11, 12]]
        );
        assert_eq!(rows((1, 2), 1, &[0, 40]), [[0], [10], [30], [40]]);
        let both = rows((2, 2), 3, &[0, 40, 80, 80, 120, 160]);
        assert_eq!(both[0], [0, 10, 30, 50, 70, 80]);
        assert_eq!(both[1], [20, 30, 50, 70, 90, 100]);
        // Narrow planes and other factors are repeated.
        assert_eq!(rows((2, 2), 2, &[0, 40]), [[0, 0, 40, 40], [0, 0, 40, 40]]);
        assert_eq!(rows((4, 1), 2, &[0, 40]), [[0, 0, 0, 0, 40, 40, 40, 40]]);
        assert_eq!(rows((1, 1), 2, &[7, 9]), [[7, 9]]);
    }

    #[test]
    fn gray_has_no_colour() {
        assert_eq!(ycc_to_rgb(77, 128, 128), [77; 3]);
        assert_eq!(ycc_to_rgb(255, 128, 255), [255, 164, 255]);
    }
}
