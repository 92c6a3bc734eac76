//! cuSOLVER: eigenvalues of symmetric matrices and singular values, worked out in f64.

use crate::driver::export;
use crate::{device, memory, stream};
use faer::{Mat, Side};
use rayon::prelude::*;
use std::ffi::{c_char, c_int, c_longlong};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 3;
const EXECUTION_FAILED: c_int = 6;
const NOT_SUPPORTED: c_int = 9;

/// Elements of every workspace, so that a caller's allocation of it is exercised.
const WORKSPACE: usize = 256;

pub struct Handle {
    stream: usize,
    deterministic: c_int,
}

/// Parameters of the Jacobi methods: accepted, and of no effect.
#[derive(Default)]
pub struct Jacobi {
    sweeps: c_int,
}

/// A real type by its number in `cudaDataType`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    F32,
    F64,
}

impl Type {
    fn of(number: c_int) -> Option<Type> {
        match number {
            0 => Some(Type::F32),
            1 => Some(Type::F64),
            _ => None,
        }
    }

    fn size(self) -> usize {
        if self == Type::F32 { 4 } else { 8 }
    }
}

/// Column-major values in device memory.
#[derive(Clone, Copy)]
struct Place {
    base: u64,
    ld: usize,
    ty: Type,
}

impl Place {
    fn check(&self, what: &str, rows: usize, columns: usize) -> bool {
        let n = if rows == 0 || columns == 0 {
            0
        } else {
            (columns - 1) * self.ld + rows
        };
        memory::check(what, self.base, (n * self.ty.size()) as u64)
    }

    fn get(&self, i: usize, j: usize) -> f64 {
        let at = j * self.ld + i;
        match self.ty {
            Type::F32 => unsafe { *(self.base as *const f32).add(at) as f64 },
            Type::F64 => unsafe { *(self.base as *const f64).add(at) },
        }
    }

    fn set(&self, i: usize, j: usize, v: f64) {
        let at = j * self.ld + i;
        match self.ty {
            Type::F32 => unsafe { *(self.base as *mut f32).add(at) = v as f32 },
            Type::F64 => unsafe { *(self.base as *mut f64).add(at) = v },
        }
    }

    /// The n-th of a batch of places `stride` elements apart.
    fn nth(&self, n: usize, stride: usize) -> Place {
        Place {
            base: self.base + (n * stride * self.ty.size()) as u64,
            ..*self
        }
    }
}

unsafe fn submit(
    handle: *const Handle,
    info: u64,
    count: usize,
    one: impl Fn(usize) -> Option<c_int> + Send + Sync + 'static,
) -> c_int {
    let on = unsafe { (*handle).stream };
    let e = stream::submit(on, move || {
        if info != 0 && !memory::check("info", info, count as u64 * 4) {
            return device::ILLEGAL_ADDRESS;
        }
        let results: Vec<Option<c_int>> = (0..count).into_par_iter().map(&one).collect();
        for (n, r) in results.into_iter().enumerate() {
            match r {
                Some(v) if info != 0 => unsafe { *(info as *mut c_int).add(n) = v },
                Some(_) => {}
                None => return device::ILLEGAL_ADDRESS,
            }
        }
        device::SUCCESS
    });
    if e == device::SUCCESS {
        SUCCESS
    } else {
        EXECUTION_FAILED
    }
}

/// The eigenvalues in ascending order to w, and with `vectors` the eigenvectors over A.
fn symmetric(a: Place, w: Place, n: usize, upper: bool, vectors: bool) -> Option<c_int> {
    if !a.check("syev, A", n, n) || !w.check("syev, W", n, 1) {
        return None;
    }
    let m = Mat::from_fn(n, n, |i, j| {
        if (i <= j) == upper || i == j {
            a.get(i, j)
        } else {
            a.get(j, i)
        }
    });
    let finite = (0..n).all(|j| (0..n).all(|i| m[(i, j)].is_finite()));
    let solved = if finite {
        m.self_adjoint_eigen(Side::Lower).ok()
    } else {
        None
    };
    for j in 0..n {
        let (value, u) = match &solved {
            Some(e) => (e.S().column_vector()[j], Some(e.U())),
            None => (f64::NAN, None),
        };
        w.set(j, 0, value);
        for i in 0..n {
            // Without vectors A is destroyed.
            a.set(i, j, u.filter(|_| vectors).map_or(f64::NAN, |u| u[(i, j)]));
        }
    }
    Some(if solved.is_some() { 0 } else { n as c_int })
}

/// Where the parts of a singular value decomposition go; `columns` of U and V each.
#[derive(Clone, Copy)]
struct Parts {
    s: Place,
    values: usize,
    u: Option<(Place, usize)>,
    v: Option<(Place, usize)>,
    /// V is wanted transposed.
    flipped: bool,
}

fn singular(a: Place, m: usize, n: usize, to: Parts) -> Option<(c_int, f64)> {
    let good = a.check("gesvd, A", m, n)
        && to.s.check("gesvd, S", to.values, 1)
        && to.u.is_none_or(|(p, k)| p.check("gesvd, U", m, k))
        && to.v.is_none_or(|(p, k)| {
            if to.flipped {
                p.check("gesvd, VT", k, n)
            } else {
                p.check("gesvd, V", n, k)
            }
        });
    if !good {
        return None;
    }
    let matrix = Mat::from_fn(m, n, |i, j| a.get(i, j));
    let finite = (0..n).all(|j| (0..m).all(|i| matrix[(i, j)].is_finite()));
    let solved = if finite { matrix.svd().ok() } else { None };
    let value = |i: usize| {
        solved
            .as_ref()
            .map_or(f64::NAN, |d| d.S().column_vector()[i])
    };
    for i in 0..to.values {
        to.s.set(i, 0, value(i));
    }
    if let Some((p, k)) = to.u {
        for j in 0..k {
            for i in 0..m {
                p.set(i, j, solved.as_ref().map_or(f64::NAN, |d| d.U()[(i, j)]));
            }
        }
    }
    if let Some((p, k)) = to.v {
        for j in 0..k {
            for i in 0..n {
                let x = solved.as_ref().map_or(f64::NAN, |d| d.V()[(i, j)]);
                if to.flipped {
                    p.set(j, i, x)
                } else {
                    p.set(i, j, x)
                }
            }
        }
    }
    // What the leading values leave of A, in the Frobenius norm.
    let rest: f64 = (to.values..m.min(n)).map(|i| value(i).powi(2)).sum();
    Some((if solved.is_some() { 0 } else { 1 }, rest.sqrt()))
}

fn known(ld: c_int, rows: c_int) -> bool {
    ld >= rows.max(1)
}

macro_rules! typed {
    ($($t:ty, $ty:expr =>
        $syevd:ident $syevd_size:ident, $syevj:ident $syevj_size:ident,
        $syevj_batched:ident $syevj_batched_size:ident, $gesvdj:ident $gesvdj_size:ident,
        $gesvdj_batched:ident $gesvdj_batched_size:ident, $gesvda:ident $gesvda_size:ident,
        $gesvd:ident $gesvd_size:ident;)*) => {$(
    export! {
        fn $syevd_size(
            _h: *const Handle, _job: c_int, _uplo: c_int, _n: c_int, _a: u64, _lda: c_int,
            _w: u64, size: *mut c_int
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $syevd(
            h: *const Handle, job: c_int, uplo: c_int, n: c_int, a: u64, lda: c_int, w: u64,
            work: u64, size: c_int, info: u64
        ) {
            if n < 0 || !known(lda, n) || !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            let (a, w) = (
                Place { base: a, ld: lda as usize, ty: $ty },
                Place { base: w, ld: n as usize, ty: $ty },
            );
            submit(h, info, 1, move |_| symmetric(a, w, n as usize, uplo == 1, job == 1))
        }

        fn $syevj_size(
            _h: *const Handle, _job: c_int, _uplo: c_int, _n: c_int, _a: u64, _lda: c_int,
            _w: u64, size: *mut c_int, _p: *const Jacobi
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $syevj(
            h: *const Handle, job: c_int, uplo: c_int, n: c_int, a: u64, lda: c_int, w: u64,
            work: u64, size: c_int, info: u64, p: *mut Jacobi
        ) {
            (*p).sweeps = 1;
            $syevd(h, job, uplo, n, a, lda, w, work, size, info)
        }

        fn $syevj_batched_size(
            _h: *const Handle, _job: c_int, _uplo: c_int, _n: c_int, _a: u64, _lda: c_int,
            _w: u64, size: *mut c_int, _p: *const Jacobi, _count: c_int
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $syevj_batched(
            h: *const Handle, job: c_int, uplo: c_int, n: c_int, a: u64, lda: c_int, w: u64,
            work: u64, size: c_int, info: u64, p: *mut Jacobi, count: c_int
        ) {
            if n < 0 || !known(lda, n) || !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            (*p).sweeps = 1;
            let (lda, n) = (lda as usize, n as usize);
            let a = Place { base: a, ld: lda, ty: $ty };
            let w = Place { base: w, ld: n, ty: $ty };
            submit(h, info, count as usize, move |i| {
                symmetric(a.nth(i, lda * n), w.nth(i, n), n, uplo == 1, job == 1)
            })
        }

        fn $gesvdj_size(
            _h: *const Handle, _job: c_int, _econ: c_int, _m: c_int, _n: c_int, _a: u64,
            _lda: c_int, _s: u64, _u: u64, _ldu: c_int, _v: u64, _ldv: c_int,
            size: *mut c_int, _p: *const Jacobi
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $gesvdj(
            h: *const Handle, job: c_int, econ: c_int, m: c_int, n: c_int, a: u64, lda: c_int,
            s: u64, u: u64, ldu: c_int, v: u64, ldv: c_int, work: u64, size: c_int, info: u64,
            p: *mut Jacobi
        ) {
            let good = known(lda, m) && (job == 0 || known(ldu, m) && known(ldv, n));
            if !good || !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            (*p).sweeps = 1;
            let (m, n) = (m as usize, n as usize);
            let least = m.min(n);
            let at = |base, ld: c_int| Place { base, ld: ld as usize, ty: $ty };
            let to = Parts {
                s: at(s, least as c_int),
                values: least,
                u: (job == 1).then(|| (at(u, ldu), if econ != 0 { least } else { m })),
                v: (job == 1).then(|| (at(v, ldv), if econ != 0 { least } else { n })),
                flipped: false,
            };
            let a = at(a, lda);
            submit(h, info, 1, move |_| singular(a, m, n, to).map(|r| r.0))
        }

        fn $gesvdj_batched_size(
            _h: *const Handle, _job: c_int, _m: c_int, _n: c_int, _a: u64, _lda: c_int, _s: u64,
            _u: u64, _ldu: c_int, _v: u64, _ldv: c_int, size: *mut c_int, _p: *const Jacobi,
            _count: c_int
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $gesvdj_batched(
            h: *const Handle, job: c_int, m: c_int, n: c_int, a: u64, lda: c_int, s: u64, u: u64,
            ldu: c_int, v: u64, ldv: c_int, work: u64, size: c_int, info: u64, p: *mut Jacobi,
            count: c_int
        ) {
            // The real function takes no larger matrices.
            let good = m <= 32 && n <= 32 && known(lda, m)
                && (job == 0 || known(ldu, m) && known(ldv, n));
            if !good || !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            (*p).sweeps = 1;
            let (m, n) = (m as usize, n as usize);
            let least = m.min(n);
            let (lda, ldu, ldv) = (lda as usize, ldu as usize, ldv as usize);
            let at = |base, ld| Place { base, ld, ty: $ty };
            let (a, s, u, v) = (at(a, lda), at(s, least), at(u, ldu), at(v, ldv));
            submit(h, info, count as usize, move |i| {
                let to = Parts {
                    s: s.nth(i, least),
                    values: least,
                    u: (job == 1).then(|| (u.nth(i, ldu * m), m)),
                    v: (job == 1).then(|| (v.nth(i, ldv * n), n)),
                    flipped: false,
                };
                singular(a.nth(i, lda * n), m, n, to).map(|r| r.0)
            })
        }

        fn $gesvda_size(
            _h: *const Handle, _job: c_int, _rank: c_int, _m: c_int, _n: c_int, _a: u64,
            _lda: c_int, _sa: c_longlong, _s: u64, _ss: c_longlong, _u: u64, _ldu: c_int,
            _su: c_longlong, _v: u64, _ldv: c_int, _sv: c_longlong, size: *mut c_int,
            _count: c_int
        ) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $gesvda(
            h: *const Handle, job: c_int, rank: c_int, m: c_int, n: c_int, a: u64, lda: c_int,
            sa: c_longlong, s: u64, ss: c_longlong, u: u64, ldu: c_int, su: c_longlong, v: u64,
            ldv: c_int, sv: c_longlong, work: u64, size: c_int, info: u64, residuals: usize,
            count: c_int
        ) {
            let good = m >= n && rank >= 0 && rank <= n && known(lda, m)
                && (job == 0 || known(ldu, m) && known(ldv, n));
            if !good || !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            let (m, n, rank) = (m as usize, n as usize, rank as usize);
            let at = |base, ld: usize| Place { base, ld, ty: $ty };
            let (a, s) = (at(a, lda as usize), at(s, rank));
            let (u, v) = (at(u, ldu as usize), at(v, ldv as usize));
            submit(h, info, count as usize, move |i| {
                let to = Parts {
                    s: s.nth(i, ss as usize),
                    values: rank,
                    u: (job == 1).then(|| (u.nth(i, su as usize), rank)),
                    v: (job == 1).then(|| (v.nth(i, sv as usize), rank)),
                    flipped: false,
                };
                let (info, rest) = singular(a.nth(i, sa as usize), m, n, to)?;
                if residuals != 0 {
                    *(residuals as *mut f64).add(i) = rest;
                }
                Some(info)
            })
        }

        fn $gesvd_size(_h: *const Handle, _m: c_int, _n: c_int, size: *mut c_int) {
            *size = WORKSPACE as c_int;
            SUCCESS
        }

        fn $gesvd(
            h: *const Handle, job_u: c_char, job_v: c_char, m: c_int, n: c_int, a: u64,
            lda: c_int, s: u64, u: u64, ldu: c_int, vt: u64, ldvt: c_int, work: u64, size: c_int,
            _real: u64, info: u64
        ) {
            if !workspace(work, size as usize * size_of::<$t>()) {
                return INVALID_VALUE;
            }
            general(
                h, [job_u, job_v], [m as i64, n as i64], $ty, [a, s, u, vt],
                [lda as i64, ldu as i64, ldvt as i64], info,
            )
        }
    })*};
}

typed! {
    f32, Type::F32 =>
        cusolverDnSsyevd cusolverDnSsyevd_bufferSize,
        cusolverDnSsyevj cusolverDnSsyevj_bufferSize,
        cusolverDnSsyevjBatched cusolverDnSsyevjBatched_bufferSize,
        cusolverDnSgesvdj cusolverDnSgesvdj_bufferSize,
        cusolverDnSgesvdjBatched cusolverDnSgesvdjBatched_bufferSize,
        cusolverDnSgesvdaStridedBatched cusolverDnSgesvdaStridedBatched_bufferSize,
        cusolverDnSgesvd cusolverDnSgesvd_bufferSize;
    f64, Type::F64 =>
        cusolverDnDsyevd cusolverDnDsyevd_bufferSize,
        cusolverDnDsyevj cusolverDnDsyevj_bufferSize,
        cusolverDnDsyevjBatched cusolverDnDsyevjBatched_bufferSize,
        cusolverDnDgesvdj cusolverDnDgesvdj_bufferSize,
        cusolverDnDgesvdjBatched cusolverDnDgesvdjBatched_bufferSize,
        cusolverDnDgesvdaStridedBatched cusolverDnDgesvdaStridedBatched_bufferSize,
        cusolverDnDgesvd cusolverDnDgesvd_bufferSize;
}

fn workspace(base: u64, bytes: usize) -> bool {
    if bytes < WORKSPACE * 4 {
        device::report(&format!(
            "cuSOLVER: a workspace of {bytes} bytes is too small"
        ));
        return false;
    }
    memory::check("the workspace", base, bytes as u64)
}

/// `gesvd` with LAPACK's letters: A all, S the leading columns, O over A, N none.
unsafe fn general(
    h: *const Handle,
    jobs: [c_char; 2],
    [m, n]: [i64; 2],
    ty: Type,
    [a, s, u, vt]: [u64; 4],
    [lda, ldu, ldvt]: [i64; 3],
    info: u64,
) -> c_int {
    if m < n || lda < m.max(1) {
        device::report("gesvd: there must be at least as many rows as columns");
        return INVALID_VALUE;
    }
    let (m, n) = (m as usize, n as usize);
    let at = |base, ld: i64| Place {
        base,
        ld: ld as usize,
        ty,
    };
    let a = at(a, lda);
    let part = |job: c_char, own: Place, all: usize| match job as u8 {
        b'A' => Ok(Some((own, all))),
        b'S' => Ok(Some((own, n))),
        b'O' => Ok(Some((a, n))),
        b'N' => Ok(None),
        _ => Err(INVALID_VALUE),
    };
    let (Ok(to_u), Ok(to_v)) = (part(jobs[0], at(u, ldu), m), part(jobs[1], at(vt, ldvt), n))
    else {
        return INVALID_VALUE;
    };
    let to = Parts {
        s: at(s, n as i64),
        values: n,
        u: to_u,
        v: to_v,
        flipped: true,
    };
    unsafe { submit(h, info, 1, move |_| singular(a, m, n, to).map(|r| r.0)) }
}

macro_rules! nothing {
    ($(fn $name:ident($($ty:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($(_: $ty),*) -> c_int {
            SUCCESS
        }
    )*};
}

nothing! {
    fn cusolverDnXsyevjSetTolerance(*mut Jacobi, f64);
    fn cusolverDnXsyevjSetMaxSweeps(*mut Jacobi, c_int);
    fn cusolverDnXsyevjSetSortEig(*mut Jacobi, c_int);
    fn cusolverDnXgesvdjSetTolerance(*mut Jacobi, f64);
    fn cusolverDnXgesvdjSetMaxSweeps(*mut Jacobi, c_int);
    fn cusolverDnXgesvdjSetSortEig(*mut Jacobi, c_int);
    fn cusolverDnSetAdvOptions(usize, c_int, c_int);
}

export! {
    fn cusolverGetVersion(version: *mut c_int) {
        *version = 12000;
        SUCCESS
    }

    fn cusolverDnCreate(handle: *mut *mut Handle) {
        *handle = Box::into_raw(Box::new(Handle { stream: 0, deterministic: 1 }));
        SUCCESS
    }

    fn cusolverDnDestroy(handle: *mut Handle) {
        drop(Box::from_raw(handle));
        SUCCESS
    }

    fn cusolverDnSetStream(handle: *mut Handle, stream: usize) {
        (*handle).stream = stream;
        SUCCESS
    }

    fn cusolverDnGetStream(handle: *const Handle, stream: *mut usize) {
        *stream = (*handle).stream;
        SUCCESS
    }

    fn cusolverDnSetDeterministicMode(handle: *mut Handle, mode: c_int) {
        (*handle).deterministic = mode;
        SUCCESS
    }

    fn cusolverDnGetDeterministicMode(handle: *const Handle, mode: *mut c_int) {
        *mode = (*handle).deterministic;
        SUCCESS
    }

    fn cusolverDnCreateParams(params: *mut *mut Jacobi) {
        *params = Box::into_raw(Box::default());
        SUCCESS
    }

    fn cusolverDnDestroyParams(params: *mut Jacobi) {
        drop(Box::from_raw(params));
        SUCCESS
    }

    fn cusolverDnCreateSyevjInfo(info: *mut *mut Jacobi) {
        *info = Box::into_raw(Box::default());
        SUCCESS
    }

    fn cusolverDnDestroySyevjInfo(info: *mut Jacobi) {
        drop(Box::from_raw(info));
        SUCCESS
    }

    fn cusolverDnCreateGesvdjInfo(info: *mut *mut Jacobi) {
        *info = Box::into_raw(Box::default());
        SUCCESS
    }

    fn cusolverDnDestroyGesvdjInfo(info: *mut Jacobi) {
        drop(Box::from_raw(info));
        SUCCESS
    }

    fn cusolverDnXsyevjGetResidual(_h: *const Handle, _info: *const Jacobi, residual: *mut f64) {
        *residual = 0.0;
        SUCCESS
    }

    fn cusolverDnXsyevjGetSweeps(_h: *const Handle, info: *const Jacobi, sweeps: *mut c_int) {
        *sweeps = (*info).sweeps;
        SUCCESS
    }

    fn cusolverDnXgesvdjGetResidual(_h: *const Handle, _info: *const Jacobi, residual: *mut f64) {
        *residual = 0.0;
        SUCCESS
    }

    fn cusolverDnXgesvdjGetSweeps(_h: *const Handle, info: *const Jacobi, sweeps: *mut c_int) {
        *sweeps = (*info).sweeps;
        SUCCESS
    }

    fn cusolverDnXsyevd_bufferSize(
        _h: *const Handle, _p: *const Jacobi, _job: c_int, _uplo: c_int, _n: i64, _at: c_int,
        _a: u64, _lda: i64, _wt: c_int, _w: u64, _ct: c_int, on_device: *mut usize,
        on_host: *mut usize
    ) {
        *on_device = WORKSPACE * 8;
        *on_host = 0;
        SUCCESS
    }

    fn cusolverDnXsyevd(
        h: *const Handle, p: *const Jacobi, job: c_int, uplo: c_int, n: i64, at: c_int, a: u64,
        lda: i64, wt: c_int, w: u64, ct: c_int, work: u64, size: usize, host: u64,
        host_size: usize, info: u64
    ) {
        cusolverDnXsyevBatched(
            h, p, job, uplo, n, at, a, lda, wt, w, ct, work, size, host, host_size, info, 1,
        )
    }

    fn cusolverDnXsyevBatched_bufferSize(
        _h: *const Handle, _p: *const Jacobi, _job: c_int, _uplo: c_int, _n: i64, _at: c_int,
        _a: u64, _lda: i64, _wt: c_int, _w: u64, _ct: c_int, on_device: *mut usize,
        on_host: *mut usize, _count: i64
    ) {
        *on_device = WORKSPACE * 8;
        *on_host = 0;
        SUCCESS
    }

    fn cusolverDnXsyevBatched(
        h: *const Handle, _p: *const Jacobi, job: c_int, uplo: c_int, n: i64, at: c_int, a: u64,
        lda: i64, wt: c_int, w: u64, _ct: c_int, work: u64, size: usize, _host: u64,
        _host_size: usize, info: u64, count: i64
    ) {
        let (Some(at), Some(wt)) = (Type::of(at), Type::of(wt)) else { return NOT_SUPPORTED };
        if n < 0 || count < 0 || lda < n.max(1) || !workspace(work, size) {
            return INVALID_VALUE;
        }
        let (n, lda) = (n as usize, lda as usize);
        let (a, w) = (Place { base: a, ld: lda, ty: at }, Place { base: w, ld: n, ty: wt });
        submit(h, info, count as usize, move |i| {
            symmetric(a.nth(i, lda * n), w.nth(i, n), n, uplo == 1, job == 1)
        })
    }

    fn cusolverDnXgesvd_bufferSize(
        _h: *const Handle, _p: *const Jacobi, _ju: c_char, _jv: c_char, _m: i64, _n: i64,
        _at: c_int, _a: u64, _lda: i64, _st: c_int, _s: u64, _ut: c_int, _u: u64, _ldu: i64,
        _vt: c_int, _v: u64, _ldv: i64, _ct: c_int, on_device: *mut usize, on_host: *mut usize
    ) {
        *on_device = WORKSPACE * 8;
        *on_host = 0;
        SUCCESS
    }

    fn cusolverDnXgesvd(
        h: *const Handle, _p: *const Jacobi, ju: c_char, jv: c_char, m: i64, n: i64, at: c_int,
        a: u64, lda: i64, _st: c_int, s: u64, _ut: c_int, u: u64, ldu: i64, _vt: c_int, v: u64,
        ldv: i64, _ct: c_int, work: u64, size: usize, _host: u64, _host_size: usize, info: u64
    ) {
        let Some(ty) = Type::of(at) else { return NOT_SUPPORTED };
        if !workspace(work, size) {
            return INVALID_VALUE;
        }
        general(h, [ju, jv], [m, n], ty, [a, s, u, v], [lda, ldu, ldv], info)
    }
}
