//! Materials: textures of the kind of E10 whose classes differ in the strengths of components too, under
//! a background with the spectrum of natural images.
//!
//! As in E10 six oriented, coloured components under three envelopes, those of a pair under the same one;
//! here
//! - a class has a matching and a pattern: three of the components are stronger by `e^s`, three weaker,
//!   so that average pooling tells some classes from others and covariances tell all;
//! - orientations are turned and frequencies scaled by the family, so that a family's classes are none of
//!   another's;
//! - a background of four octaves of plane waves in random directions, each in a random colour, amplitude
//!   halved from one to the next finer, with a strength `c exp(0.7 N(0, 1))` of its own an image: energy
//!   that says nothing about the class and falls with the frequency, as in photographs.

use std::f64::consts::PI;

use super::Part;
use super::texture::{add, bytes, colour, envelope_of, envelopes, wave};
use crate::random::{Purpose, Stream};

/// A kind of materials.
#[derive(Debug)]
pub(crate) struct Family {
    /// Part of the key of each image's random numbers.
    pub(crate) number: u64,
    /// Frequencies of the components, cycles a pixel.
    pub(crate) band: (f64, f64),
    /// Direction of the first component.
    pub(crate) turn: f64,
    /// Strength of the background.
    pub(crate) background: f64,
    /// Logarithm of the strength of strong components.
    pub(crate) separation: f64,
    /// The first class's place among the fifteen matchings.
    pub(crate) first: usize,
    /// Classes that share a pattern.
    pub(crate) per_pattern: usize,
}

/// Most classes that a family has: patterns times classes of a pattern, and matchings.
pub(crate) const MOST_CLASSES: usize = 15;

/// Which components are strong: any two patterns differ in at least two.
const PATTERNS: [[bool; 6]; 5] = [
    [true, true, true, false, false, false],
    [true, false, false, true, true, false],
    [false, true, false, true, false, true],
    [false, false, true, false, true, true],
    [true, false, true, true, false, false],
];

/// Pixels (HWC, RGB) of image `index` of a class in a part.
pub(crate) fn image(
    family: &Family,
    (seed, part): (u64, Part),
    class: usize,
    index: usize,
    size: [usize; 2],
) -> Vec<u8> {
    let group = (family.number << 16) | ((part as u64) << 8) | class as u64;
    let mut stream = Stream::new(seed, Purpose::Material, group, index as u64);
    let contrast = 0.18 * libm::exp(stream.range(-0.5, 0.5));
    let hue = stream.range(-0.4, 0.4);
    let brightness: [f64; 3] = std::array::from_fn(|_| stream.range(-0.1, 0.1));
    let envelopes = envelopes(&mut stream, size);
    let matching = matching(family, class);
    let pattern = PATTERNS[(class / family.per_pattern) % PATTERNS.len()];

    let mut canvas = vec![[0.0f64; 3]; size[0] * size[1]];
    for (j, strong) in pattern.into_iter().enumerate() {
        let strength = if strong { 1.0 } else { -1.0 } * family.separation;
        let amplitude = libm::exp(strength + 0.4 * stream.normal());
        let orientation = family.turn + (j / 2) as f64 * PI / 3.0;
        let component = wave(&mut stream, size, family.band, (orientation, PI / 18.0));
        let envelope = &envelopes[envelope_of(&matching, j)];
        let values = component.iter().zip(envelope);
        let values = values.map(|(n, e)| contrast * amplitude * e * n);
        add(&mut canvas, values, colour(j, hue));
    }
    let octaves: [(Vec<f64>, [f64; 3]); 4] = std::array::from_fn(|octave| {
        let fine = 0.32 / f64::from(1 << octave);
        let waves = wave(&mut stream, size, (fine / 2.0, fine), (0.0, PI));
        (waves, direction(&mut stream))
    });
    let strength = family.background * libm::exp(0.7 * stream.normal());
    for (octave, (waves, colour)) in octaves.iter().enumerate() {
        let scale = strength / f64::from(8 >> octave);
        add(&mut canvas, waves.iter().map(|w| scale * w), *colour);
    }
    bytes(&mut stream, &canvas, brightness)
}

/// A random direction in RGB.
fn direction(stream: &mut Stream) -> [f64; 3] {
    let v: [f64; 3] = std::array::from_fn(|_| stream.normal());
    let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-9);
    v.map(|x| x / norm)
}

/// The perfect matching of a class: every fourth of the fifteen, so that those of one pattern differ much.
fn matching(family: &Family, class: usize) -> [[usize; 2]; 3] {
    perfect_matching((family.first + 4 * class) % 15)
}

/// The perfect matchings of {0, ..., 5} in lexicographic order, of which E10 has the first ten.
pub(super) fn perfect_matching(place: usize) -> [[usize; 2]; 3] {
    let partner = 1 + place / 3;
    let rest: Vec<usize> = (1..6).filter(|&j| j != partner).collect();
    let second = 1 + place % 3;
    let last: Vec<usize> = (1..4).filter(|&i| i != second).map(|i| rest[i]).collect();
    [[0, partner], [rest[0], rest[second]], [last[0], last[1]]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const FAMILY: Family = Family {
        number: 99,
        band: (0.18, 0.30),
        turn: 0.0,
        background: 0.15,
        separation: 0.5,
        first: 2,
        per_pattern: 3,
    };

    #[test]
    fn the_first_ten_are_those_of_e10() {
        let first: Vec<_> = (0..10).map(perfect_matching).collect();
        assert_eq!(first, crate::e10::MATCHINGS);
    }

    #[test]
    fn classes_have_matchings_of_their_own() {
        let all: BTreeSet<_> = (0..MOST_CLASSES).map(|c| matching(&FAMILY, c)).collect();
        assert_eq!(all.len(), MOST_CLASSES);
        for pairs in all {
            let components: BTreeSet<usize> = pairs.into_iter().flatten().collect();
            assert_eq!(components.len(), 6, "{pairs:?}");
        }
    }

    #[test]
    fn images_of_any_size_depend_on_all_of_the_key() {
        let size = [20, 12];
        let first = image(&FAMILY, (1, Part::Train), 0, 0, size);
        assert_eq!(first.len(), 20 * 12 * 3);
        assert_eq!(first, image(&FAMILY, (1, Part::Train), 0, 0, size));
        for other in [
            image(&FAMILY, (2, Part::Train), 0, 0, size),
            image(&FAMILY, (1, Part::Val), 0, 0, size),
            image(&FAMILY, (1, Part::Train), 1, 0, size),
            image(&FAMILY, (1, Part::Train), 0, 1, size),
        ] {
            assert_ne!(first, other);
        }
    }
}
