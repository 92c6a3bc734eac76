//! `isqrt iterations`: iteration counts and schedules compared.

use crate::output::{self, show};
use crate::plot;
use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use isqrt_experiments::files::write_atomically;
use isqrt_experiments::report::plot::{LinePlot, Point, Series, standalone};
use isqrt_experiments::spec::check_size;
use isqrt_linalg::bench::{IterationRow, iterations, synthetic_features, usual_schedules};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Compare iteration counts and schedules: error, gradient error, time
///
/// Distances are relative to the exact root of the covariance and to its exact gradient, both by
/// eigendecomposition in double precision; times are for the whole batch in single precision.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt iterations --dim 128 --positions 100
  isqrt iterations --features maps.safetensors --plot errors.svg")]
pub struct Iterations {
    /// Feature maps (B,C,H,W) or (B,C,M) in a safetensors file [default: synthetic]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dim", "positions", "batch"])]
    features: Option<PathBuf>,
    /// Name of the tensor in the file, if it holds several
    #[arg(long, value_name = "NAME", requires = "features")]
    tensor: Option<String>,
    /// Channels
    #[arg(long, value_name = "D", default_value_t = 256)]
    dim: usize,
    /// Positions (height x width)
    #[arg(long, value_name = "M", default_value_t = 196)]
    positions: usize,
    /// Images
    #[arg(long, value_name = "B", default_value_t = 8)]
    batch: usize,
    /// Write the plot of the errors to this SVG file
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// Seconds of timing
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    budget: f64,
}

impl Iterations {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        if let Some(path) = &self.plot {
            anyhow::ensure!(
                path.extension().is_some_and(|end| end == "svg"),
                "{}: the plot is SVG, so name it .svg",
                path.display()
            );
        }
        let features = match &self.features {
            Some(path) => read_features(path, self.tensor.as_deref())?,
            None => {
                check_size(self.batch, self.dim, self.positions).map_err(anyhow::Error::msg)?;
                synthetic_features(self.batch, self.dim, self.positions)?
            }
        };
        let budget = Duration::try_from_secs_f64(self.budget).context("--budget")?;
        let rows = iterations(&features, &usual_schedules(), budget)?;
        if let Some(path) = &self.plot {
            write_atomically(path, svg(&rows).as_bytes())?;
        }
        if json {
            for r in &rows {
                output::json(&serde_json::json!({
                    "schedule": r.schedule,
                    "n": r.n,
                    "products": r.products,
                    "root_error": r.root_error,
                    "gradient_error": r.gradient_error,
                    "forward_ms": r.forward_ms,
                    "backward_ms": r.backward_ms,
                }))?;
            }
            return Ok(());
        }
        output::line(&format!("features {:?}", features.dims()))?;
        let cells = rows.iter().map(|r| {
            vec![
                r.schedule.clone(),
                r.n.to_string(),
                r.products.to_string(),
                show(r.root_error),
                show(r.gradient_error),
                show(r.forward_ms),
                show(r.backward_ms),
            ]
        });
        let head = [
            "schedule",
            "n",
            "products",
            "root_error",
            "gradient_error",
            "forward_ms",
            "backward_ms",
        ];
        output::table(&head, cells.collect(), 1)?;
        let marks = ['o', '*', '+', 'x', '#'];
        let curves: Vec<plot::Curve> = families(&rows)
            .into_iter()
            .enumerate()
            .map(|(i, (name, rows))| {
                let points = rows.iter().map(|r| (r.products as f64, r.root_error));
                (marks[i % marks.len()], name, points.collect())
            })
            .collect();
        output::line(&plot::text(
            &curves,
            "products, forward",
            "distance to the exact root",
        ))
    }
}

/// Rows by schedule, without the eigendecomposition, which has no steps.
fn families(rows: &[IterationRow]) -> Vec<(String, Vec<&IterationRow>)> {
    let mut families: Vec<(String, Vec<&IterationRow>)> = Vec::new();
    for row in rows.iter().filter(|r| r.n > 0) {
        match families.iter_mut().find(|(name, _)| *name == row.schedule) {
            Some((_, list)) => list.push(row),
            None => families.push((row.schedule.clone(), vec![row])),
        }
    }
    families
}

fn svg(rows: &[IterationRow]) -> String {
    let series = families(rows).into_iter().map(|(label, rows)| Series {
        label,
        points: rows
            .iter()
            .map(|r| Point {
                x: r.products as f64,
                y: r.root_error,
                bar: None,
            })
            .collect(),
        level: false,
        dots: true,
    });
    let plot = LinePlot {
        title: "Distance to the exact root against products".to_owned(),
        x_label: "symmetric products, forward".to_owned(),
        y_label: "relative distance to the root".to_owned(),
        log: true,
        log_x: false,
        series: series.collect(),
    };
    standalone(&plot.svg())
}

fn read_features(path: &Path, name: Option<&str>) -> anyhow::Result<Tensor> {
    if !path.is_file() {
        bail!(
            "{}: no such file; expected safetensors with feature maps",
            path.display()
        );
    }
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)
        .with_context(|| format!("{}: not a safetensors file", path.display()))?;
    let mut names: Vec<String> = tensors.keys().cloned().collect();
    names.sort();
    let name = match (name, names.as_slice()) {
        (Some(name), _) => name.to_owned(),
        (None, [one]) => one.clone(),
        (None, _) => bail!(
            "{}: holds {} tensors ({}); choose one with --tensor",
            path.display(),
            names.len(),
            names.join(", ")
        ),
    };
    let Some(tensor) = tensors.remove(&name) else {
        bail!(
            "{}: no tensor `{name}`, only {}",
            path.display(),
            names.join(", ")
        );
    };
    if !(3..=4).contains(&tensor.rank()) {
        bail!(
            "{}: `{name}` has shape {:?}; expected (B,C,H,W) or (B,C,M)",
            path.display(),
            tensor.dims()
        );
    }
    Ok(tensor.to_dtype(DType::F32)?)
}
