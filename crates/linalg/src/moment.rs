//! One op for every method that pools a second moment of the features: from features to the moment,
//! from the moment to the output, image by image, and back.
//!
//! Images run side by side, each on one thread. A method sees matrices only: shapes, element
//! types, devices, checks and the step between features and moment are here.

use crate::reference::{Number, product, shifted, transposed};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor};
use faer::{Mat, MatRef};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// A map of the second moment, a symmetric positive semi-definite matrix.
pub(crate) trait Method<T: Number>: Send + Sync {
    /// What the forward pass leaves for the backward pass.
    type Kept: Send + Sync;

    /// Values of the output for moments of this size, without the batch.
    fn shape(&self, size: usize) -> Vec<usize>;

    /// The values of one image, row by row; `index` is its place in the batch.
    fn forward(&self, moment: Mat<T>, index: usize) -> Result<(Vec<T>, Self::Kept)>;

    /// The gradient of the moment from that of the values. Only its symmetric part counts.
    fn backward(&self, kept: &Self::Kept, gradient: &[T]) -> Mat<T>;

    /// The function of eigenvalues that the method is, and the form of its output, where a GPU can
    /// do it.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> Option<(crate::eig::gpu::Function, crate::config::Output)> {
        None
    }
}

/// Which second moment: `ZZᵀ` of the features less a share of their mean, `Z = (X - sμ1ᵀ)/√M`, with
/// or without a last row of ones (also over `√M`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Moment {
    /// The share `s`: 1 for the covariance, 0 for `XXᵀ/M`.
    pub(crate) removed: f64,
    /// Whether there is a row of ones.
    pub(crate) ones: bool,
}

impl Moment {
    /// The covariance with divisor `M`.
    pub(crate) const COVARIANCE: Self = Self {
        removed: 1.0,
        ones: false,
    };
    /// `XXᵀ/M`, about zero and not about the mean.
    pub(crate) const ABOUT_ZERO: Self = Self {
        removed: 0.0,
        ones: false,
    };

    /// Size of the matrix for `d` channels.
    pub(crate) fn size(self, d: usize) -> usize {
        d + usize::from(self.ones)
    }

    fn factor<T: Number>(self, x: MatRef<'_, T>) -> Mat<T> {
        let mut z = shifted(x, self.removed);
        if self.ones {
            let one = T::nearest(1.0) / T::nearest(x.ncols() as f64).root();
            z.resize_with(x.nrows() + 1, x.ncols(), |_, _| one);
        }
        z
    }
}

/// Pools feature maps `(batch, d, height, width)` or `(batch, d, positions)`, differentiably, in
/// their own precision.
///
/// # Errors
/// [`Error::Shape`], [`Error::Empty`], [`Error::Dtype`], [`Error::Device`], those of the method;
/// [`Error::NonFinite`] names the first bad element of the batch.
pub(crate) fn pool<M>(x: &Tensor, moment: Moment, method: M) -> Result<Tensor>
where
    M: Method<f32> + Method<f64> + 'static,
{
    match x.dtype() {
        DType::F32 => pool_in::<f32, f32, M>(x, moment, method),
        _ => pool_in::<f64, f64, M>(x, moment, method),
    }
}

/// As [`pool`], computing in double precision whatever the type of the features.
///
/// # Errors
/// As there.
pub(crate) fn pool_in_double<M: Method<f64> + 'static>(
    x: &Tensor,
    moment: Moment,
    method: M,
) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 => pool_in::<f32, f64, M>(x, moment, method),
        _ => pool_in::<f64, f64, M>(x, moment, method),
    }
}

/// Features of type `T`, computed with in type `S`; those of a GPU are pooled there where the method
/// is a function of eigenvalues, else by the CPU.
pub(crate) fn pool_in<T, S, M>(x: &Tensor, moment: Moment, method: M) -> Result<Tensor>
where
    T: Number + crate::layer::Layered,
    S: Number + crate::layer::Layered,
    M: Method<S> + 'static,
{
    #[cfg(feature = "cuda")]
    if let (true, true, Some(method)) = (
        x.device().is_cuda(),
        matches!(x.dtype(), DType::F32 | DType::F64),
        method.on_gpu(),
    ) {
        let shape = crate::layer::feature_shape(x)?;
        let wide = x.to_dtype(<S as candle_core::WithDType>::DTYPE)?;
        let pooled = crate::eig::gpu::pool::<S>(&wide, shape, moment, method)?;
        return Ok(pooled.to_dtype(x.dtype())?);
    }
    if !x.device().is_cpu() {
        let pooled = pool_in::<T, S, M>(&x.to_device(&Device::Cpu)?, moment, method)?;
        return Ok(pooled.to_device(x.device())?);
    }
    let (batch, d, positions) = crate::layer::feature_shape(x)?;
    if !matches!(x.dtype(), DType::F32 | DType::F64) {
        return Err(Error::Dtype {
            dtype: x.dtype().as_str(),
        });
    }
    let op = Op::<T, S, M> {
        moment,
        method,
        batch,
        d,
        positions,
        tracked: x.track_op(),
        kept: OnceLock::new(),
        types: PhantomData,
    };
    Ok(x.contiguous()?.apply_op1(op)?)
}

/// One call: candle shows an op only its argument and result, so what is kept lives in the op.
struct Op<T, S: Number, M: Method<S>> {
    moment: Moment,
    method: M,
    batch: usize,
    d: usize,
    positions: usize,
    tracked: bool,
    kept: OnceLock<Vec<M::Kept>>,
    types: PhantomData<(T, S)>,
}

impl<T: Number, S: Number, M: Method<S>> Op<T, S, M> {
    fn factor(&self, features: &[T]) -> Mat<S> {
        let x = Mat::from_fn(self.d, self.positions, |i, j| {
            S::nearest(features[i * self.positions + j].widened())
        });
        self.moment.factor(x.as_ref())
    }

    fn forward_image(&self, index: usize, features: &[T]) -> Result<(Vec<T>, Option<M::Kept>)> {
        let bad = |what| Error::NonFinite { index, what };
        if features.iter().any(|x| !x.widened().is_finite()) {
            return Err(bad("a feature"));
        }
        let z = self.factor(features);
        let moment = product(&z, &transposed(&z));
        let diagonal = (0..moment.nrows()).map(|i| moment[(i, i)].widened());
        if !diagonal.sum::<f64>().is_finite() {
            return Err(bad("the covariance (it overflows)"));
        }
        let (out, kept) = self.method.forward(moment, index)?;
        let out: Vec<T> = out.iter().map(|y| T::nearest(y.widened())).collect();
        if out.iter().any(|y| !y.widened().is_finite()) {
            return Err(bad("the pooled output"));
        }
        Ok((out, self.tracked.then_some(kept)))
    }

    fn backward_image(
        &self,
        index: usize,
        features: &[T],
        kept: &M::Kept,
        gradient: &[T],
    ) -> Result<Vec<T>> {
        if gradient.iter().any(|g| !g.widened().is_finite()) {
            let what = "the upstream gradient";
            return Err(Error::NonFinite { index, what });
        }
        let gradient: Vec<S> = gradient.iter().map(|g| S::nearest(g.widened())).collect();
        let moment = self.method.backward(kept, &gradient);
        // Of Z Zᵀ: twice the symmetric part.
        let size = moment.nrows();
        let both = Mat::from_fn(size, size, |i, j| moment[(i, j)] + moment[(j, i)]);
        let z = product(&both, &self.factor(features));
        let x = shifted(z.get(..self.d, ..), self.moment.removed);
        let positions = self.positions;
        let values = (0..self.d * positions)
            .map(|at| T::nearest(x[(at / positions, at % positions)].widened()));
        Ok(values.collect())
    }
}

impl<T, S, M> CustomOp1 for Op<T, S, M>
where
    T: Number + crate::layer::Layered,
    S: Number,
    M: Method<S>,
{
    fn name(&self) -> &'static str {
        "second-moment-pooling"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let features = crate::layer::values::<T>(storage, layout)?;
        let images: Vec<Result<_>> = features
            .par_chunks_exact(self.d * self.positions)
            .enumerate()
            .map(|(index, image)| self.forward_image(index, image))
            .collect();
        // In order, so that the first bad image of the batch is the one that is named.
        let images: Vec<_> = images.into_iter().collect::<Result<_>>()?;
        let (out, kept): (Vec<Vec<T>>, Vec<Option<M::Kept>>) = images.into_iter().unzip();
        let _ = self.kept.set(kept.into_iter().flatten().collect());
        let mut shape = self.method.shape(self.moment.size(self.d));
        shape.insert(0, self.batch);
        Ok((T::storage(out.concat()), Shape::from(shape)))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let (arg, grad_res) = (arg.contiguous()?, grad_res.contiguous()?);
        let (x, x_layout) = arg.storage_and_layout();
        let (g, g_layout) = grad_res.storage_and_layout();
        let (Storage::Cpu(x), Storage::Cpu(g)) = (&*x, &*g) else {
            return Err(Error::Device.into());
        };
        let x = crate::layer::values::<T>(x, x_layout)?;
        let g = crate::layer::values::<T>(g, g_layout)?;
        let kept = self.kept.get().map_or(&[][..], Vec::as_slice);
        let values: usize = self.method.shape(self.moment.size(self.d)).iter().product();
        let out: Vec<Result<Vec<T>>> = x
            .par_chunks_exact(self.d * self.positions)
            .zip(kept.par_iter())
            .zip(g.par_chunks_exact(values))
            .enumerate()
            .map(|(index, ((x, kept), g))| self.backward_image(index, x, kept, g))
            .collect();
        let out: Vec<Vec<T>> = out.into_iter().collect::<Result<_>>()?;
        Ok(Some(Tensor::from_vec(
            out.concat(),
            arg.shape(),
            arg.device(),
        )?))
    }
}
