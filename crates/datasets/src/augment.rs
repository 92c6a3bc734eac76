//! Random changes to an image that leave its class alone.
//!
//! What happens to an image depends on (seed, epoch, index of the sample) and on nothing else.

use crate::random::{Purpose, Stream};

/// Which random changes are made in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Augment {
    /// Mirror left to right, half of the time.
    pub flip: bool,
    /// Pad by this many pixels on each side (reflected without repeating the border), then cut the
    /// original size out at a random place. 0 is off.
    pub pad_crop: usize,
}

/// The choice made for one image: where each output pixel comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    flip: bool,
    /// Offset of the cut in the padded image, 0..=2*pad.
    left: usize,
    top: usize,
    pad: usize,
}

impl Augment {
    pub(crate) fn choose(self, seed: u64, epoch: usize, index: usize) -> Choice {
        let mut stream = Stream::new(seed, Purpose::Augment, epoch as u64, index as u64);
        // All are drawn whatever is switched on: switching one off does not move the others.
        let flip = stream.coin();
        let places = 2 * self.pad_crop + 1;
        let (left, top) = (stream.below(places), stream.below(places));
        Choice {
            flip: flip && self.flip,
            left,
            top,
            pad: self.pad_crop,
        }
    }
}

impl Choice {
    /// For each output column, the column it comes from.
    pub(crate) fn columns(self, width: usize) -> Vec<usize> {
        let mut columns: Vec<usize> = (0..width)
            .map(|x| reflect(x + self.left, self.pad, width))
            .collect();
        if self.flip {
            columns.reverse();
        }
        columns
    }

    /// For each output row, the row it comes from.
    pub(crate) fn rows(self, height: usize) -> Vec<usize> {
        (0..height)
            .map(|y| reflect(y + self.top, self.pad, height))
            .collect()
    }
}

/// Position in an image of `size` pixels of the pixel `at` of its padded version.
fn reflect(at: usize, pad: usize, size: usize) -> usize {
    if at < pad {
        pad - at
    } else if at - pad < size {
        at - pad
    } else {
        2 * (size - 1) - (at - pad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reflects_without_repeating_the_border() {
        let padded: Vec<usize> = (0..8).map(|at| reflect(at, 2, 4)).collect();
        assert_eq!(padded, [2, 1, 0, 1, 2, 3, 2, 1]);
    }

    #[test]
    fn choices_depend_on_seed_epoch_and_index_only() {
        let augment = Augment {
            flip: true,
            pad_crop: 4,
        };
        assert_eq!(augment.choose(1, 2, 3), augment.choose(1, 2, 3));
        let differs = |f: &dyn Fn(u64) -> Choice| (0..20).any(|i| f(i) != f(0));
        assert!(differs(&|i| augment.choose(i, 2, 3)));
        assert!(differs(&|i| augment.choose(1, i as usize, 3)));
        assert!(differs(&|i| augment.choose(1, 2, i as usize)));
    }

    #[test]
    fn off_is_the_identity() {
        let choice = Augment::default().choose(1, 2, 3);
        assert_eq!(choice.columns(5), [0, 1, 2, 3, 4]);
        assert_eq!(choice.rows(3), [0, 1, 2]);
    }
}
