//! What each layer of a forward pass did: shapes, parameters, multiply-adds, values kept.
//!
//! Layers report to a recorder of their thread, which is there while [`record`] runs; otherwise a
//! layer looks once whether there is one.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::Tensor;

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

thread_local!(static RECORDER: RefCell<Option<Vec<LayerRecord>>> = const { RefCell::new(None) });

/// Runs a forward pass and tells what its layers did, in the order in which they ran. Results are
/// those of a pass without it.
///
/// Only what runs on the calling thread; a call within another keeps its records to itself.
pub fn record<R>(forward: impl FnOnce() -> R) -> (R, Vec<LayerRecord>) {
    /// Puts the outer recorder back even where the pass panics.
    struct Restore(Option<Vec<LayerRecord>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDER.set(self.0.take());
        }
    }
    let restore = Restore(RECORDER.replace(Some(Vec::new())));
    let result = forward();
    let records = RECORDER.take().unwrap_or_default();
    drop(restore);
    (result, records)
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
    RECORDER.with_borrow_mut(|recorder| {
        let Some(records) = recorder else {
            return;
        };
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
