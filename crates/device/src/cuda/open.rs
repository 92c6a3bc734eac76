//! Opening a GPU, and what is installed for it.

use crate::{Choice, Error, Found, Gpu, Library, Result};
use candle_core::Device;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUmemPool_attribute};
use cudarc::driver::{result, sys};
use std::ffi::c_void;

/// The libraries that ops open, their purpose, and whether every use of a GPU needs them.
fn libraries() -> [(Library, bool); 6] {
    // SAFETY: opens a library of that name, if there is one.
    let (blas, random, dnn, solver, transfer) = unsafe {
        (
            cudarc::cublas::sys::is_culib_present(),
            candle_core::cuda::cudarc::curand::sys::is_culib_present(),
            candle_core::cuda::cudarc::cudnn::sys::is_culib_present(),
            cudarc::cusolver::sys::is_culib_present(),
            candle_core::cuda::cudarc::nvrtc::sys::is_culib_present(),
        )
    };
    let library = |name, purpose, present| Library {
        name,
        purpose,
        present,
    };
    [
        (library("cublas", "products of matrices", blas), true),
        (library("curand", "random numbers of candle", random), true),
        (library("cudnn", "convolutions", dnn), true),
        (library("cusolver", "EIG and SVD", solver), false),
        (
            library("nccl", "several GPUs", super::nccl::is_present()),
            false,
        ),
        (
            library("nvrtc", "kernels compiled when run; not needed", transfer),
            false,
        ),
    ]
}

/// Whether cuSOLVER can be opened.
pub(crate) fn has_solver() -> bool {
    static PRESENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: opens a library of that name, if there is one.
    *PRESENT.get_or_init(|| unsafe { cudarc::cusolver::sys::is_culib_present() })
}

fn driver_is_present() -> bool {
    // SAFETY: opens a library of that name, if there is one.
    unsafe { sys::is_culib_present() }
}

/// Opens the GPU of this number, with a stream of its own and memory that is kept for the next
/// allocation instead of being given back at every synchronisation.
///
/// # Errors
/// One line for each thing that can be missing, see [`Error`].
pub fn open(ordinal: usize) -> Result<Device> {
    let asked = Choice::Cuda(ordinal).to_string();
    if !driver_is_present() {
        return Err(Error::NoDriver { asked });
    }
    let driver = |error: result::DriverError| Error::Driver {
        asked: asked.clone(),
        problem: said(error),
    };
    result::init().map_err(driver)?;
    let count = result::device::get_count().map_err(driver)?;
    if i32::try_from(ordinal).map_or(true, |ordinal| ordinal >= count) {
        return Err(Error::NoDevice {
            ordinal,
            count: count.max(0) as usize,
        });
    }
    let (gpu, handle) = look(ordinal).map_err(driver)?;
    if gpu.capability.0 < 8 {
        return Err(Error::TooOld {
            asked,
            name: gpu.name,
            major: gpu.capability.0,
            minor: gpu.capability.1,
        });
    }
    if let Some((missing, _)) = libraries().iter().find(|(l, needed)| *needed && !l.present) {
        return Err(Error::Library {
            asked,
            library: missing.name,
        });
    }
    keep_memory(handle).map_err(driver)?;
    let device = Device::new_cuda_with_stream(ordinal).map_err(|error| Error::Driver {
        asked: asked.clone(),
        problem: without_backtrace(&error),
    })?;
    if let Device::Cuda(gpu) = &device {
        // SAFETY: all tensors of this device live on its one stream; the loader's copies wait for
        // it by events of their own.
        unsafe { gpu.disable_event_tracking() };
    }
    Ok(device)
}

/// The first line of an error of candle, which may have a backtrace behind it.
fn without_backtrace(error: &candle_core::Error) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Memory that is freed stays with the process.
fn keep_memory(device: sys::CUdevice) -> std::result::Result<(), result::DriverError> {
    let mut most = u64::MAX;
    // SAFETY: the device is open; the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        result::mem_pool::set_attribute(
            pool,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut most).cast::<c_void>(),
        )
    }
}

/// Bytes that this process took of the pool of the GPU of this number at most.
pub(crate) fn peak_memory(ordinal: usize) -> Option<u64> {
    let mut bytes = 0_u64;
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    // SAFETY: the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(device).ok()?;
        let at = (&raw mut bytes).cast::<c_void>();
        let which = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        result::mem_pool::get_attribute(pool, which, at).ok()?;
    }
    Some(bytes)
}

fn look(ordinal: usize) -> std::result::Result<(Gpu, sys::CUdevice), result::DriverError> {
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: `device` was just returned by the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok((
        Gpu {
            ordinal,
            name: result::device::get_name(device)?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
            // SAFETY: as above.
            memory: unsafe { result::device::total_mem(device) }?,
            bus_bits: attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
            memory_clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
        },
        device,
    ))
}

/// Compute capability of an open device.
///
/// # Errors
/// [`Error::Call`].
pub fn capability(op: &'static str, device: &candle_core::CudaDevice) -> Result<(i32, i32)> {
    call(op, device.cuda_stream().context().compute_capability())
}

/// Multiprocessors of an open device.
///
/// # Errors
/// [`Error::Call`].
pub fn multiprocessors(op: &'static str, device: &candle_core::CudaDevice) -> Result<usize> {
    number(
        op,
        device,
        Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    )
}

/// Bytes of shared memory that a block of an open device may ask for.
///
/// # Errors
/// [`Error::Call`].
pub fn shared_memory(op: &'static str, device: &candle_core::CudaDevice) -> Result<usize> {
    let most = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    number(op, device, most)
}

fn number(op: &'static str, device: &candle_core::CudaDevice, which: Attribute) -> Result<usize> {
    let value = call(op, device.cuda_stream().context().attribute(which))?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// See [`crate::found`].
#[must_use]
pub fn found() -> Found {
    let mut found = Found {
        built: true,
        driver: None,
        libraries: libraries()
            .into_iter()
            .map(|(library, _)| library)
            .collect(),
        gpus: vec![],
        problem: None,
    };
    if !driver_is_present() {
        found.problem = Some("no NVIDIA driver (libcuda.so.1)".to_owned());
        return found;
    }
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
    if asked.is_ok() {
        found.driver = Some((version / 1000, version % 1000 / 10));
    }
    let gpus = result::init()
        .and_then(|()| result::device::get_count())
        .and_then(|count| (0..count.max(0) as usize).map(|i| Ok(look(i)?.0)).collect());
    match gpus {
        Ok(gpus) => found.gpus = gpus,
        Err(error) => found.problem = Some(said(error)),
    }
    found
}

/// An error of the driver in words.
pub(crate) fn said(error: result::DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, _>| {
        text.map_or_else(
            |_: result::DriverError| String::new(),
            |t| t.to_string_lossy().into_owned(),
        )
    };
    let (name, words) = (text(error.error_name()), text(error.error_string()));
    match name.as_str() {
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" | "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" => {
            format!("{words} ({name}); update the driver")
        }
        _ => format!("{words} ({name})"),
    }
}

/// The result of a call of the driver, with the op's name.
pub(crate) fn call<T>(
    op: &'static str,
    result: std::result::Result<T, result::DriverError>,
) -> Result<T> {
    result.map_err(|error| Error::Call {
        op,
        problem: said(error),
    })
}
