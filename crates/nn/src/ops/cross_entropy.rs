//! Cross entropy of logits and class labels, with its log-softmax, in one node.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, dispatch, read, values};
use crate::error::shape_error;
use crate::{Error, Result};

/// Mean over the batch of `−Σ_k q_k log softmax(logits)_k`, where `q` is `1 − smoothing` at the
/// label plus `smoothing / classes` everywhere.
///
/// # Shapes
/// - `logits`: `(batch, classes)`; `labels`: one class index a row
/// - returns a scalar
///
/// # Errors
/// [`Error::Shape`] where there is not one label a row or a label has no class; [`Error::Option`]
/// for a smoothing outside of `[0, 1)`.
pub fn cross_entropy(logits: &Tensor, labels: &[u32], smoothing: f64) -> Result<Tensor> {
    let classes = match *logits.dims() {
        [batch, classes] if batch == labels.len() && batch > 0 => classes,
        ref shape => {
            return shape_error(
                "cross_entropy",
                format!("{} labels do not fit logits {shape:?}", labels.len()),
            );
        }
    };
    if let Some(label) = labels.iter().find(|&&label| label as usize >= classes) {
        return shape_error(
            "cross_entropy",
            format!("label {label} with {classes} classes"),
        );
    }
    if !(0.0..1.0).contains(&smoothing) {
        return Err(Error::Option {
            what: "label smoothing",
            value: smoothing.to_string(),
            expected: "at least 0 and less than 1",
        });
    }
    let op = CrossEntropy {
        labels: labels.to_vec(),
        classes,
        smoothing,
        #[cfg(feature = "cuda")]
        on_gpu: OnceLock::new(),
    };
    Ok(logits.contiguous()?.apply_op1(op)?)
}

struct CrossEntropy {
    labels: Vec<u32>,
    classes: usize,
    smoothing: f64,
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<cuda::cross_entropy::State>,
}

impl CrossEntropy {
    fn forward<T: Element>(&self, logits: &[T]) -> T {
        let rows = logits.chunks_exact(self.classes).zip(&self.labels);
        let share = self.smoothing / self.classes as f64;
        let total: f64 = rows
            .map(|(row, &label)| {
                let (largest, log_sum) = log_normaliser(row);
                let log_of = |v: T| v.to_f64() - largest - log_sum;
                let all: f64 = match share {
                    0.0 => 0.0,
                    _ => share * row.iter().map(|&v| log_of(v)).sum::<f64>(),
                };
                -(1.0 - self.smoothing) * log_of(row[label as usize]) - all
            })
            .sum();
        T::from_f64(total / self.labels.len() as f64)
    }

    fn backward<T: Element>(&self, logits: &[T], upstream: f64) -> Vec<T> {
        let factor = upstream / self.labels.len() as f64;
        let share = self.smoothing / self.classes as f64;
        let mut gradient = Vec::with_capacity(logits.len());
        for (row, &label) in logits.chunks_exact(self.classes).zip(&self.labels) {
            let (largest, log_sum) = log_normaliser(row);
            gradient.extend(row.iter().enumerate().map(|(k, &v)| {
                let target = share
                    + if k == label as usize {
                        1.0 - self.smoothing
                    } else {
                        0.0
                    };
                T::from_f64(factor * ((v.to_f64() - largest - log_sum).exp() - target))
            }));
        }
        gradient
    }
}

/// Largest logit, and `log Σ exp(logit − largest)`.
fn log_normaliser<T: Element>(row: &[T]) -> (f64, f64) {
    let largest = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(v.to_f64()));
    (
        largest,
        row.iter()
            .map(|v| (v.to_f64() - largest).exp())
            .sum::<f64>()
            .ln(),
    )
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let loss = dispatch!("cross_entropy", s.dtype(), T => {
            Ok(T::to_cpu_storage_owned(vec![self.forward::<T>(values(s, l)?)]))
        })?;
        Ok((loss, Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let options = (self.classes, self.smoothing);
        let (loss, shape, state) = cuda::cross_entropy::forward((s, l), &self.labels, options)?;
        let _ = self.on_gpu.set(state);
        Ok((loss, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let Some(state) = self.on_gpu.get() else {
                candle_core::bail!("cross_entropy: backward before forward")
            };
            let options = (self.classes, self.smoothing);
            let dx = cuda::cross_entropy::backward(state, x, &dy.contiguous()?, options)?;
            return Ok(Some(dx));
        }
        let xs = read(x);
        dispatch!("cross_entropy", x.dtype(), T => {
            let upstream = dy.to_scalar::<T>()?.to_f64();
            let gradient = self.backward::<T>(xs.values()?, upstream);
            Ok(Some(Tensor::from_vec(gradient, x.shape(), x.device())?))
        })
    }
}
