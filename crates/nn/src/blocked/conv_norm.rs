//! A convolution, its batch normalisation and the activation that may follow, as one node.
//!
//! In evaluation the normalisation is folded into the weights, and nothing is kept: a backward
//! pass, rare there, convolves again.

use std::borrow::Cow;
use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp3, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
#[cfg(feature = "cuda")]
use isqrt_device::cuda::{Output, address, input};
use isqrt_linalg::Kernel;

use super::Lanes;
use crate::checkpoint::{Aside, past_the_tape};
#[cfg(feature = "cuda")]
use crate::cuda::{self, Maps, norm::Extent};
use crate::element::{dispatch, read, values};
use crate::ops::{
    Activation, BatchNorm, BatchNormOp, Conv, ConvShapes, check_affine, through_activation,
};
use crate::tape;
use crate::{Mode, Result};

/// [`batch_norm`](crate::ops::batch_norm) of [`conv2d`](crate::ops::conv2d): one node for blocked maps, and on
/// the CPU in evaluation for plain ones, else two. The activation of `options` would come between the two;
/// that of `norm` comes after them.
///
/// # Shapes
/// - `x`: maps, blocked or plain; so is the result
/// - `weight`: `(out, in / groups, kernel height, kernel width)`
/// - `affine`: scale and shift, `(out)` each
///
/// # Errors
/// As for the two ops.
pub fn conv_norm(
    x: &Tensor,
    weight: &Tensor,
    options: Conv,
    affine: (&Tensor, &Tensor),
    norm: &BatchNorm,
    mode: Mode,
) -> Result<Tensor> {
    conv_norm_of(x, weight, options, affine, (norm, mode), None)
}

/// [`conv_norm`] of a layer whose gradients may go past the tape.
pub(crate) fn conv_norm_of(
    x: &Tensor,
    weight: &Tensor,
    options: Conv,
    affine: (&Tensor, &Tensor),
    (norm, mode): (&BatchNorm, Mode),
    aside: Option<&Aside>,
) -> Result<Tensor> {
    let is_one = match super::is_blocked(x) {
        true => super::fills_blocks(weight, options.groups),
        false => mode == Mode::Eval && x.device().is_cpu(),
    };
    if options.activation != Activation::None || !is_one {
        let y = crate::ops::conv2d_of(x, weight, None, options, aside)?;
        return crate::ops::batch_norm(&y, affine.0, affine.1, norm, mode);
    }
    let conv = ConvShapes::new(x, weight, options)?;
    let channels = conv.channels.1;
    check_affine("conv_norm", channels, affine.0, affine.1)?;
    let plane = conv.pixels();
    let op = Op {
        conv,
        norm: BatchNormOp::new((conv.batch, channels, conv.lanes), plane, norm, mode)?,
        folds: mode == Mode::Eval,
        convolved: OnceLock::new(),
        #[cfg(feature = "cuda")]
        on_gpu: OnceLock::new(),
        aside: aside.cloned(),
    };
    let pending = op.norm.pending();
    // An op takes three tensors: scale and shift come as one.
    let affine = Tensor::stack(&[affine.0, affine.1], 0)?;
    let y = tape::apply3(&x.contiguous()?, [&weight.contiguous()?, &affine], op)?;
    norm.update(&pending, conv.batch * plane, mode)?;
    Ok(y)
}

struct Op {
    conv: ConvShapes,
    norm: BatchNormOp,
    /// Whether the norm becomes part of the convolution.
    folds: bool,
    /// The output of the convolution; none where the norm is folded in.
    convolved: OnceLock<CpuStorage>,
    /// The same in the memory of a GPU, but in evaluation.
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<Box<dyn cuda::Held>>,
    aside: Option<Aside>,
}

impl Op {
    /// Whether the maps are blocked; in evaluation they may be plain.
    fn in_blocks(&self) -> bool {
        self.conv.lanes > 1
    }
}

#[cfg(feature = "cuda")]
impl Op {
    fn extent(&self) -> Extent {
        let (batch, channels) = (self.conv.batch, self.conv.channels.1);
        Extent::new(batch, channels, self.conv.pixels(), true)
    }

    /// Addresses of scale and shift.
    fn affine<T: Maps>(&self, at: u64) -> (u64, u64) {
        (
            at,
            at + (self.conv.channels.1 * size_of::<T::Parameter>()) as u64,
        )
    }

    fn backward_on_gpu(
        &self,
        (x, weight, affine): (&Tensor, &Tensor, &Tensor),
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let device = cuda::device_of(x)?;
        cuda::of_maps!("conv_norm", x.dtype(), T => {
            let at = (address::<T>(x)?, address::<<T as Maps>::Parameter>(weight)?);
            let again = match self.on_gpu.get() {
                Some(_) => None,
                None => Some(cuda::conv::forward_of::<T>(
                    device, &self.conv, (true, true), at, (None, Activation::None))?),
            };
            let kept = self.on_gpu.get().map(|kept| kept.at());
            let convolved = kept.or(again.as_ref().map(Output::at)).unwrap_or(0);
            let from = (convolved, address::<T>(dy)?);
            let (between, [dgamma, dbeta]) =
                self.norm.backward_on_gpu::<T>(device, self.extent(), from)?;
            let dx = match x.track_op() {
                true => {
                    let from = (at.1, between.at());
                    let dx = cuda::conv::input_gradient::<T>(device, &self.conv, (true, true), from)?;
                    Some(dx.into_tensor(x.shape()))
                }
                false => None,
            };
            let from = (at.0, between.at());
            let dw = cuda::conv::weight_gradient::<T>(device, &self.conv, (true, true), from)?;
            let dw = dw.into_tensor(weight.shape());
            let channels = self.conv.channels.1;
            let both = [dgamma.into_tensor(channels), dbeta.into_tensor(channels)];
            let daffine = Tensor::stack(&both, 0)?.reshape(affine.shape())?;
            Ok((dx, past_the_tape(self.aside.as_ref(), weight, dw)?, Some(daffine)))
        })
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "conv_norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("conv_norm", s1.dtype(), T => {
            let (x, weight) = (values::<T>(s1, l1)?, values(s2, l2)?);
            let (gamma, beta) = halves(values::<T>(s3, l3)?);
            if self.folds {
                let (weight, bias) = self.norm.folded(weight, gamma, beta)?;
                let after = (Some(&*bias), self.norm.activation);
                let y = self.conv.forward(x, &weight, after, self.in_blocks(), Kernel::Auto);
                return Ok((T::to_cpu_storage_owned(y), self.conv.shape()));
            }
            let convolved = self.conv.forward(x, weight, (None, Activation::None), self.in_blocks(), Kernel::Auto);
            let y = self.norm.forward(&convolved, gamma, beta)?;
            // candle runs an op value once.
            let _ = self.convolved.set(T::to_cpu_storage_owned(convolved));
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, self.conv.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let device = s1.device();
        let y = cuda::of_maps!("conv_norm", s1.dtype(), T => {
            let (x, weight) = (input::<T>(s1, l1)?, cuda::conv::parameter::<T>((s2, l2))?);
            let affine = self.affine::<T>(cuda::conv::parameter::<T>((s3, l3))?);
            let from = (x.at, weight);
            let convolved =
                cuda::conv::forward_of::<T>(device, &self.conv, (true, true), from, (None, Activation::None))?;
            let from = (self.extent(), (convolved.at(), None));
            let y = self.norm.forward_on_gpu::<T>(device, from, affine)?;
            if !self.folds {
                // candle runs an op value once.
                let _ = self.on_gpu.set(Box::new(convolved));
            }
            Ok(y.into_storage())
        })?;
        let (rows, columns) = (self.conv.rows.output, self.conv.columns.output);
        Ok((
            y,
            Shape::from((self.conv.batch, 1, rows, columns, self.conv.channels.1)),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        affine: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return self.backward_on_gpu((x, weight, affine), &dy);
        }
        // What folded weights gave differs in its last bits from what the norm would make.
        let (dy, activation) = match self.folds {
            true => {
                let dy = through_activation(self.norm.activation, y, &dy)?;
                (dy, Activation::None)
            }
            false => (dy, self.norm.activation),
        };
        let (xs, ws, gs, dys) = (read(x), read(weight), read(affine), read(&dy));
        let device = x.device();
        dispatch!("conv_norm", x.dtype(), T => {
            let affine_of = halves(gs.values::<T>()?);
            let convolved = match self.convolved.get() {
                Some(convolved) => Cow::Borrowed(convolved.as_slice::<T>()?),
                None => {
                    let (x, weight) = (xs.values::<T>()?, ws.values()?);
                    Cow::Owned(self.conv.forward(x, weight, (None, Activation::None), self.in_blocks(), Kernel::Auto))
                }
            };
            let (between, mut dgamma, dbeta) =
                self.norm.backward(&convolved, affine_of, dys.values()?, activation)?;
            let (x_values, wants_dx) = (xs.values::<T>()?, x.track_op());
            let (dx, dw) =
                self.conv.backward(x_values, ws.values()?, &between, wants_dx, self.in_blocks(), Kernel::Auto);
            let dw = Tensor::from_vec(dw, weight.shape(), device)?;
            dgamma.extend(dbeta);
            Ok((
                dx.map(|dx| Tensor::from_vec(dx, x.shape(), device)).transpose()?,
                past_the_tape(self.aside.as_ref(), weight, dw)?,
                Some(Tensor::from_vec(dgamma, affine.shape(), device)?),
            ))
        })
    }
}

fn halves<T: Lanes>(affine: &[T]) -> (&[T], &[T]) {
    affine.split_at(affine.len() / 2)
}
