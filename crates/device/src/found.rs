//! What this machine has for CUDA.

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Whether this program was built with the feature `cuda`.
    pub built: bool,
    /// Version of CUDA that the driver speaks, such as `(13, 0)`.
    pub driver: Option<(i32, i32)>,
    /// The libraries that ops use.
    pub libraries: Vec<Library>,
    /// The GPUs.
    pub gpus: Vec<Gpu>,
    /// Why there is no driver or no GPU, where something failed.
    pub problem: Option<String>,
}

/// A library of CUDA.
#[derive(Clone, Debug, PartialEq)]
pub struct Library {
    /// Name without `lib`, such as "cudnn".
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether it can be opened.
    pub present: bool,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Highest clock of these, in kHz.
    pub clock_khz: i32,
    /// Memory in bytes.
    pub memory: usize,
    /// Width of the memory bus in bits.
    pub bus_bits: i32,
    /// Clock of the memory, in kHz.
    pub memory_clock_khz: i32,
}

impl Gpu {
    /// Multiply-adds a second in f32, times two: 128 a clock and multiprocessor from Ampere's
    /// consumer line on and Hopper, 64 for compute capability 8.0.
    #[must_use]
    pub fn peak_f32(&self) -> f64 {
        let lanes = if self.capability == (8, 0) {
            64.0
        } else {
            128.0
        };
        2.0 * lanes * f64::from(self.multiprocessors) * f64::from(self.clock_khz) * 1e3
    }

    /// Operations a second of the tensor cores on dense matrices: in TF32, and in bf16 with sums in f32. A clock
    /// and multiprocessor of NVIDIA's data sheets: 1024 and 2048 (compute capability 8.0), 2048 and 4096
    /// (9.0), 4096 and 8192 (10.0), else 256 and 512.
    #[must_use]
    pub fn peak_tensor(&self) -> (f64, f64) {
        let tf32 = match self.capability {
            (8, 0) => 1024.0,
            (9, _) => 2048.0,
            (10, _) => 4096.0,
            _ => 256.0,
        };
        let clocks = f64::from(self.multiprocessors) * f64::from(self.clock_khz) * 1e3;
        (tf32 * clocks, 2.0 * tf32 * clocks)
    }

    /// Bytes a second of the memory: two transfers a clock.
    #[must_use]
    pub fn peak_bandwidth(&self) -> f64 {
        2.0 * f64::from(self.memory_clock_khz) * 1e3 * f64::from(self.bus_bits) / 8.0
    }
}

/// What the GPU of a device is; none for the CPU.
#[must_use]
pub fn gpu_of(device: &candle_core::Device) -> Option<Gpu> {
    let candle_core::DeviceLocation::Cuda { gpu_id } = device.location() else {
        return None;
    };
    found().gpus.into_iter().find(|gpu| gpu.ordinal == gpu_id)
}

/// Bytes that this process took of a GPU's pool at most, for tensors and scratch; none for the CPU. What the
/// libraries keep for themselves is not counted.
#[must_use]
pub fn peak_memory(device: &candle_core::Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let candle_core::DeviceLocation::Cuda { gpu_id } = device.location() {
        return crate::cuda::peak_memory(gpu_id);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    None
}

/// Looks for driver, libraries and GPUs. Never fails, and never starts a GPU.
#[must_use]
pub fn found() -> Found {
    #[cfg(feature = "cuda")]
    return crate::cuda::found();
    #[cfg(not(feature = "cuda"))]
    Found {
        built: false,
        driver: None,
        libraries: vec![],
        gpus: vec![],
        problem: None,
    }
}
