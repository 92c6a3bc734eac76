//! Results that stay in the repository: one folder below `experiments/records` for each experiment that
//! a claim of the documentation rests on, and the pages that are made of these.
//!
//! A folder holds `plan.json` and `records.jsonl` (with every seed's epochs) as a run folder does, so that
//! `isqrt report` shows it, and for people `spec.toml`, the experiment as it was resolved, and
//! `environment.json`, what it ran on.

use crate::error::{Error, Result};
use crate::files::{make_dir, write_atomically};
use crate::plan::{self, Plan, State};
use crate::record::{self, DataInfo, Record, Store};
use crate::report::{markdown, model::Page};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Name of the archive's folders: the experiment's, and after a point that of other images.
fn folder_name(id: &str, images: Option<&str>) -> String {
    match images {
        Some(images) => format!("{id}.{images}"),
        None => id.to_owned(),
    }
}

/// Where and on what an experiment ran.
#[derive(Debug, Serialize)]
struct Environment<'a> {
    profile: &'static str,
    commits: BTreeSet<&'a str>,
    versions: BTreeSet<&'a str>,
    machines: Vec<&'a crate::machine::Machine>,
    data: &'a BTreeMap<String, DataInfo>,
    started: u64,
    finished: u64,
    /// Of all cells together.
    seconds: f64,
}

/// Copies the experiments of a run folder that are done into an archive; their names. `images` is the
/// name of the data where they are not the program's own.
///
/// # Errors
/// [`Error::NotARun`] where there is no plan, [`Error::Unsupported`] where cells are missing or only
/// of the smallest size, [`Error::Io`].
pub fn save(dir: &Path, archive: &Path, images: Option<&str>) -> Result<Vec<String>> {
    let plan = Plan::read(dir)?;
    if plan.experiments.is_empty() {
        return Err(Error::NotARun {
            path: dir.to_owned(),
            missing: plan::FILE,
        });
    }
    let store = Store::read(dir)?;
    let mut names = Vec::new();
    for planned in &plan.experiments {
        let id = &planned.id;
        if planned.smoke || planned.effort == plan::Effort::Quick {
            return Err(Error::Unsupported(format!(
                "{id} was run at the smallest size only, or quickly, which is no result to keep"
            )));
        }
        let left_out = State::NotRun(plan::LEFT_OUT.to_owned());
        if let Some(cell) = planned.cells.iter().find(|c| c.state == left_out) {
            return Err(Error::Unsupported(format!(
                "{id}: row {} was left out by --row; kept are whole experiments, so run it without",
                cell.row
            )));
        }
        let cells = planned.cells.iter();
        let wanted = cells.filter(|c| !matches!(c.state, State::NotRun(_)) && !c.is_search());
        let mut records: Vec<&Record> = Vec::new();
        for cell in wanted {
            let record = store.latest_of(id, cell).filter(|_| !cell.key.is_empty());
            records.push(record.ok_or_else(|| {
                Error::Unsupported(format!(
                    "{id}: {} is not done yet; the same command goes on",
                    cell.name()
                ))
            })?);
        }
        // Of experiments that are not run with these images there is nothing to keep.
        if records.is_empty() {
            continue;
        }
        let name = folder_name(id, images);
        let folder = archive.join(&name);
        make_dir(&folder)?;
        let mut planned = planned.clone();
        // Paths and outputs of the machine that it ran on are nobody else's.
        planned.command = format!("isqrt reproduce {id}");
        planned.cells.retain(|c| !c.is_search());
        planned.search = false;
        let spec = toml::to_string(&planned.experiment)
            .map_err(|e| Error::Unsupported(format!("{id}: {e}")))?;
        write_atomically(&folder.join("spec.toml"), spec.as_bytes())?;
        let environment = Environment {
            profile: planned.profile.name(),
            commits: records.iter().map(|r| r.commit.as_str()).collect(),
            versions: records.iter().map(|r| r.version.as_str()).collect(),
            machines: distinct(records.iter().map(|r| &r.machine)),
            data: &planned.data,
            started: records.iter().map(|r| r.started).min().unwrap_or(0),
            finished: records.iter().map(|r| r.finished).max().unwrap_or(0),
            seconds: records.iter().map(|r| r.seconds).sum(),
        };
        write_json(&folder.join("environment.json"), &environment)?;
        let mut lines = Vec::new();
        let mut seen = BTreeSet::new();
        for record in records.iter().filter(|r| seen.insert(&r.key)) {
            lines.extend(serde_json::to_vec(record).map_err(|e| other(&folder, e))?);
            lines.push(b'\n');
        }
        write_atomically(&folder.join(record::FILE), &lines)?;
        let plan = Plan {
            experiments: vec![planned],
        };
        write_json(&folder.join(plan::FILE), &plan)?;
        names.push(name);
    }
    Ok(names)
}

fn distinct<'a, T: PartialEq>(all: impl Iterator<Item = &'a T>) -> Vec<&'a T> {
    let mut found: Vec<&T> = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| other(path, e))?;
    text.push(b'\n');
    write_atomically(path, &text)
}

fn other(path: &Path, error: serde_json::Error) -> Error {
    Error::io("write", path)(std::io::Error::other(error))
}

/// Name, plan and records of every folder of an archive, in the order of the report.
///
/// # Errors
/// [`Error::Io`] if a file cannot be read or understood.
pub fn read(archive: &Path) -> Result<Vec<(String, Plan, Store)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(archive).map_err(Error::io("read the folder", archive))? {
        let path = entry.map_err(Error::io("read the folder", archive))?.path();
        if path.join(plan::FILE).is_file() {
            let name = path.file_name().unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            all.push((name, Plan::read(&path)?, Store::read(&path)?));
        }
    }
    all.sort_by_key(|(name, plan, _)| {
        let order = plan.experiments.first().map_or(0, |p| p.experiment.order);
        (name.contains('.'), order, name.clone())
    });
    Ok(all)
}

/// `docs/results.md`: every kept result with its table, claims and origin.
///
/// # Errors
/// As [`read()`].
pub fn results_page(archive: &Path) -> Result<String> {
    let mut out = String::from(
        "# Results\n\nMade of `experiments/records` by `isqrt report --archive`; a test fails where the two \
         differ. Numbers of the mini profile are those of small networks on small images: compare the order of \
         rows, not levels. Images and network of the tables on `imagenet` were chosen because the paper's order \
         showed in a search with another seed, so these tables test other seeds, not other problems; those of the \
         tables on `residual` train networks of all three depths, and iSQRT-COV was ahead of average pooling in \
         that search too: [reproducing](reproducing.md#how-the-protocol-was-found).\n",
    );
    for (name, plan, store) in read(archive)? {
        let page = Page::new(&plan, &store);
        for section in &page.sections {
            markdown::result(&mut out, section, &name);
        }
    }
    out.push_str(&format!("\n{}\n", crate::claims::CRITERION));
    Ok(out)
}

/// The table of one kept result, for a page that shows it, see [`put_tables`].
///
/// # Errors
/// As [`read()`]; [`Error::NotARun`] for a name that there is not.
pub fn table(archive: &Path, name: &str) -> Result<String> {
    let path = archive.join(name);
    let (plan, store) = (Plan::read(&path)?, Store::read(&path)?);
    let page = Page::new(&plan, &store);
    let section = page.sections.first().ok_or_else(|| Error::NotARun {
        path: path.clone(),
        missing: plan::FILE,
    })?;
    let mut out = String::new();
    markdown::table(&mut out, &section.table);
    for sentence in &section.orderings {
        out.push_str(&format!("\n{sentence}\n"));
    }
    Ok(out)
}

/// How many claims of the kept results on the program's own images came out how, in a sentence.
///
/// # Errors
/// As [`read()`].
pub fn summary(archive: &Path) -> Result<String> {
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    let (mut orders, mut found) = (0, 0);
    for (name, plan, store) in read(archive)? {
        if name.contains('.') {
            continue;
        }
        for section in &Page::new(&plan, &store).sections {
            for verdict in &section.verdicts {
                *counts.entry(verdict.outcome.words()).or_default() += 1;
            }
            orders += section.orderings.len();
            found += (section.orderings.iter())
                .filter(|s| s.starts_with("The paper's order was found"))
                .count();
        }
    }
    let all: usize = counts.values().sum();
    let mut counts: Vec<(&str, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(words, count)| (std::cmp::Reverse(*count), *words));
    let list: Vec<String> = counts.iter().map(|(w, n)| format!("{n} {w}")).collect();
    Ok(format!(
        "Of all {all} claims that these tables check: {}. The paper's order of the rows was found for {found} of {orders} \
         columns.\n",
        list.join(", ")
    ))
}

/// A page with every table between `<!-- records: NAME -->` and `<!-- end -->` made again, and in place of
/// the name `summary` the [`summary`].
///
/// # Errors
/// As [`table`]; [`Error::Unsupported`] for a line without its end.
pub fn put_tables(page: &str, archive: &Path) -> Result<String> {
    const END: &str = "<!-- end -->";
    let mut out = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("<!-- records: ") {
        let unclosed = || Error::Unsupported("`<!-- records:` without `<!-- end -->`".to_owned());
        let (name, after) = after.split_once(" -->").ok_or_else(unclosed)?;
        let (_, after) = after.split_once(END).ok_or_else(unclosed)?;
        let table = match name {
            "summary" => summary(archive)?,
            _ => table(archive, name)?,
        };
        out.push_str(&format!(
            "{before}<!-- records: {name} -->\n\n{table}\n{END}"
        ));
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}
