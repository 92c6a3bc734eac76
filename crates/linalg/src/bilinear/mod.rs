//! Bilinear pooling and its descendants: the moment `XXᵀ/M` about zero, whole or sketched, with a signed
//! square root and l2 normalisation after it; one file a method.

mod compact;
mod improved;
mod normalize;

pub use compact::{CompactBilinear, Projection};
pub use improved::{ImprovedBilinear, NewtonOrSvd};
pub use normalize::{ROOT_EPSILON, normalize};

use crate::Result;
use crate::config::Output;
use crate::moment::{Method, Moment, pool};
use crate::reference::Number;
use candle_core::Tensor;
use faer::Mat;

/// Bilinear pooling of features with themselves (B-CNN).
///
/// Lin, RoyChowdhury, Maji, *Bilinear CNNs for Fine-grained Visual Recognition* (ICCV 2015), with one
/// network in both streams: `G = XXᵀ/M`, then [`normalize`] over all `d²` values. Facts as in
/// `BCNN.py` of jiangtaoxie/fast-MPN-COV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bilinear;

impl Bilinear {
    /// Pools feature maps, differentiably. Zero features give zeros, and zero gradients.
    ///
    /// # Shapes
    /// - `x`: `(batch, d, height, width)` or `(batch, d, positions)`, f32 or f64
    /// - returns `(batch, d²)` of length 1, of the same type
    ///
    /// # Errors
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Cost
    /// `d²M` multiply-adds forward and as many backward. The matrix waits for the backward pass.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let moment = pool(x, Moment::ABOUT_ZERO, Whole)?;
        normalize(&moment.flatten_from(1)?)
    }
}

/// The moment as it is.
struct Whole;

impl<T: Number> Method<T> for Whole {
    /// The size of the moment.
    type Kept = usize;

    fn shape(&self, size: usize) -> Vec<usize> {
        Output::Full.shape(size)
    }

    fn forward(&self, moment: Mat<T>, _index: usize) -> Result<(Vec<T>, usize)> {
        Ok((Output::Full.read(&moment), moment.nrows()))
    }

    fn backward(&self, &size: &usize, gradient: &[T]) -> Mat<T> {
        Output::Full.matrix(size, gradient)
    }
}
