//! What is decided once a call: the side, the program, the tiles, the memory.

use crate::Result;
use crate::config::{CovPool, Memory, Output, Side};
use crate::kernel::Isa;
use crate::kernel::product::{Matrix, Tile, full_tiles, symmetric_tiles};
use crate::kernel::vector::Element;
use crate::program::{Epilogue, Program, Register, Wanted};

/// Positions that are packed at a time on the covariance side, so that they stay in the cache.
pub(super) const CHUNK: usize = 512;

/// The iteration of a plan and where its registers live.
#[derive(Debug)]
pub(super) struct Iteration {
    pub gram: bool,
    /// Steps of the schedule.
    #[cfg(feature = "cuda")]
    pub steps: usize,
    /// Schatten order of the pre-normalisation, 0 for none.
    pub order: i32,
    pub post_compensation: bool,
    pub program: Program,
    /// Registers kept from forward to backward, in the order of their place in the kept memory.
    pub kept: Vec<Register>,
    /// Registers that the backward pass computes from kept ones.
    pub derived: Vec<Epilogue>,
    /// Whether the forward pass keeps anything if a backward pass may follow.
    pub keeps: bool,
    /// Slots of the tangents and, where nothing is kept, of the forward pass.
    pub slots: (Vec<usize>, usize),
    /// Slots of a forward pass that keeps: those of the registers that are not kept.
    pub loose: (Vec<usize>, usize),
}

/// A covariance pooling of `(d, M)` feature maps.
#[derive(Debug)]
pub(super) struct Plan {
    pub d: usize,
    pub positions: usize,
    pub output: Output,
    pub iteration: Option<Iteration>,
    /// Side length of the iteration's matrices.
    pub n: usize,
    /// Tiles of a symmetric `n x n`, a symmetric `d x d` and the full products.
    pub tiles_n: Vec<Tile>,
    pub tiles_d: Vec<Tile>,
    pub tiles_positions_d: Vec<Tile>,
    pub tiles_d_positions: Vec<Tile>,
}

/// Multiply-adds of forward and of backward for an image, symmetric products counted half.
fn cost(d: f64, m: f64, program: &Program, gram: bool) -> (f64, f64) {
    let products = program.products() as f64;
    if gram {
        let forward = 1.5 * m * m * d + 0.5 * products * m.powi(3) + 0.5 * d * d * m;
        let backward = d * d * m + 2.5 * m * m * d + products * m.powi(3);
        (forward, backward)
    } else {
        let forward = 0.5 * d * d * m + 0.5 * products * d.powi(3);
        (forward, products * d.powi(3) + d * d * m)
    }
}

impl Plan {
    pub(super) fn new<T: Element>(
        pool: &CovPool,
        d: usize,
        positions: usize,
        isa: &Isa<T>,
    ) -> Result<Self> {
        let iteration = match &pool.root {
            None => None,
            Some(root) => {
                let coefficients = root.schedule.coefficients()?;
                let on_gram = Program::new(&coefficients, Wanted::InverseRoot);
                let on_covariance = Program::new(&coefficients, Wanted::Root);
                let (df, mf) = (d as f64, positions as f64);
                let gram = match root.side {
                    Side::Gram => true,
                    Side::Covariance => false,
                    Side::Auto => {
                        let total = |(forward, backward)| forward + backward;
                        total(cost(df, mf, &on_gram, true))
                            < total(cost(df, mf, &on_covariance, false))
                    }
                };
                let program = if gram { on_gram } else { on_covariance };
                let (mut kept, derived) = program.operands();
                if gram && !kept.contains(&program.result) {
                    kept.push(program.result);
                }
                let loose = program.slots(|register| !kept.contains(&register));
                Some(Iteration {
                    gram,
                    #[cfg(feature = "cuda")]
                    steps: coefficients.len(),
                    order: root.pre_normalization.order(),
                    post_compensation: root.post_compensation,
                    slots: program.slots(|_| true),
                    loose,
                    kept,
                    derived,
                    // Less than two products are cheaper to run again than to keep.
                    keeps: root.memory == Memory::Keep && program.products() > 1,
                    program,
                })
            }
        };
        let gram = iteration.as_ref().is_some_and(|i| i.gram);
        let n = if gram { positions } else { d };
        let (width, shape) = (T::WIDTH, isa.shape);
        let chunk = positions.min(CHUNK);
        Ok(Self {
            d,
            positions,
            output: pool.output,
            n,
            tiles_n: symmetric_tiles(n, width, shape),
            tiles_d: symmetric_tiles(d, width, shape),
            tiles_positions_d: full_tiles(positions, d, width, shape),
            tiles_d_positions: full_tiles(d, if gram { positions } else { chunk }, width, shape),
            iteration,
        })
    }

    /// Elements kept for the backward pass, an image.
    pub(super) fn kept_len<T: Element>(&self) -> usize {
        match &self.iteration {
            Some(i) if i.keeps => i.kept.len() * Matrix::<T>::len(self.n, self.n),
            _ => 0,
        }
    }

    /// Multiply-adds of forward and of backward, an image, symmetric products counted half.
    pub(super) fn multiply_adds(&self) -> (f64, f64) {
        let (d, m) = (self.d as f64, self.positions as f64);
        match &self.iteration {
            None => (0.5 * d * d * m, d * d * m),
            Some(i) => cost(d, m, &i.program, i.gram),
        }
    }
}
