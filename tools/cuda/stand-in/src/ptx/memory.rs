//! Loads, stores, atomics and asynchronous copies.

use super::float::{self, Float};
use super::ops::Value;
use super::run::{Cpu, FailureKind, Ins, Step};
use half::{bf16, f16};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// State spaces as const parameters of the steps.
pub const GLOBAL: u8 = 0;
pub const SHARED: u8 = 1;
pub const CLUSTER: u8 = 2;
pub const LOCAL: u8 = 3;
/// The parameters of the kernel.
pub const PARAM: u8 = 4;
/// Parameters in the frame of a device function or call.
pub const FRAME: u8 = 5;
pub const GENERIC: u8 = 6;

/// An address in another block's shared memory holds that block's rank plus one here.
pub const RANK_SHIFT: u32 = 24;

/// The host address of `bytes` bytes, or None after recording why there is none.
#[inline(always)]
pub fn locate<const SPACE: u8>(
    t: &mut Cpu,
    cached: u32,
    address: u64,
    bytes: u64,
) -> Option<*mut u8> {
    let within = |base: *mut u8, len: u64| {
        (address.wrapping_add(bytes) <= len && address <= len)
            .then(|| base.wrapping_add(address as usize))
    };
    let place = match SPACE {
        GLOBAL | GENERIC => {
            let (lo, hi) = unsafe { *t.cache.get_unchecked(cached as usize) };
            if address >= lo && address.wrapping_add(bytes) <= hi
                || SPACE == GENERIC && t.find_own(address, bytes)
                || t.find_global(cached, address, bytes)
            {
                Some(address as *mut u8)
            } else {
                None
            }
        }
        SHARED => within(t.shared, t.shared_len),
        CLUSTER => return locate_cluster(t, address, bytes),
        LOCAL => within(t.local, t.local_len),
        PARAM => {
            let base = t.params.as_ptr() as *mut u8;
            within(base, t.params.len() as u64)
        }
        _ => {
            let base = t.local.wrapping_add(t.frame as usize);
            within(base, t.local_len - t.frame as u64)
        }
    };
    match place {
        Some(p) if p as u64 & (bytes - 1) == 0 => Some(p),
        Some(_) => {
            t.fail(
                FailureKind::Misaligned,
                format!("{bytes} bytes at {address:#x}, misaligned"),
            );
            None
        }
        None => miss::<SPACE>(t, address, bytes),
    }
}

#[cold]
fn miss<const SPACE: u8>(t: &mut Cpu, address: u64, bytes: u64) -> Option<*mut u8> {
    let text = match SPACE {
        GLOBAL | GENERIC => t.describe_miss(address, bytes),
        SHARED => format!(
            "{bytes} bytes at {address:#x} of shared memory, of which there are {}",
            t.shared_len
        ),
        _ => format!("{bytes} bytes at {address:#x} of local or parameter memory"),
    };
    t.fail(FailureKind::IllegalAddress, text);
    None
}

fn locate_cluster(t: &mut Cpu, address: u64, bytes: u64) -> Option<*mut u8> {
    let rank = address >> RANK_SHIFT;
    if rank == 0 {
        return locate::<SHARED>(t, 0, address, bytes);
    }
    let offset = address & ((1 << RANK_SHIFT) - 1);
    match t.cluster.get(rank as usize - 1) {
        Some(&(base, len)) if offset + bytes <= len => Some(base.wrapping_add(offset as usize)),
        _ => {
            let text = format!(
                "{bytes} bytes at {offset:#x} in block {} of the cluster",
                rank - 1
            );
            t.fail(FailureKind::IllegalAddress, text);
            None
        }
    }
}

fn load<T: Value, const SPACE: u8>(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let address = t.r(q.a).wrapping_add(q.imm);
    let Some(p) = locate::<SPACE>(t, q.x, address, size_of::<T>() as u64) else {
        return std::ptr::null();
    };
    let v = unsafe { (p as *const T).read() };
    t.set(q.d, v.put());
    unsafe { i.add(1) }
}

/// A load of a signed value into a wider register, of `c` bits.
fn load_signed<T: Value + Into<i64>, const SPACE: u8>(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let address = t.r(q.a).wrapping_add(q.imm);
    let Some(p) = locate::<SPACE>(t, q.x, address, size_of::<T>() as u64) else {
        return std::ptr::null();
    };
    let v: i64 = unsafe { (p as *const T).read() }.into();
    t.set(q.d, v as u64 & (u64::MAX >> (64 - q.c)));
    unsafe { i.add(1) }
}

/// A vector load; the destinations are listed from `extra[d]`, and -1 there is a sink.
fn load_vector<T: Value, const N: usize, const SPACE: u8>(
    t: &mut Cpu,
    i: *const Ins,
) -> *const Ins {
    let q = unsafe { &*i };
    let address = t.r(q.a).wrapping_add(q.imm);
    let Some(p) = locate::<SPACE>(t, q.x, address, (size_of::<T>() * N) as u64) else {
        return std::ptr::null();
    };
    let values = unsafe { (p as *const [T; N]).read() };
    let slots = unsafe { t.program.extra.as_ptr().add(q.d as usize) };
    for (n, v) in values.into_iter().enumerate() {
        let slot = unsafe { *slots.add(n) };
        t.set(slot, v.put());
    }
    unsafe { i.add(1) }
}

fn store<T: Value, const SPACE: u8>(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let address = t.r(q.a).wrapping_add(q.imm);
    let Some(p) = locate::<SPACE>(t, q.x, address, size_of::<T>() as u64) else {
        return std::ptr::null();
    };
    unsafe { (p as *mut T).write(T::get(t.r(q.b))) };
    unsafe { i.add(1) }
}

fn store_vector<T: Value, const N: usize, const SPACE: u8>(
    t: &mut Cpu,
    i: *const Ins,
) -> *const Ins {
    let q = unsafe { &*i };
    let address = t.r(q.a).wrapping_add(q.imm);
    let Some(p) = locate::<SPACE>(t, q.x, address, (size_of::<T>() * N) as u64) else {
        return std::ptr::null();
    };
    let slots = unsafe { t.program.extra.as_ptr().add(q.b as usize) };
    let values: [T; N] = std::array::from_fn(|n| T::get(t.r(unsafe { *slots.add(n) })));
    unsafe { (p as *mut [T; N]).write(values) };
    unsafe { i.add(1) }
}

macro_rules! in_space {
    ($space:expr, $f:ident, $($g:tt),*) => {
        match $space {
            GLOBAL => $f::<$($g),*, GLOBAL> as Step,
            SHARED => $f::<$($g),*, SHARED>,
            CLUSTER => $f::<$($g),*, CLUSTER>,
            LOCAL => $f::<$($g),*, LOCAL>,
            PARAM => $f::<$($g),*, PARAM>,
            FRAME => $f::<$($g),*, FRAME>,
            _ => $f::<$($g),*, GENERIC>,
        }
    };
}

/// A load of `lanes` values of a type into registers of `width` bits.
pub fn load_step(ty: &str, space: u8, lanes: usize, width: u32) -> Option<Step> {
    let bits = super::parse::type_size(ty)? as u32 * 8;
    if lanes == 1 && ty.starts_with('s') && width > bits {
        return Some(match bits {
            8 => in_space!(space, load_signed, i8),
            16 => in_space!(space, load_signed, i16),
            _ => in_space!(space, load_signed, i32),
        });
    }
    Some(match (bits, lanes) {
        (8, 1) => in_space!(space, load, u8),
        (16, 1) => in_space!(space, load, u16),
        (32, 1) => in_space!(space, load, u32),
        (64, 1) => in_space!(space, load, u64),
        (8, 2) => in_space!(space, load_vector, u8, 2),
        (8, 4) => in_space!(space, load_vector, u8, 4),
        (16, 2) => in_space!(space, load_vector, u16, 2),
        (16, 4) => in_space!(space, load_vector, u16, 4),
        (16, 8) => in_space!(space, load_vector, u16, 8),
        (32, 2) => in_space!(space, load_vector, u32, 2),
        (32, 4) => in_space!(space, load_vector, u32, 4),
        (32, 8) => in_space!(space, load_vector, u32, 8),
        (64, 2) => in_space!(space, load_vector, u64, 2),
        (64, 4) => in_space!(space, load_vector, u64, 4),
        _ => return None,
    })
}

pub fn store_step(ty: &str, space: u8, lanes: usize) -> Option<Step> {
    Some(match (super::parse::type_size(ty)? * 8, lanes) {
        (8, 1) => in_space!(space, store, u8),
        (16, 1) => in_space!(space, store, u16),
        (32, 1) => in_space!(space, store, u32),
        (64, 1) => in_space!(space, store, u64),
        (8, 2) => in_space!(space, store_vector, u8, 2),
        (8, 4) => in_space!(space, store_vector, u8, 4),
        (16, 2) => in_space!(space, store_vector, u16, 2),
        (16, 4) => in_space!(space, store_vector, u16, 4),
        (16, 8) => in_space!(space, store_vector, u16, 8),
        (32, 2) => in_space!(space, store_vector, u32, 2),
        (32, 4) => in_space!(space, store_vector, u32, 4),
        (32, 8) => in_space!(space, store_vector, u32, 8),
        (64, 2) => in_space!(space, store_vector, u64, 2),
        (64, 4) => in_space!(space, store_vector, u64, 4),
        _ => return None,
    })
}

/// (old value, first operand, second operand) to the new value.
pub type Combine = fn(u64, u64, u64) -> u64;

/// What an atomic instruction does; `Ins::x` is its number.
pub struct Atomic {
    pub combine: Combine,
    pub bytes: u32,
    pub cached: u32,
    /// Slots of results and operands, one of each per lane of a vector.
    pub results: Vec<i32>,
    pub operands: Vec<i32>,
}

pub fn combine(op: &str, ty: &str) -> Option<Combine> {
    macro_rules! with {
        ($t:ty, |$x:ident, $y:ident| $e:expr) => {
            |old, b, _| {
                let ($x, $y) = (<$t as Value>::get(old), <$t as Value>::get(b));
                let r: $t = $e;
                r.put()
            }
        };
    }
    macro_rules! halves {
        ($t:ty, $f:expr) => {
            |old, b, _| {
                let f: fn($t, $t) -> $t = $f;
                let part = |n: u32| {
                    let v = |w: u64| <$t as Value>::get(w >> n & 0xFFFF);
                    f(v(old), v(b)).put() << n
                };
                part(0) | part(16)
            }
        };
    }
    Some(match (op, ty) {
        ("exch", _) => |_, b, _| b,
        ("cas", _) => |old, b, c| if old == b { c } else { old },
        ("and", _) => |old, b, _| old & b,
        ("or", _) => |old, b, _| old | b,
        ("xor", _) => |old, b, _| old ^ b,
        ("add", "u32" | "s32") => with!(u32, |x, y| x.wrapping_add(y)),
        ("add", "u64" | "s64") => with!(u64, |x, y| x.wrapping_add(y)),
        ("add", "f32") => with!(f32, |x, y| x + y),
        ("add", "f64") => with!(f64, |x, y| x + y),
        ("add", "f16") => with!(f16, |x, y| f16::narrow(x.wide() + y.wide())),
        ("add", "bf16") => with!(bf16, |x, y| bf16::narrow(x.wide() + y.wide())),
        ("add", "f16x2") => halves!(f16, |x, y| f16::narrow(x.wide() + y.wide())),
        ("add", "bf16x2") => halves!(bf16, |x, y| bf16::narrow(x.wide() + y.wide())),
        ("min", "u32") => with!(u32, |x, y| x.min(y)),
        ("min", "s32") => with!(i32, |x, y| x.min(y)),
        ("min", "u64") => with!(u64, |x, y| x.min(y)),
        ("min", "s64") => with!(i64, |x, y| x.min(y)),
        ("max", "u32") => with!(u32, |x, y| x.max(y)),
        ("max", "s32") => with!(i32, |x, y| x.max(y)),
        ("max", "u64") => with!(u64, |x, y| x.max(y)),
        ("max", "s64") => with!(i64, |x, y| x.max(y)),
        ("min", "f16") => with!(f16, |x, y| float::min(x, y, false)),
        ("max", "f16") => with!(f16, |x, y| float::max(x, y, false)),
        ("min", "bf16") => with!(bf16, |x, y| float::min(x, y, false)),
        ("max", "bf16") => with!(bf16, |x, y| float::max(x, y, false)),
        ("inc", "u32") => with!(u32, |x, y| if x >= y { 0 } else { x + 1 }),
        ("dec", "u32") => with!(u32, |x, y| if x == 0 || x > y { y } else { x - 1 }),
        _ => return None,
    })
}

fn atomic<const SPACE: u8>(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let op = &t.program.atomics[q.x as usize];
    let address = t.r(q.a).wrapping_add(q.imm);
    let all = op.bytes as u64 * op.operands.len() as u64;
    let Some(p) = locate::<SPACE>(t, op.cached, address, all) else {
        return std::ptr::null();
    };
    let c = t.r(q.c);
    for (n, &slot) in op.operands.iter().enumerate() {
        let b = t.r(slot);
        let p = p.wrapping_add(n * op.bytes as usize);
        let f = op.combine;
        // Blocks run in parallel, so that these must be atomic on the host too.
        macro_rules! update {
            ($a:ty, $u:ty) => {
                unsafe { <$a>::from_ptr(p as *mut $u) }
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |v| {
                        Some(f(v as u64, b, c) as $u)
                    })
                    .unwrap_or_default() as u64
            };
        }
        let old = match op.bytes {
            1 => update!(AtomicU8, u8),
            2 => update!(AtomicU16, u16),
            4 => update!(AtomicU32, u32),
            _ => update!(AtomicU64, u64),
        };
        if let Some(&d) = op.results.get(n) {
            t.set(d, old);
        }
    }
    unsafe { i.add(1) }
}

pub fn atomic_step(space: u8) -> Step {
    match space {
        GLOBAL => atomic::<GLOBAL>,
        SHARED => atomic::<SHARED>,
        CLUSTER => atomic::<CLUSTER>,
        LOCAL => atomic::<LOCAL>,
        _ => atomic::<GENERIC>,
    }
}

/// `cp.async`: to shared address slot `d` plus the low half of `imm`, from global address
/// slot `a` plus the high half; `c` bytes, of which those past the value of slot `b` are
/// zeros. It is done at once, so that waiting for it is nothing to do.
pub fn copy_async(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let bytes = q.c as u64;
    let size = t.r(q.b).min(bytes) as usize;
    let to = t.r(q.d).wrapping_add(q.imm as u32 as i32 as u64);
    let from = t.r(q.a).wrapping_add((q.imm >> 32) as i32 as u64);
    let Some(to) = locate::<SHARED>(t, q.x, to, bytes) else {
        return std::ptr::null();
    };
    unsafe { std::ptr::write_bytes(to, 0, bytes as usize) };
    if size > 0 {
        if !from.is_multiple_of(bytes) {
            return t.fail(
                FailureKind::Misaligned,
                format!("{bytes} bytes at {from:#x}"),
            );
        }
        // A part that is not a power of two has no alignment of its own.
        let lo = from & !(bytes - 1);
        let whole = (size as u64).is_power_of_two();
        let found = if whole {
            locate::<GLOBAL>(t, q.x, from, size as u64)
        } else {
            let last = from + size as u64 - 1;
            locate::<GLOBAL>(t, q.x, last, 1).and_then(|_| locate::<GLOBAL>(t, q.x, lo, 1))
        };
        if found.is_none() {
            return std::ptr::null();
        }
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, size) };
    }
    unsafe { i.add(1) }
}
