//! What a network makes of images: representations and logits, batch by batch.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{Broken, Loader, LoaderConfig, Pipeline, Root, Sample, Skipped};
use isqrt_models::Network;
use isqrt_models::checkpoint::Preprocessing;
use isqrt_nn::Mode;

use crate::feeder::Feeder;
use crate::{Error, Result};

/// Of one batch of images.
#[derive(Debug)]
pub struct Prediction {
    /// Places of its images among all.
    pub indices: Vec<u32>,
    /// `(batch, out_dim)`: what the classifier sees, in f32 on the CPU.
    pub representation: Tensor,
    /// `(batch, classes)`, the same.
    pub logits: Tensor,
}

/// Runs a network in evaluation over images and hands each batch to `each`, in order.
///
/// Images are decoded in parallel, a batch at a time, so that memory does not grow with their number.
///
/// Gives the images that were left out, which `broken` may allow.
///
/// # Errors
/// Of the first image that cannot be read and must not be left out, with its path; of the network where
/// images do not fit; whatever `each` returns.
pub fn predict<E: From<Error>>(
    network: &Network,
    preprocessing: &Preprocessing,
    images: &[PathBuf],
    batch: usize,
    broken: Broken,
    mut each: impl FnMut(Prediction) -> std::result::Result<(), E>,
) -> std::result::Result<Vec<Skipped>, E> {
    let loader = loader(preprocessing, images, batch, broken)?;
    let feeder = Feeder::new(&loader, network)?;
    for batch in loader.epoch(0).map_err(Error::from)? {
        let batch = batch.map_err(Error::from)?;
        if batch.is_empty() {
            continue;
        }
        let run = || -> Result<Prediction> {
            let representation = network.represent(&feeder.images(&batch)?, Mode::Eval)?;
            let logits = network.classify(&representation, Mode::Eval)?;
            let plain = |x: Tensor| {
                let x = x.detach().to_dtype(DType::F32)?;
                x.to_device(&Device::Cpu)
            };
            Ok(Prediction {
                indices: batch.indices.clone(),
                representation: plain(representation)?,
                logits: plain(logits)?,
            })
        };
        each(run()?)?;
    }
    Ok(loader.skipped())
}

/// Images `(batch, 3, crop, crop)`, normalised, in order.
fn loader(
    preprocessing: &Preprocessing,
    images: &[PathBuf],
    batch: usize,
    broken: Broken,
) -> Result<Loader> {
    let &Preprocessing {
        resize,
        crop,
        mean,
        std,
    } = preprocessing;
    if crop > resize {
        // It would get a black border, which no network was evaluated with.
        return Err(Error::Config {
            what: "crop",
            value: crop.to_string(),
            expected: format!("at most {resize}, the short side that images are resized to"),
        });
    }
    let pipeline = Pipeline::evaluation(resize, crop).normalising(mean, std);
    let here = Root::new(Path::new(""));
    let sample = |path: &PathBuf| match path.to_str() {
        Some(name) => Ok(Sample::file(&here, name, 0)),
        None => Err(Error::File {
            path: path.clone(),
            message: "its name is not in UTF-8".to_owned(),
        }),
    };
    let samples: Vec<Sample> = images.iter().map(sample).collect::<Result<_>>()?;
    Ok(Loader::new(
        samples,
        pipeline,
        LoaderConfig {
            broken,
            ..LoaderConfig::eval(batch.max(1))
        },
    )?)
}
