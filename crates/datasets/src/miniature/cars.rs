//! Stanford Cars, both generations.

use super::tree::{Corners, Shot, Tree};
use crate::Result;
use crate::e10::{self, Part};
use crate::formats::matlab::{StructArray, Value};

pub(super) fn model(class: usize) -> String {
    format!(
        "Texture {} Coupe 2013",
        e10::matching_name(class).replace('-', "/")
    )
}

fn class_names(tree: &Tree) -> Value {
    let classes = 0..tree.options.classes;
    Value::Cells(classes.map(|class| Value::Text(model(class))).collect())
}

/// A row an image; a field that is no number holds its path.
fn car_rows(tree: &Tree, fields: &[&str], shots: &[(Shot, String)]) -> Value {
    let mut values = Vec::new();
    for (shot, path) in shots {
        let Corners { x, y } = tree.corners(*shot);
        for field in fields {
            let number = match *field {
                "bbox_x1" => x[0],
                "bbox_y1" => y[0],
                "bbox_x2" => x[1],
                "bbox_y2" => y[1],
                "class" => shot.class + 1,
                "test" => usize::from(shot.part == Part::Test),
                _ => {
                    values.push(Value::Text(path.clone()));
                    continue;
                }
            };
            values.push(Value::Numbers(vec![number as f64]));
        }
    }
    let fields = fields.iter().map(|field| (*field).to_owned()).collect();
    Value::Structs(StructArray { fields, values })
}

pub(super) fn write(tree: &Tree) -> Result<()> {
    let fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"];
    let unlabelled = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname"];
    for (part, folder) in [(Part::Train, "cars_train"), (Part::Test, "cars_test")] {
        let named = tree.of(part).into_iter().zip(1..);
        let named: Vec<(Shot, String)> = named
            .map(|(shot, i)| (shot, format!("{i:05}.jpg")))
            .collect();
        for (shot, name) in &named {
            tree.image(&format!("{folder}/{name}"), *shot)?;
        }
        let rows = car_rows(tree, &fields, &named);
        let (with_labels, devkit) = match part {
            Part::Train => ("devkit/cars_train_annos.mat", None),
            _ => (
                "cars_test_annos_withlabels.mat",
                Some("devkit/cars_test_annos.mat"),
            ),
        };
        tree.mat(with_labels, &[("annotations", &rows)])?;
        if let Some(path) = devkit {
            tree.mat(
                path,
                &[("annotations", &car_rows(tree, &unlabelled, &named))],
            )?;
        }
    }
    tree.mat(
        "devkit/cars_meta.mat",
        &[("class_names", &class_names(tree))],
    )
}

pub(super) fn write_combined(tree: &Tree) -> Result<()> {
    let mut shots = tree.shots();
    shots.sort_by_key(|shot| (shot.class, shot.part as usize, shot.index));
    let named = shots.into_iter().zip(1..);
    let named: Vec<(Shot, String)> = named
        .map(|(shot, i)| (shot, format!("car_ims/{i:06}.jpg")))
        .collect();
    for (shot, path) in &named {
        tree.image(path, *shot)?;
    }
    let fields = [
        "relative_im_path",
        "bbox_x1",
        "bbox_y1",
        "bbox_x2",
        "bbox_y2",
        "class",
        "test",
    ];
    let rows = car_rows(tree, &fields, &named);
    let names = class_names(tree);
    tree.mat(
        "cars_annos.mat",
        &[("annotations", &rows), ("class_names", &names)],
    )
}
