//! CUB-200-2011 (Wah, Branson, Welinder, Perona, Belongie, 2011): birds of 200 species, with boxes and parts.
//!
//! Text files beside `images/` give every image a number and say, by number, its class and its part.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{ListOptions, Listing, Source, folder_with, one_kind_of_labels};
use crate::lines::{bad_line, lines, numbers, read_list, shown};
use crate::sample::{Annotation, BoundingBox, Part, Root, Sample, below_root};
use crate::{Error, Result};

const LAYOUT: &str = "CUB_200_2011/ with images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt";

pub(crate) const SOURCE: Source = Source {
    name: "cub-200-2011",
    layout: LAYOUT,
    recognises: |root| base(root).is_some(),
    list,
};

/// The folder with the lists: `root` or the one that the archive unpacks to.
fn base(root: &Path) -> Option<PathBuf> {
    let base = folder_with(root, &["", "CUB_200_2011"], &["images.txt"])?;
    let ours = ["train_test_split.txt", "image_class_labels.txt"];
    ours.iter()
        .any(|name| base.join(name).is_file())
        .then_some(base)
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    let base = base(root).ok_or_else(|| Error::layout(root, "no CUB-200-2011 here", LAYOUT))?;
    let (classes, labels) = classes(&base.join("classes.txt"))?;
    let images = Images::read(base.join("images.txt"))?;
    let label = images.each(
        "image_class_labels.txt",
        "<image> <class>, a class of classes.txt",
        |rest| labels.get(&rest.parse().ok()?).copied(),
    )?;
    let trains = images.each(
        "train_test_split.txt",
        "<image> <1 for train, 0 for test>",
        |rest| match rest {
            "0" => Some(false),
            "1" => Some(true),
            _ => None,
        },
    )?;
    let mut annotations = images.annotations()?;

    let files = Root::new(&base);
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (i, (_, path)) in images.list.into_iter().enumerate() {
        let mut sample = Sample::file(&files, path, label[i]);
        if let Some(annotation) = annotations.get_mut(&i).map(std::mem::take) {
            sample = sample.annotated(annotation);
        }
        if trains[i] { &mut train } else { &mut test }.push(sample);
    }
    if train.is_empty() || test.is_empty() {
        return Err(Error::layout(
            base.join("train_test_split.txt"),
            format!("{} training and {} test images", train.len(), test.len()),
            "some of both",
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

/// The names in the order of their numbers, and the label of each number.
fn classes(path: &Path) -> Result<(Vec<String>, HashMap<u32, u32>)> {
    let expected = "<class> <name> on each line, each class once, at least two";
    let mut classes = Vec::new();
    for (number, line) in lines(&read_list(path)?) {
        let (id, name) =
            numbered(line).ok_or_else(|| bad_line(path, number, &shown(line), expected))?;
        classes.push((id, name.to_owned()));
    }
    classes.sort();
    let labels: HashMap<u32, u32> = classes.iter().map(|c| c.0).zip(0..).collect();
    if labels.len() < classes.len().max(2) {
        let problem = format!("{} lines for {} classes", classes.len(), labels.len());
        return Err(Error::layout(path, problem, expected));
    }
    Ok((classes.into_iter().map(|c| c.1).collect(), labels))
}

/// `12 rest of the line`.
fn numbered(line: &str) -> Option<(u32, &str)> {
    let (id, rest) = line.split_once([' ', '\t'])?;
    Some((id.parse().ok()?, rest.trim_start()))
}

/// The images in the order of `images.txt`.
struct Images {
    path: PathBuf,
    /// Number in the other lists, and path below the root.
    list: Vec<(u32, String)>,
    /// Where in `list` a number is.
    position: HashMap<u32, usize>,
}

impl Images {
    fn read(path: PathBuf) -> Result<Self> {
        let (mut list, mut position) = (Vec::new(), HashMap::new());
        for (number, line) in lines(&read_list(&path)?) {
            let bad =
                |problem: &str| bad_line(&path, number, problem, "<image> <path below images/>");
            let (id, image) = numbered(line).ok_or_else(|| bad(&shown(line)))?;
            let image = below_root(image).map_err(|problem| bad(&problem))?;
            if position.insert(id, list.len()).is_some() {
                return Err(bad(&format!("image {id} a second time")));
            }
            list.push((id, format!("images/{image}")));
        }
        Ok(Self {
            path,
            list,
            position,
        })
    }

    /// Calls `take` with line number, position of the image and the rest of each line of a list.
    fn scan(
        &self,
        path: &Path,
        expected: &str,
        mut take: impl FnMut(usize, usize, &str) -> Result<()>,
    ) -> Result<()> {
        for (number, line) in lines(&read_list(path)?) {
            let bad = |problem: &str| bad_line(path, number, problem, expected);
            let (id, rest) = numbered(line).ok_or_else(|| bad(&shown(line)))?;
            let at = self.position.get(&id);
            let at = at.ok_or_else(|| bad(&format!("image {id} is not in images.txt")))?;
            take(number, *at, rest)?;
        }
        Ok(())
    }

    /// What a list with one line an image says of each.
    fn each<T>(
        &self,
        file: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Vec<T>> {
        let path = self.path.with_file_name(file);
        let mut values: Vec<Option<T>> = self.list.iter().map(|_| None).collect();
        self.scan(&path, expected, |number, at, rest| {
            let bad = |problem: &str| bad_line(&path, number, problem, expected);
            let value = parse(rest).ok_or_else(|| bad(&shown(rest)))?;
            match values[at].replace(value) {
                None => Ok(()),
                Some(_) => Err(bad("this image a second time")),
            }
        })?;
        let missing = values.iter().position(Option::is_none);
        if let Some((id, image)) = missing.map(|at| &self.list[at]) {
            let problem = format!("no line for image {id} ({image})");
            return Err(Error::layout(
                path,
                problem,
                "one line for each of images.txt",
            ));
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Boxes and parts by position, as far as their files are there.
    fn annotations(&self) -> Result<HashMap<usize, Annotation>> {
        let mut annotations: HashMap<usize, Annotation> = HashMap::new();
        let path = self.path.with_file_name("bounding_boxes.txt");
        if path.is_file() {
            let expected = "<image> <x> <y> <width> <height>";
            self.scan(&path, expected, |number, at, rest| {
                let [left, top, width, height] =
                    numbers(rest).ok_or_else(|| bad_line(&path, number, &shown(rest), expected))?;
                annotations.entry(at).or_default().bounding_box = Some(BoundingBox {
                    left,
                    top,
                    width,
                    height,
                });
                Ok(())
            })?;
        }
        let path = self.path.with_file_name("parts").join("part_locs.txt");
        if path.is_file() {
            let expected = "<image> <part> <x> <y> <1 for visible, 0>";
            self.scan(&path, expected, |number, at, rest| {
                let part = numbers(rest).and_then(|[id, x, y, visible]| {
                    let part = Part {
                        id: id as u32,
                        x,
                        y,
                        visible: visible == 1.0,
                    };
                    (part.id as f32 == id && (visible == 0.0 || visible == 1.0)).then_some(part)
                });
                let part = part.ok_or_else(|| bad_line(&path, number, &shown(rest), expected))?;
                annotations.entry(at).or_default().parts.push(part);
                Ok(())
            })?;
        }
        Ok(annotations)
    }
}
