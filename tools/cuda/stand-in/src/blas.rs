//! cuBLAS: matrix and vector products by plain loops.

use crate::ptx::{tf32_even, to_odd};
use crate::{device, memory, stream};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ffi::{CStr, c_char, c_int, c_longlong, c_void};

const SUCCESS: c_int = 0;
const NOT_INITIALIZED: c_int = 1;
const INVALID: c_int = 7;
const FAILED: c_int = 13;
const NOT_SUPPORTED: c_int = 15;

pub struct Handle {
    stream: usize,
    math: c_int,
    /// Scalars lie in device memory and are read when the work is done.
    device_scalars: c_int,
    atomics: c_int,
}

/// Element types by their numbers in `cudaDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    F32,
    F64,
    F16,
    Bf16,
}

impl Type {
    fn of(number: c_int) -> Option<Type> {
        Some(match number {
            0 => Type::F32,
            1 => Type::F64,
            2 => Type::F16,
            14 => Type::Bf16,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Type::F64 => 8,
            Type::F32 => 4,
            _ => 2,
        }
    }

    unsafe fn read(self, base: u64, index: usize) -> f64 {
        unsafe {
            match self {
                Type::F32 => *(base as *const f32).add(index) as f64,
                Type::F64 => *(base as *const f64).add(index),
                Type::F16 => (*(base as *const f16).add(index)).to_f64(),
                Type::Bf16 => (*(base as *const bf16).add(index)).to_f64(),
            }
        }
    }

    unsafe fn write(self, base: u64, index: usize, value: f64) {
        unsafe {
            match self {
                Type::F32 => *(base as *mut f32).add(index) = value as f32,
                Type::F64 => *(base as *mut f64).add(index) = value,
                Type::F16 => *(base as *mut f16).add(index) = f16::from_f32(to_odd(value)),
                Type::Bf16 => *(base as *mut bf16).add(index) = bf16::from_f32(to_odd(value)),
            }
        }
    }
}

/// What the tensor cores keep of f32 inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inputs {
    Whole,
    Tf32,
    F16,
    Bf16,
}

impl Inputs {
    fn cut(self, x: f32) -> f32 {
        match self {
            Inputs::Whole => x,
            Inputs::Tf32 => tf32_even(x),
            Inputs::F16 => f16::from_f32(x).to_f32(),
            Inputs::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}

/// A scalar: its value, or where it will lie when it is needed.
#[derive(Clone, Copy)]
enum Scalar {
    Known(f64),
    At(u64, Type),
}

impl Scalar {
    unsafe fn new(handle: &Handle, at: *const c_void, ty: Type) -> Scalar {
        if handle.device_scalars != 0 {
            Scalar::At(at as u64, ty)
        } else {
            Scalar::Known(unsafe { ty.read(at as u64, 0) })
        }
    }

    fn get(self) -> f64 {
        match self {
            Scalar::Known(v) => v,
            Scalar::At(at, ty) if memory::check("a scalar", at, ty.size() as u64) => unsafe {
                ty.read(at, 0)
            },
            Scalar::At(..) => f64::NAN,
        }
    }
}

/// A column-major matrix as it is given: whether it is to be transposed, its leading
/// dimension and type.
#[derive(Clone, Copy)]
struct Given {
    transposed: bool,
    ld: usize,
    ty: Type,
}

impl Given {
    /// Bytes that a rows x columns result of the operation takes up.
    fn bytes(&self, rows: usize, columns: usize) -> u64 {
        let (r, c) = if self.transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        if r == 0 || c == 0 {
            0
        } else {
            (((c - 1) * self.ld + r) * self.ty.size()) as u64
        }
    }

    fn fits(&self, rows: usize, columns: usize) -> bool {
        self.ld >= if self.transposed { columns } else { rows }.max(1)
    }
}

pub trait Real: Copy + Send + Sync + 'static {
    const ZERO: Self;
    fn from(v: f64) -> Self;
    fn into(self) -> f64;
    fn fma(self, a: Self, b: Self) -> Self;
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    fn from(v: f64) -> f32 {
        v as f32
    }
    fn into(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32) -> f32 {
        if cfg!(target_feature = "fma") {
            a.mul_add(b, self)
        } else {
            self + a * b
        }
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    fn from(v: f64) -> f64 {
        v
    }
    fn into(self) -> f64 {
        self
    }
    #[inline(always)]
    fn fma(self, a: f64, b: f64) -> f64 {
        if cfg!(target_feature = "fma") {
            a.mul_add(b, self)
        } else {
            self + a * b
        }
    }
}

/// The matrix that an operand stands for, its columns contiguous.
fn pack<T: Real>(g: Given, base: u64, rows: usize, columns: usize, cut: Inputs) -> Vec<T> {
    let mut out = vec![T::ZERO; rows * columns];
    out.par_chunks_mut(rows.max(1))
        .enumerate()
        .for_each(|(c, column)| {
            for (r, to) in column.iter_mut().enumerate() {
                let at = if g.transposed {
                    r * g.ld + c
                } else {
                    c * g.ld + r
                };
                let v = unsafe { g.ty.read(base, at) };
                *to = T::from(if cut == Inputs::Whole {
                    v
                } else {
                    cut.cut(v as f32) as f64
                });
            }
        });
    out
}

const ROWS: usize = 256;
const COLUMNS: usize = 4;

/// A * B with the columns of A (m x k) and of B (k x n) contiguous.
pub fn product<T: Real>(a: &[T], b: &[T], (m, n, k): (usize, usize, usize)) -> Vec<T> {
    let mut out = vec![T::ZERO; m * n];
    if m == 0 || k == 0 {
        return out;
    }
    out.par_chunks_mut(m * COLUMNS)
        .enumerate()
        .for_each(|(chunk, out)| {
            let first = chunk * COLUMNS;
            let width = out.len() / m;
            let mut start = 0;
            while start < m {
                let rows = ROWS.min(m - start);
                let mut sums = [[T::ZERO; ROWS]; COLUMNS];
                for d in 0..k {
                    let column = &a[d * m + start..d * m + start + rows];
                    for (c, sums) in sums.iter_mut().enumerate().take(width) {
                        let factor = b[(first + c) * k + d];
                        for (s, &v) in sums[..rows].iter_mut().zip(column) {
                            *s = s.fma(v, factor);
                        }
                    }
                }
                for c in 0..width {
                    out[c * m + start..c * m + start + rows].copy_from_slice(&sums[c][..rows]);
                }
                start += rows;
            }
        });
    out
}

#[derive(Clone, Copy)]
struct Gemm {
    a: Given,
    b: Given,
    c: Given,
    m: usize,
    n: usize,
    k: usize,
    alpha: Scalar,
    beta: Scalar,
    double: bool,
    cut: Inputs,
    /// Write only this triangle: 0 the lower one, 1 the upper one.
    triangle: Option<c_int>,
}

impl Gemm {
    fn valid(&self) -> bool {
        self.a.fits(self.m, self.k) && self.b.fits(self.k, self.n) && self.c.fits(self.m, self.n)
    }

    fn run(&self, a: u64, b: u64, c: u64) -> c_int {
        let (m, n, k) = (self.m, self.n, self.k);
        if m == 0 || n == 0 {
            return device::SUCCESS;
        }
        let (alpha, beta) = (self.alpha.get(), self.beta.get());
        let reads = alpha != 0.0 && k > 0;
        let good = (!reads
            || memory::check("GEMM, A", a, self.a.bytes(m, k))
                && memory::check("GEMM, B", b, self.b.bytes(k, n)))
            && memory::check("GEMM, C", c, self.c.bytes(m, n));
        if !good {
            return device::ILLEGAL_ADDRESS;
        }
        if self.double {
            self.finish::<f64>(a, b, c, alpha, beta, reads)
        } else {
            self.finish::<f32>(a, b, c, alpha, beta, reads)
        }
        device::SUCCESS
    }

    fn finish<T: Real>(&self, a: u64, b: u64, c: u64, alpha: f64, beta: f64, reads: bool) {
        let (m, n, k) = (self.m, self.n, self.k);
        let ab = if reads {
            let a = pack::<T>(self.a, a, m, k, self.cut);
            let b = pack::<T>(self.b, b, k, n, self.cut);
            product(&a, &b, (m, n, k))
        } else {
            vec![T::ZERO; m * n]
        };
        for j in 0..n {
            let rows = match self.triangle {
                None => 0..m,
                Some(0) => j..m,
                Some(_) => 0..(j + 1).min(m),
            };
            for i in rows {
                let at = j * self.c.ld + i;
                let v: f64 = alpha * Real::into(ab[j * m + i]);
                // With beta 0 the old value is not looked at: it may be NaN.
                let old = if beta == 0.0 {
                    0.0
                } else {
                    beta * unsafe { self.c.ty.read(c, at) }
                };
                let v = if self.double {
                    v + old
                } else {
                    (v + old) as f32 as f64
                };
                unsafe { self.c.ty.write(c, at, v) };
            }
        }
    }
}

fn transposed(op: c_int) -> bool {
    op == 1 || op == 2
}

fn status(error: c_int) -> c_int {
    if error == device::SUCCESS {
        SUCCESS
    } else {
        FAILED
    }
}

/// How a compute type works: in f64 or not, the type of its scalars, and its inputs.
fn compute(kind: c_int, math: c_int, input: Type) -> Option<(bool, Type, Inputs)> {
    Some(match kind {
        70 | 71 => (true, Type::F64, Inputs::Whole),
        64 | 65 => (false, Type::F16, Inputs::Whole),
        68 if math & 15 == 3 && input == Type::F32 => (false, Type::F32, Inputs::Tf32),
        68 | 69 => (false, Type::F32, Inputs::Whole),
        74 => (false, Type::F32, Inputs::F16),
        75 => (false, Type::F32, Inputs::Bf16),
        77 => (false, Type::F32, Inputs::Tf32),
        _ => return None,
    })
}

/// Where the matrices of a batch are.
#[derive(Clone, Copy)]
enum Batch {
    Strided {
        base: [u64; 3],
        strides: [i64; 3],
    },
    /// Arrays of pointers in device memory.
    Pointers([u64; 3]),
}

impl Batch {
    fn at(&self, n: usize, sizes: [usize; 3]) -> Option<[u64; 3]> {
        match *self {
            Batch::Strided { base, strides } => Some(std::array::from_fn(|i| {
                base[i].wrapping_add((strides[i] * n as i64 * sizes[i] as i64) as u64)
            })),
            Batch::Pointers(arrays) => {
                let good = arrays
                    .iter()
                    .all(|&a| memory::check("a batch's pointers", a + n as u64 * 8, 8));
                good.then(|| arrays.map(|a| unsafe { *(a as *const u64).add(n) }))
            }
        }
    }
}

unsafe fn submit(handle: *const Handle, gemm: Gemm, batch: Batch, count: usize) -> c_int {
    if !gemm.valid() {
        device::report("GEMM: a leading dimension is too small");
        return INVALID;
    }
    let on = unsafe { (*handle).stream };
    status(stream::submit(on, move || {
        let sizes = [gemm.a.ty.size(), gemm.b.ty.size(), gemm.c.ty.size()];
        let one = |n: usize| match batch.at(n, sizes) {
            Some([a, b, c]) => gemm.run(a, b, c),
            None => device::ILLEGAL_ADDRESS,
        };
        (0..count)
            .into_par_iter()
            .map(one)
            .find_any(|&e| e != 0)
            .unwrap_or(0)
    }))
}

unsafe fn gemm_ex(
    handle: *const Handle,
    ops: [c_int; 2],
    sizes: [i64; 3],
    scalars: [*const c_void; 2],
    types: [c_int; 3],
    lds: [i64; 3],
    kind: c_int,
    batch: Batch,
    count: i64,
) -> c_int {
    if handle.is_null() {
        return NOT_INITIALIZED;
    }
    let h = unsafe { &*handle };
    if sizes.iter().chain(&lds).any(|&s| s < 0) || count < 0 {
        return INVALID;
    }
    let [Some(at), Some(bt), Some(ct)] = types.map(Type::of) else {
        return NOT_SUPPORTED;
    };
    let Some((double, scalar, cut)) = compute(kind, h.math, at) else {
        return NOT_SUPPORTED;
    };
    let given = |n: usize, ty| Given {
        transposed: n < 2 && transposed(ops[n.min(1)]),
        ld: lds[n] as usize,
        ty,
    };
    let [m, n, k] = sizes.map(|s| s as usize);
    let gemm = Gemm {
        a: given(0, at),
        b: given(1, bt),
        c: given(2, ct),
        m,
        n,
        k,
        alpha: unsafe { Scalar::new(h, scalars[0], scalar) },
        beta: unsafe { Scalar::new(h, scalars[1], scalar) },
        double,
        cut,
        triangle: None,
    };
    unsafe { submit(handle, gemm, batch, count as usize) }
}

macro_rules! export {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> c_int {
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )*};
}

macro_rules! gemms {
    ($($int:ty: $ex:ident, $strided:ident, $batched:ident;)*) => {$(export! {
        fn $ex(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const c_void, a: u64, at: c_int, lda: $int, b: u64, bt: c_int, ldb: $int,
            beta: *const c_void, c: u64, ct: c_int, ldc: $int, kind: c_int, _algorithm: c_int,
        ) {
            let batch = Batch::Strided { base: [a, b, c], strides: [0; 3] };
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64], [alpha, beta], [at, bt, ct],
                [lda as i64, ldb as i64, ldc as i64], kind, batch, 1,
            )
        }

        fn $strided(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const c_void, a: u64, at: c_int, lda: $int, sa: c_longlong, b: u64,
            bt: c_int, ldb: $int, sb: c_longlong, beta: *const c_void, c: u64, ct: c_int,
            ldc: $int, sc: c_longlong, count: $int, kind: c_int, _algorithm: c_int,
        ) {
            let batch = Batch::Strided { base: [a, b, c], strides: [sa, sb, sc] };
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64], [alpha, beta], [at, bt, ct],
                [lda as i64, ldb as i64, ldc as i64], kind, batch, count as i64,
            )
        }

        fn $batched(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const c_void, a: u64, at: c_int, lda: $int, b: u64, bt: c_int, ldb: $int,
            beta: *const c_void, c: u64, ct: c_int, ldc: $int, count: $int, kind: c_int,
            _algorithm: c_int,
        ) {
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64], [alpha, beta], [at, bt, ct],
                [lda as i64, ldb as i64, ldc as i64], kind, Batch::Pointers([a, b, c]),
                count as i64,
            )
        }
    })*};
}

gemms! {
    c_int: cublasGemmEx, cublasGemmStridedBatchedEx, cublasGemmBatchedEx;
    i64: cublasGemmEx_64, cublasGemmStridedBatchedEx_64, cublasGemmBatchedEx_64;
}

/// Functions of one element type, for 32- and 64-bit sizes.
macro_rules! typed {
    ($($t:ty, $number:expr, $kind:expr, $int:ty: $gemm:ident, $strided:ident, $batched:ident,
       $syrk:ident, $syrkx:ident, $gemv:ident, $ger:ident, $dot:ident, $nrm2:ident, $asum:ident,
       $axpy:ident, $scal:ident, $copy:ident, $geam:ident, $dgmm:ident, $trsm:ident;)*) => {$(
    export! {
        fn $gemm(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const $t, a: u64, lda: $int, b: u64, ldb: $int, beta: *const $t, c: u64,
            ldc: $int,
        ) {
            let batch = Batch::Strided { base: [a, b, c], strides: [0; 3] };
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64],
                [alpha as *const c_void, beta as *const c_void], [$number; 3],
                [lda as i64, ldb as i64, ldc as i64], $kind, batch, 1,
            )
        }

        fn $strided(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const $t, a: u64, lda: $int, sa: c_longlong, b: u64, ldb: $int,
            sb: c_longlong, beta: *const $t, c: u64, ldc: $int, sc: c_longlong, count: $int,
        ) {
            let batch = Batch::Strided { base: [a, b, c], strides: [sa, sb, sc] };
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64],
                [alpha as *const c_void, beta as *const c_void], [$number; 3],
                [lda as i64, ldb as i64, ldc as i64], $kind, batch, count as i64,
            )
        }

        fn $batched(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, k: $int,
            alpha: *const $t, a: u64, lda: $int, b: u64, ldb: $int, beta: *const $t, c: u64,
            ldc: $int, count: $int,
        ) {
            gemm_ex(
                h, [ta, tb], [m as i64, n as i64, k as i64],
                [alpha as *const c_void, beta as *const c_void], [$number; 3],
                [lda as i64, ldb as i64, ldc as i64], $kind, Batch::Pointers([a, b, c]),
                count as i64,
            )
        }

        fn $syrk(
            h: *const Handle, uplo: c_int, trans: c_int, n: $int, k: $int, alpha: *const $t,
            a: u64, lda: $int, beta: *const $t, c: u64, ldc: $int,
        ) {
            $syrkx(h, uplo, trans, n, k, alpha, a, lda, a, lda, beta, c, ldc)
        }

        fn $syrkx(
            h: *const Handle, uplo: c_int, trans: c_int, n: $int, k: $int, alpha: *const $t,
            a: u64, lda: $int, b: u64, ldb: $int, beta: *const $t, c: u64, ldc: $int,
        ) {
            if h.is_null() {
                return NOT_INITIALIZED;
            }
            let Some((double, ty, cut)) = Type::of($number)
                .and_then(|ty| compute($kind, (*h).math, ty)) else { return NOT_SUPPORTED };
            let given = |transposed, ld: $int| Given { transposed, ld: ld as usize, ty };
            let gemm = Gemm {
                a: given(transposed(trans), lda),
                b: given(!transposed(trans), ldb),
                c: given(false, ldc),
                m: n as usize,
                n: n as usize,
                k: k as usize,
                alpha: Scalar::new(&*h, alpha as *const c_void, ty),
                beta: Scalar::new(&*h, beta as *const c_void, ty),
                double,
                cut,
                triangle: Some(uplo),
            };
            submit(h, gemm, Batch::Strided { base: [a, b, c], strides: [0; 3] }, 1)
        }

        fn $gemv(
            h: *const Handle, trans: c_int, m: $int, n: $int, alpha: *const $t, a: u64,
            lda: $int, x: u64, incx: $int, beta: *const $t, y: u64, incy: $int,
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let (alpha, beta) = (
                Scalar::new(&*h, alpha as *const c_void, ty),
                Scalar::new(&*h, beta as *const c_void, ty),
            );
            let (m, n, lda) = (m as usize, n as usize, lda as usize);
            let (rows, columns) = if transposed(trans) { (n, m) } else { (m, n) };
            let (x, y) = (Strided::new(x, columns, incx as i64), Strided::new(y, rows, incy as i64));
            let g = Given { transposed: transposed(trans), ld: lda, ty };
            status(stream::submit((*h).stream, move || {
                let good = x.check::<$t>() && y.check::<$t>()
                    && memory::check("gemv, A", a, g.bytes(rows, columns));
                if !good {
                    return device::ILLEGAL_ADDRESS;
                }
                let (alpha, beta) = (alpha.get(), beta.get());
                for i in 0..rows {
                    let sum: f64 = (0..columns)
                        .map(|j| {
                            let at = if g.transposed { i * lda + j } else { j * lda + i };
                            *(a as *const $t).add(at) as f64 * *x.at::<$t>(j) as f64
                        })
                        .sum();
                    let to = y.at::<$t>(i);
                    let old = if beta == 0.0 { 0.0 } else { beta * *to as f64 };
                    *to = (alpha * sum + old) as $t;
                }
                device::SUCCESS
            }))
        }

        fn $ger(
            h: *const Handle, m: $int, n: $int, alpha: *const $t, x: u64, incx: $int, y: u64,
            incy: $int, a: u64, lda: $int,
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let alpha = Scalar::new(&*h, alpha as *const c_void, ty);
            let (m, n, lda) = (m as usize, n as usize, lda as usize);
            let (x, y) = (Strided::new(x, m, incx as i64), Strided::new(y, n, incy as i64));
            let g = Given { transposed: false, ld: lda, ty };
            status(stream::submit((*h).stream, move || {
                let good = x.check::<$t>() && y.check::<$t>()
                    && memory::check("ger, A", a, g.bytes(m, n));
                if !good {
                    return device::ILLEGAL_ADDRESS;
                }
                let alpha = alpha.get() as $t;
                for j in 0..n {
                    for i in 0..m {
                        *(a as *mut $t).add(j * lda + i) += alpha * *x.at::<$t>(i) * *y.at::<$t>(j);
                    }
                }
                device::SUCCESS
            }))
        }

        fn $dot(h: *const Handle, n: $int, x: u64, incx: $int, y: u64, incy: $int, r: u64) {
            let (x, y) = (
                Strided::new(x, n as usize, incx as i64),
                Strided::new(y, n as usize, incy as i64),
            );
            reduce::<$t>(h, r, &[x, y], move || {
                (0..x.n).map(|i| *x.at::<$t>(i) as f64 * *y.at::<$t>(i) as f64).sum::<f64>()
            })
        }

        fn $nrm2(h: *const Handle, n: $int, x: u64, incx: $int, r: u64) {
            let x = Strided::new(x, n as usize, incx as i64);
            reduce::<$t>(h, r, &[x], move || {
                (0..x.n).map(|i| (*x.at::<$t>(i) as f64).powi(2)).sum::<f64>().sqrt()
            })
        }

        fn $asum(h: *const Handle, n: $int, x: u64, incx: $int, r: u64) {
            let x = Strided::new(x, n as usize, incx as i64);
            reduce::<$t>(h, r, &[x], move || {
                (0..x.n).map(|i| (*x.at::<$t>(i) as f64).abs()).sum::<f64>()
            })
        }

        fn $axpy(
            h: *const Handle, n: $int, alpha: *const $t, x: u64, incx: $int, y: u64, incy: $int
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let alpha = Scalar::new(&*h, alpha as *const c_void, ty);
            let (x, y) = (
                Strided::new(x, n as usize, incx as i64),
                Strided::new(y, n as usize, incy as i64),
            );
            status(stream::submit((*h).stream, move || {
                if !x.check::<$t>() || !y.check::<$t>() {
                    return device::ILLEGAL_ADDRESS;
                }
                let alpha = alpha.get() as $t;
                for i in 0..x.n {
                    *y.at::<$t>(i) += alpha * *x.at::<$t>(i);
                }
                device::SUCCESS
            }))
        }

        fn $scal(h: *const Handle, n: $int, alpha: *const $t, x: u64, incx: $int) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let alpha = Scalar::new(&*h, alpha as *const c_void, ty);
            let x = Strided::new(x, n as usize, incx as i64);
            status(stream::submit((*h).stream, move || {
                if !x.check::<$t>() {
                    return device::ILLEGAL_ADDRESS;
                }
                let alpha = alpha.get() as $t;
                for i in 0..x.n {
                    *x.at::<$t>(i) *= alpha;
                }
                device::SUCCESS
            }))
        }

        fn $copy(h: *const Handle, n: $int, x: u64, incx: $int, y: u64, incy: $int) {
            let (x, y) = (
                Strided::new(x, n as usize, incx as i64),
                Strided::new(y, n as usize, incy as i64),
            );
            status(stream::submit((*h).stream, move || {
                if !x.check::<$t>() || !y.check::<$t>() {
                    return device::ILLEGAL_ADDRESS;
                }
                for i in 0..x.n {
                    *y.at::<$t>(i) = *x.at::<$t>(i);
                }
                device::SUCCESS
            }))
        }

        fn $geam(
            h: *const Handle, ta: c_int, tb: c_int, m: $int, n: $int, alpha: *const $t, a: u64,
            lda: $int, beta: *const $t, b: u64, ldb: $int, c: u64, ldc: $int,
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let (alpha, beta) = (
                Scalar::new(&*h, alpha as *const c_void, ty),
                Scalar::new(&*h, beta as *const c_void, ty),
            );
            let (m, n) = (m as usize, n as usize);
            let given = |t: c_int, ld: $int| Given { transposed: transposed(t), ld: ld as usize, ty };
            let (ga, gb, gc) = (given(ta, lda), given(tb, ldb), given(0, ldc));
            if !ga.fits(m, n) || !gb.fits(m, n) || !gc.fits(m, n) {
                return INVALID;
            }
            status(stream::submit((*h).stream, move || {
                let (alpha, beta) = (alpha.get() as $t, beta.get() as $t);
                let good = (alpha == 0.0 || memory::check("geam, A", a, ga.bytes(m, n)))
                    && (beta == 0.0 || memory::check("geam, B", b, gb.bytes(m, n)))
                    && memory::check("geam, C", c, gc.bytes(m, n));
                if !good {
                    return device::ILLEGAL_ADDRESS;
                }
                let part = |f: $t, g: Given, base: u64, i: usize, j: usize| -> $t {
                    let at = if g.transposed { i * g.ld + j } else { j * g.ld + i };
                    if f == 0.0 { 0.0 } else { f * *(base as *const $t).add(at) }
                };
                // C may be A or B, where those are not transposed.
                for j in 0..n {
                    for i in 0..m {
                        let v = part(alpha, ga, a, i, j) + part(beta, gb, b, i, j);
                        *(c as *mut $t).add(j * gc.ld + i) = v;
                    }
                }
                device::SUCCESS
            }))
        }

        fn $dgmm(
            h: *const Handle, side: c_int, m: $int, n: $int, a: u64, lda: $int, x: u64,
            incx: $int, c: u64, ldc: $int,
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let (m, n) = (m as usize, n as usize);
            let given = |ld: $int| Given { transposed: false, ld: ld as usize, ty };
            let (ga, gc) = (given(lda), given(ldc));
            let x = Strided::new(x, if side == 0 { m } else { n }, incx as i64);
            status(stream::submit((*h).stream, move || {
                let good = x.check::<$t>()
                    && memory::check("dgmm, A", a, ga.bytes(m, n))
                    && memory::check("dgmm, C", c, gc.bytes(m, n));
                if !good {
                    return device::ILLEGAL_ADDRESS;
                }
                for j in 0..n {
                    for i in 0..m {
                        let f = *x.at::<$t>(if side == 0 { i } else { j });
                        *(c as *mut $t).add(j * gc.ld + i) = *(a as *const $t).add(j * ga.ld + i) * f;
                    }
                }
                device::SUCCESS
            }))
        }

        fn $trsm(
            h: *const Handle, side: c_int, uplo: c_int, trans: c_int, diag: c_int, m: $int,
            n: $int, alpha: *const $t, a: u64, lda: $int, b: u64, ldb: $int,
        ) {
            let ty = if size_of::<$t>() == 8 { Type::F64 } else { Type::F32 };
            let alpha = Scalar::new(&*h, alpha as *const c_void, ty);
            let (m, n, lda, ldb) = (m as usize, n as usize, lda as usize, ldb as usize);
            let size = if side == 0 { m } else { n };
            let given = move |ld| Given { transposed: false, ld, ty };
            if !given(lda).fits(size, size) || !given(ldb).fits(m, n) {
                return INVALID;
            }
            status(stream::submit((*h).stream, move || {
                let good = memory::check("trsm, A", a, given(lda).bytes(size, size))
                    && memory::check("trsm, B", b, given(ldb).bytes(m, n));
                if !good {
                    return device::ILLEGAL_ADDRESS;
                }
                // On the right it is the transposed system, row by row of B.
                let flipped = transposed(trans) != (side == 1);
                let entry = |i: usize, j: usize| {
                    let at = if flipped { i * lda + j } else { j * lda + i };
                    *(a as *const $t).add(at) as f64
                };
                let lower = (uplo == 0) != flipped;
                let alpha = alpha.get();
                for v in 0..if side == 0 { n } else { m } {
                    let at = |i: usize| {
                        (b as *mut $t).add(if side == 0 { v * ldb + i } else { i * ldb + v })
                    };
                    for s in 0..size {
                        let i = if lower { s } else { size - 1 - s };
                        let mut sum = alpha * *at(i) as f64;
                        for j in if lower { 0..i } else { i + 1..size } {
                            sum -= entry(i, j) * *at(j) as f64;
                        }
                        *at(i) = if diag == 1 { sum } else { sum / entry(i, i) } as $t;
                    }
                }
                device::SUCCESS
            }))
        }
    })*};
}

typed! {
    f32, 0, 68, c_int: cublasSgemm_v2, cublasSgemmStridedBatched, cublasSgemmBatched,
        cublasSsyrk_v2, cublasSsyrkx, cublasSgemv_v2, cublasSger_v2, cublasSdot_v2,
        cublasSnrm2_v2, cublasSasum_v2, cublasSaxpy_v2, cublasSscal_v2, cublasScopy_v2,
        cublasSgeam, cublasSdgmm, cublasStrsm_v2;
    f32, 0, 68, i64: cublasSgemm_v2_64, cublasSgemmStridedBatched_64, cublasSgemmBatched_64,
        cublasSsyrk_v2_64, cublasSsyrkx_64, cublasSgemv_v2_64, cublasSger_v2_64,
        cublasSdot_v2_64, cublasSnrm2_v2_64, cublasSasum_v2_64, cublasSaxpy_v2_64,
        cublasSscal_v2_64, cublasScopy_v2_64, cublasSgeam_64, cublasSdgmm_64, cublasStrsm_v2_64;
    f64, 1, 70, c_int: cublasDgemm_v2, cublasDgemmStridedBatched, cublasDgemmBatched,
        cublasDsyrk_v2, cublasDsyrkx, cublasDgemv_v2, cublasDger_v2, cublasDdot_v2,
        cublasDnrm2_v2, cublasDasum_v2, cublasDaxpy_v2, cublasDscal_v2, cublasDcopy_v2,
        cublasDgeam, cublasDdgmm, cublasDtrsm_v2;
    f64, 1, 70, i64: cublasDgemm_v2_64, cublasDgemmStridedBatched_64, cublasDgemmBatched_64,
        cublasDsyrk_v2_64, cublasDsyrkx_64, cublasDgemv_v2_64, cublasDger_v2_64,
        cublasDdot_v2_64, cublasDnrm2_v2_64, cublasDasum_v2_64, cublasDaxpy_v2_64,
        cublasDscal_v2_64, cublasDcopy_v2_64, cublasDgeam_64, cublasDdgmm_64, cublasDtrsm_v2_64;
}

/// A vector with an increment; a negative one starts from the far end, as in BLAS.
#[derive(Clone, Copy)]
struct Strided {
    base: u64,
    n: usize,
    step: i64,
}

impl Strided {
    fn new(base: u64, n: usize, step: i64) -> Strided {
        Strided { base, n, step }
    }

    fn at<T>(&self, i: usize) -> *mut T {
        let i = if self.step < 0 { self.n - 1 - i } else { i };
        (self.base as *mut T).wrapping_add(i * self.step.unsigned_abs() as usize)
    }

    fn check<T>(&self) -> bool {
        let n = match self.n {
            0 => 0,
            n => (n - 1) * self.step.unsigned_abs() as usize + 1,
        };
        memory::check("a vector", self.base, (n * size_of::<T>()) as u64)
    }
}

/// Writes a reduction's result to host or device memory, as the pointer mode says.
unsafe fn reduce<T: FromF64>(
    handle: *const Handle,
    result: u64,
    vectors: &[Strided],
    sum: impl Fn() -> f64 + Send + Sync + 'static,
) -> c_int {
    let h = unsafe { &*handle };
    let on_device = h.device_scalars != 0;
    let vectors = vectors.to_vec();
    status(stream::submit(h.stream, move || {
        let good = vectors.iter().all(Strided::check::<T>)
            && (!on_device || memory::check("a result", result, size_of::<T>() as u64));
        if !good {
            return device::ILLEGAL_ADDRESS;
        }
        unsafe { (result as *mut T).write(T::from_f64(sum())) };
        device::SUCCESS
    }))
}

trait FromF64: 'static {
    fn from_f64(v: f64) -> Self;
}

impl FromF64 for f32 {
    fn from_f64(v: f64) -> f32 {
        v as f32
    }
}

impl FromF64 for f64 {
    fn from_f64(v: f64) -> f64 {
        v
    }
}

export! {
    fn cublasCreate_v2(handle: *mut *mut Handle) {
        let h = Handle { stream: 0, math: 0, device_scalars: 0, atomics: 0 };
        *handle = Box::into_raw(Box::new(h));
        SUCCESS
    }

    fn cublasDestroy_v2(handle: *mut Handle) {
        if handle.is_null() {
            return NOT_INITIALIZED;
        }
        drop(Box::from_raw(handle));
        SUCCESS
    }

    fn cublasSetStream_v2(handle: *mut Handle, stream: usize) {
        (*handle).stream = stream;
        SUCCESS
    }

    fn cublasGetStream_v2(handle: *mut Handle, stream: *mut usize) {
        *stream = (*handle).stream;
        SUCCESS
    }

    fn cublasGetVersion_v2(_handle: *mut Handle, version: *mut c_int) {
        *version = 130000;
        SUCCESS
    }

    fn cublasSetMathMode(handle: *mut Handle, mode: c_int) {
        (*handle).math = mode;
        SUCCESS
    }

    fn cublasGetMathMode(handle: *mut Handle, mode: *mut c_int) {
        *mode = (*handle).math;
        SUCCESS
    }

    fn cublasSetPointerMode_v2(handle: *mut Handle, mode: c_int) {
        (*handle).device_scalars = mode;
        SUCCESS
    }

    fn cublasGetPointerMode_v2(handle: *mut Handle, mode: *mut c_int) {
        *mode = (*handle).device_scalars;
        SUCCESS
    }

    fn cublasSetAtomicsMode(handle: *mut Handle, mode: c_int) {
        (*handle).atomics = mode;
        SUCCESS
    }

    fn cublasGetAtomicsMode(handle: *mut Handle, mode: *mut c_int) {
        *mode = (*handle).atomics;
        SUCCESS
    }

    fn cublasSetWorkspace_v2(_handle: *mut Handle, workspace: u64, bytes: usize) {
        if memory::check("cublasSetWorkspace", workspace, bytes as u64) { SUCCESS } else { INVALID }
    }
}

fn status_text(status: c_int) -> &'static CStr {
    match status {
        SUCCESS => c"CUBLAS_STATUS_SUCCESS",
        NOT_INITIALIZED => c"CUBLAS_STATUS_NOT_INITIALIZED",
        INVALID => c"CUBLAS_STATUS_INVALID_VALUE",
        FAILED => c"CUBLAS_STATUS_EXECUTION_FAILED",
        NOT_SUPPORTED => c"CUBLAS_STATUS_NOT_SUPPORTED",
        _ => c"CUBLAS_STATUS_UNKNOWN",
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasGetStatusName(status: c_int) -> *const c_char {
    status_text(status).as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasGetStatusString(status: c_int) -> *const c_char {
    status_text(status).as_ptr()
}
