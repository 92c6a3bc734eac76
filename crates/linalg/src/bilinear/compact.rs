//! Compact bilinear pooling: random projections of `XXᵀ` that keep inner products.

use super::normalize;
use crate::Result;
use crate::config::out_of_range;
use crate::layer::{Layered, feature_shape};
use crate::moment::{Method, Moment, pool_in};
use crate::reference::{Number, from_row_major, product, transposed};
use candle_core::{DType, Device, Tensor, WithDType};
use faer::Mat;

/// Compact bilinear pooling (CBP).
///
/// Gao, Beijbom, Zhang, Darrell, *Compact Bilinear Pooling* (CVPR 2016), then [`normalize`]. Inner
/// products of outputs before it are those of `XXᵀ` in expectation. Sums over positions, not means, as in
/// `CBP.py` of jiangtaoxie/fast-MPN-COV, which matters to the `ε` of the normalisation alone.
///
/// # Known troubles
/// A random map is part of the network: outputs of another one mean nothing to the classifier.
#[derive(Clone, Debug)]
pub struct CompactBilinear {
    /// The random map.
    pub projection: Projection,
}

/// The random map of [`CompactBilinear`] to `D` values, as tensors of whole numbers.
#[derive(Clone, Debug)]
pub enum Projection {
    /// Tensor Sketch (Pham and Pagh 2013): the circular convolution of two count sketches of each
    /// feature. Summed over positions it is linear in `G = XXᵀ`:
    /// `y[(h₁(i) + h₂(j)) mod D] += s₁(i) s₂(j) G_ij`, which needs no Fourier transform, and has
    /// a gather as its adjoint.
    TensorSketch {
        /// `h₁`, `h₂`: `(d)` each, in `[0, D)`.
        hashes: [Tensor; 2],
        /// `s₁`, `s₂`: `(d)` each, -1 or 1.
        signs: [Tensor; 2],
        /// `D`.
        dim: usize,
    },
    /// Random Maclaurin (Kar and Karnick 2012): `y_k = w₁ₖᵀ G w₂ₖ / √D`.
    RandomMaclaurin {
        /// The rows `w₁ₖ`, `w₂ₖ`: `(D, d)` each, -1 or 1.
        signs: [Tensor; 2],
    },
}

impl CompactBilinear {
    /// Pools feature maps, differentiably. Zero features give zeros, and zero gradients.
    ///
    /// # Shapes
    /// - `x`: `(batch, d, height, width)` or `(batch, d, positions)`, f32 or f64
    /// - returns `(batch, D)` of length 1, of the same type
    ///
    /// # Errors
    /// As [`CovPool::forward`](crate::CovPool::forward); [`Error::Option`](crate::Error::Option) for
    /// a map of another shape, or hashes that are not below `D`.
    ///
    /// # Cost
    /// `d²M` multiply-adds for `G` forward and as many backward; then `d²` for the sketch, or `Dd²`
    /// for Random Maclaurin (on the features themselves `2DdM`, more for `M > d/2`). Nothing
    /// but the sums waits for the backward pass.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().is_cpu() {
            // The sums are of the CPU, and so is what they are made of.
            let pooled = self.forward(&x.to_device(&Device::Cpu)?)?;
            return Ok(pooled.to_device(x.device())?);
        }
        match x.dtype() {
            DType::F32 => self.forward_in::<f32>(x),
            _ => self.forward_in::<f64>(x),
        }
    }

    fn forward_in<T: Number + Layered + WithDType>(&self, x: &Tensor) -> Result<Tensor> {
        let (_, d, positions) = feature_shape(x)?;
        // The moment is a mean over positions.
        let scale = positions as f64;
        let sums = match &self.projection {
            Projection::TensorSketch { hashes, signs, dim } => {
                let dim = *dim;
                let [first, second] = [0, 1].map(|which| {
                    let hashes = whole(&hashes[which], &[d], "hashes")?;
                    let signs = whole(&signs[which], &[d], "signs")?;
                    let below = |hash: f64| (0.0..dim as f64).contains(&hash);
                    match hashes.iter().find(|&&hash| !below(hash)) {
                        Some(hash) => Err(out_of_range("hashes", hash, "0 to D - 1")),
                        None => Ok((hashes.iter().map(|&hash| hash as usize).collect(), signs)),
                    }
                });
                let method = Sketch {
                    first: first?,
                    second: second?,
                    scale,
                    dim,
                };
                pool_in::<T, T, _>(x, Moment::ABOUT_ZERO, method)?
            }
            Projection::RandomMaclaurin { signs } => {
                let dim = signs[0].dims().first().copied().unwrap_or(0);
                if dim == 0 {
                    return Err(out_of_range("signs", signs[0].dims(), "at least one row"));
                }
                let [left, right] = [0, 1].map(|which| {
                    let values = whole(&signs[which], &[dim, d], "signs")?;
                    let values: Vec<T> = values.into_iter().map(T::nearest).collect();
                    Ok::<_, crate::Error>(from_row_major(dim, d, &values))
                });
                let scale = T::nearest(scale / (dim as f64).sqrt());
                let method = Maclaurin {
                    left: left?,
                    right: right?,
                    scale,
                };
                pool_in::<T, T, _>(x, Moment::ABOUT_ZERO, method)?
            }
        };
        normalize(&sums)
    }
}

/// The values of a tensor of this shape, rounded to whole numbers: averaging a network with itself
/// leaves them off by the last bit.
fn whole(tensor: &Tensor, shape: &[usize], option: &'static str) -> Result<Vec<f64>> {
    if tensor.dims() != shape {
        let expected = "one for each channel (and value, for Random Maclaurin) of the features";
        return Err(out_of_range(option, tensor.dims(), expected));
    }
    let values = tensor
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    Ok(values.into_iter().map(f64::round).collect())
}

/// Hashes and signs of the rows and of the columns.
struct Sketch {
    first: (Vec<usize>, Vec<f64>),
    second: (Vec<usize>, Vec<f64>),
    scale: f64,
    dim: usize,
}

impl Sketch {
    /// Calls `visit` with each entry of the moment, its place in the output, and its factor.
    fn entries(&self, mut visit: impl FnMut((usize, usize), usize, f64)) {
        for (j, (column, right)) in self.second.0.iter().zip(&self.second.1).enumerate() {
            for (i, (row, left)) in self.first.0.iter().zip(&self.first.1).enumerate() {
                let place = (row + column) % self.dim;
                visit((i, j), place, left * right * self.scale);
            }
        }
    }
}

impl<T: Number> Method<T> for Sketch {
    type Kept = ();

    fn shape(&self, _size: usize) -> Vec<usize> {
        vec![self.dim]
    }

    fn forward(&self, moment: Mat<T>, _index: usize) -> Result<(Vec<T>, ())> {
        let mut out = vec![T::nearest(0.0); self.dim];
        self.entries(|at, place, factor| out[place] += T::nearest(factor) * moment[at]);
        Ok((out, ()))
    }

    fn backward(&self, (): &(), gradient: &[T]) -> Mat<T> {
        let size = self.first.0.len();
        let mut out = Mat::zeros(size, size);
        self.entries(|at, place, factor| out[at] = T::nearest(factor) * gradient[place]);
        out
    }
}

struct Maclaurin<T> {
    left: Mat<T>,
    right: Mat<T>,
    scale: T,
}

impl<T: Number> Method<T> for Maclaurin<T> {
    type Kept = ();

    fn shape(&self, _size: usize) -> Vec<usize> {
        vec![self.left.nrows()]
    }

    fn forward(&self, moment: Mat<T>, _index: usize) -> Result<(Vec<T>, ())> {
        let half = product(&self.left, &moment);
        let mut out = vec![T::nearest(0.0); half.nrows()];
        for j in 0..half.ncols() {
            for (k, out) in out.iter_mut().enumerate() {
                *out += half[(k, j)] * self.right[(k, j)];
            }
        }
        out.iter_mut().for_each(|y| *y *= self.scale);
        Ok((out, ()))
    }

    fn backward(&self, (): &(), gradient: &[T]) -> Mat<T> {
        let right = Mat::from_fn(self.right.nrows(), self.right.ncols(), |k, j| {
            self.scale * gradient[k] * self.right[(k, j)]
        });
        product(&transposed(&self.left), &right)
    }
}
