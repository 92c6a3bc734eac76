//! One E10 image: envelopes, components, colours, noise.
//!
//! With `wave(n, f0, f1, t, w)(x, y) = sqrt(2/n) sum cos(2 pi f (x cos a + y sin a) + p)`, `n` terms,
//! `f` in `[f0, f1]`, `a` in `[t - w, t + w]`, `p` in `[0, 2 pi]`, all uniform:
//! - envelopes `e_m = 1 / (1 + exp(-8 wave(6, 1/24, 1/12, 0, pi)))`, m = 0, 1, 2;
//! - components `n_j = wave(6, 0.18, 0.30, o pi/3, pi/18)`, orientation `o = j / 2`, j = 0..5, with
//!   amplitude `a_j = exp(0.5 N(0, 1))`; even j is gray, `v = (1, 1, 1)/sqrt 3`, odd j has
//!   `v = cos(h) (1, -1, 0)/sqrt 2 + sin(h) (1, 1, -2)/sqrt 6`, `h` in `[-0.4, 0.4]` once an image;
//! - pixel `0.5 + c sum_j a_j e_m(j) n_j v_j + b + 0.08 N(0, 1)`, `c = 0.18 exp(U(-0.5, 0.5))`, `b` in
//!   `[-0.1, 0.1]` a channel, clipped to `[0, 1]`, rounded to 8 bits.

use std::f64::consts::{PI, TAU};

use super::{CLASSES, IMAGE_SIDE, Part};
use crate::random::{Purpose, Stream};

const SIZE: [usize; 2] = [IMAGE_SIDE; 2];
const WAVES: usize = 6;

/// The pairs of components that share an envelope, class by class: the first ten of the fifteen
/// perfect matchings of {0, ..., 5} in lexicographic order.
pub const MATCHINGS: [[[usize; 2]; 3]; CLASSES] = [
    [[0, 1], [2, 3], [4, 5]],
    [[0, 1], [2, 4], [3, 5]],
    [[0, 1], [2, 5], [3, 4]],
    [[0, 2], [1, 3], [4, 5]],
    [[0, 2], [1, 4], [3, 5]],
    [[0, 2], [1, 5], [3, 4]],
    [[0, 3], [1, 2], [4, 5]],
    [[0, 3], [1, 4], [2, 5]],
    [[0, 3], [1, 5], [2, 4]],
    [[0, 4], [1, 2], [3, 5]],
];

/// Pixels (HWC, RGB) of image `index` of a class in a part. Panics where `class >= CLASSES`.
#[must_use]
pub fn image(seed: u64, part: Part, class: usize, index: usize) -> Vec<u8> {
    let group = (part as usize * CLASSES + class) as u64;
    let mut stream = Stream::new(seed, Purpose::E10, group, index as u64);

    let contrast = 0.18 * libm::exp(stream.range(-0.5, 0.5));
    let hue = stream.range(-0.4, 0.4);
    let brightness: [f64; 3] = std::array::from_fn(|_| stream.range(-0.1, 0.1));
    let envelopes = envelopes(&mut stream, SIZE);

    let mut canvas = vec![[0.0f64; 3]; IMAGE_SIDE * IMAGE_SIDE];
    for j in 0..6 {
        let amplitude = libm::exp(0.5 * stream.normal());
        let orientation = (j / 2) as f64 * PI / 3.0;
        let component = wave(&mut stream, SIZE, (0.18, 0.30), (orientation, PI / 18.0));
        let envelope = &envelopes[envelope_of(&MATCHINGS[class], j)];
        let values = component.iter().zip(envelope);
        let values = values.map(|(n, e)| contrast * amplitude * e * n);
        add(&mut canvas, values, colour(j, hue));
    }
    bytes(&mut stream, &canvas, brightness)
}

/// Three smooth maps between 0 and 1.
pub(super) fn envelopes(stream: &mut Stream, size: [usize; 2]) -> [Vec<f64>; 3] {
    std::array::from_fn(|_| {
        let mut envelope = wave(stream, size, (1.0 / 24.0, 1.0 / 12.0), (0.0, PI));
        for e in &mut envelope {
            *e = 1.0 / (1.0 + libm::exp(-8.0 * *e));
        }
        envelope
    })
}

/// Which envelope component `j` has.
pub(super) fn envelope_of(matching: &[[usize; 2]; 3], j: usize) -> usize {
    let pair = matching.iter().position(|pair| pair.contains(&j));
    pair.unwrap_or(0)
}

/// Adds values of one colour.
pub(super) fn add(canvas: &mut [[f64; 3]], values: impl Iterator<Item = f64>, colour: [f64; 3]) {
    for (pixel, value) in canvas.iter_mut().zip(values) {
        for (channel, v) in pixel.iter_mut().zip(colour) {
            *channel += value * v;
        }
    }
}

/// With brightness and noise, rounded to 8 bits.
pub(super) fn bytes(stream: &mut Stream, canvas: &[[f64; 3]], brightness: [f64; 3]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(canvas.len() * 3);
    for pixel in canvas {
        for (channel, b) in pixel.iter().zip(brightness) {
            let value = 0.5 + channel + b + 0.08 * stream.normal();
            bytes.push((value.clamp(0.0, 1.0) * 255.0 + 0.5).floor() as u8);
        }
    }
    bytes
}

/// Direction of component `j` in RGB, length 1.
pub(super) fn colour(j: usize, hue: f64) -> [f64; 3] {
    if j.is_multiple_of(2) {
        return [1.0 / 3f64.sqrt(); 3];
    }
    let (red_green, yellow_blue) = (libm::cos(hue) / 2f64.sqrt(), libm::sin(hue) / 6f64.sqrt());
    [
        red_green + yellow_blue,
        yellow_blue - red_green,
        -2.0 * yellow_blue,
    ]
}

/// A sum of plane waves with random frequency, direction and phase, variance 1.
///
/// `cos(a + b)` is taken apart so that a wave costs two tables of sines and cosines instead of one
/// cosine a pixel.
pub(super) fn wave(
    stream: &mut Stream,
    [width, height]: [usize; 2],
    (low, high): (f64, f64),
    (direction, spread): (f64, f64),
) -> Vec<f64> {
    let mut sum = vec![0.0; width * height];
    let mut along = vec![(0.0, 0.0); width];
    for _ in 0..WAVES {
        let frequency = TAU * stream.range(low, high);
        let angle = stream.range(direction - spread, direction + spread);
        let phase = stream.range(0.0, TAU);
        let (kx, ky) = (frequency * libm::cos(angle), frequency * libm::sin(angle));
        for (x, value) in along.iter_mut().enumerate() {
            *value = libm::sincos(kx * x as f64 + phase);
        }
        for (y, row) in sum.chunks_exact_mut(width).enumerate() {
            let (sin_y, cos_y) = libm::sincos(ky * y as f64);
            for (value, (sin_x, cos_x)) in row.iter_mut().zip(&along) {
                *value += cos_x * cos_y - sin_x * sin_y;
            }
        }
    }
    let scale = (2.0 / WAVES as f64).sqrt();
    for value in &mut sum {
        *value *= scale;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matchings_are_the_first_ten() {
        let mut all = Vec::new();
        for a in 1..6 {
            let rest: Vec<usize> = (1..6).filter(|&j| j != a).collect();
            for b in 1..4 {
                let last: Vec<usize> = (1..4).filter(|&i| i != b).map(|i| rest[i]).collect();
                all.push([[0, a], [rest[0], rest[b]], [last[0], last[1]]]);
            }
        }
        assert_eq!(MATCHINGS[..], all[..CLASSES]);
    }

    #[test]
    fn waves_have_variance_one() {
        let mut stream = Stream::new(3, Purpose::E10, 0, 0);
        let mut total = 0.0;
        for _ in 0..200 {
            let values = wave(&mut stream, SIZE, (0.18, 0.30), (0.0, PI / 18.0));
            total += values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        }
        assert!((total / 200.0 - 1.0).abs() < 0.05, "{}", total / 200.0);
    }
}
