//! What a folder has of a run, and how it goes on from there.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use isqrt_models::{WholeFile, sync_folder_of};

use super::folder::{Log, failed};
use super::{Paths, Resume, RunResult};
use crate::data::DataInfo;
use crate::state::Saved;
use crate::{Error, Result, SpecFile, counted};

/// The result of a run that needs nothing more.
pub(super) fn finished(
    paths: &Paths,
    file: &SpecFile,
    resume: &Resume,
    spec_hash: &str,
    data: &DataInfo,
) -> Result<Option<RunResult>> {
    let old = match std::fs::read_to_string(paths.spec()) {
        Ok(text) => text,
        Err(_) => return Ok(None),
    };
    let refuse = |message: String| {
        Err(Error::Run {
            path: paths.root.clone(),
            message,
        })
    };
    if *resume == Resume::Never {
        return refuse(
            "has a run already: choose another folder with --out, remove it, or leave --resume out to go \
             on with it"
                .to_owned(),
        );
    }
    let old: std::result::Result<crate::Spec, _> = toml::from_str(&old);
    let same = match &old {
        Ok(old) => old.hash()? == spec_hash,
        Err(_) => false,
    };
    // A run that ended before its first checkpoint has nothing to lose.
    let kept = ["last", "previous", "best"].map(|name| paths.checkpoint(name).exists());
    if !same && !kept.contains(&true) && !paths.result().exists() {
        return Ok(None);
    }
    if !same {
        let what = old.map_or_else(
            |_| "its spec.toml cannot be read".to_owned(),
            |old| difference(&old, &file.spec),
        );
        return refuse(format!(
            "has a run of another spec ({what}): choose another folder with --out"
        ));
    }
    let result = std::fs::read(paths.result());
    let result: Option<RunResult> = result.ok().and_then(|b| serde_json::from_slice(&b).ok());
    let result = result.filter(|result| result.status == "finished" && *resume == Resume::Auto);
    if result
        .as_ref()
        .is_some_and(|r| r.data_fingerprint != data.fingerprint)
    {
        return refuse(
            "has a finished run on other images (another fingerprint): choose another folder with --out"
                .to_owned(),
        );
    }
    Ok(result)
}

/// The first key that two specs do not have in common, with both values.
pub(super) fn difference(old: &crate::Spec, new: &crate::Spec) -> String {
    let flat = |spec: &crate::Spec| {
        let mut values = Vec::new();
        if let Ok(toml::Value::Table(table)) = toml::Value::try_from(spec.decisive()) {
            flatten("", &table, &mut values);
        }
        values
    };
    let (old, new) = (flat(old), flat(new));
    let value = |values: &[(String, String)], key: &str| {
        let found = values.iter().find(|(k, _)| k == key);
        found.map_or_else(|| "not set".to_owned(), |(_, v)| v.clone())
    };
    let mut keys = old.iter().chain(&new).map(|(key, _)| key);
    let differs = keys.find(|key| value(&old, key) != value(&new, key));
    differs.map_or_else(
        || "the same keys".to_owned(),
        |key| {
            format!(
                "{key} is {} there, {} here",
                value(&old, key),
                value(&new, key)
            )
        },
    )
}

pub(super) fn flatten(prefix: &str, table: &toml::Table, values: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let path = match prefix {
            "" => key.clone(),
            prefix => format!("{prefix}.{key}"),
        };
        match value {
            toml::Value::Table(table) => flatten(&path, table, values),
            value => values.push((path, value.to_string())),
        }
    }
}

/// How the spec of the run that a state lies in differs from this one.
pub(super) fn other_spec(state: &Path, file: &SpecFile) -> Option<String> {
    let old = std::fs::read_to_string(state.parent()?.join("../spec.toml")).ok()?;
    let old: crate::Spec = toml::from_str(&old).ok()?;
    (old.decisive() != file.spec.decisive()).then(|| difference(&old, &file.spec))
}

/// The state to go on from.
pub(super) fn open_saved(
    paths: &Paths,
    file: &SpecFile,
    resume: &Resume,
    identity: &str,
    console: &mut Log<'_>,
) -> Result<Option<Saved>> {
    let saved = match resume {
        Resume::Never => return Ok(None),
        Resume::From(path) => {
            let saved = Saved::open(path, identity);
            Some(
                saved.map_err(|error| match (error, other_spec(path, file)) {
                    (Error::File { path, message }, Some(what)) => Error::File {
                        path,
                        message: format!("{message} ({what})"),
                    },
                    (error, _) => error,
                })?,
            )
        }
        Resume::Auto => {
            let mut problems = Vec::new();
            let mut found = None;
            for name in ["last", "previous"] {
                let path = paths.checkpoint(name);
                if !path.exists() {
                    continue;
                }
                match Saved::open(&path, identity) {
                    Ok(saved) => {
                        found = Some(saved);
                        break;
                    }
                    Err(error) => {
                        console.say(&format!("{error}; looking for the one before"));
                        problems.push(error.to_string());
                    }
                }
            }
            if found.is_none() && !problems.is_empty() {
                return Err(Error::Run {
                    path: paths.root.clone(),
                    message: format!(
                        "no checkpoint of it can be gone on from ({}): remove the folder to start again",
                        problems.join("; ")
                    ),
                });
            }
            found
        }
    };
    if let Some(saved) = &saved {
        let progress = saved.progress();
        console.say(&format!(
            "going on after {} and {}",
            counted(progress.epoch, "epoch"),
            counted(progress.step, "update")
        ));
    }
    Ok(saved)
}

/// The metrics of a run that goes on: what was written after its state is written again. With the number
/// of lines that were there, at most those that the state counts.
pub(super) fn open_metrics(path: &Path, lines: u64) -> Result<(File, u64)> {
    let open = || -> std::io::Result<(File, u64)> {
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(path)?;
        let (mut length, mut there) = (0, 0);
        let mut reader = BufReader::new(&mut file);
        let mut line = Vec::new();
        for _ in 0..lines {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                break;
            }
            length += read as u64;
            there += 1;
        }
        file.set_len(length)?;
        file.seek(SeekFrom::End(0))?;
        Ok((file, there))
    };
    open().map_err(|error| failed(path, &error))
}

/// Makes the state that was written beside the two others the last one, and that the one before. A process
/// that is killed meanwhile leaves `next`, which is whole, for the one after it.
pub(super) fn complete_move(paths: &Paths) -> Result<()> {
    let [next, last, previous] = ["next", "last", "previous"].map(|name| paths.checkpoint(name));
    let move_on = || -> std::io::Result<()> {
        if !next.exists() {
            return Ok(());
        }
        if last.exists() {
            std::fs::rename(&last, &previous)?;
        }
        std::fs::rename(&next, &last)?;
        sync_folder_of(&last);
        Ok(())
    };
    move_on().map_err(|error| failed(&last, &error))
}

/// Metrics and best weights of the run that a state is taken from, where it is of another folder.
pub(super) fn bring_along(state: &Path, paths: &Paths, console: &mut Log<'_>) -> Result<()> {
    let folder = state.parent().unwrap_or(Path::new(""));
    let from = folder.join("..").join("metrics.jsonl");
    for (from, to) in [
        (from, paths.metrics()),
        (folder.join("best.safetensors"), paths.checkpoint("best")),
    ] {
        if to.exists() {
            continue;
        }
        match from.exists() {
            true => {
                let copy = || {
                    let mut file = WholeFile::create(&to)?;
                    std::io::copy(&mut File::open(&from)?, file.file()?)?;
                    file.finish()
                };
                copy().map_err(|error| failed(&to, &error))?;
            }
            false => console.say(&format!("there is no {}", from.display())),
        }
    }
    Ok(())
}
