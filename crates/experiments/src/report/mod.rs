//! The report of a run folder: `report/index.html`, one self-contained page, and
//! `report/report.md`, both from the same [`model::Page`].

mod html;
mod markdown;
pub mod model;
pub mod plot;

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::plan::Plan;
use crate::record::Store;
use std::path::{Path, PathBuf};

/// Where the report of a run folder lies.
pub fn page_path(dir: &Path) -> PathBuf {
    dir.join("report").join("index.html")
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
    let path = page_path(dir);
    write_atomically(&path, html::render(&page)?.as_bytes())?;
    write_atomically(
        &dir.join("report").join("report.md"),
        markdown::render(&page)?.as_bytes(),
    )?;
    Ok(path)
}
