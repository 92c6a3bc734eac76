//! ImageNet: all validation images in one folder with the devkit beside it, class folders, Kaggle's
//! layout, and the official archives. The same images in each.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::tree::{Corners, Tree};
use crate::e10::{self, Part};
use crate::formats::matlab::{StructArray, Value};
use crate::formats::{matlab_writer, tar};
use crate::{Error, Result};

pub(super) fn wnid(class: usize) -> String {
    format!("n99{:06}", class + 1)
}

fn words(class: usize) -> String {
    let name = e10::matching_name(class);
    format!("texture {name}, {}", name.replace('-', " and "))
}

/// Below `base`: `train/<wnid>/`, and validation images where `val` says.
fn images(tree: &Tree, base: &str, val: fn(usize, &str) -> String) -> Result<()> {
    for shot in tree.of(Part::Train) {
        let wnid = wnid(shot.class);
        tree.image(
            &format!("{base}train/{wnid}/{wnid}_{}.JPEG", shot.index + 1),
            shot,
        )?;
    }
    for (i, shot) in tree.of(Part::Val).into_iter().enumerate() {
        tree.image(&format!("{base}{}", val(shot.class, &val_name(i))), shot)?;
    }
    Ok(())
}

fn val_name(i: usize) -> String {
    format!("ILSVRC2012_val_{:08}.JPEG", i + 1)
}

pub(super) fn write(tree: &Tree) -> Result<()> {
    images(tree, "", |_, name| format!("val/{name}"))?;
    devkit(tree)
}

pub(super) fn write_folders(tree: &Tree) -> Result<()> {
    images(tree, "", |class, name| {
        format!("val/{}/{name}", wnid(class))
    })
}

/// The devkit numbers the classes in another order than that of the wnids.
fn devkit_number(tree: &Tree, class: usize) -> usize {
    tree.options.classes - class
}

/// `ILSVRC2012_devkit_t12/data`: after the classes comes a synset above them.
fn devkit(tree: &Tree) -> Result<()> {
    for (path, bytes) in devkit_files(tree)? {
        tree.bytes(&path, &bytes)?;
    }
    Ok(())
}

fn devkit_files(tree: &Tree) -> Result<[(String, Vec<u8>); 2]> {
    let classes = tree.options.classes;
    let numbers =
        |numbers: Vec<usize>| Value::Numbers(numbers.into_iter().map(|n| n as f64).collect());
    let number = |n: usize| numbers(vec![n]);
    let text = |text: String| Value::Text(text);
    let mut values = Vec::new();
    for class in (0..classes).rev() {
        values.extend([
            number(devkit_number(tree, class)),
            text(wnid(class)),
            text(words(class)),
            text("made of noise".to_owned()),
            number(0),
            numbers(Vec::new()),
            number(0),
            number(tree.options.train),
        ]);
    }
    values.extend([
        number(classes + 1),
        text("n99999999".to_owned()),
        text("texture".to_owned()),
        text("what all of them are".to_owned()),
        number(classes),
        numbers((1..=classes).collect()),
        number(1),
        number(0),
    ]);
    let fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ];
    let fields = fields.map(str::to_owned).into();
    let synsets = Value::Structs(StructArray { fields, values });
    let synsets = matlab_writer::write(&[("synsets", &synsets)], Default::default())?;
    let truth: String = tree
        .of(Part::Val)
        .into_iter()
        .map(|shot| format!("{}\n", devkit_number(tree, shot.class)))
        .collect();
    let data = "ILSVRC2012_devkit_t12/data";
    Ok([
        (format!("{data}/meta.mat"), synsets),
        (
            format!("{data}/ILSVRC2012_validation_ground_truth.txt"),
            truth.into_bytes(),
        ),
    ])
}

/// The archives that the owners of ImageNet give out.
pub(super) fn write_archives(tree: &Tree) -> Result<()> {
    let shots = tree.of(Part::Train);
    let class = |class: usize| -> Result<(String, Vec<u8>)> {
        let wnid = wnid(class);
        let of_class = shots.iter().filter(|shot| shot.class == class);
        let files = of_class.map(|shot| {
            let name = format!("{wnid}_{}.JPEG", shot.index + 1);
            Ok((name, tree.jpeg(*shot)?))
        });
        let files = files.collect::<Result<Vec<_>>>()?;
        let archive = tar::write(&files).map_err(Error::Config)?;
        Ok((format!("{wnid}.tar"), archive))
    };
    let classes = (0..tree.options.classes).map(class);
    tree.tar(
        "ILSVRC2012_img_train.tar",
        &classes.collect::<Result<Vec<_>>>()?,
    )?;
    let val = tree.of(Part::Val).into_iter().enumerate();
    let val = val.map(|(i, shot)| Ok((val_name(i), tree.jpeg(shot)?)));
    tree.tar("ILSVRC2012_img_val.tar", &val.collect::<Result<Vec<_>>>()?)?;
    let devkit = tar::write(&devkit_files(tree)?).map_err(Error::Config)?;
    let packed = || -> std::io::Result<Vec<u8>> {
        let mut packed = GzEncoder::new(Vec::new(), Compression::default());
        packed.write_all(&devkit)?;
        packed.finish()
    };
    let name = "ILSVRC2012_devkit_t12.tar.gz";
    let packed = packed().map_err(Error::io(&tree.dir.join(name), "pack the file"))?;
    tree.bytes(name, &packed)
}

pub(super) fn write_kaggle(tree: &Tree) -> Result<()> {
    images(tree, "ILSVRC/Data/CLS-LOC/", |_, name| {
        format!("val/{name}")
    })?;
    let classes = 0..tree.options.classes;
    let mapping = classes.map(|class| format!("{} {}", wnid(class), words(class)));
    tree.lines("LOC_synset_mapping.txt", mapping)?;
    let solution = tree.of(Part::Val).into_iter().enumerate().map(|(i, shot)| {
        let Corners { x, y } = tree.corners(shot);
        let (image, wnid) = (val_name(i).replace(".JPEG", ""), wnid(shot.class));
        format!("{image},{wnid} {} {} {} {} ", x[0], y[0], x[1], y[1])
    });
    let mut solution: Vec<String> = solution.collect();
    // The list of Kaggle is in no order.
    solution.reverse();
    solution.insert(0, "ImageId,PredictionString".to_owned());
    tree.lines("LOC_val_solution.csv", solution)
}
