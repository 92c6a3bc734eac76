//! The instructions that only compute: from registers to a register.

use super::float::{self, Bits16, Float, Mode};
use super::run::{Cpu, Ins, Step};
use half::{bf16, f16};

/// A value as it lies in a 64-bit slot, unused bits zero.
pub trait Value: Copy {
    fn get(bits: u64) -> Self;
    fn put(self) -> u64;
}

macro_rules! values {
    ($($t:ty as $u:ty),*) => {$(
        impl Value for $t {
            #[inline(always)]
            fn get(bits: u64) -> $t { bits as $t }
            #[inline(always)]
            fn put(self) -> u64 { self as $u as u64 }
        }
    )*};
}
values!(
    u8 as u8, u16 as u16, u32 as u32, u64 as u64, i8 as u8, i16 as u16, i32 as u32, i64 as u64
);

macro_rules! float_values {
    ($($t:ty as $u:ty),*) => {$(
        impl Value for $t {
            #[inline(always)]
            fn get(bits: u64) -> $t { <$t>::from_bits(bits as $u) }
            #[inline(always)]
            fn put(self) -> u64 { self.to_bits() as u64 }
        }
    )*};
}
float_values!(f32 as u32, f64 as u64, f16 as u16, bf16 as u16);

impl Value for bool {
    #[inline(always)]
    fn get(bits: u64) -> bool {
        bits != 0
    }
    #[inline(always)]
    fn put(self) -> u64 {
        self as u64
    }
}

/// Two 16-bit floats in one 32-bit register, the first in the low half.
#[derive(Clone, Copy)]
struct Two<T>(T, T);

impl<T: Value> Value for Two<T> {
    #[inline(always)]
    fn get(bits: u64) -> Self {
        Two(T::get(bits & 0xFFFF), T::get(bits >> 16 & 0xFFFF))
    }
    #[inline(always)]
    fn put(self) -> u64 {
        self.0.put() | self.1.put() << 16
    }
}

impl<T: Copy> Two<T> {
    fn map2<R>(self, o: Self, f: impl Fn(T, T) -> R) -> Two<R> {
        Two(f(self.0, o.0), f(self.1, o.1))
    }
}

macro_rules! one {
    ($a:ty => $r:ty, |$x:ident| $e:expr) => {
        Some(
            (|t: &mut Cpu, i: *const Ins| {
                let q = unsafe { &*i };
                let $x = <$a as Value>::get(t.r(q.a));
                let r: $r = $e;
                t.set(q.d, r.put());
                unsafe { i.add(1) }
            }) as Step,
        )
    };
}

macro_rules! two {
    ($a:ty, $b:ty => $r:ty, |$x:ident, $y:ident| $e:expr) => {
        Some((|t: &mut Cpu, i: *const Ins| {
            let q = unsafe { &*i };
            let $x = <$a as Value>::get(t.r(q.a));
            let $y = <$b as Value>::get(t.r(q.b));
            let r: $r = $e;
            t.set(q.d, r.put());
            unsafe { i.add(1) }
        }) as Step)
    };
    ($a:ty, |$x:ident, $y:ident| $e:expr) => {
        two!($a, $a => $a, |$x, $y| $e)
    };
}

macro_rules! three {
    ($a:ty, $b:ty, $c:ty => $r:ty, |$x:ident, $y:ident, $z:ident| $e:expr) => {
        Some((|t: &mut Cpu, i: *const Ins| {
            let q = unsafe { &*i };
            let $x = <$a as Value>::get(t.r(q.a));
            let $y = <$b as Value>::get(t.r(q.b));
            let $z = <$c as Value>::get(t.r(q.c));
            let r: $r = $e;
            t.set(q.d, r.put());
            unsafe { i.add(1) }
        }) as Step)
    };
    ($a:ty, |$x:ident, $y:ident, $z:ident| $e:expr) => {
        three!($a, $a, $a => $a, |$x, $y, $z| $e)
    };
}

/// As `three`, with the instruction's immediate as a fourth operand.
macro_rules! three_imm {
    ($a:ty, |$x:ident, $y:ident, $z:ident, $w:ident| $e:expr) => {
        Some(
            (|t: &mut Cpu, i: *const Ins| {
                let q = unsafe { &*i };
                let $x = <$a as Value>::get(t.r(q.a));
                let $y = <$a as Value>::get(t.r(q.b));
                let $z = <$a as Value>::get(t.r(q.c));
                let $w = q.imm;
                let r: $a = $e;
                t.set(q.d, r.put());
                unsafe { i.add(1) }
            }) as Step,
        )
    };
}

/// An operation with carry in and out: gives (result, carry).
macro_rules! carry {
    ($t:ty, $sets:expr, |$c:ident, $x:ident, $y:ident, $z:ident| $e:expr) => {
        if $sets {
            Some(
                (|t: &mut Cpu, i: *const Ins| {
                    let q = unsafe { &*i };
                    let ($x, $y) = (<$t>::get(t.r(q.a)), <$t>::get(t.r(q.b)));
                    let ($z, $c) = (<$t>::get(t.r(q.c)), t.carry);
                    let (r, c): ($t, bool) = $e;
                    t.carry = c;
                    t.set(q.d, r.put());
                    unsafe { i.add(1) }
                }) as Step,
            )
        } else {
            Some(
                (|t: &mut Cpu, i: *const Ins| {
                    let q = unsafe { &*i };
                    let ($x, $y) = (<$t>::get(t.r(q.a)), <$t>::get(t.r(q.b)));
                    let ($z, $c) = (<$t>::get(t.r(q.c)), t.carry);
                    let (r, _): ($t, bool) = $e;
                    t.set(q.d, r.put());
                    unsafe { i.add(1) }
                }) as Step,
            )
        }
    };
}

macro_rules! ints {
    ($ty:expr; $t:ident => $e:expr) => {
        match $ty {
            "u8" | "b8" => {
                type $t = u8;
                $e
            }
            "s8" => {
                type $t = i8;
                $e
            }
            "u16" | "b16" => {
                type $t = u16;
                $e
            }
            "s16" => {
                type $t = i16;
                $e
            }
            "u32" | "b32" => {
                type $t = u32;
                $e
            }
            "s32" => {
                type $t = i32;
                $e
            }
            "u64" | "b64" => {
                type $t = u64;
                $e
            }
            "s64" => {
                type $t = i64;
                $e
            }
            _ => None,
        }
    };
}

/// For operations that are the same on all types of a width.
macro_rules! widths {
    ($ty:expr; $t:ident => $e:expr) => {
        match $ty {
            "pred" => {
                type $t = bool;
                $e
            }
            "u16" | "b16" | "s16" | "f16" | "bf16" => {
                type $t = u16;
                $e
            }
            "u32" | "b32" | "s32" | "f32" | "f16x2" | "bf16x2" => {
                type $t = u32;
                $e
            }
            "u64" | "b64" | "s64" | "f64" => {
                type $t = u64;
                $e
            }
            _ => None,
        }
    };
}

macro_rules! compare {
    ($op:expr, $t:ty) => {
        match $op {
            "eq" => two!($t, $t => bool, |a, b| a == b),
            "ne" => two!($t, $t => bool, |a, b| a != b),
            "lt" | "lo" => two!($t, $t => bool, |a, b| a < b),
            "le" | "ls" => two!($t, $t => bool, |a, b| a <= b),
            "gt" | "hi" => two!($t, $t => bool, |a, b| a > b),
            "ge" | "hs" => two!($t, $t => bool, |a, b| a >= b),
            _ => None,
        }
    };
}

#[inline(always)]
fn unordered<T: PartialOrd>(a: T, b: T) -> bool {
    a.partial_cmp(&b).is_none()
}

macro_rules! compare_float {
    ($op:expr, $t:ty) => {
        match $op {
            // Ordered "not equal" is false on NaN, unlike Rust's operator.
            "ne" => two!($t, $t => bool, |a, b| a != b && !unordered(a, b)),
            "equ" => two!($t, $t => bool, |a, b| a == b || unordered(a, b)),
            "neu" => two!($t, $t => bool, |a, b| a != b),
            "ltu" => two!($t, $t => bool, |a, b| a < b || unordered(a, b)),
            "leu" => two!($t, $t => bool, |a, b| a <= b || unordered(a, b)),
            "gtu" => two!($t, $t => bool, |a, b| a > b || unordered(a, b)),
            "geu" => two!($t, $t => bool, |a, b| a >= b || unordered(a, b)),
            "num" => two!($t, $t => bool, |a, b| !unordered(a, b)),
            "nan" => two!($t, $t => bool, |a, b| unordered(a, b)),
            other => compare!(other, $t),
        }
    };
}

/// A comparison that gives a predicate; `ty` is the type of its operands.
pub fn comparison(op: &str, ty: &str) -> Option<Step> {
    match ty {
        "f32" => compare_float!(op, f32),
        "f64" => compare_float!(op, f64),
        "f16" => compare_float!(op, f16),
        "bf16" => compare_float!(op, bf16),
        "pred" => None,
        _ => ints!(ty; T => compare!(op, T)),
    }
}

fn ordering(op: &str, a: f32, b: f32) -> bool {
    let nan = a.is_nan() || b.is_nan();
    match op {
        "eq" => a == b,
        "ne" => !nan && a != b,
        "lt" => a < b,
        "le" => a <= b,
        "gt" => a > b,
        "ge" => a >= b,
        "equ" => nan || a == b,
        "neu" => a != b,
        "ltu" => nan || a < b,
        "leu" => nan || a <= b,
        "gtu" => nan || a > b,
        "geu" => nan || a >= b,
        "num" => !nan,
        _ => nan,
    }
}

const COMPARISONS: [&str; 14] = [
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
];

/// The immediate that tells `set`'s steps which comparison is meant.
pub fn comparison_number(op: &str) -> Option<u64> {
    COMPARISONS.iter().position(|&c| c == op).map(|i| i as u64)
}

fn set2<T: Value + Float>(t: &mut Cpu, i: *const Ins, one: u64) {
    let q = unsafe { &*i };
    let (x, y) = (Two::<T>::get(t.r(q.a)), Two::<T>::get(t.r(q.b)));
    let op = COMPARISONS[q.imm as usize];
    let low = ordering(op, x.0.wide() as f32, y.0.wide() as f32) as u64;
    let high = ordering(op, x.1.wide() as f32, y.1.wide() as f32) as u64;
    t.set(q.d, (low * one) | ((high * one) << 16));
}

/// `set` on pairs: each half of the result is 1.0 or all ones.
pub fn set_pair(to: &str, from: &str) -> Option<Step> {
    macro_rules! pair {
        ($t:ty, $one:expr) => {
            Some(
                (|t: &mut Cpu, i: *const Ins| {
                    set2::<$t>(t, i, $one);
                    unsafe { i.add(1) }
                }) as Step,
            )
        };
    }
    match (to, from) {
        ("f16x2", "f16x2") => pair!(f16, 0x3C00),
        ("bf16x2", "bf16x2") => pair!(bf16, 0x3F80),
        (_, "f16x2") => pair!(f16, 0xFFFF),
        (_, "bf16x2") => pair!(bf16, 0xFFFF),
        _ => None,
    }
}

/// Turns a predicate into the result of `set`.
pub fn set_value(to: &str) -> Option<Step> {
    match to {
        "f32" => one!(bool => f32, |p| p as u8 as f32),
        "f16" => one!(bool => u16, |p| if p { 0x3C00 } else { 0 }),
        "bf16" => one!(bool => u16, |p| if p { 0x3F80 } else { 0 }),
        "u16" | "s16" => one!(bool => u16, |p| if p { 0xFFFF } else { 0 }),
        _ => one!(bool => u32, |p| if p { u32::MAX } else { 0 }),
    }
}

macro_rules! directed {
    ($mode:expr, $t:ty, |$x:ident, $y:ident| $near:expr, $f:path) => {
        match $mode {
            Mode::Near => two!($t, |$x, $y| $near),
            Mode::Zero => two!($t, |a, b| $f(a, b, Mode::Zero)),
            Mode::Down => two!($t, |a, b| $f(a, b, Mode::Down)),
            Mode::Up => two!($t, |a, b| $f(a, b, Mode::Up)),
        }
    };
}

macro_rules! directed_one {
    ($mode:expr, $t:ty, |$x:ident, $m:ident| $e:expr) => {
        match $mode {
            Mode::Near => one!($t => $t, |$x| { let $m = Mode::Near; $e }),
            Mode::Zero => one!($t => $t, |$x| { let $m = Mode::Zero; $e }),
            Mode::Down => one!($t => $t, |$x| { let $m = Mode::Down; $e }),
            Mode::Up => one!($t => $t, |$x| { let $m = Mode::Up; $e }),
        }
    };
}

#[inline(always)]
fn clamp01<T: Float>(x: T) -> T {
    let v = x.wide();
    if v.is_nan() {
        T::narrow(0.0)
    } else {
        T::narrow(v.clamp(0.0, 1.0))
    }
}

#[inline(always)]
fn add16<T: Float>(a: T, b: T) -> T {
    T::narrow(a.wide() + b.wide())
}
#[inline(always)]
fn sub16<T: Float>(a: T, b: T) -> T {
    T::narrow(a.wide() - b.wide())
}
#[inline(always)]
fn mul16<T: Float>(a: T, b: T) -> T {
    T::narrow(a.wide() * b.wide())
}
#[inline(always)]
fn fma16<T: Float>(a: T, b: T, c: T) -> T {
    T::narrow(a.wide() * b.wide() + c.wide())
}

macro_rules! halves {
    ($ty:expr, $f:ident) => {
        match $ty {
            "f16" => two!(f16, |a, b| $f(a, b)),
            "bf16" => two!(bf16, |a, b| $f(a, b)),
            "f16x2" => two!(Two<f16>, |a, b| a.map2(b, $f)),
            "bf16x2" => two!(Two<bf16>, |a, b| a.map2(b, $f)),
            _ => None,
        }
    };
}

macro_rules! halves_one {
    ($ty:expr, |$x:ident| $e:expr) => {
        match $ty {
            "f16" => one!(f16 => f16, |$x| $e),
            "bf16" => one!(bf16 => bf16, |$x| $e),
            "f16x2" => one!(Two<f16> => Two<f16>, |p| {
                Two({ let $x = p.0; $e }, { let $x = p.1; $e })
            }),
            "bf16x2" => one!(Two<bf16> => Two<bf16>, |p| {
                Two({ let $x = p.0; $e }, { let $x = p.1; $e })
            }),
            _ => None,
        }
    };
}

fn bfe(a: u64, at: u32, len: u32, bits: u32, signed: bool) -> u64 {
    let (at, len) = (at & 0xFF, len & 0xFF);
    let sign = if !signed || len == 0 {
        0
    } else {
        a >> (at + len - 1).min(bits - 1) & 1
    };
    let mut r = 0;
    for i in 0..bits {
        let bit = if i < len && at + i < bits {
            a >> (at + i) & 1
        } else {
            sign
        };
        r |= bit << i;
    }
    r
}

fn bfi(a: u64, b: u64, at: u32, len: u32, bits: u32) -> u64 {
    let (at, len) = (at & 0xFF, len & 0xFF);
    let mut r = b;
    for i in 0..len {
        if at + i < bits {
            r = r & !(1 << (at + i)) | (a >> i & 1) << (at + i);
        }
    }
    r
}

fn prmt(a: u32, b: u32, c: u32, mode: &str) -> u32 {
    let bytes = (b as u64) << 32 | a as u64;
    let byte = |n: u32| (bytes >> (n * 8)) as u8;
    let at = c & 3;
    let pick = |i: u32| -> u8 {
        match mode {
            "f4e" => byte(at + i),
            "b4e" => byte((at + 8 - i) & 7),
            "rc8" => byte(at),
            "ecl" => byte(i.max(at)),
            "ecr" => byte(i.min(at)),
            "rc16" => byte((at & 1) * 2 + (i & 1)),
            _ => {
                let n = c >> (i * 4) & 0xF;
                let v = byte(n & 7);
                if n & 8 != 0 {
                    ((v as i8) >> 7) as u8
                } else {
                    v
                }
            }
        }
    };
    u32::from_le_bytes([pick(0), pick(1), pick(2), pick(3)])
}

#[inline(always)]
fn lop3(a: u32, b: u32, c: u32, lut: u64) -> u32 {
    let mut r = 0;
    for n in 0..8 {
        if lut >> n & 1 == 1 {
            let x = if n & 4 != 0 { a } else { !a };
            let y = if n & 2 != 0 { b } else { !b };
            let z = if n & 1 != 0 { c } else { !c };
            r |= x & y & z;
        }
    }
    r
}

fn dot4(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool) -> u32 {
    let part = |v: u32, i: u32, signed: bool| {
        let byte = (v >> (8 * i)) as u8;
        if signed {
            byte as i8 as i32
        } else {
            byte as i32
        }
    };
    (0..4).fold(c, |s, i| {
        s.wrapping_add((part(a, i, a_signed) * part(b, i, b_signed)) as u32)
    })
}

/// The step for an opcode, and the types of its sources (for constants among them).
pub struct Alu {
    pub step: Step,
    pub types: [&'static str; 3],
}

fn known(ty: &str) -> &'static str {
    const TYPES: [&str; 19] = [
        "pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32",
        "f16x2", "bf16x2", "tf32", "b64", "u64", "s64",
    ];
    TYPES.iter().find(|&&t| t == ty).copied().unwrap_or("f64")
}

pub fn alu(parts: &[&str]) -> Option<Alu> {
    let (name, ty) = (parts[0], *parts.last()?);
    let has = |p: &str| parts.contains(&p);
    let mode = Mode::of(parts);
    let near = mode.unwrap_or(Mode::Near);
    let same = [known(ty); 3];
    let mut types = same;
    let step = match name {
        "add" | "sub" if has("cc") => match (name, ty) {
            ("add", "u64" | "s64" | "b64") => {
                carry!(u64, true, |_c, a, b, _z| a.overflowing_add(b))
            }
            ("sub", "u64" | "s64" | "b64") => {
                carry!(u64, true, |_c, a, b, _z| a.overflowing_sub(b))
            }
            ("add", _) => carry!(u32, true, |_c, a, b, _z| a.overflowing_add(b)),
            _ => carry!(u32, true, |_c, a, b, _z| a.overflowing_sub(b)),
        },
        "addc" | "subc" => {
            let sets = has("cc");
            match (name, ty) {
                ("addc", "u64" | "s64" | "b64") => {
                    carry!(u64, sets, |c, a, b, _z| a.carrying(b, c))
                }
                ("subc", "u64" | "s64" | "b64") => {
                    carry!(u64, sets, |c, a, b, _z| a.borrowing(b, c))
                }
                ("addc", _) => carry!(u32, sets, |c, a, b, _z| a.carrying(b, c)),
                _ => carry!(u32, sets, |c, a, b, _z| a.borrowing(b, c)),
            }
        }
        "mad" | "madc" if has("cc") || name == "madc" => {
            let sets = has("cc");
            let with = name == "madc";
            match (with, has("hi"), ty) {
                (false, false, "u32" | "s32") => {
                    carry!(u32, sets, |_c, a, b, z| a
                        .wrapping_mul(b)
                        .overflowing_add(z))
                }
                (true, false, "u32" | "s32") => {
                    carry!(u32, sets, |c, a, b, z| a.wrapping_mul(b).carrying(z, c))
                }
                (false, true, "u32") => {
                    carry!(u32, sets, |_c, a, b, z| high32(a, b).overflowing_add(z))
                }
                (true, true, "u32") => {
                    carry!(u32, sets, |c, a, b, z| high32(a, b).carrying(z, c))
                }
                (false, false, "u64" | "s64") => {
                    carry!(u64, sets, |_c, a, b, z| a
                        .wrapping_mul(b)
                        .overflowing_add(z))
                }
                (true, false, "u64" | "s64") => {
                    carry!(u64, sets, |c, a, b, z| a.wrapping_mul(b).carrying(z, c))
                }
                (false, true, "u64") => {
                    carry!(u64, sets, |_c, a, b, z| high64(a, b).overflowing_add(z))
                }
                (true, true, "u64") => {
                    carry!(u64, sets, |c, a, b, z| high64(a, b).carrying(z, c))
                }
                _ => None,
            }
        }
        "add" => match ty {
            "f32" if has("sat") => two!(f32, |a, b| clamp01(a + b)),
            "f32" => directed!(near, f32, |a, b| a + b, float::add32),
            "f64" => directed!(near, f64, |a, b| a + b, float::add64),
            "f16" | "bf16" | "f16x2" | "bf16x2" => halves!(ty, add16),
            "f32x2" => two!(u64, |a, b| pair32(a, b, |x, y| x + y)),
            "s32" if has("sat") => two!(i32, |a, b| a.saturating_add(b)),
            "u16x2" | "s16x2" => two!(Two<u16>, |a, b| a.map2(b, u16::wrapping_add)),
            _ => ints!(ty; T => two!(T, |a, b| a.wrapping_add(b))),
        },
        "sub" => match ty {
            "f32" if has("sat") => two!(f32, |a, b| clamp01(a - b)),
            "f32" => directed!(near, f32, |a, b| a - b, sub32),
            "f64" => directed!(near, f64, |a, b| a - b, sub64),
            "f16" | "bf16" | "f16x2" | "bf16x2" => halves!(ty, sub16),
            "s32" if has("sat") => two!(i32, |a, b| a.saturating_sub(b)),
            _ => ints!(ty; T => two!(T, |a, b| a.wrapping_sub(b))),
        },
        "mul" => match ty {
            "f32" if has("sat") => two!(f32, |a, b| clamp01(a * b)),
            "f32" => directed!(near, f32, |a, b| a * b, float::mul32),
            "f64" => directed!(near, f64, |a, b| a * b, float::mul64),
            "f16" | "bf16" | "f16x2" | "bf16x2" => halves!(ty, mul16),
            "f32x2" => two!(u64, |a, b| pair32(a, b, |x, y| x * y)),
            _ if has("wide") => match ty {
                "u16" => two!(u16, u16 => u32, |a, b| a as u32 * b as u32),
                "s16" => two!(i16, i16 => i32, |a, b| a as i32 * b as i32),
                "u32" => two!(u32, u32 => u64, |a, b| a as u64 * b as u64),
                "s32" => two!(i32, i32 => i64, |a, b| a as i64 * b as i64),
                _ => None,
            },
            _ if has("hi") => match ty {
                "u16" => two!(u16, |a, b| ((a as u32 * b as u32) >> 16) as u16),
                "s16" => two!(i16, |a, b| ((a as i32 * b as i32) >> 16) as i16),
                "u32" => two!(u32, |a, b| high32(a, b)),
                "s32" => two!(i32, |a, b| ((a as i64 * b as i64) >> 32) as i32),
                "u64" => two!(u64, |a, b| high64(a, b)),
                "s64" => two!(i64, |a, b| ((a as i128 * b as i128) >> 64) as i64),
                _ => None,
            },
            _ => ints!(ty; T => two!(T, |a, b| a.wrapping_mul(b))),
        },
        "mul24" => match (ty, has("hi")) {
            ("u32", false) => two!(u32, |a, b| (a & 0xFFFFFF).wrapping_mul(b & 0xFFFFFF)),
            ("s32", false) => two!(i32, |a, b| (a << 8 >> 8).wrapping_mul(b << 8 >> 8)),
            _ => None,
        },
        "mad" | "fma" => match ty {
            "f32" if has("sat") => three!(f32, |a, b, c| clamp01(a.mul_add(b, c))),
            "f32" if has("relu") => None,
            "f32" => match near {
                Mode::Near => three!(f32, |a, b, c| a.mul_add(b, c)),
                Mode::Zero => three!(f32, |a, b, c| float::fma32(a, b, c, Mode::Zero)),
                Mode::Down => three!(f32, |a, b, c| float::fma32(a, b, c, Mode::Down)),
                Mode::Up => three!(f32, |a, b, c| float::fma32(a, b, c, Mode::Up)),
            },
            "f64" if near == Mode::Near => three!(f64, |a, b, c| a.mul_add(b, c)),
            "f32x2" => three!(u64, |a, b, c| {
                let half = |n: u32| {
                    let v = |w: u64| f32::from_bits((w >> n) as u32);
                    (v(a).mul_add(v(b), v(c)).to_bits() as u64) << n
                };
                half(0) | half(32)
            }),
            "f16" if has("relu") => {
                three!(f16, |a, b, c| float::max(fma16(a, b, c), f16::ZERO, true))
            }
            "bf16" if has("relu") => {
                three!(bf16, |a, b, c| float::max(fma16(a, b, c), bf16::ZERO, true))
            }
            "f16" if has("sat") => three!(f16, |a, b, c| clamp01(fma16(a, b, c))),
            "f16" => three!(f16, |a, b, c| fma16(a, b, c)),
            "bf16" => three!(bf16, |a, b, c| fma16(a, b, c)),
            "f16x2" if !has("relu") => three!(Two<f16>, |a, b, c| {
                Two(fma16(a.0, b.0, c.0), fma16(a.1, b.1, c.1))
            }),
            "bf16x2" if !has("relu") => three!(Two<bf16>, |a, b, c| {
                Two(fma16(a.0, b.0, c.0), fma16(a.1, b.1, c.1))
            }),
            _ if has("wide") => {
                types[2] = match ty {
                    "u16" => "u32",
                    "s16" => "s32",
                    "u32" => "u64",
                    _ => "s64",
                };
                match ty {
                    "u16" => three!(u16, u16, u32 => u32, |a, b, c| {
                        (a as u32 * b as u32).wrapping_add(c)
                    }),
                    "s16" => three!(i16, i16, i32 => i32, |a, b, c| {
                        (a as i32 * b as i32).wrapping_add(c)
                    }),
                    "u32" => three!(u32, u32, u64 => u64, |a, b, c| {
                        (a as u64 * b as u64).wrapping_add(c)
                    }),
                    "s32" => three!(i32, i32, i64 => i64, |a, b, c| {
                        (a as i64 * b as i64).wrapping_add(c)
                    }),
                    _ => None,
                }
            }
            _ if has("hi") => match ty {
                "u32" => three!(u32, |a, b, c| high32(a, b).wrapping_add(c)),
                "s32" => three!(i32, |a, b, c| {
                    (((a as i64 * b as i64) >> 32) as i32).wrapping_add(c)
                }),
                "u64" => three!(u64, |a, b, c| high64(a, b).wrapping_add(c)),
                "s64" => three!(i64, |a, b, c| {
                    (((a as i128 * b as i128) >> 64) as i64).wrapping_add(c)
                }),
                _ => None,
            },
            _ => ints!(ty; T => three!(T, |a, b, c| a.wrapping_mul(b).wrapping_add(c))),
        },
        "sad" => match ty {
            "u32" => three!(u32, |a, b, c| a.abs_diff(b).wrapping_add(c)),
            "s32" => three!(i32, i32, u32 => u32, |a, b, c| a.abs_diff(b).wrapping_add(c)),
            _ => None,
        },
        "div" => match ty {
            "f32" if mode.is_none() => two!(f32, |a, b| a / b),
            "f32" => directed!(near, f32, |a, b| a / b, float::div32),
            "f64" => directed!(near, f64, |a, b| a / b, float::div64),
            // A GPU gives all ones rather than a fault for a zero divisor.
            _ => ints!(ty; T => two!(T, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) })),
        },
        "rem" => {
            ints!(ty; T => two!(T, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }))
        }
        "neg" => match ty {
            "f32" => one!(f32 => f32, |a| -a),
            "f64" => one!(f64 => f64, |a| -a),
            "f16" | "bf16" => one!(u16 => u16, |a| a ^ 0x8000),
            "f16x2" | "bf16x2" => one!(u32 => u32, |a| a ^ 0x8000_8000),
            _ => ints!(ty; T => one!(T => T, |a| (0 as T).wrapping_sub(a))),
        },
        "abs" => match ty {
            "f32" => one!(f32 => f32, |a| a.abs()),
            "f64" => one!(f64 => f64, |a| a.abs()),
            "f16" | "bf16" => one!(u16 => u16, |a| a & 0x7FFF),
            "f16x2" | "bf16x2" => one!(u32 => u32, |a| a & 0x7FFF_7FFF),
            "s16" => one!(i16 => i16, |a| a.wrapping_abs()),
            "s32" => one!(i32 => i32, |a| a.wrapping_abs()),
            "s64" => one!(i64 => i64, |a| a.wrapping_abs()),
            _ => None,
        },
        "min" | "max" => min_max(name == "max", has("NaN"), ty),
        "copysign" => match ty {
            // The sign is the first operand's.
            "f32" => two!(f32, |a, b| b.copysign(a)),
            "f64" => two!(f64, |a, b| b.copysign(a)),
            _ => None,
        },
        "testp" => {
            let ty = known(ty);
            types = [ty; 3];
            match (parts[1], ty) {
                ("finite", "f32") => one!(f32 => bool, |a| a.is_finite()),
                ("infinite", "f32") => one!(f32 => bool, |a| a.is_infinite()),
                ("number", "f32") => one!(f32 => bool, |a| !a.is_nan()),
                ("notanumber", "f32") => one!(f32 => bool, |a| a.is_nan()),
                ("normal", "f32") => one!(f32 => bool, |a| a.is_normal()),
                ("subnormal", "f32") => one!(f32 => bool, |a| a.is_subnormal()),
                ("finite", "f64") => one!(f64 => bool, |a| a.is_finite()),
                ("infinite", "f64") => one!(f64 => bool, |a| a.is_infinite()),
                ("number", "f64") => one!(f64 => bool, |a| !a.is_nan()),
                ("notanumber", "f64") => one!(f64 => bool, |a| a.is_nan()),
                ("normal", "f64") => one!(f64 => bool, |a| a.is_normal()),
                ("subnormal", "f64") => one!(f64 => bool, |a| a.is_subnormal()),
                _ => None,
            }
        }
        "sqrt" => match ty {
            "f32" if has("ftz") => {
                directed_one!(near, f32, |a, m| float::flush(float::sqrt32(
                    float::flush(a),
                    m
                )))
            }
            "f32" => directed_one!(near, f32, |a, m| float::sqrt32(a, m)),
            "f64" => directed_one!(near, f64, |a, m| float::sqrt64(a, m)),
            _ => None,
        },
        "rcp" => match ty {
            "f32" if has("ftz") => {
                directed_one!(near, f32, |a, m| float::flush(float::div32(
                    1.0,
                    float::flush(a),
                    m
                )))
            }
            "f32" => directed_one!(near, f32, |a, m| float::div32(1.0, a, m)),
            // The approximation has the upper half of the bits; nvcc refines it by Newton
            // steps, which are right whatever the start is.
            "f64" if has("approx") => {
                one!(f64 => f64, |a| f64::from_bits((1.0 / a).to_bits() & !0xFFFF_FFFF))
            }
            "f64" => directed_one!(near, f64, |a, m| float::div64(1.0, a, m)),
            _ => None,
        },
        "rsqrt" => match ty {
            "f32" if has("ftz") => {
                one!(f32 => f32, |a| float::flush((1.0 / (float::flush(a) as f64).sqrt()) as f32))
            }
            "f32" => one!(f32 => f32, |a| (1.0 / (a as f64).sqrt()) as f32),
            "f64" => one!(f64 => f64, |a| {
                f64::from_bits((1.0 / a.sqrt()).to_bits() & !0xFFFF_FFFF)
            }),
            _ => None,
        },
        "sin" => one!(f32 => f32, |a| (a as f64).sin() as f32),
        "cos" => one!(f32 => f32, |a| (a as f64).cos() as f32),
        "lg2" => one!(f32 => f32, |a| a.log2()),
        "ex2" => match ty {
            "f32" if has("ftz") => one!(f32 => f32, |a| float::flush(float::flush(a).exp2())),
            "f32" => one!(f32 => f32, |a| a.exp2()),
            _ => halves_one!(ty, |x| Float::narrow((x.wide() as f32).exp2() as f64)),
        },
        "tanh" => match ty {
            "f32" => one!(f32 => f32, |a| a.tanh()),
            _ => halves_one!(ty, |x| Float::narrow(x.wide().tanh())),
        },
        "and" => widths!(ty; T => two!(T, |a, b| a & b)),
        "or" => widths!(ty; T => two!(T, |a, b| a | b)),
        "xor" => widths!(ty; T => two!(T, |a, b| a ^ b)),
        "not" => widths!(ty; T => one!(T => T, |a| !a)),
        "cnot" => match ty {
            "b16" => one!(u16 => u16, |a| (a == 0) as u16),
            "b32" => one!(u32 => u32, |a| (a == 0) as u32),
            "b64" => one!(u64 => u64, |a| (a == 0) as u64),
            _ => None,
        },
        "shl" => {
            types[1] = "u32";
            match ty {
                "b16" => two!(u16, u32 => u16, |a, n| a.checked_shl(n).unwrap_or(0)),
                "b32" => two!(u32, u32 => u32, |a, n| a.checked_shl(n).unwrap_or(0)),
                "b64" => two!(u64, u32 => u64, |a, n| a.checked_shl(n).unwrap_or(0)),
                _ => None,
            }
        }
        "shr" => {
            types[1] = "u32";
            match ty {
                "b16" | "u16" => two!(u16, u32 => u16, |a, n| a.checked_shr(n).unwrap_or(0)),
                "b32" | "u32" => two!(u32, u32 => u32, |a, n| a.checked_shr(n).unwrap_or(0)),
                "b64" | "u64" => two!(u64, u32 => u64, |a, n| a.checked_shr(n).unwrap_or(0)),
                "s16" => two!(i16, u32 => i16, |a, n| a >> n.min(15)),
                "s32" => two!(i32, u32 => i32, |a, n| a >> n.min(31)),
                "s64" => two!(i64, u32 => i64, |a, n| a >> n.min(63)),
                _ => None,
            }
        }
        "shf" => {
            types = ["u32"; 3];
            match (parts[1], has("clamp")) {
                ("l", false) => three!(u32, |a, b, n| {
                    ((((b as u64) << 32 | a as u64) << (n & 31)) >> 32) as u32
                }),
                ("l", true) => three!(u32, |a, b, n| {
                    ((((b as u64) << 32 | a as u64) << n.min(32)) >> 32) as u32
                }),
                (_, false) => three!(u32, |a, b, n| {
                    (((b as u64) << 32 | a as u64) >> (n & 31)) as u32
                }),
                (_, true) => three!(u32, |a, b, n| {
                    (((b as u64) << 32 | a as u64) >> n.min(32)) as u32
                }),
            }
        }
        "bfe" => {
            types = [known(ty), "u32", "u32"];
            match ty {
                "u32" => three!(u64, u32, u32 => u64, |a, b, c| bfe(a, b, c, 32, false)),
                "s32" => three!(u64, u32, u32 => u64, |a, b, c| bfe(a, b, c, 32, true)),
                "u64" => three!(u64, u32, u32 => u64, |a, b, c| bfe(a, b, c, 64, false)),
                "s64" => three!(u64, u32, u32 => u64, |a, b, c| bfe(a, b, c, 64, true)),
                _ => None,
            }
        }
        "bmsk" => {
            // A run of ones: from bit a, b of them.
            let clamp = has("clamp");
            types = ["u32"; 3];
            if clamp {
                two!(u32, |a, b| {
                    let ones = if b >= 32 { u32::MAX } else { (1 << b) - 1 };
                    ones.checked_shl(a).unwrap_or(0)
                })
            } else {
                two!(u32, |a, b| ((1 << (b & 31)) - 1) << (a & 31))
            }
        }
        "szext" => {
            // Extends the lowest b bits.
            types[1] = "u32";
            match ty {
                "u32" => two!(u32, |a, b| if b >= 32 { a } else { a & ((1 << b) - 1) }),
                "s32" => two!(u32, |a, b| match b {
                    0 => 0,
                    1..32 => (((a << (32 - b)) as i32) >> (32 - b)) as u32,
                    _ => a,
                }),
                _ => None,
            }
        }
        "bfind" => match (ty, has("shiftamt")) {
            ("u32", false) => one!(u32 => u32, |a| a.checked_ilog2().unwrap_or(u32::MAX)),
            ("u32", true) => one!(u32 => u32, |a| {
                a.checked_ilog2().map_or(u32::MAX, |b| 31 - b)
            }),
            ("s32", false) => one!(i32 => u32, |a| {
                ((a ^ (a >> 31)) as u32).checked_ilog2().unwrap_or(u32::MAX)
            }),
            ("u64", false) => one!(u64 => u32, |a| a.checked_ilog2().unwrap_or(u32::MAX)),
            ("u64", true) => one!(u64 => u32, |a| {
                a.checked_ilog2().map_or(u32::MAX, |b| 63 - b)
            }),
            ("s64", false) => one!(i64 => u32, |a| {
                ((a ^ (a >> 63)) as u64).checked_ilog2().unwrap_or(u32::MAX)
            }),
            _ => None,
        },
        "brev" => match ty {
            "b32" => one!(u32 => u32, |a| a.reverse_bits()),
            _ => one!(u64 => u64, |a| a.reverse_bits()),
        },
        "popc" => match ty {
            "b32" => one!(u32 => u32, |a| a.count_ones()),
            _ => one!(u64 => u32, |a| a.count_ones()),
        },
        "clz" => match ty {
            "b32" => one!(u32 => u32, |a| a.leading_zeros()),
            _ => one!(u64 => u32, |a| a.leading_zeros()),
        },
        "prmt" => {
            types = ["u32"; 3];
            match parts.get(2) {
                None => three!(u32, |a, b, c| prmt(a, b, c, "")),
                Some(&"f4e") => three!(u32, |a, b, c| prmt(a, b, c, "f4e")),
                Some(&"b4e") => three!(u32, |a, b, c| prmt(a, b, c, "b4e")),
                Some(&"rc8") => three!(u32, |a, b, c| prmt(a, b, c, "rc8")),
                Some(&"ecl") => three!(u32, |a, b, c| prmt(a, b, c, "ecl")),
                Some(&"ecr") => three!(u32, |a, b, c| prmt(a, b, c, "ecr")),
                Some(&"rc16") => three!(u32, |a, b, c| prmt(a, b, c, "rc16")),
                _ => None,
            }
        }
        "lop3" if ty == "b32" => three_imm!(u32, |a, b, c, lut| lop3(a, b, c, lut)),
        "selp" => {
            types[2] = "pred";
            widths!(ty; T => three!(T, T, bool => T, |a, b, p| if p { a } else { b }))
        }
        "slct" => {
            types = [
                known(parts[parts.len() - 2]),
                known(parts[parts.len() - 2]),
                known(ty),
            ];
            match ty {
                "s32" => three!(u64, u64, i32 => u64, |a, b, c| if c >= 0 { a } else { b }),
                "f32" => three!(u64, u64, f32 => u64, |a, b, c| if c >= 0.0 { a } else { b }),
                _ => None,
            }
        }
        "dp4a" => {
            types = ["u32"; 3];
            match (parts[1], parts[2]) {
                ("s32", "s32") => three!(u32, |a, b, c| dot4(a, b, c, true, true)),
                ("s32", "u32") => three!(u32, |a, b, c| dot4(a, b, c, true, false)),
                ("u32", "s32") => three!(u32, |a, b, c| dot4(a, b, c, false, true)),
                _ => three!(u32, |a, b, c| dot4(a, b, c, false, false)),
            }
        }
        "mov" => widths!(ty; T => one!(T => T, |a| a)),
        _ => None,
    };
    step.map(|step| Alu { step, types })
}

fn min_max(max: bool, nan: bool, ty: &str) -> Option<Step> {
    macro_rules! both {
        ($t:ty) => {
            match (max, nan) {
                (false, false) => two!($t, |a, b| float::min(a, b, false)),
                (false, true) => two!($t, |a, b| float::min(a, b, true)),
                (true, false) => two!($t, |a, b| float::max(a, b, false)),
                (true, true) => two!($t, |a, b| float::max(a, b, true)),
            }
        };
        (pair $t:ty) => {
            match (max, nan) {
                (false, false) => two!(Two<$t>, |a, b| a.map2(b, |x, y| float::min(x, y, false))),
                (false, true) => two!(Two<$t>, |a, b| a.map2(b, |x, y| float::min(x, y, true))),
                (true, false) => two!(Two<$t>, |a, b| a.map2(b, |x, y| float::max(x, y, false))),
                (true, true) => two!(Two<$t>, |a, b| a.map2(b, |x, y| float::max(x, y, true))),
            }
        };
    }
    match ty {
        "f32" => both!(f32),
        "f64" => both!(f64),
        "f16" => both!(f16),
        "bf16" => both!(bf16),
        "f16x2" => both!(pair f16),
        "bf16x2" => both!(pair bf16),
        _ if max => ints!(ty; T => two!(T, |a, b| a.max(b))),
        _ => ints!(ty; T => two!(T, |a, b| a.min(b))),
    }
}

/// `bfi`: four sources; `a`, `b` and `c` in their places and the length in slot `x`.
pub fn bit_insert(ty: &str) -> Option<Step> {
    match ty {
        "b32" => Some(|t, i| {
            let q = unsafe { &*i };
            let (at, len) = (t.r(q.c) as u32, t.r(q.x as i32) as u32);
            let r = bfi(t.r(q.a), t.r(q.b), at, len, 32);
            t.set(q.d, r);
            unsafe { i.add(1) }
        }),
        "b64" => Some(|t, i| {
            let q = unsafe { &*i };
            let (at, len) = (t.r(q.c) as u32, t.r(q.x as i32) as u32);
            let r = bfi(t.r(q.a), t.r(q.b), at, len, 64);
            t.set(q.d, r);
            unsafe { i.add(1) }
        }),
        _ => None,
    }
}

fn pair32(a: u64, b: u64, f: impl Fn(f32, f32) -> f32) -> u64 {
    let half = |n: u32| {
        let v = |w: u64| f32::from_bits((w >> n) as u32);
        (f(v(a), v(b)).to_bits() as u64) << n
    };
    half(0) | half(32)
}

fn sub32(a: f32, b: f32, mode: Mode) -> f32 {
    float::add32(a, -b, mode)
}

fn sub64(a: f64, b: f64, mode: Mode) -> f64 {
    float::add64(a, -b, mode)
}

#[inline(always)]
fn high32(a: u32, b: u32) -> u32 {
    ((a as u64 * b as u64) >> 32) as u32
}

#[inline(always)]
fn high64(a: u64, b: u64) -> u64 {
    ((a as u128 * b as u128) >> 64) as u64
}

trait Carrying: Sized {
    fn carrying(self, b: Self, c: bool) -> (Self, bool);
    fn borrowing(self, b: Self, c: bool) -> (Self, bool);
}

macro_rules! carrying {
    ($($t:ty),*) => {$(
        impl Carrying for $t {
            #[inline(always)]
            fn carrying(self, b: $t, c: bool) -> ($t, bool) {
                let (s, x) = self.overflowing_add(b);
                let (s, y) = s.overflowing_add(c as $t);
                (s, x | y)
            }
            #[inline(always)]
            fn borrowing(self, b: $t, c: bool) -> ($t, bool) {
                let (s, x) = self.overflowing_sub(b);
                let (s, y) = s.overflowing_sub(c as $t);
                (s, x | y)
            }
        }
    )*};
}
carrying!(u32, u64);

/// The parameters of a conversion that takes the general way, packed into `Ins::imm`.
#[derive(Clone, Copy)]
struct Convert {
    from: u8,
    to: u8,
    mode: u8,
    /// 0 keeps fractions, else one of `rni`, `rzi`, `rmi`, `rpi`.
    whole: u8,
    saturate: bool,
    relu: bool,
    flush: bool,
    /// Bits of the destination register, to which narrow signed results are extended.
    width: u8,
}

impl Convert {
    fn pack(self) -> u64 {
        u64::from_le_bytes([
            self.from,
            self.to,
            self.mode,
            self.whole,
            self.saturate as u8,
            self.relu as u8,
            self.flush as u8,
            self.width,
        ])
    }

    fn unpack(bits: u64) -> Convert {
        let [from, to, mode, whole, saturate, relu, flush, width] = bits.to_le_bytes();
        Convert {
            from,
            to,
            mode,
            whole,
            saturate: saturate != 0,
            relu: relu != 0,
            flush: flush != 0,
            width,
        }
    }
}

const FORMATS: [&str; 14] = [
    "u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64", "tf32",
    "b16",
];

fn format(ty: &str) -> Option<u8> {
    FORMATS.iter().position(|&f| f == ty).map(|i| i as u8)
}

fn mode_of(number: u8) -> Mode {
    [Mode::Near, Mode::Zero, Mode::Down, Mode::Up][number as usize]
}

/// The step of `cvt` and its immediate. `width` is that of the destination register.
pub fn convert(parts: &[&str], width: u32) -> Option<(Step, u64)> {
    let (to, from) = (parts[parts.len() - 2], parts[parts.len() - 1]);
    let has = |p: &str| parts.contains(&p);
    let plain = !has("sat") && !has("relu") && !has("ftz") && !has("satfinite");
    let quick = match (to, from) {
        ("u64", "u32") => one!(u32 => u64, |a| a as u64),
        ("s64", "s32") => one!(i32 => i64, |a| a as i64),
        ("u32" | "s32", "u64" | "s64") if !has("sat") => one!(u64 => u32, |a| a as u32),
        ("f32", "f16") if plain => one!(f16 => f32, |a| a.to_f32()),
        ("f32", "bf16") if plain => one!(bf16 => f32, |a| a.to_f32()),
        ("f64", "f32") if plain && parts.len() == 3 => one!(f32 => f64, |a| a as f64),
        ("f32", "f64") if plain && has("rn") => one!(f64 => f32, |a| a as f32),
        ("f16", "f32") if plain && has("rn") => one!(f32 => f16, |a| f16::from_f32(a)),
        ("bf16", "f32") if plain && has("rn") => one!(f32 => bf16, |a| Float::narrow(a as f64)),
        ("f32", "s32") if plain && has("rn") => one!(i32 => f32, |a| a as f32),
        ("f32", "u32") if plain && has("rn") => one!(u32 => f32, |a| a as f32),
        ("f64", "s32") if plain => one!(i32 => f64, |a| a as f64),
        ("f64", "u64") if plain && has("rn") => one!(u64 => f64, |a| a as f64),
        ("tf32", "f32") if has("rna") => one!(f32 => f32, |a| float::tf32_away(a)),
        ("tf32", "f32") if has("rn") => one!(f32 => f32, |a| float::tf32_even(a)),
        _ => None,
    };
    if let Some(step) = quick {
        return Some((step, 0));
    }
    let whole = ["rni", "rzi", "rmi", "rpi"]
        .iter()
        .position(|r| has(r))
        .map_or(0, |i| i + 1);
    let c = Convert {
        from: format(from)?,
        to: format(to)?,
        mode: Mode::of(parts).unwrap_or(Mode::Near) as u8,
        whole: whole as u8,
        saturate: has("sat"),
        relu: has("relu"),
        flush: has("ftz"),
        width: width as u8,
    };
    let step: Step = |t, i| {
        let q = unsafe { &*i };
        let r = general_convert(t.r(q.a), Convert::unpack(q.imm));
        t.set(q.d, r);
        unsafe { i.add(1) }
    };
    Some((step, c.pack()))
}

fn general_convert(bits: u64, c: Convert) -> u64 {
    let to_float = c.to >= 8;
    if c.from < 8 {
        let v: i128 = match c.from {
            0 => bits as u8 as i128,
            1 => bits as i8 as i128,
            2 => bits as u16 as i128,
            3 => bits as i16 as i128,
            4 => bits as u32 as i128,
            5 => bits as i32 as i128,
            6 => bits as i128,
            _ => bits as i64 as i128,
        };
        if !to_float {
            return integer(v, c);
        }
        let near = v as f64;
        if c.to == 10 && c.mode == 0 {
            return (v as f32).to_bits() as u64;
        }
        if c.to == 11 || near as i128 == v {
            let by = mode_of(c.mode).moves_public(v < 0, v - near as i128);
            return real(step_public(near, by), c);
        }
        // More bits than f64 holds, to something narrower: round to odd on the way.
        let cut = (v >> 12 << 12) | ((v & 0xFFF != 0) as i128) << 12;
        return real(cut as f64, c);
    }
    let mut x = match c.from {
        8 => f16::get(bits).wide(),
        9 => bf16::get(bits).wide(),
        10 => f32::get(bits) as f64,
        _ => f64::get(bits),
    };
    if c.flush && c.from == 10 {
        x = float::flush(x as f32) as f64;
    }
    x = match c.whole {
        0 if !to_float => x.trunc(),
        0 => x,
        1 => x.round_ties_even(),
        2 => x.trunc(),
        3 => x.floor(),
        _ => x.ceil(),
    };
    if to_float {
        return real(x, c);
    }
    // A conversion to an integer clamps, and NaN becomes 0.
    integer(
        x as i128,
        Convert {
            saturate: true,
            ..c
        },
    )
}

impl Mode {
    fn moves_public(self, negative: bool, error: i128) -> i32 {
        match self {
            Mode::Near => 0,
            Mode::Down => -((error < 0) as i32),
            Mode::Up => (error > 0) as i32,
            Mode::Zero if negative => (error > 0) as i32,
            Mode::Zero => -((error < 0) as i32),
        }
    }
}

fn step_public(x: f64, by: i32) -> f64 {
    match by {
        0 => x,
        1 => x.next_up(),
        _ => x.next_down(),
    }
}

fn integer(v: i128, c: Convert) -> u64 {
    let (lo, hi): (i128, i128) = match c.to {
        0 => (0, u8::MAX as i128),
        1 => (i8::MIN as i128, i8::MAX as i128),
        2 => (0, u16::MAX as i128),
        3 => (i16::MIN as i128, i16::MAX as i128),
        4 => (0, u32::MAX as i128),
        5 => (i32::MIN as i128, i32::MAX as i128),
        6 => (0, u64::MAX as i128),
        _ => (i64::MIN as i128, i64::MAX as i128),
    };
    let v = if c.saturate { v.clamp(lo, hi) } else { v };
    let cut: u64 = match c.to {
        0 => v as u8 as u64,
        1 => v as i8 as u64,
        2 => v as u16 as u64,
        3 => v as i16 as u64,
        4 => v as u32 as u64,
        5 => v as i32 as u64,
        _ => v as u64,
    };
    cut & (u64::MAX >> (64 - c.width.max(1)))
}

fn real(x: f64, c: Convert) -> u64 {
    let mode = mode_of(c.mode);
    let mut x = x;
    if c.saturate {
        x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) };
    }
    if c.relu && x < 0.0 {
        x = 0.0;
    }
    match c.to {
        8 => float::narrow16::<f16>(x, mode).bits() as u64,
        9 => float::narrow16::<bf16>(x, mode).bits() as u64,
        10 => {
            let r = float::narrow(x, mode);
            (if c.flush { float::flush(r) } else { r }).to_bits() as u64
        }
        12 => float::tf32_away(x as f32).to_bits() as u64,
        _ => x.to_bits(),
    }
}

/// `cvt` between pairs: two f32 to a packed pair, or a packed pair of 8-bit floats.
pub fn convert_pair(parts: &[&str]) -> Option<Step> {
    let (to, from) = (parts[parts.len() - 2], parts[parts.len() - 1]);
    let has = |p: &str| parts.contains(&p);
    macro_rules! pack {
        ($t:ty, $mode:expr) => {
            // The first source goes to the upper half.
            two!(f32, f32 => Two<$t>, |a, b| Two(
                float::narrow16::<$t>(b as f64, $mode),
                float::narrow16::<$t>(a as f64, $mode)
            ))
        };
    }
    match (to, from) {
        _ if has("relu") => None,
        ("f16x2", "f32") if has("rz") => pack!(f16, Mode::Zero),
        ("f16x2", "f32") => pack!(f16, Mode::Near),
        ("bf16x2", "f32") if has("rz") => pack!(bf16, Mode::Zero),
        ("bf16x2", "f32") => pack!(bf16, Mode::Near),
        ("e4m3x2", "f32") => two!(f32, f32 => u16, |a, b| {
            (float::to_fp8(a as f64, 3, 7, 0x7E) as u16) << 8
                | float::to_fp8(b as f64, 3, 7, 0x7E) as u16
        }),
        ("e5m2x2", "f32") => two!(f32, f32 => u16, |a, b| {
            (float::to_fp8(a as f64, 2, 15, 0x7B) as u16) << 8
                | float::to_fp8(b as f64, 2, 15, 0x7B) as u16
        }),
        ("e4m3x2", "f16x2") => one!(Two<f16> => u16, |p| {
            (float::to_fp8(p.1.wide(), 3, 7, 0x7E) as u16) << 8
                | float::to_fp8(p.0.wide(), 3, 7, 0x7E) as u16
        }),
        ("e5m2x2", "f16x2") => one!(Two<f16> => u16, |p| {
            (float::to_fp8(p.1.wide(), 2, 15, 0x7B) as u16) << 8
                | float::to_fp8(p.0.wide(), 2, 15, 0x7B) as u16
        }),
        ("f16x2", "e4m3x2") => one!(u16 => Two<f16>, |p| Two(
            f16::from_f64(float::from_fp8(p as u8, 3, 7)),
            f16::from_f64(float::from_fp8((p >> 8) as u8, 3, 7))
        )),
        ("f16x2", "e5m2x2") => one!(u16 => Two<f16>, |p| Two(
            f16::from_f64(float::from_fp8(p as u8, 2, 15)),
            f16::from_f64(float::from_fp8((p >> 8) as u8, 2, 15))
        )),
        _ => None,
    }
}
