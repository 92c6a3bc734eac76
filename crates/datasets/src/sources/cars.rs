//! Stanford Cars (Krause, Stark, Deng, Fei-Fei, 2013): 196 models, annotated in MATLAB files.
//!
//! Two generations are about: `cars_train/` and `cars_test/` with a `devkit/`, whose labels of the
//! test part came later in a file of their own, and `car_ims/` with one `cars_annos.mat`. Their test
//! images are the same but not their file names.

use std::path::{Path, PathBuf};

use super::{ListOptions, Listing, Source, folder_with, one_kind_of_labels};
use crate::formats::matlab::{MatFile, Row, Variable};
use crate::sample::{Annotation, BoundingBox, Root, Sample, below_root};
use crate::{Error, Result};

const LAYOUT: &str = "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, or car_ims/ and cars_annos.mat";
const TRAIN: &str = "cars_train_annos.mat";
const TEST: &str = "cars_test_annos_withlabels.mat";
const META: &str = "cars_meta.mat";
const COMBINED: &str = "cars_annos.mat";

pub(crate) const SOURCE: Source = Source {
    name: "stanford-cars",
    layout: LAYOUT,
    recognises: |root| base(root).is_some(),
    list,
};

fn base(root: &Path) -> Option<PathBuf> {
    let files = [TRAIN, TEST, COMBINED, META];
    let inside = files.map(|file| format!("devkit/{file}"));
    let files: Vec<&str> = files
        .into_iter()
        .chain(inside.iter().map(String::as_str))
        .collect();
    folder_with(root, &["", "stanford_cars"], &files)
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    let base = base(root).ok_or_else(|| Error::layout(root, "no Stanford Cars here", LAYOUT))?;
    let combined = find(&base, COMBINED);
    let (classes, train, test) = match combined {
        Some(path) if base.join("car_ims").is_dir() || find(&base, TRAIN).is_none() => {
            one_file(&base, &path)?
        }
        _ => file_a_part(&base)?,
    };
    if train.is_empty() || test.is_empty() {
        let problem = format!("{} training and {} test images", train.len(), test.len());
        return Err(Error::layout(
            base,
            problem,
            "some of both in the annotations",
        ));
    }
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val: None,
        test: Some(test),
    })
}

/// A file in the base folder or its `devkit`.
fn find(base: &Path, file: &str) -> Option<PathBuf> {
    Some(folder_with(base, &["devkit", ""], &[file])?.join(file))
}

type Parts = (Vec<String>, Vec<Sample>, Vec<Sample>);

fn file_a_part(base: &Path) -> Result<Parts> {
    let need = |file: &str, expected: &str| {
        find(base, file).ok_or_else(|| Error::layout(base, format!("there is no {file}"), expected))
    };
    let meta = need(META, "devkit/cars_meta.mat with the names of the classes")?;
    let train = need(
        TRAIN,
        "devkit/cars_train_annos.mat: unpack car_devkit.tgz here",
    )?;
    let test = need(
        TEST,
        "the test labels: devkit/cars_test_annos.mat has none, put cars_test_annos_withlabels.mat \
         here or into devkit/",
    )?;
    let classes = class_names(MatFile::open(&meta)?.variable("class_names")?)?;
    let files = Root::new(base);
    let read = |path: &Path, folder: &str| -> Result<Vec<Sample>> {
        // Some copies unpack to a folder of the same name once more.
        let nested = format!("{folder}/{folder}");
        let lies_in = if base.join(&nested).is_dir() {
            &nested
        } else {
            folder
        };
        let file = MatFile::open(path)?;
        let rows = file.variable("annotations")?.rows()?;
        rows.map(|row| {
            let name = path_in(&row, "fname")?;
            let below = format!("{lies_in}/{name}");
            let name = format!("{folder}/{name}");
            Ok(
                Sample::file_at(&files, &below, name, label(&row, &classes)?)
                    .annotated(bounding_box(&row)?),
            )
        })
        .collect()
    };
    let (train, test) = (read(&train, "cars_train")?, read(&test, "cars_test")?);
    Ok((classes, train, test))
}

fn one_file(base: &Path, path: &Path) -> Result<Parts> {
    let file = MatFile::open(path)?;
    let classes = class_names(file.variable("class_names")?)?;
    let files = Root::new(base);
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for row in file.variable("annotations")?.rows()? {
        let sample = Sample::file(
            &files,
            path_in(&row, "relative_im_path")?,
            label(&row, &classes)?,
        )
        .annotated(bounding_box(&row)?);
        match row.integer("test", 0..=1)? {
            0 => train.push(sample),
            _ => test.push(sample),
        }
    }
    Ok((classes, train, test))
}

fn class_names(variable: Variable) -> Result<Vec<String>> {
    let names = variable.texts()?.into_iter();
    Ok(names.map(|name| name.trim().to_owned()).collect())
}

/// Classes count from 1.
fn label(row: &Row, classes: &[String]) -> Result<u32> {
    Ok(row.integer("class", 1..=classes.len() as u32)? - 1)
}

fn path_in(row: &Row, field: &str) -> Result<String> {
    let expected = "the path of an image below the folder of the data set";
    below_root(row.text(field)?).map_err(|problem| row.wrong(field, problem, expected))
}

fn bounding_box(row: &Row) -> Result<Annotation> {
    let side = |low: &str, high: &str| -> Result<[f32; 2]> {
        Ok([row.number(low)? as f32, row.number(high)? as f32])
    };
    let (columns, rows) = (side("bbox_x1", "bbox_x2")?, side("bbox_y1", "bbox_y2")?);
    Ok(BoundingBox::of_corners(columns, rows).into())
}
