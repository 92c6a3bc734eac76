//! The flag that says where a command computes.

use crate::progress::say;
use candle_core::Device;
use clap::Args;
use isqrt_device::Choice;

/// Where to compute.
#[derive(Args)]
pub struct DeviceArg {
    /// cpu, cuda:0 (or another number), or auto: a GPU if there is one that can be used, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Choice,
}

impl DeviceArg {
    /// Opens it; where `auto` finds no GPU that can be used and this program could use one, says why.
    pub fn open(&self) -> anyhow::Result<Device> {
        let opened = self.device.open()?;
        if let Some(why) = opened.fallback
            && isqrt_device::found().built
        {
            say(&format!("on the CPU, since {why}"));
        }
        Ok(opened.device)
    }
}
