//! A network with weights from a file, as several commands take it.

use crate::progress::say;
use anyhow::Context;
use candle_core::Device;
use clap::{Args, ValueEnum};
use isqrt_datasets::{Pipeline, Step};
use isqrt_models::checkpoint::{
    self, Checkpoint, LoadOptions, Preprocessing, Record, Report, Triangle,
};
use isqrt_models::{ModelSpec, Network};
use isqrt_train::{lacks_means, told_pipeline};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to make of a file of weights.
#[derive(Args)]
pub struct WeightsArgs {
    /// Network: `resnet50`, `resnet50+isqrt`, or a TOML file with its spec; our own files tell it
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Outputs of the classifier [default: as many as the file has]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    classes: Option<u32>,
    /// Order of the covariance's triangle in the file, where it may have either
    #[arg(long, value_enum)]
    triangle: Option<Order>,
    /// Take what fits and leave the rest at its initial values
    #[arg(long)]
    partial: bool,
}

/// The order of the entries of a symmetric matrix.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// The authors' code since December 2018 (commit e68a5ee); ours
    Upper,
    /// The authors' code before; MatConvNet
    Lower,
}

impl From<Order> for Triangle {
    fn from(order: Order) -> Self {
        match order {
            Order::Upper => Self::Upper,
            Order::Lower => Self::Lower,
        }
    }
}

/// A network with its weights.
pub struct Loaded {
    pub network: Network,
    pub report: Report,
    /// What the file tells of itself.
    pub record: Record,
}

impl WeightsArgs {
    /// As [`load`](Self::load), the network then on this device.
    pub fn load_on(&self, path: &Path, device: &Device) -> anyhow::Result<Loaded> {
        let loaded = self.load(path)?;
        Ok(Loaded {
            network: loaded.network.on(device)?,
            ..loaded
        })
    }

    /// Reads the weights; what found no place is told on standard error where `partial` allows it.
    pub fn load(&self, path: &Path) -> anyhow::Result<Loaded> {
        let file = Checkpoint::open(path)?;
        let told = checkpoint::model(&file)?;
        let mut spec = match (&self.model, told) {
            (Some(name), told) => {
                let mut spec = named(name, CLASSES)?;
                if let Some(told) = told {
                    if !name.ends_with(TOML) {
                        spec.classes = told.classes;
                    }
                    anyhow::ensure!(
                        spec == told || self.partial,
                        "{} is of {}, which is not what --model {name} stands for: leave --model out, or \
                         take what fits with --partial",
                        path.display(),
                        told
                    );
                }
                // A file of a spec says how many classes it is to have.
                if !name.ends_with(TOML) {
                    spec.classes = checkpoint::classes(&file, &spec)?.unwrap_or(spec.classes);
                }
                spec
            }
            (None, Some(spec)) => spec,
            (None, None) => anyhow::bail!(
                "{} does not tell which network it is of: say it with --model (`isqrt models` lists \
                 the parts, `--model resnet50+isqrt` is a network)",
                path.display()
            ),
        };
        if let Some(classes) = self.classes {
            spec.classes = classes as usize;
        }
        let options = LoadOptions {
            triangle: self.triangle.map(Triangle::from),
            partial: self.partial,
        };
        let mut network = checkpoint::network(&file, &spec, &options)?;
        let report = checkpoint::load_from(&mut network, &file, &options)?;
        for line in report.lines() {
            // Where standard error is closed there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
        let mut record = checkpoint::record(&file)?;
        // Of another classifier than the one of the file.
        if !report.is_complete() || record.classes.len() != spec.classes {
            record.classes.clear();
        }
        Ok(Loaded {
            network,
            report,
            record,
        })
    }
}

/// Classes of a short name, where the file does not tell.
const CLASSES: usize = 1000;
/// How the name of a spec's file ends.
const TOML: &str = ".toml";

/// An error where two paths are one file: what is written would replace what is read.
pub fn differ(read: &Path, written: &Path) -> anyhow::Result<()> {
    let same = std::fs::canonicalize(read).ok() == std::fs::canonicalize(written).ok();
    anyhow::ensure!(
        !(same && read.exists()),
        "{} would be written over the file that is read: give another name",
        written.display()
    );
    Ok(())
}

/// The network of a short name, or of a file with its spec (whose classes stand).
pub fn named(name: &str, classes: usize) -> anyhow::Result<ModelSpec> {
    if !name.ends_with(TOML) {
        return Ok(ModelSpec::named(name, classes)?);
    }
    let text = std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
    toml::from_str(&text).with_context(|| {
        format!("{name} is no spec of a network (`isqrt train FILE --dry-run` shows that of an experiment)")
    })
}

/// How images are made ready for a network.
#[derive(Args)]
pub struct ImageArgs {
    /// An image, a folder of images, or a text file with one path a line
    #[arg(long, value_name = "PATH")]
    pub images: PathBuf,
    /// Pixels of the short side, and --crop or its default of the middle, in place of the steps that the file tells
    /// [default: as the file tells, or 256; less for small networks]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u16).range(1..=4096))]
    resize: Option<u16>,
    /// Side of the square cut out of its centre [default: as the file tells, or what the backbone was made for]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u16).range(1..=4096))]
    crop: Option<u16>,
    /// Images at once
    #[arg(long, value_name = "B", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: u16,
}

impl ImageArgs {
    /// From the flags, the file (at `path`), or the images that the backbone was made for: those of ImageNet
    /// cut out of a short side of 256 pixels, smaller ones as a whole.
    pub fn pipeline(&self, loaded: &Loaded, path: &Path) -> anyhow::Result<Pipeline> {
        let told = told_pipeline(&loaded.record, path)?;
        if let (Some(told), None, None) = (&told, self.resize, self.crop) {
            let mut told = told.clone();
            // Images by themselves have no box: all of them is what there is.
            told.steps
                .retain(|step| !matches!(step, Step::BoxCrop { .. }));
            return Ok(told);
        }
        if lacks_means(&loaded.record) {
            say(&format!(
                "warning: {} does not tell the means that it was trained with; ImageNet's are taken",
                path.display()
            ));
        }
        let side = loaded.network.spec().backbone.entry()?.image_side();
        let usual = Preprocessing {
            resize: if side < 224 { side } else { 256 },
            crop: side,
            ..Preprocessing::IMAGENET
        };
        // The sizes of steps that are not as simple.
        let of_told = |told: &Pipeline| {
            let (side, _) = told.output_size()?;
            let mut shorts = told.steps.iter().rev().filter_map(|step| match step {
                Step::Resize { short, .. } => Some(*short),
                _ => None,
            });
            Some(Preprocessing {
                resize: shorts.next().unwrap_or(match side == usual.crop {
                    true => usual.resize,
                    false => side,
                }),
                crop: side,
                ..usual
            })
        };
        let simple = loaded.record.preprocessing;
        let simple = simple.or(told.as_ref().and_then(of_told)).unwrap_or(usual);
        let crop = self.crop.map_or(simple.crop, usize::from);
        let resize = self.resize.map_or(simple.resize.max(crop), usize::from);
        // It would get a black border, which no network was evaluated with.
        anyhow::ensure!(
            crop <= resize,
            "--crop {crop} is more than {resize}, the short side that images are resized to"
        );
        let (mean, std) = told.map_or((simple.mean, simple.std), |told| (told.mean, told.std));
        Ok(Pipeline::evaluation(resize, crop).normalising(mean, std))
    }
}
