//! FGVC-Aircraft with its three kinds of labels.

use super::tree::{Corners, Shot, Tree};
use crate::Result;
use crate::e10::{self, Part};

/// Name of a kind of labels, of the file that lists them, and of the label of a class.
type Kind = (&'static str, &'static str, fn(usize) -> String);

pub(super) fn variant(class: usize) -> String {
    format!(
        "T-{} {}",
        e10::matching_name(class).replace('-', "/"),
        class + 100
    )
}

/// Two variants a family, two families a manufacturer.
pub(super) fn write(tree: &Tree) -> Result<()> {
    let kinds: [Kind; 3] = [
        ("variant", "variants", variant),
        ("family", "families", |class| {
            format!("T-{}/A family", class / 2 + 1)
        }),
        ("manufacturer", "manufacturers", |class| {
            format!("Works {}", class / 4 + 1)
        }),
    ];
    let shots = tree.shots();
    // The numbers say nothing about part and class.
    let id = |i: usize| format!("{:07}", 1_000_003 * (i + 1) % 9_999_991);
    let mut boxes = Vec::new();
    for (i, shot) in shots.iter().enumerate() {
        tree.image(&format!("data/images/{}.jpg", id(i)), *shot)?;
        let Corners { x, y } = tree.corners(*shot);
        boxes.push(format!("{} {} {} {} {}", id(i), x[0], y[0], x[1], y[1]));
    }
    tree.lines("data/images_box.txt", boxes)?;
    let is_in = |part: &str, shot: &Shot| match (part, shot.part) {
        ("test", _) => shot.part == Part::Test,
        (_, Part::Test) => false,
        ("trainval", _) => true,
        ("val", _) => shot.index % 2 == 1,
        _ => shot.index.is_multiple_of(2),
    };
    for part in ["train", "val", "trainval", "test"] {
        let of_part = || (0..).zip(&shots).filter(|(_, shot)| is_in(part, shot));
        tree.lines(
            &format!("data/images_{part}.txt"),
            of_part().map(|(i, _)| id(i)),
        )?;
        for (kind, _, class) in kinds {
            let lines = of_part().map(|(i, shot)| format!("{} {}", id(i), class(shot.class)));
            tree.lines(&format!("data/images_{kind}_{part}.txt"), lines)?;
        }
    }
    for (_, file, class) in kinds {
        let mut names: Vec<String> = (0..tree.options.classes).map(class).collect();
        names.dedup();
        tree.lines(&format!("data/{file}.txt"), names)?;
    }
    Ok(())
}
