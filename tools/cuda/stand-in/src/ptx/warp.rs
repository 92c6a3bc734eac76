//! Instructions that the lanes of a warp do together.

use super::float;
use super::run::FailureKind;
use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Add,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F16,
    Bf16,
    Tf32,
    F64,
    S8,
    U8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Shuffle(Shuffle),
    Vote(Vote),
    Match {
        all: bool,
        wide: bool,
    },
    Reduce(Reduce),
    Elect,
    Barrier,
    ActiveMask,
    /// Rows, columns and depth; element of A and B; whether C and D are f16.
    Multiply {
        m: u8,
        n: u8,
        k: u8,
        element: Element,
        half: bool,
    },
    LoadMatrix {
        count: u8,
        transposed: bool,
    },
    StoreMatrix {
        count: u8,
        transposed: bool,
    },
}

impl Kind {
    /// Whether it takes those lanes that are at the same place, rather than a mask.
    pub fn is_convergence(self) -> bool {
        self == Kind::ActiveMask
    }
}

/// A warp instruction of one place in the program: its kind and the slots of its operands.
#[derive(Debug)]
pub struct WarpOp {
    pub kind: Kind,
    pub d: Vec<i32>,
    pub a: Vec<i32>,
    pub b: Vec<i32>,
    pub c: Vec<i32>,
    /// An offset to add to an address, or whether a predicate operand is negated.
    pub imm: i64,
}

type Lane<'a> = (u32, *mut u64, &'a WarpOp);

fn get(lane: &Lane, slot: i32) -> u64 {
    unsafe { *lane.1.offset(slot as isize) }
}

fn set(lane: &Lane, slot: i32, value: u64) {
    unsafe { *lane.1.offset(slot as isize) = value }
}

/// Does the instruction for the given lanes, which are in order of their numbers.
pub fn perform(
    lanes: &[Lane],
    mask: u32,
    shared: (*mut u8, u64),
) -> Result<(), (FailureKind, String)> {
    let kind = lanes[0].2.kind;
    match kind {
        Kind::Shuffle(how) => shuffle(lanes, how),
        Kind::Vote(how) => {
            let mut ballot = 0u32;
            for l in lanes {
                ballot |= ((get(l, l.2.a[0]) ^ l.2.imm as u64) as u32 & 1) << l.0;
            }
            let value = match how {
                Vote::All => (ballot == mask) as u64,
                Vote::Any => (ballot != 0) as u64,
                Vote::Uniform => (ballot == 0 || ballot == mask) as u64,
                Vote::Ballot => ballot as u64,
            };
            for l in lanes {
                set(l, l.2.d[0], value);
            }
        }
        Kind::Match { all, wide } => {
            let cut = |v: u64| if wide { v } else { v as u32 as u64 };
            let values: Vec<u64> = lanes.iter().map(|l| cut(get(l, l.2.a[0]))).collect();
            for (l, v) in lanes.iter().zip(&values) {
                let same = lanes
                    .iter()
                    .zip(&values)
                    .filter(|(_, o)| *o == v)
                    .fold(0u32, |m, (o, _)| m | 1 << o.0);
                let whole = same == mask;
                let value = if all && !whole { 0 } else { same as u64 };
                set(l, l.2.d[0], value);
                if let Some(&p) = l.2.d.get(1) {
                    set(l, p, whole as u64);
                }
            }
        }
        Kind::Reduce(how) => {
            let r = lanes
                .iter()
                .map(|l| get(l, l.2.a[0]) as u32)
                .reduce(|x, y| match how {
                    Reduce::Add => x.wrapping_add(y),
                    Reduce::MinU => x.min(y),
                    Reduce::MaxU => x.max(y),
                    Reduce::MinS => (x as i32).min(y as i32) as u32,
                    Reduce::MaxS => (x as i32).max(y as i32) as u32,
                    Reduce::And => x & y,
                    Reduce::Or => x | y,
                    Reduce::Xor => x ^ y,
                })
                .unwrap_or(0);
            for l in lanes {
                set(l, l.2.d[0], r as u64);
            }
        }
        Kind::Elect => {
            let first = lanes[0].0;
            for l in lanes {
                if let Some(&d) = l.2.d.get(1) {
                    set(l, d, first as u64);
                }
                set(l, l.2.d[0], (l.0 == first) as u64);
            }
        }
        Kind::Barrier => {}
        Kind::ActiveMask => {
            for l in lanes {
                set(l, l.2.d[0], mask as u64);
            }
        }
        Kind::Multiply { .. } | Kind::LoadMatrix { .. } | Kind::StoreMatrix { .. }
            if lanes.len() != 32 =>
        {
            let text = format!("only {} of 32 lanes take part", lanes.len());
            return Err((FailureKind::LaunchFailed, text));
        }
        Kind::Multiply {
            m,
            n,
            k,
            element,
            half,
        } => {
            multiply(lanes, (m as usize, n as usize, k as usize), element, half);
        }
        Kind::LoadMatrix { count, transposed } => {
            let at = |i: usize| row(&lanes[i], shared);
            for j in 0..count as usize {
                for l in lanes {
                    let mut value = 0u64;
                    for e in 0..2 {
                        let (r, c) = fragment(l.0 as usize, e, transposed);
                        let p = at(j * 8 + r)? as *const u16;
                        value |= (unsafe { p.add(c).read() } as u64) << (16 * e);
                    }
                    set(l, l.2.d[j], value);
                }
            }
        }
        Kind::StoreMatrix { count, transposed } => {
            let at = |i: usize| row(&lanes[i], shared);
            for j in 0..count as usize {
                for l in lanes {
                    let value = get(l, l.2.b[j]);
                    for e in 0..2 {
                        let (r, c) = fragment(l.0 as usize, e, transposed);
                        let p = at(j * 8 + r)? as *mut u16;
                        unsafe { p.add(c).write((value >> (16 * e)) as u16) };
                    }
                }
            }
        }
    }
    Ok(())
}

/// The place of a lane's element e of an 8x8 matrix.
fn fragment(lane: usize, e: usize, transposed: bool) -> (usize, usize) {
    let (r, c) = (lane / 4, lane % 4 * 2 + e);
    if transposed { (c, r) } else { (r, c) }
}

/// The row of eight 16-bit elements that a lane points to.
fn row(lane: &Lane, shared: (*mut u8, u64)) -> Result<*mut u8, (FailureKind, String)> {
    let mut address = get(lane, lane.2.a[0]).wrapping_add(lane.2.imm as u64);
    if address >= shared.0 as u64 {
        // A generic address.
        address -= shared.0 as u64;
    }
    if !address.is_multiple_of(16) {
        return Err((
            FailureKind::Misaligned,
            format!("a row at {address:#x}, misaligned"),
        ));
    }
    if address + 16 > shared.1 {
        let text = format!(
            "a row at {address:#x} of shared memory, of which there are {}",
            shared.1
        );
        return Err((FailureKind::IllegalAddress, text));
    }
    Ok(shared.0.wrapping_add(address as usize))
}

fn shuffle(lanes: &[Lane], how: Shuffle) {
    let mut values = [None; 32];
    for l in lanes {
        values[l.0 as usize] = Some(get(l, l.2.a[0]) as u32);
    }
    for l in lanes {
        let lane = l.0 as i32;
        let (b, c) = (get(l, l.2.b[0]) as i32 & 31, get(l, l.2.c[0]) as i32);
        let (clamp, segment) = (c & 31, c >> 8 & 31);
        let max = (lane & segment) | (clamp & !segment);
        let min = lane & segment;
        let (from, valid) = match how {
            Shuffle::Up => (lane - b, lane - b >= max),
            Shuffle::Down => (lane + b, lane + b <= max),
            Shuffle::Butterfly => (lane ^ b, lane ^ b <= max),
            Shuffle::Index => {
                let j = min | (b & !segment);
                (j, j <= max)
            }
        };
        let from = if valid { from } else { lane };
        // Reading a lane that does not take part gives anything; NaN bits show it.
        let value = values[from as usize].unwrap_or(u32::MAX);
        set(l, l.2.d[0], value as u64);
        if let Some(&p) = l.2.d.get(1) {
            set(l, p, valid as u64);
        }
    }
}

/// D = A * B + C over the fragments of a warp, as the PTX ISA lays them out: the elements
/// of a group of four lanes are next to each other in a row of A and D, and in a column
/// of B.
fn multiply(lanes: &[Lane], (m, n, k): (usize, usize, usize), element: Element, half: bool) {
    let packed = match element {
        Element::F16 | Element::Bf16 => 2,
        Element::S8 | Element::U8 => 4,
        _ => 1,
    };
    let value = |bits: u64, i: usize| -> f64 {
        match element {
            Element::F16 => f16::from_bits((bits >> (16 * i)) as u16).to_f64(),
            Element::Bf16 => bf16::from_bits((bits >> (16 * i)) as u16).to_f64(),
            Element::Tf32 => float::tf32_cut(f32::from_bits(bits as u32)) as f64,
            Element::F64 => f64::from_bits(bits),
            Element::S8 => (bits >> (8 * i)) as i8 as f64,
            Element::U8 => (bits >> (8 * i)) as u8 as f64,
        }
    };
    let mut a = vec![0.0; m * k];
    let mut b = vec![0.0; k * n];
    for l in lanes {
        let (group, within) = (l.0 as usize / 4, l.0 as usize % 4);
        let blocks = m / 8;
        for (r, &slot) in l.2.a.iter().enumerate() {
            for i in 0..packed {
                let row = group + 8 * (r % blocks);
                let column = within * packed + i + 4 * packed * (r / blocks);
                a[row * k + column] = value(get(l, slot), i);
            }
        }
        for (r, &slot) in l.2.b.iter().enumerate() {
            for i in 0..packed {
                let depth = within * packed + i + 4 * packed * r;
                b[depth * n + group] = value(get(l, slot), i);
            }
        }
    }
    for l in lanes {
        let (group, within) = (l.0 as usize / 4, l.0 as usize % 4);
        // Two neighbouring columns of each of the m/8 blocks of rows.
        let mut sums = [0.0; 4];
        let integer = matches!(element, Element::S8 | Element::U8);
        let old = |e: usize| -> f64 {
            if half {
                return f16::from_bits((get(l, l.2.c[e / 2]) >> (16 * (e % 2))) as u16).to_f64();
            }
            let bits = get(l, l.2.c[e]);
            match element {
                Element::F64 => f64::from_bits(bits),
                _ if integer => bits as i32 as f64,
                _ => f32::from_bits(bits as u32) as f64,
            }
        };
        for (e, sum) in sums.iter_mut().enumerate().take(m / 4) {
            let (row, column) = (group + 8 * (e / 2), within * 2 + e % 2);
            let products = (0..k).map(|d| (a[row * k + d], b[d * n + column]));
            *sum = if element == Element::F64 {
                products.fold(old(e), |s, (x, y)| x.mul_add(y, s))
            } else {
                products.fold(old(e), |s, (x, y)| s + x * y)
            };
        }
        for e in 0..m / 4 {
            if half {
                if e % 2 == 0 {
                    let lo = f16::from_f32(float::to_odd(sums[e])).to_bits() as u64;
                    let hi = f16::from_f32(float::to_odd(sums[e + 1])).to_bits() as u64;
                    set(l, l.2.d[e / 2], lo | hi << 16);
                }
                continue;
            }
            let bits = match element {
                Element::F64 => sums[e].to_bits(),
                _ if integer => sums[e] as i64 as i32 as u32 as u64,
                // Tensor cores cut off what f32 does not hold.
                _ => float::to_zero(sums[e]).to_bits() as u64,
            };
            set(l, l.2.d[e], bits);
        }
    }
}
