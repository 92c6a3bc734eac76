//! Batch normalisation; nothing is read back.

use candle_core::{CudaDevice, Result, Tensor};
use isqrt_device::cuda::kernels::NORM;
use isqrt_device::cuda::{Grid, Output, address, int, long, pointer, real};

use super::{Held, Maps, allocate, clip, run};
use crate::ops::{Activation, BatchNorm};

const OP: &str = "batch_norm";

/// Maps as `(outer, channels, inner)`, which is one or the other layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub outer: usize,
    pub channels: usize,
    pub inner: usize,
}

impl Extent {
    /// Of `batch` maps with so many channels and pixels.
    pub(crate) fn new(batch: usize, channels: usize, pixels: usize, last: bool) -> Self {
        match last {
            true => Self {
                outer: batch * pixels,
                channels,
                inner: 1,
            },
            false => Self {
                outer: batch,
                channels,
                inner: pixels,
            },
        }
    }

    /// Of maps of these sizes on a GPU.
    pub(crate) fn of(dims: &[usize]) -> Result<Self> {
        match *dims {
            [b, 1, h, w, c] => Ok(Self::new(b, c, h * w, true)),
            [b, c, h, w] => Ok(Self::new(b, c, h * w, false)),
            ref other => candle_core::bail!("{other:?} are no feature maps"),
        }
    }

    fn len(self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// Values a channel.
    fn count(self) -> usize {
        self.outer * self.inner
    }

    /// Channels of a block of the kernels that add up.
    fn lanes(self) -> usize {
        // A power of two, so that blocks of 256 threads have whole rows.
        self.channels.next_power_of_two().min(32)
    }

    /// How many blocks share the values of a channel out: by the shape alone, so that sums do not depend on
    /// the GPU.
    fn splits(self) -> usize {
        let (beside, rows) = match self.inner {
            1 => (
                self.channels.div_ceil(self.lanes()),
                self.outer.div_ceil(512),
            ),
            _ => (self.channels, self.outer),
        };
        // About four blocks for each multiprocessor of a large GPU.
        (512 / beside.max(1)).clamp(1, rows.max(1)).min(65535)
    }

    fn grid(self) -> Grid {
        let beside = match self.inner {
            1 => self.channels.div_ceil(self.lanes()),
            _ => self.channels,
        };
        Grid {
            blocks: (beside, self.splits(), 1),
            threads: 256,
            shared: 0,
        }
    }

    /// Whether sixteen bytes at a time are values of channels beside each other.
    fn wide<T>(self, addresses: &[u64]) -> bool {
        self.inner == 1
            && self.channels.is_multiple_of(16 / size_of::<T>())
            && addresses.iter().all(|at| at.is_multiple_of(16))
    }
}

/// Two sums in double precision for each channel and split.
fn partial_sums(device: &CudaDevice, extent: Extent) -> Result<Output<f64>> {
    allocate(OP, device, &[extent.splits(), extent.channels, 2])
}

/// Sums of maps over all but the channels.
pub(crate) fn channel_sums<T: Maps>(
    device: &CudaDevice,
    x: u64,
    extent: Extent,
) -> Result<Output<T::Parameter>> {
    let partial = partial_sums(device, extent)?;
    let arguments = [
        pointer(x),
        pointer(partial.at()),
        long(extent.outer),
        int(extent.channels),
        int(extent.inner),
        int(extent.lanes()),
    ];
    run::<T>(device, &NORM, "channel_sums", extent.grid(), &arguments)?;
    let sums = allocate::<T::Parameter>(OP, device, &[extent.channels])?;
    let arguments = [
        pointer(partial.at()),
        pointer(sums.at()),
        int(extent.channels),
        int(extent.splits()),
    ];
    run::<T>(
        device,
        &NORM,
        "finish_sums",
        Grid::over(extent.channels),
        &arguments,
    )?;
    Ok(sums)
}

/// What the forward pass leaves for the backward pass.
pub(crate) struct Kept {
    /// Mean and `1/√(σ² + ε)`.
    facts: Box<dyn Held>,
    /// Mean, scale, shift, and room for two more.
    lines: Box<dyn Held>,
}

/// Gradients of the maps, and of scale and shift.
pub(crate) type Gradients<T> = (Output<T>, [Output<<T as Maps>::Parameter>; 2]);

/// A normalisation as kernels need it.
#[derive(Debug)]
pub(crate) struct Norm {
    running_mean: Tensor,
    running_var: Tensor,
    /// Where the moved running statistics go; none where they stay.
    moved: Option<(Tensor, Tensor)>,
    /// Whether the running statistics are used.
    constant: bool,
    momentum: f64,
    epsilon: f64,
    activation: Activation,
}

impl Norm {
    pub(crate) fn new(norm: &BatchNorm, constant: bool, updates: bool) -> Result<Self> {
        let (running_mean, running_var) = (norm.running_mean.get(), norm.running_var.get());
        // SAFETY: the forward pass writes both.
        let room = |like: &Tensor| unsafe { like.empty_like() };
        let moved = match updates {
            true => Some((room(&running_mean)?, room(&running_var)?)),
            false => None,
        };
        Ok(Self {
            running_mean: running_mean.contiguous()?,
            running_var: running_var.contiguous()?,
            moved,
            constant,
            momentum: norm.momentum,
            epsilon: norm.epsilon,
            activation: norm.activation,
        })
    }

    /// The running statistics after the forward pass, where they move.
    pub(crate) fn moved(&self) -> Option<(Tensor, Tensor)> {
        self.moved.clone()
    }

    /// Normalises; with maps `beside`, adds them and rectifies the sum.
    pub(crate) fn forward<T: Maps>(
        &self,
        device: &CudaDevice,
        extent: Extent,
        (x, beside): (u64, Option<u64>),
        (gamma, beta): (u64, u64),
    ) -> Result<(Output<T>, Kept)> {
        let channels = extent.channels;
        let facts = allocate::<f64>(OP, device, &[2, channels])?;
        let lines = allocate::<T::Parameter>(OP, device, &[5, channels])?;
        let partial = match self.constant {
            true => None,
            false => {
                let partial = partial_sums(device, extent)?;
                let arguments = [
                    pointer(x),
                    pointer(partial.at()),
                    long(extent.outer),
                    int(channels),
                    int(extent.inner),
                    int(extent.lanes()),
                ];
                run::<T>(device, &NORM, "statistics", extent.grid(), &arguments)?;
                Some(partial)
            }
        };
        let at = |t: &Tensor| address::<T::Parameter>(t);
        let moved = match &self.moved {
            Some((mean, variance)) => (at(mean)?, at(variance)?),
            None => (0, 0),
        };
        let arguments = [
            pointer(partial.as_ref().map_or(0, Output::at)),
            pointer(x),
            pointer(gamma),
            pointer(beta),
            pointer(at(&self.running_mean)?),
            pointer(at(&self.running_var)?),
            pointer(facts.at()),
            pointer(lines.at()),
            pointer(moved.0),
            pointer(moved.1),
            int(channels),
            int(extent.inner),
            int(extent.splits()),
            real(extent.count() as f64),
            real(self.epsilon),
            real(self.momentum),
        ];
        run::<T>(
            device,
            &NORM,
            "finish_statistics",
            Grid::over(channels),
            &arguments,
        )?;

        let y = allocate::<T>(OP, device, &[extent.outer, channels, extent.inner])?;
        let [clips, upper] = match beside {
            Some(_) => clip(Activation::Relu),
            None => clip(self.activation),
        };
        let mut arguments = vec![
            pointer(x),
            pointer(lines.at()),
            pointer(y.at()),
            long(extent.len()),
            int(channels),
            pointer(beside.unwrap_or(0)),
            clips,
            upper,
        ];
        if extent.wide::<T>(&[x, beside.unwrap_or(0)]) {
            let grid = Grid::over(extent.len() / (16 / size_of::<T>()));
            run::<T>(device, &NORM, "apply_wide", grid, &arguments)?;
        } else {
            arguments.push(int(extent.inner));
            run::<T>(device, &NORM, "apply", Grid::over(extent.len()), &arguments)?;
        }
        let kept = Kept {
            facts: Box::new(facts),
            lines: Box::new(lines),
        };
        Ok((y, kept))
    }

    /// Gradients of the maps, of scale and of shift.
    pub(crate) fn backward<T: Maps>(
        &self,
        device: &CudaDevice,
        extent: Extent,
        kept: &Kept,
        (x, dy): (u64, u64),
    ) -> Result<Gradients<T>> {
        let (channels, lines) = (extent.channels, pointer(kept.lines.at()));
        let [clips, upper] = clip(self.activation);
        let partial = partial_sums(device, extent)?;
        let arguments = [
            pointer(x),
            pointer(dy),
            lines,
            pointer(partial.at()),
            long(extent.outer),
            int(channels),
            int(extent.inner),
            int(extent.lanes()),
            clips,
            upper,
        ];
        run::<T>(device, &NORM, "gradients", extent.grid(), &arguments)?;
        let dgamma = allocate::<T::Parameter>(OP, device, &[channels])?;
        let dbeta = allocate::<T::Parameter>(OP, device, &[channels])?;
        let arguments = [
            pointer(partial.at()),
            pointer(kept.facts.at()),
            lines,
            pointer(dgamma.at()),
            pointer(dbeta.at()),
            int(channels),
            int(extent.splits()),
            real(extent.count() as f64),
            int(usize::from(self.constant)),
        ];
        run::<T>(
            device,
            &NORM,
            "finish_gradients",
            Grid::over(channels),
            &arguments,
        )?;

        let dx = allocate::<T>(OP, device, &[extent.outer, channels, extent.inner])?;
        let mut arguments = vec![
            pointer(x),
            pointer(dy),
            lines,
            pointer(dx.at()),
            long(extent.len()),
            int(channels),
        ];
        if extent.wide::<T>(&[x, dy]) {
            arguments.extend([clips, upper]);
            let grid = Grid::over(extent.len() / (16 / size_of::<T>()));
            run::<T>(device, &NORM, "spread_gradient_wide", grid, &arguments)?;
        } else {
            arguments.extend([int(extent.inner), clips, upper]);
            let grid = Grid::over(extent.len());
            run::<T>(device, &NORM, "spread_gradient", grid, &arguments)?;
        }
        Ok((dx, [dgamma, dbeta]))
    }
}
