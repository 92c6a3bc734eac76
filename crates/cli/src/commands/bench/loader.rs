//! `isqrt bench loader`: images a second from files to numbers.

use crate::commands::data::list_options;
use crate::output::{self, show};
use clap::Args;
use isqrt_datasets::{Loader, LoaderConfig, Pipeline, Sample, list_with};
use isqrt_train::machine::peak_memory_mb;
use std::path::PathBuf;
use std::time::Instant;

/// Read, decode, transform and normalise images, and count them
///
/// Random crops of all scales, mirrored half of the time, as ImageNet is trained on, unless --preset
/// says otherwise. The training images of the set are gone through again and again until --images
/// are read. The first round warms up and is not counted.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt bench loader --data imagenet --workers 4
  isqrt bench loader --data ILSVRC2012_img_train.tar --preset imagenet-eval")]
pub struct LoaderBench {
    /// Folder, archive or list of images
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder for the indices of archives [default: beside the archive]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Threads that prepare images; 0: the caller prepares them itself [default: all cores]
    #[arg(long, value_name = "W", value_parser = clap::value_parser!(u16).range(..=1024))]
    workers: Option<u16>,
    /// Images in a batch
    #[arg(long, value_name = "B", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Side of the crops
    #[arg(long, value_name = "PIXELS", default_value_t = 224, value_parser = clap::value_parser!(u16).range(1..=4096))]
    size: u16,
    /// Transforms by name, instead of random crops of --size
    #[arg(long, value_name = "NAME", conflicts_with = "size")]
    preset: Option<String>,
    /// Images in a round
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    images: u32,
    /// Rounds; the median counts
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

impl LoaderBench {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let options = list_options(None, self.cache.clone());
        let start = Instant::now();
        let samples = list_with(&self.data, &options)?.train;
        let list_ms = 1e3 * start.elapsed().as_secs_f64();
        let again = samples.iter().cycle().take(self.images as usize);
        let again: Vec<Sample> = again.cloned().collect();
        let (name, pipeline) = match &self.preset {
            Some(name) => (name.clone(), Pipeline::preset(name)?),
            None => {
                let size = usize::from(self.size);
                (
                    format!("random crops of {size}"),
                    Pipeline::imagenet_train(size),
                )
            }
        };
        let workers = self.workers.map(usize::from);
        let config = LoaderConfig {
            workers,
            ..LoaderConfig::train(usize::from(self.batch), 1)
        };
        let loader = Loader::new(again, pipeline, config)?;
        let mut rates = Vec::new();
        for epoch in 0..=usize::from(self.rounds) {
            let (mut count, start) = (0, Instant::now());
            for batch in loader.epoch(epoch)? {
                let batch = batch?;
                count += batch.len();
                std::hint::black_box(batch.normalised(loader.levels()));
            }
            if epoch > 0 {
                rates.push(count as f64 / start.elapsed().as_secs_f64());
            }
        }
        rates.sort_by(f64::total_cmp);
        let rate = rates[rates.len() / 2];
        let workers = workers.unwrap_or_else(rayon::current_num_threads);
        let memory = peak_memory_mb();
        let case = format!("loader {name} batch={}", self.batch);
        if json {
            return output::json(&serde_json::json!({
                "case": case,
                "implementation": "ours",
                "threads": workers,
                "images_per_s": rate,
                "slowest_images_per_s": rates.first(),
                "fastest_images_per_s": rates.last(),
                "list_ms": list_ms,
                "images": samples.len(),
                "peak_memory_mb": memory,
            }));
        }
        let memory = memory.map_or_else(String::new, |m| format!("; peak memory {m:.0} MB"));
        output::line(&format!(
            "{case}, {workers} workers: {} images/s ({} to {} in {} rounds), {} images listed in {} ms{memory}",
            show(rate),
            show(rates[0]),
            show(rates[rates.len() - 1]),
            self.rounds,
            samples.len(),
            show(list_ms),
        ))
    }
}
