//! Operands in the memory of a GPU.

use super::call;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Shape, Storage, Tensor, WithDType};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};

/// Element types of kernels.
pub trait Real: WithDType + CudaDType + DeviceRepr {
    /// How names of kernels end.
    const SUFFIX: &'static str;
}

impl Real for f32 {
    const SUFFIX: &'static str = "f32";
}
impl Real for f64 {
    const SUFFIX: &'static str = "f64";
}
impl Real for half::bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// Where an operand begins; lives as long as what it was made of is borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// Address on the GPU.
    pub at: u64,
    /// Values.
    pub len: usize,
}

/// A contiguous operand.
///
/// # Errors
/// Where it is of another type or not contiguous.
pub fn input<T: Real>(storage: &CudaStorage, layout: &Layout) -> candle_core::Result<Input> {
    input_of::<T>(storage, layout)
}

/// As [`input`], of any type: labels, places.
///
/// # Errors
/// As there.
pub fn input_of<T: CudaDType>(
    storage: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<Input> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("operand of shape {:?} is not contiguous", layout.shape())
    };
    let slice = storage.as_cuda_slice::<T>()?;
    let stream = storage.device().cuda_stream();
    let (at, _) = slice.device_ptr(&stream);
    Ok(Input {
        at: at + (start * size_of::<T>()) as u64,
        len: end - start,
    })
}

/// Where the values of a contiguous tensor on a GPU begin; they live as long as the tensor.
///
/// # Errors
/// As [`input`], and for a tensor that is elsewhere.
pub fn address<T: CudaDType>(tensor: &Tensor) -> candle_core::Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => Ok(input_of::<T>(storage, layout)?.at),
        _ => candle_core::bail!("operand of shape {:?} is not on the GPU", tensor.shape()),
    }
}

/// New memory for a result, with any content.
#[derive(Debug)]
pub struct Output<T> {
    slice: CudaSlice<T>,
    device: CudaDevice,
}

impl<T: Real> Output<T> {
    /// Memory for a result of this shape.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] names the op and the shape.
    pub fn new(op: &'static str, device: &CudaDevice, shape: &[usize]) -> Result<Self> {
        let slice = allocate(op, device, shape)?;
        Ok(Self {
            slice,
            device: device.clone(),
        })
    }

    /// Memory for a result of this shape, zeroed.
    ///
    /// # Errors
    /// As [`Output::new`].
    pub fn zeros(op: &'static str, device: &CudaDevice, shape: &[usize]) -> Result<Self> {
        let mut out = Self::new(op, device, shape)?;
        let bytes = out.slice.num_bytes();
        let stream = device.cuda_stream();
        let (at, _) = out.slice.device_ptr_mut(&stream);
        // SAFETY: the memory is `bytes` long, and used on this stream alone.
        let cleared =
            unsafe { cudarc::driver::result::memset_d8_async(at, 0, bytes, stream.cu_stream()) };
        call(op, cleared)?;
        Ok(out)
    }

    /// Address on the GPU.
    pub fn at(&self) -> u64 {
        self.slice.device_ptr(self.slice.stream()).0
    }

    /// Values.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// As a tensor off the tape.
    pub fn into_tensor(self, shape: impl Into<Shape>) -> Tensor {
        let storage = Storage::Cuda(self.into_storage());
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    /// As the storage of a tensor.
    pub fn into_storage(self) -> CudaStorage {
        CudaStorage::wrap_cuda_slice(self.slice, self.device)
    }
}

fn allocate<T: DeviceRepr>(
    op: &'static str,
    device: &CudaDevice,
    shape: &[usize],
) -> Result<CudaSlice<T>> {
    let len: usize = shape.iter().product();
    let stream = device.cuda_stream();
    // SAFETY: callers write before they read.
    let allocated = unsafe { stream.alloc::<T>(len.max(1)) };
    allocated.map_err(|error| {
        use cudarc::driver::sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY;
        if error.0 != CUDA_ERROR_OUT_OF_MEMORY {
            return Error::Call {
                op,
                problem: super::open::said(error),
            };
        }
        let mib = |bytes: usize| bytes >> 20;
        let (free, total) = stream.context().mem_get_info().unwrap_or((0, 0));
        Error::OutOfMemory {
            op,
            shape: shape.to_vec(),
            wanted: mib(len * size_of::<T>()).max(1),
            free: mib(free),
            total: mib(total),
        }
    })
}

/// New memory with the values of an operand.
///
/// # Errors
/// As [`Output::new`].
pub fn duplicate<T: Real>(op: &'static str, device: &CudaDevice, from: Input) -> Result<Output<T>> {
    let to = Output::<T>::new(op, device, &[from.len])?;
    copy(op, device, from, &to)?;
    Ok(to)
}

/// Copies an operand to memory of as many values.
///
/// # Errors
/// [`Error::Call`], also where it is not as many.
pub fn copy<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    from: Input,
    to: &Output<T>,
) -> Result<()> {
    if from.len != to.len() {
        return Err(Error::Call {
            op,
            problem: format!("a copy of {} values to {}", from.len, to.len()),
        });
    }
    let bytes = from.len * size_of::<T>();
    let stream = device.cuda_stream();
    // SAFETY: both are that long, and do not overlap.
    let copied = unsafe {
        cudarc::driver::result::memcpy_dtod_async(to.at(), from.at, bytes, stream.cu_stream())
    };
    call(op, copied)
}

/// Scratch memory of so many bytes for the time of `work`.
///
/// # Errors
/// As [`Output::new`], and those of `work`.
pub fn with_bytes<R>(
    op: &'static str,
    device: &CudaDevice,
    bytes: usize,
    work: impl FnOnce(u64) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    if bytes == 0 {
        return work(0);
    }
    let slice = allocate::<u8>(op, device, &[bytes])?;
    let stream = device.cuda_stream();
    let (at, _) = slice.device_ptr(&stream);
    work(at)
}

/// Copies a table to the GPU, behind the work before it; its memory is freed behind the work after it.
///
/// # Errors
/// As [`Output::new`].
pub fn with_table<S: DeviceRepr, R>(
    op: &'static str,
    device: &CudaDevice,
    table: &[S],
    work: impl FnOnce(u64) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let mut slice = allocate::<S>(op, device, &[table.len()])?;
    let stream = device.cuda_stream();
    call(op, stream.memcpy_htod(table, &mut slice))?;
    let (at, _) = slice.device_ptr(&stream);
    work(at)
}

/// The values of an output, on the host: waits for all work before it.
///
/// # Errors
/// [`Error::Call`], also for what went wrong in that work.
pub fn read_back<T: Real>(op: &'static str, out: &Output<T>) -> Result<Vec<T>> {
    call(op, out.device.cuda_stream().clone_dtoh(&out.slice))
}
