//! A table of images: CSV, TSV, or lines `path label`.
//!
//! One file, or a folder with `train.csv` and beside it `val.csv` or `test.csv` (or `.tsv`, `.txt`).
//! A first line with column names may give them in any order and any more beside them: `path` (also
//! `file`, `filename`, `image`), `label` (also `class`, `target`) and `split` (also `part`, `set`).
//! Without one the columns are path, label and, where there is a third, the part. In `.txt` files a
//! line is a path, a blank and a label. Paths are relative to the folder of the list and stay in it.

use std::path::{Path, PathBuf};

use super::folder::has_class_folders;
use super::parts::{Labelled, Labels, PartName, listing};
use super::{ListOptions, Listing, Source, one_kind_of_labels};
use crate::lines::{bad_line, lines as lines_of, read_list, shown};
use crate::sample::{Root, Sample, below_root};
use crate::{Error, Result};

const ENDINGS: [&str; 3] = ["csv", "tsv", "txt"];
const LAYOUT: &str =
    "a .csv, .tsv or .txt file with lines PATH,LABEL[,PART], or a folder with train.csv";

pub(crate) const SOURCE: Source = Source {
    name: "list",
    layout: LAYOUT,
    recognises: |root| match root.is_dir() {
        true => {
            !has_class_folders(root, "train") && in_folder(root, "train").is_ok_and(|p| p.is_some())
        }
        false => is_list(root) && root.is_file(),
    },
    list,
};

fn is_list(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str());
    ending.is_some_and(|ending| ENDINGS.iter().any(|e| e.eq_ignore_ascii_case(ending)))
}

/// The list of a part. Two of them would leave open which one counts.
fn in_folder(root: &Path, stem: &str) -> Result<Option<PathBuf>> {
    let paths = ENDINGS
        .iter()
        .map(|ending| root.join(format!("{stem}.{ending}")));
    let found: Vec<PathBuf> = paths.filter(|path| path.is_file()).collect();
    match &found[..] {
        [_, second, ..] => {
            let problem = format!("beside it lies {stem} with another ending");
            Err(Error::layout(
                second,
                problem,
                "one list a part: remove the others",
            ))
        }
        _ => Ok(found.into_iter().next()),
    }
}

fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    one_kind_of_labels(options, SOURCE.name)?;
    if !root.is_dir() {
        return listing(root, read(root, PartName::Train)?, None);
    }
    let Some(train) = in_folder(root, "train")? else {
        return Err(Error::layout(
            root,
            "no train.csv, train.tsv or train.txt here",
            LAYOUT,
        ));
    };
    let mut samples = read(&train, PartName::Train)?;
    let mut val = None;
    for stem in ["val", "valid", "validation"] {
        let Some(path) = in_folder(root, stem)? else {
            continue;
        };
        if val.is_some() {
            let problem = "a second list of validation images";
            return Err(Error::layout(
                path,
                problem,
                "one list a part: remove the others",
            ));
        }
        val = Some(path);
    }
    if let Some(path) = val {
        samples.extend(read(&path, PartName::Val)?);
    }
    if let Some(path) = in_folder(root, "test")? {
        samples.extend(read(&path, PartName::Test)?);
    }
    listing(root, samples, None)
}

/// Which columns hold what.
struct Columns {
    path: usize,
    label: usize,
    part: Option<usize>,
}

impl Columns {
    /// From a line with names, if it is one.
    fn named(fields: &[&str]) -> Option<Self> {
        let find = |names: &[&str]| {
            let is_one = |field: &&str| names.iter().any(|n| n.eq_ignore_ascii_case(field.trim()));
            fields.iter().position(is_one)
        };
        Some(Self {
            path: find(&[
                "path",
                "file",
                "filename",
                "filepath",
                "image",
                "image_path",
            ])?,
            label: find(&["label", "class", "target", "class_name"])?,
            part: find(&["split", "part", "set"]),
        })
    }

    fn usual(count: usize) -> Self {
        let part = (count > 2).then_some(2);
        Self {
            path: 0,
            label: 1,
            part,
        }
    }
}

/// Reads one list; lines that name no part are of `part`.
fn read(path: &Path, part: PartName) -> Result<Vec<Labelled>> {
    let text = read_list(path)?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut lines = Lines {
        path,
        root: Root::confined(folder)?,
        part,
        columns: None,
        labels: Labels::default(),
        samples: Vec::new(),
    };
    let ending = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    if ending.eq_ignore_ascii_case("txt") {
        for (number, line) in lines_of(&text).filter(|(_, line)| !line.starts_with('#')) {
            // The path may hold blanks, the label cannot.
            let fields = line.rsplit_once(char::is_whitespace);
            let (image, label) = fields
                .ok_or_else(|| lines.wrong(number, format!("{} has no label", shown(line))))?;
            lines.columns.get_or_insert(Columns::usual(2));
            lines.take(number, &[image.trim_end(), label])?;
        }
    } else {
        let delimiter = match ending.eq_ignore_ascii_case("tsv") {
            true => b'\t',
            false => b',',
        };
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .comment(Some(b'#'))
            .delimiter(delimiter)
            .from_reader(text.as_bytes());
        let mut record = csv::StringRecord::new();
        loop {
            let more = reader.read_record(&mut record);
            if !more.map_err(|e| Error::layout(path, e.to_string(), LAYOUT))? {
                break;
            }
            // Where the reader stands now is the next line, unless the last one has no end; where the record
            // began may be a blank line before it.
            let after = reader.position();
            let unended = after.byte() as usize == text.len() && !text.ends_with('\n');
            let number = after.line() as usize - usize::from(!unended);
            let fields: Vec<&str> = record.iter().collect();
            lines.take(number, &fields)?;
        }
    }
    if lines.samples.is_empty() {
        return Err(Error::layout(path, "the list names no images", LAYOUT));
    }
    Ok(lines.samples)
}

struct Lines<'a> {
    path: &'a Path,
    root: Root,
    part: PartName,
    columns: Option<Columns>,
    labels: Labels,
    samples: Vec<Labelled>,
}

impl Lines<'_> {
    fn take(&mut self, number: usize, fields: &[&str]) -> Result<()> {
        let Some(columns) = &self.columns else {
            let named = Columns::named(fields);
            let is_header = named.is_some();
            self.columns = Some(named.unwrap_or_else(|| Columns::usual(fields.len())));
            return match is_header {
                true => Ok(()),
                false => self.take(number, fields),
            };
        };
        let field = |at: usize| fields.get(at).map(|field| field.trim());
        let (Some(image), Some(label)) = (field(columns.path), field(columns.label)) else {
            let problem = format!("{} columns, which is too few", fields.len());
            return Err(self.wrong(number, problem));
        };
        let part = match columns.part.and_then(field) {
            None | Some("") => self.part,
            Some(name) => PartName::of(name).ok_or_else(|| {
                self.wrong(
                    number,
                    format!("the part {name:?} (known are train, val and test)"),
                )
            })?,
        };
        if label.is_empty() {
            return Err(self.wrong(number, "no label".to_owned()));
        }
        let name = below_root(image).map_err(|problem| self.wrong(number, problem))?;
        self.samples.push(Labelled {
            part,
            label: self.labels.get(label),
            sample: Sample::file(&self.root, name, 0),
        });
        Ok(())
    }

    fn wrong(&self, number: usize, problem: String) -> Error {
        let expected = "a path below the folder of the list, and a label";
        bad_line(self.path, number, &problem, expected)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn listed(name: &str, text: &str) -> Result<Listing> {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(name);
        std::fs::write(&path, text).unwrap();
        assert!((SOURCE.recognises)(&path));
        crate::list(&path)
    }

    fn names(samples: &[Sample]) -> Vec<(&str, u32)> {
        samples.iter().map(|s| (&*s.name, s.label)).collect()
    }

    #[test]
    fn tables_of_each_kind() {
        let found = listed(
            "x.csv",
            "a/1.jpg,cat\n\"b, c/2.jpg\",dog\n# no\na/3.jpg,cat\n",
        )
        .unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        assert_eq!(
            names(&found.train),
            [("a/1.jpg", 0), ("b, c/2.jpg", 1), ("a/3.jpg", 0)]
        );
        let text = "\u{FEFF}id\tLabel\tPath\tsplit\n1\t1\t./x/1.jpg\ttest\n2\t0\tx/2.jpg\t\n3\t1\tx/3.jpg\tvalidation\n";
        let found = listed("x.tsv", text).unwrap();
        assert_eq!(found.classes, ["0", "1"]);
        assert_eq!(names(&found.train), [("x/2.jpg", 0)]);
        assert_eq!(names(&found.val.unwrap()), [("x/3.jpg", 1)]);
        assert_eq!(names(&found.test.unwrap()), [("x/1.jpg", 1)]);
        let found = listed("x.txt", "some where/1.jpg 3\n\n  b.jpg\t0  \r\n").unwrap();
        assert_eq!(names(&found.train), [("some where/1.jpg", 3), ("b.jpg", 0)]);
    }

    #[test]
    fn a_folder_with_one_list_a_part() {
        let home = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(home.path().join(name), text).unwrap();
        put("train.txt", "1.jpg a\n2.jpg b\n");
        put("test.csv", "3.jpg,b\n");
        let found = crate::list(home.path()).unwrap();
        assert_eq!(names(&found.train), [("1.jpg", 0), ("2.jpg", 1)]);
        assert_eq!(names(&found.test.unwrap()), [("3.jpg", 1)]);
        assert!(found.val.is_none());
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (name, text, part) in [
            (
                "x.csv",
                "a.jpg,1\n../b.jpg,0\n",
                "line 2: the path \"../b.jpg\", which leaves",
            ),
            ("x.csv", "/etc/passwd,1\n", "line 1: the absolute path"),
            ("x.csv", "# c\n\na.jpg,1\n\n../b.jpg,0", "line 5: the path"),
            (
                "x.csv",
                "# c\n\na.jpg,1\n\n../b.jpg,0\nc.jpg,1\n",
                "line 5: the path",
            ),
            ("x.csv", "path,label\na.jpg\n", "line 2: 1 columns"),
            (
                "x.csv",
                "a.jpg,1,somewhere\n",
                "line 1: the part \"somewhere\"",
            ),
            ("x.csv", "a.jpg,\n", "line 1: no label"),
            ("x.csv", "\n", "no images"),
            ("x.txt", "a.jpg\n", "line 1: \"a.jpg\" has no label"),
            ("x.txt", "a.jpg 0\nb.jpg 0\n", "only one class"),
            ("x.csv", "a.jpg,4000000000\n", "the label 4000000000"),
        ] {
            let error = listed(name, text).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(name), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leaves_the_folder_is_refused() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("secret"), b"x").unwrap();
        let inside = home.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("a.jpg")).unwrap();
        std::fs::write(inside.join("train.csv"), "a.jpg,0\nb.jpg,1\n").unwrap();
        let found = crate::list(&inside).unwrap();
        let error = found.train[0].decode().unwrap_err().to_string();
        assert!(error.contains("a link leads to"), "{error}");
    }
}
