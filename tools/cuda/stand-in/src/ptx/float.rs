//! Floating-point arithmetic where Rust's own operators do not say it all: directed
//! rounding, PTX's rules for NaN, and the narrow formats.

use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    Near,
    Zero,
    Down,
    Up,
}

impl Mode {
    /// The mode that an opcode's parts name, if any: `rn`, `rz`, `rm` or `rp`.
    pub fn of(parts: &[&str]) -> Option<Mode> {
        parts.iter().find_map(|p| {
            Some(match *p {
                "rn" => Mode::Near,
                "rz" => Mode::Zero,
                "rm" => Mode::Down,
                "rp" => Mode::Up,
                _ => return None,
            })
        })
    }

    fn moves(self, negative: bool, error: f64) -> i32 {
        // `error` is the exact value less the rounded one.
        match self {
            Mode::Near => 0,
            Mode::Down => -((error < 0.0) as i32),
            Mode::Up => (error > 0.0) as i32,
            Mode::Zero if negative => (error > 0.0) as i32,
            Mode::Zero => -((error < 0.0) as i32),
        }
    }
}

/// s + e = a + b exactly, with s the rounded sum.
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    let t = s - a;
    (s, (a - (s - t)) + (b - t))
}

fn step32(r: f32, by: i32) -> f32 {
    match by {
        0 => r,
        1 => r.next_up(),
        _ => r.next_down(),
    }
}

fn step64(r: f64, by: i32) -> f64 {
    match by {
        0 => r,
        1 => r.next_up(),
        _ => r.next_down(),
    }
}

/// Rounds s + e, where e is below half a unit of s, to f32.
fn narrow_pair(s: f64, e: f64, mode: Mode) -> f32 {
    if mode == Mode::Near {
        // To odd first, so that rounding twice is harmless.
        let odd = if e != 0.0 && s.to_bits() & 1 == 0 {
            if (e > 0.0) == (s > 0.0) {
                f64::from_bits(s.to_bits() | 1)
            } else {
                s.next_toward(e)
            }
        } else {
            s
        };
        return odd as f32;
    }
    let r = s as f32;
    if !r.is_finite() {
        let to_finite = s.is_finite()
            && match mode {
                Mode::Zero => true,
                Mode::Down => s > 0.0,
                _ => s < 0.0,
            };
        return if to_finite { f32::MAX.copysign(r) } else { r };
    }
    step32(r, mode.moves(s < 0.0, (s - r as f64) + e))
}

trait Toward {
    fn next_toward(self, e: f64) -> f64;
}

impl Toward for f64 {
    /// The odd neighbour in the direction of the sign of e.
    fn next_toward(self, e: f64) -> f64 {
        if e > 0.0 {
            self.next_up()
        } else {
            self.next_down()
        }
    }
}

pub fn narrow(x: f64, mode: Mode) -> f32 {
    if mode == Mode::Near {
        x as f32
    } else {
        narrow_pair(x, 0.0, mode)
    }
}

pub fn add32(a: f32, b: f32, mode: Mode) -> f32 {
    let (s, e) = two_sum(a as f64, b as f64);
    if s.is_finite() {
        narrow_pair(s, e, mode)
    } else {
        a + b
    }
}

pub fn mul32(a: f32, b: f32, mode: Mode) -> f32 {
    narrow(a as f64 * b as f64, mode)
}

pub fn fma32(a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    let p = a as f64 * b as f64;
    let (s, e) = two_sum(p, c as f64);
    if s.is_finite() {
        narrow_pair(s, e, mode)
    } else {
        s as f32
    }
}

pub fn div32(a: f32, b: f32, mode: Mode) -> f32 {
    let q = a as f64 / b as f64;
    if !q.is_finite() || mode == Mode::Near {
        return a / b;
    }
    let r = q as f32;
    if !r.is_finite() || r == 0.0 {
        return narrow(q, mode);
    }
    // The exact remainder says on which side of the quotient the true value lies.
    let rest = (-(r as f64)).mul_add(b as f64, a as f64) * b.signum() as f64;
    step32(r, mode.moves(q < 0.0, rest))
}

pub fn sqrt32(a: f32, mode: Mode) -> f32 {
    let r = a.sqrt();
    if mode == Mode::Near || !r.is_finite() {
        return r;
    }
    step32(r, mode.moves(false, a as f64 - r as f64 * r as f64))
}

pub fn add64(a: f64, b: f64, mode: Mode) -> f64 {
    let (s, e) = two_sum(a, b);
    if s.is_finite() {
        step64(s, mode.moves(s < 0.0, e))
    } else {
        s
    }
}

pub fn mul64(a: f64, b: f64, mode: Mode) -> f64 {
    let p = a * b;
    if p.is_finite() {
        step64(p, mode.moves(p < 0.0, a.mul_add(b, -p)))
    } else {
        p
    }
}

pub fn div64(a: f64, b: f64, mode: Mode) -> f64 {
    let q = a / b;
    if !q.is_finite() {
        return q;
    }
    step64(q, mode.moves(q < 0.0, (-q).mul_add(b, a) * b.signum()))
}

pub fn sqrt64(a: f64, mode: Mode) -> f64 {
    let r = a.sqrt();
    if r.is_finite() {
        step64(r, mode.moves(false, -(r.mul_add(r, -a))))
    } else {
        r
    }
}

pub fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// What `min`, `max` and the half-precision operations need of a format.
pub trait Float: Copy {
    fn wide(self) -> f64;
    fn narrow(x: f64) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn narrow(x: f64) -> f32 {
        x as f32
    }
}

impl Float for f64 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(x: f64) -> f64 {
        x
    }
}

impl Float for f16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self.to_f32() as f64
    }
    #[inline(always)]
    fn narrow(x: f64) -> f16 {
        f16::from_f32(to_odd(x))
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self.to_f32() as f64
    }
    #[inline(always)]
    fn narrow(x: f64) -> bf16 {
        if x.is_nan() {
            bf16::from_bits(0x7FFF)
        } else {
            bf16::from_f32(to_odd(x))
        }
    }
}

/// f64 to f32 with what does not fit cut off.
pub fn to_zero(x: f64) -> f32 {
    narrow_pair(x, 0.0, Mode::Zero)
}

/// f64 to f32 so that rounding once more, to 16 bits, gives the nearest of the f64: what is not exact
/// gets an odd last bit. (`from_f64` of the crate `half` takes only 20 bits of the fraction.)
pub fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    if near as f64 == x || !near.is_finite() || near == 0.0 {
        return near;
    }
    let down = if (near as f64).abs() > x.abs() { 1 } else { 0 };
    f32::from_bits((near.to_bits() - down) | 1)
}

#[inline(always)]
pub fn min<T: Float>(a: T, b: T, nan: bool) -> T {
    pick(a, b, nan, |x, y| x < y || (x == y && x.is_sign_negative()))
}

#[inline(always)]
pub fn max<T: Float>(a: T, b: T, nan: bool) -> T {
    pick(a, b, nan, |x, y| x > y || (x == y && x.is_sign_positive()))
}

#[inline(always)]
fn pick<T: Float>(a: T, b: T, nan: bool, first: impl Fn(f64, f64) -> bool) -> T {
    let (x, y) = (a.wide(), b.wide());
    if x.is_nan() || y.is_nan() {
        // The NaN that comes out is the canonical one.
        let keep = if nan || (x.is_nan() && y.is_nan()) {
            f64::NAN
        } else {
            return if x.is_nan() { b } else { a };
        };
        return T::narrow(keep);
    }
    if first(x, y) { a } else { b }
}

/// To f16 or bf16 in the given mode.
pub fn narrow16<T: Float + Bits16>(x: f64, mode: Mode) -> T {
    let r = T::narrow(x);
    if mode == Mode::Near || x.is_nan() {
        return r;
    }
    let error = x - r.wide();
    let by = if r.wide().is_finite() {
        mode.moves(x < 0.0, error)
    } else if x.is_finite() {
        mode.moves(x < 0.0, if x > 0.0 { -1.0 } else { 1.0 })
    } else {
        0
    };
    if by == 0 {
        return r;
    }
    // Bits of one sign are ordered like the values' magnitudes.
    let bits = r.bits();
    let away = (by > 0) == (x > 0.0);
    T::from(if away { bits + 1 } else { bits - 1 })
}

pub trait Bits16 {
    fn bits(self) -> u16;
    fn from(bits: u16) -> Self;
}

impl Bits16 for f16 {
    fn bits(self) -> u16 {
        self.to_bits()
    }
    fn from(bits: u16) -> f16 {
        f16::from_bits(bits)
    }
}

impl Bits16 for bf16 {
    fn bits(self) -> u16 {
        self.to_bits()
    }
    fn from(bits: u16) -> bf16 {
        bf16::from_bits(bits)
    }
}

/// f32 to the 19 bits that a tensor core takes of it: ties away from zero.
pub fn tf32_away(x: f32) -> f32 {
    if x.is_finite() {
        f32::from_bits(x.to_bits().wrapping_add(0x1000) & !0x1FFF)
    } else {
        x
    }
}

/// As `tf32_away`, with ties to even.
pub fn tf32_even(x: f32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0xFFF + (bits >> 13 & 1)) & !0x1FFF)
}

/// What a tensor core does to operands that were not rounded: it ignores the low bits.
pub fn tf32_cut(x: f32) -> f32 {
    if x.is_nan() {
        x
    } else {
        f32::from_bits(x.to_bits() & !0x1FFF)
    }
}

/// An 8-bit float of the given exponent and mantissa bits, saturating at its largest
/// finite value as `.satfinite` asks; `top` is the largest finite encoding.
pub fn to_fp8(x: f64, mantissa: i32, bias: i32, top: u8) -> u8 {
    let sign = (x.is_sign_negative() as u8) << 7;
    if x.is_nan() {
        return 0x7F | sign;
    }
    let a = x.abs();
    let exponent = if a == 0.0 {
        -bias
    } else {
        (a.log2().floor() as i32).max(1 - bias)
    };
    let unit = 2f64.powi(exponent.max(1 - bias) - mantissa);
    let q = (a / unit).round_ties_even() * unit;
    if q > from_fp8(top, mantissa, bias) {
        return sign | top;
    }
    (0..=top)
        .rev()
        .find(|&b| from_fp8(b, mantissa, bias) <= q)
        .map_or(sign, |b| sign | b)
}

pub fn from_fp8(bits: u8, mantissa: i32, bias: i32) -> f64 {
    let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
    let body = (bits & 0x7F) as i32;
    if mantissa == 3 && body == 0x7F {
        return f64::NAN;
    }
    if mantissa == 2 && body >= 0x7C {
        return if body == 0x7C {
            sign * f64::INFINITY
        } else {
            f64::NAN
        };
    }
    let exponent = body >> mantissa;
    let fraction = (body & ((1 << mantissa) - 1)) as f64 / (1 << mantissa) as f64;
    if exponent == 0 {
        sign * fraction * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + fraction) * 2f64.powi(exponent - bias)
    }
}
