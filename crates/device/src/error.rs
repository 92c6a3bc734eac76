//! What can go wrong with a device, told so that the user can mend it.

/// Errors of devices.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not the name of a device.
    #[error(
        "{0:?} is no device: cpu, cuda:0 (or another number; several as cuda:0,1 where work can be shared) or auto"
    )]
    Name(String),
    /// Several devices for what takes one.
    #[error("{0:?}: one device is wanted here; `isqrt train` and `isqrt doctor` take several")]
    One(String),
    /// Several devices that are not all GPUs by number.
    #[error("{0:?}: only GPUs share work, as cuda:0,1")]
    Mixed(String),
    /// The same GPU for two shares of the work.
    #[error("{0} is named twice: each GPU takes one share of the work")]
    Twice(String),
    /// A GPU was asked for, and this program has no code for it.
    #[error(
        "{asked}: this isqrt was built without CUDA; build it with `cargo gpu` (docs/cuda.md), or choose cpu"
    )]
    NotBuilt {
        /// The device that was asked for.
        asked: String,
    },
    /// There is no driver, or none that can be used.
    #[error("{asked}: no NVIDIA driver was found (libcuda.so.1): install one, or choose cpu")]
    NoDriver {
        /// The device that was asked for.
        asked: String,
    },
    /// The driver does not work, or is older than the program needs.
    #[error("{asked}: the NVIDIA driver does not start: {problem}")]
    Driver {
        /// The device that was asked for.
        asked: String,
        /// What the driver said, and what was expected.
        problem: String,
    },
    /// There are not so many GPUs.
    #[error("cuda:{ordinal}: this machine has {count} CUDA device(s), and the first is cuda:0")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// Those there are.
        count: usize,
    },
    /// A GPU older than the kernels.
    #[error(
        "{asked}: {name} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or later"
    )]
    TooOld {
        /// The device that was asked for.
        asked: String,
        /// Name of the GPU.
        name: String,
        /// Its compute capability.
        major: i32,
        /// And the part after the point.
        minor: i32,
    },
    /// A library of CUDA is not there.
    #[error(
        "{asked}: lib{library} was not found: install it, and name its folder in LD_LIBRARY_PATH \
         (libraries that pip installed lie in site-packages/nvidia/*/lib)"
    )]
    Library {
        /// The device, or the op, that needs it.
        asked: String,
        /// Its name, such as "cudnn".
        library: &'static str,
    },
    /// The GPU has not so much memory left.
    #[error(
        "{op}: the GPU is out of memory: {wanted} MiB more for shape {shape:?}, {free} of {total} MiB free"
    )]
    OutOfMemory {
        /// Name of the op.
        op: &'static str,
        /// Shape of what did not fit.
        shape: Vec<usize>,
        /// MiB that it takes.
        wanted: usize,
        /// MiB that are free.
        free: usize,
        /// MiB that the GPU has.
        total: usize,
    },
    /// A call of one of CUDA's libraries failed.
    #[error("{op}: {problem}")]
    Call {
        /// Name of the op.
        op: &'static str,
        /// What the library said.
        problem: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// Whether an error with this text is that a GPU had no memory left: an op's own error, or that of a call of
/// candle's or of a library's.
#[must_use]
pub fn is_out_of_memory(message: &str) -> bool {
    ["out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED"]
        .iter()
        .any(|words| message.contains(words))
}
