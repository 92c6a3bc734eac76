//! Some images with their labels.

use rayon::prelude::*;

/// Some images with their labels: bytes, until [`Batch::normalised`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// An entry an image: `(views, height, width, 3)` bytes, RGB.
    pub images: Vec<Vec<u8>>,
    /// One class index an image.
    pub labels: Vec<u32>,
    /// Index of each image in its set.
    pub indices: Vec<u32>,
    /// Pictures made of each image: 1, or 2 with its mirror, or 10 crops.
    pub views: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Batch {
    pub(super) fn new(views: usize) -> Self {
        Self {
            images: Vec::new(),
            labels: Vec::new(),
            indices: Vec::new(),
            views,
            height: 0,
            width: 0,
        }
    }

    /// Adds an image, or says which size (rows, columns) the others have.
    pub(super) fn push(
        &mut self,
        pixels: Vec<u8>,
        (height, width): (usize, usize),
        label: u32,
        index: u32,
    ) -> Result<(), (usize, usize)> {
        if self.images.is_empty() {
            (self.height, self.width) = (height, width);
        } else if (height, width) != (self.height, self.width) {
            return Err((self.height, self.width));
        }
        self.images.push(pixels);
        self.labels.push(label);
        self.indices.push(index);
        Ok(())
    }

    /// Number of images.
    #[must_use]
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there are none: the last step of a rank with fewer images than ranks, or all broken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// `(images * views, 3, height, width)`, normalised by `levels` (a table a channel), in one pass over
    /// the bytes, in parallel over images.
    #[must_use]
    pub fn normalised(&self, levels: &[[f32; 256]; 3]) -> Vec<f32> {
        let plane = self.height * self.width;
        let mut out = vec![0.0; self.images.len() * self.views * 3 * plane];
        if plane == 0 {
            return out;
        }
        let images = self.images.par_iter();
        let targets = out.par_chunks_exact_mut(self.views * 3 * plane);
        targets.zip(images).for_each(|(target, image)| {
            let views = target.chunks_exact_mut(3 * plane);
            for (target, view) in views.zip(image.chunks_exact(3 * plane)) {
                let (red, rest) = target.split_at_mut(plane);
                let (green, blue) = rest.split_at_mut(plane);
                let [reds, greens, blues] = levels;
                let targets = red.iter_mut().zip(green).zip(blue);
                for (((r, g), b), pixel) in targets.zip(view.chunks_exact(3)) {
                    *r = reds[usize::from(pixel[0])];
                    *g = greens[usize::from(pixel[1])];
                    *b = blues[usize::from(pixel[2])];
                }
            }
        });
        out
    }
}

/// The normalised value of each value of each channel, `(v/255 - mean) / std`; a deviation of 0, which
/// constant images have, leaves the scale alone.
#[must_use]
pub fn levels(mean: [f32; 3], std: [f32; 3]) -> [[f32; 256]; 3] {
    let level = |c: usize, v: usize| {
        let std = std[c];
        (v as f32 / 255.0 - mean[c]) / if std == 0.0 { 1.0 } else { std }
    };
    std::array::from_fn(|c| std::array::from_fn(|v| level(c, v)))
}
