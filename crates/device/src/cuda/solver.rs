//! Decompositions by cuSOLVER.

use super::call;
use super::memory::Real;
use crate::{Error, Result};
use candle_core::{CudaDevice, DType};
use cudarc::cusolver::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// How eigenvalues and eigenvectors of a batch of symmetric matrices are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eigensolver {
    /// `syevd` for one matrix; for several [`Self::Batched`] where the library has it, else
    /// [`Self::Jacobi`] up to 32 rows and [`Self::Divide`] above.
    #[default]
    Auto,
    /// Divide and conquer, one matrix after the other (`Xsyevd`).
    Divide,
    /// Jacobi rotations, all matrices at once (`syevjBatched`).
    Jacobi,
    /// All matrices at once (`XsyevBatched`, from CUDA 12.6 on).
    Batched,
}

/// How singular values of a batch of square matrices are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SingularSolver {
    /// Jacobi rotations, one matrix after the other (`gesvdj`).
    Jacobi,
    /// All matrices at once, meant for tall ones (`gesvdaStridedBatched`).
    Approximate,
}

/// Square matrices of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Squares {
    /// Address of the first.
    pub at: u64,
    /// Rows and columns.
    pub n: usize,
    /// Distance of rows; matrices are `n` rows apart.
    pub row: usize,
    /// Matrices.
    pub batch: usize,
}

/// Up to here Jacobi rotations of a whole batch at once were made for.
const SMALL: usize = 32;

/// A handle, with the stream that it works on.
struct Handle {
    raw: sys::cusolverDnHandle_t,
    parameters: sys::cusolverDnParams_t,
    stream: Arc<CudaStream>,
}

// SAFETY: a handle may be used by any thread, by one at a time: they are behind a lock.
unsafe impl Send for Handle {}

/// Handles are expensive; there is one a stream, for the time of the process.
static HANDLES: Mutex<Vec<Handle>> = Mutex::new(Vec::new());

type BatchedSize = unsafe extern "C" fn(
    sys::cusolverDnHandle_t,
    sys::cusolverDnParams_t,
    sys::cusolverEigMode_t,
    sys::cublasFillMode_t,
    i64,
    sys::cudaDataType,
    *const c_void,
    i64,
    sys::cudaDataType,
    *const c_void,
    sys::cudaDataType,
    *mut usize,
    *mut usize,
    i64,
) -> sys::cusolverStatus_t;

type BatchedRun = unsafe extern "C" fn(
    sys::cusolverDnHandle_t,
    sys::cusolverDnParams_t,
    sys::cusolverEigMode_t,
    sys::cublasFillMode_t,
    i64,
    sys::cudaDataType,
    *mut c_void,
    i64,
    sys::cudaDataType,
    *mut c_void,
    sys::cudaDataType,
    *mut c_void,
    usize,
    *mut c_void,
    usize,
    *mut c_int,
    i64,
) -> sys::cusolverStatus_t;

/// `XsyevBatched`, which libraries before CUDA 12.6 lack, and cudarc's bindings to them too.
fn batched() -> Option<(BatchedSize, BatchedRun)> {
    static FOUND: OnceLock<Option<(BatchedSize, BatchedRun)>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // The names, and their order, by which cudarc opens the library that handles are of.
        let names = [
            "libcusolver.so",
            "libcusolver.so.13",
            "libcusolver.so.12",
            "libcusolver.so.11",
        ];
        // SAFETY: the library is loaded already, and the functions have these types since there are any.
        unsafe {
            let library = names
                .iter()
                .find_map(|name| libloading::Library::new(*name).ok())?;
            let size = *library
                .get::<BatchedSize>(b"cusolverDnXsyevBatched_bufferSize\0")
                .ok()?;
            let run = *library
                .get::<BatchedRun>(b"cusolverDnXsyevBatched\0")
                .ok()?;
            std::mem::forget(library);
            Some((size, run))
        }
    })
}

fn said(op: &'static str, status: sys::cusolverStatus_t) -> Result<()> {
    status.result().map_err(|error| Error::Call {
        op,
        problem: format!("cuSOLVER: {:?}", error.0),
    })
}

/// Calls `work` with the handle of the device's stream.
fn with_handle<R>(
    op: &'static str,
    device: &CudaDevice,
    work: impl FnOnce(&Handle) -> Result<R>,
) -> Result<R> {
    if !super::open::has_solver() {
        return Err(Error::Library {
            asked: op.to_owned(),
            library: "cusolver",
        });
    }
    let stream = device.cuda_stream();
    call(op, stream.context().bind_to_thread())?;
    let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
    let of_stream = |handle: &&Handle| Arc::ptr_eq(&handle.stream, &stream);
    if let Some(handle) = handles.iter().find(of_stream) {
        return work(handle);
    }
    let failed = |error: result::CusolverError| Error::Call {
        op,
        problem: format!("cuSOLVER: {:?}", error.0),
    };
    let raw = result::dn_create().map_err(failed)?;
    let parameters = result::dn_create_params().map_err(failed)?;
    // SAFETY: handle and stream are alive.
    unsafe { result::dn_set_stream(raw, stream.cu_stream().cast()) }.map_err(failed)?;
    handles.push(Handle {
        raw,
        parameters,
        stream,
    });
    work(&handles[handles.len() - 1])
}

/// Memory for the time of a call: freed behind the work of its stream.
fn scratch<T: Real>(op: &'static str, handle: &Handle, values: usize) -> Result<CudaSlice<T>> {
    // SAFETY: written before it is read.
    call(op, unsafe { handle.stream.alloc::<T>(values.max(1)) })
}

fn address<T>(slice: &CudaSlice<T>, handle: &Handle) -> u64 {
    slice.device_ptr(&handle.stream).0
}

fn kind<T: Real>() -> sys::cudaDataType {
    match T::DTYPE {
        DType::F64 => sys::cudaDataType::CUDA_R_64F,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

const VECTORS: sys::cusolverEigMode_t = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
const HALF: sys::cublasFillMode_t = sys::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;

/// Eigenvalues in rising order to `values`, `n` a matrix; the matrices become their eigenvectors,
/// one a row. Waits for them, and returns what the library says of each matrix: 0 if all is well.
///
/// # Safety
/// Matrices and values lie in memory that is alive, of this type (f32 or f64).
///
/// # Errors
/// [`Error::Library`], [`Error::Call`].
pub unsafe fn eigen<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    solver: Eigensolver,
    of: Squares,
    values: u64,
) -> Result<Vec<i32>> {
    if of.batch * of.n == 0 {
        return Ok(vec![0; of.batch]);
    }
    let solver = match solver {
        Eigensolver::Auto if of.batch == 1 => Eigensolver::Divide,
        Eigensolver::Auto if has_batched(op, device)? => Eigensolver::Batched,
        Eigensolver::Auto if of.n <= SMALL => Eigensolver::Jacobi,
        Eigensolver::Auto => Eigensolver::Divide,
        chosen => chosen,
    };
    with_handle(op, device, |handle| {
        let info = call(op, handle.stream.alloc_zeros::<i32>(of.batch))?;
        let info_at = address(&info, handle);
        // SAFETY: the caller vouches for matrices and values; sizes are those of the library.
        unsafe {
            match solver {
                Eigensolver::Batched => {
                    let Some((size, run)) = batched() else {
                        return Err(Error::Call {
                            op,
                            problem: "this cuSOLVER has no XsyevBatched: it came with CUDA 12.6"
                                .to_owned(),
                        });
                    };
                    batched_eigen::<T>(op, handle, of, values, info_at, size, run)?;
                }
                Eigensolver::Jacobi => jacobi::<T>(op, handle, of, values, info_at)?,
                Eigensolver::Auto | Eigensolver::Divide => {
                    divide::<T>(op, handle, of, values, info_at)?;
                }
            }
        }
        call(op, handle.stream.clone_dtoh(&info))
    })
}

fn has_batched(op: &'static str, device: &CudaDevice) -> Result<bool> {
    // The library is opened by its first handle.
    with_handle(op, device, |_| Ok(batched().is_some()))
}

unsafe fn divide<T: Real>(
    op: &'static str,
    handle: &Handle,
    of: Squares,
    values: u64,
    info: u64,
) -> Result<()> {
    let (n, row, kind) = (of.n as i64, of.row as i64, kind::<T>());
    let (mut on_device, mut on_host) = (0, 0);
    // SAFETY: as the callers say.
    let status = unsafe {
        sys::cusolverDnXsyevd_bufferSize(
            handle.raw,
            handle.parameters,
            VECTORS,
            HALF,
            n,
            kind,
            of.at as *const c_void,
            row,
            kind,
            values as *const c_void,
            kind,
            &raw mut on_device,
            &raw mut on_host,
        )
    };
    said(op, status)?;
    let memory = scratch::<f64>(op, handle, on_device.div_ceil(8))?;
    let mut host = vec![0_u8; on_host];
    for image in 0..of.batch {
        let matrix = of.at + (image * of.n * of.row * size_of::<T>()) as u64;
        let values = values + (image * of.n * size_of::<T>()) as u64;
        // SAFETY: as the callers say.
        let status = unsafe {
            sys::cusolverDnXsyevd(
                handle.raw,
                handle.parameters,
                VECTORS,
                HALF,
                n,
                kind,
                matrix as *mut c_void,
                row,
                kind,
                values as *mut c_void,
                kind,
                address(&memory, handle) as *mut c_void,
                on_device,
                host.as_mut_ptr().cast(),
                on_host,
                (info + (image * size_of::<c_int>()) as u64) as *mut c_int,
            )
        };
        said(op, status)?;
    }
    // The host's part is used until the work is done.
    call(op, handle.stream.synchronize())
}

unsafe fn batched_eigen<T: Real>(
    op: &'static str,
    handle: &Handle,
    of: Squares,
    values: u64,
    info: u64,
    size: BatchedSize,
    run: BatchedRun,
) -> Result<()> {
    let (n, row, batch, kind) = (of.n as i64, of.row as i64, of.batch as i64, kind::<T>());
    let (mut on_device, mut on_host) = (0, 0);
    // SAFETY: as the callers say.
    said(op, unsafe {
        size(
            handle.raw,
            handle.parameters,
            VECTORS,
            HALF,
            n,
            kind,
            of.at as *const c_void,
            row,
            kind,
            values as *const c_void,
            kind,
            &raw mut on_device,
            &raw mut on_host,
            batch,
        )
    })?;
    let memory = scratch::<f64>(op, handle, on_device.div_ceil(8))?;
    let mut host = vec![0_u8; on_host];
    // SAFETY: as the callers say.
    said(op, unsafe {
        run(
            handle.raw,
            handle.parameters,
            VECTORS,
            HALF,
            n,
            kind,
            of.at as *mut c_void,
            row,
            kind,
            values as *mut c_void,
            kind,
            address(&memory, handle) as *mut c_void,
            on_device,
            host.as_mut_ptr().cast(),
            on_host,
            info as *mut c_int,
            batch,
        )
    })?;
    call(op, handle.stream.synchronize())
}

/// Parameters of a Jacobi method, with the library's own tolerance.
struct Parameters<P> {
    raw: P,
    destroy: unsafe fn(P) -> sys::cusolverStatus_t,
}

impl<P: Copy> Parameters<P> {
    fn new(
        op: &'static str,
        create: unsafe fn(*mut P) -> sys::cusolverStatus_t,
        destroy: unsafe fn(P) -> sys::cusolverStatus_t,
    ) -> Result<Self> {
        let mut raw = std::mem::MaybeUninit::uninit();
        // SAFETY: a successful call writes the handle.
        let raw = unsafe {
            said(op, create(raw.as_mut_ptr()))?;
            raw.assume_init()
        };
        Ok(Self { raw, destroy })
    }
}

impl<P> Drop for Parameters<P> {
    fn drop(&mut self) {
        // SAFETY: created by the library, and not used after this. There is nobody to tell an error.
        let _ = unsafe { (self.destroy)(std::ptr::read(&raw const self.raw)) };
    }
}

/// Calls the function of the type's precision, with its pointers.
macro_rules! of_type {
    ($type:ty, $op:expr, $single:ident | $double:ident, ($($argument:expr),* $(,)?)) => {{
        // SAFETY: as the callers say.
        let status = unsafe {
            match <$type>::DTYPE {
                DType::F64 => sys::$double($($argument as _),*),
                _ => sys::$single($($argument as _),*),
            }
        };
        said($op, status)
    }};
}

unsafe fn jacobi<T: Real>(
    op: &'static str,
    handle: &Handle,
    of: Squares,
    values: u64,
    info: u64,
) -> Result<()> {
    let parameters = Parameters::new(
        op,
        sys::cusolverDnCreateSyevjInfo,
        sys::cusolverDnDestroySyevjInfo,
    )?;
    let (n, row, batch) = (of.n as c_int, of.row as c_int, of.batch as c_int);
    let mut size: c_int = 0;
    of_type!(
        T,
        op,
        cusolverDnSsyevjBatched_bufferSize | cusolverDnDsyevjBatched_bufferSize,
        (
            handle.raw,
            VECTORS,
            HALF,
            n,
            of.at,
            row,
            values,
            &raw mut size,
            parameters.raw,
            batch
        )
    )?;
    let memory = scratch::<T>(op, handle, size as usize)?;
    of_type!(
        T,
        op,
        cusolverDnSsyevjBatched | cusolverDnDsyevjBatched,
        (
            handle.raw,
            VECTORS,
            HALF,
            n,
            of.at,
            row,
            values,
            address(&memory, handle),
            size,
            info,
            parameters.raw,
            batch
        )
    )
}

/// Singular values in falling order to `values`, `n` a matrix, and both factors to memory that is
/// given back. The matrices are destroyed. Waits for them, and returns what the library says of
/// each.
///
/// # Safety
/// As [`eigen`].
///
/// # Errors
/// As there.
pub unsafe fn singular<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    solver: SingularSolver,
    of: Squares,
    values: u64,
) -> Result<Vec<i32>> {
    if of.batch * of.n == 0 {
        return Ok(vec![0; of.batch]);
    }
    with_handle(op, device, |handle| {
        let info = call(op, handle.stream.alloc_zeros::<i32>(of.batch))?;
        let info_at = address(&info, handle);
        let factor = || scratch::<T>(op, handle, of.batch * of.n * of.n);
        let (left, right) = (factor()?, factor()?);
        let (left, right) = (address(&left, handle), address(&right, handle));
        let (n, row) = (of.n as c_int, of.row as c_int);
        let mut size: c_int = 0;
        match solver {
            SingularSolver::Approximate => {
                let apart = (of.n * of.row, of.n * of.n);
                let mut residuals = vec![0.0_f64; of.batch];
                of_type!(
                    T,
                    op,
                    cusolverDnSgesvdaStridedBatched_bufferSize
                        | cusolverDnDgesvdaStridedBatched_bufferSize,
                    (
                        handle.raw,
                        VECTORS,
                        n,
                        n,
                        n,
                        of.at,
                        row,
                        apart.0,
                        values,
                        n,
                        left,
                        n,
                        apart.1,
                        right,
                        n,
                        apart.1,
                        &raw mut size,
                        of.batch
                    )
                )?;
                let memory = scratch::<T>(op, handle, size as usize)?;
                of_type!(
                    T,
                    op,
                    cusolverDnSgesvdaStridedBatched | cusolverDnDgesvdaStridedBatched,
                    (
                        handle.raw,
                        VECTORS,
                        n,
                        n,
                        n,
                        of.at,
                        row,
                        apart.0,
                        values,
                        n,
                        left,
                        n,
                        apart.1,
                        right,
                        n,
                        apart.1,
                        address(&memory, handle),
                        size,
                        info_at,
                        residuals.as_mut_ptr(),
                        of.batch
                    )
                )?;
                call(op, handle.stream.synchronize())?;
            }
            SingularSolver::Jacobi => {
                let parameters = Parameters::new(
                    op,
                    sys::cusolverDnCreateGesvdjInfo,
                    sys::cusolverDnDestroyGesvdjInfo,
                )?;
                of_type!(
                    T,
                    op,
                    cusolverDnSgesvdj_bufferSize | cusolverDnDgesvdj_bufferSize,
                    (
                        handle.raw,
                        VECTORS,
                        0,
                        n,
                        n,
                        of.at,
                        row,
                        values,
                        left,
                        n,
                        right,
                        n,
                        &raw mut size,
                        parameters.raw
                    )
                )?;
                let memory = scratch::<T>(op, handle, size as usize)?;
                for image in 0..of.batch {
                    let part = |each: usize| (image * each * size_of::<T>()) as u64;
                    of_type!(
                        T,
                        op,
                        cusolverDnSgesvdj | cusolverDnDgesvdj,
                        (
                            handle.raw,
                            VECTORS,
                            0,
                            n,
                            n,
                            of.at + part(of.n * of.row),
                            row,
                            values + part(of.n),
                            left + part(of.n * of.n),
                            n,
                            right + part(of.n * of.n),
                            n,
                            address(&memory, handle),
                            size,
                            info_at + (image * size_of::<c_int>()) as u64,
                            parameters.raw
                        )
                    )?;
                }
            }
        }
        call(op, handle.stream.clone_dtoh(&info))
    })
}
