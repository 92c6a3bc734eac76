//! What a network makes of images: representations and logits, batch by batch.

use std::path::PathBuf;

use candle_core::Tensor;
use isqrt_datasets::{Image, Resize, levels, open_image};
use isqrt_models::Network;
use isqrt_models::checkpoint::Preprocessing;
use isqrt_nn::Mode;
use rayon::prelude::*;

use crate::{Error, Result};

/// Of one batch of images.
#[derive(Debug)]
pub struct Prediction {
    /// Place of its first image among all.
    pub first: usize,
    /// `(batch, out_dim)`: what the classifier sees, in f32.
    pub representation: Tensor,
    /// `(batch, classes)`, in f32.
    pub logits: Tensor,
}

/// Runs a network in evaluation over images and hands each batch to `each`, in order.
///
/// Images are decoded in parallel, a batch at a time, so that memory does not grow with their number.
///
/// # Errors
/// Of the first image that cannot be read, with its path; of the network where images do not fit;
/// whatever `each` returns.
pub fn predict<E: From<Error>>(
    network: &Network,
    preprocessing: &Preprocessing,
    images: &[PathBuf],
    batch: usize,
    mut each: impl FnMut(Prediction) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut first = 0;
    for paths in images.chunks(batch.max(1)) {
        let x = load(preprocessing, paths)?;
        let run = || -> Result<Prediction> {
            let vars = network.vars();
            let x = x.to_device(vars.device())?.to_dtype(vars.dtype())?;
            let representation = network.represent(&x, Mode::Eval)?;
            let logits = network.classify(&representation, Mode::Eval)?;
            let plain = |x: Tensor| x.detach().to_dtype(candle_core::DType::F32);
            Ok(Prediction {
                first,
                representation: plain(representation)?,
                logits: plain(logits)?,
            })
        };
        each(run()?)?;
        first += paths.len();
    }
    Ok(())
}

/// Images `(batch, 3, crop, crop)`, normalised.
fn load(preprocessing: &Preprocessing, paths: &[PathBuf]) -> Result<Tensor> {
    let &Preprocessing {
        resize: short,
        crop,
        mean,
        std,
    } = preprocessing;
    let resize = Resize::Evaluation { short, crop };
    let images: Vec<isqrt_datasets::Result<Image>> = paths
        .par_iter()
        .map(|path| open_image(path, resize))
        .collect();
    // The first bad image in order is the one that is told of.
    let images = images
        .into_iter()
        .collect::<isqrt_datasets::Result<Vec<_>>>()?;
    let (plane, levels) = (crop * crop, levels(mean, std));
    let mut values = vec![0.0_f32; images.len() * 3 * plane];
    let rows = values.par_chunks_exact_mut(3 * plane);
    rows.zip(&images).for_each(|(values, image)| {
        for (at, pixel) in image.pixels.chunks_exact(3).enumerate() {
            for c in 0..3 {
                values[c * plane + at] = levels[c][usize::from(pixel[c])];
            }
        }
    });
    let shape = (images.len(), 3, crop, crop);
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
}
