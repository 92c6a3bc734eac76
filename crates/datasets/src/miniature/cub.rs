//! CUB-200-2011, with boxes and parts.

use std::fmt::Write as _;

use super::tree::{Corners, Tree};
use crate::e10::{self, Part};
use crate::{Error, Result};

pub(super) fn species(class: usize) -> String {
    format!("{:03}.Texture_{}", class + 1, e10::matching_name(class))
}

pub(super) fn write(tree: &Tree) -> Result<()> {
    let mut shots = tree.shots();
    shots.sort_by_key(|shot| (shot.class, shot.index, shot.part as usize));
    let [mut images, mut labels, mut split, mut boxes, mut parts] = [const { String::new() }; 5];
    let failed = |_| Error::Config("a text that cannot be written".to_owned());
    for (id, shot) in (1..).zip(&shots) {
        let species = species(shot.class);
        let image = format!("{species}/{}_{id:04}.jpg", &species[4..]);
        tree.image(&format!("images/{image}"), *shot)?;
        let is_train = u8::from(shot.part == Part::Train);
        let Corners { x, y } = tree.corners(*shot);
        let (left, top) = (x[0] - 1, y[0] - 1);
        let (width, height) = (x[1] - left, y[1] - top);
        writeln!(images, "{id} {image}").map_err(failed)?;
        writeln!(labels, "{id} {}", shot.class + 1).map_err(failed)?;
        writeln!(split, "{id} {is_train}").map_err(failed)?;
        writeln!(boxes, "{id} {left}.0 {top}.0 {width}.0 {height}.0").map_err(failed)?;
        for part in 1..=PARTS.len() {
            // Every fourth part of an image is hidden.
            let (x, y, visible) = match (part + id) % 4 {
                0 => (0, 0, 0),
                _ => (left + width * part / 16, top + height * (16 - part) / 16, 1),
            };
            writeln!(parts, "{id} {part} {x}.0 {y}.0 {visible}").map_err(failed)?;
        }
    }
    for (file, text) in [
        ("images.txt", images),
        ("image_class_labels.txt", labels),
        ("train_test_split.txt", split),
        ("bounding_boxes.txt", boxes),
        ("parts/part_locs.txt", parts),
    ] {
        tree.bytes(file, text.as_bytes())?;
    }
    let names = (1..).zip(PARTS).map(|(id, part)| format!("{id} {part}"));
    tree.lines("parts/parts.txt", names)?;
    let classes = 0..tree.options.classes;
    tree.lines(
        "classes.txt",
        classes.map(|class| format!("{} {}", class + 1, species(class))),
    )
}

/// The parts of a bird in the order of the data set.
const PARTS: [&str; 15] = [
    "back",
    "beak",
    "belly",
    "breast",
    "crown",
    "forehead",
    "left eye",
    "left leg",
    "left wing",
    "nape",
    "right eye",
    "right leg",
    "right wing",
    "tail",
    "throat",
];
