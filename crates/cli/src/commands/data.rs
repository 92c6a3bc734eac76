//! `isqrt data`: what lies on disk, whether it is whole, and sets to try things with.

use crate::output::{self, show};
use crate::progress::Counter;
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use isqrt_datasets::verify::{Level, Progress, Report, verify};
use isqrt_datasets::{
    IndexCache, ListOptions, Listing, PRESETS, Preset, Spread, class_histogram, e10, list_with,
    miniature, part_stats, recognise,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Look at data sets: list, check, measure, make small ones
#[derive(Subcommand)]
#[command(after_help = "Examples:
  isqrt data verify cub-200-2011 CUB_200_2011
  isqrt data stats imagenet --sample 2000
  isqrt data make cars mini-cars")]
pub enum Data {
    Verify(Verify),
    Index(Index),
    Stats(Stats),
    Make(Make),
    Presets(Presets),
}

impl Data {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        match self {
            Self::Verify(c) => c.run(json),
            Self::Index(c) => c.run(json),
            Self::Stats(c) => c.run(json),
            Self::Make(c) => c.run(json),
            Self::Presets(c) => c.run(json),
        }
    }
}

/// Where a set lies and how it is read.
#[derive(Args)]
pub struct Place {
    /// Folder, archive or list of images
    #[arg(value_name = "DIR")]
    root: PathBuf,
    /// Labels to read, where a set has several (FGVC-Aircraft: variant, family, manufacturer)
    #[arg(long, value_name = "NAME")]
    labels: Option<String>,
    /// Folder for the indices of archives [default: beside the archive]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

impl Place {
    fn options(&self) -> ListOptions {
        list_options(self.labels.clone(), self.cache.clone())
    }

    fn list(&self) -> anyhow::Result<Listing> {
        Ok(list_with(&self.root, &self.options())?)
    }
}

/// As the flags of a command say.
pub fn list_options(labels: Option<String>, cache: Option<PathBuf>) -> ListOptions {
    ListOptions {
        labels,
        cache: cache.map_or(IndexCache::Beside, IndexCache::Folder),
    }
}

/// Check that a set is whole: layout, counts, images, checksums
///
/// NAME is a set whose counts and checksums are known (imagenet-1k, cub-200-2011, stanford-cars,
/// fgvc-aircraft-2013b), or a layout (`folder` and others), of which only what is listed can be checked.
/// The exit code is 1 where something is wrong.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt data verify cub-200-2011 CUB_200_2011
  isqrt data verify imagenet-1k /data/ILSVRC2012 --level decode
  isqrt data verify folder photos")]
pub struct Verify {
    /// What the set is said to be
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    place: Place,
    /// How thoroughly to look; each level includes those before it, sha stands alone
    #[arg(long, value_enum, default_value_t = LevelArg::Count)]
    level: LevelArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum LevelArg {
    /// The lists can be read, and the classes are the expected ones
    Layout,
    /// Every listed file is there, and their numbers are the expected ones
    Count,
    /// Every image can be decoded
    Decode,
    /// Archives and lists in the folder or beside it have the known checksums
    Sha,
}

impl Verify {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        let level = match self.level {
            LevelArg::Layout => Level::Layout,
            LevelArg::Count => Level::Count,
            LevelArg::Decode => Level::Decode,
            LevelArg::Sha => Level::Checksum,
        };
        let counter = Counter::default();
        let report = verify(
            &self.name,
            &self.place.root,
            level,
            &self.place.options(),
            &|Progress { step, done, total }| counter.at(step, done, total),
        )?;
        counter.end();
        if json {
            output::json(&report)?;
        } else {
            show_report(&report)?;
        }
        let wrong = report.findings.len();
        anyhow::ensure!(
            wrong == 0,
            "{}: {wrong} {} wrong with this {}",
            report.root.display(),
            if wrong == 1 { "thing is" } else { "things are" },
            report.name
        );
        Ok(())
    }
}

fn show_report(report: &Report) -> anyhow::Result<()> {
    let found = report.found.iter();
    let parts: Vec<Vec<String>> = found
        .map(|(part, n)| {
            let expected = report.expected.as_ref().and_then(|e| e.get(part));
            let expected = expected.map_or_else(|| "?".to_owned(), ToString::to_string);
            vec![part.clone(), n.to_string(), expected]
        })
        .collect();
    if !parts.is_empty() {
        output::line(&format!(
            "{} in the layout {}, {} classes",
            report.root.display(),
            report.layout.unwrap_or("?"),
            report.classes
        ))?;
        output::table(&["part", "images", "expected"], parts, 1)?;
    }
    for file in &report.matching_files {
        output::line(&format!("right: {file}"))?;
    }
    for finding in &report.findings {
        output::line(&format!("wrong: {finding}"))?;
    }
    match report.is_ok() {
        true => output::line("nothing is wrong"),
        false => Ok(()),
    }
}

/// Write a small data set: the embedded one, or a miniature in an official layout
///
/// The embedded set E10 has 4500 textures in ten classes. Miniatures hold a few of its textures as JPEG
/// files of different sizes, in the folders, lists and archives of the set that they are named after.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt data make e10 e10
  isqrt data make cars mini-cars --classes 5 --train 20")]
pub struct Make {
    /// What to write
    #[arg(value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(made()))]
    name: String,
    /// Folder to write it to: a new or an empty one
    #[arg(value_name = "DIR")]
    out: PathBuf,
    /// Decides the images [default: 1 for e10, 2018]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Classes of a miniature, 2 to 10 [default: 3]
    #[arg(long, value_name = "K")]
    classes: Option<usize>,
    /// Training images a class, 2 to 1000 [default: 6; e10: 200]
    #[arg(long, value_name = "N")]
    train: Option<usize>,
    /// Images of each held-out part a class, 1 to 1000 [default: 3; e10: 50 val, 200 test]
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
}

fn made() -> Vec<&'static str> {
    let miniatures = miniature::MINIATURES.iter().map(|m| m.name);
    std::iter::once("e10").chain(miniatures).collect()
}

impl Make {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        if self.name == "e10" {
            anyhow::ensure!(
                self.classes.is_none(),
                "--classes: the embedded set has {} classes",
                e10::CLASSES
            );
            let usual = e10::Sizes::default();
            let sizes = e10::Sizes {
                train: self.train.unwrap_or(usual.train),
                val: self.held_out.unwrap_or(usual.val),
                test: self.held_out.unwrap_or(usual.test),
            };
            e10::generate(&self.out, self.seed.unwrap_or(1), sizes)?;
        } else {
            let usual = miniature::Options::default();
            let options = miniature::Options {
                seed: self.seed.unwrap_or(usual.seed),
                classes: self.classes.unwrap_or(usual.classes),
                train: self.train.unwrap_or(usual.train),
                held_out: self.held_out.unwrap_or(usual.held_out),
                ..usual
            };
            miniature::write(&self.name, &self.out, &options)?;
        }
        // Nothing but the set is left there.
        let options = ListOptions {
            cache: IndexCache::Off,
            ..ListOptions::default()
        };
        let listing = list_with(&self.out, &options)?;
        let counts: Vec<(&str, usize)> = listing.parts().map(|(p, s)| (p, s.len())).collect();
        if json {
            let mut object = serde_json::json!({"out": self.out, "classes": listing.classes.len()});
            for (part, count) in counts {
                object[part] = count.into();
            }
            return output::json(&object);
        }
        let counts: Vec<String> = counts.iter().map(|(p, n)| format!("{n} {p}")).collect();
        output::line(&format!(
            "wrote {}: {} images in {} classes",
            self.out.display(),
            counts.join(", "),
            listing.classes.len()
        ))
    }
}

/// List a set; the index of an archive is written so that the next time is quick
///
/// The archives of ImageNet are read in place: the first time all their headers are read, which can
/// take minutes, and remembered in a text file beside the archive or in --cache.
#[derive(Args)]
#[command(after_help = "Example:
  isqrt data index ILSVRC2012_img_train.tar --out train.tsv")]
pub struct Index {
    #[command(flatten)]
    place: Place,
    /// Write the list as .csv or .tsv: columns path (below DIR), label (a number where names would be sorted
    /// otherwise) and split; a set itself where it lies in DIR
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Index {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        // Before the list is written, which may lie there afterwards.
        let layout = recognise(&self.place.root).map_or("?", |source| source.name);
        let start = Instant::now();
        let listing = self.place.list()?;
        let seconds = start.elapsed().as_secs_f64();
        if let Some(out) = &self.out {
            write_list(&self.place.root, &listing, out)?;
        }
        let counts: Vec<(&str, usize)> = listing.parts().map(|(p, s)| (p, s.len())).collect();
        if json {
            let mut object = serde_json::json!({
                "root": self.place.root,
                "layout": layout,
                "classes": listing.classes.len(),
                "seconds": seconds,
                "out": self.out,
            });
            for (part, count) in counts {
                object[part] = count.into();
            }
            return output::json(&object);
        }
        let counts: Vec<String> = counts.iter().map(|(p, n)| format!("{n} {p}")).collect();
        output::line(&format!(
            "{}: {} images in {} classes ({layout}), listed in {} s",
            self.place.root.display(),
            counts.join(", "),
            listing.classes.len(),
            show(seconds)
        ))?;
        match &self.out {
            Some(out) => output::line(&format!("wrote {}", out.display())),
            None => Ok(()),
        }
    }
}

/// Writes a table of what is listed, which the layout `list` reads.
fn write_list(root: &Path, listing: &Listing, out: &Path) -> anyhow::Result<()> {
    let ending = out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let separator = match &*ending.to_ascii_lowercase() {
        "csv" => ",",
        "tsv" => "\t",
        _ => anyhow::bail!("{}: name it .csv or .tsv", out.display()),
    };
    anyhow::ensure!(
        !out.exists(),
        "{}: there is such a file, which may belong to a data set: remove it or choose another name",
        out.display()
    );
    let root = match root.is_dir() {
        true => root,
        false => root.parent().unwrap_or(root),
    };
    let stem = out.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    anyhow::ensure!(
        !["train", "val", "valid", "validation", "test"].contains(&stem),
        "{}: a list of this name would be taken for a part of the set: choose another",
        out.display()
    );
    // Names are sorted when a list is read, and numbers are classes themselves: where either would change
    // labels, the labels are written.
    let numbers = listing
        .classes
        .iter()
        .all(|class| class.parse::<u32>().is_ok());
    let by_name = !numbers && listing.classes.is_sorted();
    if !by_name {
        tracing::warn!("classes are written as numbers, to keep their order");
    }
    // Quotes where the text could be taken for something else.
    let field = |text: &str| match text.contains(['"', ',', '\t', '#', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let mut text = ["path", "label", "split"].join(separator) + "\n";
    for (part, samples) in listing.parts() {
        for sample in samples {
            let Some(path) = sample.own_file() else {
                anyhow::bail!(
                    "{} lies in an archive, which a list cannot say",
                    sample.path().display()
                );
            };
            let path = path
                .strip_prefix(root)
                .unwrap_or(&path)
                .to_string_lossy()
                .into_owned();
            let number = sample.label.to_string();
            let class = match by_name {
                true => &listing.classes[sample.label as usize],
                false => &number,
            };
            let fields = [&path, class, part].map(field);
            text += &(fields.join(separator) + "\n");
        }
    }
    let write = || -> std::io::Result<()> {
        let mut file = isqrt_models::WholeFile::create(out)?;
        file.file()?.write_all(text.as_bytes())?;
        file.finish()
    };
    write().with_context(|| format!("cannot write {}", out.display()))
}

/// Classes, sizes and channel statistics of each part
///
/// Means and deviations are over all pixels as they lie on disk, scaled to 0..1. Broken images are
/// counted and named.
#[derive(Args)]
#[command(after_help = "Example:
  isqrt data stats CUB_200_2011 --sample 1000")]
pub struct Stats {
    #[command(flatten)]
    place: Place,
    /// Look at this many images of each part, chosen with --seed [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,
    /// Which images --sample takes
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
}

impl Stats {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        let listing = self.place.list()?;
        let mut rows = Vec::new();
        let mut broken = Vec::new();
        let mut all = Vec::new();
        for (part, samples) in listing.parts() {
            let limit = self.sample.map(|n| n as usize);
            let total = limit.unwrap_or(usize::MAX).min(samples.len());
            let counter = Counter::default();
            let stats = part_stats(samples, limit, self.seed, &|done| {
                counter.at("decoding", done as u64, total as u64);
            })?;
            counter.end();
            let counts = class_histogram(samples, listing.classes.len());
            if json {
                let per_class: serde_json::Map<String, serde_json::Value> = listing
                    .classes
                    .iter()
                    .zip(&counts)
                    .map(|(class, &n)| (class.clone(), n.into()))
                    .collect();
                output::json(&serde_json::json!({
                    "part": part, "stats": stats, "images_per_class": per_class,
                }))?;
                continue;
            }
            let spread = |spread: Option<Spread>| {
                spread.map_or_else(String::new, |s| {
                    format!("{} / {} / {}", s.least, s.median, s.most)
                })
            };
            let three = |v: Option<[f32; 3]>| {
                v.map_or_else(
                    || "-".to_owned(),
                    |v| format!("{:.3} {:.3} {:.3}", v[0], v[1], v[2]),
                )
            };
            rows.push(vec![
                part.to_owned(),
                stats.images.to_string(),
                spread(Spread::of(counts.clone())),
                spread(stats.width),
                spread(stats.height),
                three(stats.mean),
                three(stats.std),
                format!(
                    "{} of {}",
                    stats.broken.len(),
                    stats.broken.len() + stats.decoded
                ),
            ]);
            broken.extend(stats.broken);
            all.push((part, counts));
        }
        if json {
            return Ok(());
        }
        let head = [
            "part",
            "images",
            "a class",
            "width",
            "height",
            "mean",
            "deviation",
            "broken",
        ];
        output::line(&format!(
            "{}: {} classes; least / median / most",
            self.place.root.display(),
            listing.classes.len()
        ))?;
        output::table(&head, rows, 1)?;
        for (part, counts) in all {
            output::line(&histogram(part, &listing.classes, &counts))?;
        }
        const SHOWN: usize = 10;
        for image in broken.iter().take(SHOWN) {
            output::line(&format!("broken: {}", image.problem))?;
        }
        if broken.len() > SHOWN {
            output::line(&format!(
                "and {} more, all of them with --json",
                broken.len() - SHOWN
            ))?;
        }
        Ok(())
    }
}

/// Transforms that have names: what each does and which recipe it is
///
/// With --json every step of them, as experiment files spell them out.
#[derive(Args)]
#[command(after_help = "Example:
  isqrt data presets")]
pub struct Presets {}

impl Presets {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        if json {
            for preset in PRESETS {
                output::json(&serde_json::json!({
                    "name": preset.name,
                    "about": preset.about,
                    "source": preset.source,
                    "pipeline": preset.pipeline(),
                }))?;
            }
            return Ok(());
        }
        let row = |preset: &Preset| vec![preset.name.to_owned(), preset.about.to_owned()];
        output::table(
            &["name", "what it does"],
            PRESETS.iter().map(row).collect(),
            2,
        )
    }
}

/// Images a class as bars, or the smallest and largest classes where there are many.
fn histogram(part: &str, classes: &[String], counts: &[usize]) -> String {
    const SHOWN: usize = 24;
    const BAR: usize = 40;
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut order: Vec<usize> = (0..counts.len()).collect();
    let mut text = format!("images of each class in {part}");
    if order.len() > SHOWN {
        order.sort_by_key(|&class| counts[class]);
        order.drain(SHOWN / 2..counts.len() - SHOWN / 2);
        text.push_str(&format!(", the {} smallest and largest", SHOWN / 2));
    }
    let width = order
        .iter()
        .map(|&c| classes[c].chars().count())
        .max()
        .unwrap_or(0)
        .min(40);
    for class in order {
        let name: String = classes[class].chars().take(40).collect();
        let bar = "█".repeat((counts[class] * BAR).div_ceil(most));
        text.push_str(&format!("\n  {name:width$} {:6} {bar}", counts[class]));
    }
    text
}
