//! The flag that says where a command computes.

use crate::progress::say;
use candle_core::Device;
use clap::Args;
use isqrt_device::{Choice, Choices, Opened};

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
        Ok(told(self.device.open()?))
    }
}

/// Where to train.
#[derive(Args)]
pub struct DevicesArg {
    /// cpu, cuda:0 (or another number), several GPUs as cuda:0,1, or auto: the first GPU if there is one that
    /// can be used, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Choices,
}

impl DevicesArg {
    /// As [`DeviceArg::open`].
    pub fn open(&self) -> anyhow::Result<Vec<Device>> {
        Ok(self.device.open()?.into_iter().map(told).collect())
    }
}

fn told(opened: Opened) -> Device {
    if let Some(why) = opened.fallback
        && isqrt_device::found().built
    {
        say(&format!("on the CPU, since {why}"));
    }
    opened.device
}
