//! Losses and right answers that are read later.

use candle_core::{Result, Tensor};
use isqrt_device::cuda::kernels::IMAGES;
use isqrt_device::cuda::{Grid, address, int, pointer, real};

use super::{device_of, run};
use crate::element::dispatch;

pub(crate) fn add(ledger: &Tensor, loss: &Tensor, logits: &Tensor, labels: &[u32]) -> Result<()> {
    let device = device_of(logits)?;
    let (rows, classes) = logits.dims2()?;
    if rows != labels.len() {
        candle_core::bail!("{rows} rows of logits for {} labels", labels.len());
    }
    let (logits, labels) = (
        logits.contiguous()?,
        Tensor::from_slice(labels, rows, logits.device())?,
    );
    dispatch!("ledger", logits.dtype(), T => {
        let at = address::<f64>(ledger)?;
        let arguments = [pointer(address::<T>(loss)?), pointer(at), real(rows as f64)];
        run::<T>(device, &IMAGES, "note_loss", Grid::blocks(1, 32), &arguments)?;
        let arguments = [
            pointer(address::<T>(&logits)?),
            pointer(address::<u32>(&labels)?),
            pointer(at),
            int(rows),
            int(classes),
        ];
        let grid = Grid::blocks(rows.div_ceil(8), 256);
        run::<T>(device, &IMAGES, "count_right", grid, &arguments)
    })
}
