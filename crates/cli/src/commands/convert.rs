//! `isqrt convert`: checkpoints of others to ours and back.

use super::weights::{Order, WeightsArgs, differ};
use crate::output;
use clap::Args;
use isqrt_models::checkpoint::{self, Format};
use isqrt_train::run::weights_file;
use std::path::PathBuf;

/// Turn a checkpoint into ours, or back into the names of another program
///
/// Reads files of torch.save (.pth, .pt, .pth.tar; nothing in them is run) and safetensors, under the
/// names of torchvision, timm and the authors' code, and our own. Every name is accounted for: what
/// is missing, unused or of another shape is an error that lists it, or with --partial a list. Writes
/// safetensors, or with --to and a path that ends in .pth, .pt or .pth.tar a file for torch.load.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt convert resnet50-11ad3fa6.pth resnet50.safetensors --model resnet50
  isqrt convert mpncovresnet50-15991845.pth r50.safetensors --model resnet50+isqrt --triangle upper
  isqrt convert r50.safetensors checkpoint.pth --to trained")]
pub struct Convert {
    /// File to read, or the folder of a run
    src: PathBuf,
    /// File to write
    dst: PathBuf,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Names of another program: `flat`, `trained`, `fine-tuned`, `torchvision`, `timm`
    #[arg(long, value_name = "LAYOUT")]
    to: Option<String>,
    /// Order of the covariance's triangle to write with --to
    #[arg(long, value_enum, requires = "to", default_value = "upper")]
    to_triangle: Order,
}

impl Convert {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        anyhow::ensure!(
            Format::of(&self.dst)? == Format::Safetensors || self.to.is_some(),
            "{}: a file for torch.load has the names of another program: say which with --to, or write \
             .safetensors",
            self.dst.display()
        );
        let src = weights_file(&self.src)?;
        differ(&src, &self.dst)?;
        let loaded = self.weights.load(&src)?;
        let (network, report) = (&loaded.network, &loaded.report);
        let layout = match &self.to {
            Some(to) => {
                let order = self.to_triangle.into();
                checkpoint::export(network, &self.dst, to, order, &loaded.record)?.name
            }
            None => {
                checkpoint::save(network, &self.dst, &loaded.record)?;
                checkpoint::Layout::OWN.name
            }
        };
        if json {
            return output::json(&serde_json::json!({
                "model": network.spec().short_name(),
                "classes": network.spec().classes,
                "parameters": network.vars().parameter_count(),
                "from": report.layout,
                "to": layout,
                "taken": report.taken,
                "missing": report.missing.len(),
                "unused": report.unused.len(),
                "misshapen": report.misshapen.len(),
                "counters": report.counters,
                "group": report.group,
                "beside": report.others,
            }));
        }
        let spec = network.spec();
        output::line(&format!(
            "{}, {} classes, {} parameters",
            spec.short_name(),
            spec.classes,
            network.vars().parameter_count()
        ))?;
        let mut passed_over = Vec::new();
        if report.counters > 0 {
            passed_over.push(format!("{} counters of batches", report.counters));
        }
        if !report.others.is_empty() {
            passed_over.push(report.others.join(", ").escape_debug().to_string());
        }
        let passed_over = match passed_over.is_empty() {
            true => String::new(),
            false => format!("; passed over: {}", passed_over.join(", ")),
        };
        let group = report
            .group
            .as_ref()
            .map_or_else(String::new, |g| format!(", in {g:?}"));
        output::line(&format!(
            "read {} (layout {}{group}): {} tensors taken, {} missing, {} unused, {} of another shape\
             {passed_over}",
            src.display(),
            report.layout,
            report.taken,
            report.missing.len(),
            report.unused.len(),
            report.misshapen.len()
        ))?;
        output::line(&format!("wrote {} (layout {layout})", self.dst.display()))
    }
}
