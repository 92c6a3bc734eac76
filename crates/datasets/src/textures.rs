//! The program's own data sets: small, made of textures, each in the layout of a large one, so that
//! experiments go through the very loaders that the large ones need.
//!
//! [`e10`] is one; the others are families of materials, which E10's textures become with classes of
//! different strengths and a background like that of photographs. One is there to train on from
//! scratch, three with few images a class to fine-tune on.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::e10::material::Family;
use crate::e10::{self, Sizes};
use crate::{Error, Result, miniature};

/// Counts up when the images of a seed change.
pub const VERSION: u32 = 1;

/// One of the sets.
#[derive(Debug)]
pub struct Set {
    /// Its name in experiments, and of its folder.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Classes.
    pub classes: usize,
    /// Training images a class.
    pub train: usize,
    /// Images a class that errors are reported on.
    pub test: usize,
    /// How it is written.
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    E10,
    /// A family in a layout of [`miniature`], with the smallest and largest side.
    Materials(&'static str, Family, (usize, usize)),
}

/// Materials to train on from scratch.
const IMAGENET: Family = Family {
    number: 1,
    band: (0.18, 0.30),
    turn: 0.0,
    background: 0.15,
    separation: 0.5,
    first: 0,
    per_pattern: 3,
};

/// All sets.
pub const SETS: &[Set] = &[
    Set {
        name: "e10",
        about: "textures whose classes differ in what varies together alone, ImageFolder of PNG",
        classes: e10::CLASSES,
        train: 200,
        test: 200,
        kind: Kind::E10,
    },
    Set {
        name: "mini-imagenet",
        about: "materials in ImageNet's layout",
        classes: 15,
        train: 60,
        test: 100,
        kind: Kind::Materials("imagenet", IMAGENET, (32, 32)),
    },
    Set {
        name: "mini-imagenet-large",
        about: "the same materials, four times the images to train on",
        classes: 15,
        train: 240,
        test: 100,
        kind: Kind::Materials("imagenet", IMAGENET, (32, 32)),
    },
    Set {
        name: "mini-cub",
        about: "materials in the layout of CUB-200-2011, few images a class",
        classes: 12,
        train: 30,
        test: 40,
        kind: Kind::Materials(
            "cub",
            Family {
                number: 2,
                band: (0.16, 0.26),
                turn: 0.5,
                background: 0.12,
                separation: 0.35,
                first: 1,
                per_pattern: 4,
            },
            (36, 48),
        ),
    },
    Set {
        name: "mini-aircraft",
        about: "materials in the layout of FGVC-Aircraft, few images a class",
        classes: 12,
        train: 40,
        test: 40,
        kind: Kind::Materials(
            "aircraft",
            Family {
                number: 3,
                band: (0.20, 0.32),
                turn: 0.25,
                background: 0.15,
                separation: 0.4,
                first: 2,
                per_pattern: 4,
            },
            (36, 48),
        ),
    },
    Set {
        name: "mini-cars",
        about: "materials in the layout of Stanford Cars, few images a class",
        classes: 14,
        train: 30,
        test: 40,
        kind: Kind::Materials(
            "cars",
            Family {
                number: 4,
                band: (0.15, 0.28),
                turn: 0.8,
                background: 0.10,
                separation: 0.4,
                first: 3,
                per_pattern: 5,
            },
            (36, 48),
        ),
    },
];

/// What was written, beside the folder.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    set: String,
    version: u32,
    seed: u64,
    images_per_class: Sizes,
    /// All files together; tells a folder that lost or gained some.
    bytes: u64,
}

impl Set {
    /// The set of this name.
    ///
    /// # Errors
    /// [`Error::Config`] with the names that there are.
    pub fn named(name: &str) -> Result<&'static Self> {
        SETS.iter().find(|set| set.name == name).ok_or_else(|| {
            let names: Vec<&str> = SETS.iter().map(|set| set.name).collect();
            let names = names.join(", ");
            Error::Config(format!(
                "no set {name:?} of the program's own; there are: {names}"
            ))
        })
    }

    /// Images a class; `few` to see only that everything runs.
    #[must_use]
    pub fn sizes(&self, few: bool) -> Sizes {
        let val = match self.kind {
            Kind::E10 => 50,
            Kind::Materials(..) => 0,
        };
        match few {
            false => Sizes {
                train: self.train,
                val,
                test: self.test,
            },
            true => Sizes {
                train: 8,
                val: val.min(4),
                test: 4,
            },
        }
    }

    /// Its folder below one for all sets.
    #[must_use]
    pub fn folder(&self, home: &Path, few: bool) -> PathBuf {
        home.join(match few {
            true => format!("{}-smoke", self.name),
            false => self.name.to_owned(),
        })
    }

    /// Writes it below `home`, unless it is there; its folder.
    ///
    /// # Errors
    /// [`Error::Layout`] where the folder holds something else, [`Error::Io`] where it cannot be written.
    pub fn write(&'static self, home: &Path, seed: u64, few: bool) -> Result<PathBuf> {
        let (dir, sizes) = (self.folder(home, few), self.sizes(few));
        let Kind::Materials(layout, family, sides) = &self.kind else {
            e10::generate(&dir, seed, sizes)?;
            return Ok(dir);
        };
        if self.is_written(home, seed, few)? {
            return Ok(dir);
        }
        let note = self.note_path(&dir);
        let empty = std::fs::read_dir(&dir).map_or(true, |mut entries| entries.next().is_none());
        if !(empty || note.is_file() && self.is_ours(&dir)) {
            return Err(Error::layout(
                &dir,
                "the folder is not empty and holds what this program did not write",
                "no folder, an empty one or an earlier set of this name: choose another place or move it away",
            ));
        }
        // Beside its place, then the note, then into it: what a kill leaves is written again.
        let part = dir.with_extension("part");
        if !self.is_ours(&part) {
            return Err(Error::layout(
                &part,
                "the folder holds what this program did not write",
                "no folder here, where the set is made: move it away",
            ));
        }
        remove_folder(&part)?;
        let options = miniature::Options {
            seed,
            classes: self.classes,
            train: sizes.train,
            held_out: sizes.test,
            sides: *sides,
        };
        miniature::write_as(layout, &part, &options, Some(family))?;
        let note_of = self.note(seed, sizes, bytes_below(&part)?);
        let text = serde_json::to_string_pretty(&note_of)
            .map_err(|e| Error::io(&note, "write the file")(e.into()))?;
        // An earlier one of ours that is not whole, or of other sizes.
        remove_folder(&dir)?;
        std::fs::write(&note, text + "\n").map_err(Error::io(&note, "write the file"))?;
        std::fs::rename(&part, &dir).map_err(Error::io(&dir, "move the written set to"))?;
        Ok(dir)
    }

    /// Whether [`write`](Self::write) would find all of it; writes nothing.
    ///
    /// # Errors
    /// [`Error::Layout`] where the folder holds something else, [`Error::Io`] where it cannot be read.
    pub fn is_written(&self, home: &Path, seed: u64, few: bool) -> Result<bool> {
        let (dir, sizes) = (self.folder(home, few), self.sizes(few));
        if matches!(self.kind, Kind::E10) {
            return e10::is_written(&dir, seed, sizes);
        }
        let Ok(text) = std::fs::read_to_string(self.note_path(&dir)) else {
            return Ok(false);
        };
        let Ok(note) = serde_json::from_str::<Note>(&text) else {
            return Ok(false);
        };
        Ok(dir.is_dir() && note == self.note(seed, sizes, bytes_below(&dir)?))
    }

    /// Whether a folder that is not whole can only be what is left of this set: every file in it would be
    /// written again.
    fn is_ours(&self, dir: &Path) -> bool {
        let Kind::Materials(layout, ..) = &self.kind else {
            return false;
        };
        let known: &[&str] = match *layout {
            "imagenet" => &["train", "val", "ILSVRC2012_devkit_t12"],
            "cub" => &[
                "images",
                "parts",
                "images.txt",
                "image_class_labels.txt",
                "train_test_split.txt",
                "bounding_boxes.txt",
                "classes.txt",
            ],
            "aircraft" => &["data"],
            _ => &[
                "cars_train",
                "cars_test",
                "devkit",
                "cars_test_annos_withlabels.mat",
            ],
        };
        let Ok(entries) = std::fs::read_dir(dir) else {
            return true;
        };
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.all(|name| known.iter().any(|k| name == *k))
    }

    fn note(&self, seed: u64, images_per_class: Sizes, bytes: u64) -> Note {
        Note {
            set: self.name.to_owned(),
            version: VERSION,
            seed,
            images_per_class,
            bytes,
        }
    }

    /// Not in the folder, whose layout is somebody else's.
    fn note_path(&self, dir: &Path) -> PathBuf {
        dir.with_extension("json")
    }
}

/// Removes a folder with all that is in it, if it is there.
fn remove_folder(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(dir, "remove the folder")(e))
        }
        _ => Ok(()),
    }
}

/// Bytes of all files below a folder.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir, "list the folder"))? {
        let entry = entry.map_err(Error::io(dir, "list the folder"))?;
        let path = entry.path();
        let kind = entry.metadata().map_err(Error::io(&path, "look at"))?;
        bytes += match kind.is_dir() {
            true => bytes_below(&path)?,
            false => kind.len(),
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{list, recognise, split};

    #[test]
    fn each_set_is_read_by_the_loader_of_its_layout() {
        let home = tempfile::tempdir().unwrap();
        let sources = [
            ("e10", "folder"),
            ("mini-imagenet", "imagenet-1k"),
            ("mini-imagenet-large", "imagenet-1k"),
            ("mini-cub", "cub-200-2011"),
            ("mini-aircraft", "fgvc-aircraft-2013b"),
            ("mini-cars", "stanford-cars"),
        ];
        assert_eq!(sources.len(), SETS.len());
        for (name, source) in sources {
            let set = Set::named(name).unwrap();
            let dir = set.write(home.path(), 1, true).unwrap();
            assert_eq!(recognise(&dir).unwrap().name, source);
            let parts = split(list(&dir).unwrap(), 1).unwrap();
            assert_eq!(parts.classes.len(), set.classes, "{name}");
            let sizes = set.sizes(true);
            assert_eq!(parts.test.len(), set.classes * sizes.test, "{name}");
            assert!(!parts.val.is_empty(), "{name}");
            for part in [&parts.train, &parts.test] {
                part[0].decode().unwrap();
            }
        }
    }

    #[test]
    fn a_set_is_written_once_and_mended() {
        let home = tempfile::tempdir().unwrap();
        let set = Set::named("mini-cub").unwrap();
        assert!(!set.is_written(home.path(), 1, true).unwrap());
        let dir = set.write(home.path(), 1, true).unwrap();
        let lists = dir.join("images.txt");
        let first = std::fs::metadata(&lists).unwrap().modified().unwrap();
        set.write(home.path(), 1, true).unwrap();
        assert_eq!(
            std::fs::metadata(&lists).unwrap().modified().unwrap(),
            first
        );
        std::fs::remove_file(&lists).unwrap();
        assert!(!set.is_written(home.path(), 1, true).unwrap());
        set.write(home.path(), 1, true).unwrap();
        assert!(set.is_written(home.path(), 1, true).unwrap());
        // Killed before the folder came to its place.
        std::fs::rename(&dir, dir.with_extension("part")).unwrap();
        assert!(!set.is_written(home.path(), 1, true).unwrap());
        set.write(home.path(), 1, true).unwrap();
        assert!(set.is_written(home.path(), 1, true).unwrap());
        assert!(!dir.with_extension("part").exists());
        assert!(!set.is_written(home.path(), 2, true).unwrap());
    }

    #[test]
    fn somebody_elses_folder_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let mine = home.path().join("mini-cub-smoke");
        std::fs::create_dir(&mine).unwrap();
        std::fs::write(mine.join("thesis.tex"), "x").unwrap();
        let set = Set::named("mini-cub").unwrap();
        let error = set.write(home.path(), 1, true).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
        assert!(mine.join("thesis.tex").exists());
    }
}
