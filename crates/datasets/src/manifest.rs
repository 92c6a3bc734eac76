//! What a data set must hold: classes, counts a class and part, checksums of its files.
//!
//! Those of known sets lie in `data/manifests` and are part of the program.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::lines::lines;
use crate::{Error, Result};

macro_rules! manifest {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("../../../data/manifests/", $name, ".toml")),
            include_str!(concat!("../../../data/manifests/", $name, ".tsv")),
        )
    };
}

/// Name, description and table of counts of each known set.
const KNOWN: [(&str, &str, &str); 4] = [
    manifest!("cub-200-2011"),
    manifest!("stanford-cars"),
    manifest!("fgvc-aircraft-2013b"),
    manifest!("imagenet-1k"),
];

/// Expectations of one data set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Manifest {
    /// Its name, that of the [`crate::Source`] that reads it.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// The page of its owners.
    pub home: String,
    /// What its owners allow, in short.
    pub terms: String,
    /// Which of several kinds of labels the classes are (see [`crate::ListOptions::labels`]).
    pub labels: Option<String>,
    /// Name of each class in label order, and its number of images by part (`train`, `val`, `test`).
    pub classes: Vec<(String, BTreeMap<String, usize>)>,
    /// What its files hash to.
    pub checksums: Vec<Checksum>,
}

/// What a file hashes to; one of both hashes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checksum {
    /// Path below the folder of the data set or the folder around it.
    pub file: String,
    /// In hexadecimal.
    pub md5: Option<String>,
    /// In hexadecimal.
    pub sha256: Option<String>,
    /// Who says so.
    pub source: String,
}

/// The TOML part.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    title: String,
    home: String,
    terms: String,
    labels: Option<String>,
    classes: usize,
    parts: BTreeMap<String, usize>,
    #[serde(default)]
    checksums: Vec<Checksum>,
}

impl Manifest {
    /// Names of the known sets.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|(name, ..)| *name)
    }

    /// The manifest of a known set; None for any other name.
    ///
    /// # Errors
    /// [`Error::Config`] where the program was built with a broken one.
    pub fn of(name: &str) -> Result<Option<Self>> {
        let known = KNOWN.iter().find(|(known, ..)| *known == name);
        let parse = |(name, description, counts): &(&str, &str, &str)| {
            Self::parse(name, description, counts)
                .map_err(|problem| Error::Config(format!("the manifest {name}: {problem}")))
        };
        known.map(parse).transpose()
    }

    /// From its description (TOML) and its table (tab-separated: a header `class`, then names of parts; a
    /// line a class).
    fn parse(name: &str, description: &str, counts: &str) -> Result<Self, String> {
        let described: Description = toml::from_str(description).map_err(|e| e.to_string())?;
        let mut rows = lines(counts);
        let (_, header) = rows.next().ok_or("an empty table")?;
        let parts: Vec<&str> = header.split('\t').skip(1).collect();
        let row = |(number, line): (usize, &str)| {
            let mut cells = line.split('\t');
            let class = cells.next().unwrap_or_default().to_owned();
            let counts: Option<Vec<usize>> = cells.map(|cell| cell.parse().ok()).collect();
            let counts = counts.filter(|counts| counts.len() == parts.len());
            let counts = counts.ok_or_else(|| format!("line {number} of the table"))?;
            let parts = parts.iter().map(|part| (*part).to_owned());
            Ok((class, parts.zip(counts).collect()))
        };
        let manifest = Self {
            name: name.to_owned(),
            title: described.title,
            home: described.home,
            terms: described.terms,
            labels: described.labels,
            classes: rows.map(row).collect::<Result<_, String>>()?,
            checksums: described.checksums,
        };
        if manifest.classes.len() != described.classes || manifest.parts() != described.parts {
            return Err(format!(
                "its table has {} classes and the images {:?}",
                manifest.classes.len(),
                manifest.parts()
            ));
        }
        Ok(manifest)
    }

    /// Number of images in each part.
    #[must_use]
    pub fn parts(&self) -> BTreeMap<String, usize> {
        let mut parts = BTreeMap::new();
        for (part, count) in self.classes.iter().flat_map(|(_, counts)| counts) {
            *parts.entry(part.clone()).or_default() += count;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_manifest_is_that_of_a_source_and_sound() {
        for name in Manifest::names() {
            let manifest = Manifest::of(name).unwrap().unwrap();
            assert!(crate::SOURCES.iter().any(|s| s.name == name), "{name}");
            for checksum in &manifest.checksums {
                let hashes = (checksum.md5.as_ref(), checksum.sha256.as_ref());
                match hashes {
                    (Some(md5), None) => assert_eq!(md5.len(), 32),
                    (None, Some(sha256)) => assert_eq!(sha256.len(), 64),
                    both => panic!("{name}: {both:?}"),
                }
            }
        }
        assert_eq!(Manifest::of("folder").unwrap(), None);
    }

    #[test]
    fn a_table_that_disagrees_is_an_error() {
        let text = "title = 'T'\nhome = 'h'\nterms = 't'\nclasses = 2\n[parts]\ntrain = 3\n";
        let parse = |table: &str| Manifest::parse("t", text, table);
        let good = parse("class\ttrain\na b\t1\nc\t2\n").unwrap();
        assert_eq!(good.classes[0].0, "a b");
        for bad in [
            "",
            "class\ttrain\na\t1\nc\t3\n",
            "class\ttrain\na\t3\n",
            "class\ttrain\na\t1\nc\n",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
