//! Layouts of no particular set: tar shards as WebDataset has them, and a table of paths and labels.

use super::tree::{Shot, Tree};
use crate::Result;
use crate::e10;

/// Images in a shard.
const SHARD: usize = 8;

pub(super) fn class(class: usize) -> String {
    e10::matching_name(class).clone()
}

pub(super) fn write_shards(tree: &Tree) -> Result<()> {
    let classes = (0..tree.options.classes).map(class);
    tree.lines("classes.txt", classes)?;
    for part in [e10::Part::Train, tree.held_out] {
        for (number, shots) in in_turns(tree, part).chunks(SHARD).enumerate() {
            let mut files = Vec::new();
            for (i, shot) in shots.iter().enumerate() {
                let key = format!("{:06}", number * SHARD + i);
                files.push((format!("{key}.jpg"), tree.jpeg(*shot)?));
                files.push((format!("{key}.cls"), shot.class.to_string().into_bytes()));
            }
            tree.tar(&format!("{}-{number:04}.tar", part.folder()), &files)?;
        }
    }
    Ok(())
}

/// Classes one after the other, as shards are shuffled before they are written.
fn in_turns(tree: &Tree, part: e10::Part) -> Vec<Shot> {
    let mut shots = tree.of(part);
    shots.sort_by_key(|shot| (shot.index, shot.class));
    shots
}

pub(super) fn write_list(tree: &Tree) -> Result<()> {
    for part in [e10::Part::Train, tree.held_out] {
        let mut lines = vec!["path,label".to_owned()];
        for shot in tree.of(part) {
            let class = class(shot.class);
            let path = format!("images/{class} {} {}.jpg", part.folder(), shot.index);
            tree.image(&path, shot)?;
            lines.push(format!("{path},{class}"));
        }
        tree.lines(&format!("{}.csv", part.folder()), lines)?;
    }
    Ok(())
}
