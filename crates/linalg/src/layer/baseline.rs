//! The layer on a GPU with products of cuBLAS, to compare with: our algebra with its products, and the
//! algorithm of the authors' code, whose every product is of whole matrices.

use super::gpu::Batch;
use super::plan::Iteration;
use crate::Result;
use crate::gpu::{Matrices, Pair, Target};
use isqrt_device::cuda::kernels::{EPILOGUE, POOLING};
use isqrt_device::cuda::{Gemm, Grid, Output, Precision, Real, gemm, int, pointer, real};

const OP: &str = "covariance-pooling";

/// A matrix of each image somewhere in memory.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    row: usize,
    image: usize,
}

impl Place {
    fn of<T: Real>(matrix: &Matrices<T>) -> Self {
        Self {
            at: matrix.at(),
            row: matrix.row,
            image: matrix.image(),
        }
    }
}

fn failed() -> candle_core::Error {
    candle_core::Error::Msg(format!("{OP}: no baseline has such a product"))
}

impl Batch<'_> {
    /// As `product` of `symmetric.cu`, by cuBLAS: whole products, whose epilogues are folded into its factors
    /// as far as they go.
    pub(super) fn by_cublas<T: Real>(
        &self,
        precision: Precision,
        size: (usize, usize),
        pairs: &[Pair],
        targets: &[Target],
    ) -> Result<()> {
        let (rows, columns) = size;
        // Where the product lies as it is, if one of the targets is that.
        let mut plain = None;
        for target in targets {
            let held = target.scale != 0 || target.triangle != 0 || target.narrow != 0;
            if held {
                let between = self.matrices::<T>(rows, columns)?;
                self.one::<T>(precision, size, pairs, target, Place::of(&between), None)?;
                self.epilogue(target, size, &between)?;
                continue;
            }
            let direct = Place {
                at: target.direct,
                row: target.direct_row as usize,
                image: target.direct_image as usize,
            };
            if target.direct != 0 {
                self.one::<T>(precision, size, pairs, target, direct, plain)?;
                if target.alpha == 1.0 && target.count == 0 && target.diagonal == 0.0 {
                    plain = Some(direct);
                }
            }
            if target.transposed != 0 && target.transposed != target.direct {
                if target.count != 0 || target.diagonal != 0.0 {
                    return Err(failed().into());
                }
                let to = Place {
                    at: target.transposed,
                    row: target.transposed_row as usize,
                    image: target.transposed_image as usize,
                };
                // (A'B)' = B'A.
                let turned = |pair: &Pair| Pair {
                    a: pair.b,
                    a_image: pair.b_image,
                    a_row: pair.b_row,
                    b: pair.a,
                    b_image: pair.a_image,
                    b_row: pair.a_row,
                    ..*pair
                };
                let pairs: Vec<Pair> = pairs.iter().map(turned).collect();
                self.one::<T>(precision, (columns, rows), &pairs, target, to, None)?;
            }
        }
        Ok(())
    }

    /// One target, without factors of images: `alpha Σ A'B + terms + diagonal I`.
    fn one<T: Real>(
        &self,
        precision: Precision,
        (rows, columns): (usize, usize),
        pairs: &[Pair],
        target: &Target,
        to: Place,
        plain: Option<Place>,
    ) -> Result<()> {
        let count = target.count as usize;
        let mut terms: Vec<(f64, u64)> = (0..count)
            .map(|at| (target.weights[at], target.terms[at]))
            .collect();
        let mut multiplies = target.alpha != 0.0;
        if let (true, Some(product)) = (multiplies, plain) {
            terms.push((target.alpha, product.at));
            multiplies = false;
        }
        let starts = !terms.is_empty() || target.diagonal != 0.0;
        if starts {
            if terms.len() > 2 || rows != columns {
                return Err(failed().into());
            }
            let term = |at: usize| terms.get(at).copied().unwrap_or((0.0, 0));
            let ((first, a), (second, b)) = (term(0), term(1));
            let mut grid = Grid::over((rows * to.row).div_ceil(4));
            grid.blocks.1 = self.batch;
            let arguments = [
                pointer(to.at),
                pointer(a),
                pointer(b),
                int(rows),
                int(to.row),
                real(first),
                real(second),
                real(target.diagonal),
            ];
            self.images()
                .launch::<T>(&POOLING, "combine", grid, &arguments)?;
        }
        if !multiplies {
            return Ok(());
        }
        for (at, pair) in pairs.iter().enumerate() {
            let job = Gemm {
                shape: (rows, columns, pair.inner as usize),
                a: (pair.a, pair.a_row as usize, pair.a_image as usize, true),
                b: (pair.b, pair.b_row as usize, pair.b_image as usize, false),
                c: (to.at, to.row, to.image),
                alpha: target.alpha,
                beta: if at > 0 || starts { 1.0 } else { 0.0 },
                batch: self.batch,
            };
            // SAFETY: the matrices are of this op and of these sizes; results overlap no operand.
            unsafe { gemm::<T>(OP, self.device, precision, &job) }?;
        }
        Ok(())
    }

    /// Writes what a target wants of a product: times its factor, as a triangle, in bf16.
    fn epilogue<T: Real>(
        &self,
        target: &Target,
        (rows, columns): (usize, usize),
        from: &Matrices<T>,
    ) -> Result<()> {
        let transposed = match target.transposed == target.direct {
            true => 0,
            false => target.transposed,
        };
        let mut grid = Grid::over((rows * columns).div_ceil(4));
        grid.blocks.1 = self.batch;
        let arguments = [
            pointer(from.at()),
            pointer(target.scale),
            pointer(target.direct),
            pointer(transposed),
            pointer(target.triangle),
            int(rows),
            int(columns),
            int(from.row),
            int(target.scale_image as usize),
            int(target.direct_row as usize),
            int(target.transposed_row as usize),
            int(target.narrow as usize),
        ];
        self.images()
            .launch::<T>(&EPILOGUE, "epilogue", grid, &arguments)
    }

    /// `to = alpha left · right + beta to`
    fn times<T: Real>(
        &self,
        precision: Precision,
        alpha: f64,
        left: &Matrices<T>,
        right: &Matrices<T>,
        beta: f64,
        to: &Matrices<T>,
    ) -> Result<()> {
        let n = self.plan.n;
        let job = Gemm {
            shape: (n, n, n),
            a: (left.at(), left.row, left.image(), false),
            b: (right.at(), right.row, right.image(), false),
            c: (to.at(), to.row, to.image()),
            alpha,
            beta,
            batch: self.batch,
        };
        // SAFETY: the matrices are of this op, of side n, and `to` is none of the operands.
        Ok(unsafe { gemm::<T>(OP, self.device, precision, &job) }?)
    }

    /// `first a + diagonal I` in new memory.
    fn shifted<T: Real>(&self, first: f64, a: &Matrices<T>, diagonal: f64) -> Result<Matrices<T>> {
        let to = self.square::<T>()?;
        let arguments = [
            pointer(to.at()),
            pointer(a.at()),
            pointer(0),
            int(self.plan.n),
            int(to.row),
            real(first),
            real(0.0),
            real(diagonal),
        ];
        self.images().over(&POOLING, "combine", &to, &arguments)?;
        Ok(to)
    }

    /// `alpha left · right + diagonal I` in new memory.
    fn made<T: Real>(
        &self,
        precision: Precision,
        alpha: f64,
        left: &Matrices<T>,
        right: &Matrices<T>,
        diagonal: f64,
    ) -> Result<Matrices<T>> {
        if diagonal != 0.0 {
            let to = self.shifted(0.0, left, diagonal)?;
            self.times(precision, alpha, left, right, 1.0, &to)?;
            return Ok(to);
        }
        let to = self.square()?;
        self.times(precision, alpha, left, right, 0.0, &to)?;
        Ok(to)
    }

    /// The coupled iteration as the authors' code has it: `A`, then `Y` and `Z` of every step but the
    /// last, whose `Y` goes to `out`.
    pub(super) fn official_forward<T: Real>(
        &self,
        precision: Precision,
        iteration: &Iteration,
        a: Matrices<T>,
        facts: &Output<f64>,
        out: Option<u64>,
    ) -> Result<Vec<Option<Matrices<T>>>> {
        let mut kept = vec![a.clone()];
        let (mut y, mut factor) = (a.clone(), self.shifted(-0.5, &a, 1.5)?);
        for step in 1..iteration.steps {
            let next = self.made(precision, 1.0, &y, &factor, 0.0)?;
            let z = match step {
                1 => factor,
                _ => self.made(precision, 1.0, &factor, &kept[kept.len() - 1], 0.0)?,
            };
            y = next;
            factor = self.made(precision, -0.5, &z, &y, 1.5)?;
            kept.extend([y.clone(), z]);
        }
        if let Some(out) = out {
            let root = self.made(precision, 1.0, &y, &factor, 0.0)?;
            let n = self.plan.n;
            self.epilogue(&self.output(out, facts), (n, n), &root)?;
        }
        Ok(kept.into_iter().map(Some).collect())
    }

    /// The gradient of `A` from that of the last `Y`, step by step back.
    pub(super) fn official_backward<T: Real>(
        &self,
        precision: Precision,
        kept: &[Option<Matrices<T>>],
        upstream: Matrices<T>,
    ) -> Result<Matrices<T>> {
        let of = |at: usize| {
            let matrix = kept.get(at).and_then(Option::as_ref);
            matrix.ok_or_else(failed)
        };
        let times = |alpha: f64, left: &_, right: &_, beta: f64, to: &_| {
            self.times::<T>(precision, alpha, left, right, beta, to)
        };
        let made = |alpha: f64, left: &_, right: &_, diagonal: f64| {
            self.made::<T>(precision, alpha, left, right, diagonal)
        };
        let a = of(0)?;
        let steps = (kept.len() - 1) / 2;
        // The last step: Y (3I - Z Y) / 2.
        let (mut dy, mut dz) = (upstream, None);
        for step in (0..steps).rev() {
            let (y, z) = (of(2 * step + 1)?, of(2 * step + 2)?);
            let across = made(-1.0, y, z, 3.0)?;
            let back = made(1.0, z, y, 0.0)?;
            let next_y = made(0.5, &dy, &across, 0.0)?;
            times(-0.5, &back, &dy, 1.0, &next_y)?;
            let half = made(1.0, y, &dy, 0.0)?;
            let next_z = made(-0.5, &half, y, 0.0)?;
            if let Some(dz) = &dz {
                let half = made(1.0, z, dz, 0.0)?;
                times(-0.5, &half, z, 1.0, &next_y)?;
                times(0.5, &across, dz, 1.0, &next_z)?;
                times(-0.5, dz, &back, 1.0, &next_z)?;
            }
            (dy, dz) = (next_y, Some(next_z));
        }
        // The first: Y = A (3I - A) / 2, Z = (3I - A) / 2.
        let factor = self.shifted(-1.0, a, 3.0)?;
        let da = match &dz {
            Some(dz) => self.shifted(-0.5, dz, 0.0)?,
            None => self.shifted(0.0, a, 0.0)?,
        };
        times(0.5, &dy, &factor, 1.0, &da)?;
        times(-0.5, a, &dy, 1.0, &da)?;
        Ok(da)
    }
}
