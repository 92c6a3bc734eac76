//! Updates of all parameters in one launch, and norms of their gradients with one value a tensor read back.

use candle_core::{CudaDevice, DType, Device, Result, Tensor};
use isqrt_device::cuda::kernels::{IMAGES, OPTIMISER};
use isqrt_device::cuda::{
    Argument, DeviceRepr, Grid, Output, address, int, pointer, read_back, real, with_table,
};

use super::{allocate, run};
use crate::element::bad_dtype;

/// Values that a block works on; as in `optimiser.cu`.
const BLOCK: usize = 4096;
const THREADS: usize = 256;

/// A tensor of a launch, as `optimiser.cu` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    tensors: [u64; 4],
    count: i64,
    first_block: i64,
    factors: [f64; 4],
}

// SAFETY: a structure of numbers, laid out as C does.
unsafe impl DeviceRepr for Entry {}

/// Tensors that one launch works on; they must live until it is made.
#[derive(Debug)]
pub(crate) struct Table {
    op: &'static str,
    device: CudaDevice,
    dtype: DType,
    entries: Vec<Entry>,
    blocks: usize,
    /// Contiguous copies that the launch reads.
    held: Vec<Tensor>,
}

impl Table {
    /// None where the tensors are not on a GPU.
    pub(crate) fn new(op: &'static str, like: &Tensor) -> Option<Self> {
        let Device::Cuda(device) = like.device() else {
            return None;
        };
        Some(Self {
            op,
            device: device.clone(),
            dtype: like.dtype(),
            entries: vec![],
            blocks: 0,
            held: vec![],
        })
    }

    /// Adds a tensor and what goes with it, all of one length and type.
    pub(crate) fn push<const N: usize, const F: usize>(
        &mut self,
        tensors: [&Tensor; N],
        factors: [f64; F],
    ) -> Result<()> {
        let op = self.op;
        let count = tensors[0].elem_count();
        let mut entry = Entry {
            count: count as i64,
            first_block: self.blocks as i64,
            ..Entry::default()
        };
        for (to, tensor) in entry.tensors.iter_mut().zip(tensors) {
            if tensor.elem_count() != count || tensor.dtype() != self.dtype {
                candle_core::bail!(
                    "{op}: {:?} of {:?} beside {count} values of {:?}",
                    tensor.shape(),
                    tensor.dtype(),
                    self.dtype
                );
            }
            let tensor = tensor.contiguous()?;
            *to = match self.dtype {
                DType::F32 => address::<f32>(&tensor)?,
                DType::F64 => address::<f64>(&tensor)?,
                other => return Err(bad_dtype(op, other)),
            };
            self.held.push(tensor);
        }
        entry.factors[..F].copy_from_slice(&factors);
        self.entries.push(entry);
        self.blocks += count.div_ceil(BLOCK);
        Ok(())
    }

    fn run(&self, kernel: &'static str, more: &[Argument]) -> Result<()> {
        if self.blocks == 0 {
            return Ok(());
        }
        with_table(self.op, &self.device, &self.entries, |table| {
            let mut arguments = vec![pointer(table), int(self.entries.len())];
            arguments.extend_from_slice(more);
            self.launch(kernel, self.blocks, &arguments)
        })
    }

    fn launch(&self, kernel: &'static str, blocks: usize, arguments: &[Argument]) -> Result<()> {
        let grid = Grid::blocks(blocks, THREADS);
        match self.dtype {
            DType::F32 => run::<f32>(&self.device, &OPTIMISER, kernel, grid, arguments),
            _ => run::<f64>(&self.device, &OPTIMISER, kernel, grid, arguments),
        }
    }

    /// Parameter, velocity, gradient; rate, decay.
    pub(crate) fn sgd(&self, momentum: f64, nesterov: bool) -> Result<()> {
        self.run("sgd", &[real(momentum), int(usize::from(nesterov))])
    }

    /// Parameter, mean, square, gradient; what is kept, size of the step, unbiasing of the squares' root.
    pub(crate) fn adamw(&self, betas: (f64, f64), epsilon: f64) -> Result<()> {
        self.run("adamw", &[real(betas.0), real(betas.1), real(epsilon)])
    }

    /// Average, value.
    pub(crate) fn average(&self, decay: f64) -> Result<()> {
        self.run("average", &[real(decay)])
    }

    /// Gradient, and what becomes of it: times `factor`, then between `-limit` and `limit`.
    pub(crate) fn clip(&self, factor: f64, limit: f64) -> Result<()> {
        self.run("clip", &[real(factor), pointer(0), real(limit)])
    }

    /// The same with a factor that the GPU knows.
    pub(crate) fn scale(&self, factor: u64) -> Result<()> {
        self.run("clip", &[real(1.0), pointer(factor), real(f64::INFINITY)])
    }

    /// The sum of squares of each tensor, on the GPU.
    fn sums(&self) -> Result<Output<f64>> {
        let op = self.op;
        let partial = allocate::<f64>(op, &self.device, &[self.blocks])?;
        let sums = allocate::<f64>(op, &self.device, &[self.entries.len()])?;
        with_table(op, &self.device, &self.entries, |table| {
            let arguments = [
                pointer(table),
                int(self.entries.len()),
                pointer(partial.at()),
            ];
            self.launch("squares", self.blocks, &arguments)?;
            let arguments = [pointer(table), pointer(partial.at()), pointer(sums.at())];
            self.launch("sum_squares", self.entries.len(), &arguments)
        })?;
        Ok(sums)
    }

    /// The sum of squares of each tensor: waits for the GPU.
    pub(crate) fn squares(&self) -> Result<Vec<f64>> {
        match self.entries.is_empty() {
            true => Ok(vec![]),
            false => Ok(read_back(self.op, &self.sums()?)?),
        }
    }

    /// Writes the norm of all tensors together, and the factor that brings it to `limit`, to a ledger.
    pub(crate) fn limit_norm(&self, ledger: u64, limit: f64) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let sums = self.sums()?;
        let arguments = [
            pointer(sums.at()),
            pointer(ledger),
            int(self.entries.len()),
            real(limit),
        ];
        let grid = Grid::blocks(1, THREADS);
        run::<f64>(&self.device, &IMAGES, "limit_norm", grid, &arguments)
    }
}
