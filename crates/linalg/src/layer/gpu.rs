//! The layer on a GPU: the algebra of `image.rs` for all images of a batch at once.
//!
//! Matrices lie row by row, the rows a multiple of 16 bytes apart. All products are of operands with
//! the inner index in rows, which symmetric matrices are either way: the features are kept as they
//! are and transposed, and the few results that are not symmetric are written both ways. What depends
//! on an image (divisor, scale) stays in device memory (`facts`), so nothing waits for the GPU; for the
//! same reason features that are not finite give NaN here, where the CPU gives an error.

use super::plan::{Iteration, Plan};
use crate::program::Epilogue;
use crate::{Output as Form, Result};
use candle_core::CudaDevice;
use isqrt_device::cuda::kernels::{POOLING, SYMMETRIC};
use isqrt_device::cuda::{
    Argument, DeviceRepr, Grid, Input, Output, Real, int, launch, launch_with, long, pointer, real,
};
use std::sync::Arc;

const OP: &str = "covariance-pooling";
/// Doubles of an image, and their places; see `pooling.cu`.
const FACTS: usize = 8;
const FORWARD: usize = 2;
const LAST: usize = 6;
/// Rows and columns of a block of a product.
const TILE: usize = 64;

/// Two operands of a product, as `symmetric.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Pair {
    a: u64,
    b: u64,
    a_image: i64,
    b_image: i64,
    a_row: i32,
    b_row: i32,
    inner: i32,
    unused: i32,
}

/// What becomes of a product, as `symmetric.cu` has it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Target {
    direct: u64,
    transposed: u64,
    triangle: u64,
    terms: [u64; 4],
    weights: [f64; 4],
    alpha: f64,
    diagonal: f64,
    scale: u64,
    scale_image: i64,
    direct_image: i64,
    transposed_image: i64,
    triangle_image: i64,
    term_image: i64,
    direct_row: i32,
    transposed_row: i32,
    term_row: i32,
    count: i32,
    direct_width: i32,
    transposed_width: i32,
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
struct Matrices<T> {
    memory: Arc<Output<T>>,
    rows: usize,
    /// Distance of rows.
    row: usize,
}

impl<T: Real> Matrices<T> {
    fn new(device: &CudaDevice, batch: usize, rows: usize, columns: usize) -> Result<Self> {
        let row = columns.next_multiple_of(16 / size_of::<T>());
        let memory = Arc::new(allocate(device, &[batch, rows, row])?);
        Ok(Self { memory, rows, row })
    }

    fn at(&self) -> u64 {
        self.memory.at()
    }

    /// Values of an image, those between rows too.
    fn image(&self) -> usize {
        self.rows * self.row
    }
}

/// `Σ_k A[k][i] B[k][j]` over rows `k`.
fn pair<T: Real>(a: &Matrices<T>, b: &Matrices<T>) -> Pair {
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
    fn new(alpha: f64) -> Self {
        Self {
            alpha,
            ..Self::default()
        }
    }

    fn direct<T: Real>(mut self, to: &Matrices<T>) -> Self {
        (self.direct, self.direct_image) = (to.at(), to.image() as i64);
        (self.direct_row, self.direct_width) = (to.row as i32, to.row as i32);
        self
    }

    fn transposed<T: Real>(mut self, to: &Matrices<T>) -> Self {
        (self.transposed, self.transposed_image) = (to.at(), to.image() as i64);
        (self.transposed_row, self.transposed_width) = (to.row as i32, to.row as i32);
        self
    }

    /// Both halves of a symmetric result.
    fn both<T: Real>(self, to: &Matrices<T>) -> Self {
        self.direct(to).transposed(to)
    }

    /// Times a fact of each image.
    fn scaled(mut self, facts: &Output<f64>, fact: usize) -> Self {
        self.scale = facts.at() + (fact * size_of::<f64>()) as u64;
        self.scale_image = FACTS as i64;
        self
    }
}

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(super) struct State<T> {
    means: Output<T>,
    facts: Output<f64>,
    registers: Vec<Option<Matrices<T>>>,
}

/// One call for a batch.
pub(super) struct Batch<'a> {
    pub plan: &'a Plan,
    pub batch: usize,
    pub device: &'a CudaDevice,
}

/// The features, centred and scaled.
struct Centred<T> {
    plain: Option<Matrices<T>>,
    transposed: Option<Matrices<T>>,
}

fn allocate<T: Real>(device: &CudaDevice, shape: &[usize]) -> Result<Output<T>> {
    Ok(Output::new(OP, device, shape).map_err(candle_core::Error::from)?)
}

fn missing() -> candle_core::Error {
    candle_core::Error::Msg(format!("{OP}: backward before forward"))
}

impl Batch<'_> {
    fn factor(&self) -> f64 {
        1.0 / (self.plan.positions as f64).sqrt()
    }

    fn matrices<T: Real>(&self, rows: usize, columns: usize) -> Result<Matrices<T>> {
        Matrices::new(self.device, self.batch, rows, columns)
    }

    fn square<T: Real>(&self) -> Result<Matrices<T>> {
        self.matrices(self.plan.n, self.plan.n)
    }

    fn launch<T: Real>(
        &self,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        // SAFETY: callers give the arguments of the kernel, in memory of this call.
        Ok(unsafe { launch::<T>(self.device, &POOLING, name, grid, arguments) }?)
    }

    /// A launch over all values of a matrix of each image.
    fn over<T: Real>(
        &self,
        name: &'static str,
        matrix: &Matrices<T>,
        arguments: &[Argument],
    ) -> Result<()> {
        let mut grid = Grid::over(matrix.image().div_ceil(4));
        grid.blocks.1 = self.batch;
        self.launch::<T>(name, grid, arguments)
    }

    fn product<T: Real>(
        &self,
        (rows, columns): (usize, usize),
        symmetric: bool,
        pairs: &[Pair],
        targets: &[Target],
    ) -> Result<()> {
        let (down, across) = (rows.div_ceil(TILE), columns.div_ceil(TILE));
        let mut job = Product {
            pair_count: pairs.len() as i32,
            target_count: targets.len() as i32,
            rows: rows as i32,
            columns: columns as i32,
            symmetric: i32::from(symmetric),
            tiles_down: down as i32,
            tiles_across: across as i32,
            ..Product::default()
        };
        job.pairs[..pairs.len()].copy_from_slice(pairs);
        job.targets[..targets.len()].copy_from_slice(targets);
        let tiles = match symmetric {
            true => down * (down + 1) / 2,
            false => down * across,
        };
        let grid = Grid::blocks(tiles * self.batch, 128);
        // SAFETY: the matrices are of this call and of the sizes that the job says.
        Ok(unsafe { launch_with::<T, Product>(self.device, &SYMMETRIC, "product", grid, &job) }?)
    }

    fn multiply<T: Real>(
        &self,
        left: &Matrices<T>,
        right: &Matrices<T>,
        to: &Matrices<T>,
    ) -> Result<()> {
        let n = self.plan.n;
        self.product::<T>(
            (n, n),
            true,
            &[pair(left, right)],
            &[Target::new(1.0).both(to)],
        )
    }

    fn centre<T: Real>(
        &self,
        features: Input,
        means: &Output<T>,
        facts: &Output<f64>,
        (plain, transposed): (bool, bool),
    ) -> Result<Centred<T>> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let plain = plain.then(|| self.matrices(d, m)).transpose()?;
        let transposed = transposed.then(|| self.matrices(m, d)).transpose()?;
        let place =
            |matrix: &Option<Matrices<T>>| matrix.as_ref().map_or((0, 0), |m| (m.at(), m.row));
        let ((plain_at, plain_row), (turned_at, turned_row)) = (place(&plain), place(&transposed));
        self.launch::<T>(
            "centre",
            Grid::blocks(d.div_ceil(32) * m.div_ceil(32) * self.batch, 256),
            &[
                pointer(features.at),
                pointer(means.at()),
                pointer(facts.at()),
                pointer(plain_at),
                pointer(turned_at),
                int(d),
                int(m),
                int(plain_row),
                int(turned_row),
                real(self.factor()),
            ],
        )?;
        Ok(Centred { plain, transposed })
    }

    fn statistics<T: Real>(&self, features: Input) -> Result<(Output<T>, Output<f64>)> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let means = allocate(self.device, &[self.batch, d])?;
        let distances = allocate::<f64>(self.device, &[self.batch, d])?;
        let facts = allocate(self.device, &[self.batch, FACTS])?;
        self.launch::<T>(
            "row_statistics",
            Grid::blocks(self.batch * d, 128),
            &[
                pointer(features.at),
                pointer(means.at()),
                pointer(distances.at()),
                int(m),
            ],
        )?;
        self.launch::<f64>(
            "exponent",
            Grid::blocks(self.batch, 128),
            &[pointer(distances.at()), pointer(facts.at()), int(d)],
        )?;
        Ok((means, facts))
    }

    /// The normalised matrix of the iteration, and its facts.
    fn normalised<T: Real>(
        &self,
        iteration: &Iteration,
        centred: &Centred<T>,
        facts: &Output<f64>,
    ) -> Result<Matrices<T>> {
        let n = self.plan.n;
        let features = match iteration.gram {
            true => &centred.plain,
            false => &centred.transposed,
        };
        let features = features.as_ref().ok_or_else(missing)?;
        let k = self.square()?;
        let target = Target::new(1.0).both(&k);
        self.product::<T>((n, n), true, &[pair(features, features)], &[target])?;
        let divisor = |of: &Matrices<T>, stage: usize| {
            let arguments = [
                pointer(of.at()),
                pointer(facts.at()),
                int(n),
                int(of.row),
                int(iteration.order as usize),
                int(stage),
                int(usize::from(iteration.gram)),
                int(usize::from(iteration.post_compensation)),
                real(self.factor()),
            ];
            self.launch::<T>("divisor", Grid::blocks(self.batch, 256), &arguments)
        };
        let scale = || {
            let arguments = [pointer(k.at()), pointer(facts.at()), long(k.image())];
            self.over("normalise", &k, &arguments)
        };
        divisor(&k, 0)?;
        scale()?;
        if iteration.order > 2 {
            let (square, fourth) = (self.square()?, self.square()?);
            self.multiply(&k, &k, &square)?;
            self.multiply(&square, &square, &fourth)?;
            divisor(&fourth, 1)?;
            scale()?;
        }
        Ok(k)
    }

    /// `to = Σ terms + diagonal I`.
    fn combine<T: Real>(
        &self,
        out: &Epilogue,
        registers: &[Option<Matrices<T>>],
        diagonal: f64,
        to: &Matrices<T>,
    ) -> Result<()> {
        let mut terms = [(0.0, 0); 2];
        if out.terms.len() > terms.len() {
            return Err(candle_core::Error::Msg(format!(
                "{OP}: a sum of {} terms",
                out.terms.len()
            ))
            .into());
        }
        for (to, &(weight, register)) in terms.iter_mut().zip(&out.terms) {
            *to = (
                weight,
                registers[register].as_ref().ok_or_else(missing)?.at(),
            );
        }
        let [(first, a), (second, b)] = terms;
        let arguments = [
            pointer(to.at()),
            pointer(a),
            pointer(b),
            int(self.plan.n),
            int(to.row),
            real(first),
            real(second),
            real(diagonal),
        ];
        self.over("combine", to, &arguments)
    }

    /// What a step of the iteration makes of its product.
    fn target<T: Real>(
        &self,
        out: &Epilogue,
        registers: &[Option<Matrices<T>>],
        diagonal: f64,
    ) -> Result<Target> {
        let mut target = Target::new(out.alpha);
        target.diagonal = diagonal;
        target.count = out.terms.len() as i32;
        for (at, &(weight, register)) in out.terms.iter().enumerate() {
            let term = registers[register].as_ref().ok_or_else(missing)?;
            (target.terms[at], target.weights[at]) = (term.at(), weight);
            (target.term_row, target.term_image) = (term.row as i32, term.image() as i64);
        }
        Ok(target)
    }

    /// Runs the iteration from register 0 on. `last` is where the result goes on the side of the
    /// covariance; registers that nobody reads any more are given back.
    fn iterate<T: Real>(
        &self,
        iteration: &Iteration,
        registers: &mut [Option<Matrices<T>>],
        last: Option<Target>,
        keep: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let n = self.plan.n;
        let program = &iteration.program;
        let last_read = program.last_read();
        for (at, step) in program.steps.iter().enumerate() {
            let mut targets = Vec::new();
            let mut made = Vec::new();
            for out in &step.outs {
                let target = self.target(out, registers, out.diagonal)?;
                match last {
                    Some(last) if out.register == program.result => {
                        targets.push(Target {
                            terms: target.terms,
                            weights: target.weights,
                            count: target.count,
                            term_row: target.term_row,
                            term_image: target.term_image,
                            alpha: target.alpha,
                            diagonal: target.diagonal,
                            ..last
                        });
                    }
                    _ => {
                        let matrix = self.square()?;
                        match step.product {
                            Some(_) => targets.push(target.both(&matrix)),
                            None => self.combine(out, registers, out.diagonal, &matrix)?,
                        }
                        made.push((out.register, matrix));
                    }
                }
            }
            if let Some((left, right)) = step.product {
                let operand = |register: usize| registers[register].as_ref().ok_or_else(missing);
                let operands = pair(operand(left)?, operand(right)?);
                self.product::<T>((n, n), true, &[operands], &targets)?;
            }
            for (register, matrix) in made {
                registers[register] = Some(matrix);
            }
            for register in 0..registers.len() {
                if last_read[register] <= at && registers[register].is_some() && !keep(register) {
                    registers[register] = None;
                }
            }
        }
        Ok(())
    }

    /// The tangent of the iteration in direction `seed`.
    fn tangent<T: Real>(
        &self,
        iteration: &Iteration,
        values: &mut [Option<Matrices<T>>],
        seed: Matrices<T>,
    ) -> Result<Matrices<T>> {
        let n = self.plan.n;
        let program = &iteration.program;
        let last_read = program.last_read();
        let mut tangents: Vec<Option<Matrices<T>>> = (0..program.registers).map(|_| None).collect();
        tangents[0] = Some(seed);
        for (at, step) in program.steps.iter().enumerate() {
            if let Some((left, right)) = step.product {
                for out in &iteration.derived {
                    if (out.register == left || out.register == right)
                        && values[out.register].is_none()
                    {
                        let matrix = self.square()?;
                        self.combine(out, values, out.diagonal, &matrix)?;
                        values[out.register] = Some(matrix);
                    }
                }
            }
            let mut targets = Vec::new();
            let mut made = Vec::new();
            for out in &step.outs {
                let matrix = self.square()?;
                match step.product {
                    Some(_) => targets.push(self.target(out, &tangents, 0.0)?.both(&matrix)),
                    None => self.combine(out, &tangents, 0.0, &matrix)?,
                }
                made.push((out.register, matrix));
            }
            if let Some((left, right)) = step.product {
                let of = |from: &[Option<Matrices<T>>], register: usize| {
                    from[register].clone().ok_or_else(missing)
                };
                let pairs = [
                    pair(&of(&tangents, left)?, &of(values, right)?),
                    pair(&of(values, left)?, &of(&tangents, right)?),
                ];
                self.product::<T>((n, n), true, &pairs, &targets)?;
            }
            for (register, matrix) in made {
                tangents[register] = Some(matrix);
            }
            for register in 0..tangents.len() {
                if last_read[register] <= at && register != program.result {
                    tangents[register] = None;
                }
            }
        }
        Ok(tangents[program.result].take().ok_or_else(missing)?)
    }

    /// Where the output goes.
    fn output<T: Real>(&self, out: &Output<T>, alpha: f64, facts: &Output<f64>) -> Target {
        let d = self.plan.d;
        let mut target = Target::new(alpha).scaled(facts, FORWARD);
        match self.plan.output {
            Form::Triangle => {
                target.triangle = out.at();
                target.triangle_image = self.plan.output.len(d) as i64;
            }
            Form::Full => {
                (target.direct, target.transposed) = (out.at(), out.at());
                (target.direct_image, target.transposed_image) = ((d * d) as i64, (d * d) as i64);
                (target.direct_row, target.transposed_row) = (d as i32, d as i32);
                (target.direct_width, target.transposed_width) = (d as i32, d as i32);
            }
        }
        target
    }

    fn wanted(&self) -> (bool, bool) {
        (self.plan.iteration.as_ref().is_some_and(|i| i.gram), true)
    }

    pub(super) fn forward<T: Real>(
        &self,
        features: Input,
        tracked: bool,
    ) -> Result<(Output<T>, State<T>)> {
        let d = self.plan.d;
        let shape = [self.batch, self.plan.output.len(d)];
        let out = allocate(self.device, &shape)?;
        let (means, facts) = self.statistics::<T>(features)?;
        let centred = self.centre(features, &means, &facts, self.wanted())?;
        let turned = centred.transposed.as_ref().ok_or_else(missing)?;
        let mut registers = Vec::new();
        match &self.plan.iteration {
            None => {
                self.launch::<f64>(
                    "plain_facts",
                    Grid::over(self.batch),
                    &[pointer(facts.at()), int(self.batch), real(self.factor())],
                )?;
                let target = self.output(&out, 1.0, &facts);
                self.product::<T>((d, d), true, &[pair(turned, turned)], &[target])?;
            }
            Some(iteration) => {
                let keeps = tracked && iteration.keeps;
                registers = self.run_forward(iteration, &centred, &facts, keeps, Some(&out))?;
                if !keeps {
                    registers.clear();
                }
            }
        }
        let state = State {
            means,
            facts,
            registers,
        };
        Ok((out, state))
    }

    /// The registers that are kept; the result goes to `out`, if there is one.
    fn run_forward<T: Real>(
        &self,
        iteration: &Iteration,
        centred: &Centred<T>,
        facts: &Output<f64>,
        keeps: bool,
        out: Option<&Output<T>>,
    ) -> Result<Vec<Option<Matrices<T>>>> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let program = &iteration.program;
        let mut registers: Vec<Option<Matrices<T>>> =
            (0..program.registers).map(|_| None).collect();
        registers[0] = Some(self.normalised(iteration, centred, facts)?);
        // Running again needs what the tangent reads, K among it.
        let keep = |register: usize| {
            register == program.result
                || keeps && (register == 0 || iteration.kept.contains(&register))
        };
        let last = match (iteration.gram, out) {
            (false, Some(out)) => Some(self.output(out, 1.0, facts)),
            _ => None,
        };
        self.iterate(iteration, &mut registers, last, keep)?;
        if let (true, Some(out)) = (iteration.gram, out) {
            let turned = centred.transposed.as_ref().ok_or_else(missing)?;
            let root = registers[program.result].as_ref().ok_or_else(missing)?;
            let right = self.matrices(m, d)?;
            let target = Target::new(1.0).direct(&right);
            self.product::<T>((m, d), false, &[pair(root, turned)], &[target])?;
            let target = self.output(out, 1.0, facts);
            self.product::<T>((d, d), true, &[pair(&right, turned)], &[target])?;
        }
        Ok(registers)
    }

    /// The gradient of the features.
    pub(super) fn backward<T: Real>(
        &self,
        state: &State<T>,
        features: Input,
        output: Input,
        gradient: Input,
    ) -> Result<Output<T>> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let shape = [self.batch, d, m];
        let out = allocate(self.device, &shape)?;
        let facts = &state.facts;
        let gram = self.plan.iteration.as_ref().is_some_and(|i| i.gram);
        let rerun = state.registers.is_empty();
        let wanted = (true, gram || rerun && self.plan.iteration.is_some());
        let centred = self.centre(features, &state.means, facts, wanted)?;
        let plain = centred.plain.as_ref().ok_or_else(missing)?;
        let upstream = self.matrices(d, d)?;
        let triangle = usize::from(self.plan.output == Form::Triangle);
        let arguments = [
            pointer(gradient.at),
            pointer(facts.at()),
            pointer(upstream.at()),
            int(d),
            int(upstream.row),
            int(triangle),
        ];
        self.over("upstream", &upstream, &arguments)?;

        let Some(iteration) = &self.plan.iteration else {
            self.features_gradient(&upstream, plain, facts, &out)?;
            return Ok(out);
        };
        let again;
        let kept = match rerun {
            true => {
                again = self.run_forward(iteration, &centred, facts, true, None)?;
                &again
            }
            false => &state.registers,
        };
        // What is computed from the kept ones belongs to this pass.
        let mut values = kept.clone();
        let through = match (gram, iteration.post_compensation) {
            (true, true) => -0.5,
            (true, false) => -1.0,
            (false, true) => 0.5,
            (false, false) => 0.0,
        };
        if gram {
            let turned = centred.transposed.as_ref().ok_or_else(missing)?;
            let (half, half_turned) = (self.matrices(d, m)?, self.matrices(m, d)?);
            let target = Target::new(1.0).direct(&half).transposed(&half_turned);
            self.product::<T>((d, m), false, &[pair(&upstream, plain)], &[target])?;
            drop(upstream);
            let seed = self.square()?;
            let target = Target::new(1.0).both(&seed);
            self.product::<T>((m, m), true, &[pair(plain, &half)], &[target])?;
            drop(half);
            let tangent = self.tangent(iteration, &mut values, seed)?;
            self.through_divisor(
                iteration,
                &values,
                &tangent,
                facts,
                (output, gradient),
                through,
            )?;
            let root = values[iteration.program.result]
                .as_ref()
                .ok_or_else(missing)?;
            let mut target = Target::new(1.0).scaled(facts, LAST);
            (target.transposed, target.transposed_image) = (out.at(), (d * m) as i64);
            (target.transposed_row, target.transposed_width) = (m as i32, m as i32);
            let pairs = [pair(root, &half_turned), pair(&tangent, turned)];
            self.product::<T>((m, d), false, &pairs, &[target])?;
        } else {
            let tangent = self.tangent(iteration, &mut values, upstream)?;
            self.through_divisor(
                iteration,
                &values,
                &tangent,
                facts,
                (output, gradient),
                through,
            )?;
            self.features_gradient(&tangent, plain, facts, &out)?;
        }
        Ok(out)
    }

    /// `out = LAST · gradient · X`.
    fn features_gradient<T: Real>(
        &self,
        gradient: &Matrices<T>,
        plain: &Matrices<T>,
        facts: &Output<f64>,
        out: &Output<T>,
    ) -> Result<()> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let mut target = Target::new(1.0).scaled(facts, LAST);
        (target.direct, target.direct_image) = (out.at(), (d * m) as i64);
        (target.direct_row, target.direct_width) = (m as i32, m as i32);
        self.product::<T>((d, m), false, &[pair(gradient, plain)], &[target])
    }

    /// `tangent <- tangent / s + delta K^(p-1)`: the path through the divisor.
    fn through_divisor<T: Real>(
        &self,
        iteration: &Iteration,
        values: &[Option<Matrices<T>>],
        tangent: &Matrices<T>,
        facts: &Output<f64>,
        (output, gradient): (Input, Input),
        through: f64,
    ) -> Result<()> {
        let k = values[0].as_ref().ok_or_else(missing)?;
        let outputs = self.plan.output.len(self.plan.d);
        self.launch::<T>(
            "delta",
            Grid::blocks(self.batch, 256),
            &[
                pointer(gradient.at),
                pointer(output.at),
                pointer(tangent.at()),
                pointer(k.at()),
                pointer(facts.at()),
                long(outputs),
                long(k.image()),
                real(through),
            ],
        )?;
        let seventh;
        let power = match iteration.order {
            0 | 1 => 0,
            2 => k.at(),
            _ => {
                let (square, fourth, sixth) = (self.square()?, self.square()?, self.square()?);
                self.multiply(k, k, &square)?;
                self.multiply(&square, &square, &fourth)?;
                self.multiply(&square, &fourth, &sixth)?;
                seventh = self.square()?;
                self.multiply(&sixth, k, &seventh)?;
                seventh.at()
            }
        };
        let arguments = [
            pointer(tangent.at()),
            pointer(power),
            pointer(facts.at()),
            int(self.plan.n),
            int(tangent.row),
            int(iteration.order as usize),
        ];
        self.over("through_divisor", tangent, &arguments)
    }
}
