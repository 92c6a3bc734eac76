//! The images of a run: the program's own sets or the user's, listed, split and decoded.

use crate::error::Result;
use crate::plan::{Infos, own_recipes};
use crate::record::DataInfo;
use crate::spec::{Experiment, Recipe};
use isqrt_datasets::textures::Set;
use isqrt_datasets::{Broken, DataSet, ListOptions, Pipeline, Sample, list, list_with, split};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Seed of the program's own sets and of the split of a folder without a validation part.
const SEED: u64 = 1;

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The program's own sets, written below this folder if they are not there yet.
    Own(PathBuf),
    /// A folder, an archive or a list in any layout that is known, and how it is read.
    Users(PathBuf, ListOptions),
}

/// Decoded images by recipe.
#[derive(Debug, Default)]
pub struct Library {
    sets: BTreeMap<String, Data>,
    /// Whether they are the user's.
    users: bool,
}

impl Library {
    /// Opens what these experiments train on. A smoke run takes a few images a class.
    ///
    /// # Errors
    /// Those of [`Data::open`]; [`crate::Error::Spec`] if experiments have different recipes of one name.
    pub fn open(
        source: &Source,
        experiments: &[&Experiment],
        smoke: bool,
        broken: Broken,
    ) -> Result<Self> {
        let mut library = Self::default();
        match source {
            Source::Own(home) => {
                for (name, recipe) in recipes(experiments)? {
                    let data = Data::own(home, name, recipe, smoke)?;
                    library.sets.insert(name.to_owned(), data);
                }
            }
            Source::Users(root, options) => {
                let from_scratch = from_scratch(experiments);
                if !from_scratch.is_empty() {
                    let data = Data::open(root, options, &from_scratch, smoke, broken)?;
                    library.sets.insert(data.info.recipe.clone(), data);
                }
                library.users = true;
            }
        }
        Ok(library)
    }

    /// Those of a recipe.
    pub fn get(&self, recipe: &str) -> Option<&Data> {
        self.sets.get(recipe)
    }

    /// What is known of them.
    pub fn infos(&self) -> Infos {
        let infos = self
            .sets
            .iter()
            .map(|(name, d)| (name.clone(), d.info.clone()));
        match self.users {
            true => Infos {
                own: BTreeMap::new(),
                users: infos.map(|(_, info)| info).next(),
                brought: true,
            },
            false => Infos {
                own: infos.collect(),
                users: None,
                brought: false,
            },
        }
    }
}

impl Source {
    /// What is known of the program's own sets where some are not written, without writing any: of those
    /// that are there all, so that what was done with them is seen to be done. None if all are there, or
    /// for the user's images.
    ///
    /// # Errors
    /// As [`Library::open`] where the experiments' recipes do not fit.
    pub fn describe_unwritten(
        &self,
        experiments: &[&Experiment],
        smoke: bool,
    ) -> Result<Option<Infos>> {
        let Self::Own(home) = self else {
            return Ok(None);
        };
        let mut sets = Vec::new();
        for (name, recipe) in recipes(experiments)? {
            let set = Set::named(&recipe.data)?;
            sets.push((name, recipe, set, set.is_written(home, SEED, smoke)?));
        }
        // They are opened as a whole then, not here as well.
        if sets.iter().all(|(.., written)| *written) {
            return Ok(None);
        }
        let mut infos = Infos::default();
        for (name, recipe, set, written) in sets {
            if written {
                let data = Data::own(home, name, recipe, smoke)?;
                infos.own.insert(name.to_owned(), data.info);
                continue;
            }
            let sizes = set.sizes(smoke);
            let (_, _, side) = pipelines(recipe)?;
            let val = match sizes.val {
                0 => (sizes.train as f64 * isqrt_datasets::VAL_SHARE).round() as usize,
                val => val,
            };
            let info = DataInfo {
                name: own_name(set),
                note: "not written yet".to_owned(),
                classes: set.classes,
                train: (sizes.train - if sizes.val == 0 { val } else { 0 }) * set.classes,
                val: val * set.classes,
                test: sizes.test * set.classes,
                side,
                recipe: name.to_owned(),
                ..DataInfo::default()
            };
            infos.own.insert(name.to_owned(), info);
        }
        Ok(Some(infos))
    }
}

fn own_name(set: &Set) -> String {
    format!("{}: {} (seed {SEED})", set.name, set.about)
}

/// The recipes that experiments go through on the program's own sets; one name means one recipe.
fn recipes<'a>(experiments: &[&'a Experiment]) -> Result<BTreeMap<&'a str, &'a Recipe>> {
    let mut all: BTreeMap<&str, (&Experiment, &Recipe)> = BTreeMap::new();
    for e in experiments {
        for name in own_recipes(e) {
            let Some(recipe) = e.recipes.get(name) else {
                continue;
            };
            let (first, known) = *all.entry(name).or_insert((e, recipe));
            if known.data != recipe.data || known.transforms() != recipe.transforms() {
                return Err(spec(
                    e,
                    format!(
                        "recipe `{name}` makes other inputs than that of `{}`: give one of them another name",
                        first.id
                    ),
                ));
            }
        }
    }
    Ok(all
        .into_iter()
        .map(|(name, (_, recipe))| (name, recipe))
        .collect())
}

fn spec(experiment: &Experiment, message: String) -> crate::Error {
    crate::Error::Spec {
        file: format!("{}.toml", experiment.id),
        line: None,
        message,
    }
}

fn from_scratch<'a>(experiments: &[&'a Experiment]) -> Vec<&'a Experiment> {
    let all = experiments.iter().copied();
    all.filter(|e| e.from_scratch()).collect()
}

/// The recipe that all these experiments have for images of this side.
fn recipe_for<'a>(experiments: &[&'a Experiment], side: u32) -> Result<(&'a str, &'a Recipe)> {
    let mut chosen: Option<(&Experiment, &str, &Recipe)> = None;
    for experiment in experiments {
        let (name, recipe) = experiment.recipe_for(side).ok_or_else(|| {
            spec(
                experiment,
                format!("no recipe is for images of {side} pixels"),
            )
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
    /// One of the program's own sets, by the loader of its layout.
    fn own(home: &Path, name: &str, recipe: &Recipe, smoke: bool) -> Result<Self> {
        let set = Set::named(&recipe.data)?;
        let root = set.write(home, SEED, smoke)?;
        let parts = split(list(&root)?, SEED)?;
        Self::decode(&parts, own_name(set), (name, recipe), Broken::Fail, smoke)
    }

    /// Lists, splits and decodes; the size of the first image selects the experiments' recipe, and
    /// the recipe the size of all. A smoke run takes a few images a class.
    ///
    /// # Errors
    /// Those of `isqrt-datasets`, which name the path; [`crate::Error::Spec`] if no recipe fits, or
    /// if the experiments have different ones for these images.
    pub fn open(
        root: &Path,
        options: &ListOptions,
        experiments: &[&Experiment],
        smoke: bool,
        broken: Broken,
    ) -> Result<Self> {
        let mut parts = split(list_with(root, options)?, SEED)?;
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
        let recipe = recipe_for(experiments, side)?;
        Self::decode(&parts, folder_name(root), recipe, broken, smoke)
    }

    fn decode(
        parts: &isqrt_datasets::Split,
        name: String,
        (recipe_name, recipe): (&str, &Recipe),
        broken: Broken,
        smoke: bool,
    ) -> Result<Self> {
        let (train, eval, side) = pipelines(recipe)?;
        // What is random is left to the loader.
        let (train, _) = train.split_random();
        let mut set = DataSet::decode(parts, &train, &eval, broken)?;
        if smoke {
            set.note.push_str("; a few images a class");
        }
        let info = DataInfo {
            name,
            note: set.note.clone(),
            fingerprint: set.fingerprint(),
            classes: parts.classes.len(),
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
