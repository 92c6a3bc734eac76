//! Products of panel matrices with a linear epilogue.
//!
//! A matrix is stored as panels of [`Element::WIDTH`] columns, row after row, one cache line a
//! row. Read along its rows such a panel is a packed right operand; read along its columns it is
//! the packed left operand of the transposed (for a symmetric matrix: of the same) matrix. So
//! nothing is ever packed again between products.
//!
//! A symmetric result is computed in its upper panels only. The other half is written from the
//! registers, transposed. Columns beyond the last full panel are computed as rows of the lower
//! part instead, which wastes fewer lanes.

// Plain index loops over register arrays are what the compiler unrolls for certain.
#![allow(clippy::needless_range_loop)]

use super::vector::{Element, Vector};

/// A matrix in column panels; `stride` elements from one panel to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<T> {
    pub at: *mut T,
    pub stride: usize,
}

impl<T: Element> Matrix<T> {
    /// Elements that a matrix takes: rows are padded to four, columns to a panel.
    pub(crate) fn len(rows: usize, columns: usize) -> usize {
        rows.next_multiple_of(4) * columns.next_multiple_of(T::WIDTH)
    }

    pub(crate) fn new(at: *mut T, rows: usize) -> Self {
        Self {
            at,
            stride: rows.next_multiple_of(4) * T::WIDTH,
        }
    }

    /// # Safety
    /// `(row, column)` lies inside the matrix.
    #[inline(always)]
    pub(crate) unsafe fn element(self, row: usize, column: usize) -> *mut T {
        // SAFETY: as promised by the caller.
        unsafe {
            self.at
                .add(column / T::WIDTH * self.stride + row * T::WIDTH + column % T::WIDTH)
        }
    }

    /// Where vector `v` of a tile that begins at `row` and `panel` begins; its next row lies one
    /// panel width further on.
    ///
    /// # Safety
    /// The tile lies inside the matrix.
    #[inline(always)]
    unsafe fn block<V: Vector<T = T>>(self, row: usize, panel: usize, v: usize) -> *mut T {
        let per_panel = T::WIDTH / V::LANES;
        // SAFETY: as promised by the caller.
        unsafe {
            self.at.add(
                (panel + v / per_panel) * self.stride + row * T::WIDTH + v % per_panel * V::LANES,
            )
        }
    }
}

/// One summand `left . right` of a product.
#[derive(Clone, Copy)]
pub(crate) struct Term<T> {
    pub left: Matrix<T>,
    /// Read the left matrix as it is stored; otherwise transposed (symmetric ones: faster).
    pub plain: bool,
    pub right: Matrix<T>,
    pub inner: usize,
}

/// Where a result goes.
#[derive(Clone, Copy)]
pub(crate) enum Target<T> {
    /// A panel matrix; of a symmetric product both halves are written.
    Panels(Matrix<T>),
    /// The upper triangle, row by row, of a symmetric `d x d` result.
    Triangle(*mut T, usize),
    /// Rows of the given length; of a symmetric product both halves are written.
    Rows(*mut T, usize),
}

/// `target = alpha * product + sum of weighted matrices + diagonal * I`.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a, T> {
    pub target: Target<T>,
    pub alpha: T,
    pub terms: &'a [(T, Matrix<T>)],
    pub diagonal: T,
}

/// A product and its epilogues.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a, T> {
    pub rows: usize,
    pub columns: usize,
    pub symmetric: bool,
    pub terms: &'a [Term<T>],
    pub outs: &'a [Out<'a, T>],
    /// Matrices that the next product needs and that are in no cache yet.
    pub ahead: Ahead<'a, T>,
}

/// Memory to fetch into the cache while a product runs: blocks of `length` elements.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a, T> {
    pub blocks: &'a [*const T],
    pub length: usize,
}

impl<T: Element> Ahead<'_, T> {
    pub(crate) const NOTHING: Self = Self {
        blocks: &[],
        length: 0,
    };

    /// Fetches the share of tile `index` of `count`.
    #[inline(always)]
    pub(crate) fn fetch(&self, index: usize, count: usize) {
        if self.blocks.is_empty() {
            return;
        }
        let share = (self.length / T::WIDTH).div_ceil(count.max(1));
        for &block in self.blocks {
            for line in index * share..((index + 1) * share).min(self.length / T::WIDTH) {
                let at = block.wrapping_add(line * T::WIDTH);
                // SAFETY: a prefetch never faults.
                #[cfg(target_arch = "x86_64")]
                unsafe {
                    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                    _mm_prefetch::<_MM_HINT_T1>(at.cast());
                }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = at;
            }
        }
    }
}

// SAFETY: whoever builds a product vouches for its pointers, and tiles write disjoint places.
unsafe impl<T: Element> Sync for Product<'_, T> {}

/// A block of the result: up to `rows` rows from `row` on, `panels` panels from `panel` on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tile {
    pub row: u32,
    pub panel: u32,
    pub rows: u8,
    pub panels: u8,
}

/// Size of the largest tile of an instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileShape {
    pub rows: usize,
    pub panels: usize,
}

/// Cuts the rows `from..to`, `from` being a multiple of `width`, into heights that the kernels
/// have. No block reaches from one panel of rows into the next.
fn row_blocks(
    (from, to): (usize, usize),
    width: usize,
    shape: TileShape,
    mut each: impl FnMut(usize, usize),
) {
    let small = shape.rows.min(4);
    let to = from + (to - from).next_multiple_of(small);
    let mut row = from;
    while row < to {
        let left = (to - row).min(width - row % width);
        let rows = match shape.rows {
            // 16 rows as 6 + 6 + 4, 12 as 6 + 6, 8 as 4 + 4.
            6 if left == 4 || left == 8 => 4,
            rows if left > small => rows,
            _ => small,
        };
        each(row, rows);
        row += rows;
    }
}

/// The tiles of a full `rows x columns` product.
pub(crate) fn full_tiles(rows: usize, columns: usize, width: usize, shape: TileShape) -> Vec<Tile> {
    let panels = columns.div_ceil(width);
    let mut tiles = Vec::new();
    for panel in (0..panels).step_by(shape.panels) {
        row_blocks((0, rows), width, shape, |row, height| {
            tiles.push(Tile {
                row: row as u32,
                panel: panel as u32,
                rows: height as u8,
                panels: shape.panels.min(panels - panel) as u8,
            });
        });
    }
    tiles
}

/// The tiles of a symmetric `n x n` product: upper panels, and the tail as rows.
pub(crate) fn symmetric_tiles(n: usize, width: usize, shape: TileShape) -> Vec<Tile> {
    let full = n / width;
    let mut tiles = Vec::new();
    for first in (0..full).step_by(shape.panels) {
        let end = full.min(first + shape.panels);
        row_blocks((0, end * width), width, shape, |row, height| {
            let panel = first.max(row / width);
            tiles.push(Tile {
                row: row as u32,
                panel: panel as u32,
                rows: height as u8,
                panels: (end - panel) as u8,
            });
        });
    }
    if full * width < n {
        for panel in (0..=full).step_by(shape.panels) {
            row_blocks((full * width, n), width, shape, |row, height| {
                tiles.push(Tile {
                    row: row as u32,
                    panel: panel as u32,
                    rows: height as u8,
                    panels: shape.panels.min(full + 1 - panel) as u8,
                });
            });
        }
    }
    tiles
}

/// `acc += left^T . right`: the left rows are packed beside each other.
#[inline(always)]
unsafe fn transposed<V: Vector, const MR: usize, const NV: usize>(
    mut acc: [[V; NV]; MR],
    mut left: *const V::T,
    mut right: [*const V::T; NV],
    inner: usize,
) -> [[V; NV]; MR] {
    // Unrolled: after a loop of hundreds of turns the branch predictor remembers nothing else, and
    // guesses the first branches of the epilogue wrong.
    macro_rules! turns {
        ($count:literal) => {
            for turn in 0..$count {
                // SAFETY: the caller's product describes `inner` rows of both operands.
                unsafe {
                    let mut b = [V::splat(V::T::default()); NV];
                    for v in 0..NV {
                        b[v] = V::load(right[v].wrapping_add(turn * V::T::WIDTH));
                    }
                    for r in 0..MR {
                        let a = V::splat(*left.wrapping_add(turn * V::T::WIDTH + r));
                        for v in 0..NV {
                            acc[r][v] = acc[r][v].fma(a, b[v]);
                        }
                    }
                }
            }
            left = left.wrapping_add($count * V::T::WIDTH);
            for v in 0..NV {
                right[v] = right[v].wrapping_add($count * V::T::WIDTH);
            }
        };
    }
    for _ in 0..inner / 4 {
        turns!(4);
    }
    for _ in 0..inner % 4 {
        turns!(1);
    }
    acc
}

/// `acc += left . right`: the left matrix is read as it is stored, a panel of the inner
/// dimension at a time.
#[inline(always)]
unsafe fn plain<V: Vector, const MR: usize, const NV: usize>(
    mut acc: [[V; NV]; MR],
    mut left: *const V::T,
    stride: usize,
    mut right: [*const V::T; NV],
    inner: usize,
) -> [[V; NV]; MR] {
    let mut k = 0;
    while k < inner {
        let columns = V::T::WIDTH.min(inner - k);
        for column in 0..columns {
            // SAFETY: the caller's product describes `inner` columns and rows.
            unsafe {
                let mut b = [V::splat(V::T::default()); NV];
                for v in 0..NV {
                    b[v] = V::load(right[v]);
                    right[v] = right[v].wrapping_add(V::T::WIDTH);
                }
                for r in 0..MR {
                    let a = V::splat(*left.add(r * V::T::WIDTH + column));
                    for v in 0..NV {
                        acc[r][v] = acc[r][v].fma(a, b[v]);
                    }
                }
            }
        }
        k += columns;
        // SAFETY: one past the last panel at most.
        left = left.wrapping_add(stride);
    }
    acc
}

/// Elements of the largest tile.
pub(crate) const TILE: usize = 256;
/// Tiles of a column group that are worked on term by term.
pub(crate) const BATCH: usize = 32;

/// Splits tiles into batches of one column group: term by term, the right operand of a batch then
/// stays in the first-level cache, where the panels of two terms would not fit.
pub(crate) fn batches(tiles: &[Tile]) -> impl Iterator<Item = &[Tile]> {
    let mut rest = tiles;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let same = |(at, tile): &(usize, &Tile)| *at > 0 && tile.row <= first.row;
        let end = rest
            .iter()
            .enumerate()
            .find(same)
            .map_or(rest.len(), |(at, _)| at);
        let (batch, after) = rest.split_at(end.min(BATCH));
        rest = after;
        Some(batch)
    })
}

/// Adds term number `at` to one tile, whose sum so far is in `partial`; after the last term
/// applies every epilogue.
#[inline(always)]
pub(crate) unsafe fn tile<V: Vector, const MR: usize, const NV: usize>(
    product: &Product<'_, V::T>,
    row: usize,
    panel: usize,
    at: usize,
    partial: *mut V::T,
) {
    let width = V::T::WIDTH;
    // SAFETY (whole function): the product's matrices have the rows and panels of this tile;
    // `partial` holds TILE elements.
    unsafe {
        let mut acc = [[V::splat(V::T::default()); NV]; MR];
        if at > 0 {
            for r in 0..MR {
                for v in 0..NV {
                    acc[r][v] = V::load(partial.add((r * NV + v) * V::LANES));
                }
            }
        }
        let term = &product.terms[at];
        let mut right = [term.right.at.cast_const(); NV];
        for (v, at) in right.iter_mut().enumerate() {
            *at = term.right.block::<V>(0, panel, v);
        }
        acc = if term.plain {
            let left = term.left.at.add(row * width);
            plain(acc, left, term.left.stride, right, term.inner)
        } else {
            transposed(acc, term.left.element(0, row), right, term.inner)
        };
        if at + 1 < product.terms.len() {
            for r in 0..MR {
                for v in 0..NV {
                    acc[r][v].store(partial.add((r * NV + v) * V::LANES));
                }
            }
            return;
        }
        for out in product.outs {
            let mut values = acc;
            let alpha = V::splat(out.alpha);
            for line in &mut values {
                for value in line.iter_mut() {
                    *value = value.mul(alpha);
                }
            }
            for &(weight, matrix) in out.terms {
                let weight = V::splat(weight);
                for v in 0..NV {
                    let other = matrix.block::<V>(row, panel, v);
                    for r in 0..MR {
                        values[r][v] = values[r][v].fma(weight, V::load(other.add(r * width)));
                    }
                }
            }
            match out.target {
                Target::Panels(matrix) => {
                    store_panels(product, out.diagonal, matrix, &values, row, panel);
                }
                Target::Triangle(at, d) => {
                    let column = panel * width;
                    if row + MR <= column && column + NV * V::LANES <= d {
                        for r in 0..MR {
                            let i = row + r;
                            let start = at.add(i * (2 * d - i + 1) / 2 + column - i);
                            for v in 0..NV {
                                values[r][v].store(start.add(v * V::LANES));
                            }
                        }
                        continue;
                    }
                    let mut buffer = [[V::T::default(); 32]; MR];
                    spill(&values, &mut buffer);
                    store_triangle(&buffer, NV * V::LANES, out.diagonal, at, d, row, column);
                }
                Target::Rows(at, length) => {
                    let column = panel * width;
                    let inside =
                        row + MR <= product.rows && column + NV * V::LANES <= product.columns;
                    if inside && !product.symmetric {
                        let start = at.add(row * length + column);
                        for r in 0..MR {
                            for v in 0..NV {
                                values[r][v].store(start.add(r * length + v * V::LANES));
                            }
                        }
                        continue;
                    }
                    let mut buffer = [[V::T::default(); 32]; MR];
                    spill(&values, &mut buffer);
                    let tile = (row, column, NV * V::LANES);
                    store_rows(product, &buffer, tile, out.diagonal, at, length);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn spill<V: Vector, const MR: usize, const NV: usize>(
    values: &[[V; NV]; MR],
    buffer: &mut [[V::T; 32]; MR],
) {
    for r in 0..MR {
        for v in 0..NV {
            // SAFETY: NV * LANES <= 32 in every instantiation.
            unsafe { values[r][v].store(buffer[r].as_mut_ptr().add(v * V::LANES)) };
        }
    }
}

#[inline(always)]
unsafe fn store_panels<V: Vector, const MR: usize, const NV: usize>(
    product: &Product<'_, V::T>,
    diagonal: V::T,
    matrix: Matrix<V::T>,
    values: &[[V; NV]; MR],
    row: usize,
    panel: usize,
) {
    let width = V::T::WIDTH;
    let row_panel = row / width;
    // SAFETY: as for the tile.
    unsafe {
        let mirrored = matrix.at.add(row_panel * matrix.stride + row % width);
        for v in 0..NV {
            let to = matrix.block::<V>(row, panel, v);
            let mut rows = [V::splat(V::T::default()); MR];
            for r in 0..MR {
                rows[r] = values[r][v];
                rows[r].store(to.add(r * width));
            }
            // A diagonal block is computed whole, so it is not mirrored onto itself.
            let column = panel * width + v * V::LANES;
            if product.symmetric && column / width != row_panel {
                V::store_transposed(&rows, mirrored.add(column * width), width);
            }
        }
        // No tile reaches from one panel of rows into the next.
        let on_diagonal = row_panel >= panel && (row_panel - panel) * width < NV * V::LANES;
        if on_diagonal && diagonal != V::T::default() {
            for i in row..(row + MR).min(product.rows) {
                *matrix.element(i, i) += diagonal;
            }
        }
    }
}

#[inline(always)]
unsafe fn store_triangle<T: Element, const MR: usize>(
    buffer: &[[T; 32]; MR],
    columns: usize,
    diagonal: T,
    at: *mut T,
    d: usize,
    row: usize,
    column: usize,
) {
    for (r, line) in buffer.iter().enumerate() {
        let i = row + r;
        if i >= d {
            break;
        }
        // SAFETY: (i, j) with i <= j < d has this place in a triangle of d(d+1)/2.
        unsafe {
            let start = |i: usize| at.add(i * (2 * d - i + 1) / 2);
            // Entries on and right of the diagonal lie beside each other.
            let from = column.max(i);
            let to = (column + columns).min(d);
            if from < to {
                let source = line.as_ptr().add(from - column);
                std::ptr::copy_nonoverlapping(source, start(i).add(from - i), to - from);
                if from == i {
                    *start(i) += diagonal;
                }
            }
            // Left of the diagonal block (rows of the tail): the mirrored place.
            for j in column..to.min(i / T::WIDTH * T::WIDTH) {
                *start(j).add(i - j) = line[j - column];
            }
        }
    }
}

#[inline(always)]
unsafe fn store_rows<T: Element, const MR: usize>(
    product: &Product<'_, T>,
    buffer: &[[T; 32]; MR],
    (row, column, columns): (usize, usize, usize),
    diagonal: T,
    at: *mut T,
    length: usize,
) {
    let to = (column + columns).min(product.columns);
    for (r, line) in buffer.iter().enumerate() {
        let i = row + r;
        if i >= product.rows {
            break;
        }
        // SAFETY: row i has `length` elements, columns end at product.columns.
        unsafe {
            std::ptr::copy_nonoverlapping(line.as_ptr(), at.add(i * length + column), to - column);
            if !product.symmetric {
                continue;
            }
            if (column..to).contains(&i) {
                *at.add(i * length + i) += diagonal;
            }
            for j in column..to {
                if j / T::WIDTH != i / T::WIDTH {
                    *at.add(j * length + i) = line[j - column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_their_half_once_and_stay_inside() {
        for (width, rows, panels) in [(16, 8, 2), (8, 8, 2), (16, 6, 1), (8, 4, 1), (16, 2, 1)] {
            let shape = TileShape { rows, panels };
            for n in 1..120_usize {
                let padded = (n.next_multiple_of(4), n.next_multiple_of(width));
                let mut written = vec![0; padded.0 * padded.1];
                let symmetric = symmetric_tiles(n, width, shape);
                for (tiles, mirrored) in
                    [(&symmetric, true), (&full_tiles(n, n, width, shape), false)]
                {
                    written.fill(0);
                    for tile in tiles {
                        let (top, left) = (tile.row as usize, tile.panel as usize * width);
                        let bottom = top + tile.rows as usize;
                        assert_eq!(top / width, (bottom - 1) / width, "{tile:?} of {n}");
                        for i in top..bottom {
                            for j in left..left + tile.panels as usize * width {
                                written[i * padded.1 + j] += 1;
                                if mirrored && i < n && j < n && i / width != j / width {
                                    written[j * padded.1 + i] += 1;
                                }
                            }
                        }
                    }
                    for i in 0..n {
                        for j in 0..n {
                            assert_eq!(
                                written[i * padded.1 + j],
                                1,
                                "({i}, {j}) of {n}, {shape:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
