//! Sums and copies between several GPUs of this machine, by NCCL.
//!
//! cudarc looks for `libnccl.so` alone; what pip and the distributions install is `libnccl.so.2`.

use crate::{Error, Result};
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, DeviceLocation, backend::BackendDevice};
use cudarc::driver::{result, sys};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const OP: &str = "several GPUs";

type Raw = *mut c_void;
type Status = c_int;

/// The functions that are used; NCCL keeps their form since 2.0.
struct Nccl {
    init_all: unsafe extern "C" fn(*mut Raw, c_int, *const c_int) -> Status,
    destroy: unsafe extern "C" fn(Raw) -> Status,
    abort: unsafe extern "C" fn(Raw) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    all_reduce: unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Raw, Raw) -> Status,
    broadcast: unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Raw, Raw) -> Status,
    words: unsafe extern "C" fn(Status) -> *const c_char,
    _library: Library,
}

impl Nccl {
    /// None where the library is missing, or lacks one of them.
    fn open() -> Option<Self> {
        let names = ["libnccl.so.2", "libnccl.so"];
        // SAFETY: opens a library of that name, if there is one, and functions of NCCL's interface.
        unsafe {
            let library = names.iter().find_map(|name| Library::new(*name).ok())?;
            macro_rules! function {
                ($name:literal) => {
                    *library.get($name).ok()?
                };
            }
            Some(Self {
                init_all: function!(b"ncclCommInitAll\0"),
                destroy: function!(b"ncclCommDestroy\0"),
                abort: function!(b"ncclCommAbort\0"),
                group_start: function!(b"ncclGroupStart\0"),
                group_end: function!(b"ncclGroupEnd\0"),
                all_reduce: function!(b"ncclAllReduce\0"),
                broadcast: function!(b"ncclBroadcast\0"),
                words: function!(b"ncclGetErrorString\0"),
                _library: library,
            })
        }
    }

    fn call(&self, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NCCL returns a text of its own for every number.
        let words = unsafe { CStr::from_ptr((self.words)(status)) };
        Err(Error::Call {
            op: OP,
            problem: format!("NCCL: {}", words.to_string_lossy()),
        })
    }
}

fn nccl() -> Option<&'static Nccl> {
    static NCCL: OnceLock<Option<Nccl>> = OnceLock::new();
    NCCL.get_or_init(Nccl::open).as_ref()
}

/// Whether NCCL can be opened.
pub(super) fn is_present() -> bool {
    nccl().is_some()
}

/// What NCCL moves: its number of a type.
pub trait Moved: CudaDType {
    /// `ncclDataType_t`
    const NUMBER: c_int;
}

impl Moved for f32 {
    const NUMBER: c_int = 7;
}
impl Moved for f64 {
    const NUMBER: c_int = 8;
}

/// `ncclSum`
const SUM: c_int = 0;

/// Values that all GPUs have, each its own, of the same number.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// Address of the values.
    pub from: u64,
    /// Address of the result.
    pub to: u64,
    /// Values.
    pub count: usize,
    /// Type, [`Moved::NUMBER`].
    pub dtype: c_int,
}

/// One GPU of several, which call the same methods in the same order, each from a thread of its own.
/// Work is put on the device's stream; nothing waits.
#[derive(Debug)]
pub struct Communicator {
    /// Null when it is ended.
    raw: AtomicPtr<c_void>,
    /// Threads that are in a call.
    inside: AtomicUsize,
    device: CudaDevice,
}

impl Communicator {
    /// A communicator for each of these devices, which are all different.
    ///
    /// # Errors
    /// [`Error::Library`] without NCCL, [`Error::Call`] where the GPUs do not reach each other.
    pub fn all(devices: &[CudaDevice]) -> Result<Vec<Self>> {
        let nccl = nccl().ok_or_else(|| Error::Library {
            asked: OP.to_owned(),
            library: "nccl",
        })?;
        let ordinal = |device: &CudaDevice| match device.location() {
            DeviceLocation::Cuda { gpu_id } => gpu_id as c_int,
            _ => -1,
        };
        let ordinals: Vec<c_int> = devices.iter().map(ordinal).collect();
        super::call(OP, open_to_each_other(&ordinals))?;
        let mut raw = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: there is room for as many communicators as devices.
        nccl.call(unsafe {
            (nccl.init_all)(raw.as_mut_ptr(), ordinals.len() as c_int, ordinals.as_ptr())
        })?;
        let made = raw.into_iter().zip(devices).map(|(raw, device)| Self {
            raw: AtomicPtr::new(raw),
            inside: AtomicUsize::new(0),
            device: device.clone(),
        });
        Ok(made.collect())
    }

    /// Writes the sums over all GPUs, the same bits on each.
    ///
    /// # Safety
    /// The addresses lie in memory of this device that is alive until its stream is done with it, as long
    /// as told.
    ///
    /// # Errors
    /// [`Error::Call`], also after [`abort`](Self::abort).
    pub unsafe fn sum(&self, values: &[Exchange]) -> Result<()> {
        self.group(|nccl, raw, stream| {
            for v in values {
                // SAFETY: the caller vouches for the addresses.
                let status =
                    unsafe { (nccl.all_reduce)(v.from, v.to, v.count, v.dtype, SUM, raw, stream) };
                nccl.call(status)?;
            }
            Ok(())
        })
    }

    /// Writes the values of GPU `root` of these.
    ///
    /// # Safety
    /// As for [`sum`](Self::sum).
    ///
    /// # Errors
    /// As there.
    pub unsafe fn broadcast(&self, root: usize, values: &[Exchange]) -> Result<()> {
        self.group(|nccl, raw, stream| {
            for v in values {
                // SAFETY: the caller vouches for the addresses.
                let status = unsafe {
                    (nccl.broadcast)(v.from, v.to, v.count, v.dtype, root as c_int, raw, stream)
                };
                nccl.call(status)?;
            }
            Ok(())
        })
    }

    /// Submits work as one launch.
    fn group(&self, submit: impl FnOnce(&Nccl, Raw, Raw) -> Result<()>) -> Result<()> {
        struct Leave<'a>(&'a AtomicUsize);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        let _leave = Leave(&self.inside);
        let raw = self.raw.load(Ordering::SeqCst);
        let nccl = nccl().filter(|_| !raw.is_null());
        let nccl = nccl.ok_or_else(|| Error::Call {
            op: OP,
            problem: "another GPU of the run has failed".to_owned(),
        })?;
        let stream = self.device.cuda_stream();
        super::call(OP, stream.context().bind_to_thread())?;
        // SAFETY: a group is always ended.
        nccl.call(unsafe { (nccl.group_start)() })?;
        let submitted = submit(nccl, raw, stream.cu_stream().cast());
        // SAFETY: it was begun above.
        let ended = nccl.call(unsafe { (nccl.group_end)() });
        submitted.and(ended)
    }

    /// Ends work that waits for a GPU which will never do its part. A call of another thread is let finish, unless
    /// it waits as well, for connections: then it is what has to be ended.
    pub fn abort(&self) {
        const PATIENCE: Duration = Duration::from_secs(5);
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::SeqCst);
        let Some(nccl) = nccl().filter(|_| !raw.is_null()) else {
            return;
        };
        let began = Instant::now();
        while self.inside.load(Ordering::SeqCst) > 0 && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        // SAFETY: it is ended once, since it was taken.
        let _ = unsafe { (nccl.abort)(raw) };
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::SeqCst);
        if let Some(nccl) = nccl().filter(|_| !raw.is_null()) {
            // Waits for the work that there is.
            let _ = self.device.synchronize();
            // SAFETY: it is ended once, since it was taken, and nobody else has it.
            let _ = unsafe { (nccl.destroy)(raw) };
        }
    }
}

/// Lets each of these GPUs at the memory of the others where it can reach that: NCCL reads tensors of the same
/// process where they are, and memory of pools is closed to others at first.
fn open_to_each_other(ordinals: &[c_int]) -> std::result::Result<(), result::DriverError> {
    for &owner in ordinals {
        let owner_device = result::device::get(owner)?;
        let mut open = vec![];
        for &other in ordinals.iter().filter(|&&other| other != owner) {
            let device = result::device::get(other)?;
            let mut can = 0;
            // SAFETY: the driver writes one integer.
            unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, owner_device) }.result()?;
            if can != 0 {
                // SAFETY: a structure of numbers, of which 0 is one of each enumeration.
                let mut access: sys::CUmemAccessDesc = unsafe { std::mem::zeroed() };
                access.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
                access.location.id = other;
                access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
                open.push(access);
            }
        }
        if !open.is_empty() {
            // SAFETY: the devices are open, and the list is as long as told.
            unsafe {
                let pool = result::device::get_default_mem_pool(owner_device)?;
                sys::cuMemPoolSetAccess(pool, open.as_ptr(), open.len()).result()?;
            }
        }
    }
    Ok(())
}
