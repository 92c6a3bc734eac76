//! Small data sets in the layouts of the large ones, made of the textures of [`e10`].
//!
//! For tests, for trying out a command before hours of copying, and to see what a layout looks like.
//! Images are JPEG files of different sizes; names of classes and boxes are made up, but with the
//! blanks, slashes and orders that make the real ones hard to read. One seed gives the same files.

mod aircraft;
mod anybody;
mod cars;
mod cub;
mod imagenet;
mod tree;

use std::path::Path;

use tree::Tree;

use crate::e10::material::{Family, MOST_CLASSES};
use crate::e10::{self, Part};
use crate::manifest::Manifest;
use crate::{Error, Result};

/// How large a miniature is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Of all images.
    pub seed: u64,
    /// Number of classes, 2 to 10.
    pub classes: usize,
    /// Training images a class, 2 to 1000.
    pub train: usize,
    /// Validation or test images a class, 1 to 1000.
    pub held_out: usize,
    /// Smallest and largest width and height in pixels, 16 to 1024.
    pub sides: (usize, usize),
}

impl Default for Options {
    /// 3 classes of 6 and 3 images of 80 to 120 pixels.
    fn default() -> Self {
        Self {
            seed: 2018,
            classes: 3,
            train: 6,
            held_out: 3,
            sides: (80, 120),
        }
    }
}

/// A layout that can be written.
#[derive(Debug)]
pub struct Miniature {
    /// Its name, for [`write()`].
    pub name: &'static str,
    /// Name of the [`crate::Source`] that reads it.
    pub source: &'static str,
    /// What the part beside `train` is.
    held_out: Part,
    /// Name of a class.
    class: fn(usize) -> String,
    write: fn(&Tree) -> Result<()>,
}

/// All layouts. Another one is a line here and a function that writes it.
pub const MINIATURES: &[Miniature] = &[
    Miniature {
        name: "imagenet",
        source: "imagenet-1k",
        held_out: Part::Val,
        class: imagenet::wnid,
        write: imagenet::write,
    },
    Miniature {
        name: "imagenet-folder",
        source: "folder",
        held_out: Part::Val,
        class: imagenet::wnid,
        write: imagenet::write_folders,
    },
    Miniature {
        name: "kaggle",
        source: "imagenet-1k",
        held_out: Part::Val,
        class: imagenet::wnid,
        write: imagenet::write_kaggle,
    },
    Miniature {
        name: "imagenet-archives",
        source: "imagenet-archives",
        held_out: Part::Val,
        class: imagenet::wnid,
        write: imagenet::write_archives,
    },
    Miniature {
        name: "cub",
        source: "cub-200-2011",
        held_out: Part::Test,
        class: cub::species,
        write: cub::write,
    },
    Miniature {
        name: "cars",
        source: "stanford-cars",
        held_out: Part::Test,
        class: cars::model,
        write: cars::write,
    },
    Miniature {
        name: "cars-combined",
        source: "stanford-cars",
        held_out: Part::Test,
        class: cars::model,
        write: cars::write_combined,
    },
    Miniature {
        name: "aircraft",
        source: "fgvc-aircraft-2013b",
        held_out: Part::Test,
        class: aircraft::variant,
        write: aircraft::write,
    },
    Miniature {
        name: "shards",
        source: "shards",
        held_out: Part::Val,
        class: anybody::class,
        write: anybody::write_shards,
    },
    Miniature {
        name: "list",
        source: "list",
        held_out: Part::Test,
        class: anybody::class,
        write: anybody::write_list,
    },
];

/// Writes a miniature into `dir`, whole or not at all, and tells what it holds.
///
/// # Errors
/// [`Error::Config`] for a name that is not in [`MINIATURES`] and sizes that make no sense;
/// [`Error::Layout`] where `dir` is not empty; [`Error::Io`] where it cannot be written.
pub fn write(name: &str, dir: &Path, options: &Options) -> Result<Manifest> {
    write_as(name, dir, options, None)
}

/// The same of a family of materials, which may have more classes than E10.
pub(crate) fn write_as(
    name: &str,
    dir: &Path,
    options: &Options,
    family: Option<&'static Family>,
) -> Result<Manifest> {
    let Some(miniature) = MINIATURES.iter().find(|m| m.name == name) else {
        let names = MINIATURES
            .iter()
            .map(|m| m.name)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(Error::Config(format!(
            "no miniature {name:?}; there are: {names}"
        )));
    };
    let (low, high) = options.sides;
    let most = family.map_or(e10::CLASSES, |_| MOST_CLASSES);
    let makes_sense = (2..=most).contains(&options.classes)
        && (2..=1000).contains(&options.train)
        && (1..=1000).contains(&options.held_out)
        && (16..=high).contains(&low)
        && high <= 1024;
    if !makes_sense {
        return Err(Error::Config(format!(
            "a miniature of {} classes with {} training and {} held-out images each, sides from {low} to \
             {high}; expected 2 to {} classes, 2 to 1000 and 1 to 1000 images, sides from 16 to 1024",
            options.classes, options.train, options.held_out, most
        )));
    }
    match std::fs::read_dir(dir) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                let expected = "no folder or an empty one: choose another place";
                return Err(Error::layout(dir, "the folder is not empty", expected));
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(dir, "list the folder")(e)),
    }
    let parent = e10::parent_of(dir);
    std::fs::create_dir_all(&parent).map_err(Error::io(&parent, "make the folder"))?;
    e10::remove_abandoned(&parent, dir);
    let work = e10::beside(dir, &format!("partial-{}", std::process::id()));
    let tree = Tree {
        dir: work.clone(),
        options: *options,
        family,
        held_out: miniature.held_out,
    };
    let written = (miniature.write)(&tree).and_then(|()| e10::rename(&work, dir));
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&work);
    }
    written.map(|()| miniature.manifest(options))
}

impl Miniature {
    /// What it holds.
    fn manifest(&self, options: &Options) -> Manifest {
        let counts = [
            (Part::Train, options.train),
            (self.held_out, options.held_out),
        ];
        let counts = counts.map(|(part, count)| (part.folder().to_owned(), count));
        let class = |class| ((self.class)(class), counts.clone().into());
        Manifest {
            name: self.source.to_owned(),
            title: format!("a miniature of the layout {}", self.name),
            classes: (0..options.classes).map(class).collect(),
            ..Manifest::default()
        }
    }
}
