//! ImageNet-1k in the archives that its owners give out, read in place.
//!
//! `ILSVRC2012_img_train.tar` is a tar of 1000 tars, one a class; `ILSVRC2012_img_val.tar` holds all
//! validation images, whose classes the devkit tells (`ILSVRC2012_devkit_t12.tar.gz`, or the folder).
//! Either archive may be there unpacked instead, as `train/` or `val/`.
//!
//! Samples are called as in the folder layout, so that order and fingerprint are the same.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::folder::{has_class_folders, is_image_name, part, sub_folders};
use super::imagenet::{ground_truth, validation};
use super::{ListOptions, Listing, Source, one_kind_of_labels};
use crate::formats::tar_index::entries;
use crate::sample::{Root, Sample};
use crate::{Error, Result};

const TRAIN: &str = "ILSVRC2012_img_train.tar";
const VAL: &str = "ILSVRC2012_img_val.tar";
const LAYOUT: &str = "ILSVRC2012_img_train.tar (or train/<wnid>/), beside it ILSVRC2012_img_val.tar \
                      and ILSVRC2012_devkit_t12.tar.gz (or val/<wnid>/)";

pub(crate) const SOURCE: Source = Source {
    name: "imagenet-archives",
    layout: LAYOUT,
    recognises: |root| {
        let archive = root.join(TRAIN).is_file() || root.join(VAL).is_file();
        // Archives that were unpacked are only lying about.
        archive && !(has_class_folders(root, "train") && has_class_folders(root, "val"))
    },
    list,
};

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    let archive = root.join(TRAIN);
    let (train_place, classes, train) = if archive.is_file() {
        let (classes, train) = training(&archive, options)?;
        (archive, classes, train)
    } else {
        let dir = root.join("train");
        if !dir.is_dir() {
            return Err(Error::layout(
                root,
                format!("neither {TRAIN} nor train/ here"),
                LAYOUT,
            ));
        }
        let classes = sub_folders(&dir)?;
        let train = part(&Root::new(root), &dir, &classes)?;
        (dir, classes, train)
    };
    let archive = root.join(VAL);
    let val = if archive.is_file() {
        let truth = ground_truth(root)?.of_classes(&classes, &train_place)?;
        let place: Arc<Path> = archive.as_path().into();
        let entries = entries(&archive, &options.cache)?;
        // Some copies of the archive have a folder in it.
        let file = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
        let found = entries
            .into_iter()
            .map(|e| (file(&e.name), (e.offset, e.length)));
        let found: HashMap<String, (u64, u64)> = found.collect();
        Some(truth.samples(&archive, |file, name, label| {
            let piece = *found.get(file)?;
            Some(Sample::piece(&place, piece, name, label))
        })?)
    } else {
        validation(root, &classes, &train_place)?
    };
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val,
        test: None,
    })
}

/// Classes and samples of the tar of tars, sorted.
fn training(archive: &Path, options: &ListOptions) -> Result<(Vec<String>, Vec<Sample>)> {
    let mut entries = entries(archive, &options.cache)?;
    entries.retain(|entry| is_image_name(&entry.name));
    entries.sort_by(|a, b| a.name.split_once('/').cmp(&b.name.split_once('/')));
    let place: Arc<Path> = archive.into();
    let mut classes: Vec<String> = Vec::new();
    let mut samples = Vec::with_capacity(entries.len());
    for entry in entries {
        let Some((class, _)) = entry.name.split_once('/') else {
            let problem = format!("{} is in no class", entry.name);
            return Err(Error::layout(
                archive,
                problem,
                "a tar of tars, one a class",
            ));
        };
        if classes.last().is_none_or(|last| last != class) {
            classes.push(class.to_owned());
        }
        let label = classes.len() as u32 - 1;
        let name = format!("train/{}", entry.name);
        samples.push(Sample::piece(
            &place,
            (entry.offset, entry.length),
            name,
            label,
        ));
    }
    if classes.len() < 2 {
        let problem = format!("{} classes in it", classes.len());
        return Err(Error::layout(
            archive,
            problem,
            "a tar of tars, one a class",
        ));
    }
    Ok((classes, samples))
}
