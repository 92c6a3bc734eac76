//! The one matrix kernel of the layer, compiled for each instruction set and chosen at run time.

pub(crate) mod buffer;
pub(crate) mod pack;
pub(crate) mod product;
pub(crate) mod vector;

use crate::{Error, Kernel, Result};
use pack::{Combine, Pack, Upstream};
use product::{Ahead, Matrix, Product, Tile, TileShape};
use std::mem::MaybeUninit;
use vector::{Element, Quad, Vector};

/// The functions of one instruction set.
pub(crate) struct Isa<T: 'static> {
    pub name: &'static str,
    pub shape: TileShape,
    run: unsafe fn(&Product<'_, T>, &[Tile]),
    pack: unsafe fn(&Pack<'_, T>),
    upstream: unsafe fn(&Upstream<'_, T>),
    combine: unsafe fn(&Combine<'_, T>),
    dot: unsafe fn(usize, Matrix<T>, Matrix<T>) -> f64,
    row_statistics: unsafe fn(&[T]) -> (f64, f64),
    all_finite: unsafe fn(&[T]) -> bool,
    flat_dot: unsafe fn(&[T], &[T]) -> f64,
    multiply_adds: unsafe fn(usize) -> f64,
}

// SAFETY (all methods): an `Isa` is handed out by `Dispatch::isa` only where it is supported;
// the jobs' pointers are vouched for by the one who builds them.
impl<T: Element> Isa<T> {
    /// Runs the tiles of a product, in parallel if `team`.
    pub(crate) unsafe fn product(&self, product: &Product<'_, T>, tiles: &[Tile], team: bool) {
        if team {
            use rayon::prelude::*;
            let pieces = 4 * rayon::current_num_threads();
            let product = &Product {
                ahead: Ahead::NOTHING,
                ..*product
            };
            tiles
                .par_chunks(tiles.len().div_ceil(pieces).max(1))
                // SAFETY: see above; tiles write disjoint places.
                .for_each(|some| unsafe { (self.run)(product, some) });
        } else {
            unsafe { (self.run)(product, tiles) }
        }
    }
    pub(crate) unsafe fn pack(&self, job: &Pack<'_, T>) {
        unsafe { (self.pack)(job) }
    }
    pub(crate) unsafe fn upstream(&self, job: &Upstream<'_, T>) {
        unsafe { (self.upstream)(job) }
    }
    pub(crate) unsafe fn combine(&self, job: &Combine<'_, T>) {
        unsafe { (self.combine)(job) }
    }
    pub(crate) unsafe fn dot(&self, n: usize, a: Matrix<T>, b: Matrix<T>) -> f64 {
        unsafe { (self.dot)(n, a, b) }
    }
    pub(crate) fn row_statistics(&self, row: &[T]) -> (f64, f64) {
        unsafe { (self.row_statistics)(row) }
    }
    pub(crate) fn all_finite(&self, values: &[T]) -> bool {
        unsafe { (self.all_finite)(values) }
    }
    pub(crate) fn flat_dot(&self, a: &[T], b: &[T]) -> f64 {
        unsafe { (self.flat_dot)(a, b) }
    }
    /// Multiply-adds from and to registers, at least `steps` of them; returns how many.
    pub(crate) fn multiply_adds(&self, steps: usize) -> f64 {
        unsafe { (self.multiply_adds)(steps) }
    }
}

#[inline(always)]
unsafe fn multiply_adds<V: Vector, const COUNT: usize>(steps: usize) -> f64 {
    // SAFETY: register arithmetic and a store to a local buffer.
    unsafe {
        let mut acc = [V::splat(V::T::of(1.0)); COUNT];
        let (a, b) = (V::splat(V::T::of(0.999)), V::splat(V::T::of(1e-6)));
        for _ in 0..steps {
            for value in &mut acc {
                *value = b.fma(*value, a);
            }
        }
        let mut buffer = [V::T::default(); 16];
        for value in acc {
            value.store(buffer.as_mut_ptr());
            std::hint::black_box(&buffer);
        }
    }
    (steps * COUNT * V::LANES) as f64
}

macro_rules! isa {
    ($module:ident, $name:literal, $vector:ty, $element:ty, $registers:literal,
     ($rows:literal, $panels:literal), $(#[$feature:meta])?
     { $($height:literal x $group:literal => $nv:literal),+ }) => {
        mod $module {
            use super::*;
            type V = $vector;
            type T = $element;
            pub(super) static ISA: Isa<T> = Isa {
                name: $name,
                shape: TileShape { rows: $rows, panels: $panels },
                run, pack, upstream, combine, dot, row_statistics, all_finite, flat_dot, multiply_adds,
            };
            // SAFETY (all): the caller promises the instruction set and the pointers.
            $(#[$feature])?
            unsafe fn run(product: &Product<'_, T>, tiles: &[Tile]) {
                let mut partial = [const { MaybeUninit::<T>::uninit() }; product::TILE * product::BATCH];
                let partial = partial.as_mut_ptr().cast::<T>();
                let mut index = 0;
                for batch in product::batches(tiles) {
                    for term in 0..product.terms.len() {
                        for (place, tile) in batch.iter().enumerate() {
                            if term == 0 {
                                product.ahead.fetch(index, tiles.len());
                                index += 1;
                            }
                            let partial = partial.wrapping_add(place * product::TILE);
                            let (row, panel) = (tile.row as usize, tile.panel as usize);
                            match (tile.rows, tile.panels) {
                                $(($height, $group) => unsafe {
                                    product::tile::<V, $height, $nv>(product, row, panel, term, partial)
                                },)+
                                _ => unreachable!("tiles are cut to the shape of this instruction set"),
                            }
                        }
                    }
                }
            }
            $(#[$feature])?
            unsafe fn pack(job: &Pack<'_, T>) {
                unsafe { pack::pack::<V>(job) }
            }
            $(#[$feature])?
            unsafe fn upstream(job: &Upstream<'_, T>) {
                unsafe { pack::upstream::<V>(job) }
            }
            $(#[$feature])?
            unsafe fn combine(job: &Combine<'_, T>) {
                unsafe { pack::combine::<V>(job) }
            }
            $(#[$feature])?
            unsafe fn dot(n: usize, a: Matrix<T>, b: Matrix<T>) -> f64 {
                unsafe { pack::dot::<V>(n, a, b) }
            }
            $(#[$feature])?
            unsafe fn row_statistics(row: &[T]) -> (f64, f64) {
                pack::row_statistics(row)
            }
            $(#[$feature])?
            unsafe fn all_finite(values: &[T]) -> bool {
                pack::all_finite(values)
            }
            $(#[$feature])?
            unsafe fn flat_dot(a: &[T], b: &[T]) -> f64 {
                pack::flat_dot(a, b)
            }
            $(#[$feature])?
            unsafe fn multiply_adds(steps: usize) -> f64 {
                unsafe { super::multiply_adds::<V, $registers>(steps) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256d, __m512, __m512d};
#[cfg(target_arch = "x86_64")]
isa!(avx512_f32, "avx512", __m512, f32, 16, (8, 2),
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    { 8 x 2 => 2, 8 x 1 => 1, 4 x 2 => 2, 4 x 1 => 1 });
#[cfg(target_arch = "x86_64")]
isa!(avx512_f64, "avx512", __m512d, f64, 16, (8, 2),
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    { 8 x 2 => 2, 8 x 1 => 1, 4 x 2 => 2, 4 x 1 => 1 });
#[cfg(target_arch = "x86_64")]
isa!(avx2_f32, "avx2", __m256, f32, 12, (6, 1), #[target_feature(enable = "avx2,fma")]
    { 6 x 1 => 2, 4 x 1 => 2 });
#[cfg(target_arch = "x86_64")]
isa!(avx2_f64, "avx2", __m256d, f64, 12, (4, 1), #[target_feature(enable = "avx2,fma")]
    { 4 x 1 => 2 });
isa!(portable_f32, "portable", Quad<f32>, f32, 8, (2, 1), { 2 x 1 => 4 });
isa!(portable_f64, "portable", Quad<f64>, f64, 4, (2, 1), { 2 x 1 => 2 });

/// Element types that have kernels.
pub(crate) trait Dispatch: Element {
    /// The functions for `kernel`.
    fn isa(kernel: Kernel) -> Result<&'static Isa<Self>>;
}

#[cfg(target_arch = "x86_64")]
fn supports(kernel: Kernel) -> bool {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match kernel {
        Kernel::Avx512 => {
            avx2 && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
        Kernel::Avx2 => avx2,
        Kernel::Auto | Kernel::Portable => true,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn supports(kernel: Kernel) -> bool {
    matches!(kernel, Kernel::Auto | Kernel::Portable)
}

/// The kernel that `kernel` stands for on this machine.
pub(crate) fn resolve(kernel: Kernel) -> Result<Kernel> {
    if kernel == Kernel::Auto {
        let known = [Kernel::Avx512, Kernel::Avx2];
        return Ok(known
            .into_iter()
            .find(|&k| supports(k))
            .unwrap_or(Kernel::Portable));
    }
    if supports(kernel) {
        return Ok(kernel);
    }
    Err(Error::Kernel {
        kernel: kernel.name(),
    })
}

macro_rules! dispatch {
    ($element:ty, $avx512:ident, $avx2:ident, $portable:ident) => {
        impl Dispatch for $element {
            fn isa(kernel: Kernel) -> Result<&'static Isa<Self>> {
                Ok(match resolve(kernel)? {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => &$avx512::ISA,
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => &$avx2::ISA,
                    _ => &$portable::ISA,
                })
            }
        }
    };
}
dispatch!(f32, avx512_f32, avx2_f32, portable_f32);
dispatch!(f64, avx512_f64, avx2_f64, portable_f64);
