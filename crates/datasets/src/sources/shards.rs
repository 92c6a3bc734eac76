//! Images in tar archives: one archive, or a folder of them (WebDataset's shards).
//!
//! The part of an archive is named by the folder it lies in (`train/0000.tar`), by a word of its own
//! name (`imagenet-val-0000.tar`), or by the first folder in it (`train/<class>/<image>`); without
//! any of these it is train. The class of an image is in a file beside it (`0001.jpg` and `0001.cls`,
//! as WebDataset writes them; numbers, or names), or it is the folder that the image lies in. A file
//! `classes.txt` in the folder that is given (or beside the one archive), one name a line, says what
//! numbers mean.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::folder::{has_class_folders, is_compressed, is_image_name, sub_folders};
use super::parts::{Labelled, Labels, PartName, listing};
use super::{ListOptions, Listing, Source, one_kind_of_labels};
use crate::formats::tar::Entry;
use crate::formats::tar_index::{entries, is_tar};
use crate::lines::{lines, read_list};
use crate::sample::Sample;
use crate::{Error, Result};

const LAYOUT: &str = "a .tar file, or a folder of .tar files (directly or in train/ and val/ or test/), \
                      with images and .cls files or with folders of classes in them";
/// Longest label in a `.cls` file.
const MAX_LABEL: u64 = 1024;

pub(crate) const SOURCE: Source = Source {
    name: "shards",
    layout: LAYOUT,
    recognises: |root| {
        !has_class_folders(root, "train")
            && archives(root).is_ok_and(|(found, _)| !found.is_empty())
    },
    list,
};

/// An archive, with the part that its folder names.
type Archive = (Option<PartName>, PathBuf);

/// Archives below the root, sorted by path, and compressed ones, which cannot be read.
fn archives(root: &Path) -> Result<(Vec<Archive>, Vec<PathBuf>)> {
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
    if !root.is_dir() {
        let is_one = name(root).is_some_and(|n| is_tar(&n)) && root.is_file();
        let found = is_one.then(|| (None, root.to_path_buf()));
        return Ok((Vec::from_iter(found), Vec::new()));
    }
    let (mut found, mut packed) = (Vec::new(), Vec::new());
    let mut look_in = |folder: &Path, part| -> Result<()> {
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list the folder"))? {
            let path = entry.map_err(Error::io(folder, "list the folder"))?.path();
            let is_packed = |name: &str| [".tar.", ".tgz"].iter().any(|e| name.contains(e));
            if is_compressed(&path) && name(&path).is_some_and(|n| is_packed(&n)) {
                packed.push(path);
                continue;
            }
            if name(&path).is_some_and(|n| is_tar(&n) && !n.starts_with('.')) && path.is_file() {
                found.push((part, path));
            }
        }
        Ok(())
    };
    look_in(root, None)?;
    for folder in sub_folders(root)? {
        if let Some(part) = PartName::of(&folder) {
            look_in(&root.join(&folder), Some(part))?;
        }
    }
    found.sort_by(|a, b| a.1.cmp(&b.1));
    Ok((found, packed))
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    let (archives, packed) = archives(root)?;
    // Some of the data must not be missing without a word.
    if let Some(packed) = packed.first() {
        let expected =
            "archives that are not: unpack it with gunzip, unxz or unzstd, or move it away";
        return Err(Error::layout(packed, "a compressed archive", expected));
    }
    if archives.is_empty() {
        return Err(Error::layout(root, "no tar archives here", LAYOUT));
    }
    let listed: Vec<Vec<Labelled>> = archives
        .par_iter()
        .map(|(part, path)| read(path, *part, entries(path, &options.cache)?))
        .collect::<Result<_>>()?;
    listing(
        root,
        listed.into_iter().flatten().collect(),
        class_names(root)?,
    )
}

fn class_names(root: &Path) -> Result<Option<Vec<String>>> {
    let folder = match root.is_dir() {
        true => root,
        false => root.parent().unwrap_or(root),
    };
    let path = folder.join("classes.txt");
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_list(&path)?;
    Ok(Some(
        lines(&text).map(|(_, line)| line.to_owned()).collect(),
    ))
}

/// The samples of one archive, sorted by name where classes are folders, in its order otherwise.
fn read(path: &Path, part: Option<PartName>, entries: Vec<Entry>) -> Result<Vec<Labelled>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let part = part.or_else(|| PartName::in_words_of(&name));
    let archive: Arc<Path> = path.into();
    let by_stem = class_files(path, &entries)?;
    let mut labels = Labels::default();
    let mut samples = Vec::new();
    for entry in entries {
        let name = entry.name;
        if !is_image_name(&name) || is_hidden(&name) {
            continue;
        }
        if !by_stem.is_empty() && name[stem(&name).len()..].matches('.').count() > 1 {
            // `b.seg.png` is another thing of the sample `b`, not an image of its own.
            continue;
        }
        let (first, below) = name.split_once('/').unwrap_or(("", &name));
        let inner = PartName::of(first).filter(|_| part.is_none() || PartName::of(first) == part);
        let below = if inner.is_some() { below } else { &name };
        let label = if by_stem.is_empty() {
            below.split_once('/').map(|(class, _)| class)
        } else {
            by_stem.get(stem(&name)).map(String::as_str)
        };
        let Some(label) = label else {
            let problem = match by_stem.is_empty() {
                true => format!("{name} lies in no folder and has no .cls file"),
                false => format!("there is no {}.cls beside {name}", stem(&name)),
            };
            return Err(Error::layout(path, problem, LAYOUT));
        };
        samples.push(Labelled {
            part: inner.or(part).unwrap_or(PartName::Train),
            label: labels.get(label),
            sample: Sample::piece(&archive, (entry.offset, entry.length), name, 0),
        });
    }
    if by_stem.is_empty() {
        samples.sort_by(|a, b| {
            let key = |s: &Labelled| (s.part, Arc::clone(&s.label));
            (key(a), &a.sample.name).cmp(&(key(b), &b.sample.name))
        });
    }
    Ok(samples)
}

fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.'))
}

/// WebDataset's key: the path without everything after the first dot of the last part.
fn stem(name: &str) -> &str {
    let file = name.rfind('/').map_or(0, |at| at + 1);
    let dot = name[file..].find('.');
    dot.map_or(name, |dot| &name[..file + dot])
}

/// Content of the `.cls` files by the stem of their names.
fn class_files(path: &Path, entries: &[Entry]) -> Result<HashMap<String, String>> {
    let wrong = |entry: &Entry, problem: String| {
        let problem = format!("{}: {problem}", entry.name);
        Error::layout(
            path,
            problem,
            "the number or name of a class in a .cls file",
        )
    };
    let mut found = HashMap::new();
    let mut file = None;
    for entry in entries.iter().filter(|entry| entry.name.ends_with(".cls")) {
        if entry.length > MAX_LABEL {
            return Err(wrong(entry, format!("a label of {} bytes", entry.length)));
        }
        let file = match &mut file {
            Some(file) => file,
            None => file.insert(File::open(path).map_err(Error::io(path, "read the archive"))?),
        };
        let mut bytes = vec![0; entry.length as usize];
        file.seek(SeekFrom::Start(entry.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(path, "read the archive"))?;
        let text = String::from_utf8(bytes).map_err(|_| wrong(entry, "not in UTF-8".to_owned()))?;
        let text = text.trim();
        if text.is_empty() || text.contains(char::is_control) {
            return Err(wrong(entry, format!("the label {text:?}")));
        }
        found.insert(stem(&entry.name).to_owned(), text.to_owned());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::formats::tar;
    use crate::sources::IndexCache;

    fn put(path: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let files: Vec<_> = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec()))
            .collect();
        std::fs::write(path, tar::write(&files).unwrap()).unwrap();
    }

    fn listed(root: &Path) -> Result<Listing> {
        let cache = IndexCache::Off;
        let options = ListOptions {
            cache,
            ..ListOptions::default()
        };
        assert!((SOURCE.recognises)(root));
        crate::list_with(root, &options)
    }

    fn names(samples: &[Sample]) -> Vec<(&str, u32)> {
        samples.iter().map(|s| (&*s.name, s.label)).collect()
    }

    #[test]
    fn shards_with_class_files() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        put(
            &at("x-train-1.tar"),
            &[
                ("b.cls", "1\n"),
                ("b.jpg", "B"),
                ("b.seg.png", "no"),
                ("b.json", "{}"),
            ],
        );
        put(
            &at("x-train-0.tar"),
            &[
                ("a.jpg", "AA"),
                ("a.cls", "0"),
                ("c.PNG", "C"),
                ("c.cls", "1"),
            ],
        );
        put(&at("x-val-0.tar"), &[("v/d.jpeg", "D"), ("v/d.cls", "0")]);
        std::fs::write(at("classes.txt"), "cat\ndog\n").unwrap();
        let found = listed(home.path()).unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        assert_eq!(
            names(&found.train),
            [("a.jpg", 0), ("c.PNG", 1), ("b.jpg", 1)]
        );
        assert_eq!(names(found.val.as_ref().unwrap()), [("v/d.jpeg", 0)]);
        let mut bytes = Vec::new();
        found.train[0].read(&mut bytes).unwrap();
        assert_eq!(bytes, b"AA");
        let path = found.train[0].path().display().to_string();
        assert!(path.ends_with("x-train-0.tar!a.jpg"), "{path}");
    }

    #[test]
    fn a_whole_image_folder_in_one_archive() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("set.tar");
        put(
            &path,
            &[
                ("./train/dog/2.jpg", ""),
                ("./train/cat/1.jpg", ""),
                ("./train/cat/._1.jpg", ""),
                ("./val/dog/3.jpg", ""),
                ("./README", ""),
            ],
        );
        let found = listed(&path).unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        assert_eq!(
            names(&found.train),
            [("train/cat/1.jpg", 0), ("train/dog/2.jpg", 1)]
        );
        assert_eq!(names(&found.val.unwrap()), [("val/dog/3.jpg", 1)]);
    }

    #[test]
    fn folders_name_parts() {
        let home = tempfile::tempdir().unwrap();
        put(
            &home.path().join("train/0.tar"),
            &[("a/1.jpg", ""), ("b/2.jpg", "")],
        );
        put(&home.path().join("test/0.tar"), &[("b/3.jpg", "")]);
        let found = listed(home.path()).unwrap();
        assert_eq!(names(&found.train), [("a/1.jpg", 0), ("b/2.jpg", 1)]);
        assert_eq!(names(&found.test.unwrap()), [("b/3.jpg", 1)]);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (files, part) in [
            (
                &[("a.jpg", ""), ("b.jpg", ""), ("b.cls", "1")][..],
                "no a.cls",
            ),
            (&[("a.jpg", "")], "a.jpg lies in no folder"),
            (&[("a.jpg", ""), ("a.cls", "")], "a.cls: the label"),
            (&[("a.txt", "")], "no images"),
        ] {
            let home = tempfile::tempdir().unwrap();
            put(&home.path().join("x.tar"), files);
            let error = listed(home.path()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
