//! Changes of colour in 8 bits (HWC, RGB), as Pillow makes them.

/// Pillow's `Image.blend`: `factor` of the pixel and the rest of another value, cut down to a whole
/// number.
fn blend(other: u8, pixel: u8, factor: f32) -> u8 {
    let (other, pixel) = (i32::from(other), i32::from(pixel));
    // Casts to u8 cut at 0 and 255.
    (other as f32 + factor * (pixel - other) as f32) as u8
}

/// Pillow's gray: ITU-R 601 in 16 bits.
fn luma(pixel: [u8; 3]) -> u8 {
    let [r, g, b] = pixel.map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

pub(super) fn brightness(pixels: &mut [u8], factor: f64) {
    let table: [u8; 256] = std::array::from_fn(|v| blend(0, v as u8, factor as f32));
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}

pub(super) fn contrast(pixels: &mut [u8], factor: f64) {
    let (whole, _) = pixels.as_chunks::<3>();
    let sum: u64 = whole.iter().map(|&p| u64::from(luma(p))).sum();
    let mean = (sum as f64 / whole.len().max(1) as f64 + 0.5) as u8;
    let table: [u8; 256] = std::array::from_fn(|v| blend(mean, v as u8, factor as f32));
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}

pub(super) fn saturation(pixels: &mut [u8], factor: f64) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let gray = luma(*pixel);
        *pixel = pixel.map(|value| blend(gray, value, factor as f32));
    }
}

/// Turns the hue by `turn` of a full circle, through Pillow's HSV of 8 bits.
pub(super) fn hue(pixels: &mut [u8], turn: f64) {
    let shift = (turn * 255.0) as i32 as u8;
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let [h, s, v] = to_hsv(*pixel);
        *pixel = from_hsv([h.wrapping_add(shift), s, v]);
    }
}

fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let away = |value: u8| f32::from(most - value) / range;
    let sixths = if r == most {
        away(b) - away(g)
    } else if g == most {
        (2.0 + f64::from(away(r)) - f64::from(away(b))) as f32
    } else {
        (4.0 + f64::from(away(g)) - f64::from(away(r))) as f32
    };
    let turn = libm::fmod(f64::from(sixths) / 6.0 + 1.0, 1.0) as f32;
    let saturation = range / f32::from(most);
    [
        (f64::from(turn) * 255.0) as u8,
        (f64::from(saturation) * 255.0) as u8,
        most,
    ]
}

fn from_hsv([h, s, v]: [u8; 3]) -> [u8; 3] {
    if s == 0 {
        return [v; 3];
    }
    let sixths = f64::from(h) * 6.0 / 255.0;
    let sector = sixths.floor();
    let rest = f64::from((sixths - sector) as f32);
    let saturation = f64::from((f64::from(s) / 255.0) as f32);
    let level = |less: f64| (f64::from(v) * (1.0 - less)).round() as u8;
    let low = level(saturation);
    let falling = level(saturation * rest);
    let rising = level(saturation * (1.0 - rest));
    match sector as u32 % 6 {
        0 => [v, rising, low],
        1 => [falling, v, low],
        2 => [low, v, rising],
        3 => [low, falling, v],
        4 => [rising, low, v],
        _ => [v, low, falling],
    }
}

/// Principal components of ImageNet's colours, pixels scaled to 0..1: eigenvalues, and eigenvectors in
/// columns. From facebook/fb.resnet.torch, `datasets/imagenet.lua`.
const EIGENVALUES: [f64; 3] = [0.2175, 0.0188, 0.0045];
const EIGENVECTORS: [[f64; 3]; 3] = [
    [-0.5675, 0.7192, 0.4009],
    [-0.5808, -0.0045, -0.8140],
    [-0.5836, -0.6948, 0.4203],
];

/// What AlexNet's noise adds to red, green and blue, for one number a component.
pub(super) fn lighting(alphas: [f64; 3]) -> [f64; 3] {
    EIGENVECTORS.map(|row| (0..3).map(|c| row[c] * alphas[c] * EIGENVALUES[c]).sum())
}

/// Adds to each channel (pixels scaled to 0..1).
pub(super) fn add(pixels: &mut [u8], shift: [f64; 3]) {
    let tables = shift.map(|shift| -> [u8; 256] {
        std::array::from_fn(|v| (v as f64 + shift * 255.0).round() as u8)
    });
    for pixel in pixels.as_chunks_mut::<3>().0 {
        for (value, table) in pixel.iter_mut().zip(&tables) {
            *value = table[usize::from(*value)];
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use safetensors::SafeTensors;

    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/transforms.safetensors");

    /// torchvision on Pillow images, factor by factor (tools/golden/transforms.py).
    #[test]
    fn as_pillow_does() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        let image = golden.tensor("image.small").unwrap();
        let mut cases = 0;
        for (name, expected) in golden.iter() {
            let Some(name) = name.strip_prefix("colour.") else {
                continue;
            };
            let (operation, factor) = name.split_once('.').unwrap();
            let apply = match operation {
                "brightness" => brightness,
                "contrast" => contrast,
                "saturation" => saturation,
                "hue" => hue,
                other => panic!("{other}"),
            };
            let mut pixels = image.data().to_vec();
            apply(&mut pixels, factor.parse().unwrap());
            assert!(pixels == expected.data(), "{name}");
            cases += 1;
        }
        assert_eq!(cases, 17);
    }

    #[test]
    fn lights_as_alexnet_does() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        let image = golden.tensor("image.small").unwrap();
        for (name, alphas) in [
            ("lighting.0", [0.1, -0.2, 0.05]),
            ("lighting.1", [-0.3, 0.1, 0.2]),
        ] {
            let mut pixels = image.data().to_vec();
            add(&mut pixels, lighting(alphas));
            assert!(pixels == golden.tensor(name).unwrap().data(), "{name}");
        }
    }

    #[test]
    fn hue_survives_the_way_to_hsv_and_back() {
        for value in [0, 1, 77, 254, 255] {
            assert_eq!(from_hsv(to_hsv([value; 3])), [value; 3]);
        }
        for pure in [[255, 0, 0], [0, 255, 0], [0, 0, 255]] {
            assert_eq!(from_hsv(to_hsv(pure)), pure);
        }
    }
}
