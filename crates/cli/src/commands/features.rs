//! `isqrt features`: representations and logits of images in a file.

use super::device::DeviceArg;
use super::weights::{ImageArgs, WeightsArgs, differ};
use crate::output;
use clap::Args;
use isqrt_datasets::{Broken, list_images};
use isqrt_train::run::weights_file;
use isqrt_train::{FeatureFile, Prediction, predict};
use std::path::PathBuf;
use std::time::Instant;

/// Write representations and logits of images
///
/// The file is safetensors, rows in the order of the images: `representation` (images x length, what
/// the classifier sees), `logits` (images x classes), both f32, and `images`, the paths in UTF-8, one
/// a line, as bytes. It is written row by row, so that memory does not grow with the images, and
/// appears when it is whole.
#[derive(Args)]
#[command(after_help = "Example:
  isqrt features --weights r50.safetensors --images photos --out photos.safetensors")]
pub struct Features {
    /// File with the weights, our own or any that `isqrt convert` reads, or the folder of a run
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    #[command(flatten)]
    model: WeightsArgs,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Features {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.out.extension().is_some_and(|e| e == "safetensors"),
            "{}: the file is safetensors, so name it .safetensors",
            self.out.display()
        );
        let weights = weights_file(&self.weights)?;
        differ(&weights, &self.out)?;
        differ(&self.images.images, &self.out)?;
        let images = list_images(&self.images.images)?;
        let loaded = self.model.load_on(&weights, &self.device.open()?)?;
        let network = &loaded.network;
        let pipeline = self.images.pipeline(&loaded, &weights)?;
        let sizes = (network.out_dim(), network.spec().classes);
        let start = Instant::now();
        let mut file = FeatureFile::create(&self.out, &images, sizes)?;
        let batch = usize::from(self.images.batch);
        let write = |batch: Prediction| anyhow::Ok(file.write(&batch)?);
        predict(network, &pipeline, &images, batch, Broken::Fail, write)?;
        file.finish()?;
        let seconds = start.elapsed().as_secs_f64();
        if json {
            return output::json(&serde_json::json!({
                "out": self.out,
                "model": network.spec().short_name(),
                "images": images.len(),
                "representation": sizes.0,
                "classes": sizes.1,
                "seconds": seconds,
            }));
        }
        output::line(&format!(
            "wrote {}: {} images, {} values and {} logits each ({}, {} images/s)",
            self.out.display(),
            images.len(),
            sizes.0,
            sizes.1,
            network.spec().short_name(),
            output::show(images.len() as f64 / seconds)
        ))
    }
}
