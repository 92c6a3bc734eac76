//! `isqrt doctor`: what this machine has, and whether a device computes what it should.

use crate::output;
use anyhow::bail;
use clap::Args;
use isqrt_device::{Choice, Found, found};
use isqrt_experiments::doctor;
use serde_json::json;

/// Say what this machine has, and check that a device computes what it should
///
/// One line a check: gradients, the reference, extremes, a training step of every backbone beside the
/// CPU's, weights through a file. Exit code 1 where one fails.
#[derive(Args)]
#[command(after_help = "Example:\n  isqrt doctor --device cuda:0 --bench")]
pub struct Doctor {
    /// cpu, cuda:0 (or another number), or auto: a GPU if there is one that can be used, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
    /// Time the layer as well
    #[arg(long)]
    bench: bool,
    /// Images at once for --bench [default: 256 on a GPU, 8 on the CPU]
    #[arg(long, value_name = "B", requires = "bench", value_parser = clap::value_parser!(u16).range(1..))]
    batch: Option<u16>,
}

impl Doctor {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        let found = found();
        if !json {
            describe(&found)?;
        }
        let opened = self.device.open()?;
        let name = isqrt_device::name(&opened.device);
        let why = opened.fallback.map(|why| why.to_string());
        if json {
            output::json(&json!({
                "kind": "machine",
                "cuda_built": found.built,
                "cuda_driver": found.driver.map(|(major, minor)| format!("{major}.{minor}")),
                "libraries": found.libraries.iter().map(|l| (l.name, l.present)).collect::<std::collections::BTreeMap<_, _>>(),
                "gpus": found.gpus.iter().map(|gpu| &gpu.name).collect::<Vec<_>>(),
                "device": name,
                "fallback": why,
            }))?;
        } else {
            match why {
                Some(why) => output::line(&format!("device     {name}, since {why}"))?,
                None => output::line(&format!("device     {name}"))?,
            }
        }
        let (mut failed, mut closed) = (0, None);
        doctor::check(&opened.device, |verdict| {
            failed += usize::from(!verdict.ok);
            let said = match json {
                true => output::json(&json!({
                    "kind": "check", "device": name, "check": verdict.check, "ok": verdict.ok, "detail": verdict.detail,
                })),
                false => output::line(&format!(
                    "{}  {}: {}",
                    if verdict.ok { "ok    " } else { "FAILED" },
                    verdict.check,
                    verdict.detail
                )),
            };
            if let Err(error) = said {
                closed.get_or_insert(error);
            }
        });
        if let Some(error) = closed {
            return Err(error);
        }
        if self.bench {
            let batch = match (self.batch, opened.device.is_cpu()) {
                (Some(batch), _) => usize::from(batch),
                (None, true) => 8,
                (None, false) => 256,
            };
            let peak = match opened.device.location() {
                candle_core::DeviceLocation::Cuda { gpu_id } => {
                    found.gpus.get(gpu_id).map(|gpu| gpu.peak_f32() / 1e9)
                }
                _ => None,
            };
            self.times(&opened.device, batch, peak, json)?;
        }
        if failed > 0 {
            bail!("{failed} check(s) failed on {name}");
        }
        Ok(())
    }

    fn times(
        &self,
        device: &candle_core::Device,
        batch: usize,
        peak: Option<f64>,
        json: bool,
    ) -> anyhow::Result<()> {
        let times = doctor::bench(device, batch)?;
        if json {
            for time in &times {
                let mut line = serde_json::to_value(time)?;
                line["kind"] = "layer".into();
                line["peak_share"] = peak.map(|peak| time.gflops / peak).into();
                output::json(&line)?;
            }
            return Ok(());
        }
        let rows = times.iter().map(|time| {
            vec![
                format!(
                    "N = {}, batch {}, {} x {}",
                    time.iterations, time.batch, time.channels, time.positions
                ),
                format!("{:.2}", time.forward_ms),
                format!("{:.2}", time.backward_ms),
                format!("{:.0}", time.gflops),
                peak.map_or_else(String::new, |peak| {
                    format!("{:.0} %", 100.0 * time.gflops / peak)
                }),
            ]
        });
        output::line("")?;
        let head = [
            "layer, f32",
            "forward ms",
            "backward ms",
            "GFLOP/s",
            "of peak",
        ];
        output::table(&head, rows.collect(), 1)
    }
}

fn describe(found: &Found) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    output::line(&format!(
        "processor  {cores} threads, {} kernels",
        isqrt_linalg::Kernel::Auto.resolve()?.name()
    ))?;
    if !found.built {
        return output::line("CUDA       not built in (docs/cuda.md)");
    }
    match (found.driver, &found.problem) {
        (_, Some(problem)) => output::line(&format!("CUDA       built in; {problem}"))?,
        (Some((major, minor)), None) => output::line(&format!(
            "CUDA       built in; the driver speaks {major}.{minor}"
        ))?,
        (None, None) => output::line("CUDA       built in")?,
    }
    for library in &found.libraries {
        let there = if library.present { "found" } else { "missing" };
        output::line(&format!(
            "  {:<9}{there} ({})",
            library.name, library.purpose
        ))?;
    }
    for gpu in &found.gpus {
        output::line(&format!(
            "GPU {}      {}, compute capability {}.{}, {} multiprocessors, {} GiB",
            gpu.ordinal,
            gpu.name,
            gpu.capability.0,
            gpu.capability.1,
            gpu.multiprocessors,
            gpu.memory >> 30
        ))?;
    }
    Ok(())
}
