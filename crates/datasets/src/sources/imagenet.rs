//! ImageNet-1k (ILSVRC 2012) as it comes: class folders of training images and all validation images
//! in one folder, whose classes a list of ground truth tells.
//!
//! Two layouts: `train/<wnid>/` and `val/` with the devkit beside them or around them, and Kaggle's
//! `ILSVRC/Data/CLS-LOC/` with `LOC_val_solution.csv`. Where `val/` has class folders it is the
//! layout of the folder source.
//!
//! Labels are positions in the sorted wnids, as in all published weights, not the numbers of the
//! devkit. Samples are called `val/<wnid>/<file>` wherever they lie, so that order and fingerprint
//! are those of the folder layout.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use super::folder::{part, same_classes, sub_folders};
use super::{ListOptions, Listing, Source, one_kind_of_labels};
use crate::formats::matlab::MatFile;
use crate::formats::tar::walk;
use crate::lines::{bad_line, lines, read_list, shown};
use crate::sample::{Root, Sample};
use crate::{Error, Result};

const LAYOUT: &str = "train/<wnid>/ and val/ILSVRC2012_val_00000001.JPEG with ILSVRC2012_devkit_t12/, or \
     ILSVRC/Data/CLS-LOC/ with LOC_val_solution.csv";
const KAGGLE: [&str; 2] = ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"];
const DEVKIT: &str = "ILSVRC2012_devkit_t12";
const META: &str = "meta.mat";
const TRUTH: &str = "ILSVRC2012_validation_ground_truth.txt";
const SOLUTION: &str = "LOC_val_solution.csv";
const MAPPING: &str = "LOC_synset_mapping.txt";
/// The devkit has 8 MB when it is unpacked.
const MAX_DEVKIT_BYTES: u64 = 64 << 20;
const VAL_PREFIX: &str = "ILSVRC2012_val_";

pub(crate) const SOURCE: Source = Source {
    name: "imagenet-1k",
    layout: LAYOUT,
    recognises: |root| base(root).is_some(),
    list,
};

/// The folder with `train` and `val`.
fn base(root: &Path) -> Option<PathBuf> {
    let mut kaggle = KAGGLE.iter().map(|folder| root.join(folder));
    let kaggle = kaggle.find(|base| base.join("train").is_dir());
    kaggle.or_else(|| {
        let ours = root.join("train").is_dir() && is_flat(&root.join("val"));
        ours.then(|| root.to_path_buf())
    })
}

/// Whether validation images lie directly in a folder, and no class folders do, going by its first
/// thousand entries.
fn is_flat(val: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(val) else {
        return false;
    };
    let mut images = false;
    for entry in entries.flatten().take(1000) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(VAL_PREFIX) {
            images = true;
        } else if !name.starts_with('.') && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            return false;
        }
    }
    images
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    let base = base(root).ok_or_else(|| Error::layout(root, "no ImageNet here", LAYOUT))?;
    // The owner of the folder decides what lies in it; lists give plain file names only.
    let files = Root::new(&base);
    let train_dir = base.join("train");
    let classes = sub_folders(&train_dir)?;
    let val = validation(&base, &classes, &train_dir)?;
    let train = part(&files, &train_dir, &classes)?;
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val,
        test: None,
    })
}

/// The validation images in `val/`, with class folders or without, if that folder is there. `train` is
/// named where its classes are not those of the ground truth.
pub(crate) fn validation(
    base: &Path,
    classes: &[String],
    train: &Path,
) -> Result<Option<Vec<Sample>>> {
    let files = Root::new(base);
    let dir = base.join("val");
    if is_flat(&dir) {
        let truth = ground_truth(base)?.of_classes(classes, train)?;
        let samples = truth.samples(&dir, |file, name, label| {
            Some(Sample::file_at(&files, &format!("val/{file}"), name, label))
        });
        return samples.map(Some);
    }
    if !dir.is_dir() {
        return Ok(None);
    }
    same_classes(classes, &sub_folders(&dir)?, &dir)?;
    part(&files, &dir, classes).map(Some)
}

/// What the validation images show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroundTruth {
    /// The classes in label order: sorted.
    pub(crate) wnids: Vec<String>,
    /// File name and label of each image, by label and name.
    pub(crate) val: Vec<(Box<str>, u32)>,
}

/// The ground truth beside, above or below the folder with `train` and `val`: from the unpacked devkit
/// or from Kaggle's list.
///
/// # Errors
/// [`Error::Layout`] that says what is missing where; those of reading the files.
pub(crate) fn ground_truth(base: &Path) -> Result<GroundTruth> {
    let mut places = vec![base.to_path_buf(), above(base)];
    if base.ends_with(KAGGLE[1]) {
        places.push(above(&places[1]));
        places.push(above(&places[2]));
    }
    for place in &places {
        let devkit = place.join(DEVKIT).join("data");
        if devkit.join(TRUTH).is_file() {
            let path = devkit.join(TRUTH);
            return from_devkit(
                &MatFile::open(&devkit.join(META))?,
                &read_list(&path)?,
                &path,
            );
        }
        if place.join(SOLUTION).is_file() {
            return from_kaggle(place);
        }
    }
    let packed = format!("{DEVKIT}.tar.gz");
    let mut packed = places.iter().map(|p| p.join(&packed));
    if let Some(packed) = packed.find(|p| p.is_file()) {
        return from_packed_devkit(&packed);
    }
    let advice = format!(
        "{DEVKIT}.tar.gz or {DEVKIT}/ or {SOLUTION} in {}, or class folders in val",
        base.display()
    );
    let problem =
        "validation images without class folders, and no ground truth that tells their classes";
    Err(Error::layout(base, problem, advice))
}

/// The two files of the devkit, out of its archive.
fn from_packed_devkit(path: &Path) -> Result<GroundTruth> {
    let expected = format!("{DEVKIT}.tar.gz as it comes: fetch it again");
    let broken = |problem: String| Error::layout(path, problem, &expected);
    let file = File::open(path).map_err(Error::io(path, "read the archive"))?;
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(file)
        .take(MAX_DEVKIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| broken(format!("it cannot be unpacked ({e})")))?;
    let size = bytes.len() as u64;
    if size > MAX_DEVKIT_BYTES {
        return Err(broken(format!("more than {} MiB", MAX_DEVKIT_BYTES >> 20)));
    }
    let (mut meta, mut truth) = (None, None);
    walk(&mut Cursor::new(&bytes), (0, size), &mut |entry| {
        let content = || &bytes[entry.offset as usize..(entry.offset + entry.length) as usize];
        if entry.name.ends_with(META) {
            meta = Some(content());
        } else if entry.name.ends_with(TRUTH) {
            truth = Some(content());
        }
        Ok(())
    })
    .map_err(&broken)?;
    let missing = |name: &str| broken(format!("no {name} in it"));
    let meta = meta.ok_or_else(|| missing(META))?;
    let truth = truth.ok_or_else(|| missing(TRUTH))?;
    let truth = str::from_utf8(truth).map_err(|_| broken(format!("{TRUTH} is no text")))?;
    from_devkit(&MatFile::parse(meta, path)?, truth, path)
}

fn above(path: &Path) -> PathBuf {
    match (path.file_name(), path.parent()) {
        (Some(_), Some(parent)) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => path.join(".."),
    }
}

/// From `meta.mat` and the list with a number of the devkit (from 1) on each line.
///
/// # Errors
/// [`Error::Layout`] for a file that does not hold what it should, with row or line.
pub(crate) fn from_devkit(meta: &MatFile, truth: &str, path: &Path) -> Result<GroundTruth> {
    let by_id = classes(meta)?;
    let mut order: Vec<usize> = (0..by_id.len()).collect();
    order.sort_by_key(|&i| &by_id[i]);
    let mut labels = vec![0; by_id.len()];
    for (label, &i) in (0..).zip(&order) {
        labels[i] = label;
    }
    let mut val = Vec::new();
    for (image, (number, line)) in (1..).zip(lines(truth)) {
        let id = line
            .parse()
            .ok()
            .filter(|id| (1..=labels.len()).contains(id));
        let id = id.ok_or_else(|| {
            let expected = format!("a number from 1 to {} on each line", labels.len());
            bad_line(path, number, &shown(line), &expected)
        })?;
        val.push((
            format!("{VAL_PREFIX}{image:08}.JPEG").into(),
            labels[id - 1],
        ));
    }
    let wnids = order.into_iter().map(|i| by_id[i].clone()).collect();
    Ok(GroundTruth::new(wnids, val))
}

/// The classes of `meta.mat` in the order of the devkit's numbers: the synsets without children.
///
/// # Errors
/// [`Error::Layout`] with row and field for what is not as it should be.
fn classes(meta: &MatFile) -> Result<Vec<String>> {
    let mut classes = Vec::new();
    let rows = meta.variable("synsets")?.rows()?;
    let count = rows.len() as u32;
    for row in rows {
        if row.number("num_children")? != 0.0 {
            continue;
        }
        let wnid = row.text("WNID")?;
        if !is_wnid(wnid) {
            return Err(row.wrong("WNID", shown(wnid), "n and eight digits"));
        }
        let id = row.integer("ILSVRC2012_ID", 1..=count)?;
        if id as usize != classes.len() + 1 {
            let expected = format!("classes numbered in order, {} here", classes.len() + 1);
            return Err(row.wrong("ILSVRC2012_ID", id, &expected));
        }
        classes.push(wnid.to_owned());
    }
    Ok(classes)
}

/// `n01440764`: a number of WordNet, safe as a folder name.
fn is_wnid(text: &str) -> bool {
    text.len() == 9 && text.starts_with('n') && text[1..].bytes().all(|b| b.is_ascii_digit())
}

/// From `LOC_val_solution.csv` (`ImageId,PredictionString`, the latter being wnid and box of each object)
/// and `LOC_synset_mapping.txt` (a wnid and its words on each line).
fn from_kaggle(folder: &Path) -> Result<GroundTruth> {
    let path = folder.join(MAPPING);
    let mut wnids = Vec::new();
    for (number, line) in lines(&read_list(&path)?) {
        let wnid = line.split_whitespace().next().filter(|w| is_wnid(w));
        let bad = || bad_line(&path, number, &shown(line), "<wnid> <words>");
        wnids.push(wnid.ok_or_else(bad)?.to_owned());
    }
    wnids.sort();
    wnids.dedup();

    let path = folder.join(SOLUTION);
    let mut val: Vec<(Box<str>, u32)> = Vec::new();
    for (number, line) in lines(&read_list(&path)?) {
        if line.starts_with("ImageId,") {
            continue;
        }
        let bad = |expected: &str| bad_line(&path, number, &shown(line), expected);
        let (image, objects) = line.split_once(',').unwrap_or((line, ""));
        let plain = image
            .strip_prefix(VAL_PREFIX)
            .is_some_and(|n| (1..=8).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit()));
        if !plain {
            return Err(bad("ILSVRC2012_val_<number>,<wnid> <box>"));
        }
        let wnid = objects
            .trim_matches('"')
            .split_whitespace()
            .next()
            .unwrap_or("");
        let label = wnids.binary_search_by(|w| w.as_str().cmp(wnid));
        let label = label.map_err(|_| bad(&format!("a wnid of {MAPPING} after the comma")))?;
        val.push((format!("{image}.JPEG").into(), label as u32));
    }
    let truth = GroundTruth::new(wnids, val);
    let mut names: Vec<&str> = truth.val.iter().map(|(name, _)| &**name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let problem = format!("{} is listed twice", twice[0]);
        return Err(Error::layout(path, problem, "each image once"));
    }
    Ok(truth)
}

impl GroundTruth {
    /// A sample for each image, by label and name, from its file name, its name and its label.
    ///
    /// # Errors
    /// [`Error::Layout`] where there are no images, or `sample` knows none of a name in `place`.
    pub(crate) fn samples(
        &self,
        place: &Path,
        mut sample: impl FnMut(&str, String, u32) -> Option<Sample>,
    ) -> Result<Vec<Sample>> {
        if self.val.is_empty() {
            let problem = "the ground truth lists no images";
            return Err(Error::layout(place, problem, "a line an image"));
        }
        let one = |(file, label): &(Box<str>, u32)| {
            let name = format!("val/{}/{file}", self.wnids[*label as usize]);
            sample(file, name, *label).ok_or_else(|| {
                let problem = format!("{file} is not in it, but in the ground truth");
                Error::layout(place, problem, "all validation images: fetch it again")
            })
        };
        self.val.iter().map(one).collect()
    }

    /// That of a set with some of the classes only, numbered as there (ImageNet-100).
    ///
    /// # Errors
    /// [`Error::Layout`] with `place`, where the classes lie, for those that ImageNet does not have.
    pub(crate) fn of_classes(self, classes: &[String], place: &Path) -> Result<Self> {
        let mut labels = vec![None; self.wnids.len()];
        for (label, class) in (0..).zip(classes) {
            let known = self.wnids.binary_search(class).map_err(|_| {
                let problem = format!("the class {class} is none of the ground truth");
                Error::layout(
                    place,
                    problem,
                    format!("classes of its {}", self.wnids.len()),
                )
            })?;
            labels[known] = Some(label);
        }
        if classes.len() < self.wnids.len() {
            tracing::warn!(
                "{}: {} of {} classes, numbered from 0 among themselves: not as in weights for all",
                place.display(),
                classes.len(),
                self.wnids.len()
            );
        }
        let val = self.val.into_iter();
        let val = val.filter_map(|(file, label)| Some((file, labels[label as usize]?)));
        Ok(Self::new(classes.to_vec(), val.collect()))
    }

    fn new(wnids: Vec<String>, mut val: Vec<(Box<str>, u32)>) -> Self {
        val.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        Self { wnids, val }
    }
}
