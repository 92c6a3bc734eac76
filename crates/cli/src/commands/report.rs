//! `isqrt report`: writes the report of run folders again, and keeps their results.

use crate::output;
use anyhow::{Context, bail};
use clap::Args;
use isqrt_experiments::archive;
use std::path::{Path, PathBuf};

/// Write the report of runs: report/index.html and report/report.md
///
/// A folder of `reproduce` gets its report again, from its records. Folders of `train` are laid
/// beside each other: table, curves over epochs and time, diagnostics, worst classes. A run that
/// still goes on, or was killed, is shown as far as it went.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  isqrt report out/reproduce\n  isqrt report out/gap out/isqrt --out out/comparison\n  isqrt report out/reproduce --archive experiments/records --results docs/results.md --tables README.md"
)]
pub struct Report {
    /// Folders that were passed as --out to `train`, or one that was passed to `reproduce`
    #[arg(required_unless_present = "archive", value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Folder to write to, of training runs [default: the first of them]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep the results of a folder of `reproduce` in this folder: plan, records, specs, environment
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    archive: Option<PathBuf>,
    /// Name of the images, where they are not the program's own
    #[arg(long, value_name = "NAME", requires = "archive")]
    images: Option<String>,
    /// Page to make of everything that is kept
    #[arg(long, value_name = "FILE", requires = "archive")]
    results: Option<PathBuf>,
    /// Page in which the tables between `<!-- records: NAME -->` and `<!-- end -->` are made again
    #[arg(long, value_name = "FILE", requires = "archive")]
    tables: Vec<PathBuf>,
}

impl Report {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        if let Some(folder) = &self.archive {
            return self.keep(folder, json);
        }
        let page = isqrt_experiments::report::write_folders(&self.runs, self.out.as_deref())?;
        if json {
            output::json(&serde_json::json!({ "report": page }))
        } else {
            output::line(&page.display().to_string())
        }
    }

    /// Keeps what the runs have come to and makes the pages that show it.
    fn keep(&self, folder: &Path, json: bool) -> anyhow::Result<()> {
        let mut kept = Vec::new();
        for run in &self.runs {
            kept.extend(archive::save(run, folder, self.images.as_deref())?);
        }
        let write = |path: &Path, text: String| {
            isqrt_experiments::files::write_atomically(path, text.as_bytes())
        };
        if let Some(page) = &self.results {
            write(page, archive::results_page(folder)?)?;
        }
        for page in &self.tables {
            let text = std::fs::read_to_string(page)
                .with_context(|| format!("cannot read {}", page.display()))?;
            if !text.contains("<!-- records: ") {
                bail!("{}: no `<!-- records: NAME -->` in it", page.display());
            }
            write(page, archive::put_tables(&text, folder)?)?;
        }
        if json {
            return output::json(&serde_json::json!({ "archive": folder, "kept": kept }));
        }
        for name in kept {
            output::line(&folder.join(name).display().to_string())?;
        }
        Ok(())
    }
}
