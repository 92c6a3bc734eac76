//! Numbers and registers: what the product kernel needs of an instruction set.
//!
//! One generic tile (see `product.rs`) is compiled for each [`Vector`]; the functions here are
//! `inline(always)` so that they become single instructions inside a `target_feature` caller.

use std::fmt::Debug;

/// A real number that the kernels compute with.
pub trait Element:
    candle_core::WithDType
    + Copy
    + Default
    + Debug
    + PartialOrd
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::iter::Sum
    + 'static
{
    /// Columns of a panel: one cache line.
    const WIDTH: usize;
    /// The nearest number.
    fn of(value: f64) -> Self;
    /// The same number in f64.
    fn wide(self) -> f64;
    /// The smaller of two; a NaN on the right is passed over.
    #[inline(always)]
    fn smaller(self, other: Self) -> Self {
        if other < self { other } else { self }
    }
    /// The larger of two; a NaN on the right is passed over.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
}

impl Element for f32 {
    const WIDTH: usize = 16;
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    const WIDTH: usize = 8;
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
}

/// A register of `LANES` elements.
///
/// # Safety
/// The methods may be called only where the instruction set is present, and the pointers must be
/// valid for `LANES` elements (for [`Vector::store_transposed`]: for the block it describes).
// What each method needs is said above, once.
#[allow(clippy::missing_safety_doc)]
pub trait Vector: Copy {
    /// Its elements.
    type T: Element;
    /// How many.
    const LANES: usize;
    /// The same value in every lane.
    unsafe fn splat(value: Self::T) -> Self;
    /// From memory, at any alignment.
    unsafe fn load(from: *const Self::T) -> Self;
    /// To memory, at any alignment.
    unsafe fn store(self, to: *mut Self::T);
    /// `self + a * b`
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// `self * other`
    unsafe fn mul(self, other: Self) -> Self;
    /// `max(self, 0)`; a NaN stays one, and so does -0.
    unsafe fn relu(self) -> Self;
    /// `min(self, upper)`; a NaN stays one, and one in `upper` bounds nothing.
    unsafe fn at_most(self, upper: Self) -> Self;
    /// Stores `rows` as columns: `to[lane * stride + r] = rows[r][lane]`.
    #[inline(always)]
    unsafe fn store_transposed<const MR: usize>(
        rows: &[Self; MR],
        to: *mut Self::T,
        stride: usize,
    ) {
        let mut buffer = [[Self::T::default(); 16]; MR];
        for (line, row) in buffer.iter_mut().zip(rows) {
            // SAFETY: LANES <= 16 for every implementation; `to` as the caller promises.
            unsafe { row.store(line.as_mut_ptr()) };
        }
        for lane in 0..Self::LANES {
            for (r, line) in buffer.iter().enumerate() {
                // SAFETY: as promised by the caller.
                unsafe { *to.add(lane * stride + r) = line[lane] };
            }
        }
    }
}

/// Four elements as plain Rust: the portable path, which the compiler maps to SSE2 or NEON.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Quad<T>([T; 4]);

impl<T: Element> Vector for Quad<T> {
    type T = T;
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: T) -> Self {
        Self([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: as promised by the caller.
        Self(unsafe { from.cast::<[T; 4]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: as promised by the caller.
        unsafe { to.cast::<[T; 4]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(mut self, a: Self, b: Self) -> Self {
        for lane in 0..4 {
            self.0[lane] += a.0[lane] * b.0[lane];
        }
        self
    }
    #[inline(always)]
    unsafe fn mul(mut self, other: Self) -> Self {
        for lane in 0..4 {
            self.0[lane] *= other.0[lane];
        }
        self
    }
    #[inline(always)]
    unsafe fn relu(self) -> Self {
        let zero = T::default();
        Self(self.0.map(|x| if x < zero { zero } else { x }))
    }
    #[inline(always)]
    unsafe fn at_most(mut self, upper: Self) -> Self {
        for lane in 0..4 {
            if self.0[lane] > upper.0[lane] {
                self.0[lane] = upper.0[lane];
            }
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($register:ty, $element:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident,
         $fma:ident, $mul:ident, $max:ident, $min:ident $(, $transpose:item)?) => {
            // SAFETY (all): the caller promises the instruction set and the pointers.
            impl Vector for $register {
                type T = $element;
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(value: $element) -> Self {
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $element) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $element) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn fma(self, a: Self, b: Self) -> Self {
                    unsafe { $fma(a, b, self) }
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    unsafe { $mul(self, other) }
                }
                #[inline(always)]
                unsafe fn relu(self) -> Self {
                    // Of a NaN and a number the second operand is the result.
                    unsafe { $max($splat(0.0), self) }
                }
                #[inline(always)]
                unsafe fn at_most(self, upper: Self) -> Self {
                    // As in `relu`.
                    unsafe { $min(upper, self) }
                }
                $($transpose)?
            }
        };
    }

    vector!(
        __m512,
        f32,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_mul_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        /// 4x4 transposes inside the 128-bit lanes, then one 16-byte store a lane.
        #[inline(always)]
        unsafe fn store_transposed<const MR: usize>(
            rows: &[Self; MR],
            to: *mut f32,
            stride: usize,
        ) {
            for quad in 0..MR / 4 {
                unsafe {
                    let r = &rows[4 * quad..];
                    let low01 = _mm512_unpacklo_ps(r[0], r[1]);
                    let high01 = _mm512_unpackhi_ps(r[0], r[1]);
                    let low23 = _mm512_unpacklo_ps(r[2], r[3]);
                    let high23 = _mm512_unpackhi_ps(r[2], r[3]);
                    let columns = [
                        _mm512_shuffle_ps::<0x44>(low01, low23),
                        _mm512_shuffle_ps::<0xEE>(low01, low23),
                        _mm512_shuffle_ps::<0x44>(high01, high23),
                        _mm512_shuffle_ps::<0xEE>(high01, high23),
                    ];
                    for (j, &column) in columns.iter().enumerate() {
                        let at = to.add(j * stride + 4 * quad);
                        _mm_storeu_ps(at, _mm512_extractf32x4_ps::<0>(column));
                        _mm_storeu_ps(at.add(4 * stride), _mm512_extractf32x4_ps::<1>(column));
                        _mm_storeu_ps(at.add(8 * stride), _mm512_extractf32x4_ps::<2>(column));
                        _mm_storeu_ps(at.add(12 * stride), _mm512_extractf32x4_ps::<3>(column));
                    }
                }
            }
        }
    );
    vector!(
        __m256,
        f32,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_mul_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        #[inline(always)]
        unsafe fn store_transposed<const MR: usize>(
            rows: &[Self; MR],
            to: *mut f32,
            stride: usize,
        ) {
            for quad in 0..MR / 4 {
                unsafe {
                    let r = &rows[4 * quad..];
                    let low01 = _mm256_unpacklo_ps(r[0], r[1]);
                    let high01 = _mm256_unpackhi_ps(r[0], r[1]);
                    let low23 = _mm256_unpacklo_ps(r[2], r[3]);
                    let high23 = _mm256_unpackhi_ps(r[2], r[3]);
                    let columns = [
                        _mm256_shuffle_ps::<0x44>(low01, low23),
                        _mm256_shuffle_ps::<0xEE>(low01, low23),
                        _mm256_shuffle_ps::<0x44>(high01, high23),
                        _mm256_shuffle_ps::<0xEE>(high01, high23),
                    ];
                    for (j, &column) in columns.iter().enumerate() {
                        let at = to.add(j * stride + 4 * quad);
                        _mm_storeu_ps(at, _mm256_castps256_ps128(column));
                        _mm_storeu_ps(at.add(4 * stride), _mm256_extractf128_ps::<1>(column));
                    }
                }
            }
            // Two rows are left of six: pairs of them, eight bytes each.
            if MR % 4 == 2 {
                unsafe {
                    let (r, at) = (&rows[MR - 2..], to.add(MR - 2));
                    let pairs = [
                        _mm256_unpacklo_ps(r[0], r[1]),
                        _mm256_unpackhi_ps(r[0], r[1]),
                    ];
                    for (j, &pair) in pairs.iter().enumerate() {
                        let low = _mm_castps_pd(_mm256_castps256_ps128(pair));
                        let high = _mm_castps_pd(_mm256_extractf128_ps::<1>(pair));
                        let at = |column: usize| at.add(column * stride).cast::<f64>();
                        _mm_storel_pd(at(2 * j), low);
                        _mm_storeh_pd(at(2 * j + 1), low);
                        _mm_storel_pd(at(2 * j + 4), high);
                        _mm_storeh_pd(at(2 * j + 5), high);
                    }
                }
            }
        }
    );
    vector!(
        __m512d,
        f64,
        8,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_fmadd_pd,
        _mm512_mul_pd,
        _mm512_max_pd,
        _mm512_min_pd
    );
    vector!(
        __m256d,
        f64,
        4,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_fmadd_pd,
        _mm256_mul_pd,
        _mm256_max_pd,
        _mm256_min_pd
    );
}
