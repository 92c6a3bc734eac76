//! What ops on a GPU share: matrices of all images of a batch, and their products.
//!
//! Matrices lie row by row, the rows a multiple of 16 bytes apart. All products are of operands with
//! the inner index in rows, which symmetric matrices are either way; results that are not symmetric
//! are written both ways where both are read.

use crate::Result;
use candle_core::{CudaDevice, DType};
use isqrt_device::cuda::kernels::SYMMETRIC;
use isqrt_device::cuda::{
    Argument, DeviceRepr, Grid, Module, Output, Real, bf16, launch, launch_with, multiprocessors,
};
use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A kernel of products in `symmetric.cu`: its name, rows and columns that a block makes, and threads of a block.
type Tiled = (&'static str, usize, usize);
/// A thread has 8 x 8 values, or 9 x 9 in wider tiles, of which a side of 196 takes three in place of four. Both have two
/// warps a block, for four schedulers a multiprocessor: few blocks take four warps, of 8 x 4 values a thread.
const PLAIN: Tiled = ("product", 64, 64);
const WIDE: Tiled = ("product_wide", 72, 64);
const FEW: Tiled = ("product_few", 64, 128);

/// Two operands of a product, as `symmetric.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pair {
    pub a: u64,
    pub b: u64,
    pub a_image: i64,
    pub b_image: i64,
    pub a_row: i32,
    pub b_row: i32,
    pub inner: i32,
    pub unused: i32,
}

/// What becomes of a product, as `symmetric.cu` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    pub direct: u64,
    pub transposed: u64,
    pub triangle: u64,
    pub terms: [u64; 4],
    pub weights: [f64; 4],
    pub alpha: f64,
    pub diagonal: f64,
    pub scale: u64,
    pub scale_image: i64,
    pub direct_image: i64,
    pub transposed_image: i64,
    pub triangle_image: i64,
    pub term_image: i64,
    pub direct_row: i32,
    pub transposed_row: i32,
    pub term_row: i32,
    pub count: i32,
    pub direct_width: i32,
    pub transposed_width: i32,
    /// Whether `direct` or `transposed` is of bf16.
    pub narrow: i32,
    pub unused: i32,
}

/// A launch of `product`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Product {
    pairs: [Pair; 2],
    targets: [Target; 2],
    pair_count: i32,
    target_count: i32,
    rows: i32,
    columns: i32,
    symmetric: i32,
    tiles_down: i32,
    tiles_across: i32,
    unused: i32,
}

// SAFETY: a structure of numbers, laid out as C does.
unsafe impl DeviceRepr for Product {}

/// A matrix of each image; clones share their memory.
#[derive(Clone, Debug)]
pub(crate) struct Matrices<T> {
    memory: Arc<Output<T>>,
    pub rows: usize,
    /// Distance of rows.
    pub row: usize,
}

impl<T: Real> Matrices<T> {
    pub fn at(&self) -> u64 {
        self.memory.at()
    }

    /// Values of an image, those between rows too.
    pub fn image(&self) -> usize {
        self.rows * self.row
    }
}

/// `Σ_k A[k][i] B[k][j]` over rows `k`.
pub(crate) fn pair<T: Real>(a: &Matrices<T>, b: &Matrices<T>) -> Pair {
    Pair {
        a: a.at(),
        b: b.at(),
        a_image: a.image() as i64,
        b_image: b.image() as i64,
        a_row: a.row as i32,
        b_row: b.row as i32,
        inner: a.rows as i32,
        unused: 0,
    }
}

impl Target {
    pub fn new(alpha: f64) -> Self {
        Self {
            alpha,
            ..Self::default()
        }
    }

    pub fn direct<T: Real>(mut self, to: &Matrices<T>) -> Self {
        (self.direct, self.direct_image) = (to.at(), to.image() as i64);
        (self.direct_row, self.direct_width) = (to.row as i32, to.row as i32);
        self
    }

    pub fn transposed<T: Real>(mut self, to: &Matrices<T>) -> Self {
        (self.transposed, self.transposed_image) = (to.at(), to.image() as i64);
        (self.transposed_row, self.transposed_width) = (to.row as i32, to.row as i32);
        self
    }

    /// Both halves of a symmetric result.
    pub fn both<T: Real>(self, to: &Matrices<T>) -> Self {
        self.direct(to).transposed(to)
    }

    /// A contiguous symmetric result of side `n`, or its upper triangle.
    pub fn output(mut self, to: u64, n: usize, triangle: bool) -> Self {
        if triangle {
            (self.triangle, self.triangle_image) = (to, (n * (n + 1) / 2) as i64);
            return self;
        }
        (self.direct, self.transposed) = (to, to);
        (self.direct_image, self.transposed_image) = ((n * n) as i64, (n * n) as i64);
        (self.direct_row, self.transposed_row) = (n as i32, n as i32);
        (self.direct_width, self.transposed_width) = (n as i32, n as i32);
        self
    }
}

/// Memory that a sequence of allocations is given again when it is repeated.
#[derive(Default)]
pub(crate) struct Arena {
    buffers: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
    next: AtomicUsize,
}

impl Arena {
    /// Allocations since the beginning.
    pub fn used(&self) -> usize {
        self.next.load(Ordering::Relaxed)
    }

    /// Goes back to so many allocations; the next ones get what was next then.
    pub fn rewind(&self, used: usize) {
        self.next.store(used, Ordering::Relaxed);
    }

    fn take<T: Real>(&self, make: impl FnOnce() -> Result<Output<T>>) -> Result<Arc<Output<T>>> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = buffers.get(at) {
            let known = Arc::clone(known).downcast::<Output<T>>();
            return known.map_err(|_| {
                candle_core::Error::Msg("a repeated pass allocates otherwise".to_owned()).into()
            });
        }
        let new = Arc::new(make()?);
        buffers.push(Arc::clone(&new) as _);
        Ok(new)
    }
}

/// The images of a batch, on their device.
#[derive(Clone, Copy)]
pub(crate) struct Images<'a> {
    /// Name of the op, for errors.
    pub op: &'static str,
    pub device: &'a CudaDevice,
    pub batch: usize,
    /// Where memory comes from, if not from the device.
    pub arena: Option<&'a Arena>,
}

impl Images<'_> {
    fn take<T: Real>(&self, make: impl FnOnce() -> Result<Output<T>>) -> Result<Arc<Output<T>>> {
        match self.arena {
            Some(arena) => arena.take(make),
            None => Ok(Arc::new(make()?)),
        }
    }

    /// Memory for a matrix of each image, with any content.
    pub fn matrices<T: Real>(&self, rows: usize, columns: usize) -> Result<Matrices<T>> {
        let row = columns.next_multiple_of(16 / size_of::<T>());
        let memory = self.allocate(&[self.batch, rows, row])?;
        Ok(Matrices { memory, rows, row })
    }

    /// The same, zeroed.
    pub fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<Matrices<T>> {
        let row = columns.next_multiple_of(16 / size_of::<T>());
        let shape = [self.batch, rows, row];
        let zeros = || Output::zeros(self.op, self.device, &shape);
        let memory = self.take(|| Ok(zeros().map_err(candle_core::Error::from)?))?;
        Ok(Matrices { memory, rows, row })
    }

    /// Memory with any content, for what is not given away.
    pub fn allocate<T: Real>(&self, shape: &[usize]) -> Result<Arc<Output<T>>> {
        self.take(|| self.output(shape))
    }

    /// Memory with any content, for a result.
    pub fn output<T: Real>(&self, shape: &[usize]) -> Result<Output<T>> {
        let made = Output::new(self.op, self.device, shape);
        Ok(made.map_err(candle_core::Error::from)?)
    }

    pub fn launch<T: Real>(
        &self,
        module: &Module,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        // SAFETY: callers give the arguments of the kernel, in memory of their op.
        Ok(unsafe { launch::<T>(self.device, module, name, grid, arguments) }?)
    }

    /// A launch over all values of a matrix of each image.
    pub fn over<T: Real>(
        &self,
        module: &Module,
        name: &'static str,
        matrix: &Matrices<T>,
        arguments: &[Argument],
    ) -> Result<()> {
        let mut grid = Grid::over(matrix.image().div_ceil(4));
        grid.blocks.1 = self.batch;
        self.launch::<T>(module, name, grid, arguments)
    }

    fn multiprocessors(&self) -> Result<usize> {
        let found = multiprocessors(self.op, self.device);
        Ok(found.map_err(candle_core::Error::from)?)
    }

    /// Sums of products, by our kernel.
    pub fn product<T: Real>(
        &self,
        size: (usize, usize),
        symmetric: bool,
        pairs: &[Pair],
        targets: &[Target],
    ) -> Result<()> {
        self.product_by::<T>("product", size, symmetric, pairs, targets)
    }

    /// The same by a kernel of that name in `symmetric.cu`.
    pub fn product_by<T: Real>(
        &self,
        kernel: &'static str,
        (rows, columns): (usize, usize),
        symmetric: bool,
        pairs: &[Pair],
        targets: &[Target],
    ) -> Result<()> {
        let tiles = |side: usize| {
            let (down, across) = (rows.div_ceil(side), columns.div_ceil(side));
            match symmetric {
                true => down * (down + 1) / 2,
                false => down * across,
            }
        };
        let made = |(_, side, _): Tiled| tiles(side) * side * side;
        let (kernel, side, threads) = if kernel != PLAIN.0 || T::DTYPE != DType::F32 {
            (kernel, 64, 128)
        } else if tiles(FEW.1) * self.batch <= 2 * self.multiprocessors()? {
            FEW
        } else if made(WIDE) < made(PLAIN) {
            WIDE
        } else {
            PLAIN
        };
        let mut job = Product {
            pair_count: pairs.len() as i32,
            target_count: targets.len() as i32,
            rows: rows as i32,
            columns: columns as i32,
            symmetric: i32::from(symmetric),
            tiles_down: rows.div_ceil(side) as i32,
            tiles_across: columns.div_ceil(side) as i32,
            ..Product::default()
        };
        job.pairs[..pairs.len()].copy_from_slice(pairs);
        job.targets[..targets.len()].copy_from_slice(targets);
        let grid = Grid::blocks(tiles(side) * self.batch, threads);
        let (device, module) = (self.device, &SYMMETRIC);
        // SAFETY: the matrices are of this op and of the sizes that the job says.
        let launched = unsafe {
            match targets.iter().any(|target| target.narrow != 0) {
                true => launch_with::<bf16, Product>(device, module, kernel, grid, &job),
                false => launch_with::<T, Product>(device, module, kernel, grid, &job),
            }
        };
        Ok(launched?)
    }
}
