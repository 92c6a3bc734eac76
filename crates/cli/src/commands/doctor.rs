//! `isqrt doctor`: what this machine has, and whether a device computes what it should.

use super::device::DevicesArg;
use crate::output::{self, show};
use anyhow::{anyhow, bail};
use clap::Args;
use isqrt_device::{Found, Opened, found};
use isqrt_experiments::doctor::{self, Timing, Verdict};
use isqrt_train::counted;
use serde_json::json;

/// Say what this machine has, and check that a device computes what it should
///
/// One line a check: what PyTorch computed, gradients beside differences, each op beside the CPU's, properties
/// and extremes of the layer, on a GPU by each of its kernels, a training step of every backbone beside the CPU's,
/// on a GPU in each precision, weights through a file, and with several GPUs their sums. Exit code 1 where one fails.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  isqrt doctor --list\n  isqrt doctor --device cuda:0 --bench\n  isqrt doctor --only layer --only resnet50"
)]
pub struct Doctor {
    #[command(flatten)]
    device: DevicesArg,
    /// Run the checks whose names contain TEXT alone, in capitals or not; may be given more than once
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Say what the machine has and name the checks, without running them
    #[arg(long, conflicts_with = "bench")]
    list: bool,
    /// Time the layer, decompositions and training steps of ResNet-50 as well
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
        let mut devices = vec![];
        for opened in self.device.device.open()? {
            machine(&found, &opened, json)?;
            devices.push(opened.device);
        }
        if self.list {
            return self.names(&devices, json);
        }
        let (mut count, mut failed, mut closed) = (0_usize, 0_usize, None);
        let mut hear = |verdict: &Verdict, device: &str| {
            count += 1;
            failed += usize::from(!verdict.ok);
            closed = closed.take().or(say(verdict, device, json).err());
        };
        for device in &devices {
            let name = isqrt_device::name(device);
            doctor::check(device, &self.only, |verdict| hear(verdict, &name));
        }
        if devices.len() > 1 {
            let name = self.device.device.to_string();
            doctor::check_together(&devices, &self.only, |verdict| hear(verdict, &name));
        }
        if let Some(error) = closed {
            return Err(error);
        }
        if count == 0 {
            return Err(self.none());
        }
        if !json {
            let checks = counted(count, "check");
            output::line(&format!("{checks}, {failed} failed"))?;
        }
        if self.bench {
            for device in &devices {
                let batch = match (self.batch, device.is_cpu()) {
                    (Some(batch), _) => usize::from(batch),
                    (None, true) => 8,
                    (None, false) => 256,
                };
                failed += times(device, batch, json)?;
            }
        }
        if failed > 0 {
            let checks = counted(failed, "check");
            bail!("{checks} failed on {}", self.device.device);
        }
        Ok(())
    }

    fn names(&self, devices: &[candle_core::Device], json: bool) -> anyhow::Result<()> {
        let names = doctor::names(devices, &self.only);
        if names.is_empty() {
            return Err(self.none());
        }
        for name in &names {
            match json {
                true => output::json(&json!({ "kind": "name", "check": name }))?,
                false => output::line(name)?,
            }
        }
        Ok(())
    }

    fn none(&self) -> anyhow::Error {
        let texts = self.only.join("\" or \"");
        anyhow!("no check's name contains \"{texts}\"; --list has the names")
    }
}

/// Says which device was opened.
fn machine(found: &Found, opened: &Opened, json: bool) -> anyhow::Result<()> {
    let name = isqrt_device::name(&opened.device);
    let why = opened.fallback.as_ref().map(ToString::to_string);
    if json {
        return output::json(&json!({
            "kind": "machine",
            "cuda_built": found.built,
            "cuda_driver": found.driver.map(|(major, minor)| format!("{major}.{minor}")),
            "libraries": found.libraries.iter().map(|l| (l.name, l.present)).collect::<std::collections::BTreeMap<_, _>>(),
            "gpus": found.gpus.iter().map(|gpu| &gpu.name).collect::<Vec<_>>(),
            "device": name,
            "fallback": why,
        }));
    }
    match why {
        Some(why) => output::line(&format!("device     {name}, as no GPU can be used: {why}")),
        None => output::line(&format!("device     {name}")),
    }
}

fn say(verdict: &Verdict, device: &str, json: bool) -> anyhow::Result<()> {
    match json {
        true => output::json(&json!({
            "kind": "check", "device": device, "check": verdict.check, "ok": verdict.ok,
            "figures": verdict.figures, "detail": verdict.detail,
        })),
        false => output::line(&format!(
            "{}  {}: {}",
            if verdict.ok { "ok    " } else { "FAILED" },
            verdict.check,
            verdict.detail
        )),
    }
}

/// Times and prints; how many could not be timed.
fn times(device: &candle_core::Device, batch: usize, json: bool) -> anyhow::Result<usize> {
    let gpu = isqrt_device::gpu_of(device);
    let percent = |share: f64| format!("{:.0} % of peak", 100.0 * share);
    let (mut failed, mut closed) = (0, None);
    let name = isqrt_device::name(device);
    doctor::bench(device, batch, |timing| {
        // What, implementation, forward, backward, both, what is said of it.
        let mut rows: Vec<(String, &str, f64, f64, f64, String)> = vec![];
        match timing {
            Err(problem) => {
                failed += 1;
                let line = match json {
                    true => output::json(&json!({ "kind": "timing", "problem": problem })),
                    false => output::line(&format!("FAILED  {problem}")),
                };
                closed = closed.take().or(line.err());
            }
            Ok(Timing::Layer(batch, n, timings)) => rows.extend(timings.iter().map(|t| {
                let memory = t
                    .bandwidth_share
                    .map_or_else(String::new, |share| format!(", memory {}", percent(share)));
                let said = format!(
                    "{} GFLOP/s, {}{memory}",
                    show(t.gflops),
                    percent(t.peak_share)
                );
                let what = format!("layer N={n} d=256 14x14 batch={batch} f32");
                let both = t.forward_ms + t.backward_ms;
                (
                    what,
                    t.implementation,
                    t.forward_ms,
                    t.backward_ms,
                    both,
                    said,
                )
            })),
            Ok(Timing::Decomposition(timings)) => rows.extend(timings.iter().map(|t| {
                let what = format!("{} dim={} batch={} f32", t.method, t.n, t.batch);
                let said = format!("{} ms a matrix", show(t.ms / t.batch as f64));
                let implementation = match t.method.starts_with("isqrt") {
                    true => "ours",
                    false => "reference",
                };
                (what, implementation, t.ms, f64::NAN, t.ms, said)
            })),
            Ok(Timing::Network(model, batch, precision, t)) => {
                let peak = gpu.as_ref().map(|gpu| precision.peak(gpu));
                let share = peak.zip(t.gflops).map(|(peak, rate)| rate * 1e9 / peak);
                let said = format!(
                    "{} images/s{}",
                    show(batch as f64 / t.step_ms * 1e3),
                    share.map_or_else(String::new, |share| format!(", {}", percent(share)))
                );
                let what = format!("{model} 224x224 batch={batch} {precision}");
                rows.push((what, "ours", t.forward_ms, t.backward_ms, t.step_ms, said));
            }
        }
        for (what, implementation, forward, backward, both, said) in rows {
            let known = |ms: f64| Some(ms).filter(|ms| ms.is_finite());
            let line = match json {
                true => output::json(&json!({
                    "kind": "timing", "device": name, "case": what, "implementation": implementation,
                    "forward_ms": forward, "backward_ms": known(backward), "ms": both, "detail": said,
                })),
                false => output::line(&format!(
                    "{what:<44} {implementation:<10} forward {:>9} backward {:>9} all {:>9} ms  {said}",
                    show(forward),
                    known(backward).map_or_else(String::new, show),
                    show(both)
                )),
            };
            closed = closed.take().or(line.err());
        }
    });
    match closed {
        Some(error) => Err(error),
        None => Ok(failed),
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
