//! `isqrt report`: writes the report of run folders again.

use crate::output;
use clap::Args;
use std::path::PathBuf;

/// Write the report of runs: report/index.html and report/report.md
///
/// A folder of `reproduce` gets its report again, from its records. Folders of `train` are laid
/// beside each other: table, curves over epochs and time, diagnostics, worst classes. A run that
/// still goes on, or was killed, is shown as far as it went.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  isqrt report out/reproduce\n  isqrt report out/gap out/isqrt --out out/comparison"
)]
pub struct Report {
    /// Folders that were passed as --out to `train`, or one that was passed to `reproduce`
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Folder to write to, of training runs [default: the first of them]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Report {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let page = isqrt_experiments::report::write_folders(&self.runs, self.out.as_deref())?;
        if json {
            output::json(&serde_json::json!({ "report": page }))
        } else {
            output::line(&page.display().to_string())
        }
    }
}
