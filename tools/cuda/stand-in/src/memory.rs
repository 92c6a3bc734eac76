//! Device memory: plain host memory, with an account of what is allocated.

use crate::device::{self, INVALID_VALUE, OUT_OF_MEMORY};
use crate::driver::current_device;
use crate::ptx::run::Range;
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From `cuMemAlloc`.
    Plain,
    /// From the pool of this handle.
    Pool(usize),
    /// Page-locked host memory, which the device sees at the same address.
    Host,
    /// The caller's own host memory, registered.
    Registered,
    /// A module's variables.
    Module,
}

struct Allocation {
    size: u64,
    kind: Kind,
    /// The device that has it; none for memory that every device sees.
    device: Option<i32>,
    layout: Option<Layout>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Pool {
    pub used: u64,
    pub used_high: u64,
    pub reserved: u64,
    pub reserved_high: u64,
    pub threshold: u64,
}

#[derive(Default)]
struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    /// What each device sees, sorted, for kernels to look up while others allocate.
    ranges: BTreeMap<i32, Arc<Vec<Range>>>,
    plain: u64,
    pools: BTreeMap<usize, Pool>,
}

static MEMORY: Mutex<Option<Memory>> = Mutex::new(None);
const ALIGN: usize = 512;
pub const DEFAULT_POOL: usize = 0x5001;

struct Guard(MutexGuard<'static, Option<Memory>>);

impl Guard {
    fn get(&mut self) -> &mut Memory {
        self.0.get_or_insert_with(|| {
            let pools = BTreeMap::from([(DEFAULT_POOL, Pool::default())]);
            let ranges = (0..device::count()).map(|d| (d, Arc::default()));
            Memory {
                pools,
                ranges: ranges.collect(),
                ..Memory::default()
            }
        })
    }
}

fn lock() -> Guard {
    Guard(MEMORY.lock().unwrap_or_else(|e| e.into_inner()))
}

/// What an allocation takes of the device's memory.
fn rounded(size: u64) -> u64 {
    size.next_multiple_of(ALIGN as u64)
}

impl Memory {
    fn in_use(&self) -> u64 {
        self.plain + self.pools.values().map(|p| p.used).sum::<u64>()
    }

    fn taken(&self) -> u64 {
        self.plain + self.pools.values().map(|p| p.reserved).sum::<u64>()
    }

    fn insert(&mut self, start: u64, allocation: Allocation) {
        let range = (start, start + allocation.size);
        for ranges in self.seen_by(allocation.device) {
            let at = ranges.partition_point(|r| r.0 < start);
            ranges.insert(at, range);
        }
        self.allocations.insert(start, allocation);
    }

    fn remove(&mut self, start: u64) -> Option<Allocation> {
        let allocation = self.allocations.remove(&start)?;
        for ranges in self.seen_by(allocation.device) {
            let at = ranges.partition_point(|r| r.0 < start);
            ranges.remove(at);
        }
        Some(allocation)
    }

    /// The ranges of one device, or of all.
    fn seen_by(&mut self, device: Option<i32>) -> impl Iterator<Item = &mut Vec<Range>> {
        let seen = self.ranges.iter_mut();
        let seen = seen.filter(move |(d, _)| device.is_none_or(|device| device == **d));
        seen.map(|(_, ranges)| Arc::make_mut(ranges))
    }

    /// Gives back what pools hold beyond their use and the given limit for each.
    fn trim(&mut self, keep: impl Fn(&Pool) -> u64) {
        for p in self.pools.values_mut() {
            p.reserved = p.used.max(p.reserved.min(keep(p)));
        }
    }
}

/// Allocates, with every byte 0xFF: floats read before they are written are NaN.
pub fn allocate(size: usize, kind: Kind) -> Result<u64, i32> {
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    let mut guard = lock();
    let m = guard.get();
    let counted = rounded(size as u64);
    let limited = matches!(kind, Kind::Plain | Kind::Pool(_));
    if limited {
        if m.in_use() + counted > device::total_memory() {
            return Err(OUT_OF_MEMORY);
        }
        match kind {
            Kind::Pool(pool) => {
                let p = m.pools.get_mut(&pool).ok_or(INVALID_VALUE)?;
                p.used += counted;
                p.used_high = p.used_high.max(p.used);
                p.reserved = p.reserved.max(p.used);
                p.reserved_high = p.reserved_high.max(p.reserved);
            }
            _ => m.plain += counted,
        }
        if m.taken() > device::total_memory() {
            m.trim(|_| 0);
        }
    }
    let layout = Layout::from_size_align(size, ALIGN).map_err(|_| OUT_OF_MEMORY)?;
    let start = unsafe { std::alloc::alloc(layout) };
    if start.is_null() {
        return Err(OUT_OF_MEMORY);
    }
    unsafe { std::ptr::write_bytes(start, 0xFF, size) };
    let allocation = Allocation {
        size: size as u64,
        kind,
        device: match kind {
            Kind::Host => None,
            _ => Some(current_device().unwrap_or(0)),
        },
        layout: Some(layout),
    };
    m.insert(start as u64, allocation);
    Ok(start as u64)
}

pub fn register(start: u64, size: usize) {
    let allocation = Allocation {
        size: size as u64,
        kind: Kind::Registered,
        device: None,
        layout: None,
    };
    lock().get().insert(start, allocation);
}

/// Frees an allocation, which must be one of the kinds that `of` takes.
pub fn free(start: u64, of: impl Fn(Kind) -> bool) -> i32 {
    let mut guard = lock();
    let m = guard.get();
    match m.allocations.get(&start) {
        Some(a) if of(a.kind) => {}
        _ => {
            device::report(&format!("free of {start:#x}, which is no such allocation"));
            return INVALID_VALUE;
        }
    }
    let Some(a) = m.remove(start) else {
        return INVALID_VALUE;
    };
    match a.kind {
        Kind::Plain => m.plain -= rounded(a.size),
        Kind::Pool(pool) => {
            if let Some(p) = m.pools.get_mut(&pool) {
                p.used -= rounded(a.size);
            }
        }
        _ => {}
    }
    if let Some(layout) = a.layout {
        unsafe { std::alloc::dealloc(start as *mut u8, layout) };
    }
    device::SUCCESS
}

pub fn is_device(kind: Kind) -> bool {
    matches!(kind, Kind::Plain | Kind::Pool(_))
}

/// At a synchronisation pools give back what exceeds their release threshold.
pub fn synchronised() {
    lock().get().trim(|p| p.threshold);
}

/// Free and total bytes.
pub fn info() -> (u64, u64) {
    let total = device::total_memory();
    (total - lock().get().taken().min(total), total)
}

/// What the device of this thread's context sees.
pub fn ranges() -> Arc<Vec<Range>> {
    let device = current_device().unwrap_or(0);
    lock()
        .get()
        .ranges
        .get(&device)
        .cloned()
        .unwrap_or_default()
}

/// The device that has the memory of this address.
pub fn device_of(address: u64) -> Option<i32> {
    let mut guard = lock();
    let (_, a) = guard.get().allocations.range(..=address).next_back()?;
    a.device
}

/// The allocation that holds an address.
pub fn find(address: u64) -> Option<(u64, u64, Kind)> {
    let mut guard = lock();
    let (&start, a) = guard.get().allocations.range(..=address).next_back()?;
    (address < start + a.size).then_some((start, a.size, a.kind))
}

/// Whether a library call may touch these bytes; if not it is told on standard error.
pub fn check(what: &str, address: u64, bytes: u64) -> bool {
    if bytes == 0 {
        return true;
    }
    // Threads that help with the work of a call have no context.
    if let (Some(here), Some(there)) = (current_device(), device_of(address))
        && here != there
    {
        device::report(&format!(
            "{what}: {address:#x} is memory of device {there}, and device {here} works"
        ));
        return false;
    }
    match find(address) {
        Some((start, size, _)) if address + bytes <= start + size => true,
        Some((start, size, _)) => {
            device::report(&format!(
                "{what}: {bytes} bytes at {} of an allocation of {size}",
                address - start
            ));
            false
        }
        None => {
            device::report(&format!(
                "{what}: {bytes} bytes at {address:#x}, not allocated"
            ));
            false
        }
    }
}

pub fn pool(handle: usize) -> Option<Pool> {
    lock().get().pools.get(&handle).copied()
}

pub fn change_pool(handle: usize, change: impl FnOnce(&mut Pool)) -> bool {
    lock().get().pools.get_mut(&handle).map(change).is_some()
}

pub fn create_pool() -> usize {
    let mut guard = lock();
    let pools = &mut guard.get().pools;
    let handle = pools.keys().last().copied().unwrap_or(DEFAULT_POOL) + 1;
    pools.insert(handle, Pool::default());
    handle
}

pub fn destroy_pool(handle: usize) -> bool {
    handle != DEFAULT_POOL && lock().get().pools.remove(&handle).is_some()
}
