//! FGVC-Aircraft, release 2013b (Maji, Kannala, Rahtu, Blaschko, Vedaldi, 2013): 100 variants of aeroplanes.
//!
//! Lists in `data/` name the images of each part with their variant, family or manufacturer. As in
//! the paper the training part is `trainval`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{ListOptions, Listing, Source, folder_with};
use crate::lines::{bad_line, lines, numbers, read_list, shown};
use crate::sample::{BoundingBox, Root, Sample, below_root};
use crate::{Error, Result};

const LAYOUT: &str = "fgvc-aircraft-2013b/data/ with images/ and images_variant_trainval.txt, images_variant_test.txt";
/// The kinds of labels, the usual one first, and the file with their names.
const LABELS: [(&str, &str); 3] = [
    ("variant", "variants.txt"),
    ("family", "families.txt"),
    ("manufacturer", "manufacturers.txt"),
];

pub(crate) const SOURCE: Source = Source {
    name: "fgvc-aircraft-2013b",
    layout: LAYOUT,
    recognises: |root| base(root).is_some(),
    list,
};

fn base(root: &Path) -> Option<PathBuf> {
    let lists = LABELS.map(|(labels, _)| format!("images_{labels}_test.txt"));
    let lists: Vec<&str> = lists.iter().map(String::as_str).collect();
    folder_with(root, &["", "data", "fgvc-aircraft-2013b/data"], &lists)
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    let base = base(root).ok_or_else(|| Error::layout(root, "no FGVC-Aircraft here", LAYOUT))?;
    let wanted = options.labels.as_deref().unwrap_or(LABELS[0].0);
    let Some((labels, names)) = LABELS.into_iter().find(|(labels, _)| *labels == wanted) else {
        let choices = LABELS.map(|(labels, _)| labels).join(", ");
        return Err(Error::Config(format!(
            "labels = {wanted:?}; FGVC-Aircraft has: {choices}"
        )));
    };
    let list = |part: &str| base.join(format!("images_{labels}_{part}.txt"));
    let train = match list("trainval") {
        both if both.is_file() => Line::read(both)?,
        _ => {
            let mut train = Line::read(list("train"))?;
            train.extend(Line::read(list("val"))?);
            train
        }
    };
    let test = Line::read(list("test"))?;
    let classes = classes(&base.join(names), &train, &test)?;
    let label: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let boxes = boxes(&base.join("images_box.txt"))?;
    let files = Root::new(&base);
    let samples = |part: &[Line]| -> Result<Vec<Sample>> {
        let sample = |image: &Line| {
            let label = label.get(&*image.class).ok_or_else(|| {
                let problem = format!("the class {} is not in {names}", shown(&image.class));
                bad_line(&image.list, image.line, &problem, "classes of that file")
            })?;
            let sample = Sample::file(&files, format!("images/{}.jpg", image.id), *label);
            Ok(match boxes.get(&image.id) {
                Some(found) => sample.annotated((*found).into()),
                None => sample,
            })
        };
        part.iter().map(sample).collect()
    };
    let (train, test) = (samples(&train)?, samples(&test)?);
    Ok(Listing {
        root: root.to_path_buf(),
        classes,
        train,
        val: None,
        test: Some(test),
    })
}

/// A line of a list.
struct Line {
    list: std::rc::Rc<Path>,
    line: usize,
    id: String,
    class: String,
}

impl Line {
    fn read(path: PathBuf) -> Result<Vec<Self>> {
        let expected = "<image> <class>, the class may hold blanks and slashes";
        let list: std::rc::Rc<Path> = path.into();
        let text = read_list(&list)?;
        let read = |(line, content): (usize, &str)| {
            let bad = |problem: &str| bad_line(&list, line, problem, expected);
            let (id, class) = content
                .split_once(' ')
                .ok_or_else(|| bad(&shown(content)))?;
            Ok(Self {
                id: below_root(id).map_err(|problem| bad(&problem))?,
                class: class.trim().to_owned(),
                list: list.clone(),
                line,
            })
        };
        let images: Vec<Self> = lines(&text).map(read).collect::<Result<_>>()?;
        match images.is_empty() {
            true => Err(Error::layout(&*list, "the list is empty", expected)),
            false => Ok(images),
        }
    }
}

/// The order of the file of names where there is one; without it, of the names that occur.
fn classes(path: &Path, train: &[Line], test: &[Line]) -> Result<Vec<String>> {
    let mut sorted: Vec<String>;
    if path.is_file() {
        let text = read_list(path)?;
        let classes: Vec<String> = lines(&text).map(|(_, line)| line.to_owned()).collect();
        sorted = classes.clone();
        sorted.sort();
        sorted.dedup();
        return match sorted.len() == classes.len() {
            true => Ok(classes),
            false => Err(Error::layout(path, "a class is listed twice", "each once")),
        };
    }
    sorted = train
        .iter()
        .chain(test)
        .map(|image| image.class.clone())
        .collect();
    sorted.sort();
    sorted.dedup();
    Ok(sorted)
}

/// Boxes by image, none where there is no such file.
fn boxes(path: &Path) -> Result<HashMap<String, BoundingBox>> {
    let mut boxes = HashMap::new();
    if !path.is_file() {
        return Ok(boxes);
    }
    for (number, line) in lines(&read_list(path)?) {
        let parsed = line.split_once(' ').and_then(|(id, rest)| {
            let [left, top, right, bottom] = numbers(rest)?;
            let found = BoundingBox::of_corners([left, right], [top, bottom]);
            Some((id.to_owned(), found))
        });
        let expected = "<image> <xmin> <ymin> <xmax> <ymax>";
        let (id, found) = parsed.ok_or_else(|| bad_line(path, number, &shown(line), expected))?;
        boxes.insert(id, found);
    }
    Ok(boxes)
}
