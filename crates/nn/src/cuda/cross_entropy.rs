//! Softmax cross-entropy; nothing is read back.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Device, Result, Shape, Tensor};
use isqrt_device::cuda::kernels::LINEAR;
use isqrt_device::cuda::{Grid, Output, address, input, int, pointer, real};

use super::{OnGpu, Operand, allocate, on_gpu, run};

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct State {
    labels: Tensor,
    /// Largest logit, logarithm of the sum of exponentials and share of the loss, a row each.
    facts: Output<f64>,
}

/// The mean loss of the rows.
pub(crate) fn forward(
    (s, l): Operand<'_>,
    labels: &[u32],
    (classes, smoothing): (usize, f64),
) -> Result<(CudaStorage, Shape, State)> {
    let device = s.device();
    let rows = labels.len();
    let labels = Tensor::from_slice(labels, rows, &Device::Cuda(device.clone()))?;
    let facts = allocate::<f64>("cross_entropy", device, &[rows, 3])?;
    let loss = on_gpu!("cross_entropy", s, T => {
        let logits = input::<T>(s, l)?;
        let arguments = [
            pointer(logits.at),
            pointer(address::<u32>(&labels)?),
            pointer(facts.at()),
            int(classes),
            real(smoothing),
        ];
        run::<T>(device, &LINEAR, "log_sums", Grid::blocks(rows, 128), &arguments)?;
        let loss = allocate::<T>("cross_entropy", device, &[1])?;
        let arguments = [pointer(facts.at()), pointer(loss.at()), int(rows)];
        run::<T>(device, &LINEAR, "mean_loss", Grid::blocks(1, 256), &arguments)?;
        Ok(loss.into_storage())
    })?;
    Ok((loss, Shape::from(()), State { labels, facts }))
}

/// The gradient of the logits.
pub(crate) fn backward(
    state: &State,
    logits: &Tensor,
    dy: &Tensor,
    (classes, smoothing): (usize, f64),
) -> Result<Tensor> {
    let gradient = |[(s, l), (g, lg)]: [Operand<'_>; 2]| {
        on_gpu!("cross_entropy", s, T => {
            let (x, g) = (input::<T>(s, l)?, input::<T>(g, lg)?);
            let dx = allocate::<T>("cross_entropy", s.device(), l.dims())?;
            let arguments = [
                pointer(x.at),
                pointer(address::<u32>(&state.labels)?),
                pointer(state.facts.at()),
                pointer(g.at),
                pointer(dx.at()),
                int(x.len / classes),
                int(classes),
                real(smoothing),
            ];
            run::<T>(s.device(), &LINEAR, "loss_gradient", Grid::over(x.len), &arguments)?;
            Ok((dx.into_storage(), l.shape().clone()))
        })
    };
    logits.apply_op2_no_bwd(dy, &OnGpu("cross_entropy-gradient", gradient))
}
