//! Whether a data set on disk is whole: its layout, its counts, its images, its files' checksums.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::manifest::{Checksum, Manifest};
use crate::miniature::MINIATURES;
use crate::sample::Sample;
use crate::set::hex;
use crate::sources::{ListOptions, Listing, SOURCES, recognise};
use crate::{Error, Result};

/// So many examples of each finding are named.
const EXAMPLES: usize = 5;

/// How thoroughly to look. [`Level::Checksum`] stands alone, each other level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Lists and folders can be read, and the classes are the expected ones.
    Layout,
    /// Every listed image is there, and their numbers are the expected ones.
    Count,
    /// Every image can be decoded.
    Decode,
    /// Archives and lists that lie in the folder or beside it have the known checksums.
    Checksum,
}

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is done: "looking for files", "decoding", "hashing".
    pub step: &'static str,
    /// Images or, where files are hashed, bytes that are done.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the data set was said to be.
    pub name: String,
    /// The folder that was looked at.
    pub root: PathBuf,
    /// How thoroughly.
    pub level: Level,
    /// Name of the layout in which it lies; none where it could not be listed.
    pub layout: Option<&'static str>,
    /// Number of classes.
    pub classes: usize,
    /// Number of listed images in each part.
    pub found: BTreeMap<String, usize>,
    /// Number of images that each part must have, where that is known.
    pub expected: Option<BTreeMap<String, usize>>,
    /// Files whose checksum was right.
    pub matching_files: Vec<String>,
    /// What is wrong; empty for a whole set.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.findings.is_empty()
    }
}

/// One thing that is wrong, with a few examples of where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub kind: Kind,
    /// A sentence.
    pub problem: String,
    /// How often; 1 where it is about the whole set.
    pub count: usize,
    /// The first of them.
    pub examples: Vec<String>,
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The set could not be listed.
    Layout,
    /// Classes that lack or are too many, or another order of classes.
    Classes,
    /// Another number of images in a part.
    Count,
    /// Another number of images in classes of a part.
    ClassCount,
    /// Images that are in two parts or listed twice.
    Twice,
    /// Listed files that are not there, or that lie outside of the folder of their list.
    MissingFile,
    /// Images that cannot be decoded.
    BrokenImage,
    /// Files with another checksum, or none to check.
    Checksum,
}

impl Finding {
    fn new(kind: Kind, problem: impl Into<String>) -> Self {
        Self {
            kind,
            problem: problem.into(),
            count: 1,
            examples: Vec::new(),
        }
    }

    /// A finding about each of `items`; none where there are none.
    fn about(
        kind: Kind,
        problem: impl Into<String>,
        items: impl IntoIterator<IntoIter: ExactSizeIterator<Item = String>>,
    ) -> Option<Self> {
        let items = items.into_iter();
        (items.len() > 0).then(|| Self {
            kind,
            problem: problem.into(),
            count: items.len(),
            examples: items.take(EXAMPLES).collect(),
        })
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.problem)?;
        if !self.examples.is_empty() {
            write!(f, ": {}", self.examples.join("; "))?;
            match self.count - self.examples.len() {
                0 => {}
                more => write!(f, "; and {more} more")?,
            }
        }
        Ok(())
    }
}

/// Looks whether the folder `dir` holds the whole data set `name`: one with a [`Manifest`], or any
/// [`crate::Source`] (also `folder`), of which numbers are reported and every listed image is looked for.
/// `progress` is called from many threads and for every image, so it should be quick.
///
/// # Errors
/// [`Error::Config`] for a name that is not known, and for [`Level::Checksum`] where no checksums are.
/// What is wrong with the data itself stands in the report.
pub fn verify(
    name: &str,
    dir: &Path,
    level: Level,
    options: &ListOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report> {
    // Also what miniatures are called.
    let name = match MINIATURES.iter().find(|miniature| miniature.name == name) {
        Some(miniature) => miniature.source,
        None => name,
    };
    let manifest = Manifest::of(name)?;
    if manifest.is_none() && SOURCES.iter().all(|source| source.name != name) {
        let names: Vec<&str> = SOURCES.iter().map(|source| source.name).collect();
        let names = names.join(", ");
        return Err(Error::Config(format!(
            "no data set {name:?}; known are: {names}"
        )));
    }
    verify_against(name, manifest.as_ref(), dir, level, options, progress)
}

/// As [`verify`], with expectations of your own; without any, only what lies there is looked at.
///
/// # Errors
/// As [`verify`].
pub fn verify_against(
    name: &str,
    manifest: Option<&Manifest>,
    dir: &Path,
    level: Level,
    options: &ListOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report> {
    // The kind of labels that the expected classes are about.
    let same_labels = |m: &&Manifest| options.labels.is_none() || options.labels == m.labels;
    let classes = manifest.filter(same_labels);
    let mut report = Report {
        name: name.to_owned(),
        root: dir.to_path_buf(),
        level,
        layout: None,
        classes: 0,
        found: BTreeMap::new(),
        expected: manifest.map(Manifest::parts),
        matching_files: Vec::new(),
        findings: Vec::new(),
    };
    if level == Level::Checksum {
        let checksums = manifest.map_or(&[][..], |manifest| &manifest.checksums);
        if checksums.is_empty() {
            return Err(Error::Config(format!("no checksums of {name} are known")));
        }
        report.check_hashes(checksums, progress);
        return Ok(report);
    }
    let listing = match list(name, dir, options) {
        Ok((layout, listing)) => {
            report.layout = Some(layout);
            report.check_layout(manifest.is_some());
            listing
        }
        // Settings are the caller's.
        Err(error @ Error::Config(_)) => return Err(error),
        Err(error) => {
            report
                .findings
                .push(Finding::new(Kind::Layout, error.to_string()));
            return Ok(report);
        }
    };
    report.classes = listing.classes.len();
    report.found = listing
        .parts()
        .map(|(part, samples)| (part.to_owned(), samples.len()))
        .collect();
    if let Some(classes) = classes {
        report.check_classes(&listing, classes);
    }
    if level >= Level::Count {
        if let Some(classes) = classes {
            report.check_class_counts(&listing, classes);
        }
        report.check_counts();
        report.check_twice(&listing);
        let there = report.check_files(&listing, progress);
        if level >= Level::Decode {
            report.check_images(&there, progress);
        }
    }
    Ok(report)
}

/// Name of the layout, and what is listed. The layout that the name stands for goes before others,
/// in which the same set may lie as well.
fn list(name: &str, dir: &Path, options: &ListOptions) -> Result<(&'static str, Listing)> {
    let named = SOURCES.iter().find(|source| source.name == name);
    let source = named
        .filter(|source| (source.recognises)(dir))
        .or_else(|| recognise(dir));
    let layout = named.map_or("a known layout", |source| source.layout);
    let source = source.ok_or_else(|| Error::layout(dir, format!("no {name} here"), layout))?;
    match (source.list)(dir, options) {
        Ok(listing) => Ok((source.name, listing)),
        // The complaint of a layout that was only the last resort would mislead.
        Err(Error::Layout { path, problem, .. }) if source.name != name => {
            Err(Error::layout(path, problem, format!("{name}: {layout}")))
        }
        Err(error) => Err(error),
    }
}

impl Report {
    /// A known set may also lie in a layout of no particular set; what is called by its layout may not.
    fn check_layout(&mut self, is_known: bool) {
        let anybodys = ["folder", "list", "shards"];
        let Some(layout) = self.layout else { return };
        let fits = layout == self.name
            || is_known && anybodys.contains(&layout)
            || self.name == "imagenet-1k" && layout == "imagenet-archives";
        if !fits {
            let problem = format!("this lies here as {layout}, not as {}", self.name);
            self.findings.push(Finding::new(Kind::Layout, problem));
        }
    }

    /// The same file in two parts, or twice: what is trained on must not be reported on.
    fn check_twice(&mut self, listing: &Listing) {
        let mut all: Vec<(PathBuf, &str, u32)> = listing
            .parts()
            .flat_map(|(part, samples)| samples.iter().map(move |s| (s.path(), part, s.label)))
            .collect();
        all.par_sort_unstable();
        let twice = all.windows(2).filter(|pair| pair[0].0 == pair[1].0);
        let (mut leaks, mut repeats) = (Vec::new(), Vec::new());
        for pair in twice {
            let ((path, part, label), (_, other, other_label)) = (&pair[0], &pair[1]);
            match (part == other, label == other_label) {
                (false, _) => leaks.push(format!("{} in {part} and {other}", path.display())),
                (true, false) => repeats.push(format!("{} with two labels", path.display())),
                (true, true) => repeats.push(path.display().to_string()),
            }
        }
        let problem = format!("{} images are in more than one part", leaks.len());
        self.findings
            .extend(Finding::about(Kind::Twice, problem, leaks));
        let problem = format!("{} images are listed twice", repeats.len());
        self.findings
            .extend(Finding::about(Kind::Twice, problem, repeats));
    }

    fn check_classes(&mut self, listing: &Listing, manifest: &Manifest) {
        let expected: Vec<&String> = manifest.classes.iter().map(|(class, _)| class).collect();
        let found: Vec<&String> = listing.classes.iter().collect();
        let without = |all: &[&String], known: &[&String]| -> Vec<String> {
            let known: std::collections::HashSet<_> = known.iter().collect();
            let missing = all.iter().filter(|class| !known.contains(class));
            missing.map(|class| (*class).clone()).collect()
        };
        let (missing, extra) = (without(&expected, &found), without(&found, &expected));
        if missing.is_empty() && extra.is_empty() && found != expected {
            let problem = "the classes are in another order, so labels mean something else than in published weights";
            self.findings.push(Finding::new(Kind::Classes, problem));
        }
        let count = |n: usize, what: &str| format!("{n} of {} classes {what}", expected.len());
        let missing_problem = count(missing.len(), "are missing");
        self.findings
            .extend(Finding::about(Kind::Classes, missing_problem, missing));
        let extra_problem = format!("{} classes do not belong to it", extra.len());
        self.findings
            .extend(Finding::about(Kind::Classes, extra_problem, extra));
    }

    fn check_counts(&mut self) {
        let Some(expected) = &self.expected else {
            return;
        };
        let mut names: Vec<&String> = self.found.keys().chain(expected.keys()).collect();
        names.sort();
        names.dedup();
        for part in names {
            let count = |counts: &BTreeMap<String, usize>| counts.get(part).copied().unwrap_or(0);
            let (found, expected) = (count(&self.found), count(expected));
            if found != expected {
                let problem = format!("{part}: {found} images instead of {expected}");
                self.findings.push(Finding::new(Kind::Count, problem));
            }
        }
    }

    /// Only of classes that are on both sides.
    fn check_class_counts(&mut self, listing: &Listing, manifest: &Manifest) {
        let counts: HashMap<&str, &BTreeMap<String, usize>> = manifest
            .classes
            .iter()
            .map(|(class, counts)| (class.as_str(), counts))
            .collect();
        for (part, samples) in listing.parts() {
            let mut found = vec![0; listing.classes.len()];
            for sample in samples {
                if let Some(count) = found.get_mut(sample.label as usize) {
                    *count += 1;
                }
            }
            let off = listing
                .classes
                .iter()
                .zip(found)
                .filter_map(|(class, found)| {
                    let expected = *counts.get(class.as_str())?.get(part)?;
                    let text = format!("{class} {found} instead of {expected}");
                    (found != expected).then_some(text)
                });
            let off: Vec<String> = off.collect();
            let problem = format!(
                "{part}: {} classes with another number of images",
                off.len()
            );
            self.findings
                .extend(Finding::about(Kind::ClassCount, problem, off));
        }
    }

    /// The samples whose files are there.
    fn check_files<'a>(
        &mut self,
        listing: &'a Listing,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Vec<&'a Sample> {
        let all: Vec<&Sample> = listing.parts().flat_map(|(_, samples)| samples).collect();
        let step = Step::new("looking for files", all.len() as u64, progress);
        let look = |sample: &&'a Sample| {
            let is_there = sample.is_there();
            step.advance(1);
            is_there
        };
        let (there, absent): (Vec<&Sample>, Vec<&Sample>) = all.into_par_iter().partition(look);
        let problem = format!("{} of the listed images are not there", absent.len());
        let absent = absent
            .iter()
            .map(|sample| sample.path().display().to_string());
        self.findings
            .extend(Finding::about(Kind::MissingFile, problem, absent));
        there
    }

    fn check_images(&mut self, samples: &[&Sample], progress: &(dyn Fn(Progress) + Sync)) {
        let step = Step::new("decoding", samples.len() as u64, progress);
        let complaint = |sample: &&Sample| {
            let complaint = sample.decode().err().map(|error| error.to_string());
            step.advance(1);
            complaint
        };
        let broken: Vec<String> = samples.par_iter().filter_map(complaint).collect();
        let problem = format!("{} images cannot be decoded", broken.len());
        self.findings
            .extend(Finding::about(Kind::BrokenImage, problem, broken));
    }

    fn check_hashes(&mut self, checksums: &[Checksum], progress: &(dyn Fn(Progress) + Sync)) {
        let places = places(&self.root);
        let there = |checksum| Some((checksum, find(&places, checksum)?));
        let files: Vec<(&Checksum, (PathBuf, u64))> = checksums.iter().filter_map(there).collect();
        if files.is_empty() {
            let names: Vec<String> = checksums.iter().map(|c| c.file.clone()).collect();
            let root = self.root.display();
            let problem = format!("none of the files with a known checksum in {root} or beside it");
            self.findings
                .extend(Finding::about(Kind::Checksum, problem, names));
        }
        let total = files.iter().map(|(_, (_, bytes))| bytes).sum();
        let step = Step::new("hashing", total, progress);
        let compare = |(checksum, (path, _)): &(&Checksum, (PathBuf, u64))| {
            let (found, expected) = match (&checksum.sha256, &checksum.md5) {
                (Some(sha256), _) => (hash::<Sha256>(path, &step), sha256),
                (None, Some(md5)) => (hash::<md5::Md5>(path, &step), md5),
                (None, None) => return Err(format!("no checksum of {} is known", checksum.file)),
            };
            match found {
                Err(error) => Err(error.to_string()),
                Ok(found) if found.eq_ignore_ascii_case(expected) => Ok(checksum.file.clone()),
                Ok(found) => {
                    let (path, source) = (path.display(), &checksum.source);
                    Err(format!(
                        "{path} has {found} instead of {expected} ({source})"
                    ))
                }
            }
        };
        let compared: Vec<Result<String, String>> = files.par_iter().map(compare).collect();
        let mut wrong = Vec::new();
        for outcome in compared {
            match outcome {
                Ok(file) => self.matching_files.push(file),
                Err(problem) => wrong.push(problem),
            }
        }
        let problem = format!(
            "{} files have another checksum: fetch them again",
            wrong.len()
        );
        self.findings
            .extend(Finding::about(Kind::Checksum, problem, wrong));
    }
}

/// Where files with checksums may lie: the folder, those directly in it, the one around it.
fn places(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    folders.insert(0, root.to_path_buf());
    folders.push(root.join(".."));
    folders
}

/// Path and size of the file in the first place that has it.
fn find(places: &[PathBuf], checksum: &Checksum) -> Option<(PathBuf, u64)> {
    let mut found = places.iter().map(|place| place.join(&checksum.file));
    found.find_map(|path| {
        let meta = std::fs::metadata(&path).ok()?;
        meta.is_file().then_some((path, meta.len()))
    })
}

/// Hash of a file in hexadecimal.
fn hash<D: Digest>(path: &Path, step: &Step) -> Result<String> {
    let failed = || Error::io(path, "read the file");
    let mut file = File::open(path).map_err(failed())?;
    let mut hash = D::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(failed())?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
        step.advance(read as u64);
    }
}

/// Counts what many threads have done.
struct Step<'a> {
    step: &'static str,
    total: u64,
    done: AtomicU64,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Step<'a> {
    fn new(step: &'static str, total: u64, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self {
            step,
            total,
            done: AtomicU64::new(0),
            progress,
        }
    }

    fn advance(&self, by: u64) {
        let done = self.done.fetch_add(by, Ordering::Relaxed) + by;
        let Self { step, total, .. } = *self;
        (self.progress)(Progress { step, done, total });
    }
}
