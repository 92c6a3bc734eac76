//! NCCL between the devices of one process: sums and broadcasts.
//!
//! Work is done when all ranks have submitted it, by the last one; the others wait for it.

use crate::device::report;
use crate::driver::export;
use crate::{device, driver, memory, stream};
use half::bf16;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

const SUCCESS: c_int = 0;
const UNHANDLED_CUDA_ERROR: c_int = 1;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;

/// What the ranks do in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Sum,
    Broadcast(c_int),
}

/// A rank's part of it.
#[derive(Clone, Copy)]
struct Part {
    what: What,
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
}

#[derive(Default)]
struct Step {
    parts: BTreeMap<usize, Part>,
    result: Option<c_int>,
    /// Ranks that have taken the result.
    left: usize,
}

#[derive(Default)]
struct State {
    steps: BTreeMap<u64, Step>,
    aborted: bool,
}

struct Clique {
    devices: Vec<c_int>,
    state: Mutex<State>,
    changed: Condvar,
}

pub struct Communicator {
    clique: Arc<Clique>,
    rank: usize,
    next: Mutex<u64>,
}

thread_local! {
    /// How deep groups are nested, and what was submitted in them.
    static GROUP: RefCell<(usize, Vec<(Arc<Clique>, u64)>)> = const { RefCell::new((0, Vec::new())) };
}

fn bytes(dtype: c_int) -> Option<usize> {
    Some(match dtype {
        0 | 1 => 1,
        6 | 9 => 2,
        2 | 3 | 7 => 4,
        4 | 5 | 8 => 8,
        _ => return None,
    })
}

unsafe fn sums<T: Copy>(parts: &[Part], add: impl Fn(T, T) -> T) {
    let count = parts[0].count;
    let sum = |i: usize| {
        let at = |p: &Part| unsafe { *(p.from as *const T).add(i) };
        parts[1..].iter().fold(at(&parts[0]), |s, p| add(s, at(p)))
    };
    // Results may lie where operands do.
    let sums: Vec<T> = (0..count).map(sum).collect();
    for p in parts {
        unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), p.to as *mut T, count) };
    }
}

impl Clique {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Does what all ranks have submitted.
    fn work(&self, parts: &[Part]) -> c_int {
        let first = parts[0];
        let alike = |p: &Part| (p.what, p.count, p.dtype) == (first.what, first.count, first.dtype);
        if !parts.iter().all(alike) {
            report("nccl: ranks submitted other work, numbers of values or types");
            return INVALID_USAGE;
        }
        let Some(size) = bytes(first.dtype) else {
            return INVALID_ARGUMENT;
        };
        let length = (first.count * size) as u64;
        for (p, &device) in parts.iter().zip(&self.devices) {
            for address in [p.from, p.to] {
                let there = memory::find(address)
                    .is_some_and(|(start, size, _)| address + length <= start + size);
                if length > 0 && !(there && memory::device_of(address) == Some(device)) {
                    report(&format!(
                        "nccl: {length} bytes at {address:#x} are not memory of device {device}"
                    ));
                    device::note(device::ILLEGAL_ADDRESS);
                    return UNHANDLED_CUDA_ERROR;
                }
            }
        }
        unsafe {
            match (first.what, first.dtype) {
                (What::Sum, 7) => sums::<f32>(parts, |a, b| a + b),
                (What::Sum, 8) => sums::<f64>(parts, |a, b| a + b),
                (What::Sum, 9) => {
                    sums::<bf16>(parts, |a, b| bf16::from_f32(a.to_f32() + b.to_f32()))
                }
                (What::Sum, _) => return INVALID_ARGUMENT,
                (What::Broadcast(root), _) => {
                    let Some(from) = parts.get(root as usize).map(|p| p.from) else {
                        return INVALID_ARGUMENT;
                    };
                    for p in parts {
                        std::ptr::copy(from as *const u8, p.to as *mut u8, length as usize);
                    }
                }
            }
        }
        SUCCESS
    }

    fn wait(&self, step: u64) -> c_int {
        let mut state = self.lock();
        loop {
            if state.aborted {
                return REMOTE_ERROR;
            }
            let ranks = self.devices.len();
            if let Some(s) = state.steps.get_mut(&step)
                && let Some(result) = s.result
            {
                s.left += 1;
                if s.left == ranks {
                    state.steps.remove(&step);
                }
                return result;
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }
}

unsafe fn submit(communicator: *const Communicator, on: usize, part: Part) -> c_int {
    if communicator.is_null() {
        return INVALID_ARGUMENT;
    }
    let c = unsafe { &*communicator };
    if stream::capture_of(on).is_some() {
        report("nccl while a stream captures is not supported");
        return INVALID_USAGE;
    }
    if device::broken() != device::SUCCESS {
        return UNHANDLED_CUDA_ERROR;
    }
    // In a group the device of the thread may be another one.
    let grouped = GROUP.with_borrow(|g| g.0 > 0);
    if !grouped && driver::current_device() != Some(c.clique.devices[c.rank]) {
        report("nccl: the device of the communicator is not current");
        return INVALID_USAGE;
    }
    let step = {
        let mut next = c.next.lock().unwrap_or_else(|e| e.into_inner());
        *next += 1;
        *next
    };
    {
        let mut state = c.clique.lock();
        let s = state.steps.entry(step).or_default();
        s.parts.insert(c.rank, part);
        if s.parts.len() == c.clique.devices.len() {
            let parts: Vec<Part> = s.parts.values().copied().collect();
            s.result = Some(c.clique.work(&parts));
            c.clique.changed.notify_all();
        }
    }
    if grouped {
        GROUP.with_borrow_mut(|g| g.1.push((c.clique.clone(), step)));
        return SUCCESS;
    }
    c.clique.wait(step)
}

export! {
    fn ncclGetVersion(version: *mut c_int) {
        version.write(22809);
        SUCCESS
    }

    fn ncclCommInitAll(to: *mut *mut Communicator, count: c_int, devices: *const c_int) {
        let Ok(n) = usize::try_from(count) else { return INVALID_ARGUMENT };
        let devices: Vec<c_int> = match devices.is_null() {
            true => (0..count).collect(),
            false => std::slice::from_raw_parts(devices, n).to_vec(),
        };
        let mut seen = devices.clone();
        seen.sort_unstable();
        seen.dedup();
        if n == 0 || seen.len() < n || !devices.iter().all(|d| (0..device::count()).contains(d)) {
            return INVALID_ARGUMENT;
        }
        let clique = Arc::new(Clique {
            devices,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for rank in 0..n {
            let c = Communicator { clique: clique.clone(), rank, next: Mutex::new(0) };
            to.add(rank).write(Box::into_raw(Box::new(c)));
        }
        SUCCESS
    }

    fn ncclCommDestroy(c: *mut Communicator) {
        if c.is_null() {
            return INVALID_ARGUMENT;
        }
        drop(Box::from_raw(c));
        SUCCESS
    }

    fn ncclCommAbort(c: *mut Communicator) {
        if c.is_null() {
            return INVALID_ARGUMENT;
        }
        // Not freed: the thread that it rescues still uses it.
        let clique = &(&*c).clique;
        clique.lock().aborted = true;
        clique.changed.notify_all();
        SUCCESS
    }

    fn ncclGroupStart() {
        GROUP.with_borrow_mut(|g| g.0 += 1);
        SUCCESS
    }

    fn ncclGroupEnd() {
        let submitted = GROUP.with_borrow_mut(|g| {
            g.0 = g.0.saturating_sub(1);
            if g.0 > 0 { Vec::new() } else { std::mem::take(&mut g.1) }
        });
        let results = submitted.iter().map(|(clique, step)| clique.wait(*step));
        results.max().unwrap_or(SUCCESS)
    }

    fn ncclAllReduce(
        from: u64, to: u64, count: usize, dtype: c_int, op: c_int, c: *const Communicator, on: usize
    ) {
        if op != 0 {
            report("ncclAllReduce: only sums are supported");
            return INVALID_ARGUMENT;
        }
        submit(c, on, Part { what: What::Sum, from, to, count, dtype })
    }

    fn ncclBroadcast(
        from: u64, to: u64, count: usize, dtype: c_int, root: c_int, c: *const Communicator, on: usize
    ) {
        submit(c, on, Part { what: What::Broadcast(root), from, to, count, dtype })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(error: c_int) -> *const c_char {
    let text: &CStr = match error {
        SUCCESS => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        _ => c"unknown error",
    };
    text.as_ptr()
}
