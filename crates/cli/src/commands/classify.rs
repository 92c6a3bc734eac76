//! `isqrt classify`: the most probable classes of images.

use super::device::DeviceArg;
use super::weights::{ImageArgs, WeightsArgs};
use crate::output;
use anyhow::Context;
use clap::Args;
use isqrt_datasets::list_images;
use isqrt_train::predict;
use std::path::PathBuf;

/// Print the most probable classes of images
#[derive(Args)]
#[command(after_help = "Example:
  isqrt classify --weights resnet50.safetensors --images photos --labels synset_words.txt")]
pub struct Classify {
    /// File with the weights: our own, or any that `isqrt convert` reads
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    #[command(flatten)]
    model: WeightsArgs,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Names of the classes, one a line
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Classes to print
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
}

impl Classify {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let images = list_images(&self.images.images)?;
        let loaded = self.model.load_on(&self.weights, &self.device.open()?)?;
        let names = self.names(loaded.network.spec().classes)?;
        let preprocessing = self.images.preprocessing(&loaded)?;
        let batch = usize::from(self.images.batch);
        predict::<anyhow::Error>(&loaded.network, &preprocessing, &images, batch, |batch| {
            let logits = batch.logits.to_vec2::<f32>()?;
            for (path, logits) in images[batch.first..].iter().zip(&logits) {
                anyhow::ensure!(
                    logits.iter().all(|x| x.is_finite()),
                    "{}: the network's output is not finite",
                    path.display()
                );
                let top = top(logits, usize::from(self.top));
                if json {
                    let top: Vec<_> = top
                        .iter()
                        .map(|&(class, probability)| {
                            let name = names.as_ref().map(|names| &names[class]);
                            serde_json::json!({"class": class, "name": name, "probability": probability})
                        })
                        .collect();
                    output::json(&serde_json::json!({ "image": path, "top": top }))?;
                    continue;
                }
                output::line(&path.display().to_string())?;
                for (class, probability) in top {
                    let name = names.as_ref().map_or("", |names| &names[class]);
                    let line = format!("  {:5.1} %  {class:>5}  {name}", 100.0 * probability);
                    output::line(line.trim_end())?;
                }
            }
            Ok(())
        })
    }

    /// As many names as there are classes, if there is a file of them.
    fn names(&self, classes: usize) -> anyhow::Result<Option<Vec<String>>> {
        let Some(path) = &self.labels else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        let names: Vec<String> = text.lines().map(str::to_owned).collect();
        anyhow::ensure!(
            names.len() == classes,
            "{} has {} lines, the network {classes} classes",
            path.display(),
            names.len()
        );
        Ok(Some(names))
    }
}

/// The largest logits' classes with their probabilities, the most probable first.
fn top(logits: &[f32], count: usize) -> Vec<(usize, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&x| f64::from(x - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut all: Vec<(usize, f64)> = weights.into_iter().map(|w| w / total).enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all.truncate(count);
    all
}
