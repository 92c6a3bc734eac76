//! What a part of a data set is like: classes, sizes, channel statistics.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use crate::random::{Purpose, Stream};
use crate::sample::Sample;
use crate::set::ChannelSums;
use crate::{Error, Result, Skipped};

/// Of a number over many images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub least: usize,
    /// Half of them are smaller.
    pub median: usize,
    /// Largest.
    pub most: usize,
}

impl Spread {
    /// Of some numbers, if there are any.
    #[must_use]
    pub fn of(mut numbers: Vec<usize>) -> Option<Self> {
        numbers.sort_unstable();
        Some(Self {
            least: *numbers.first()?,
            median: numbers[numbers.len() / 2],
            most: *numbers.last()?,
        })
    }
}

/// What the images of one part are like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartStats {
    /// Images in the part.
    pub images: usize,
    /// Images that were decoded for what follows.
    pub decoded: usize,
    /// Columns.
    pub width: Option<Spread>,
    /// Rows.
    pub height: Option<Spread>,
    /// Bytes on disk.
    pub bytes: Option<Spread>,
    /// Mean of each channel over all pixels as they lie on disk, scaled to 0..1.
    pub mean: Option<[f32; 3]>,
    /// Standard deviation of each channel (divisor n), scaled to 0..1.
    pub std: Option<[f32; 3]>,
    /// Images that could not be decoded.
    pub broken: Vec<Skipped>,
}

/// How many images of each class there are.
#[must_use]
pub fn class_histogram(samples: &[Sample], classes: usize) -> Vec<usize> {
    let mut counts = vec![0; classes];
    for sample in samples {
        if let Some(count) = counts.get_mut(sample.label as usize) {
            *count += 1;
        }
    }
    counts
}

/// Decodes the images of a part, all of them or `limit` chosen with `seed`, and looks at them.
/// `progress` is told how many are done, from several threads.
///
/// # Errors
/// [`Error::Config`] where there are no images. Broken ones are listed in the result.
pub fn part_stats(
    samples: &[Sample],
    limit: Option<usize>,
    seed: u64,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<PartStats> {
    if samples.is_empty() {
        return Err(Error::Config("a set without images".to_owned()));
    }
    let mut chosen: Vec<u32> = (0..samples.len() as u32).collect();
    if let Some(limit) = limit.filter(|&limit| limit < samples.len()) {
        Stream::new(seed, Purpose::Stats, 0, 0).shuffle(&mut chosen);
        chosen.truncate(limit);
        chosen.sort_unstable();
    }
    let done = AtomicUsize::new(0);
    let look = |&index: &u32| {
        let sample = &samples[index as usize];
        let mut bytes = Vec::new();
        let image = sample
            .read(&mut bytes)
            .and_then(|()| crate::decode(&bytes, &sample.path()));
        progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        match image {
            Ok(image) => Ok((
                (image.width, image.height, bytes.len()),
                ChannelSums::of(&image.pixels),
            )),
            Err(error) => Err(Skipped {
                name: sample.name.to_string(),
                problem: error.to_string(),
            }),
        }
    };
    let looked: Vec<_> = chosen.par_iter().map(look).collect();
    let mut sums = ChannelSums::default();
    let (mut sizes, mut broken) = (Vec::new(), Vec::new());
    for found in looked {
        match found {
            Ok((size, image)) => {
                sums = sums.plus(image);
                sizes.push(size);
            }
            Err(image) => broken.push(image),
        }
    }
    let stats = (!sizes.is_empty()).then(|| sums.stats());
    let spread =
        |of: fn(&(usize, usize, usize)) -> usize| Spread::of(sizes.iter().map(of).collect());
    Ok(PartStats {
        images: samples.len(),
        decoded: sizes.len(),
        width: spread(|size| size.0),
        height: spread(|size| size.1),
        bytes: spread(|size| size.2),
        mean: stats.map(|s| s.mean),
        std: stats.map(|s| s.std),
        broken,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Root;

    #[test]
    fn spread_of_few_and_many() {
        assert_eq!(Spread::of(vec![]), None);
        let spread = Spread::of(vec![5, 1, 3]).unwrap();
        assert_eq!((spread.least, spread.median, spread.most), (1, 3, 5));
    }

    #[test]
    fn broken_images_are_listed_and_a_part_can_be_looked_at() {
        let home = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 2, 3);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[0, 255, 0, 255, 0, 255]).unwrap();
        writer.finish().unwrap();
        let root = Root::new(home.path());
        let samples: Vec<Sample> = (0..5)
            .map(|i| {
                let name = format!("{i}.png");
                let content = if i == 3 { &b"no image"[..] } else { &bytes };
                std::fs::write(home.path().join(&name), content).unwrap();
                Sample::file(&root, name, i % 2)
            })
            .collect();
        assert_eq!(class_histogram(&samples, 3), [3, 2, 0]);
        let stats = part_stats(&samples, None, 0, &|_| {}).unwrap();
        assert_eq!((stats.images, stats.decoded), (5, 4));
        assert_eq!(stats.broken[0].name, "3.png");
        assert_eq!(
            (stats.width.unwrap().most, stats.height.unwrap().least),
            (2, 3)
        );
        assert_eq!((stats.mean, stats.std), (Some([0.5; 3]), Some([0.5; 3])));
        let few = part_stats(&samples, Some(2), 1, &|_| {}).unwrap();
        assert_eq!(few.decoded + few.broken.len(), 2);
        assert!(part_stats(&[], None, 0, &|_| {}).is_err());
    }
}
