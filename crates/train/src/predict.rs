//! What a network makes of images: representations and logits, batch by batch.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{Broken, Loader, LoaderConfig, Pipeline, Root, Sample, Skipped};
use isqrt_models::Network;
use isqrt_models::checkpoint::Record;
use isqrt_nn::Mode;
use serde::Deserialize;

use crate::evaluate::mean_of_views;
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
/// Images are decoded in parallel, a batch at a time, so that memory does not grow with their number. What
/// comes of several views of an image is averaged; a batch is of so many views.
///
/// Gives the images that were left out, which `broken` may allow.
///
/// # Errors
/// Of the first image that cannot be read and must not be left out, with its path; of the network where
/// images do not fit; whatever `each` returns.
pub fn predict<E: From<Error>>(
    network: &Network,
    pipeline: &Pipeline,
    images: &[PathBuf],
    batch: usize,
    broken: Broken,
    mut each: impl FnMut(Prediction) -> std::result::Result<(), E>,
) -> std::result::Result<Vec<Skipped>, E> {
    let loader = loader(pipeline, images, batch, broken)?;
    let feeder = Feeder::new(&loader, network)?;
    for batch in loader.epoch(0).map_err(Error::from)? {
        let batch = batch.map_err(Error::from)?;
        if batch.is_empty() {
            continue;
        }
        let run = || -> Result<Prediction> {
            let representation = network.represent(&feeder.images(&batch)?, Mode::Eval)?;
            let logits = network.classify(&representation, Mode::Eval)?;
            let plain = |x: Tensor| -> Result<Tensor> {
                let x = mean_of_views(&x.detach(), batch.views)?.to_dtype(DType::F32)?;
                Ok(x.to_device(&Device::Cpu)?)
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

/// The pipeline that a checkpoint tells; none where it tells none.
///
/// # Errors
/// [`Error::File`] where it cannot be used.
pub fn told_pipeline(record: &Record, path: &Path) -> Result<Option<Pipeline>> {
    let Some(told) = &record.pipeline else {
        return Ok(None);
    };
    let failed = |problem: String| Error::File {
        path: path.to_owned(),
        message: format!("tells a pipeline that is none: {problem}"),
    };
    let pipeline = Pipeline::deserialize(told).map_err(|error| failed(error.to_string()))?;
    pipeline
        .check()
        .map_err(|error| failed(error.to_string()))?;
    Ok(Some(pipeline))
}

/// Whether the network of a checkpoint knows means of its own that the file does not tell: of runs before
/// checkpoints told their pipeline.
#[must_use]
pub fn lacks_means(record: &Record) -> bool {
    let of_training = |training: &serde_json::Value| training["data"]["normalise"] == "train";
    let tells = record.pipeline.is_some() || record.preprocessing.is_some();
    !tells && record.training.as_ref().is_some_and(of_training)
}

/// Images in order, through the pipeline.
fn loader(pipeline: &Pipeline, images: &[PathBuf], batch: usize, broken: Broken) -> Result<Loader> {
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
        pipeline.clone(),
        LoaderConfig {
            broken,
            ..LoaderConfig::eval((batch / pipeline.views()).max(1))
        },
    )?)
}
