//! `isqrt classify`: the most probable classes of images.

use super::device::DeviceArg;
use super::weights::{ImageArgs, Loaded, WeightsArgs};
use crate::output;
use crate::progress::say;
use anyhow::Context;
use clap::Args;
use isqrt_datasets::{Broken, Skipped, list_images};
use isqrt_train::run::weights_file;
use isqrt_train::{Prediction, predict};
use std::path::PathBuf;

/// Print the most probable classes of images
///
/// An image that cannot be decoded is told of at the end, and the exit is then not zero.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt classify --weights runs/folder-isqrt --images photos
  isqrt classify --weights resnet50.safetensors --images photos --labels synset_words.txt")]
pub struct Classify {
    /// File with the weights, our own or any that `isqrt convert` reads, or the folder of a run
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    #[command(flatten)]
    model: WeightsArgs,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Names of the classes, one a line [default: those that the file of weights tells]
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Classes to print
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
}

impl Classify {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let images = list_images(&self.images.images)?;
        let weights = weights_file(&self.weights)?;
        let loaded = self.model.load_on(&weights, &self.device.open()?)?;
        let names = self.names(&loaded)?;
        let pipeline = self.images.pipeline(&loaded, &weights)?;
        let batch = usize::from(self.images.batch);
        let broken = Broken::Skip { most: 1.0 };
        let classify = |batch: Prediction| {
            let logits = batch.logits.to_vec2::<f32>()?;
            for (&index, logits) in batch.indices.iter().zip(&logits) {
                let path = &images[index as usize];
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
            anyhow::Ok(())
        };
        let network = &loaded.network;
        let left_out = predict(network, &pipeline, &images, batch, broken, classify)?;
        for Skipped { name, problem } in &left_out {
            if json {
                output::json(&serde_json::json!({ "image": name, "error": problem }))?;
            }
            say(problem);
        }
        anyhow::ensure!(
            left_out.is_empty(),
            "{} of {} images could not be decoded",
            left_out.len(),
            images.len()
        );
        Ok(())
    }

    /// As many names as there are classes, if there is a file of them or the weights tell them.
    fn names(&self, loaded: &Loaded) -> anyhow::Result<Option<Vec<String>>> {
        let classes = loaded.network.spec().classes;
        let Some(path) = &self.labels else {
            let told = &loaded.record.classes;
            return Ok((!told.is_empty()).then(|| told.clone()));
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
