//! The two element types, access to the values of a tensor, matrix products, scratch memory.

use std::cell::RefCell;
use std::thread::LocalKey;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use rayon::prelude::*;

/// `f32` or `f64`.
pub(crate) trait Element: WithDType + Default + std::iter::Sum {
    const ZERO: Self;
    const ONE: Self;
    fn sqrt(self) -> Self;
    /// The values of a storage of this type.
    fn of_storage(storage: &mut CpuStorage) -> Result<&mut [Self]>;
    fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>>;
}

macro_rules! element {
    ($($t:ty: $variant:ident),*) => {$(
        impl Element for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            fn of_storage(storage: &mut CpuStorage) -> Result<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(values) => Ok(values),
                    other => candle_core::bail!("expected {}, got {:?}", stringify!($t), other.dtype()),
                }
            }
            fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>> {
                thread_local!(static SCRATCH: RefCell<Vec<$t>> = const { RefCell::new(vec![]) });
                &SCRATCH
            }
        }
    )*};
}
element!(f32: F32, f64: F64);

/// Runs `$body` with `$T` standing for the element type of this dtype.
macro_rules! dispatch {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(crate::element::bad_dtype($op, other)),
        }
    };
}
pub(crate) use dispatch;

pub(crate) fn bad_dtype(op: &'static str, dtype: DType) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{op} computes in f32 or f64, got {dtype:?}: convert first"
    ))
}

/// Gives `work` this thread's scratch memory, at least `len` long and with any content.
///
/// `work` must not use rayon: another task stolen meanwhile would find the scratch taken.
pub(crate) fn with_scratch<T: Element, R>(len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    T::scratch().with(|cell| {
        let mut scratch = cell.borrow_mut();
        if scratch.len() < len {
            *scratch = vec![T::ZERO; len];
        }
        work(&mut scratch[..len])
    })
}

/// The values of a new tensor, before they are written: saves zeroing memory that is overwritten.
pub(crate) struct Unwritten<T>(Vec<T>, usize);

impl<T: Element> Unwritten<T> {
    pub(crate) fn new(len: usize) -> Self {
        Self(Vec::with_capacity(len), len)
    }

    /// The places to write to, with any content.
    pub(crate) fn places(&mut self) -> &mut [T] {
        let spare = &mut self.0.spare_capacity_mut()[..self.1];
        // SAFETY: every bit pattern is a float, callers write before they read (`written`), and
        // the slice covers exactly memory that the vector owns.
        unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), spare.len()) }
    }

    /// The values.
    ///
    /// # Safety
    /// All places have been written.
    pub(crate) unsafe fn written(self) -> Vec<T> {
        let Self(mut values, len) = self;
        // SAFETY: `len` is within the capacity; the caller vouches for the content.
        unsafe { values.set_len(len) };
        values
    }
}

/// Declares functions that are compiled twice, for AVX2 and for any processor, and chosen at run
/// time. Without contraction to FMA both give the same bits.
macro_rules! vectorised {
    ($($(#[$note:meta])* fn $name:ident<T: Element $(, const $size:ident: usize)*>($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block)*) => {$(
        $(#[$note])*
        #[allow(clippy::too_many_arguments)]
        fn $name<T: Element $(, const $size: usize)*>($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body<T: Element $(, const $size: usize)*>($($arg: $type),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2<T: Element $(, const $size: usize)*>($($arg: $type),*) $(-> $out)? {
                    body::<T $(, $size)*>($($arg),*)
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2::<T $(, $size)*>($($arg),*) };
                }
            }
            body::<T $(, $size)*>($($arg),*)
        }
    )*};
}
pub(crate) use vectorised;

/// Values of a contiguous operand in a custom op's forward.
pub(crate) fn values<'a, T: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("operand of shape {:?} is not contiguous", layout.shape())
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// A tensor that is held for reading.
pub(crate) struct Reading<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

/// Holds a contiguous CPU tensor for reading.
pub(crate) fn read(tensor: &Tensor) -> Reading<'_> {
    let (storage, layout) = tensor.storage_and_layout();
    Reading { storage, layout }
}

impl Reading<'_> {
    pub(crate) fn values<T: Element>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => values(storage, self.layout),
            _ => candle_core::bail!("this op runs on the CPU: move its operands to Device::Cpu"),
        }
    }
}

/// A matrix in memory: element `(i, j)` is `data[i * rows_apart + j * columns_apart]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    rows_apart: usize,
    columns_apart: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// A row-major matrix.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert!(
            data.len() >= rows * columns,
            "matrix {rows}x{columns} in {} values",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            rows_apart: columns,
            columns_apart: 1,
        }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            rows_apart: self.columns_apart,
            columns_apart: self.rows_apart,
        }
    }

    fn rows(self, from: usize, count: usize) -> Self {
        assert!(from + count <= self.rows);
        Self {
            data: &self.data[from * self.rows_apart..],
            rows: count,
            ..self
        }
    }
}

/// `out = a·b`, or `out += a·b`; `out` row-major. One thread.
pub(crate) fn product<T: Element>(out: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, add: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(
        b.rows == k && out.len() >= m * n,
        "{m}x{k} times {}x{n}",
        b.rows
    );
    // SAFETY: a `Matrix` lies within its slice by construction, `out` holds m·n values and is
    // borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.columns_apart as isize,
            a.rows_apart as isize,
            b.data.as_ptr(),
            b.columns_apart as isize,
            b.rows_apart as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `a·b`, blocks of rows in parallel.
pub(crate) fn parallel_product<T: Element>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
    const ROWS: usize = 64;
    let mut out = vec![T::ZERO; a.rows * b.columns];
    if a.rows <= ROWS || b.columns == 0 {
        product(&mut out, a, b, false);
        return out;
    }
    out.par_chunks_mut(ROWS * b.columns)
        .enumerate()
        .for_each(|(block, out)| {
            let rows = out.len() / b.columns;
            product(out, a.rows(block * ROWS, rows), b, false);
        });
    out
}

/// The transpose of a row-major matrix.
pub(crate) fn transpose<T: Element>(data: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::ZERO; rows * columns];
    for i in 0..rows {
        for j in 0..columns {
            out[j * rows + i] = data[i * columns + j];
        }
    }
    out
}

/// Sums of the values of `term` over equally long operands, in 16 lanes: vectorises, loses less
/// than a running sum, and the order is fixed.
#[inline(always)]
pub(crate) fn lane_sums<T: Element, const OPERANDS: usize, const SUMS: usize>(
    operands: [&[T]; OPERANDS],
    term: impl Fn([T; OPERANDS]) -> [T; SUMS],
) -> [T; SUMS] {
    const LANES: usize = 16;
    let mut lanes = [[T::ZERO; LANES]; SUMS];
    let blocks = operands.map(|x| x.as_chunks::<LANES>().0);
    let rest = operands.map(|x| x.as_chunks::<LANES>().1);
    for block in 0..blocks[0].len() {
        let block = blocks.map(|x| &x[block]);
        for lane in 0..LANES {
            let terms = term(block.map(|x| x[lane]));
            for sum in 0..SUMS {
                lanes[sum][lane] += terms[sum];
            }
        }
    }
    for lane in 0..rest[0].len() {
        let terms = term(rest.map(|x| x[lane]));
        for sum in 0..SUMS {
            lanes[sum][lane] += terms[sum];
        }
    }
    lanes.map(|mut lanes| {
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                let other = lanes[lane + half];
                lanes[lane] += other;
            }
        }
        lanes[0]
    })
}

/// Images that one task works through: at most 16 tasks a batch, fewer where each task keeps a
/// large partial result of `partial` values. Depends on shapes alone, never on threads.
pub(crate) fn images_per_task(batch: usize, partial: usize) -> usize {
    let tasks = ((1 << 22) / partial.max(1)).clamp(4, 16);
    batch.div_ceil(tasks).max(1)
}

/// Adds up partial results of equal length, the first to the last.
pub(crate) fn sum_partials<T: Element>(partials: &[T], len: usize) -> Vec<T> {
    const BLOCK: usize = 1 << 14;
    let mut out = partials[..len].to_vec();
    out.par_chunks_mut(BLOCK)
        .enumerate()
        .for_each(|(block, out)| {
            for partial in partials.chunks_exact(len).skip(1) {
                for (sum, &term) in out.iter_mut().zip(&partial[block * BLOCK..]) {
                    *sum += term;
                }
            }
        });
    out
}
