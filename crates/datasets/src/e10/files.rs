//! Writing E10 as an ImageFolder tree of PNG files, whole or not at all.
//!
//! Files are written into a folder beside the target, which gets the target's name when it is
//! complete. `e10.json` in the target says what was written; a tree that lacks files of it is made
//! again. A folder without `e10.json` is somebody else's and is never touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{IMAGE_SIDE, Part, Sizes, VERSION, class_names, image};
use crate::{Error, Result};

const MANIFEST: &str = "e10.json";
/// An unfinished folder older than this belongs to a run that was killed.
const ABANDONED: Duration = Duration::from_secs(600);

/// What [`generate`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The images were written.
    Written,
    /// The same images were there already.
    AlreadyThere,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    set: String,
    generator_version: u32,
    seed: u64,
    images_per_class: Sizes,
    /// All images together; tells a tree that lost or gained some.
    bytes: u64,
}

/// Writes E10 to `dir` (`train/`, `val/` and `test/`), unless it is there already.
///
/// # Errors
/// [`Error::Layout`] where `dir` holds something else, [`Error::Io`] where it cannot be written,
/// [`Error::Config`] where a part would be empty.
pub fn generate(dir: &Path, seed: u64, sizes: Sizes) -> Result<Outcome> {
    if Part::ALL.iter().any(|part| part.count(sizes) == 0) {
        return Err(Error::Config(
            "the embedded set needs at least 1 image a class in each part".to_owned(),
        ));
    }
    let found = look_at(dir)?;
    if found.is_whole(dir, seed, sizes) {
        return Ok(Outcome::AlreadyThere);
    }

    let parent = parent_of(dir);
    std::fs::create_dir_all(&parent).map_err(Error::io(&parent, "make the folder"))?;
    remove_abandoned(&parent, dir);
    let work = beside(dir, &format!("partial-{}", std::process::id()));
    let written = write_tree(&work, seed, sizes).and_then(|()| match found {
        Found::Nothing => rename(&work, dir),
        Found::Ours(_) => replace(&work, dir),
    });
    if let Err(error) = written {
        let _ = std::fs::remove_dir_all(&work);
        // Another process may have finished the same set in the meantime.
        return match look_at(dir) {
            Ok(Found::Ours(Some(m))) if m == expected(seed, sizes, m.bytes) => {
                Ok(Outcome::AlreadyThere)
            }
            _ => Err(error),
        };
    }
    Ok(Outcome::Written)
}

/// Whether [`generate`] would find the whole set in `dir`; writes nothing.
///
/// # Errors
/// [`Error::Layout`] where `dir` holds something else, [`Error::Io`] where it cannot be read.
pub fn is_written(dir: &Path, seed: u64, sizes: Sizes) -> Result<bool> {
    Ok(look_at(dir)?.is_whole(dir, seed, sizes))
}

enum Found {
    /// Nothing, or an empty folder.
    Nothing,
    /// A folder with our manifest, readable or not.
    Ours(Option<Manifest>),
}

impl Found {
    fn is_whole(&self, dir: &Path, seed: u64, sizes: Sizes) -> bool {
        matches!(self, Self::Ours(Some(manifest))
            if *manifest == expected(seed, sizes, manifest.bytes)
                && size_on_disk(dir, sizes) == Some(manifest.bytes))
    }
}

fn look_at(dir: &Path) -> Result<Found> {
    let mut entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(Error::io(dir, "list the folder")(e)),
    };
    match std::fs::read_to_string(dir.join(MANIFEST)) {
        Ok(text) => Ok(Found::Ours(serde_json::from_str(&text).ok())),
        Err(_) if entries.next().is_none() => Ok(Found::Nothing),
        Err(_) => Err(Error::layout(
            dir,
            format!("the folder holds files but no {MANIFEST}, so it is not the embedded set"),
            "no folder, an empty one or an earlier embedded set: choose another place or move it away",
        )),
    }
}

fn expected(seed: u64, images_per_class: Sizes, bytes: u64) -> Manifest {
    Manifest {
        set: "E10".to_owned(),
        generator_version: VERSION,
        seed,
        images_per_class,
        bytes,
    }
}

/// Bytes of all images, or None where one is missing.
fn size_on_disk(dir: &Path, sizes: Sizes) -> Option<u64> {
    let sizes: Option<Vec<u64>> = image_paths(dir, sizes)
        .iter()
        .map(|(path, ..)| std::fs::metadata(path).ok().map(|meta| meta.len()))
        .collect();
    Some(sizes?.into_iter().sum())
}

/// Path, part, class and index of every image.
fn image_paths(dir: &Path, sizes: Sizes) -> Vec<(PathBuf, Part, usize, usize)> {
    let mut paths = Vec::new();
    for part in Part::ALL {
        for (class, name) in class_names().iter().enumerate() {
            let folder = dir.join(part.folder()).join(name);
            for index in 0..part.count(sizes) {
                paths.push((folder.join(format!("{index:04}.png")), part, class, index));
            }
        }
    }
    paths
}

fn write_tree(work: &Path, seed: u64, sizes: Sizes) -> Result<()> {
    if work.exists() {
        std::fs::remove_dir_all(work).map_err(Error::io(work, "remove the unfinished folder"))?;
    }
    for part in Part::ALL {
        for name in class_names() {
            let folder = work.join(part.folder()).join(name);
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder, "make the folder"))?;
        }
    }
    let written: Result<Vec<u64>> = image_paths(work, sizes)
        .par_iter()
        .map(|(path, part, class, index)| {
            let bytes = encode(&image(seed, *part, *class, *index)).map_err(|e| {
                Error::io(path, "encode the image")(std::io::Error::other(e.to_string()))
            })?;
            std::fs::write(path, &bytes).map_err(Error::io(path, "write the file"))?;
            Ok(bytes.len() as u64)
        })
        .collect();
    let manifest = expected(seed, sizes, written?.into_iter().sum());
    let path = work.join(MANIFEST);
    let text = serde_json::to_string_pretty(&manifest)
        .map_err(|e| Error::io(&path, "write the file")(e.into()))?;
    std::fs::write(&path, text + "\n").map_err(Error::io(&path, "write the file"))?;
    let sync = |path: &Path| std::fs::File::open(path).and_then(|f| f.sync_all());
    sync(&path).map_err(Error::io(&path, "write the file"))
}

/// PNG with stored (uncompressed) data: its bytes depend on no compressor's version.
fn encode(pixels: &[u8]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let side = IMAGE_SIDE as u32;
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::NoCompression);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// Puts the new tree where an old one is. The old one is out of the way before it is removed, so
/// the target is never half a tree.
fn replace(work: &Path, dir: &Path) -> Result<()> {
    let old = beside(dir, &format!("old-{}", std::process::id()));
    rename(dir, &old)?;
    rename(work, dir)?;
    std::fs::remove_dir_all(&old).map_err(Error::io(&old, "remove the replaced folder"))
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io(to, "put the finished folder in place"))
}

pub(crate) fn parent_of(dir: &Path) -> PathBuf {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A hidden folder beside `dir`, so that the final rename stays on one file system.
pub(crate) fn beside(dir: &Path, ending: &str) -> PathBuf {
    parent_of(dir).join(format!(".{}.{ending}", base_name(dir)))
}

fn base_name(dir: &Path) -> String {
    dir.file_name()
        .map_or_else(|| "e10".into(), |name| name.to_string_lossy().into_owned())
}

/// Removes what killed runs left beside `dir`. Best effort: leftovers do no harm.
pub(crate) fn remove_abandoned(parent: &Path, dir: &Path) {
    let prefixes = ["partial-", "old-"].map(|kind| format!(".{}.{kind}", base_name(dir)));
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let old = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED));
        if old && prefixes.iter().any(|prefix| name.starts_with(prefix)) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SMALL: Sizes = Sizes {
        train: 2,
        val: 1,
        test: 1,
    };

    #[test]
    fn written_once_then_found_and_repaired() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("e10");
        assert_eq!(generate(&dir, 1, SMALL).unwrap(), Outcome::Written);
        assert_eq!(generate(&dir, 1, SMALL).unwrap(), Outcome::AlreadyThere);
        assert!(is_written(&dir, 1, SMALL).unwrap());
        std::fs::remove_file(dir.join("val/01-23-45/0000.png")).unwrap();
        assert!(!is_written(&dir, 1, SMALL).unwrap());
        assert!(!dir.join("val/01-23-45/0000.png").exists());
        assert_eq!(generate(&dir, 1, SMALL).unwrap(), Outcome::Written);
        assert_eq!(generate(&dir, 2, SMALL).unwrap(), Outcome::Written);
        std::fs::write(dir.join(MANIFEST), "{").unwrap();
        assert_eq!(generate(&dir, 2, SMALL).unwrap(), Outcome::Written);
        let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn somebody_elses_folder_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("thesis.tex"), "x").unwrap();
        let error = generate(home.path(), 1, SMALL).unwrap_err().to_string();
        assert!(error.contains("not the embedded set"), "{error}");
        assert!(home.path().join("thesis.tex").exists());
    }

    #[test]
    fn an_empty_folder_is_filled_and_an_empty_part_refused() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(generate(home.path(), 1, SMALL).unwrap(), Outcome::Written);
        let none = Sizes { val: 0, ..SMALL };
        assert!(generate(&home.path().join("x"), 1, none).is_err());
    }
}
