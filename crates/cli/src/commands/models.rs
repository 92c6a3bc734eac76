//! `isqrt models`: the registry, and what one network consists of.

use super::weights::named;
use crate::output;
use candle_core::{DType, Device};
use clap::Args;
use isqrt_models::{BACKBONES, Network, REPRESENTATIONS, Stage};
use serde_json::json;

/// List backbones and pooling heads, or the stages of one network
#[derive(Args)]
#[command(after_help = "Example:\n  isqrt models resnet50+isqrt --classes 200")]
pub struct Models {
    /// A backbone with its own head, or `backbone+representation`, or a TOML file with a spec: show its stages
    name: Option<String>,
    /// Side of the images [default: what the backbone was made for]
    #[arg(long, value_name = "PIXELS", requires = "name")]
    size: Option<usize>,
    /// Outputs of the classifier
    #[arg(long, value_name = "K", default_value_t = 1000, requires = "name",
          value_parser = clap::value_parser!(u32).range(1..=50_000))]
    classes: u32,
}

impl Models {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        match &self.name {
            Some(name) => self.describe(name, json),
            None => list(json),
        }
    }

    fn describe(&self, name: &str, json: bool) -> anyhow::Result<()> {
        let spec = named(name, self.classes as usize)?;
        let network = Network::new(&spec, 0, DType::F32, &Device::Cpu)?;
        let side = spec.backbone.entry()?.image_side();
        let size = self.size.unwrap_or(side);
        let description = network.describe(size)?;
        let total = description.total();
        if json {
            for stage in description.stages.iter().chain([&total]) {
                output::json(&json!({
                    "model": name,
                    "size": size,
                    "stage": stage.name,
                    "shape": stage.shape,
                    "parameters": stage.parameters,
                    "multiply_adds": stage.multiply_adds,
                    "activation_bytes": stage.activation_bytes,
                }))?;
            }
            return Ok(());
        }
        output::line(&format!(
            "{spec}; {} classes; one image of {size}x{size}",
            spec.classes,
        ))?;
        let rows = description.stages.iter().chain([&total]).map(row).collect();
        let head = [
            "stage",
            "output",
            "parameters",
            "multiply-adds (M)",
            "activations (MiB)",
        ];
        output::table(&head, rows, 2)?;
        if description.stages.iter().any(|s| s.multiply_adds.is_none()) {
            output::line("? the head's multiply-adds are not known; the total is without them")?;
        }
        Ok(())
    }
}

fn row(stage: &Stage) -> Vec<String> {
    let shape: Vec<String> = stage.shape.iter().map(ToString::to_string).collect();
    vec![
        stage.name.clone(),
        shape.join("x"),
        stage.parameters.to_string(),
        stage
            .multiply_adds
            .map_or_else(|| "?".to_owned(), |n| format!("{:.1}", n as f64 / 1e6)),
        format!("{:.2}", stage.activation_bytes as f64 / f64::from(1 << 20)),
    ]
}

fn list(json: bool) -> anyhow::Result<()> {
    let backbones = BACKBONES.iter().map(|b| ("backbone", b.name(), b.about()));
    let heads = REPRESENTATIONS
        .iter()
        .map(|r| ("representation", r.name(), r.about()));
    let all = backbones.chain(heads);
    if json {
        for (kind, name, about) in all {
            output::json(&json!({ "kind": kind, "name": name, "about": about }))?;
        }
        return Ok(());
    }
    let rows = all.map(|(kind, name, about)| vec![kind.into(), name.into(), about.into()]);
    output::prose(&["kind", "name", "about"], rows.collect())
}
