//! The driver API (libcuda), as far as cudarc and candle use it.

use crate::device::{self, *};
use crate::memory::{self, Kind};
use crate::ptx::{self, FailureKind, Globals, Program, parse::Init, parse::Space};
use crate::stream::{self, Event, Graph};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

type Handle = *mut c_void;

/// The context of device 0; there is one a device, and this is the first.
const CONTEXT: usize = 0xC0DE;

/// The context of a device; null for a device that is none.
fn context_of(device: c_int) -> usize {
    match (0..device::count()).contains(&device) {
        true => CONTEXT + device as usize,
        false => 0,
    }
}

/// The device whose context is current in this thread.
pub fn current_device() -> Option<c_int> {
    let current = CURRENT.with(|c| c.borrow().last().copied())?;
    let device = current.checked_sub(CONTEXT)? as c_int;
    (device < device::count()).then_some(device)
}

thread_local! {
    static CURRENT: std::cell::RefCell<Vec<usize>> = const { std::cell::RefCell::new(Vec::new()) };
}
static RETAINED: AtomicUsize = AtomicUsize::new(0);

/// Exports functions with C's calling convention.
macro_rules! export {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> c_int {
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )*};
}
pub(crate) use export;

/// Writes a result through a pointer that must not be null.
unsafe fn give<T>(to: *mut T, value: T) -> c_int {
    if to.is_null() {
        return INVALID_VALUE;
    }
    unsafe { to.write(value) };
    broken()
}

/// Functions that succeed without doing anything.
macro_rules! nothing {
    ($(fn $name:ident($($ty:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($(_: $ty),*) -> c_int {
            broken()
        }
    )*};
}

nothing! {
    fn cuProfilerStart();
    fn cuProfilerStop();
    fn cuCtxSetCacheConfig(c_int);
    fn cuCtxSetFlags(c_uint);
    fn cuCtxSetLimit(c_int, usize);
    fn cuDevicePrimaryCtxSetFlags_v2(c_int, c_uint);
    fn cuDevicePrimaryCtxReset_v2(c_int);
    fn cuFuncSetCacheConfig(Handle, c_int);
    fn cuMemAdvise_v2(u64, usize, c_int, u64);
    fn cuMemPrefetchAsync_v2(u64, usize, u64, c_uint, Handle);
    fn cuMemPoolSetAccess(Handle, *const c_void, usize);
    fn cuGraphUpload(Handle, Handle);
    fn cuDeviceSetMemPool(c_int, Handle);
    fn cuStreamAttachMemAsync(Handle, u64, usize, c_uint);
}

export! {
    fn cuInit(_flags: c_uint) { SUCCESS }

    fn cuDriverGetVersion(version: *mut c_int) { give(version, 13000) }

    fn cuDeviceGetCount(count: *mut c_int) { give(count, device::count()) }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        if !(0..device::count()).contains(&ordinal) {
            return INVALID_DEVICE;
        }
        give(device, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
        copy_text(name, len, device::NAME.to_bytes())
    }

    fn cuDeviceGetPCIBusId(name: *mut c_char, len: c_int, _device: c_int) {
        copy_text(name, len, b"0000:00:00.0")
    }

    fn cuDeviceGetUuid(uuid: *mut [u8; 16], _device: c_int) { give(uuid, *b"cuda-stand-in-00") }

    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _device: c_int) { give(uuid, *b"cuda-stand-in-00") }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) {
        give(bytes, device::total_memory() as usize)
    }

    fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) {
        give(value, device::attribute(which))
    }

    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, _device: c_int) {
        let (a, b) = device::compute_capability();
        give(major, a);
        give(minor, b)
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        give(can, (device != peer) as c_int)
    }

    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) {
        RETAINED.fetch_add(1, Ordering::Relaxed);
        give(context, context_of(device));
        SUCCESS
    }

    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) {
        let _ = RETAINED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        SUCCESS
    }

    fn cuDevicePrimaryCtxGetState(_device: c_int, flags: *mut c_uint, active: *mut c_int) {
        give(flags, 0);
        give(active, (RETAINED.load(Ordering::Relaxed) > 0) as c_int)
    }

    fn cuCtxCreate_v3(context: *mut usize, _p: Handle, _n: c_int, _flags: c_uint, d: c_int) {
        push(context_of(d));
        give(context, context_of(d))
    }

    fn cuCtxCreate_v4(context: *mut usize, _params: Handle, _flags: c_uint, device: c_int) {
        push(context_of(device));
        give(context, context_of(device))
    }

    fn cuCtxDestroy_v2(_context: usize) { SUCCESS }

    fn cuCtxGetCurrent(context: *mut usize) {
        let current = CURRENT.with(|c| c.borrow().last().copied().unwrap_or(0));
        give(context, current);
        SUCCESS
    }

    fn cuCtxSetCurrent(context: usize) {
        CURRENT.with(|c| {
            c.borrow_mut().pop();
            if context != 0 {
                c.borrow_mut().push(context);
            }
        });
        SUCCESS
    }

    fn cuCtxPushCurrent_v2(context: usize) {
        push(context);
        SUCCESS
    }

    fn cuCtxPopCurrent_v2(context: *mut usize) {
        match CURRENT.with(|c| c.borrow_mut().pop()) {
            Some(top) => {
                give(context, top);
                SUCCESS
            }
            None => INVALID_CONTEXT,
        }
    }

    fn cuCtxGetDevice(device: *mut c_int) {
        match current_device() {
            Some(current) => give(device, current),
            None => INVALID_CONTEXT,
        }
    }

    fn cuCtxGetApiVersion(_context: usize, version: *mut c_uint) { give(version, 3020) }

    fn cuCtxGetFlags(flags: *mut c_uint) { give(flags, 0) }

    fn cuCtxGetCacheConfig(config: *mut c_int) { give(config, 0) }

    fn cuCtxGetLimit(value: *mut usize, _limit: c_int) { give(value, 1024) }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        give(least, 0);
        give(greatest, -5)
    }

    fn cuCtxSynchronize() {
        let e = stream::forbid_unsafe();
        memory::synchronised();
        e
    }

    fn cuGetErrorName(error: c_int, text: *mut *const c_char) { error_text(error, text, |d| d.0) }

    fn cuGetErrorString(error: c_int, text: *mut *const c_char) { error_text(error, text, |d| d.1) }

    fn cuGetProcAddress_v2(
        symbol: *const c_char, pointer: *mut Handle, _version: c_int, _flags: u64, status: *mut c_int
    ) {
        // Looking the name up among the exports needs the dynamic loader; nothing here
        // asks for it, and who does is told that there is no such function.
        let name = CStr::from_ptr(symbol).to_string_lossy();
        device::report(&format!("cuGetProcAddress of {name} is not supported"));
        give(pointer, std::ptr::null_mut());
        if !status.is_null() {
            *status = 1;
        }
        NOT_FOUND
    }
}

fn push(context: usize) {
    CURRENT.with(|c| c.borrow_mut().push(context));
}

unsafe fn copy_text(to: *mut c_char, len: c_int, text: &[u8]) -> c_int {
    if to.is_null() || len <= 0 {
        return INVALID_VALUE;
    }
    let n = text.len().min(len as usize - 1);
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to as *mut u8, n);
        to.add(n).write(0);
    }
    SUCCESS
}

unsafe fn error_text(
    error: c_int,
    to: *mut *const c_char,
    pick: fn((&'static CStr, &'static CStr)) -> &'static CStr,
) -> c_int {
    let (text, result) = match device::describe(error) {
        Some(d) => (pick(d).as_ptr(), SUCCESS),
        None => (c"unknown error".as_ptr(), INVALID_VALUE),
    };
    if to.is_null() {
        return INVALID_VALUE;
    }
    unsafe { to.write(text) };
    result
}

// Memory.

unsafe fn give_allocation(to: *mut u64, size: usize, kind: Kind) -> c_int {
    if broken() != SUCCESS {
        return broken();
    }
    match memory::allocate(size, kind) {
        Ok(address) => unsafe { give(to, address) },
        Err(e) => e,
    }
}

unsafe fn allocate_async(to: *mut u64, size: usize, pool: usize, on: usize) -> c_int {
    if size == 0 {
        // Unlike `cuMemAlloc`, pools give a null pointer for nothing.
        return unsafe { give(to, 0) };
    }
    let e = unsafe { give_allocation(to, size, Kind::Pool(pool)) };
    if e == SUCCESS && stream::capture_of(on).is_some() {
        // A replay starts with the memory undefined again.
        let address = unsafe { *to };
        return stream::submit(on, move || fill::<u8>("allocation", address, 0xFF, size));
    }
    e
}

export! {
    fn cuMemAlloc_v2(address: *mut u64, size: usize) {
        match stream::forbid_unsafe() {
            SUCCESS => give_allocation(address, size, Kind::Plain),
            e => e,
        }
    }

    fn cuMemAllocManaged(address: *mut u64, size: usize, _flags: c_uint) {
        give_allocation(address, size, Kind::Plain)
    }

    fn cuMemFree_v2(address: u64) {
        if address == 0 {
            return broken();
        }
        match stream::forbid_unsafe() {
            SUCCESS => memory::free(address, memory::is_device),
            e => e,
        }
    }

    fn cuMemAllocAsync(address: *mut u64, size: usize, on: usize) {
        allocate_async(address, size, memory::DEFAULT_POOL, on)
    }

    fn cuMemAllocFromPoolAsync(address: *mut u64, size: usize, pool: usize, on: usize) {
        allocate_async(address, size, pool, on)
    }

    fn cuMemFreeAsync(address: u64, on: usize) {
        if broken() != SUCCESS || address == 0 {
            return broken();
        }
        match stream::capture_of(on) {
            Some(capture) => {
                // Earlier work of the graph uses the memory whenever it is replayed.
                capture.keep(address);
                SUCCESS
            }
            None => memory::free(address, memory::is_device),
        }
    }

    fn cuMemHostAlloc(address: *mut u64, size: usize, _flags: c_uint) {
        give_allocation(address, size, Kind::Host)
    }

    fn cuMemAllocHost_v2(address: *mut u64, size: usize) {
        give_allocation(address, size, Kind::Host)
    }

    fn cuMemFreeHost(address: u64) { memory::free(address, |k| k == Kind::Host) }

    fn cuMemHostRegister_v2(address: u64, size: usize, _flags: c_uint) {
        memory::register(address, size);
        broken()
    }

    fn cuMemHostUnregister(address: u64) { memory::free(address, |k| k == Kind::Registered) }

    fn cuMemHostGetDevicePointer_v2(to: *mut u64, host: u64, _flags: c_uint) { give(to, host) }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let (f, t) = memory::info();
        give(free, f as usize);
        give(total, t as usize)
    }

    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, address: u64) {
        match memory::find(address) {
            Some((start, bytes, _)) => {
                if !base.is_null() {
                    *base = start;
                }
                if !size.is_null() {
                    *size = bytes as usize;
                }
                SUCCESS
            }
            None => NOT_FOUND,
        }
    }

    fn cuPointerGetAttribute(data: Handle, which: c_int, address: u64) {
        let Some((start, size, kind)) = memory::find(address) else { return INVALID_VALUE };
        let host = matches!(kind, Kind::Host | Kind::Registered);
        let device = memory::device_of(address).unwrap_or(0);
        match which {
            1 => *(data as *mut usize) = context_of(device),
            2 => *(data as *mut u32) = if host { 1 } else { 2 },
            3 | 4 => *(data as *mut u64) = address,
            8 => *(data as *mut u32) = 0,
            9 => *(data as *mut i32) = device,
            11 => *(data as *mut u64) = start,
            12 => *(data as *mut usize) = size as usize,
            13 => *(data as *mut u32) = 1,
            _ => return NOT_SUPPORTED,
        }
        SUCCESS
    }

    fn cuDeviceGetDefaultMemPool(pool: *mut usize, _device: c_int) {
        give(pool, memory::DEFAULT_POOL)
    }

    fn cuDeviceGetMemPool(pool: *mut usize, _device: c_int) { give(pool, memory::DEFAULT_POOL) }

    fn cuMemPoolCreate(pool: *mut usize, _properties: Handle) { give(pool, memory::create_pool()) }

    fn cuMemPoolDestroy(pool: usize) {
        if memory::destroy_pool(pool) { SUCCESS } else { INVALID_VALUE }
    }

    fn cuMemPoolTrimTo(pool: usize, keep: usize) {
        let done = memory::change_pool(pool, |p| {
            p.reserved = p.used.max(p.reserved.min(keep as u64));
        });
        if done { broken() } else { INVALID_VALUE }
    }

    fn cuMemPoolGetAttribute(pool: usize, which: c_int, value: Handle) {
        let Some(p) = memory::pool(pool) else { return INVALID_VALUE };
        match which {
            1..=3 => *(value as *mut c_int) = 1,
            4 => *(value as *mut u64) = p.threshold,
            5 => *(value as *mut u64) = p.reserved,
            6 => *(value as *mut u64) = p.reserved_high,
            7 => *(value as *mut u64) = p.used,
            8 => *(value as *mut u64) = p.used_high,
            _ => return INVALID_VALUE,
        }
        broken()
    }

    fn cuMemPoolSetAttribute(pool: usize, which: c_int, value: Handle) {
        let done = match which {
            1..=3 => true,
            4 => {
                let threshold = *(value as *const u64);
                memory::change_pool(pool, |p| p.threshold = threshold)
            }
            // The high marks can only be reset.
            6 if *(value as *const u64) == 0 => {
                memory::change_pool(pool, |p| p.reserved_high = p.reserved)
            }
            8 if *(value as *const u64) == 0 => {
                memory::change_pool(pool, |p| p.used_high = p.used)
            }
            _ => false,
        };
        if done { broken() } else { INVALID_VALUE }
    }
}

/// Copies; a side that is device memory must lie inside an allocation.
fn copy(what: &str, to: u64, from: u64, bytes: usize, device: (bool, bool)) -> c_int {
    let good = (!device.0 || memory::check(what, to, bytes as u64))
        && (!device.1 || memory::check(what, from, bytes as u64));
    if !good {
        return INVALID_VALUE;
    }
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
    SUCCESS
}

fn fill<T: Copy>(what: &str, to: u64, value: T, count: usize) -> c_int {
    if !memory::check(what, to, (count * size_of::<T>()) as u64) {
        return INVALID_VALUE;
    }
    if !to.is_multiple_of(size_of::<T>() as u64) {
        return INVALID_VALUE;
    }
    unsafe { std::slice::from_raw_parts_mut(to as *mut T, count) }.fill(value);
    SUCCESS
}

macro_rules! copies {
    ($($sync:ident, $async:ident: $to:expr, $from:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $sync(to: u64, from: u64, bytes: usize) -> c_int {
            match stream::forbid_unsafe() {
                SUCCESS => copy(stringify!($sync), to, from, bytes, ($to, $from)),
                e => e,
            }
        }
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $async(to: u64, from: u64, bytes: usize, on: usize) -> c_int {
            stream::submit(on, move || {
                copy(stringify!($async), to, from, bytes, ($to, $from))
            })
        }
    )*};
}

copies! {
    cuMemcpyHtoD_v2, cuMemcpyHtoDAsync_v2: true, false;
    cuMemcpyDtoH_v2, cuMemcpyDtoHAsync_v2: false, true;
    cuMemcpyDtoD_v2, cuMemcpyDtoDAsync_v2: true, true;
    cuMemcpy, cuMemcpyAsync: false, false;
}

macro_rules! fills {
    ($($sync:ident, $async:ident: $arg:ty => $t:ty;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $sync(to: u64, value: $arg, count: usize) -> c_int {
            stream::submit(stream::LEGACY, move || {
                fill(stringify!($sync), to, value as $t, count)
            })
        }
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $async(to: u64, value: $arg, count: usize, on: usize) -> c_int {
            stream::submit(on, move || fill(stringify!($async), to, value as $t, count))
        }
    )*};
}

fills! {
    cuMemsetD8_v2, cuMemsetD8Async: u8 => u8;
    cuMemsetD16_v2, cuMemsetD16Async: u16 => u16;
    cuMemsetD32_v2, cuMemsetD32Async: u32 => u32;
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2d {
    from_x: usize,
    from_y: usize,
    from_type: c_int,
    from_host: u64,
    from_device: u64,
    from_array: usize,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_int,
    to_host: u64,
    to_device: u64,
    to_array: usize,
    to_pitch: usize,
    width: usize,
    height: usize,
}

impl Copy2d {
    fn run(&self) -> c_int {
        let side = |kind, host, device| match kind {
            1 => Some((host, false)),
            2 => Some((device, true)),
            4 => Some((device, false)),
            _ => None,
        };
        let from = side(self.from_type, self.from_host, self.from_device);
        let to = side(self.to_type, self.to_host, self.to_device);
        let (Some((from, from_checked)), Some((to, to_checked))) = (from, to) else {
            return NOT_SUPPORTED;
        };
        for row in 0..self.height {
            let from = from + ((self.from_y + row) * self.from_pitch + self.from_x) as u64;
            let to = to + ((self.to_y + row) * self.to_pitch + self.to_x) as u64;
            let e = copy(
                "cuMemcpy2D",
                to,
                from,
                self.width,
                (to_checked, from_checked),
            );
            if e != SUCCESS {
                return e;
            }
        }
        SUCCESS
    }
}

export! {
    fn cuMemcpy2D_v2(copy: *const Copy2d) {
        match stream::forbid_unsafe() {
            SUCCESS => (*copy).run(),
            e => e,
        }
    }

    fn cuMemcpy2DAsync_v2(copy: *const Copy2d, on: usize) {
        let copy = *copy;
        stream::submit(on, move || copy.run())
    }

    fn cuMemcpyPeerAsync(to: u64, _tc: usize, from: u64, _fc: usize, bytes: usize, on: usize) {
        cuMemcpyDtoDAsync_v2(to, from, bytes, on)
    }

    fn cuMemsetD2D8_v2(to: u64, pitch: usize, value: u8, width: usize, height: usize) {
        stream::submit(stream::LEGACY, move || {
            let rows = (0..height).map(|r| fill("cuMemsetD2D8", to + (r * pitch) as u64, value, width));
            rows.into_iter().find(|&e| e != SUCCESS).unwrap_or(SUCCESS)
        })
    }
}

// Streams, events and graphs. A stream's handle is a leaked flag word, freed with it.

export! {
    fn cuStreamCreate(stream: *mut usize, flags: c_uint) {
        give(stream, Box::into_raw(Box::new((flags, 0))) as usize)
    }

    fn cuStreamCreateWithPriority(stream: *mut usize, flags: c_uint, priority: c_int) {
        give(stream, Box::into_raw(Box::new((flags, priority))) as usize)
    }

    fn cuStreamDestroy_v2(stream: usize) {
        if stream <= stream::PER_THREAD {
            return INVALID_HANDLE;
        }
        drop(Box::from_raw(stream as *mut (c_uint, c_int)));
        broken()
    }

    fn cuStreamGetFlags(stream: usize, flags: *mut c_uint) {
        let known = stream > stream::PER_THREAD;
        give(flags, if known { (*(stream as *const (c_uint, c_int))).0 } else { 0 })
    }

    fn cuStreamGetPriority(stream: usize, priority: *mut c_int) {
        let known = stream > stream::PER_THREAD;
        give(priority, if known { (*(stream as *const (c_uint, c_int))).1 } else { 0 })
    }

    fn cuStreamGetCtx(_stream: usize, context: *mut usize) {
        give(context, context_of(current_device().unwrap_or(0)))
    }

    fn cuStreamSynchronize(stream: usize) {
        let e = stream::forbid(stream);
        memory::synchronised();
        e
    }

    fn cuStreamQuery(stream: usize) { stream::forbid(stream) }

    fn cuStreamWaitEvent(stream: usize, event: *const Event, _flags: c_uint) {
        (*event).join(stream)
    }

    fn cuLaunchHostFunc(stream: usize, f: unsafe extern "C" fn(Handle), data: usize) {
        stream::submit(stream, move || {
            f(data as Handle);
            SUCCESS
        })
    }

    fn cuStreamAddCallback(
        stream: usize, f: unsafe extern "C" fn(usize, c_int, Handle), data: usize, _flags: c_uint
    ) {
        f(stream, broken(), data as Handle);
        broken()
    }

    fn cuEventCreate(event: *mut *mut Event, flags: c_uint) {
        let timing = flags & 2 == 0;
        give(event, Box::into_raw(Box::new(Event::new(timing))))
    }

    fn cuEventDestroy_v2(event: *mut Event) {
        drop(Box::from_raw(event));
        broken()
    }

    fn cuEventRecord(event: *const Event, stream: usize) { (*event).record(stream) }

    fn cuEventRecordWithFlags(event: *const Event, stream: usize, _flags: c_uint) {
        (*event).record(stream)
    }

    fn cuEventQuery(event: *const Event) { (*event).wait() }

    fn cuEventSynchronize(event: *const Event) {
        memory::synchronised();
        (*event).wait()
    }

    fn cuEventElapsedTime(ms: *mut f32, start: *const Event, end: *const Event) {
        match (*start).elapsed(&*end) {
            Ok(t) => give(ms, t),
            Err(e) => e,
        }
    }

    fn cuEventElapsedTime_v2(ms: *mut f32, start: *const Event, end: *const Event) {
        cuEventElapsedTime(ms, start, end)
    }

    fn cuStreamBeginCapture_v2(stream: usize, mode: c_int) {
        match broken() {
            SUCCESS => stream::begin_capture(stream, mode),
            e => e,
        }
    }

    fn cuStreamEndCapture(stream: usize, graph: *mut *const Graph) {
        match stream::end_capture(stream) {
            Ok(g) => give(graph, Arc::into_raw(Arc::new(g))),
            Err(e) => {
                *graph = std::ptr::null();
                e
            }
        }
    }

    fn cuStreamIsCapturing(stream: usize, status: *mut c_int) {
        give(status, stream::capture_of(stream).map_or(0, |c| if c.is_valid() { 1 } else { 2 }))
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: usize, status: *mut c_int, id: *mut u64, graph: *mut Handle, deps: *mut Handle,
        count: *mut usize
    ) {
        capture_info(stream, status, id, graph, deps, count)
    }

    fn cuStreamGetCaptureInfo_v3(
        stream: usize, status: *mut c_int, id: *mut u64, graph: *mut Handle, deps: *mut Handle,
        edges: *mut Handle, count: *mut usize
    ) {
        if !edges.is_null() {
            *edges = std::ptr::null_mut();
        }
        capture_info(stream, status, id, graph, deps, count)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) { give(mode, 0) }

    fn cuGraphInstantiateWithFlags(exec: *mut *const Graph, graph: *const Graph, _f: c_ulonglong) {
        Arc::increment_strong_count(graph);
        give(exec, graph)
    }

    fn cuGraphInstantiateWithParams(exec: *mut *const Graph, graph: *const Graph, _p: Handle) {
        Arc::increment_strong_count(graph);
        give(exec, graph)
    }

    fn cuGraphDestroy(graph: *const Graph) {
        Arc::decrement_strong_count(graph);
        broken()
    }

    fn cuGraphExecDestroy(exec: *const Graph) {
        Arc::decrement_strong_count(exec);
        broken()
    }

    fn cuGraphLaunch(exec: *const Graph, stream: usize) {
        Arc::increment_strong_count(exec);
        let graph = Arc::from_raw(exec);
        stream::submit(stream, move || stream::run_graph(&graph))
    }

    fn cuGraphGetNodes(graph: *const Graph, nodes: *mut Handle, count: *mut usize) {
        if !nodes.is_null() {
            for n in 0..(*count).min((*graph).work.len()) {
                *nodes.add(n) = (n + 1) as Handle;
            }
        }
        give(count, (*graph).work.len())
    }
}

unsafe fn capture_info(
    stream: usize,
    status: *mut c_int,
    id: *mut u64,
    graph: *mut Handle,
    deps: *mut Handle,
    count: *mut usize,
) -> c_int {
    unsafe {
        for p in [graph, deps] {
            if !p.is_null() {
                *p = std::ptr::null_mut();
            }
        }
        if !count.is_null() {
            *count = 0;
        }
        let capture = stream::capture_of(stream);
        if let (Some(c), false) = (&capture, id.is_null()) {
            *id = c.id();
        }
        give(
            status,
            capture.map_or(0, |c| if c.is_valid() { 1 } else { 2 }),
        )
    }
}

// Modules and functions.

pub struct LoadedModule {
    module: Arc<ptx::Module>,
    globals: Globals,
    sizes: HashMap<String, usize>,
    functions: Mutex<HashMap<String, *mut KernelHandle>>,
}

pub struct KernelHandle {
    program: Arc<Program>,
    name: CString,
    module: usize,
    max_dynamic: AtomicI32,
    any_cluster: AtomicI32,
}

fn load(text: String) -> Result<LoadedModule, i32> {
    let failed = |e: String| {
        device::report(&format!("module: {e}"));
        INVALID_PTX
    };
    check_target(&text).map_err(failed)?;
    let module = Arc::new(ptx::Module::parse(text).map_err(failed)?);
    let mut globals = Globals::new();
    let mut sizes = HashMap::new();
    let placed = || {
        module
            .variables
            .iter()
            .filter(|v| matches!(v.space, Space::Global | Space::Const))
    };
    for v in placed() {
        let address = memory::allocate(v.size.max(1), Kind::Module)?;
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, v.size) };
        globals.insert(v.name.clone(), address);
        sizes.insert(v.name.clone(), v.size);
    }
    for v in placed() {
        let mut at = globals[&v.name];
        for init in &v.init {
            let bits = match init {
                Init::Bits(b) => *b,
                Init::Symbol(name, offset) => {
                    let base = globals.get(name).copied().unwrap_or(0);
                    base.wrapping_add(*offset as u64)
                }
            };
            let bytes = bits.to_le_bytes();
            let n = v.element.min(8);
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, n) };
            at += n as u64;
        }
    }
    Ok(LoadedModule {
        module,
        globals,
        sizes,
        functions: Mutex::default(),
    })
}

/// Code for a newer device than this one does not load, as with the real driver.
fn check_target(text: &str) -> Result<(), String> {
    let line = text.lines().find_map(|l| l.trim().strip_prefix(".target"));
    let line = line.ok_or("no .target, so this is no PTX")?;
    let digits: String = line
        .trim()
        .strip_prefix("sm_")
        .unwrap_or("")
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    let target: i32 = digits.parse().unwrap_or(0);
    let (major, minor) = device::compute_capability();
    if target > major * 10 + minor {
        return Err(format!(
            "made for sm_{target}, newer than the device's {major}.{minor}"
        ));
    }
    Ok(())
}

unsafe fn load_image(to: *mut *mut LoadedModule, image: *const c_void) -> c_int {
    if broken() != SUCCESS {
        return broken();
    }
    let head = unsafe { std::slice::from_raw_parts(image as *const u8, 4) };
    if head == b"\x7FELF" || head == [0x50, 0xED, 0x55, 0xBA] {
        device::report("module: only PTX can be loaded, not compiled code");
        return INVALID_IMAGE;
    }
    let text = unsafe { CStr::from_ptr(image as *const c_char) }
        .to_string_lossy()
        .into_owned();
    match load(text) {
        Ok(m) => unsafe { give(to, Box::into_raw(Box::new(m))) },
        Err(e) => e,
    }
}

export! {
    fn cuModuleLoadData(module: *mut *mut LoadedModule, image: *const c_void) {
        load_image(module, image)
    }

    fn cuModuleLoadDataEx(
        module: *mut *mut LoadedModule, image: *const c_void, _n: c_uint, _options: Handle,
        _values: Handle
    ) {
        load_image(module, image)
    }

    fn cuModuleLoad(module: *mut *mut LoadedModule, name: *const c_char) {
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        match std::fs::read(&name) {
            Ok(mut bytes) => {
                bytes.extend([0; 4]);
                load_image(module, bytes.as_ptr() as *const c_void)
            }
            Err(_) => FILE_NOT_FOUND,
        }
    }

    fn cuModuleUnload(module: *mut LoadedModule) {
        let m = Box::from_raw(module);
        for &address in m.globals.values() {
            memory::free(address, |k| k == Kind::Module);
        }
        for &f in m.functions.lock().unwrap().values() {
            drop(Box::from_raw(f));
        }
        broken()
    }

    fn cuModuleGetFunction(
        function: *mut *mut KernelHandle, module: &LoadedModule, name: *const c_char
    ) {
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let mut functions = module.functions.lock().unwrap();
        if let Some(&f) = functions.get(&name) {
            return give(function, f);
        }
        if !module.module.functions.get(&name).is_some_and(|f| f.entry) {
            return NOT_FOUND;
        }
        match Program::decode(&module.module, &name, &module.globals) {
            Ok(program) => {
                if device::traced() {
                    for text in program.unsupported() {
                        device::report(&format!("{name}: {text}"));
                    }
                }
                if program.shared > SHARED {
                    device::report(&format!("{name}: {} bytes of shared memory", program.shared));
                    return INVALID_PTX;
                }
                let handle = KernelHandle {
                    program: Arc::new(program),
                    name: CString::new(name.clone()).unwrap_or_default(),
                    module: module as *const LoadedModule as usize,
                    max_dynamic: AtomicI32::new(0),
                    any_cluster: AtomicI32::new(0),
                };
                let handle = Box::into_raw(Box::new(handle));
                functions.insert(name, handle);
                give(function, handle)
            }
            Err(e) => {
                device::report(&format!("{name}: {e}"));
                INVALID_PTX
            }
        }
    }

    fn cuModuleGetGlobal_v2(
        address: *mut u64, size: *mut usize, module: &LoadedModule, name: *const c_char
    ) {
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let Some(&found) = module.globals.get(&name) else { return NOT_FOUND };
        if !address.is_null() {
            *address = found;
        }
        if !size.is_null() {
            *size = module.sizes[&name];
        }
        broken()
    }

    fn cuFuncGetName(name: *mut *const c_char, f: &'static KernelHandle) {
        give(name, f.name.as_ptr())
    }

    fn cuFuncGetModule(module: *mut usize, f: &'static KernelHandle) {
        give(module, f.module)
    }

    fn cuFuncGetAttribute(value: *mut c_int, which: c_int, f: &'static KernelHandle) {
        let p = &f.program;
        let (major, minor) = device::compute_capability();
        let cluster = p.cluster.unwrap_or([0; 3]);
        give(value, match which {
            0 => p.max_threads.unwrap_or(MAX_THREADS) as c_int,
            1 => p.shared as c_int,
            3 => p.local as c_int,
            4 => 32,
            5 | 6 => major * 10 + minor,
            8 => match f.max_dynamic.load(Ordering::Relaxed) {
                0 => (SHARED - p.shared) as c_int,
                n => n,
            },
            9 => -1,
            10 => p.cluster.is_some() as c_int,
            11..=13 => cluster[which as usize - 11] as c_int,
            14 => f.any_cluster.load(Ordering::Relaxed),
            _ => 0,
        })
    }

    fn cuFuncSetAttribute(f: &'static KernelHandle, which: c_int, value: c_int) {
        match which {
            8 => {
                if value < 0 || value as u32 + f.program.shared > SHARED_OPT_IN {
                    return INVALID_VALUE;
                }
                f.max_dynamic.store(value, Ordering::Relaxed);
            }
            14 => f.any_cluster.store(value, Ordering::Relaxed),
            9..=15 => {}
            _ => return INVALID_VALUE,
        }
        broken()
    }
}

// Launches.

/// `CUlaunchConfig` and its attributes.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: usize,
    attributes: *const LaunchAttribute,
    count: c_uint,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct LaunchAttribute {
    id: c_int,
    _pad: [u8; 4],
    value: [u32; 16],
}

struct Request {
    function: &'static KernelHandle,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    shared: u32,
    cooperative: bool,
    stream: usize,
}

impl Request {
    fn check(&self) -> Result<(), (i32, String)> {
        let f = self.function;
        let threads: u64 = self.block.iter().map(|&n| n as u64).product();
        let most = f
            .program
            .max_threads
            .unwrap_or(MAX_THREADS)
            .min(MAX_THREADS) as u64;
        let invalid = |text: String| Err((INVALID_VALUE, text));
        if threads == 0 || threads > most || self.block[2] > 64 {
            return invalid(format!(
                "a block of {:?} threads; at most {most}",
                self.block
            ));
        }
        if self.grid.contains(&0) || self.grid[1] > 65535 || self.grid[2] > 65535 {
            return invalid(format!("a grid of {:?} blocks", self.grid));
        }
        let opted = f.max_dynamic.load(Ordering::Relaxed) as u32;
        let limit = opted.max(SHARED - f.program.shared);
        if self.shared > limit {
            return invalid(format!(
                "{} bytes of dynamic shared memory of {limit}",
                self.shared
            ));
        }
        let size: u32 = self.cluster.iter().product();
        let most = if f.any_cluster.load(Ordering::Relaxed) != 0 {
            16
        } else {
            8
        };
        let fits =
            (0..3).all(|i| self.cluster[i] > 0 && self.grid[i].is_multiple_of(self.cluster[i]));
        if size > most || !fits {
            let text = format!(
                "clusters of {:?} in a grid of {:?}",
                self.cluster, self.grid
            );
            return Err((INVALID_CLUSTER_SIZE, text));
        }
        if size > 1 && device::compute_capability().0 < 9 {
            return Err((
                NOT_SUPPORTED,
                "clusters need compute capability 9.0".to_string(),
            ));
        }
        Ok(())
    }
}

unsafe fn gather(
    program: &Program,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; program.param_size];
    unsafe {
        if !params.is_null() {
            for (n, &(offset, size)) in program.params.iter().enumerate() {
                let from = *params.add(n) as *const u8;
                std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(offset), size);
            }
        } else if !extra.is_null() {
            // Pairs of a tag (1: buffer, 2: its size) and a value, ended by 0.
            let mut at = extra;
            let (mut buffer, mut size) = (std::ptr::null::<u8>(), 0);
            while !(*at).is_null() {
                match *at as usize {
                    1 => buffer = *at.add(1) as *const u8,
                    2 => size = *(*at.add(1) as *const usize),
                    _ => return None,
                }
                at = at.add(2);
            }
            std::ptr::copy_nonoverlapping(buffer, bytes.as_mut_ptr(), size.min(bytes.len()));
        } else if !program.params.is_empty() {
            return None;
        }
    }
    Some(bytes)
}

unsafe fn start(r: Request, params: *mut *mut c_void, extra: *mut *mut c_void) -> c_int {
    if broken() != SUCCESS {
        return broken();
    }
    let program = r.function.program.clone();
    if let Err((e, text)) = r.check() {
        device::report(&format!("{}: {text}", program.name));
        return e;
    }
    let Some(bytes) = (unsafe { gather(&program, params, extra) }) else {
        return INVALID_VALUE;
    };
    let stream = r.stream;
    let (grid, block, cluster) = (r.grid, r.block, r.cluster);
    let (shared, cooperative) = (r.shared, r.cooperative);
    stream::submit(stream, move || {
        // The parameters must lie as they would in constant memory, aligned.
        let mut aligned = vec![0u128; bytes.len().div_ceil(16) + 1];
        let aligned = unsafe {
            let to = aligned.as_mut_ptr() as *mut u8;
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            std::slice::from_raw_parts(to, bytes.len())
        };
        let workspace = if cooperative {
            match memory::allocate(8, Kind::Module) {
                Ok(address) => address,
                Err(e) => return e,
            }
        } else {
            0
        };
        if workspace != 0 {
            unsafe { (workspace as *mut u64).write(0) };
        }
        let ranges = memory::ranges();
        let launch = ptx::Launch {
            program: &program,
            grid,
            block,
            cluster,
            dynamic_shared: shared,
            cooperative,
            workspace,
            params: aligned,
            ranges: &ranges,
        };
        let before = ptx::run::STEPS.load(Ordering::Relaxed);
        let begin = std::time::Instant::now();
        let result = ptx::launch(&launch);
        if workspace != 0 {
            memory::free(workspace, |k| k == Kind::Module);
        }
        if device::traced() {
            let steps = ptx::run::STEPS.load(Ordering::Relaxed) - before;
            let seconds = begin.elapsed().as_secs_f64();
            device::report(&format!(
                "{} grid {grid:?} block {block:?}: {steps} instructions in {:.3} ms, {:.0} M/s",
                program.name,
                seconds * 1e3,
                steps as f64 / seconds / 1e6
            ));
        }
        match result {
            Ok(()) => SUCCESS,
            Err(failure) => {
                device::report(&failure.text);
                match failure.kind {
                    FailureKind::IllegalAddress => ILLEGAL_ADDRESS,
                    FailureKind::Misaligned => MISALIGNED_ADDRESS,
                    FailureKind::Assert => ASSERT,
                    FailureKind::IllegalInstruction => ILLEGAL_INSTRUCTION,
                    FailureKind::LaunchFailed => LAUNCH_FAILED,
                }
            }
        }
    })
}

fn own_cluster(f: &'static KernelHandle) -> [u32; 3] {
    f.program.cluster.unwrap_or([1; 3])
}

export! {
    fn cuLaunchKernel(
        f: &'static KernelHandle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint,
        bz: c_uint, shared: c_uint, stream: usize, params: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        let (grid, block, cluster) = ([gx, gy, gz], [bx, by, bz], own_cluster(f));
        let r = Request { function: f, grid, block, cluster, shared, cooperative: false, stream };
        start(r, params, extra)
    }

    fn cuLaunchCooperativeKernel(
        f: &'static KernelHandle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint,
        bz: c_uint, shared: c_uint, stream: usize, params: *mut *mut c_void
    ) {
        let (grid, block, cluster) = ([gx, gy, gz], [bx, by, bz], own_cluster(f));
        let r = Request { function: f, grid, block, cluster, shared, cooperative: true, stream };
        start(r, params, std::ptr::null_mut())
    }

    fn cuLaunchKernelEx(
        config: *const LaunchConfig, f: &'static KernelHandle, params: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        let c = &*config;
        let (mut cluster, mut cooperative) = (own_cluster(f), false);
        for n in 0..c.count as usize {
            let a = *c.attributes.add(n);
            match a.id {
                2 => cooperative = a.value[0] != 0,
                4 => cluster = [a.value[0], a.value[1], a.value[2]],
                _ => {}
            }
        }
        let r = Request {
            function: f,
            grid: c.grid,
            block: c.block,
            cluster,
            shared: c.shared,
            cooperative,
            stream: c.stream,
        };
        start(r, params, extra)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, f: &'static KernelHandle, size: c_int, shared: usize
    ) {
        give(blocks, occupancy(f, size, shared))
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, f: &'static KernelHandle, size: c_int, shared: usize, _flags: c_uint
    ) {
        give(blocks, occupancy(f, size, shared))
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(
        size: *mut usize, f: &'static KernelHandle, blocks: c_int, _block: c_int
    ) {
        let share = SHARED_MULTIPROCESSOR / blocks.max(1) as u32;
        let used = f.program.shared + 1024;
        give(size, share.saturating_sub(used).min(SHARED_OPT_IN) as usize)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut c_int, block: *mut c_int, f: &'static KernelHandle,
        size_of: Option<unsafe extern "C" fn(c_int) -> usize>, shared: usize, limit: c_int
    ) {
        let most = f.program.max_threads.unwrap_or(MAX_THREADS) as c_int;
        let mut size = if limit > 0 { most.min(limit) } else { most };
        let need = |n: c_int| size_of.map_or(shared, |g| g(n));
        while size > 32 && occupancy(f, size, need(size)) == 0 {
            size -= 32;
        }
        give(block, size);
        give(grid, occupancy(f, size, need(size)).max(1) * MULTIPROCESSORS)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: *mut c_int, block: *mut c_int, f: &'static KernelHandle,
        size_of: Option<unsafe extern "C" fn(c_int) -> usize>, shared: usize, limit: c_int,
        _flags: c_uint
    ) {
        cuOccupancyMaxPotentialBlockSize(grid, block, f, size_of, shared, limit)
    }

    fn cuOccupancyMaxActiveClusters(
        clusters: *mut c_int, f: &'static KernelHandle, config: *const LaunchConfig
    ) {
        let c = &*config;
        let threads = c.block.iter().product::<u32>() as c_int;
        let attributes = (0..c.count as usize).map(|n| *c.attributes.add(n));
        let size = attributes
            .filter(|a| a.id == 4)
            .map(|a| a.value[..3].iter().product::<u32>())
            .next_back()
            .unwrap_or(1);
        let blocks = occupancy(f, threads, c.shared as usize) * MULTIPROCESSORS;
        give(clusters, blocks / size.max(1) as c_int)
    }

    fn cuOccupancyMaxPotentialClusterSize(
        size: *mut c_int, f: &'static KernelHandle, _config: *const LaunchConfig
    ) {
        give(size, if f.any_cluster.load(Ordering::Relaxed) != 0 { 16 } else { 8 })
    }
}

/// Blocks that fit on a multiprocessor, by threads and shared memory.
fn occupancy(f: &'static KernelHandle, threads: c_int, shared: usize) -> c_int {
    let warps = (threads.max(1) as u32).div_ceil(32);
    let used = f.program.shared as usize + shared + 1024;
    let most = f.program.max_threads.unwrap_or(MAX_THREADS);
    if threads as u32 > most {
        return 0;
    }
    (64 / warps)
        .min(SHARED_MULTIPROCESSOR / used as u32)
        .min(32) as c_int
}
