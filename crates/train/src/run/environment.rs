//! What a run ran on.

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::Paths;
use super::folder::{Log, failed, write_whole};
use crate::data::DataInfo;
use crate::machine::{self, Machine};
use crate::state::Saved;
use crate::{Result, SpecFile};

/// What a run ran on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// Of this program.
    pub version: String,
    /// Commit of the checkout.
    pub commit: String,
    /// Whether the checkout had changes.
    pub dirty: bool,
    /// Machine, threads, device.
    #[serde(flatten)]
    pub machine: Machine,
    /// The images.
    pub data: DataInfo,
    /// Seconds since 1970.
    pub started: u64,
    /// When and on what the run was taken up again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<Resumed>,
}

/// A run taken up again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resumed {
    /// Seconds since 1970.
    pub at: u64,
    /// Updates that were done.
    pub step: u64,
    /// Commit of the checkout, `+changes` where it had some.
    pub commit: String,
    /// Machine, threads, device.
    #[serde(flatten)]
    pub machine: Machine,
}

/// Writes `environment.json`, or adds to it that the run was taken up again; says what may make a
/// difference.
pub(super) fn environment(
    paths: &Paths,
    data: &DataInfo,
    file: &SpecFile,
    (saved, devices, pass): (Option<&Saved>, &[Device], usize),
    console: &mut Log<'_>,
) -> Result<()> {
    let path = paths.environment();
    let commit = machine::commit();
    let here = Machine::on(devices);
    if let Some(gpu) = devices.iter().find(|device| !device.is_cpu()) {
        let precision = file.spec.precision;
        // The driver's name of the GPU, once where all are alike.
        let each = isqrt_device::gpu_of(gpu).map_or_else(String::new, |gpu| gpu.name);
        let names: Vec<_> = devices.iter().map(isqrt_device::name).collect();
        let gpu = file.spec.gpu;
        console.say(&format!(
            "on {} ({each}), {precision}, in passes of {pass} images{}{}",
            names.join(" and "),
            if devices.len() > 1 { " on each" } else { "" },
            match gpu.is_default() {
                true => String::new(),
                false => format!("; layer {}, convolutions {}", gpu.layer, gpu.convolutions),
            }
        ));
    }
    let on_gpu = devices.iter().any(Device::is_cuda);
    if !on_gpu && !file.spec.gpu.is_default() {
        console.say("gpu.layer and gpu.convolutions are for GPUs: the CPU does not look at them");
    }
    if saved.is_some() && on_gpu && file.spec.gpu.measures() {
        console.say("the fastest kernels and algorithms are looked for again: results may round differently");
    }
    let old = saved.and_then(|_| std::fs::read(&path).ok());
    let old: Option<Environment> = old.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let environment = match (old, saved) {
        (Some(mut old), Some(saved)) => {
            if old.machine.cpu != here.cpu {
                console.say(&format!(
                    "the run was begun on {} and goes on on {}: results may differ in the last bits",
                    old.machine.cpu, here.cpu
                ));
            }
            if old.machine.device != here.device {
                console.say(&format!(
                    "the run was begun on {} and goes on on {}: results differ in the last bits",
                    old.machine.device, here.device
                ));
            }
            if old.machine.threads != here.threads {
                console.say(&format!(
                    "the run was begun with {} threads and goes on with {}: the bits are the same for any \
                     number",
                    old.machine.threads, here.threads
                ));
            }
            old.resumed.push(Resumed {
                at: machine::now(),
                step: saved.progress().step,
                commit,
                machine: here,
            });
            old
        }
        _ => Environment {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dirty: commit.ends_with("+changes"),
            commit: commit.trim_end_matches("+changes").to_owned(),
            machine: here,
            data: data.clone(),
            started: machine::now(),
            resumed: Vec::new(),
        },
    };
    let text = serde_json::to_vec_pretty(&environment).map_err(|e| failed(&path, &e))?;
    write_whole(&path, &text)
}
