//! `isqrt report`: writes the report of a run folder again.

use crate::output;
use clap::Args;
use std::path::PathBuf;

/// Write the report of a run folder again, from its records
#[derive(Args)]
#[command(after_help = "Example:\n  isqrt report out/reproduce")]
pub struct Report {
    /// Folder that was passed to `reproduce` as --out
    dir: PathBuf,
}

impl Report {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let page = isqrt_experiments::report::write(&self.dir)?;
        if json {
            output::json(&serde_json::json!({ "report": page }))
        } else {
            output::line(&page.display().to_string())
        }
    }
}
