//! Launching kernels.

use super::call;
use super::memory::Real;
use candle_core::CudaDevice;
use cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg};
use std::cell::Cell;

thread_local! {
    static LAUNCHES: Cell<u64> = const { Cell::new(0) };
}

/// What this thread has launched: kernels of ours, and replays of recordings.
pub fn launches() -> u64 {
    LAUNCHES.get()
}

pub(super) fn count_launch() {
    LAUNCHES.set(LAUNCHES.get() + 1);
}

/// Kernels compiled to PTX.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name of the file.
    pub name: &'static str,
    /// The code.
    pub ptx: &'static str,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// `T*`.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `long long`.
    Long(i64),
    /// `double`.
    Double(f64),
}

/// An address.
pub fn pointer(at: u64) -> Argument {
    Argument::Pointer(at)
}

/// An `int`: sizes of one axis, numbers of images.
pub fn int(value: usize) -> Argument {
    Argument::Int(value as i32)
}

/// A `long long`: numbers of values of a whole tensor.
pub fn long(value: usize) -> Argument {
    Argument::Long(value as i64)
}

/// A factor, as `double`.
pub fn real(value: f64) -> Argument {
    Argument::Double(value)
}

/// Blocks that a launch may have along y and z.
const MOST_ASIDE: usize = 65_535;

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks along x, y, z.
    pub blocks: (usize, usize, usize),
    /// Threads a block.
    pub threads: usize,
    /// Dynamic shared memory in bytes; above 48 KiB the kernel is told to bear it.
    pub shared: usize,
}

impl Grid {
    /// A thread a value, striding over the values where there are more than 2³¹.
    pub fn over(values: usize) -> Self {
        Self::blocks(values.div_ceil(256).clamp(1, i32::MAX as usize), 256)
    }

    /// So many blocks of so many threads.
    pub fn blocks(blocks: usize, threads: usize) -> Self {
        Self {
            blocks: (blocks, 1, 1),
            threads,
            shared: 0,
        }
    }
}

/// Launches the kernel `{name}_{type}` on the stream of the device.
///
/// # Safety
/// The arguments are those of the kernel, and addresses lie in memory that is alive until the
/// stream is done with it: memory freed by its owner in the meantime is freed behind the kernel.
///
/// # Errors
/// [`crate::Error::Call`] for a launch that the driver refuses.
pub unsafe fn launch<T: Real>(
    device: &CudaDevice,
    module: &Module,
    name: &'static str,
    grid: Grid,
    arguments: &[Argument],
) -> candle_core::Result<()> {
    let Some((function, config)) = prepare::<T>(device, module, name, grid)? else {
        return Ok(());
    };
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for argument in arguments {
        match argument {
            Argument::Pointer(value) => builder.arg(value),
            Argument::Int(value) => builder.arg(value),
            Argument::Long(value) => builder.arg(value),
            Argument::Double(value) => builder.arg(value),
        };
    }
    // SAFETY: the caller vouches for the arguments.
    let launched = unsafe { builder.launch(config) };
    call(name, launched)?;
    count_launch();
    Ok(())
}

/// The same for a kernel with one argument, a structure.
///
/// # Safety
/// As [`launch`]; the structure is laid out as the kernel's (`#[repr(C)]`).
///
/// # Errors
/// As [`launch`].
pub unsafe fn launch_with<T: Real, S: DeviceRepr>(
    device: &CudaDevice,
    module: &Module,
    name: &'static str,
    grid: Grid,
    argument: &S,
) -> candle_core::Result<()> {
    let Some((function, config)) = prepare::<T>(device, module, name, grid)? else {
        return Ok(());
    };
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(argument);
    // SAFETY: the caller vouches for the argument.
    let launched = unsafe { builder.launch(config) };
    call(name, launched)?;
    count_launch();
    Ok(())
}

/// The kernel and its configuration, or nothing for a launch of no blocks.
fn prepare<T: Real>(
    device: &CudaDevice,
    module: &Module,
    name: &'static str,
    grid: Grid,
) -> candle_core::Result<Option<(CudaFunction, LaunchConfig)>> {
    let (x, y, z) = grid.blocks;
    if x * y * z == 0 {
        return Ok(None);
    }
    // The images of a batch, where they are not along x.
    if y.max(z) > MOST_ASIDE {
        candle_core::bail!(
            "{name}: a batch of {} is more than a launch takes ({MOST_ASIDE}): split it",
            y.max(z)
        )
    }
    let function = format!("{name}_{}", T::SUFFIX);
    let function = device.get_or_load_custom_func(&function, module.name, module.ptx)?;
    let function = function.into_cuda_function();
    if grid.shared > 48 << 10 {
        use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let most = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        call(name, function.set_attribute(most, grid.shared as i32))?;
    }
    let side = |side: usize| side as u32;
    let config = LaunchConfig {
        grid_dim: (side(x), side(y), side(z)),
        block_dim: (side(grid.threads), 1, 1),
        shared_mem_bytes: side(grid.shared),
    };
    Ok(Some((function, config)))
}
