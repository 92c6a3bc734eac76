//! The report of a run folder: `report/index.html`, one self-contained page, `report/report.md`, and
//! `report/tables/*.csv` and `*.tex`, all from the same [`model::Page`]. [`runs`] has that of training runs.

mod html;
pub(crate) mod markdown;
pub mod model;
pub mod plot;
pub mod runs;
mod tables;

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::plan::Plan;
use crate::record::Store;
use std::path::{Path, PathBuf};

/// Where the report of a run folder lies.
pub fn page_path(dir: &Path) -> PathBuf {
    dir.join("report").join("index.html")
}

/// Writes the report of whatever the folders hold: one folder of `reproduce`, or one or several of
/// `isqrt train`, whose report may go to `out`. Returns the page's path.
///
/// # Errors
/// [`Error::NotARun`] for a folder that is neither, [`Error::Unsupported`] for one of `reproduce` with
/// others or with `out`; otherwise as [`write()`] and [`runs::write`].
pub fn write_folders(folders: &[PathBuf], out: Option<&Path>) -> Result<PathBuf> {
    let reproduced = |folder: &Path| folder.join(crate::plan::FILE).is_file();
    for folder in folders {
        if !runs::is_run(folder) && !reproduced(folder) {
            return Err(Error::NotARun {
                path: folder.clone(),
                missing: "metrics.jsonl of `train`, no plan.json of `reproduce`",
            });
        }
    }
    match folders {
        [folder] if reproduced(folder) && out.is_none() => write(folder),
        _ => match folders.iter().find(|folder| reproduced(folder)) {
            Some(folder) => Err(Error::Unsupported(format!(
                "{} is a folder of `reproduce`, whose report stays in it: give it alone and without --out",
                folder.display()
            ))),
            None => runs::write(folders, out),
        },
    }
}

/// Renders both files from the plan and the records of a run folder; returns the page's path.
///
/// # Errors
/// [`Error::NotARun`] if the folder holds no plan; [`Error::Io`] if a file cannot be read or
/// written.
pub fn write(dir: &Path) -> Result<PathBuf> {
    let plan = Plan::read(dir)?;
    if plan.experiments.is_empty() {
        return Err(Error::NotARun {
            path: dir.to_owned(),
            missing: crate::plan::FILE,
        });
    }
    let store = Store::read(dir)?;
    render(dir, &plan, &store)
}

/// Renders both files from a plan and records at hand.
///
/// # Errors
/// [`Error::Io`] if a file cannot be written.
pub fn render(dir: &Path, plan: &Plan, store: &Store) -> Result<PathBuf> {
    let page = model::Page::new(plan, store);
    for section in &page.sections {
        let tables = dir.join("report").join("tables");
        crate::files::make_dir(&tables)?;
        for (ending, text) in [("csv", &section.csv), ("tex", &section.latex)] {
            let path = tables.join(format!("{}.{ending}", section.id));
            write_atomically(&path, text.as_bytes())?;
        }
    }
    let path = page_path(dir);
    write_atomically(
        &path,
        html::render(include_str!("page.html"), &page)?.as_bytes(),
    )?;
    write_atomically(
        &dir.join("report").join("report.md"),
        markdown::render(&page)?.as_bytes(),
    )?;
    Ok(path)
}
