//! The layer on a GPU: the algebra of `image.rs` for all images of a batch at once.
//!
//! What depends on an image (divisor, scale) stays in device memory (`facts`), so nothing waits for the
//! GPU; for the same reason features that are not finite give NaN here, where the CPU gives an error.

use super::fused::Destination;
use super::plan::{Iteration, Plan};
use crate::gpu::{Arena, Images, Matrices, Pair, Target, pair};
use crate::gpu_kernel::{GpuKernel, Tf32};
use crate::program::Epilogue;
use crate::{Output as Form, Result};
use candle_core::{CudaDevice, CudaStorage, DType, Layout};
use isqrt_device::cuda::kernels::POOLING;
use isqrt_device::cuda::{
    Argument, Grid, Input, Output, Real, bf16, capability, input, int, long, pointer, real,
};
use std::sync::Arc;

pub(super) const OP: &str = "covariance-pooling";
/// Doubles of an image, and their places; see `pooling.cu`.
const FACTS: usize = 8;
const FORWARD: usize = 2;
const LAST: usize = 6;

/// The target times a fact of each image.
fn scaled(mut target: Target, facts: &Output<f64>, fact: usize) -> Target {
    target.scale = facts.at() + (fact * size_of::<f64>()) as u64;
    target.scale_image = FACTS as i64;
    target
}

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(super) struct State<T> {
    means: Arc<Output<T>>,
    facts: Arc<Output<f64>>,
    registers: Vec<Option<Matrices<T>>>,
}

/// One call for a batch.
pub(super) struct Batch<'a> {
    pub plan: &'a Plan,
    pub kernel: GpuKernel,
    /// Whether the features are of bf16; the layer computes in f32 then.
    pub narrow: bool,
    pub batch: usize,
    pub device: &'a CudaDevice,
    pub arena: Option<&'a Arena>,
}

/// Means of the channels, and facts of the images.
type Statistics<T> = (Arc<Output<T>>, Arc<Output<f64>>);

/// The features, centred and scaled.
struct Centred<T> {
    plain: Option<Matrices<T>>,
    transposed: Option<Matrices<T>>,
}

/// Where the factors of the output lie, and how far apart those of images.
pub(super) fn place(facts: &Output<f64>) -> (u64, i32) {
    let at = facts.at() + (FORWARD * size_of::<f64>()) as u64;
    (at, FACTS as i32)
}

pub(super) fn missing() -> candle_core::Error {
    candle_core::Error::Msg(format!("{OP}: backward before forward"))
}

impl Batch<'_> {
    fn factor(&self) -> f64 {
        1.0 / (self.plan.positions as f64).sqrt()
    }

    pub(super) fn images(&self) -> Images<'_> {
        Images {
            op: OP,
            device: self.device,
            batch: self.batch,
            arena: self.arena,
        }
    }

    pub(super) fn matrices<T: Real>(&self, rows: usize, columns: usize) -> Result<Matrices<T>> {
        match self.kernel {
            // cuBLAS leaves what is between the rows as it is.
            GpuKernel::Cublas(_) | GpuKernel::Reference(_)
                if !columns.is_multiple_of(16 / size_of::<T>()) =>
            {
                self.images().zeros(rows, columns)
            }
            _ => self.images().matrices(rows, columns),
        }
    }

    pub(super) fn square<T: Real>(&self) -> Result<Matrices<T>> {
        self.matrices(self.plan.n, self.plan.n)
    }

    fn allocate<T: Real>(&self, shape: &[usize]) -> Result<Arc<Output<T>>> {
        self.images().allocate(shape)
    }

    fn launch<T: Real>(
        &self,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        self.images().launch::<T>(&POOLING, name, grid, arguments)
    }

    /// The same of a kernel that reads features, which may be of bf16.
    fn launch_on_features<T: Real>(
        &self,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        match self.narrow {
            true => self.launch::<bf16>(name, grid, arguments),
            false => self.launch::<T>(name, grid, arguments),
        }
    }

    /// A launch over all values of a matrix of each image.
    fn over<T: Real>(
        &self,
        name: &'static str,
        matrix: &Matrices<T>,
        arguments: &[Argument],
    ) -> Result<()> {
        self.images().over(&POOLING, name, matrix, arguments)
    }

    fn product<T: Real>(
        &self,
        size: (usize, usize),
        symmetric: bool,
        pairs: &[Pair],
        targets: &[Target],
    ) -> Result<()> {
        match self.kernel {
            GpuKernel::Cublas(precision) | GpuKernel::Reference(precision) => {
                self.by_cublas::<T>(precision, size, pairs, targets)
            }
            kernel => {
                let name = match kernel {
                    // Only f32 is rounded.
                    GpuKernel::TensorCores(Tf32::Once) if T::DTYPE == DType::F32 => "product_tf32",
                    GpuKernel::TensorCores(Tf32::Thrice) if T::DTYPE == DType::F32 => {
                        "product_tf32x3"
                    }
                    _ => "product",
                };
                let images = self.images();
                images.product_by::<T>(name, size, symmetric, pairs, targets)
            }
        }
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
        self.launch_on_features::<T>(
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

    fn statistics<T: Real>(&self, features: Input) -> Result<Statistics<T>> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let means = self.allocate(&[self.batch, d])?;
        let distances = self.allocate::<f64>(&[self.batch, d])?;
        let facts = self.allocate(&[self.batch, FACTS])?;
        self.launch_on_features::<T>(
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
        if self.fuses::<T>(iteration)? {
            return self.fused_tangent(iteration, values, &seed);
        }
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
    pub(super) fn output(&self, out: u64, facts: &Output<f64>) -> Target {
        let triangle = self.plan.output == Form::Triangle;
        let target = Target::new(1.0).output(out, self.plan.d, triangle);
        scaled(target, facts, FORWARD)
    }

    fn wanted(&self) -> (bool, bool) {
        (self.plan.iteration.as_ref().is_some_and(|i| i.gram), true)
    }

    /// The output goes to `out`; what the backward pass needs is returned.
    pub(super) fn forward<T: Real>(
        &self,
        features: Input,
        tracked: bool,
        out: u64,
    ) -> Result<State<T>> {
        let d = self.plan.d;
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
                let target = self.output(out, &facts);
                self.product::<T>((d, d), true, &[pair(turned, turned)], &[target])?;
            }
            Some(iteration) => {
                let keeps = tracked && iteration.keeps;
                registers = self.run_forward(iteration, &centred, &facts, keeps, Some(out))?;
                if !keeps {
                    registers.clear();
                }
            }
        }
        Ok(State {
            means,
            facts,
            registers,
        })
    }

    /// The registers that are kept; the result goes to `out`, if there is one.
    fn run_forward<T: Real>(
        &self,
        iteration: &Iteration,
        centred: &Centred<T>,
        facts: &Output<f64>,
        keeps: bool,
        out: Option<u64>,
    ) -> Result<Vec<Option<Matrices<T>>>> {
        let program = &iteration.program;
        let mut registers: Vec<Option<Matrices<T>>> =
            (0..program.registers).map(|_| None).collect();
        let k = self.normalised(iteration, centred, facts)?;
        if let GpuKernel::Reference(precision) = self.kernel {
            return self.official_forward(precision, iteration, k, facts, out);
        }
        registers[0] = Some(k);
        // Running again needs what the tangent reads, K among it.
        let keep = |register: usize| {
            register == program.result
                || keeps && (register == 0 || iteration.kept.contains(&register))
        };
        if self.fuses::<T>(iteration)? {
            let last = match (iteration.gram, out) {
                (false, Some(out)) => Some(Destination { out, facts }),
                _ => None,
            };
            self.fused_forward(iteration, &mut registers, last, keep)?;
            self.gram_output(iteration, centred, facts, &registers, out)?;
            return Ok(registers);
        }
        let last = match (iteration.gram, out) {
            (false, Some(out)) => Some(self.output(out, facts)),
            _ => None,
        };
        self.iterate(iteration, &mut registers, last, keep)?;
        self.gram_output(iteration, centred, facts, &registers, out)?;
        Ok(registers)
    }

    /// Whether the iteration runs in one launch.
    fn fuses<T: Real>(&self, iteration: &Iteration) -> Result<bool> {
        let fits = self.fits::<T>(iteration);
        let refused = |expected| -> Result<bool> {
            let (major, minor) = capability(OP, self.device).map_err(candle_core::Error::from)?;
            let (n, steps) = (self.plan.n, iteration.program.steps.len());
            Err(crate::Error::GpuKernel {
                kernel: self.kernel,
                expected,
                got: format!(
                    "a side of {n} in {}, {steps} products, on compute capability {major}.{minor}",
                    T::DTYPE.as_str()
                ),
            })
        };
        match self.kernel {
            GpuKernel::Auto => Ok(fits),
            GpuKernel::Fused if !fits => refused(
                "sides up to 64 and programs whose matrices fit into 99 KiB of shared memory",
            ),
            GpuKernel::Fused => Ok(true),
            GpuKernel::Cluster if !self.fits_cluster::<T>(iteration)? => refused(
                "f32, sides up to 256 and programs whose matrices fit into the shared memory of eight blocks, and \
                 compute capability 9.0 or later",
            ),
            GpuKernel::Cluster => Ok(true),
            _ => Ok(false),
        }
    }

    /// `X q(K) Xᵀ` of the result `q(K)`, on the side of the positions.
    fn gram_output<T: Real>(
        &self,
        iteration: &Iteration,
        centred: &Centred<T>,
        facts: &Output<f64>,
        registers: &[Option<Matrices<T>>],
        out: Option<u64>,
    ) -> Result<()> {
        let (d, m) = (self.plan.d, self.plan.positions);
        if let (true, Some(out)) = (iteration.gram, out) {
            let turned = centred.transposed.as_ref().ok_or_else(missing)?;
            let root = registers[iteration.program.result]
                .as_ref()
                .ok_or_else(missing)?;
            let right = self.matrices(m, d)?;
            let target = Target::new(1.0).direct(&right);
            self.product::<T>((m, d), false, &[pair(root, turned)], &[target])?;
            let target = self.output(out, facts);
            self.product::<T>((d, d), true, &[pair(&right, turned)], &[target])?;
        }
        Ok(())
    }

    /// Contiguous features.
    pub(super) fn features<T: Real>(&self, x: &CudaStorage, layout: &Layout) -> Result<Input> {
        Ok(match self.narrow {
            true => input::<bf16>(x, layout)?,
            false => input::<T>(x, layout)?,
        })
    }

    /// The gradient of the features, of their type.
    pub(super) fn backward<T: Real>(
        &self,
        state: &State<T>,
        features: Input,
        output: Input,
        gradient: Input,
    ) -> Result<CudaStorage> {
        let shape = [self.batch, self.plan.d, self.plan.positions];
        if self.narrow {
            let out = self.images().output::<bf16>(&shape)?;
            self.backward_to(state, features, output, gradient, out.at())?;
            return Ok(out.into_storage());
        }
        let out = self.images().output::<T>(&shape)?;
        self.backward_to(state, features, output, gradient, out.at())?;
        Ok(out.into_storage())
    }

    /// Where the gradient of the features goes.
    fn gradient_target(&self, facts: &Output<f64>) -> Target {
        let mut target = scaled(Target::new(1.0), facts, LAST);
        target.narrow = i32::from(self.narrow);
        target
    }

    pub(super) fn backward_to<T: Real>(
        &self,
        state: &State<T>,
        features: Input,
        output: Input,
        gradient: Input,
        out: u64,
    ) -> Result<()> {
        let (d, m) = (self.plan.d, self.plan.positions);
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
            self.features_gradient(&upstream, plain, facts, out)?;
            return Ok(());
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
            let mut target = self.gradient_target(facts);
            (target.transposed, target.transposed_image) = (out, (d * m) as i64);
            (target.transposed_row, target.transposed_width) = (m as i32, m as i32);
            let pairs = [pair(root, &half_turned), pair(&tangent, turned)];
            self.product::<T>((m, d), false, &pairs, &[target])?;
        } else {
            let tangent = match self.kernel {
                GpuKernel::Reference(precision) => {
                    self.official_backward(precision, &values, upstream)?
                }
                _ => self.tangent(iteration, &mut values, upstream)?,
            };
            self.through_divisor(
                iteration,
                &values,
                &tangent,
                facts,
                (output, gradient),
                through,
            )?;
            self.features_gradient(&tangent, plain, facts, out)?;
        }
        Ok(())
    }

    /// `out = LAST · gradient · X`.
    fn features_gradient<T: Real>(
        &self,
        gradient: &Matrices<T>,
        plain: &Matrices<T>,
        facts: &Output<f64>,
        out: u64,
    ) -> Result<()> {
        let (d, m) = (self.plan.d, self.plan.positions);
        let mut target = self.gradient_target(facts);
        (target.direct, target.direct_image) = (out, (d * m) as i64);
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
