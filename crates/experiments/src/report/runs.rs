//! The report of training runs: `report/index.html` and `report/report.md`, which lay the runs beside
//! each other.
//!
//! Everything is read as it is found: a run that still goes on, or that was killed, has its page too.

mod folder;
mod markdown;
mod page;

use super::{html, page_path};
use crate::error::{Error, Result};
use crate::files::write_atomically;
use folder::Run;
use std::path::{Path, PathBuf};

/// Whether a folder is one of `isqrt train`.
pub fn is_run(folder: &Path) -> bool {
    folder.join(folder::METRICS).is_file()
}

/// Writes the page of one or several run folders into the first of them, or into `out`; returns its
/// path.
///
/// # Errors
/// [`Error::NotARun`] for a folder that holds none, [`Error::Io`] if a file cannot be read or written.
pub fn write(folders: &[PathBuf], out: Option<&Path>) -> Result<PathBuf> {
    let read = folders.iter().map(|folder| match is_run(folder) {
        true => Run::read(folder),
        false => Err(Error::NotARun {
            path: folder.clone(),
            missing: "metrics.jsonl of `isqrt train`",
        }),
    });
    let mut runs = read.collect::<Result<Vec<Run>>>()?;
    folder::tell_apart(&mut runs);
    let page = page::Page::new(&runs);
    let target = out.or(folders.first().map(PathBuf::as_path));
    let path = page_path(target.unwrap_or(Path::new(".")));
    let html = html::render(include_str!("runs/page.html"), &page)?;
    write_atomically(&path, html.as_bytes())?;
    let text = markdown::render(&page);
    write_atomically(&path.with_file_name("report.md"), text.as_bytes())?;
    Ok(path)
}
