//! Decompositions by cuSOLVER.

use super::memory::{Output, Real, read_back, with_bytes};
use crate::Error;
use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType};
use cudarc::cusolver::{result, sys};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;

/// The first version of the library that has `XsyevBatched` (CUDA 12.6, update 2).
const BATCHED_SINCE: c_int = 11_701;

/// How symmetric matrices are decomposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eigensolver {
    /// All of a batch at once where the library can, else one after another.
    Auto,
    /// `Xsyevd`, one after another.
    Each,
    /// `XsyevBatched`.
    Batched,
    /// `syevjBatched`, by Jacobi rotations.
    Jacobi,
}

/// Decomposes symmetric matrices `(batch, n, n)` at `a`: eigenvectors take their place, as rows, and
/// eigenvalues in rising order go to `w`, `(batch, n)`. Waits for the GPU. Returns what the library says of
/// each matrix: 0 where it is well.
///
/// # Safety
/// The addresses are of memory that is alive, of this type and these sizes.
///
/// # Errors
/// [`Error::Library`] without cuSOLVER, or with one too old for the solver; [`Error::OutOfMemory`],
/// [`Error::Call`].
pub unsafe fn eigen<T: Real>(
    device: &CudaDevice,
    solver: Eigensolver,
    (batch, n): (usize, usize),
    (a, w): (u64, u64),
) -> candle_core::Result<Vec<i32>> {
    let handle = handle(device)?;
    let infos = Output::<f32>::zeros(OP, device, &[batch])?;
    let info = |image: usize| (infos.at() + 4 * image as u64) as *mut c_int;
    let kind = kind::<T>();
    let image = |at: u64, values: usize, image: usize| {
        (at + (values * image * size_of::<T>()) as u64) as *mut c_void
    };
    let vectors = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
    // Rows of a symmetric matrix are its columns.
    let lower = sys::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
    let (side, count) = (n as i64, batch as i64);
    let batched = match solver {
        Eigensolver::Auto => batch > 1 && version()? >= BATCHED_SINCE,
        Eigensolver::Batched if version()? < BATCHED_SINCE => {
            return Err(failed(
                "XsyevBatched needs CUDA 12.6 (update 2) or later".to_owned(),
            ));
        }
        Eigensolver::Batched => true,
        Eigensolver::Each | Eigensolver::Jacobi => false,
    };
    if solver == Eigensolver::Jacobi {
        // SAFETY: the caller vouches for the operands.
        unsafe { jacobi::<T>(device, handle, (batch, n), (a, w), info(0))? };
        return codes(&infos);
    }
    let (mut on_device, mut on_host) = (0, 0);
    let options = Parameters::new()?;
    let parameters = options.0;
    // SAFETY: asks for sizes; the operands are those of the call below.
    said(unsafe {
        match batched {
            true => sys::cusolverDnXsyevBatched_bufferSize(
                handle,
                parameters,
                vectors,
                lower,
                side,
                kind,
                a as *const c_void,
                side,
                kind,
                w as *const c_void,
                kind,
                &raw mut on_device,
                &raw mut on_host,
                count,
            ),
            false => sys::cusolverDnXsyevd_bufferSize(
                handle,
                parameters,
                vectors,
                lower,
                side,
                kind,
                a as *const c_void,
                side,
                kind,
                w as *const c_void,
                kind,
                &raw mut on_device,
                &raw mut on_host,
            ),
        }
    })?;
    let mut host = vec![0_u8; on_host];
    with_bytes(OP, device, on_device, |work| {
        let (work, host) = (work as *mut c_void, host.as_mut_ptr().cast::<c_void>());
        // SAFETY: the caller vouches for the operands; the scratch is as long as the library asked, and lives
        // until the codes are read.
        unsafe {
            if batched {
                return said(sys::cusolverDnXsyevBatched(
                    handle,
                    parameters,
                    vectors,
                    lower,
                    side,
                    kind,
                    a as *mut c_void,
                    side,
                    kind,
                    w as *mut c_void,
                    kind,
                    work,
                    on_device,
                    host,
                    on_host,
                    info(0),
                    count,
                ));
            }
            for i in 0..batch {
                said(sys::cusolverDnXsyevd(
                    handle,
                    parameters,
                    vectors,
                    lower,
                    side,
                    kind,
                    image(a, n * n, i),
                    side,
                    kind,
                    image(w, n, i),
                    kind,
                    work,
                    on_device,
                    host,
                    on_host,
                    info(i),
                ))?;
            }
            Ok(())
        }
    })?;
    codes(&infos)
}

/// # Safety
/// As [`eigen`].
unsafe fn jacobi<T: Real>(
    device: &CudaDevice,
    handle: sys::cusolverDnHandle_t,
    (batch, n): (usize, usize),
    (a, w): (u64, u64),
    info: *mut c_int,
) -> candle_core::Result<()> {
    let vectors = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
    let lower = sys::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
    let (n, batch) = (n as c_int, batch as c_int);
    let (mut options, mut len) = (ptr::null_mut(), 0);
    // SAFETY: makes what is destroyed below.
    said(unsafe { sys::cusolverDnCreateSyevjInfo(&raw mut options) })?;
    // SAFETY: the caller vouches for the operands, and the scratch is as long as the library asks.
    let done = unsafe {
        match T::DTYPE {
            DType::F64 => {
                let (a, w) = (a as *mut f64, w as *mut f64);
                said(sys::cusolverDnDsyevjBatched_bufferSize(
                    handle,
                    vectors,
                    lower,
                    n,
                    a,
                    n,
                    w,
                    &raw mut len,
                    options,
                    batch,
                ))
                .and_then(|()| {
                    with_bytes(OP, device, len.max(0) as usize * size_of::<T>(), |work| {
                        said(sys::cusolverDnDsyevjBatched(
                            handle,
                            vectors,
                            lower,
                            n,
                            a,
                            n,
                            w,
                            work as *mut f64,
                            len,
                            info,
                            options,
                            batch,
                        ))
                    })
                })
            }
            _ => {
                let (a, w) = (a as *mut f32, w as *mut f32);
                said(sys::cusolverDnSsyevjBatched_bufferSize(
                    handle,
                    vectors,
                    lower,
                    n,
                    a,
                    n,
                    w,
                    &raw mut len,
                    options,
                    batch,
                ))
                .and_then(|()| {
                    with_bytes(OP, device, len.max(0) as usize * size_of::<T>(), |work| {
                        said(sys::cusolverDnSsyevjBatched(
                            handle,
                            vectors,
                            lower,
                            n,
                            a,
                            n,
                            w,
                            work as *mut f32,
                            len,
                            info,
                            options,
                            batch,
                        ))
                    })
                })
            }
        }
    };
    // SAFETY: made above.
    let destroyed = said(unsafe { sys::cusolverDnDestroySyevjInfo(options) });
    done.and(destroyed)
}

/// Singular values in falling order of f32 matrices `(batch, n, n)` at `a`, to `s`, with both sides' vectors, by
/// `gesvdaStridedBatched`. Waits for the GPU. As [`eigen`] otherwise.
///
/// # Safety
/// As [`eigen`].
///
/// # Errors
/// As [`eigen`].
pub unsafe fn singular(
    device: &CudaDevice,
    (batch, n): (usize, usize),
    (a, s): (u64, u64),
) -> candle_core::Result<Vec<i32>> {
    let handle = handle(device)?;
    let infos = Output::<f32>::zeros(OP, device, &[batch])?;
    let (left, right) = (
        Output::<f32>::new(OP, device, &[batch, n, n])?,
        Output::<f32>::new(OP, device, &[batch, n, n])?,
    );
    let vectors = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
    let (side, square, row, count) = (n as c_int, (n * n) as i64, n as i64, batch as c_int);
    let (a, s) = (a as *const f32, s as *mut f32);
    let (u, v) = (left.at() as *mut f32, right.at() as *mut f32);
    let mut len = 0;
    // SAFETY: asks for a size; the operands are those of the call below.
    said(unsafe {
        sys::cusolverDnSgesvdaStridedBatched_bufferSize(
            handle,
            vectors,
            side,
            side,
            side,
            a,
            side,
            square,
            s,
            row,
            u,
            side,
            square,
            v,
            side,
            square,
            &raw mut len,
            count,
        )
    })?;
    let mut residuals = vec![0.0_f64; batch];
    with_bytes(OP, device, len.max(0) as usize * size_of::<f32>(), |work| {
        // SAFETY: the caller vouches for the operands; the scratch is as long as the library asked.
        said(unsafe {
            sys::cusolverDnSgesvdaStridedBatched(
                handle,
                vectors,
                side,
                side,
                side,
                a,
                side,
                square,
                s,
                row,
                u,
                side,
                square,
                v,
                side,
                square,
                work as *mut f32,
                len,
                infos.at() as *mut c_int,
                residuals.as_mut_ptr(),
                count,
            )
        })
    })?;
    codes(&infos)
}

/// Options of the library's newer functions, all at their defaults.
struct Parameters(sys::cusolverDnParams_t);

impl Parameters {
    fn new() -> candle_core::Result<Self> {
        let mut parameters = ptr::null_mut();
        // SAFETY: the library makes them.
        said(unsafe { sys::cusolverDnCreateParams(&raw mut parameters) })?;
        Ok(Self(parameters))
    }
}

impl Drop for Parameters {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cusolverDnDestroyParams(self.0) };
    }
}

const OP: &str = "decomposition";

fn kind<T: Real>() -> sys::cudaDataType {
    match T::DTYPE {
        DType::F64 => sys::cudaDataType::CUDA_R_64F,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

/// What the library said of each matrix.
fn codes(infos: &Output<f32>) -> candle_core::Result<Vec<i32>> {
    let bits = read_back(OP, infos)?.into_iter();
    Ok(bits.map(|bits| bits.to_bits().cast_signed()).collect())
}

fn version() -> candle_core::Result<c_int> {
    let mut version = 0;
    // SAFETY: the library writes one integer.
    said(unsafe { sys::cusolverGetVersion(&raw mut version) })?;
    Ok(version)
}

/// A handle of this thread.
struct Handle(sys::cusolverDnHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `handle`. At the end of the program the driver may be gone: then it fails.
        let _ = unsafe { result::dn_destroy(self.0) };
    }
}

thread_local! {
    static HANDLES: RefCell<HashMap<DeviceId, Handle>> = RefCell::default();
}

fn handle(device: &CudaDevice) -> candle_core::Result<sys::cusolverDnHandle_t> {
    // SAFETY: opens a library of that name, if there is one.
    if !unsafe { sys::is_culib_present() } {
        let (asked, library) = (OP.to_owned(), "cusolver");
        return Err(Error::Library { asked, library }.into());
    }
    HANDLES.with_borrow_mut(|handles| {
        if let Some(handle) = handles.get(&device.id()) {
            return Ok(handle.0);
        }
        let stream = device.cuda_stream();
        let bound = stream.context().bind_to_thread();
        bound.map_err(candle_core::Error::wrap)?;
        let handle = Handle(result::dn_create().map_err(|e| failed(format!("{:?}", e.0)))?);
        // SAFETY: both were made just now, or live with the device.
        let set = unsafe { result::dn_set_stream(handle.0, stream.cu_stream().cast()) };
        set.map_err(|e| failed(format!("{:?}", e.0)))?;
        let raw = handle.0;
        handles.insert(device.id(), handle);
        Ok(raw)
    })
}

fn said(status: sys::cusolverStatus_t) -> candle_core::Result<()> {
    status
        .result()
        .map_err(|error| failed(format!("{:?}", error.0)))
}

fn failed(problem: String) -> candle_core::Error {
    let problem = format!("cuSOLVER: {problem}");
    Error::Call { op: OP, problem }.into()
}
