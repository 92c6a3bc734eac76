//! Dropout, with the masks of the CPU.

use candle_core::{CudaDevice, Result};
use isqrt_device::cuda::kernels::DROPOUT;
use isqrt_device::cuda::{Argument, Grid, Output, long, pointer, real};

use super::{Maps, allocate, run};

/// What a mask is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    pub key: u64,
    pub step: u64,
    pub threshold: u32,
    pub scale: f64,
}

pub(crate) fn apply<T: Maps>(
    device: &CudaDevice,
    x: u64,
    len: usize,
    mask: Mask,
) -> Result<Output<T>> {
    let y = allocate::<T>("dropout", device, &[len])?;
    // The bits, of whatever sign.
    let bits = |word: u64| Argument::Long(word.cast_signed());
    let arguments = [
        pointer(x),
        pointer(y.at()),
        long(len),
        bits(mask.key),
        bits(mask.step),
        bits(u64::from(mask.threshold)),
        real(mask.scale),
    ];
    run::<T>(
        device,
        &DROPOUT,
        "dropout",
        Grid::over(len.div_ceil(4)),
        &arguments,
    )?;
    Ok(y)
}
