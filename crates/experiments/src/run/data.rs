//! The images that networks are trained on: the embedded set, or a folder.

use crate::error::Result;
use crate::record::DataInfo;
use crate::spec::{Experiment, Recipe};
use isqrt_datasets::{Broken, DataSet, ListOptions, Pipeline, Sample, e10, list, list_with, split};
use std::path::{Path, PathBuf};

/// Seed of the embedded set and of the split of a folder without a validation part.
const SEED: u64 = 1;

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The embedded set, written below this folder if it is not there yet.
    Embedded(PathBuf),
    /// A folder, an archive or a list in any layout that is known, and how it is read.
    Folder(PathBuf, ListOptions),
}

impl Source {
    /// What is known of embedded images that are not there, or not all of them, without writing
    /// any; none if all are there, or for a folder.
    ///
    /// # Errors
    /// As [`Data::open`] where the experiments' recipes do not fit.
    pub fn describe_unwritten(
        &self,
        experiments: &[&Experiment],
        smoke: bool,
    ) -> Result<Option<DataInfo>> {
        let Self::Embedded(dir) = self else {
            return Ok(None);
        };
        let sizes = sizes(smoke);
        if e10::is_written(&embedded_root(dir, smoke), SEED, sizes)? {
            return Ok(None);
        }
        let (recipe_name, recipe) = recipe_for(experiments, e10::IMAGE_SIDE as u32)?;
        let (_, _, side) = pipelines(recipe)?;
        Ok(Some(DataInfo {
            name: embedded_name(),
            note: "not written yet".to_owned(),
            fingerprint: String::new(),
            classes: e10::CLASSES,
            train: sizes.train * e10::CLASSES,
            val: sizes.val * e10::CLASSES,
            test: sizes.test * e10::CLASSES,
            side,
            recipe: recipe_name.to_owned(),
            skipped: Vec::new(),
        }))
    }
}

fn embedded_root(dir: &Path, smoke: bool) -> PathBuf {
    dir.join(if smoke { "e10-smoke" } else { "e10" })
}

fn embedded_name() -> String {
    format!("E10, embedded textures (seed {SEED})")
}

/// The recipe that all these experiments have for images of this side.
fn recipe_for<'a>(experiments: &[&'a Experiment], side: u32) -> Result<(&'a str, &'a Recipe)> {
    let spec = |experiment: &Experiment, message| crate::Error::Spec {
        file: format!("{}.toml", experiment.id),
        line: None,
        message,
    };
    let mut chosen: Option<(&Experiment, &str, &Recipe)> = None;
    for experiment in experiments {
        let (name, recipe) = experiment.recipe_for(side).ok_or_else(|| {
            let message = format!("no recipe is for images of {side} pixels");
            spec(experiment, message)
        })?;
        match chosen {
            None => chosen = Some((experiment, name, recipe)),
            Some((first, its_name, its))
                if its_name != name || its.transforms() != recipe.transforms() =>
            {
                let message = format!(
                    "recipe `{name}` makes other inputs of these images than `{its_name}` of `{}`: \
                     run the two one after the other",
                    first.id
                );
                return Err(spec(experiment, message));
            }
            Some(_) => {}
        }
    }
    chosen
        .map(|(_, name, recipe)| (name, recipe))
        .ok_or_else(|| crate::Error::Unsupported("no experiment trains networks".to_owned()))
}

/// Those of a recipe, which was checked when its file was read.
fn pipelines(recipe: &Recipe) -> Result<(Pipeline, Pipeline, u32)> {
    recipe.pipelines().map_err(crate::Error::Unsupported)
}

/// Decoded images and what is recorded about them.
#[derive(Debug)]
pub struct Data {
    /// For records and the plan.
    pub info: DataInfo,
    /// The images.
    pub set: DataSet,
}

impl Data {
    /// Lists, splits and decodes; the size of the first image selects the experiments' recipe, and
    /// the recipe the size of all. A smoke run takes a few images a class.
    ///
    /// # Errors
    /// Those of `isqrt-datasets`, which name the path; [`crate::Error::Spec`] if no recipe fits, or
    /// if the experiments have different ones for these images.
    pub fn open(
        source: &Source,
        experiments: &[&Experiment],
        smoke: bool,
        broken: Broken,
    ) -> Result<Self> {
        let (listing, name) = match source {
            Source::Embedded(dir) => {
                let root = embedded_root(dir, smoke);
                e10::generate(&root, SEED, sizes(smoke))?;
                (list(&root)?, embedded_name())
            }
            Source::Folder(root, options) => (list_with(root, options)?, folder_name(root)),
        };
        let mut parts = split(listing, SEED)?;
        if smoke {
            for part in [&mut parts.train, &mut parts.val, &mut parts.test] {
                keep_few(part, parts.classes.len());
            }
        }
        let side = match (parts.train.first(), broken) {
            (Some(first), Broken::Fail) => Some(first.decode()?),
            _ => parts.train.iter().find_map(|sample| sample.decode().ok()),
        };
        let side = side.map_or(0, |image| image.width.min(image.height) as u32);
        let (recipe_name, recipe) = recipe_for(experiments, side)?;
        let (train, eval, side) = pipelines(recipe)?;
        // What is random is left to the loader.
        let (train, _) = train.split_random();
        let classes = parts.classes.len();
        let mut set = DataSet::decode(&parts, &train, &eval, broken)?;
        if smoke {
            set.note.push_str("; a few images a class");
        }
        let info = DataInfo {
            name,
            note: set.note.clone(),
            fingerprint: set.fingerprint(),
            classes,
            train: set.train.len(),
            val: set.val.len(),
            test: set.test.len(),
            side,
            recipe: recipe_name.to_owned(),
            skipped: set.skipped.clone(),
        };
        Ok(Self { info, set })
    }
}

fn sizes(smoke: bool) -> e10::Sizes {
    if smoke {
        e10::Sizes {
            train: 8,
            val: 4,
            test: 4,
        }
    } else {
        e10::Sizes::default()
    }
}

fn folder_name(root: &Path) -> String {
    let full = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    full.file_name()
        .map_or_else(|| "data".to_owned(), |n| n.to_string_lossy().into_owned())
}

fn keep_few(samples: &mut Vec<Sample>, classes: usize) {
    let mut counts = vec![0_usize; classes];
    samples.retain(|s| {
        counts.get_mut(s.label as usize).is_some_and(|count| {
            *count += 1;
            *count <= 8
        })
    });
}
