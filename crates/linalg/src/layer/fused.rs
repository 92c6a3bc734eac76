//! The iteration on a GPU for small matrices: the whole program, or its tangent, in one launch of a
//! block an image, which keeps the iterates in shared memory (`fused.cu`).

use super::gpu::{Batch, OP, missing, place};
use super::plan::Iteration;
use crate::gpu::Matrices;
use crate::gpu_kernel::GpuKernel;
use crate::program::Epilogue;
use crate::{Output as Form, Result};
use candle_core::DType;
use isqrt_device::cuda::kernels::{CLUSTER, FUSED};
use isqrt_device::cuda::{DeviceRepr, Grid, Output, Real, capability, launch_with, shared_memory};

/// Sides that a block has threads for, and what fits into the argument of a launch.
const MOST_SIDE: usize = 64;
const MOST_STEPS: usize = 32;
const MOST_REGISTERS: usize = 48;
const MOST_DERIVED: usize = 8;
/// Shared memory that a block has on every GPU from Ampere on.
const SHARED: usize = 99 << 10;
/// Rows and columns of a thread.
const SIDE: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Out {
    alpha: f64,
    diagonal: f64,
    weights: [f64; 2],
    slot: i16,
    keep: i16,
    terms: [i16; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Step {
    left: i16,
    right: i16,
    left_value: i16,
    right_value: i16,
    outs: i16,
    unused: [i16; 3],
    out: [Out; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Derived {
    which: i16,
    from: [i16; 2],
    unused: i16,
    weights: [f64; 2],
}

/// A launch of `fused`, as the kernel has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Fused {
    steps: [Step; MOST_STEPS],
    registers: [u64; MOST_REGISTERS],
    derived: [Derived; MOST_DERIVED],
    input: u64,
    result: u64,
    output: u64,
    scale: u64,
    image: i64,
    output_image: i64,
    scale_image: i32,
    n: i32,
    row: i32,
    stride: i32,
    count: i32,
    derived_count: i32,
    tangent: i32,
    triangle: i32,
    input_slot: i32,
    result_slot: i32,
    buffer_slot: i32,
    slab: i32,
}

// SAFETY: a structure of numbers, laid out as C does.
unsafe impl DeviceRepr for Fused {}

const NO_OUT: Out = Out {
    alpha: 0.0,
    diagonal: 0.0,
    weights: [0.0; 2],
    slot: -1,
    keep: -1,
    terms: [-1; 2],
};
const NO_STEP: Step = Step {
    left: -1,
    right: -1,
    left_value: -1,
    right_value: -1,
    outs: 0,
    unused: [0; 3],
    out: [NO_OUT; 2],
};
const NO_SUM: Derived = Derived {
    which: -1,
    from: [-1; 2],
    unused: 0,
    weights: [0.0; 2],
};

/// Where the result of the layer goes: its memory, and the factors of images.
pub(super) struct Destination<'a> {
    pub out: u64,
    pub facts: &'a Output<f64>,
}

/// Distance of rows in shared memory for so many matrices of side `n`, and the bytes that they take, where they
/// fit. Rows are an odd number of four values apart where that fits too, so that mirrored tiles are
/// written to several banks at once.
fn shared<T>(n: usize, matrices: usize) -> Option<(usize, usize)> {
    let least = n.next_multiple_of(SIDE);
    let odd = least
        + if least.is_multiple_of(2 * SIDE) {
            SIDE
        } else {
            0
        };
    [odd, least]
        .into_iter()
        .map(|stride| (stride, matrices * n * stride * size_of::<T>()))
        .find(|&(_, bytes)| bytes <= SHARED)
}

/// Blocks of a cluster, the sides that they have threads for, and inner indices at a time.
const BLOCKS: usize = 8;
const MOST_CLUSTER_SIDE: usize = 256;
const CHUNK: usize = 16;

/// The same for a block of a cluster: distance of rows, rows of a block, bytes.
fn shared_of_cluster(n: usize, matrices: usize) -> Option<(usize, usize, usize)> {
    let (stride, slab) = (n.next_multiple_of(4) + 4, n.div_ceil(BLOCKS));
    let values = (matrices * slab + CHUNK) * stride + slab * (CHUNK + 4);
    let bytes = values * size_of::<f32>();
    (n <= MOST_CLUSTER_SIDE).then_some((stride, slab, bytes))
}

impl Batch<'_> {
    /// Whether the program and its tangent fit into a block.
    pub(super) fn fits<T: Real>(&self, iteration: &Iteration) -> bool {
        let (n, matrices) = (self.plan.n, iteration.program.packed().1 + 1);
        n <= MOST_SIDE && self.fits_launch(iteration) && shared::<T>(n, matrices).is_some()
    }

    /// The same into a cluster of blocks.
    pub(super) fn fits_cluster<T: Real>(&self, iteration: &Iteration) -> Result<bool> {
        let capable = capability(OP, self.device).map_err(candle_core::Error::from)?;
        let most = shared_memory(OP, self.device).map_err(candle_core::Error::from)?;
        let matrices = iteration.program.packed().1;
        let place = shared_of_cluster(self.plan.n, matrices);
        Ok(capable >= (9, 0)
            && T::DTYPE == DType::F32
            && self.fits_launch(iteration)
            && place.is_some_and(|(.., bytes)| bytes <= most))
    }

    /// Whether the program fits into the argument of a launch.
    fn fits_launch(&self, iteration: &Iteration) -> bool {
        let program = &iteration.program;
        let simple = |out: &Epilogue| out.terms.len() <= 2;
        let steps = &program.steps;
        steps.len() <= MOST_STEPS
            && steps
                .iter()
                .all(|step| step.outs.len() <= 2 && step.outs.iter().all(simple))
            && program.registers <= MOST_REGISTERS
            && iteration.derived.len() <= MOST_DERIVED
            && iteration.derived.iter().all(simple)
    }

    /// The program as the kernel takes it, without what comes in and goes out.
    fn job<T: Real>(&self, iteration: &Iteration, tangent: bool) -> Result<(Fused, usize)> {
        let n = self.plan.n;
        let program = &iteration.program;
        let (slots, count) = program.packed();
        let (stride, slab, bytes) = match self.kernel {
            GpuKernel::Cluster => shared_of_cluster(n, count).ok_or_else(missing)?,
            _ => {
                let matrices = count + usize::from(tangent);
                let (stride, bytes) = shared::<T>(n, matrices).ok_or_else(missing)?;
                (stride, n, bytes)
            }
        };
        let slot = |register: usize| slots[register] as i16;
        let row = n.next_multiple_of(16 / size_of::<T>());
        let mut job = Fused {
            steps: [NO_STEP; MOST_STEPS],
            registers: [0; MOST_REGISTERS],
            derived: [NO_SUM; MOST_DERIVED],
            input: 0,
            result: 0,
            output: 0,
            scale: 0,
            image: (n * row) as i64,
            output_image: 0,
            scale_image: 0,
            n: n as i32,
            row: row as i32,
            stride: stride as i32,
            count: program.steps.len() as i32,
            derived_count: 0,
            tangent: i32::from(tangent),
            triangle: 0,
            input_slot: i32::from(slot(0)),
            result_slot: i32::from(slot(program.result)),
            buffer_slot: count as i32,
            slab: slab as i32,
        };
        for (to, step) in job.steps.iter_mut().zip(&program.steps) {
            if let Some((left, right)) = step.product {
                (to.left, to.right) = (slot(left), slot(right));
                (to.left_value, to.right_value) = (left as i16, right as i16);
            }
            to.outs = step.outs.len() as i16;
            for (to, out) in to.out.iter_mut().zip(&step.outs) {
                (to.alpha, to.slot) = (out.alpha, slot(out.register));
                to.diagonal = if tangent { 0.0 } else { out.diagonal };
                for (at, &(weight, register)) in out.terms.iter().enumerate() {
                    (to.weights[at], to.terms[at]) = (weight, slot(register));
                }
            }
        }
        Ok((job, bytes))
    }

    fn run<T: Real>(&self, job: &Fused, shared: usize) -> Result<()> {
        if self.kernel == GpuKernel::Cluster {
            let grid = Grid {
                shared,
                ..Grid::blocks(self.batch * BLOCKS, 256)
            };
            // SAFETY: all matrices are of this op, of side n and of the distances that the job says.
            let launched =
                unsafe { launch_with::<T, Fused>(self.device, &CLUSTER, "cluster", grid, job) };
            return Ok(launched?);
        }
        let tiles = self.plan.n.div_ceil(SIDE);
        let threads = (tiles * (tiles + 1) / 2).next_multiple_of(32);
        let grid = Grid {
            shared,
            ..Grid::blocks(self.batch, threads)
        };
        // SAFETY: all matrices are of this op, of side n and of the distances that the job says.
        Ok(unsafe { launch_with::<T, Fused>(self.device, &FUSED, "fused", grid, job) }?)
    }

    /// Runs the iteration from register 0 on; the registers that `keep` names are kept, and the result
    /// goes to `last`, if there is one.
    pub(super) fn fused_forward<T: Real>(
        &self,
        iteration: &Iteration,
        registers: &mut [Option<Matrices<T>>],
        last: Option<Destination<'_>>,
        keep: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let program = &iteration.program;
        let (mut job, shared) = self.job::<T>(iteration, false)?;
        job.input = registers[0].as_ref().ok_or_else(missing)?.at();
        let held = last.is_some();
        for (to, step) in job.steps.iter_mut().zip(&program.steps) {
            for (to, out) in to.out.iter_mut().zip(&step.outs) {
                let register = out.register;
                if keep(register) && !(held && register == program.result) {
                    let matrix = self.square::<T>()?;
                    job.registers[register] = matrix.at();
                    to.keep = register as i16;
                    registers[register] = Some(matrix);
                }
            }
        }
        if let Some(to) = last {
            let d = self.plan.d;
            job.output = to.out;
            job.output_image = self.plan.output.len(d) as i64;
            job.triangle = i32::from(self.plan.output == Form::Triangle);
            (job.scale, job.scale_image) = place(to.facts);
        }
        self.run::<T>(&job, shared)?;
        if !keep(0) {
            registers[0] = None;
        }
        Ok(())
    }

    /// The tangent of the iteration in direction `seed`, of values that were kept.
    pub(super) fn fused_tangent<T: Real>(
        &self,
        iteration: &Iteration,
        values: &[Option<Matrices<T>>],
        seed: &Matrices<T>,
    ) -> Result<Matrices<T>> {
        let (mut job, shared) = self.job::<T>(iteration, true)?;
        for (to, value) in job.registers.iter_mut().zip(values) {
            *to = value.as_ref().map_or(0, Matrices::at);
        }
        for (to, out) in job.derived.iter_mut().zip(&iteration.derived) {
            to.which = out.register as i16;
            for (at, &(weight, register)) in out.terms.iter().enumerate() {
                (to.weights[at], to.from[at]) = (weight, register as i16);
            }
        }
        job.derived_count = iteration.derived.len() as i32;
        job.input = seed.at();
        let result = self.square::<T>()?;
        job.result = result.at();
        self.run::<T>(&job, shared)?;
        Ok(result)
    }
}

// A launch has 4 KiB for its arguments.
const _: () = assert!(size_of::<Fused>() <= 4096);
