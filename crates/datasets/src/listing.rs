//! Images without labels: one file, a folder, or a list.

use std::path::{Path, PathBuf};

use crate::lines::{bad_line, lines, read_list};
use crate::sources::{MAX_DEPTH, collect, is_image_name};
use crate::{Error, Result};

/// The images that a path names: an image file is itself, a folder is all images below it (sorted by
/// path), any other file is a list with one path a line, relative to the list's own folder, in its
/// order. Empty lines and those that start with `#` are passed over. No image is opened.
///
/// # Errors
/// [`Error::Io`] or [`Error::Layout`] with the path where it is missing, unreadable, names no image,
/// or a listed file is not there (with its line).
pub fn list_images(path: &Path) -> Result<Vec<PathBuf>> {
    let meta = std::fs::metadata(path).map_err(Error::io(path, "look at it"))?;
    let mut images = Vec::new();
    if meta.is_dir() {
        let mut passed_over = 0;
        collect(path, MAX_DEPTH, &mut images, &mut passed_over)?;
        images.sort();
    } else if path
        .file_name()
        .and_then(|n| n.to_str())
        .is_some_and(is_image_name)
    {
        images.push(path.to_owned());
    } else {
        let text = read_list(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for (number, line) in lines(&text) {
            if line.starts_with('#') {
                continue;
            }
            let image = folder.join(line);
            if !image.is_file() {
                return Err(bad_line(
                    path,
                    number,
                    &format!("there is no file {}", image.display()),
                    "paths relative to the folder of the list, or absolute ones",
                ));
            }
            images.push(image);
        }
    }
    if images.is_empty() {
        return Err(Error::layout(path, "no images here", "at least one image"));
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_folders_and_lists() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir_all(root.join("b/c")).unwrap();
        for name in [
            "b/c/2.jpg",
            "b/1.PNG",
            "a.jpeg",
            "b/notes.md",
            ".hidden.jpg",
        ] {
            std::fs::write(root.join(name), "").unwrap();
        }
        let found = |path: &Path| -> Vec<PathBuf> {
            let images = list_images(path).unwrap();
            images
                .iter()
                .map(|p| p.strip_prefix(root).unwrap().to_owned())
                .collect()
        };
        let expect = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(found(root), expect(&["a.jpeg", "b/1.PNG", "b/c/2.jpg"]));
        assert_eq!(found(&root.join("a.jpeg")), expect(&["a.jpeg"]));
        let list = root.join("b/list.txt");
        std::fs::write(&list, "\u{FEFF}c/2.jpg\n\n# two\n  1.PNG \n").unwrap();
        assert_eq!(found(&list), expect(&["b/c/2.jpg", "b/1.PNG"]));

        for (text, part) in [
            ("c/3.jpg", "line 1: there is no file"),
            ("# none", "no images"),
        ] {
            std::fs::write(&list, text).unwrap();
            let message = list_images(&list).unwrap_err().to_string();
            assert!(
                message.contains(part) && message.contains("list.txt"),
                "{message}"
            );
        }
        std::fs::write(&list, b"\xFF\xFE").unwrap();
        assert!(
            list_images(&list)
                .unwrap_err()
                .to_string()
                .contains("UTF-8")
        );
        assert!(list_images(&root.join("none")).is_err());
    }
}
