//! The ImageFolder layout: `train/<class>/<image>` and held-out parts beside `train`.
//!
//! Parts are `train`, `val` (also `valid`, `validation`) and `test`. Without any of those, class
//! folders directly under the root are taken as `train`. Classes are the folder names of `train`
//! in byte order; every other part must have the same. Inside a class folder, images may lie in
//! sub-folders. Hidden files and files that are not named like an image are passed over; what an
//! image really is, its content decides when it is decoded.

use std::path::{Path, PathBuf};

use super::{Listing, Source, one_kind_of_labels};
use crate::sample::{Root, Sample};
use crate::{Error, Result};

/// File name endings that count as images. Formats that cannot be decoded are listed too, so that
/// such a file is an error that names it instead of silently missing from the set.
const IMAGE_EXTENSIONS: [&str; 11] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm",
];
/// Names of the validation part, the usual one first.
const VAL_NAMES: [&str; 3] = ["val", "valid", "validation"];
/// Sub-folders inside a class folder are followed this deep (a link to a parent must not loop).
pub(crate) const MAX_DEPTH: usize = 6;
const LAYOUT: &str = "train/<class>/<image>.jpg|png, beside it val/ or test/ with the same classes";

/// This layout; the one for whatever no other source recognises.
pub(crate) const SOURCE: Source = Source {
    name: "folder",
    layout: LAYOUT,
    recognises: |_| true,
    list: |root, options| {
        one_kind_of_labels(options, "a folder")?;
        image_folder(root)
    },
};

/// Lists an ImageFolder tree; no image is opened.
///
/// # Errors
/// [`Error::Layout`] or [`Error::Io`] with the path where the folder is missing, empty, unreadable,
/// without classes or images, or where the parts have different classes.
pub fn image_folder(root: &Path) -> Result<Listing> {
    let meta = match std::fs::metadata(root) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::layout(
                root,
                "no such folder",
                format!("a folder with {LAYOUT}: check the path"),
            ));
        }
        Err(e) => return Err(Error::io(root, "look at the folder")(e)),
    };
    if !meta.is_dir() {
        return Err(Error::layout(
            root,
            match is_compressed(root) {
                true => "this is a compressed archive",
                false => "this is a file",
            },
            format!(
                "a folder with {LAYOUT}, a .tar archive (unpacked by gunzip), or a list (.csv, .tsv, .txt)"
            ),
        ));
    }
    let folders = sub_folders(root)?;
    // Train or TRAIN is as good, and must not be taken for a class.
    let named = |name: &str| {
        let exactly = folders.iter().find(|f| *f == name);
        exactly.or_else(|| folders.iter().find(|f| f.eq_ignore_ascii_case(name)))
    };
    let has = |name: &str| named(name).is_some();
    let vals: Vec<&str> = VAL_NAMES
        .into_iter()
        .filter_map(named)
        .map(String::as_str)
        .collect();
    if vals.len() > 1 {
        return Err(Error::layout(
            root,
            format!("more than one validation folder ({})", vals.join(", ")),
            "one of val, valid, validation: rename or remove the others",
        ));
    }
    let val = vals.first().copied();

    let train_root = if let Some(train) = named("train") {
        let known = ["train", "test"].into_iter().chain(VAL_NAMES);
        let known: Vec<&String> = known.filter_map(named).collect();
        for other in folders.iter().filter(|folder| !known.contains(folder)) {
            tracing::warn!(
                "{}: passed over, it is no part that is known",
                root.join(other).display()
            );
        }
        root.join(train)
    } else if val.is_some() || has("test") {
        return Err(Error::layout(
            root,
            "there is no train folder",
            format!("{LAYOUT}: name the folder of the training images train"),
        ));
    } else if folders.is_empty() {
        return Err(Error::layout(
            root,
            "the folder holds no folders",
            format!("{LAYOUT}: point at the folder that holds train"),
        ));
    } else if let Some(inner) = folders.iter().find(|f| root.join(f).join("train").is_dir()) {
        return Err(Error::layout(
            root,
            format!("there is no train folder here, but {inner}/ holds one"),
            format!("{LAYOUT}: point at the folder that holds train"),
        ));
    } else {
        root.to_path_buf()
    };

    let classes = sub_folders(&train_root)?;
    if classes.is_empty() {
        return Err(Error::layout(
            train_root,
            "no class folders here",
            "one folder of images a class: train/<class>/<image>",
        ));
    }
    if classes.len() < 2 {
        return Err(Error::layout(
            train_root,
            format!("only one class folder ({})", classes[0]),
            "at least two classes: train/<class>/<image>",
        ));
    }
    let files = Root::new(root);
    let train = part(&files, &train_root, &classes)?;
    let held_out = |name: Option<&str>| -> Result<Option<Vec<Sample>>> {
        let Some(name) = name else { return Ok(None) };
        let dir = root.join(name);
        same_classes(&classes, &sub_folders(&dir)?, &dir)?;
        Ok(Some(part(&files, &dir, &classes)?))
    };
    let (val, test) = (held_out(val)?, held_out(named("test").map(String::as_str))?);
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val,
        test,
    })
}

/// All images of one part, class by class.
pub(crate) fn part(root: &Root, dir: &Path, classes: &[String]) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for (label, class) in classes.iter().enumerate() {
        let class_dir = dir.join(class);
        let mut files = Vec::new();
        let mut passed_over = 0;
        collect(&class_dir, MAX_DEPTH, &mut files, &mut passed_over)?;
        if files.is_empty() {
            let problem = match passed_over {
                0 => "no images in this class folder".to_owned(),
                n => format!("no images in this class folder, only {n} files of other kinds"),
            };
            return Err(Error::layout(
                class_dir,
                problem,
                "at least one .jpg, .jpeg or .png file a class: add images or remove the class from every part",
            ));
        }
        let first = samples.len();
        for path in files {
            let name = relative_name(root.path(), &path)?;
            samples.push(Sample::file(root, name, label as u32));
        }
        samples[first..].sort_by(|a, b| a.name.cmp(&b.name));
        tracing::trace!(class, images = samples.len() - first, passed_over);
    }
    Ok(samples)
}

/// Image files below `dir`, hidden ones left out, in no particular order.
pub(crate) fn collect(
    dir: &Path,
    depth: usize,
    files: &mut Vec<PathBuf>,
    other: &mut usize,
) -> Result<()> {
    for Entry { name, path, kind } in entries(dir)? {
        match kind {
            Kind::Folder if depth == 0 => {
                return Err(Error::layout(
                    path,
                    "folders are nested too deeply here, or a link leads back",
                    format!("images at most {MAX_DEPTH} folders below their class folder"),
                ));
            }
            Kind::Folder => collect(&path, depth - 1, files, other)?,
            Kind::File if is_image_name(&name) => files.push(path),
            _ => *other += 1,
        }
    }
    Ok(())
}

/// Whether class folders lie in a part of the folder: what else lies there is beside the point.
pub(crate) fn has_class_folders(root: &Path, part: &str) -> bool {
    sub_folders(&root.join(part)).is_ok_and(|folders| !folders.is_empty())
}

/// Whether the name is that of a compressed archive.
pub(crate) fn is_compressed(path: &Path) -> bool {
    let ending = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    let endings = ["gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar"];
    endings.iter().any(|e| e.eq_ignore_ascii_case(ending))
}

pub(crate) fn is_image_name(name: &str) -> bool {
    Path::new(name)
        .extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| IMAGE_EXTENSIONS.iter().any(|i| i.eq_ignore_ascii_case(e)))
}

/// Names of the folders directly under `dir`, in byte order, hidden ones left out.
pub(crate) fn sub_folders(dir: &Path) -> Result<Vec<String>> {
    let folders = entries(dir)?.into_iter();
    let folders = folders.filter(|entry| entry.kind == Kind::Folder);
    let mut names: Vec<String> = folders.map(|entry| entry.name).collect();
    names.sort();
    Ok(names)
}

struct Entry {
    name: String,
    path: PathBuf,
    kind: Kind,
}

#[derive(PartialEq)]
enum Kind {
    Folder,
    File,
    Other,
}

/// What lies in `dir`, hidden entries left out.
fn entries(dir: &Path) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir, "list the folder"))? {
        let entry = entry.map_err(Error::io(dir, "list the folder"))?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return Err(Error::layout(
                path,
                "the name is not valid UTF-8",
                "names in UTF-8: rename it",
            ));
        };
        if name.starts_with('.') {
            continue;
        }
        // The folder knows what its entries are; only a link, which may stand for a file or a folder,
        // must be looked at. With a million files that is most of the time.
        let mut kind = entry
            .file_type()
            .map_err(Error::io(&path, "look at the file"))?;
        if kind.is_symlink() {
            let meta = std::fs::metadata(&path).map_err(|e| {
                let problem = format!("a link that leads nowhere ({e})");
                Error::layout(
                    &path,
                    problem,
                    "links to files or folders: mend or remove it",
                )
            })?;
            kind = meta.file_type();
        }
        let kind = if kind.is_dir() {
            Kind::Folder
        } else if kind.is_file() {
            Kind::File
        } else {
            Kind::Other
        };
        found.push(Entry { name, path, kind });
    }
    Ok(found)
}

fn relative_name(root: &Path, path: &Path) -> Result<String> {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Option<Vec<&str>> = below.iter().map(|part| part.to_str()).collect();
    parts
        .map(|parts| parts.join("/"))
        .ok_or_else(|| Error::layout(path, "the name is not valid UTF-8", "names in UTF-8"))
}

pub(crate) fn same_classes(train: &[String], found: &[String], dir: &Path) -> Result<()> {
    let missing: Vec<&str> = difference(train, found);
    let extra: Vec<&str> = difference(found, train);
    if missing.is_empty() && extra.is_empty() {
        return Ok(());
    }
    let mut problems = Vec::new();
    if !missing.is_empty() {
        problems.push(format!("lacks the class folders {}", a_few(&missing)));
    }
    if !extra.is_empty() {
        problems.push(format!(
            "has class folders that train lacks: {}",
            a_few(&extra)
        ));
    }
    Err(Error::layout(
        dir,
        problems.join(" and "),
        format!("the {} classes of train in every part", train.len()),
    ))
}

fn difference<'a>(a: &'a [String], b: &[String]) -> Vec<&'a str> {
    a.iter()
        .filter(|name| b.binary_search(name).is_err())
        .map(String::as_str)
        .collect()
}

fn a_few(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
