//! `isqrt models`: the registry.

use crate::output;
use clap::Args;
use isqrt_models::{BACKBONES, REPRESENTATIONS};

/// List backbones and pooling heads
#[derive(Args)]
#[command(after_help = "Example:\n  isqrt models --json")]
pub struct Models {
    /// Show only this one
    name: Option<String>,
}

impl Models {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let backbones = BACKBONES.iter().map(|b| ("backbone", b.name(), b.about()));
        let heads = REPRESENTATIONS
            .iter()
            .map(|r| ("representation", r.name(), r.about()));
        let mut all: Vec<_> = backbones.chain(heads).collect();
        if let Some(name) = &self.name {
            let names: Vec<&str> = all.iter().map(|m| m.1).collect();
            if !names.contains(&name.as_str()) {
                anyhow::bail!(
                    "there is no model part `{name}`; there are {}",
                    names.join(", ")
                );
            }
            all.retain(|m| m.1 == name);
        }
        if json {
            for (kind, name, about) in all {
                output::json(&serde_json::json!({ "kind": kind, "name": name, "about": about }))?;
            }
            return Ok(());
        }
        let rows = all
            .into_iter()
            .map(|(kind, name, about)| vec![kind.to_owned(), name.to_owned(), about.to_owned()]);
        output::table(&["kind", "name", "about"], rows.collect(), 3)
    }
}
