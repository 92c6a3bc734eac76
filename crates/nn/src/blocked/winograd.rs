//! Convolution of stride 1 with a 3x3 kernel by Winograd's minimal filtering, F(4x4, 3x3): a tile
//! of 4x4 output pixels takes 36 multiplications for each pair of channels, where sums take 144.
//!
//! Output is `Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A` of the kernel `g` and of the 6x6 inputs `d` of a tile,
//! and `⊙` summed over channels is a matrix product (tiles by channels) for each of 36 points. The
//! gradient of the input is such a convolution; that of the weights is the adjoint,
//! `Gᵀ [Σ (Bᵀ d B) ⊙ (A y Aᵀ)] G` over the tiles. Channels are lanes, so a transform is a few
//! additions of vectors. Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray,
//! arXiv 1509.09308.
//!
//! The points of interpolation are 0, ±5/8, ±3/2 and infinity. They round half as much as the
//! usual 0, ±1, ±2, and `A` and `B` are exact in f32. On activations after a ReLU with weights as
//! drawn for them, errors in the 2-norm against f64 are 6e-7 with 64 channels, 1.2e-6 with 256,
//! 1.6e-6 with 512 (gradient of the input 1.9e-6, of the weights 0.5e-6 to 1e-6): twice those of
//! the direct sums, and the usual points give four times.

// Plain index loops over register arrays are what the compiler unrolls for certain.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use candle_core::DType;
use isqrt_linalg::simd::{Element, Vector};
use rayon::prelude::*;

use super::conv::{Shared, pack, unpack};
use super::kernel::{Correlate, Gather, Isa, Lanes, clipped};
use crate::element::{Unwritten, with_scratch};
use crate::ops::{Clip, ConvAxis, ConvShapes as Shapes};

/// Output pixels of a tile, on a side.
const TILE: usize = 4;
/// Input pixels of a tile, on a side; neighbours overlap by two.
const REACH: usize = 6;
/// Values of a transformed tile, each a matrix product of its own.
const POINTS: usize = REACH * REACH;
const TAPS: usize = 9;
/// The widest panel: 16 channels in f32.
const LANES: usize = 16;
/// Tiles whose points are in memory at a time.
const CHUNK: usize = 192;
/// Tiles that one task takes, whole passes of every kernel of [`Gather`].
const PIECE: usize = 48;

/// The finite points of interpolation besides 0 are `±A` and `±B`.
const A: f64 = 0.625;
const B: f64 = 1.5;
const AA: f64 = A * A;
const BB: f64 = B * B;
/// Products of a point's differences to the others.
const N0: f64 = AA * BB;
const NA: f64 = 2.0 * AA * (AA - BB);
const NB: f64 = 2.0 * BB * (BB - AA);

/// A square of vectors to transform into another, `WIDTH` channels each.
#[derive(Clone, Copy)]
pub(super) struct Grid<T> {
    pub from: *const T,
    /// Between rows and columns.
    pub from_apart: (isize, isize),
    pub to: *mut T,
    pub to_apart: (isize, isize),
    /// Of the results: a value for each channel, or null, and where they are cut off.
    pub bias: *const T,
    pub clip: Clip<T>,
}

impl<T: Copy + Default + PartialOrd> Grid<T> {
    /// Without bias and activation.
    fn new(
        from: *const T,
        from_apart: (isize, isize),
        to: *mut T,
        to_apart: (isize, isize),
    ) -> Self {
        Self {
            from,
            from_apart,
            to,
            to_apart,
            bias: std::ptr::null(),
            clip: Clip::off(),
        }
    }
}

/// The transforms, compiled for an instruction set.
pub(super) struct Transforms<T> {
    /// `Bᵀ d B`: an input tile to its points.
    pub source: unsafe fn(&Grid<T>),
    /// `Aᵀ m A`: points to an output tile.
    pub result: unsafe fn(&Grid<T>),
    /// `G g Gᵀ`: a kernel to its points.
    pub weight: unsafe fn(&Grid<T>),
    /// `A y Aᵀ`, the adjoint of `result`.
    pub spread: unsafe fn(&Grid<T>),
    /// `Gᵀ u G`, the adjoint of `weight`; adds to what is there.
    pub collect: unsafe fn(&Grid<T>),
}

/// A linear map of a line of vectors.
///
/// A trait, since closures would not be inlined into a function of another instruction set.
trait Line<const IN: usize, const OUT: usize> {
    /// Whether the result is added to what is there.
    const ADDS: bool = false;
    /// Whether bias and activation follow.
    const ENDS: bool = false;
    /// # Safety
    /// The processor has the instruction set of `V`.
    unsafe fn apply<V: Vector>(x: [V; IN]) -> [V; OUT];
}

/// Applies a line to the columns and then to the rows of a grid.
///
/// # Safety
/// The grid describes memory that exists, and the processor has the instruction set.
#[inline(always)]
unsafe fn transform<V: Vector, L: Line<IN, OUT>, const IN: usize, const OUT: usize>(
    grid: &Grid<V::T>,
) {
    let Grid {
        from_apart: (from_down, from_across),
        to_apart: (to_down, to_across),
        ..
    } = *grid;
    // SAFETY (whole function): as promised by the caller.
    unsafe {
        for lane in 0..V::T::WIDTH / V::LANES {
            let from = grid.from.add(lane * V::LANES);
            let to = grid.to.add(lane * V::LANES);
            let mut between = [[V::splat(V::T::default()); IN]; OUT];
            for j in 0..IN {
                let mut column = [between[0][0]; IN];
                for i in 0..IN {
                    column[i] =
                        V::load(from.offset(i as isize * from_down + j as isize * from_across));
                }
                let column = L::apply(column);
                for i in 0..OUT {
                    between[i][j] = column[i];
                }
            }
            for i in 0..OUT {
                let mut row = L::apply(between[i]);
                for j in 0..OUT {
                    let to = to.offset(i as isize * to_down + j as isize * to_across);
                    if L::ADDS {
                        row[j] = plus(row[j], 1.0, V::load(to));
                    }
                    if L::ENDS && !grid.bias.is_null() {
                        row[j] = plus(row[j], 1.0, V::load(grid.bias.add(lane * V::LANES)));
                    }
                    if L::ENDS {
                        row[j] = clipped(row[j], grid.clip);
                    }
                    row[j].store(to);
                }
            }
        }
    }
}

/// `x + factor * y`
#[inline(always)]
unsafe fn plus<V: Vector>(x: V, factor: f64, y: V) -> V {
    // SAFETY: as promised by the caller.
    unsafe { x.fma(V::splat(V::T::of(factor)), y) }
}

#[inline(always)]
unsafe fn times<V: Vector>(factor: f64, x: V) -> V {
    // SAFETY: as promised by the caller.
    unsafe { x.mul(V::splat(V::T::of(factor))) }
}

struct Source;
impl Line<6, 6> for Source {
    #[inline(always)]
    unsafe fn apply<V: Vector>(d: [V; 6]) -> [V; 6] {
        // SAFETY: as promised by the caller.
        unsafe {
            let (ea, oa) = (plus(d[4], -BB, d[2]), plus(d[3], -BB, d[1]));
            let (eb, ob) = (plus(d[4], -AA, d[2]), plus(d[3], -AA, d[1]));
            [
                plus(plus(d[4], -(AA + BB), d[2]), N0, d[0]),
                plus(ea, A, oa),
                plus(ea, -A, oa),
                plus(eb, B, ob),
                plus(eb, -B, ob),
                plus(plus(d[5], -(AA + BB), d[3]), N0, d[1]),
            ]
        }
    }
}

/// Sums and differences of the values at `±A` and `±B`.
#[inline(always)]
unsafe fn pairs<V: Vector>(m: [V; 6]) -> [V; 4] {
    // SAFETY: as promised by the caller.
    unsafe {
        [
            plus(m[1], 1.0, m[2]),
            plus(m[1], -1.0, m[2]),
            plus(m[3], 1.0, m[4]),
            plus(m[3], -1.0, m[4]),
        ]
    }
}

struct Output;
impl Line<6, 4> for Output {
    const ENDS: bool = true;
    #[inline(always)]
    unsafe fn apply<V: Vector>(m: [V; 6]) -> [V; 4] {
        // SAFETY: as promised by the caller.
        unsafe {
            let [sa, da, sb, db] = pairs(m);
            [
                plus(plus(m[0], 1.0, sa), 1.0, sb),
                plus(times(A, da), B, db),
                plus(times(AA, sa), BB, sb),
                plus(plus(m[5], A * AA, da), B * BB, db),
            ]
        }
    }
}

struct Weight;
impl Line<3, 6> for Weight {
    #[inline(always)]
    unsafe fn apply<V: Vector>(g: [V; 3]) -> [V; 6] {
        // SAFETY: as promised by the caller.
        unsafe {
            let a = plus(times(1.0 / NA, g[0]), AA / NA, g[2]);
            let b = plus(times(1.0 / NB, g[0]), BB / NB, g[2]);
            [
                times(1.0 / N0, g[0]),
                plus(a, A / NA, g[1]),
                plus(a, -A / NA, g[1]),
                plus(b, B / NB, g[1]),
                plus(b, -B / NB, g[1]),
                g[2],
            ]
        }
    }
}

struct OutputAdjoint;
impl Line<4, 6> for OutputAdjoint {
    #[inline(always)]
    unsafe fn apply<V: Vector>(y: [V; 4]) -> [V; 6] {
        // SAFETY: as promised by the caller.
        unsafe {
            let (ea, oa) = (plus(y[0], AA, y[2]), plus(y[1], AA, y[3]));
            let (eb, ob) = (plus(y[0], BB, y[2]), plus(y[1], BB, y[3]));
            [
                y[0],
                plus(ea, A, oa),
                plus(ea, -A, oa),
                plus(eb, B, ob),
                plus(eb, -B, ob),
                y[3],
            ]
        }
    }
}

struct WeightAdjoint;
impl Line<6, 3> for WeightAdjoint {
    const ADDS: bool = true;
    #[inline(always)]
    unsafe fn apply<V: Vector>(u: [V; 6]) -> [V; 3] {
        // SAFETY: as promised by the caller.
        unsafe {
            let [sa, da, sb, db] = pairs(u);
            [
                plus(plus(times(1.0 / N0, u[0]), 1.0 / NA, sa), 1.0 / NB, sb),
                plus(times(A / NA, da), B / NB, db),
                plus(plus(u[5], AA / NA, sa), BB / NB, sb),
            ]
        }
    }
}

// SAFETY (the five): as for `transform`.
#[inline(always)]
pub(super) unsafe fn source<V: Vector>(grid: &Grid<V::T>) {
    unsafe { transform::<V, Source, 6, 6>(grid) }
}
#[inline(always)]
pub(super) unsafe fn result<V: Vector>(grid: &Grid<V::T>) {
    unsafe { transform::<V, Output, 6, 4>(grid) }
}
#[inline(always)]
pub(super) unsafe fn weight<V: Vector>(grid: &Grid<V::T>) {
    unsafe { transform::<V, Weight, 3, 6>(grid) }
}
#[inline(always)]
pub(super) unsafe fn spread<V: Vector>(grid: &Grid<V::T>) {
    unsafe { transform::<V, OutputAdjoint, 4, 6>(grid) }
}
#[inline(always)]
pub(super) unsafe fn collect<V: Vector>(grid: &Grid<V::T>) {
    unsafe { transform::<V, WeightAdjoint, 6, 3>(grid) }
}

/// Transformed tiles of a chunk: `[point][panel][tile][channel]`.
#[derive(Clone, Copy)]
struct Points<T> {
    values: Shared<T>,
    tiles: usize,
    /// From one point to the next: a line more than it takes, or the points of a tile would share
    /// a set of the cache.
    apart: usize,
}

impl<T: Lanes> Points<T> {
    fn len(panels: usize, tiles: usize) -> usize {
        POINTS * (panels * tiles + 1) * T::WIDTH
    }
    /// `values` are `len` long.
    fn new(values: &mut [T], tiles: usize) -> Self {
        Self {
            values: Shared(values.as_mut_ptr()),
            tiles,
            apart: values.len() / POINTS,
        }
    }
    fn at(&self, point: usize, panel: usize, tile: usize) -> *mut T {
        let at = point * self.apart + (panel * self.tiles + tile) * T::WIDTH;
        self.values.at(at)
    }
    /// Between rows and columns of a tile's points.
    fn apart(&self) -> (isize, isize) {
        ((REACH * self.apart) as isize, self.apart as isize)
    }
}

/// Maps to take tiles from.
struct Maps<'a, T> {
    values: &'a [T],
    panels: usize,
    size: (usize, usize),
    /// Zeros above and to the left of them.
    margin: usize,
}

/// A convolution of stride 1 with a 3x3 kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Winograd {
    /// Of the convolution whose weights these are, also where this one is its adjoint.
    shapes: Shapes,
    batch: usize,
    panels: (usize, usize),
    input: (usize, usize),
    output: (usize, usize),
    padding: usize,
}

impl Winograd {
    /// Where the kernel is 3x3, stride and dilation are 1, the padding is no more than the kernel
    /// reaches, and every output channel sees every input channel.
    fn new(shapes: &Shapes) -> Option<Self> {
        let Shapes { rows, columns, .. } = *shapes;
        let fits = |axis: ConvAxis| (axis.kernel, axis.stride, axis.dilation) == (3, 1, 1);
        let padding = rows.padding;
        let fits = fits(rows) && fits(columns) && padding <= 2 && columns.padding == padding;
        (fits && shapes.groups == 1).then_some(Self {
            shapes: *shapes,
            batch: shapes.batch,
            panels: shapes.panels(),
            input: (rows.input, columns.input),
            output: (rows.output, columns.output),
            padding,
        })
    }

    /// Where this is faster than the direct sums: in f32 (f64 keeps the last digits), and where the
    /// tiles are filled well enough and many enough to pay for transforming the weights. Measured
    /// with AVX2 on 27 shapes, the channels (16 to 512) make no difference to the rule.
    pub(super) fn of<T: Lanes>(shapes: &Shapes) -> Option<Self> {
        let pays = |(height, width): (usize, usize)| {
            let tiles = shapes.batch * height.div_ceil(TILE) * width.div_ceil(TILE);
            6 * (tiles + 10) <= shapes.batch * height * width
        };
        let channels = shapes.channels.0.max(shapes.channels.1);
        let possible = channels <= 512 && T::DTYPE == DType::F32;
        Self::new(shapes).filter(|w| possible && pays(w.output) && pays(w.input))
    }

    fn tiles(&self) -> usize {
        self.batch * self.output.0.div_ceil(TILE) * self.output.1.div_ceil(TILE)
    }

    /// Tiles that go through the phases together: all, or equal parts.
    fn chunk(&self) -> usize {
        self.tiles().div_ceil(self.tiles().div_ceil(CHUNK))
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> {
        let (tiles, chunk) = (self.tiles(), self.chunk());
        let part = move |first: usize| first..(first + chunk).min(tiles);
        (0..tiles).step_by(chunk).map(part)
    }

    /// Image, row and column of a tile's first output pixel.
    fn tile(&self, index: usize) -> (usize, usize, usize) {
        let across = self.output.1.div_ceil(TILE);
        let tiles = self.output.0.div_ceil(TILE) * across;
        let (image, tile) = (index / tiles, index % tiles);
        (image, tile / across * TILE, tile % across * TILE)
    }

    pub(super) fn forward<T: Lanes>(
        &self,
        x: &[T],
        weight: &[T],
        after: (Option<&[T]>, Clip<T>),
        isa: &Isa<T>,
    ) -> Vec<T> {
        let packed = pack(&self.shapes, weight, false);
        self.convolve(x, &packed, false, after, isa)
    }

    pub(super) fn input_gradient<T: Lanes>(&self, dy: &[T], weight: &[T], isa: &Isa<T>) -> Vec<T> {
        let (inputs, outputs) = self.panels;
        let packed = pack(&self.shapes, weight, true);
        // A convolution as well, with the kernel rotated and the channels exchanged.
        let adjoint = Self {
            panels: (outputs, inputs),
            input: self.output,
            output: self.input,
            padding: 2 - self.padding,
            ..*self
        };
        adjoint.convolve(dy, &packed, true, (None, Clip::off()), isa)
    }

    /// `packed` weights as [`pack`] leaves them, one output panel after the other.
    fn convolve<T: Lanes>(
        &self,
        x: &[T],
        packed: &[T],
        rotated: bool,
        (bias, clip): (Option<&[T]>, Clip<T>),
        isa: &Isa<T>,
    ) -> Vec<T> {
        let w = T::WIDTH;
        let (inputs, outputs) = self.panels;
        let maps = Maps {
            values: x,
            panels: inputs,
            size: self.input,
            margin: self.padding,
        };
        let chunk = self.chunk();
        let mut points = Unwritten::new(Points::<T>::len(inputs, chunk));
        let points = Points::new(points.places(), chunk);

        // Weights that serve one chunk are transformed where they are used, and stay in the cache.
        let once = chunk == self.tiles();
        let (kernel, kernel_points) = (inputs * TAPS * w * w, Points::<T>::len(inputs, w));
        let mut weights = Unwritten::new(if once { 0 } else { outputs * kernel_points });
        weights
            .places()
            .par_chunks_exact_mut(kernel_points)
            .zip(packed.par_chunks_exact(kernel))
            .for_each(|(to, packed)| transform_weights(packed, rotated, to, isa));
        let weights = &*weights.places();

        let piece = if once { chunk } else { PIECE };
        let pixels: Vec<_> = (0..piece).map(|tile| (tile * w, tile * w)).collect();
        let blocks: Vec<_> = (0..inputs)
            .map(|panel| (panel * chunk * w, panel * w * w))
            .collect();
        let groups = outputs.div_ceil(isa.panels);
        let mut y = Unwritten::new(self.batch * outputs * self.output.0 * self.output.1 * w);
        let place = Shared(y.places().as_mut_ptr());
        for tiles in self.chunks() {
            self.transform_tiles::<T, REACH>(&maps, &tiles, 0, points, isa.transforms.source);
            let pieces = tiles.len().div_ceil(piece);
            (0..groups * pieces).into_par_iter().for_each(|task| {
                let (first, from) = (task / pieces * isa.panels, task % pieces * piece);
                let panels = isa.panels.min(outputs - first);
                let count = piece.min(tiles.len() - from);
                let own = if once { panels * kernel_points } else { 0 };
                let sums = Points::<T>::len(panels, piece);
                with_scratch(own + sums, |scratch: &mut [T]| {
                    let (own, sums) = scratch.split_at_mut(own);
                    let packed = packed[first * kernel..].chunks_exact(kernel);
                    for (to, packed) in own.chunks_exact_mut(kernel_points).zip(packed) {
                        transform_weights(packed, rotated, to, isa);
                    }
                    let weights = match once {
                        true => own,
                        false => &weights[first * kernel_points..],
                    };
                    let sums = Points::new(sums, piece);
                    for point in 0..POINTS {
                        let job = Gather {
                            x: points.at(point, 0, from),
                            weight: weights[point * (kernel_points / POINTS)..].as_ptr(),
                            y: sums.at(point, 0, 0),
                            pixels: &pixels[..count],
                            blocks: &blocks,
                            panels,
                            weight_panel: kernel_points,
                            y_panel: piece * w,
                            bias: std::ptr::null(),
                            clip: Clip::off(),
                        };
                        // SAFETY: tiles `from..from + count` of every panel and this point have
                        // been transformed, and so have the weights; the sums are this task's.
                        unsafe { isa.gather(&job) };
                    }
                    for tile in 0..count {
                        for panel in 0..panels {
                            let index = tiles.start + from + tile;
                            let bias = bias.map(|bias| bias[(first + panel) * w..].as_ptr());
                            let nowhere = (std::ptr::null_mut(), (0, 0));
                            let from = sums.at(0, panel, tile);
                            let grid = Grid {
                                bias: bias.unwrap_or(std::ptr::null()),
                                clip,
                                ..Grid::new(from, sums.apart(), nowhere.0, nowhere.1)
                            };
                            // SAFETY: all points of the tile were summed; a tile and panel are
                            // one task's.
                            unsafe { self.write(grid, index, first + panel, place, isa) };
                        }
                    }
                });
            });
        }
        // SAFETY: each pixel lies in one tile, and each tile of every panel was written.
        unsafe { y.written() }
    }

    /// Transforms a tile's sums, the source of `grid`, to its pixels in `y`.
    ///
    /// # Safety
    /// The sums and, if there is one, the bias of `grid` exist; `y` is the output, and nobody else
    /// has these pixels of it.
    unsafe fn write<T: Lanes>(
        &self,
        grid: Grid<T>,
        index: usize,
        panel: usize,
        y: Shared<T>,
        isa: &Isa<T>,
    ) {
        let w = T::WIDTH;
        let (image, row, column) = self.tile(index);
        let (height, width) = self.output;
        let plane = (image * self.panels.1 + panel) * height * width;
        let to = y.at((plane + row * width + column) * w);
        let (rows, columns) = (TILE.min(height - row), TILE.min(width - column));
        // SAFETY: as promised by the caller; the pixels lie inside the plane.
        unsafe {
            if (rows, columns) == (TILE, TILE) {
                let to_apart = ((width * w) as isize, w as isize);
                return (isa.transforms.result)(&Grid {
                    to,
                    to_apart,
                    ..grid
                });
            }
            let mut whole = [T::ZERO; TILE * TILE * LANES];
            let to_apart = ((TILE * w) as isize, w as isize);
            (isa.transforms.result)(&Grid {
                to: whole.as_mut_ptr(),
                to_apart,
                ..grid
            });
            for r in 0..rows {
                let from = whole[r * TILE * w..][..columns * w].as_ptr();
                to.add(r * width * w)
                    .copy_from_nonoverlapping(from, columns * w);
            }
        }
    }

    /// Transforms windows of `SIDE` pixels around these tiles, with zeros beyond the maps; panels
    /// come to `points` after `before` others.
    fn transform_tiles<T: Lanes, const SIDE: usize>(
        &self,
        maps: &Maps<'_, T>,
        tiles: &Range<usize>,
        before: usize,
        points: Points<T>,
        transform: unsafe fn(&Grid<T>),
    ) {
        let (w, margin, (height, width)) = (T::WIDTH, maps.margin, maps.size);
        let plane = height * width * w;
        let pieces = tiles.len().div_ceil(PIECE);
        (0..maps.panels * pieces).into_par_iter().for_each(|task| {
            let (panel, from) = (task / pieces, task % pieces * PIECE);
            let mut window = [T::ZERO; REACH * REACH * LANES];
            for tile in from..(from + PIECE).min(tiles.len()) {
                let (image, row, column) = self.tile(tiles.start + tile);
                let map = &maps.values[(image * maps.panels + panel) * plane..][..plane];
                let inside = |at: usize, side| at >= margin && at + SIDE <= side + margin;
                let (from, from_down) = if inside(row, height) && inside(column, width) {
                    let at = (row - margin) * width + column - margin;
                    (map[at * w..].as_ptr(), width)
                } else {
                    window.fill(T::ZERO);
                    let left = margin.saturating_sub(column);
                    let end = SIDE.min((width + margin).saturating_sub(column));
                    for r in (0..SIDE).filter(|_| left < end) {
                        let y = (row + r).wrapping_sub(margin);
                        if y < height {
                            let at = (y * width + column + left - margin) * w;
                            window[(r * SIDE + left) * w..(r * SIDE + end) * w]
                                .copy_from_slice(&map[at..at + (end - left) * w]);
                        }
                    }
                    (window.as_ptr(), SIDE)
                };
                let from_apart = ((from_down * w) as isize, w as isize);
                let to = points.at(0, before + panel, tile);
                let grid = Grid::new(from, from_apart, to, points.apart());
                // SAFETY: the window lies in the map or in its copy; the points of a tile and
                // panel are one task's.
                unsafe { transform(&grid) };
            }
        });
    }

    pub(super) fn weight_gradient<T: Lanes>(&self, x: &[T], dy: &[T], isa: &Isa<T>) -> Vec<T> {
        let w = T::WIDTH;
        let (inputs, outputs) = self.panels;
        let x = Maps {
            values: x,
            panels: inputs,
            size: self.input,
            margin: self.padding,
        };
        let dy = Maps {
            values: dy,
            panels: outputs,
            size: self.output,
            margin: 0,
        };
        let chunk = self.chunk();
        let mut points = Unwritten::new(Points::<T>::len(inputs + outputs, chunk));
        let points = Points::new(points.places(), chunk);
        let block = w * w;
        let groups = outputs.div_ceil(isa.panels);
        let mut dw = vec![T::ZERO; inputs * outputs * TAPS * block];
        let place = Shared(dw.as_mut_ptr());
        for tiles in self.chunks() {
            self.transform_tiles::<T, REACH>(&x, &tiles, 0, points, isa.transforms.source);
            self.transform_tiles::<T, TILE>(&dy, &tiles, inputs, points, isa.transforms.spread);
            (0..inputs * groups).into_par_iter().for_each(|task| {
                let (panel, first) = (task / groups, task % groups * isa.panels);
                let panels = isa.panels.min(outputs - first);
                with_scratch(Points::<T>::len(panels, w), |scratch: &mut [T]| {
                    scratch.fill(T::ZERO);
                    let sums = Points::new(scratch, w);
                    for point in 0..POINTS {
                        let job = Correlate {
                            x: points.at(point, panel, 0),
                            dy: points.at(point, inputs + first, 0),
                            dw: sums.at(point, 0, 0),
                            runs: &[(0, 0)],
                            count: tiles.len(),
                            step: w,
                            panels,
                            dw_panel: block,
                            dy_panel: chunk * w,
                        };
                        // SAFETY: the chunk's tiles have been transformed; the sums are this
                        // task's.
                        unsafe { isa.correlate(&job) };
                    }
                    for out in 0..panels {
                        let to = ((first + out) * inputs + panel) * TAPS * block;
                        for c in 0..w {
                            let (from, to) = (sums.at(0, out, c), place.at(to + c * w));
                            let to_apart = ((3 * block) as isize, block as isize);
                            let grid = Grid::new(from, sums.apart(), to, to_apart);
                            // SAFETY: these blocks of weights are this task's.
                            unsafe { (isa.transforms.collect)(&grid) };
                        }
                    }
                });
            });
        }
        unpack(&self.shapes, &dw)
    }
}

/// Transforms the weights of an output panel, `[in panel][tap][in][out]`, to points.
fn transform_weights<T: Lanes>(packed: &[T], rotated: bool, to: &mut [T], isa: &Isa<T>) {
    let block = T::WIDTH * T::WIDTH;
    let to = Points::new(to, T::WIDTH);
    for (panel, taps) in packed.chunks_exact(TAPS * block).enumerate() {
        let (first, apart) = match rotated {
            true => ((TAPS - 1) * block, -(block as isize)),
            false => (0, block as isize),
        };
        for c in 0..T::WIDTH {
            let from = taps.as_ptr().wrapping_add(first + c * T::WIDTH);
            let grid = Grid::new(from, (3 * apart, apart), to.at(0, panel, c), to.apart());
            // SAFETY: the nine blocks lie in `taps`, the points of this row in `to`.
            unsafe { (isa.transforms.weight)(&grid) };
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::blocked::{block, unblock};
    use crate::element::{read, values};
    use crate::ops::{Activation, Conv};
    use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
    use isqrt_linalg::Kernel;
    use isqrt_testkit::{Gradcheck, gradcheck, randn, relative_error};

    /// Output, gradient of the input, gradient of the weights; by tiles or directly.
    fn run<T: Lanes>(
        [x, weight, dy]: [&Tensor; 3],
        padding: usize,
        tiled: bool,
        kernel: Kernel,
    ) -> [Tensor; 3] {
        let [x, weight, dy] = [x, weight, dy].map(|t| t.to_dtype(T::DTYPE).unwrap());
        let [x, dy] = [x, dy].map(|t| block(&t).unwrap());
        let g = Shapes::new(&x, &weight, Conv::new(1, padding)).unwrap();
        let winograd = Winograd::new(&g).unwrap();
        let isa = T::isa(kernel);
        let (xs, ws, dys) = (read(&x), read(&weight), read(&dy));
        let [xs, ws, dys] = [&xs, &ws, &dys].map(|t| t.values::<T>().unwrap());
        let [y, dx, dw] = match tiled {
            true => [
                winograd.forward(xs, ws, (None, Clip::off()), isa),
                winograd.input_gradient(dys, ws, isa),
                winograd.weight_gradient(xs, dys, isa),
            ],
            false => {
                let y = g.forward(xs, ws, (None, Activation::None), true, kernel);
                let (dx, dw) = g.backward(xs, ws, dys, true, true, kernel);
                [y, dx.unwrap(), dw]
            }
        };
        let wide = |values: Vec<T>, like: &Tensor| {
            let t = Tensor::from_vec(values, like.shape(), like.device()).unwrap();
            let t = if t.rank() == 5 {
                unblock(&t).unwrap()
            } else {
                t
            };
            t.to_dtype(DType::F64).unwrap()
        };
        [wide(y, &dy), wide(dx, &x), wide(dw, &weight)]
    }

    fn operands([b, c, h, w]: [usize; 4], out: usize, padding: usize) -> [Tensor; 3] {
        // Activations after a ReLU, and weights as they are drawn for them.
        let x = randn(&[b, c, h, w], 1, DType::F32).unwrap().relu().unwrap();
        let weight = randn(&[out, c, 3, 3], 2, DType::F32).unwrap();
        let weight = (weight * (2.0 / (9 * c) as f64).sqrt()).unwrap();
        let shape = [b, out, h + 2 * padding - 2, w + 2 * padding - 2];
        [x, weight, randn(&shape, 3, DType::F32).unwrap()]
    }

    #[test]
    fn equals_the_direct_sums_on_every_kernel() {
        for (shape, out, padding) in [
            ([2, 16, 5, 6], 32, 1),
            ([1, 32, 8, 8], 48, 1),
            ([2, 16, 1, 9], 16, 1),
            ([3, 16, 9, 1], 32, 2),
            ([3, 48, 7, 7], 16, 2),
            ([1, 16, 1, 1], 16, 1),
            ([1, 16, 3, 3], 16, 0),
            ([2, 16, 13, 6], 48, 0),
            // Several chunks and pieces.
            ([2, 16, 45, 63], 32, 1),
        ] {
            let operands = operands(shape, out, padding);
            let operands = operands.each_ref();
            for kernel in [Kernel::Portable, Kernel::Avx2, Kernel::Avx512] {
                if kernel.resolve().is_err() {
                    continue;
                }
                let known = run::<f64>(operands, padding, false, kernel);
                let found = run::<f64>(operands, padding, true, kernel);
                let single = run::<f32>(operands, padding, true, kernel);
                for i in 0..3 {
                    let error = [&found, &single]
                        .map(|found| relative_error(&found[i], &known[i]).unwrap());
                    assert!(
                        error[0] < 1e-12 && error[1] < 2e-6,
                        "{shape:?} {kernel:?} {i}: {error:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn rounds_little_in_single_precision() {
        for (shape, out) in [
            ([2, 64, 28, 28], 64),
            ([1, 256, 14, 14], 128),
            ([8, 512, 7, 7], 512),
        ] {
            let operands = operands(shape, out, 1);
            let operands = operands.each_ref();
            let known = run::<f64>(operands, 1, false, Kernel::Auto);
            let found = run::<f32>(operands, 1, true, Kernel::Auto);
            for (found, known) in found.iter().zip(&known) {
                let error = relative_error(found, known).unwrap();
                assert!(error < 2e-6, "{shape:?} {:?}: {error:e}", found.dims());
            }
        }
    }

    #[test]
    fn is_taken_where_it_pays() {
        let taken = |shape: [usize; 4], kernel: usize, stride, dtype| {
            let x = block(&Tensor::zeros(&shape, dtype, &candle_core::Device::Cpu).unwrap());
            let weight = randn(&[64, shape[1], kernel, kernel], 1, dtype).unwrap();
            let padding = kernel / 2;
            let g = Shapes::new(&x.unwrap(), &weight, Conv::new(stride, padding)).unwrap();
            match dtype {
                DType::F32 => Winograd::of::<f32>(&g).is_some(),
                _ => Winograd::of::<f64>(&g).is_some(),
            }
        };
        assert!(taken([1, 16, 56, 56], 3, 1, DType::F32));
        assert!(taken([8, 512, 7, 7], 3, 1, DType::F32));
        assert!(!taken([8, 16, 56, 56], 3, 1, DType::F64));
        assert!(!taken([8, 16, 56, 56], 3, 2, DType::F32));
        assert!(!taken([8, 16, 56, 56], 5, 1, DType::F32));
        assert!(!taken([8, 1024, 7, 7], 3, 1, DType::F32));
        // Few tiles, and tiles that are half empty.
        assert!(!taken([1, 512, 7, 7], 3, 1, DType::F32));
        assert!(!taken([8, 64, 5, 5], 3, 1, DType::F32));
    }

    /// Winograd's convolution in f64, which takes the direct sums otherwise.
    struct Op(Shapes);

    impl CustomOp2 for Op {
        fn name(&self) -> &'static str {
            "winograd"
        }
        fn cpu_fwd(
            &self,
            s1: &CpuStorage,
            l1: &Layout,
            s2: &CpuStorage,
            l2: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            let isa = f64::isa(Kernel::Auto);
            let winograd = Winograd::new(&self.0).unwrap();
            let (x, weight) = (values::<f64>(s1, l1)?, values(s2, l2)?);
            let y = winograd.forward(x, weight, (None, Clip::off()), isa);
            Ok((f64::to_cpu_storage_owned(y), self.0.shape()))
        }
        fn bwd(
            &self,
            x: &Tensor,
            weight: &Tensor,
            _y: &Tensor,
            dy: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let isa = f64::isa(Kernel::Auto);
            let winograd = Winograd::new(&self.0).unwrap();
            let dy = dy.contiguous()?;
            let (xs, ws, dys) = (read(x), read(weight), read(&dy));
            let dx = winograd.input_gradient::<f64>(dys.values()?, ws.values()?, isa);
            let dw = winograd.weight_gradient::<f64>(xs.values()?, dys.values()?, isa);
            Ok((
                Some(Tensor::from_vec(dx, x.shape(), x.device())?),
                Some(Tensor::from_vec(dw, weight.shape(), x.device())?),
            ))
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        for (shape, padding) in [([2, 8, 5, 6], 1), ([1, 16, 3, 4], 0), ([1, 8, 1, 3], 2)] {
            let x = block(&randn(&shape, 1, DType::F64).unwrap()).unwrap();
            let weight = randn(&[8, shape[1], 3, 3], 2, DType::F64).unwrap();
            let f = |t: &[Tensor]| {
                let g = Shapes::new(&t[0], &t[1], Conv::new(1, padding))?;
                t[0].apply_op2(&t[1], Op(g))
            };
            gradcheck(f, &[x, weight], Gradcheck::default()).unwrap();
        }
    }
}
