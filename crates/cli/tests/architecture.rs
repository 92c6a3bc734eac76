//! Keeps the map of docs/architecture.md true: which crate may know which, who may print, where
//! files are touched. Reads manifests and sources; builds nothing.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Folder of each crate and the crates of this workspace that it may depend on. Arrows run one
/// way: cli -> experiments -> train -> {models, datasets}, models -> nn -> linalg -> device.
const MAP: [(&str, &[&str]); 9] = [
    ("device", &[]),
    ("linalg", &["device"]),
    ("nn", &["device", "linalg"]),
    ("models", &["device", "linalg", "nn"]),
    ("datasets", &[]),
    ("train", &["device", "linalg", "nn", "models", "datasets"]),
    (
        "experiments",
        // isqrt doctor checks as the tests do.
        &[
            "device", "linalg", "nn", "models", "datasets", "train", "testkit",
        ],
    ),
    (
        "cli",
        &[
            "device",
            "linalg",
            "nn",
            "models",
            "datasets",
            "train",
            "experiments",
        ],
    ),
    ("testkit", &[]),
];

/// Dependencies that only some crates may have, and those crates.
const RESERVED: [(&str, &[&str]); 5] = [
    // Libraries have typed errors; only the binary puts them together.
    ("anyhow", &["cli"]),
    // Drawing on the terminal.
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("comfy-table", &["cli"]),
    // Pixels and files know no tensors and no GPU.
    (
        "candle",
        &[
            "device",
            "linalg",
            "nn",
            "models",
            "train",
            "experiments",
            "cli",
            "testkit",
        ],
    ),
];

/// What no crate below cli does, outside its tests.
const NOT_IN_LIBRARIES: [(&str, &str); 7] = [
    ("print!(", "libraries never print"),
    ("println!(", "libraries never print"),
    ("dbg!(", "libraries never print"),
    ("process::exit", "libraries never end the process"),
    ("process::abort", "libraries never end the process"),
    ("todo!(", "nothing is left open"),
    ("unimplemented!(", "nothing is left open"),
];

/// How linalg would touch a file.
const NOT_IN_LINALG: [&str; 3] = ["std::fs", "File::", "std::io"];

fn crates_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn manifest(folder: &str) -> toml::Table {
    let path = crates_folder().join(folder).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse()
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A dependency, whether its version is the workspace's, and whether only a feature brings it.
struct Dependency {
    name: String,
    shared: bool,
    optional: bool,
}

/// What is under `[<kind>]` and `[target.*.<kind>]`.
fn dependencies(manifest: &toml::Table, kind: &str) -> Vec<Dependency> {
    let targets = manifest.get("target").and_then(|t| t.as_table());
    let tables = targets
        .into_iter()
        .flat_map(|t| t.values())
        .filter_map(|t| t.as_table())
        .chain([manifest]);
    tables
        .filter_map(|table| table.get(kind)?.as_table())
        .flatten()
        .map(|(name, value)| {
            let is = |key| value.get(key).and_then(toml::Value::as_bool) == Some(true);
            Dependency {
                name: name.clone(),
                shared: is("workspace"),
                optional: is("optional"),
            }
        })
        .collect()
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![crates_folder().join(folder).join("src")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// Lines of code with their numbers: no comments, and nothing from the file's test module on.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("").trim()))
}

#[test]
fn every_crate_is_on_the_map() {
    let on_disk: BTreeSet<String> = std::fs::read_dir(crates_folder())
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    let mapped: BTreeSet<String> = MAP.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(
        on_disk, mapped,
        "draw the crate into docs/architecture.md and MAP"
    );
}

#[test]
fn arrows_run_one_way() {
    for (folder, allowed) in MAP {
        let manifest = manifest(folder);
        for kind in ["dependencies", "build-dependencies"] {
            for Dependency { name, .. } in dependencies(&manifest, kind) {
                let Some(used) = name.strip_prefix("isqrt-") else {
                    continue;
                };
                assert!(
                    allowed.contains(&used),
                    "crates/{folder} must not depend on {name} ({allowed:?} are below it)"
                );
            }
        }
        for Dependency { name, .. } in dependencies(&manifest, "dev-dependencies") {
            if let Some(used) = name.strip_prefix("isqrt-") {
                assert!(
                    used == "testkit" || allowed.contains(&used),
                    "tests of crates/{folder} must not depend on {name}"
                );
            }
        }
    }
}

#[test]
fn reserved_dependencies_stay_where_they_belong() {
    for (folder, _) in MAP {
        let manifest = manifest(folder);
        let kinds = ["dependencies", "build-dependencies", "dev-dependencies"];
        let all = kinds.iter().flat_map(|kind| dependencies(&manifest, kind));
        for Dependency {
            name,
            shared,
            optional,
        } in all
        {
            assert!(
                shared,
                "crates/{folder}: {name} must take its version from the workspace ({name}.workspace = true)"
            );
            for (reserved, holders) in RESERVED {
                let is_it = name == reserved || name.starts_with(&format!("{reserved}-"));
                assert!(
                    // What only a feature brings is not in the usual build.
                    !is_it || optional || holders.contains(&folder),
                    "crates/{folder} must not depend on {name}; only {holders:?} may"
                );
            }
        }
        let inherits = manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace"))
            .and_then(toml::Value::as_bool);
        assert_eq!(
            inherits,
            Some(true),
            "crates/{folder} lacks [lints] workspace = true"
        );
    }
}

#[test]
fn libraries_neither_print_nor_exit() {
    for (folder, _) in MAP.iter().filter(|(folder, _)| *folder != "cli") {
        for (path, text) in sources(folder) {
            for (number, line) in code(&text) {
                for (pattern, rule) in NOT_IN_LIBRARIES {
                    let at = format!("{}:{number}", path.display());
                    assert!(!line.contains(pattern), "{at}: {rule}, found {pattern}");
                }
            }
        }
    }
}

#[test]
fn linalg_touches_no_file() {
    for (path, text) in sources("linalg") {
        for (number, line) in code(&text) {
            for pattern in NOT_IN_LINALG {
                let at = format!("{}:{number}", path.display());
                assert!(!line.contains(pattern), "{at}: linalg touches no file");
            }
        }
    }
}

#[test]
fn every_source_file_says_what_lives_in_it() {
    for (folder, _) in MAP {
        for (path, text) in sources(folder) {
            assert!(
                text.starts_with("//!"),
                "{}: a file opens with a //! header of a few lines",
                path.display()
            );
        }
    }
}
