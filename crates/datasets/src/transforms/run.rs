//! Running a pipeline on one image.

use std::path::Path;

use crate::decode::{DecodeOptions, Encoded, MAX_PIXELS, Region};
use crate::random::{Purpose, Stream};
use crate::sample::Annotation;
use crate::{Error, Result};

use super::canvas::{Border, Canvas};
use super::scratch::Scratch;
use super::{Key, Pipeline, Step, colour, crops};

impl Pipeline {
    /// The inputs that the bytes of a JPEG or PNG file give: [`Pipeline::views`] images one after the
    /// other in `out`, which is emptied first, each `height x width x 3` bytes (RGB). Returns height and
    /// width. Decodes no more than the first crops leave. `path` is only named in errors.
    ///
    /// # Errors
    /// [`Error::Decode`] for what is no intact image, [`Error::Layout`] for an image that a step cannot
    /// work on (too small for five crops, no box, too long for a resizing). Steps whose numbers make no
    /// sense are not looked for here: [`Pipeline::check`] is, once.
    pub fn run_encoded(
        &self,
        bytes: &[u8],
        path: &Path,
        annotation: Option<&Annotation>,
        key: Key,
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<(usize, usize)> {
        let options = DecodeOptions {
            exif_orientation: self.exif_orientation,
        };
        let canvas = Canvas::encoded(Encoded::open(bytes, path, options)?);
        self.run(canvas, path, annotation, key, scratch, out)
    }

    /// As [`Pipeline::run_encoded`], for pixels in memory: `height x width x 3` bytes with their width
    /// and height, upright as they are.
    ///
    /// # Errors
    /// Those, and [`Error::Config`] where the number of bytes is not that of the size.
    pub fn run_decoded(
        &self,
        (pixels, width, height): (&[u8], usize, usize),
        path: &Path,
        annotation: Option<&Annotation>,
        key: Key,
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<(usize, usize)> {
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if pixels.is_empty() || expected != Some(pixels.len()) {
            return Err(Error::Config(format!(
                "{} bytes are no image of {width}x{height}",
                pixels.len()
            )));
        }
        let canvas = Canvas::borrowed(pixels, (width, height));
        self.run(canvas, path, annotation, key, scratch, out)
    }

    fn run(
        &self,
        mut canvas: Canvas,
        path: &Path,
        annotation: Option<&Annotation>,
        key: Key,
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<(usize, usize)> {
        out.clear();
        let mut stream = Stream::new(key.seed, Purpose::Augment, key.epoch, key.sample);
        // Always drawn and always first: leaving the flip out does not move the other numbers.
        let coin = stream.coin();
        for step in &self.steps {
            match *step {
                Step::BoxCrop { margin } => {
                    let region = annotation
                        .and_then(|a| a.bounding_box)
                        .ok_or("an image without a bounding box".to_owned())
                        .and_then(|found| {
                            let size = canvas.stored_size();
                            crops::bounding_box(size, found, margin).ok_or(format!(
                                "nothing of the box {found:?} is inside of {}x{} pixels",
                                size.0, size.1
                            ))
                        })
                        .map_err(|problem| Error::layout(path, problem, "a box to crop to"))?;
                    canvas.crop(canvas.upright(region));
                }
                Step::FiveCrop { size } | Step::TenCrop { size } => {
                    let (width, height) = canvas.size();
                    if width < size || height < size {
                        return Err(Error::layout(
                            path,
                            format!("an image of {width}x{height} where its corners are cut out"),
                            format!("at least {size}x{size}: resize before"),
                        ));
                    }
                }
                Step::TrimBottom { rows } => {
                    let (width, height) = canvas.size();
                    if rows >= height {
                        return Err(Error::layout(
                            path,
                            format!("an image of {height} rows"),
                            format!("more than the {rows} that are trimmed"),
                        ));
                    }
                    canvas.crop(Region::whole(width, height - rows));
                }
                step => {
                    let done = apply(step, &mut canvas, coin, &mut stream, scratch);
                    done.map_err(|error| match error {
                        Error::Config(problem) => {
                            Error::layout(path, problem, "proportions that are less extreme")
                        }
                        error => error,
                    })?;
                }
            }
        }
        canvas.decode()?;
        let (width, height) = canvas.size();
        let whole = Region::whole(width, height);
        let size = match self.steps.last() {
            Some(&(Step::FiveCrop { size } | Step::TenCrop { size })) => {
                let mirrored = matches!(self.steps.last(), Some(Step::TenCrop { .. }));
                let (left, top) = crops::center((width, height), size);
                let (right, bottom) = (width - size, height - size);
                let corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)];
                out.reserve(size * size * 3 * self.views());
                for flip in [false, true].into_iter().take(1 + usize::from(mirrored)) {
                    // The five of the mirror image are cut out after mirroring.
                    canvas.flip ^= flip;
                    let centre = (left as usize, top as usize);
                    for (left, top) in corners.into_iter().chain([centre]) {
                        let part = Region {
                            left,
                            top,
                            width: size,
                            height: size,
                        };
                        canvas.write(part, false, out);
                    }
                }
                (size, size)
            }
            Some(Step::Mirror {}) => {
                out.reserve(2 * width * height * 3);
                canvas.write(whole, false, out);
                canvas.write(whole, true, out);
                (height, width)
            }
            _ => {
                out.reserve(width * height * 3);
                canvas.write(whole, false, out);
                (height, width)
            }
        };
        canvas.finish(scratch);
        Ok(size)
    }
}

/// A step that every image can go through.
fn apply(
    step: Step,
    canvas: &mut Canvas,
    coin: bool,
    stream: &mut Stream,
    scratch: &mut Scratch,
) -> Result<()> {
    let seen = canvas.size();
    match step {
        Step::RandomResizedCrop {
            size,
            scale,
            ratio,
            filter,
        } => {
            canvas.crop(crops::random_resized(seen, scale, ratio, stream));
            canvas.resize((size, size), filter, scratch)?;
        }
        Step::JitterCrop {
            size,
            fraction,
            scale,
            ratio,
            centred,
            filter,
        } => {
            let part = crops::jitter(seen, fraction, scale, ratio, centred, stream);
            canvas.crop(part);
            canvas.resize((size, size), filter, scratch)?;
        }
        Step::Resize { short, filter } => {
            let to = resized(seen, short).map_err(Error::Config)?;
            canvas.resize(to, filter, scratch)?;
        }
        Step::ResizeTo {
            width,
            height,
            filter,
        } => canvas.resize((width, height), filter, scratch)?,
        Step::CenterSquare {} => canvas.crop(crops::square(seen)),
        Step::CenterCrop { size } => {
            let start = crops::center(seen, size);
            canvas.crop_with_border(start, (size, size), Border::Black, scratch)?;
        }
        Step::RandomCrop {
            size,
            padding,
            reflect,
        } => {
            // Images that are too small even so get what is missing, on both sides.
            let border = |length: usize| padding + size.saturating_sub(length + 2 * padding);
            let mut start = |length: usize| {
                let border = border(length);
                stream.below(length + 2 * border - size + 1) as isize - border as isize
            };
            let start = (start(seen.0), start(seen.1));
            let border = match reflect {
                true => Border::Reflect,
                false => Border::Black,
            };
            canvas.crop_with_border(start, (size, size), border, scratch)?;
        }
        Step::HorizontalFlip { p } => {
            let flip = match p == 0.5 {
                true => coin,
                false => stream.unit() < p,
            };
            canvas.flip ^= flip;
        }
        Step::ColorJitter {
            brightness,
            contrast,
            saturation,
            hue,
        } => {
            let mut order = [0, 1, 2, 3];
            stream.shuffle(&mut order);
            let mut factor = |x: f64| stream.range((1.0 - x).max(0.0), 1.0 + x);
            let factors = [brightness, contrast, saturation].map(&mut factor);
            let turn = stream.range(-hue, hue);
            let pixels = canvas.pixels(scratch)?;
            for operation in order {
                match operation {
                    0 if brightness > 0.0 => colour::brightness(pixels, factors[0]),
                    1 if contrast > 0.0 => colour::contrast(pixels, factors[1]),
                    2 if saturation > 0.0 => colour::saturation(pixels, factors[2]),
                    3 if hue > 0.0 => colour::hue(pixels, turn),
                    _ => {}
                }
            }
        }
        Step::Lighting { std } => {
            let alphas = [(); 3].map(|()| std * stream.normal());
            colour::add(canvas.pixels(scratch)?, colour::lighting(alphas));
        }
        Step::Brightness { deviation } => {
            let shift = deviation.map(|deviation| deviation * stream.normal());
            colour::add(canvas.pixels(scratch)?, shift);
        }
        Step::BoxCrop { .. }
        | Step::TrimBottom { .. }
        | Step::FiveCrop { .. }
        | Step::TenCrop { .. }
        | Step::Mirror {} => {}
    }
    Ok(())
}

/// Width and height after the short side is brought to `short`.
pub(super) fn resized(
    (width, height): (usize, usize),
    short: usize,
) -> Result<(usize, usize), String> {
    let long = |long: usize, of: usize| short.saturating_mul(long) / of.max(1);
    let to = match width <= height {
        true => (short, long(height, width)),
        false => (long(width, height), short),
    };
    match to.0.checked_mul(to.1) {
        Some(pixels) if pixels <= MAX_PIXELS => Ok(to),
        _ => Err(format!(
            "a short side of {short} makes {}x{} pixels of {width}x{height}",
            to.0, to.1
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Image;
    use crate::transforms::{IMAGENET_MEAN, IMAGENET_STD};

    fn noise(width: usize, height: usize) -> Image {
        let mut stream = Stream::new(5, Purpose::E10, width as u64, height as u64);
        let pixels = (0..width * height * 3).map(|_| stream.below(256) as u8);
        Image {
            width,
            height,
            pixels: pixels.collect(),
        }
    }

    fn run(steps: Vec<Step>, image: &Image, key: Key) -> (usize, usize, Vec<u8>) {
        let pipeline = Pipeline {
            steps,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            exif_orientation: false,
        };
        let source = (&image.pixels[..], image.width, image.height);
        let mut out = Vec::new();
        let mut scratch = Scratch::new();
        let (height, width) = pipeline
            .run_decoded(source, Path::new("x"), None, key, &mut scratch, &mut out)
            .unwrap();
        (height, width, out)
    }

    const KEY: Key = Key {
        seed: 0,
        epoch: 0,
        sample: 0,
    };

    #[test]
    fn random_crop_and_flip_draw_coin_left_and_top() {
        let image = noise(32, 32);
        // Position in the image of a pixel of its bordered version.
        let reflect = |at: usize, padding: usize| match at {
            at if at < padding => padding - at,
            at if at - padding < 32 => at - padding,
            at => 62 - (at - padding),
        };
        for (padding, flips) in [(4, true), (4, false), (0, true), (31, true)] {
            let mut steps = vec![Step::RandomCrop {
                size: 32,
                padding,
                reflect: true,
            }];
            if flips {
                steps.push(Step::HorizontalFlip { p: 0.5 });
            }
            for sample in 0..20 {
                let (seed, epoch) = (sample % 3, sample / 2);
                let mut stream = Stream::new(seed, Purpose::Augment, epoch, sample);
                let flip = stream.coin() && flips;
                let [left, top] = [(); 2].map(|()| stream.below(2 * padding + 1));
                let mut columns: Vec<usize> = (0..32).map(|x| reflect(x + left, padding)).collect();
                if flip {
                    columns.reverse();
                }
                let known = (0..32).flat_map(|y| {
                    let row = reflect(y + top, padding) * 32;
                    let pixel = |x: &usize| image.pixels[(row + x) * 3..][..3].to_vec();
                    columns.iter().flat_map(pixel).collect::<Vec<u8>>()
                });
                let key = Key {
                    seed,
                    epoch,
                    sample,
                };
                let (_, _, found) = run(steps.clone(), &image, key);
                assert!(found == known.collect::<Vec<u8>>(), "{padding} {key:?}");
            }
        }
    }

    #[test]
    fn ten_views_are_five_of_the_image_and_five_of_its_mirror() {
        let image = noise(21, 14);
        let (_, _, ten) = run(vec![Step::TenCrop { size: 9 }], &image, KEY);
        let (_, _, five) = run(vec![Step::FiveCrop { size: 9 }], &image, KEY);
        let flip = Step::HorizontalFlip { p: 1.0 };
        let (_, _, mirrored) = run(vec![flip, Step::FiveCrop { size: 9 }], &image, KEY);
        assert!(ten == [five, mirrored].concat());
    }

    #[test]
    fn flips_before_a_crop_move_it() {
        let image = noise(11, 6);
        let flip = Step::HorizontalFlip { p: 1.0 };
        let crop = Step::CenterCrop { size: 8 };
        // Black above and below, and at the sides the mirrored columns.
        let (_, _, plain) = run(vec![crop], &image, KEY);
        let mirrored = Image {
            pixels: run(vec![flip], &image, KEY).2,
            ..image.clone()
        };
        let (_, _, known) = run(vec![crop], &mirrored, KEY);
        let (_, _, found) = run(vec![flip, crop], &image, KEY);
        assert!(found == known && found != plain);
        assert!(found[..8 * 3].iter().all(|&v| v == 0));
    }

    #[test]
    fn noise_has_the_deviation_that_is_asked_for() {
        let gray = Image {
            width: 1,
            height: 1,
            pixels: vec![128; 3],
        };
        let deviation = [0.1, 0.05, 0.02];
        let shifts: Vec<[f64; 3]> = (0..2000)
            .map(|sample| {
                let key = Key { sample, ..KEY };
                let (_, _, out) = run(vec![Step::Brightness { deviation }], &gray, key);
                std::array::from_fn(|c| (f64::from(out[c]) - 128.0) / 255.0)
            })
            .collect();
        for c in 0..3 {
            let mean = shifts.iter().map(|s| s[c]).sum::<f64>() / 2000.0;
            let square = shifts.iter().map(|s| s[c] * s[c]).sum::<f64>() / 2000.0;
            assert!(mean.abs() < 0.1 * deviation[c], "{mean}");
            assert!((square.sqrt() / deviation[c] - 1.0).abs() < 0.1);
        }
    }
}
