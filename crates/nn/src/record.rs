//! What each layer of a forward pass did: shapes, parameters, multiply-adds, values kept.
//!
//! Layers report to a recorder of their thread, which is there while [`record`] runs; otherwise a
//! layer looks once whether there is one.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, WithDType};
use rayon::prelude::*;

use crate::Result;
use crate::element::{dispatch, read};

/// What one layer or op did in a forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRecord {
    /// Its name in the network (`backbone.layer1.0.conv1`). Ops without parameters have none of
    /// their own and count to the layer that ran before them (empty where none did).
    pub path: Arc<str>,
    /// `conv2d`, `batch_norm`, `linear`, `max_pool2d` and so on.
    pub op: &'static str,
    /// Shape of the output, `(batch, channels, height, width)` of blocked maps too.
    pub shape: Vec<usize>,
    /// Learnt values.
    pub parameters: usize,
    /// Products of the forward pass of convolutions (a bias adds none) and linear layers; 0 for
    /// all others. In evaluation a norm that is folded into its convolution changes nothing here.
    pub multiply_adds: u64,
    /// Values of the output. Their sum is what a training step without gradient checkpoints keeps at
    /// least: the output of each convolution, of each norm after one, of each linear layer, pooling,
    /// sum and activation that is an op of its own, whatever the mode of this pass.
    pub elements: usize,
}

/// What one layer or op did, and how large the values of its output are.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerValues {
    /// The layer.
    pub layer: LayerRecord,
    /// [`largest_magnitude`] of its output.
    pub largest: f64,
}

/// What the layers of a pass report.
#[derive(Default)]
struct Recorder {
    records: Vec<LayerRecord>,
    /// Of each record, where they are asked for.
    largest: Option<Vec<f64>>,
}

thread_local!(static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) });

/// Runs a forward pass and tells what its layers did, in the order in which they ran. Results are
/// those of a pass without it.
///
/// Only what runs on the calling thread; a call within another keeps its records to itself.
pub fn record<R>(forward: impl FnOnce() -> R) -> (R, Vec<LayerRecord>) {
    let (result, recorder) = run(Recorder::default(), forward);
    (result, recorder.records)
}

/// As [`record`], with the largest magnitude of each output: where values stop being finite.
///
/// A convolution and its normalisation run one after the other in this pass, also where they are one node
/// otherwise, so that each has its own values; results may differ from those of another pass by
/// rounding.
pub fn record_values<R>(forward: impl FnOnce() -> R) -> (R, Vec<LayerValues>) {
    let recorder = Recorder {
        largest: Some(Vec::new()),
        ..Recorder::default()
    };
    let (result, recorder) = run(recorder, forward);
    let largest = recorder.largest.unwrap_or_default();
    let layers = recorder.records.into_iter().zip(largest);
    let layers = layers.map(|(layer, largest)| LayerValues { layer, largest });
    (result, layers.collect())
}

/// The largest magnitude of the values of a tensor: infinite or NaN where one of them is, 0 without values.
///
/// # Errors
/// For element types other than f32 and f64.
pub fn largest_magnitude(x: &Tensor) -> Result<f64> {
    let x = x.to_device(&Device::Cpu)?.contiguous()?;
    let x = match x.dtype() {
        DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x,
    };
    let held = read(&x);
    // NaN stays.
    let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
    let largest = dispatch!("largest_magnitude", x.dtype(), T => {
        let blocks = held.values::<T>()?.par_chunks(1 << 14);
        let largest = blocks.map(|block| {
            block.iter().fold(0.0, |most, &v| larger(most, v.to_f64().abs()))
        });
        Ok::<f64, candle_core::Error>(largest.reduce(|| 0.0, larger))
    })?;
    Ok(largest)
}

/// Whether a pass runs whose values are recorded.
pub(crate) fn wants_values() -> bool {
    RECORDER.with_borrow(|r| r.as_ref().is_some_and(|r| r.largest.is_some()))
}

/// Whether a pass runs that is recorded.
#[cfg(feature = "cuda")]
pub(crate) fn is_recorded() -> bool {
    RECORDER.with_borrow(Option::is_some)
}

fn run<R>(recorder: Recorder, forward: impl FnOnce() -> R) -> (R, Recorder) {
    /// Puts the outer recorder back even where the pass panics.
    struct Restore(Option<Recorder>);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDER.set(self.0.take());
        }
    }
    let restore = Restore(RECORDER.replace(Some(recorder)));
    let result = forward();
    let recorder = RECORDER.take().unwrap_or_default();
    drop(restore);
    (result, recorder)
}

/// Notes a layer whose output has the shape of `y`: its path, learnt values and multiply-adds.
pub(crate) fn note(op: &'static str, y: &Tensor, layer: impl FnOnce() -> (Arc<str>, usize, u64)) {
    push(op, y, |_| layer());
}

/// Notes an op without parameters, for the layer that ran last.
pub(crate) fn note_op(op: &'static str, y: &Tensor) {
    push(op, y, |before| {
        let path = before.last().map(|r| Arc::clone(&r.path));
        (path.unwrap_or_else(|| "".into()), 0, 0)
    });
}

fn push(
    op: &'static str,
    y: &Tensor,
    layer: impl FnOnce(&[LayerRecord]) -> (Arc<str>, usize, u64),
) {
    // Not while the recorder is borrowed: other work may run on this thread meanwhile. Layers compute in f32
    // and f64 alone, so there is no error.
    let largest = wants_values().then(|| largest_magnitude(y).unwrap_or(f64::NAN));
    RECORDER.with_borrow_mut(|recorder| {
        let Some(Recorder {
            records,
            largest: all,
        }) = recorder
        else {
            return;
        };
        if let (Some(all), Some(largest)) = (all, largest) {
            all.push(largest);
        }
        let (path, parameters, multiply_adds) = layer(records);
        let shape = match *y.dims() {
            [batch, panels, height, width, lanes] => vec![batch, panels * lanes, height, width],
            ref dims => dims.to_vec(),
        };
        records.push(LayerRecord {
            path,
            op,
            shape,
            parameters,
            multiply_adds,
            elements: y.elem_count(),
        });
    });
}
