//! The channels of two maps as those of one, and back.

use candle_core::{CudaDevice, Result};
use isqrt_device::cuda::kernels::SHUFFLE;
use isqrt_device::cuda::{Argument, Grid, Output, int, long, pointer};

use super::{Maps, allocate, run};

/// Two maps and what is made of them: `rows` times `channels` of `inner` values, images of planes or pixels of single
/// values; the channels of both in turns, or one map's after the other's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Halves {
    pub rows: usize,
    pub channels: usize,
    pub inner: usize,
    pub turns: bool,
}

impl Halves {
    fn len(self) -> usize {
        self.rows * self.channels * self.inner
    }

    /// What ends the arguments of the kernels, which count in 32 bits within a row.
    fn arguments(self) -> Result<[Argument; 4]> {
        if i32::try_from(2 * self.channels * self.inner).is_err() {
            candle_core::bail!(
                "channel_shuffle: {} channels of {} values are too large for a GPU",
                2 * self.channels,
                self.inner
            );
        }
        Ok([
            long(self.rows),
            int(self.channels),
            int(self.inner),
            int(usize::from(self.turns)),
        ])
    }
}

/// Both of them; of the first its address, and how many values its rows lie apart.
pub(crate) fn join<T: Maps>(
    device: &CudaDevice,
    halves: Halves,
    (first, apart): (u64, usize),
    second: u64,
) -> Result<Output<T>> {
    let [rows, channels, inner, turns] = halves.arguments()?;
    let both = allocate::<T>("channel_shuffle", device, &[2 * halves.len()])?;
    let arguments = [
        pointer(first),
        long(apart),
        pointer(second),
        pointer(both.at()),
        rows,
        channels,
        inner,
        turns,
    ];
    let grid = Grid::over(halves.len());
    run::<T>(device, &SHUFFLE, "join", grid, &arguments)?;
    Ok(both)
}

/// The inverse of [`join`]; the first where it is wanted.
pub(crate) fn part<T: Maps>(
    device: &CudaDevice,
    halves: Halves,
    both: u64,
    wants_first: bool,
) -> Result<(Option<Output<T>>, Output<T>)> {
    let [rows, channels, inner, turns] = halves.arguments()?;
    let half = || allocate::<T>("channel_shuffle", device, &[halves.len()]);
    let (first, second) = (wants_first.then(half).transpose()?, half()?);
    let arguments = [
        pointer(both),
        pointer(first.as_ref().map_or(0, Output::at)),
        pointer(second.at()),
        rows,
        channels,
        inner,
        turns,
    ];
    let grid = Grid::over(halves.len());
    run::<T>(device, &SHUFFLE, "part", grid, &arguments)?;
    Ok((first, second))
}
