//! Which images train, which choose, which are reported on.
//!
//! A learning rate chosen on the images that the error is reported on makes that error too small,
//! so every set ends up with three parts. What a tree lacks is carved off `train`: seeded, and the
//! same share of every class. [`split`] holds the whole policy and says in a sentence what it did.

use std::path::{Path, PathBuf};

use crate::random::{Purpose, Stream};
use crate::sample::Sample;
use crate::sources::Listing;
use crate::{Error, Result};

/// Share of train that becomes the validation part where the tree has none to spare.
pub const VAL_SHARE: f64 = 0.15;
/// Share of train that becomes the test part where the tree has no held-out part at all.
pub const TEST_SHARE: f64 = 0.20;

/// The three parts of a set and how they came about.
#[derive(Debug, Clone)]
pub struct Split {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Images to fit weights on.
    pub train: Vec<Sample>,
    /// Images to choose rates, epochs and heads on.
    pub val: Vec<Sample>,
    /// Images to report on; nothing is chosen with them.
    pub test: Vec<Sample>,
    /// What was done, one sentence for the record and the report.
    pub note: String,
}

/// Train, validation and test parts of a tree.
///
/// | the tree has | train | val | test |
/// | --- | --- | --- | --- |
/// | train, val, test | train | val | test |
/// | train, test | rest of train | 15 % of train | test |
/// | train, val | rest of train | 15 % of train | val, as the literature reports on it |
/// | train | rest of train | 15 % of what test leaves | 20 % of train |
///
/// A share is taken class by class, rounded, at least one image, and leaves at least one; which
/// images, `seed` decides together with the sorted order of the names.
///
/// # Errors
/// [`Error::Layout`] where a class has too few training images to give some away.
pub fn split(listing: Listing, seed: u64) -> Result<Split> {
    let Listing {
        root,
        classes,
        mut train,
        val,
        test,
    } = listing;
    let mut carve = |share: f64, which: Carve| -> Result<Vec<Sample>> {
        let (taken, rest) = stratified(&train, share, seed, which as u64).map_err(|label| {
            Error::layout(
                class_folder(&root, classes.get(label as usize).map_or("", |c| c), &train, label),
                format!("too few training images to carve a {} part from", which.name()),
                "two or more training images a class (three where test is carved too), or val and test folders",
            )
        })?;
        train = rest;
        Ok(taken)
    };
    let (val, test, how) = match (val, test) {
        (Some(val), Some(test)) => (val, test, "parts as in the folder".to_owned()),
        (None, Some(test)) => (
            carve(VAL_SHARE, Carve::Val)?,
            test,
            format!(
                "test as in the folder; validation part carved from train ({} of each class, seed {seed})",
                percent(VAL_SHARE)
            ),
        ),
        (Some(val), None) => (
            carve(VAL_SHARE, Carve::Val)?,
            val,
            format!(
                "the folder's validation part is reported on as test; validation part carved from train ({} of each class, seed {seed})",
                percent(VAL_SHARE)
            ),
        ),
        (None, None) => {
            let test = carve(TEST_SHARE, Carve::Test)?;
            let val = carve(VAL_SHARE, Carve::Val)?;
            let how = format!(
                "no held-out part in the folder; test ({}) and validation part ({} of the rest) carved from train by class, seed {seed}",
                percent(TEST_SHARE),
                percent(VAL_SHARE)
            );
            (val, test, how)
        }
    };
    let note = format!(
        "{how}: {} train, {} validation, {} test images in {} classes",
        train.len(),
        val.len(),
        test.len(),
        classes.len()
    );
    Ok(Split {
        classes,
        train,
        val,
        test,
        note,
    })
}

/// The folder that the images of a class lie in, which need not be below `train`.
fn class_folder(root: &Path, class: &str, samples: &[Sample], label: u32) -> PathBuf {
    let Some(sample) = samples.iter().find(|s| s.label == label) else {
        return root.to_path_buf();
    };
    let path = sample.path();
    let below = path.strip_prefix(root).unwrap_or(&path);
    let parts: Vec<_> = below.iter().collect();
    match parts.iter().position(|part| *part == class) {
        Some(at) => root.join(parts[..=at].iter().collect::<PathBuf>()),
        None => path.parent().unwrap_or(root).to_path_buf(),
    }
}

#[derive(Clone, Copy)]
enum Carve {
    Val = 0,
    Test = 1,
}

impl Carve {
    fn name(self) -> &'static str {
        match self {
            Self::Val => "validation",
            Self::Test => "test",
        }
    }
}

/// Takes `share` of every class. Returns (taken, rest), both in the order of `samples`, or the
/// label of a class that has a single image.
fn stratified(
    samples: &[Sample],
    share: f64,
    seed: u64,
    which: u64,
) -> Result<(Vec<Sample>, Vec<Sample>), u32> {
    let classes = samples.iter().map(|s| s.label + 1).max().unwrap_or(0);
    let mut is_taken = vec![false; samples.len()];
    let mut by_class = vec![Vec::new(); classes as usize];
    for (i, sample) in samples.iter().enumerate() {
        by_class[sample.label as usize].push(i);
    }
    for (label, mut members) in (0..classes).zip(by_class) {
        if members.is_empty() {
            continue;
        }
        if members.len() < 2 {
            return Err(label);
        }
        let count = (share * members.len() as f64).round() as usize;
        let count = count.clamp(1, members.len() - 1);
        Stream::new(seed, Purpose::Split, u64::from(label), which).shuffle(&mut members);
        for &i in &members[..count] {
            is_taken[i] = true;
        }
    }
    let pick = |wanted: bool| {
        let chosen = samples.iter().zip(&is_taken);
        chosen
            .filter(|(_, taken)| **taken == wanted)
            .map(|(s, _)| s.clone())
            .collect()
    };
    Ok((pick(true), pick(false)))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn samples(counts: &[usize]) -> Vec<Sample> {
        samples_below("train/", counts)
    }

    fn samples_below(part: &str, counts: &[usize]) -> Vec<Sample> {
        let mut all = Vec::new();
        for (label, &n) in counts.iter().enumerate() {
            for i in 0..n {
                let name = format!("{part}{}/{i:04}.png", ["a", "b"][label]);
                all.push(Sample::file(
                    &crate::Root::new(Path::new("root")),
                    name,
                    label as u32,
                ));
            }
        }
        all
    }

    fn folder(train: &[usize], val: bool, test: bool) -> Listing {
        let held_out = |yes: bool| yes.then(|| samples(&[2, 2]));
        Listing {
            root: "root".into(),
            classes: vec!["a".into(), "b".into()],
            train: samples(train),
            val: held_out(val),
            test: held_out(test),
        }
    }

    fn counts(samples: &[Sample]) -> Vec<usize> {
        (0..2)
            .map(|l| samples.iter().filter(|s| s.label == l).count())
            .collect()
    }

    #[test]
    fn every_policy() {
        let s = split(folder(&[40, 20], true, true), 1).unwrap();
        assert_eq!((s.train.len(), s.val.len(), s.test.len()), (60, 4, 4));
        let s = split(folder(&[40, 20], false, true), 1).unwrap();
        assert_eq!(counts(&s.val), [6, 3]);
        assert_eq!(counts(&s.train), [34, 17]);
        let s = split(folder(&[40, 20], true, false), 1).unwrap();
        assert_eq!((counts(&s.val), s.test.len()), (vec![6, 3], 4));
        assert!(s.note.contains("reported on as test"), "{}", s.note);
        let s = split(folder(&[40, 20], false, false), 1).unwrap();
        assert_eq!(counts(&s.test), [8, 4]);
        assert_eq!(counts(&s.val), [5, 2]);
        assert_eq!(s.train.len() + s.val.len() + s.test.len(), 60);
    }

    #[test]
    fn seeded_disjoint_and_at_least_one_each() {
        let s = split(folder(&[30, 2], true, false), 3).unwrap();
        assert_eq!(counts(&s.val), [5, 1]);
        assert_eq!(counts(&s.train), [25, 1]);
        assert!(s.val.iter().all(|v| !s.train.contains(v)));
        let again = split(folder(&[30, 2], true, false), 3).unwrap();
        assert_eq!(s.val, again.val);
        let other = split(folder(&[30, 2], true, false), 4).unwrap();
        assert_ne!(s.val, other.val);
    }

    #[test]
    fn a_class_with_one_image_is_an_error_with_its_path() {
        let error = split(folder(&[5, 1], true, false), 0).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("root/train/b: too few"), "{text}");
        // A tree without a train folder has none to name.
        let mut bare = folder(&[], false, false);
        bare.train = samples_below("", &[5, 1]);
        let text = split(bare, 0).unwrap_err().to_string();
        assert!(text.starts_with("root/b: too few"), "{text}");
    }
}
