//! TOML files in layers: parts that a file `extends`, the file itself, and settings over it, each value
//! with the place that it comes from, so that a mistake is told with file, line and key.
//!
//! Tables are merged key by key; anything else replaces what is below it, and so does a table that
//! says another `name` or `kind`, whose other keys belong to that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isqrt_models::{hint, in_words, nearest};
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::{Error, Result};

/// Where the parts of a file are named.
const EXTENDS: &str = "extends";

/// A table merged from several files, and where each of its values stands.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    table: toml::Table,
    places: BTreeMap<String, Place>,
}

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    file: String,
    /// From 1; none for settings of the command line.
    line: Option<usize>,
}

impl Layers {
    /// A file with the parts that it extends, whose paths are relative to the file that names them.
    ///
    /// # Errors
    /// [`Error::Spec`] for what cannot be read, is no TOML, or extends itself.
    pub fn read(path: &Path) -> Result<Self> {
        let mut this = Self::default();
        this.add(path, &mut Vec::new())?;
        this.remove(EXTENDS);
        Ok(this)
    }

    fn add(&mut self, path: &Path, open: &mut Vec<PathBuf>) -> Result<()> {
        let file = path.display().to_string();
        let failed = |line, message: String| {
            Err(Error::Spec {
                file: file.clone(),
                line,
                key: String::new(),
                message,
            })
        };
        let name = path.to_string_lossy();
        let of_weights = [".safetensors", ".pth", ".pt", ".pth.tar"];
        if of_weights.iter().any(|end| name.ends_with(end)) {
            let message = "is a file of weights, not an experiment: `isqrt eval RUN` takes the folder of a run, \
                           `isqrt eval SPEC --weights FILE` an experiment file and weights";
            return failed(None, message.to_owned());
        }
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                let by = open.last().map_or_else(String::new, |by| {
                    format!(" (which {} extends)", by.display())
                });
                return failed(None, format!("cannot be read{by}: {error}"));
            }
        };
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if open.contains(&real) {
            return failed(None, "extends itself".to_owned());
        }
        let own: toml::Table = match toml::from_str(&text) {
            Ok(own) => own,
            Err(error) => {
                let line = error.span().map(|span| line_of(&text, span.start));
                return failed(line, one_line(error.message()));
            }
        };
        if own.contains_key("columns") && own.contains_key("rows") {
            let name = path.file_stem().unwrap_or_default().display();
            let message = format!("is a table of the paper, which `isqrt reproduce {name}` runs");
            return failed(None, message);
        }
        let parts = match own.get(EXTENDS) {
            None => Vec::new(),
            Some(toml::Value::Array(parts)) if parts.iter().all(toml::Value::is_str) => {
                parts.iter().filter_map(toml::Value::as_str).collect()
            }
            Some(_) => {
                let message = "`extends` must be a list of paths, like [\"../_base/resnet.toml\"]";
                return failed(None, message.to_owned());
            }
        };
        let folder = path.parent().unwrap_or(Path::new(""));
        open.push(real);
        for part in parts {
            self.add(&folder.join(part), open)?;
        }
        open.pop();
        let mut lines = BTreeMap::new();
        if let Ok(table) = DeTable::parse(&text) {
            note_table("", table.get_ref(), &text, &mut lines);
        }
        self.merge(own, &|path| Place {
            file: file.clone(),
            line: lines.get(path).copied(),
        });
        Ok(())
    }

    /// Sets a value as `--set a.b=v` does: `v` is read as TOML, or else as text.
    ///
    /// # Errors
    /// [`Error::Spec`] for a setting without `=` or with an empty key.
    pub fn set(&mut self, setting: &str) -> Result<()> {
        let failed = |message: &str| {
            Err(Error::Spec {
                file: format!("--set {setting}"),
                line: None,
                key: String::new(),
                message: message.to_owned(),
            })
        };
        let Some((key, value)) = setting.split_once('=') else {
            return failed("must be KEY=VALUE, like optimiser.lr=0.1");
        };
        let keys: Vec<&str> = key.trim().split('.').collect();
        if keys.iter().any(|key| key.is_empty()) {
            return failed("has an empty key: write it like optimiser.lr=0.1");
        }
        let value = value.trim();
        let read: std::result::Result<toml::Table, _> = toml::from_str(&format!("v = {value}"));
        let mut value = match read {
            Ok(mut table) if table.len() == 1 => table.remove("v").unwrap_or_else(|| value.into()),
            _ => toml::Value::from(value),
        };
        for key in keys.iter().rev() {
            value = toml::Value::Table([((*key).to_owned(), value)].into_iter().collect());
        }
        if let toml::Value::Table(table) = value {
            let place = Place {
                file: format!("--set {setting}"),
                line: None,
            };
            self.merge(table, &|_| place.clone());
        }
        Ok(())
    }

    /// Takes the images from here, in place of whatever the files say: `--data ROOT`.
    pub fn set_data(&mut self, root: &str) {
        if let Some(toml::Value::Table(data)) = self.table.get_mut("data") {
            data.remove("set");
        }
        forget(&mut self.places, "data.set");
        let place = Place {
            file: format!("--data {root}"),
            line: None,
        };
        let data = toml::Table::from_iter([("root".to_owned(), root.into())]);
        let over = toml::Table::from_iter([("data".to_owned(), data.into())]);
        self.merge(over, &|_| place.clone());
    }

    fn remove(&mut self, key: &str) {
        self.table.remove(key);
        forget(&mut self.places, key);
    }

    fn merge(&mut self, over: toml::Table, place: &dyn Fn(&str) -> Place) {
        merge(&mut self.table, over, "", &mut self.places, place);
    }

    /// The merged table as a type whose unknown keys are errors.
    ///
    /// # Errors
    /// [`Error::Spec`] with file, line and key; for an unknown key with the nearest known one.
    pub fn read_as<T: DeserializeOwned>(&self) -> Result<T> {
        let value = toml::Value::Table(self.table.clone());
        serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            let path = if path == "." { String::new() } else { path };
            self.problem(&path, error.inner().message())
        })
    }

    /// An error about a key, with the place where it was set, or where the table that it belongs to
    /// was.
    #[must_use]
    pub fn problem(&self, key: &str, message: &str) -> Error {
        let mut key = key.to_owned();
        let mut message = in_words(&one_line(message));
        let quoted: Vec<String> = message
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect();
        if let (true, Some((unknown, known))) =
            (message.starts_with("unknown field"), quoted.split_first())
        {
            // The path ends at the key itself, or at the table around it.
            let last = key.rsplit('.').next().unwrap_or_default();
            if last != unknown {
                let separator = if key.is_empty() { "" } else { "." };
                key = format!("{key}{separator}{unknown}");
            }
            let near = hint(nearest(unknown, known.iter().map(String::as_str)).as_deref());
            message = format!("is not known{near}");
        }
        if let (true, Some((unknown, known))) =
            (message.starts_with("unknown variant"), quoted.split_first())
        {
            message += &hint(nearest(unknown, known.iter().map(String::as_str)).as_deref());
        }
        let mut at = key.as_str();
        let place = loop {
            if let Some(place) = self.places.get(at) {
                break Some(place.clone());
            }
            match at.rfind(['.', '[']) {
                Some(end) => at = &at[..end],
                None => break None,
            }
        };
        let (file, line) = place.map_or((String::new(), None), |p| (p.file, p.line));
        Error::Spec {
            file,
            line,
            key,
            message,
        }
    }
}

fn merge(
    under: &mut toml::Table,
    over: toml::Table,
    prefix: &str,
    places: &mut BTreeMap<String, Place>,
    place: &dyn Fn(&str) -> Place,
) {
    for (key, value) in over {
        let path = match prefix {
            "" => key.clone(),
            prefix => format!("{prefix}.{key}"),
        };
        // A part by its name alone takes the options of a table that says no name.
        if let (Some(name @ toml::Value::String(_)), toml::Value::Table(above)) =
            (under.get_mut(&key), &value)
            && !above.contains_key("name")
        {
            let name = std::mem::replace(name, toml::Value::Table(toml::Table::new()));
            if let Some(toml::Value::Table(below)) = under.get_mut(&key) {
                below.insert("name".to_owned(), name);
            }
        }
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above))
                if !renames(below, &above) =>
            {
                places.insert(path.clone(), place(&path));
                merge(below, above, &path, places, place);
            }
            (_, value) => {
                forget(places, &path);
                note_places(&path, &value, places, place);
                under.insert(key, value);
            }
        }
    }
}

/// Whether a table says that it is another thing than the one below it.
fn renames(below: &toml::Table, above: &toml::Table) -> bool {
    ["name", "kind"]
        .iter()
        .any(|key| matches!((below.get(*key), above.get(*key)), (Some(was), Some(is)) if was != is))
}

/// Drops what is known of a key and of all below it.
fn forget(places: &mut BTreeMap<String, Place>, path: &str) {
    places.retain(|known, _| {
        let rest = known.strip_prefix(path);
        !rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    });
}

fn note_places(
    path: &str,
    value: &toml::Value,
    places: &mut BTreeMap<String, Place>,
    place: &dyn Fn(&str) -> Place,
) {
    places.insert(path.to_owned(), place(path));
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                note_places(&format!("{path}.{key}"), value, places, place);
            }
        }
        toml::Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                note_places(&format!("{path}[{i}]"), value, places, place);
            }
        }
        _ => {}
    }
}

/// The line of each key, by its path: `optimiser.lr`, `groups[0].pattern`.
fn note_table(prefix: &str, table: &DeTable<'_>, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        let path = match prefix {
            "" => key.get_ref().to_string(),
            prefix => format!("{prefix}.{}", key.get_ref()),
        };
        lines.insert(path.clone(), line_of(text, key.span().start));
        note_value(&path, value.get_ref(), text, lines);
    }
}

fn note_value(path: &str, value: &DeValue<'_>, text: &str, lines: &mut BTreeMap<String, usize>) {
    match value {
        DeValue::Table(table) => note_table(path, table, text, lines),
        DeValue::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                let path = format!("{path}[{i}]");
                lines.insert(path.clone(), line_of(text, value.span().start));
                note_value(&path, value.get_ref(), text, lines);
            }
        }
        _ => {}
    }
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.get(..at).unwrap_or_default();
    before.matches('\n').count() + 1
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Example {
        epochs: usize,
        #[serde(default)]
        optimiser: BTreeMap<String, f64>,
        #[serde(default)]
        groups: Vec<Group>,
        #[serde(default)]
        head: toml::Table,
        #[serde(default)]
        tail: toml::Table,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Group {
        pattern: String,
    }

    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn a_leaf_lies_over_its_parts_and_settings_over_both() {
        let dir = files(&[
            (
                "_base/a.toml",
                "epochs = 1\n[optimiser]\nlr = 0.1\nmomentum = 0.9\n[head]\nname = \"isqrt\"\niterations = 5",
            ),
            (
                "leaf/x.toml",
                "extends = [\"../_base/a.toml\"]\nhead = { name = \"gap\" }\n[optimiser]\nlr = 0.2",
            ),
        ]);
        let mut layers = Layers::read(&dir.path().join("leaf/x.toml")).unwrap();
        layers.set("epochs = 7").unwrap();
        layers.set("groups=[{pattern='a'}]").unwrap();
        layers.set("head.path=/some/where").unwrap();
        layers.set("tail=isqrt").unwrap();
        layers.set("tail.iterations=3").unwrap();
        let read: Example = layers.read_as().unwrap();
        assert_eq!(read.epochs, 7);
        assert_eq!(read.optimiser["lr"], 0.2);
        assert_eq!(read.optimiser["momentum"], 0.9);
        assert_eq!(read.groups[0].pattern, "a");
        // Another name: what belonged to the one below is gone.
        assert!(!read.head.contains_key("iterations"));
        assert_eq!(read.head["path"].as_str(), Some("/some/where"));
        // A name alone is a table without options.
        assert_eq!(read.tail["name"].as_str(), Some("isqrt"));
        assert_eq!(read.tail["iterations"].as_integer(), Some(3));
    }

    #[test]
    fn mistakes_are_told_with_file_line_key_and_the_nearest_known_one() {
        let dir = files(&[
            ("base.toml", "# a comment\nepochs = 1\n\nepoch = 2"),
            (
                "types.toml",
                "epochs = 1\n[[groups]]\npattern = \"a\"\n[[groups]]\npattern = 3",
            ),
            ("leaf.toml", "extends = [\"base.toml\"]"),
            ("missing.toml", "extends = [\"none.toml\"]"),
            ("loop.toml", "extends = [\"loop.toml\"]"),
            ("broken.toml", "epochs = 1\nepochs = = 2"),
        ]);
        let message = |name: &str, set: &[&str]| {
            let read = || -> Result<Example> {
                let mut layers = Layers::read(&dir.path().join(name))?;
                for setting in set {
                    layers.set(setting)?;
                }
                layers.read_as()
            };
            read().unwrap_err().to_string()
        };
        for (name, set, parts) in [
            (
                "leaf.toml",
                &[][..],
                &["base.toml", "line 4", "`epoch`", "`epochs`"][..],
            ),
            (
                "types.toml",
                &[],
                &["line 5", "groups[1].pattern", "string"],
            ),
            ("missing.toml", &[], &["none.toml", "missing.toml extends"]),
            ("loop.toml", &[], &["extends itself"]),
            ("broken.toml", &[], &["broken.toml", "line 2"]),
            ("types.toml", &["epochs"], &["--set epochs", "KEY=VALUE"]),
            (
                "types.toml",
                &["groups=[]", "epochs=many"],
                &["--set epochs=many", "`epochs`"],
            ),
        ] {
            let message = message(name, set);
            for part in parts {
                assert!(message.contains(part), "{name}: {part}: {message}");
            }
        }
    }
}
