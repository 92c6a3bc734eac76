//! What listings without official lists have in common: the names of parts, and labels that are
//! numbers or names.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::Listing;
use crate::sample::Sample;
use crate::{Error, Result};

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PartName {
    Train,
    Val,
    Test,
}

impl PartName {
    /// The part of this name, in lower or upper case.
    pub(crate) fn of(name: &str) -> Option<Self> {
        match &*name.to_ascii_lowercase() {
            "train" | "training" => Some(Self::Train),
            "val" | "valid" | "validation" => Some(Self::Val),
            "test" | "testing" => Some(Self::Test),
            _ => None,
        }
    }

    /// The part that a word of a file's name names: `imagenet-val-000.tar`.
    pub(crate) fn in_words_of(name: &str) -> Option<Self> {
        name.split(|c: char| !c.is_ascii_alphabetic())
            .find_map(Self::of)
    }
}

/// A sample whose class is still text.
pub(crate) struct Labelled {
    pub(crate) part: PartName,
    pub(crate) label: Arc<str>,
    pub(crate) sample: Sample,
}

/// Texts of labels, each kept once for all its samples.
#[derive(Default)]
pub(crate) struct Labels(HashSet<Arc<str>>);

impl Labels {
    pub(crate) fn get(&mut self, label: &str) -> Arc<str> {
        if let Some(known) = self.0.get(label) {
            return Arc::clone(known);
        }
        let new: Arc<str> = label.into();
        self.0.insert(Arc::clone(&new));
        new
    }
}

/// Most classes that numeric labels may make: a wrong column must not make four billion.
const MAX_CLASSES: u32 = 1 << 20;

/// A listing of samples in their order. Where every label is a whole number, it is the class itself
/// and classes are called by their numbers, up to the largest; otherwise classes are sorted by name.
/// `names`, where there are any, are what numbered classes are called.
///
/// # Errors
/// [`Error::Layout`] where there are no training samples, fewer than two classes, or more numbers
/// than names.
pub(crate) fn listing(
    root: &Path,
    samples: Vec<Labelled>,
    names: Option<Vec<String>>,
) -> Result<Listing> {
    if samples.is_empty() {
        return Err(Error::layout(
            root,
            "no images",
            "at least two classes of images",
        ));
    }
    let number = |label: &str| label.parse::<u32>().ok();
    let numbers: Option<Vec<u32>> = samples.iter().map(|s| number(&s.label)).collect();
    let (labels, classes): (Vec<u32>, Vec<String>) = match numbers {
        Some(numbers) => {
            let largest = numbers.iter().copied().max().unwrap_or(0);
            let names = match names {
                Some(names) => names,
                None if largest < MAX_CLASSES => (0..=largest).map(|n| n.to_string()).collect(),
                None => Vec::new(),
            };
            if largest as usize >= names.len() {
                return Err(Error::layout(
                    root,
                    format!("the label {largest}"),
                    match names.len() {
                        0 => format!("labels below {MAX_CLASSES}, or names of classes"),
                        n => format!("labels below {n}, the number of class names"),
                    },
                ));
            }
            (numbers, names)
        }
        None => {
            let classes: BTreeSet<&str> = samples.iter().map(|s| &*s.label).collect();
            let classes: Vec<String> = classes.into_iter().map(str::to_owned).collect();
            let place = |s: &Labelled| classes.partition_point(|class| **class < *s.label) as u32;
            (samples.iter().map(place).collect(), classes)
        }
    };
    if classes.len() < 2 {
        return Err(Error::layout(
            root,
            "only one class",
            "at least two classes",
        ));
    }
    let mut seen = vec![false; classes.len()];
    for &label in &labels {
        seen[label as usize] = true;
    }
    let empty = seen.iter().filter(|&&seen| !seen).count();
    if empty > 0 {
        tracing::warn!(
            "{}: {empty} of {} classes have no images (labels are the numbers of classes, from 0)",
            root.display(),
            classes.len()
        );
    }
    let (mut train, mut val, mut test) = (Vec::new(), Vec::new(), Vec::new());
    for (labelled, label) in samples.into_iter().zip(labels) {
        let mut sample = labelled.sample;
        sample.label = label;
        match labelled.part {
            PartName::Train => train.push(sample),
            PartName::Val => val.push(sample),
            PartName::Test => test.push(sample),
        }
    }
    if train.is_empty() {
        return Err(Error::layout(
            root,
            "no training images",
            "images of a part named train, or of no named part",
        ));
    }
    let some = |samples: Vec<Sample>| (!samples.is_empty()).then_some(samples);
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val: some(val),
        test: some(test),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Root;

    fn labelled(labels: &[&str]) -> Vec<Labelled> {
        let root = Root::new(Path::new("root"));
        let one = |label: &&str| Labelled {
            part: PartName::Train,
            label: (*label).into(),
            sample: Sample::file(&root, "x.jpg", 0),
        };
        labels.iter().map(one).collect()
    }

    fn classes(labels: &[&str]) -> Result<(Vec<String>, Vec<u32>)> {
        let found = listing(Path::new("root"), labelled(labels), None)?;
        let labels = found.train.iter().map(|s| s.label).collect();
        Ok((found.classes, labels))
    }

    #[test]
    fn labels_are_numbers_or_names() {
        let (names, labels) = classes(&["2", "0", "10"]).unwrap();
        assert_eq!((names.len(), labels), (11, vec![2, 0, 10]));
        let (names, labels) = classes(&["b", "10", "2", "b"]).unwrap();
        assert_eq!(names, ["10", "2", "b"]);
        assert_eq!(labels, [2, 0, 1, 2]);
        for bad in [&["4000000000", "1"][..], &["a", "a"], &["0"], &[]] {
            assert!(classes(bad).is_err(), "{bad:?}");
        }
        let names = Some(vec!["cat".to_owned(), "dog".to_owned()]);
        let found = listing(Path::new("r"), labelled(&["1", "0"]), names.clone()).unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        let error = listing(Path::new("r"), labelled(&["2"]), names).unwrap_err();
        assert!(error.to_string().contains("below 2"), "{error}");
    }

    #[test]
    fn words_name_parts() {
        assert_eq!(
            PartName::in_words_of("imagenet-val-0001.tar"),
            Some(PartName::Val)
        );
        assert_eq!(PartName::in_words_of("TRAIN_00.tar"), Some(PartName::Train));
        assert_eq!(PartName::in_words_of("training-set"), Some(PartName::Train));
        assert_eq!(PartName::in_words_of("shard-00"), None);
        assert_eq!(PartName::in_words_of("contest.tar"), None);
    }
}
