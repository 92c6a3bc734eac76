//! Which device is wanted: `cpu`, `cuda:0`, `auto`.

use crate::{Error, Result};
use candle_core::Device;
use std::fmt;
use std::str::FromStr;

/// A device by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The processor.
    #[default]
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The first CUDA device if one can be used, else the processor.
    Auto,
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name.contains(',') {
            return Err(Error::One(name.to_owned()));
        }
        let number = |digits: &str| digits.parse().ok();
        match name {
            "cpu" => Some(Self::Cpu),
            "auto" => Some(Self::Auto),
            "cuda" => Some(Self::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(number).map(Self::Cuda),
        }
        .ok_or_else(|| Error::Name(name.to_owned()))
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl Choice {
    /// Opens it. A GPU that was asked for by number and cannot be used is an error; only
    /// [`Choice::Auto`] goes on with the processor, and says why.
    ///
    /// # Errors
    /// Those of the GPU that was asked for.
    pub fn open(self) -> Result<Opened> {
        let cpu = |fallback| Opened {
            device: Device::Cpu,
            fallback,
        };
        match self {
            Self::Cpu => Ok(cpu(None)),
            Self::Cuda(ordinal) => gpu(ordinal),
            Self::Auto => Ok(gpu(0).unwrap_or_else(|why| cpu(Some(why)))),
        }
    }
}

/// Devices that share work: one of any kind, or several GPUs, `cuda:0,1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices(Vec<Choice>);

impl FromStr for Choices {
    type Err = Error;

    fn from_str(names: &str) -> Result<Self> {
        let mut choices: Vec<Choice> = Vec::new();
        for name in names.split(',') {
            let choice = match (name.parse(), name.parse::<usize>()) {
                (Ok(choice), _) => choice,
                // `cuda:0,1` is short for `cuda:0,cuda:1`.
                (Err(_), Ok(ordinal)) if !choices.is_empty() => Choice::Cuda(ordinal),
                (Err(error), _) if !names.contains(',') => return Err(error),
                _ => return Err(Error::Mixed(names.to_owned())),
            };
            if choices.contains(&choice) {
                return Err(Error::Twice(choice.to_string()));
            }
            choices.push(choice);
        }
        let gpus = choices.iter().all(|c| matches!(c, Choice::Cuda(_)));
        match gpus || choices.len() == 1 {
            true => Ok(Self(choices)),
            false => Err(Error::Mixed(names.to_owned())),
        }
    }
}

impl fmt::Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(Choice::to_string).collect();
        f.write_str(&names.join(","))
    }
}

impl Choices {
    /// Opens each of them, as [`Choice::open`] does.
    ///
    /// # Errors
    /// As there.
    pub fn open(&self) -> Result<Vec<Opened>> {
        self.0.iter().map(|choice| choice.open()).collect()
    }
}

/// A device that is open.
#[derive(Debug)]
pub struct Opened {
    /// For tensors.
    pub device: Device,
    /// Why [`Choice::Auto`] took the processor.
    pub fallback: Option<Error>,
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize) -> Result<Opened> {
    Ok(Opened {
        device: crate::cuda::open(ordinal)?,
        fallback: None,
    })
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: usize) -> Result<Opened> {
    let asked = Choice::Cuda(ordinal).to_string();
    Err(Error::NotBuilt { asked })
}

/// The same device once more, with a stream of its own: for work beside other work, which shares no tensor
/// with it.
///
/// # Errors
/// As [`Choice::open`].
pub fn beside(device: &Device) -> Result<Device> {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => Ok(gpu(gpu_id)?.device),
        _ => Ok(device.clone()),
    }
}

/// Name of the device of tensors, as [`Choice`] reads it.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".to_owned(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for choice in [Choice::Cpu, Choice::Cuda(0), Choice::Cuda(7), Choice::Auto] {
            assert_eq!(choice.to_string().parse::<Choice>().unwrap(), choice);
        }
        assert_eq!("cuda".parse::<Choice>().unwrap(), Choice::Cuda(0));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            let error = bad.parse::<Choice>().unwrap_err().to_string();
            assert!(error.contains("cpu, cuda:0"), "{error}");
        }
    }

    #[test]
    fn several_gpus_share_work_and_nothing_else_does() {
        let read = |names: &str| names.parse::<Choices>().map(|c| c.to_string());
        for (names, written) in [
            ("cpu", "cpu"),
            ("auto", "auto"),
            ("cuda", "cuda:0"),
            ("cuda:0,1", "cuda:0,cuda:1"),
            ("cuda:3,cuda:1,2", "cuda:3,cuda:1,cuda:2"),
        ] {
            assert_eq!(read(names).unwrap(), written);
        }
        for bad in [
            "",
            "cpu,cpu",
            "cpu,0",
            "auto,cuda:1",
            "cuda:0,",
            "0,1",
            "cuda:0,x",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let error = read("cuda:1,cuda:1").unwrap_err().to_string();
        assert!(error.contains("cuda:1 is named twice"), "{error}");
    }

    #[test]
    fn the_processor_is_always_there() {
        assert!(Choice::Cpu.open().unwrap().device.is_cpu());
        assert_eq!(name(&Device::Cpu), "cpu");
        // Either a GPU, or the processor and the reason.
        let opened = Choice::Auto.open().unwrap();
        assert_eq!(opened.device.is_cpu(), opened.fallback.is_some());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_that_was_asked_for_is_not_replaced() {
        let error = Choice::Cuda(1).open().unwrap_err().to_string();
        assert!(
            error.starts_with("cuda:1:") && error.contains("built without CUDA"),
            "{error}"
        );
    }
}
