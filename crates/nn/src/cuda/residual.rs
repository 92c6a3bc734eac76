//! A residual block as one node: the shortcut is added where the last norm writes, and the gradients of both ways where
//! the first convolution writes its own.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, Layout, Shape, Tensor, bail};
use isqrt_device::cuda::{Output, address, input};

use super::norm::Extent;
use super::{Held, Maps, conv, device_of, of_maps, relu};
use crate::checkpoint::{Aside, lay_aside, needs_backward};
use crate::ops::{Activation, BatchNorm, BatchNormOp, Conv, ConvShapes, check_affine};
use crate::tape;
use crate::{Mode, Result};

/// A convolution without bias and its norm.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub weight: &'a Tensor,
    pub options: Conv,
    /// Scale and shift.
    pub affine: (&'a Tensor, &'a Tensor),
    pub norm: &'a BatchNorm,
    pub aside: &'a Aside,
}

/// `max(branch(x) + shortcut(x), 0)`, the shortcut being `x` itself where no layer is given. `x` has the channels
/// of a pixel beside each other and is on the tape; a backward pass must be
/// [`Vars::backward`](crate::Vars::backward).
pub(crate) fn forward(
    x: &Tensor,
    branch: &[Layer<'_>],
    shortcut: Option<Layer<'_>>,
    mode: Mode,
) -> Result<Tensor> {
    let maps = crate::blocked::dims_of_any_layout("residual", x)?;
    let mut through = maps;
    let mut parts = Vec::with_capacity(branch.len());
    for layer in branch {
        let part = Part::new(layer, through, mode)?;
        through = part.ends();
        parts.push(part);
    }
    let shortcut = shortcut.map(|layer| Part::new(&layer, maps, mode));
    let shortcut = shortcut.transpose()?;
    let beside = shortcut.as_ref().map_or(maps, Part::ends);
    if beside != through {
        return crate::error::shape_error(
            "residual",
            format!("the branch gives {through:?}, the shortcut {beside:?}"),
        );
    }
    let node = Residual { parts, shortcut };
    let moves = node.parts.iter().chain(&node.shortcut);
    let moves = moves.map(|part| (part.batch_norm.clone(), part.norm.pending(), part.extent()));
    let moves: Vec<_> = moves.collect();
    let y = tape::apply1(&x.contiguous()?, node)?;
    for (norm, pending, extent) in moves {
        norm.update(&pending, extent.outer, mode)?;
    }
    Ok(y)
}

struct Part {
    conv: ConvShapes,
    weight: Tensor,
    norm: BatchNormOp,
    batch_norm: BatchNorm,
    affine: (Tensor, Tensor),
    aside: Aside,
    /// What the convolution gave, and what the norm made of it where another convolution takes that.
    convolved: OnceLock<Box<dyn Held>>,
    normalised: OnceLock<Box<dyn Held>>,
}

impl Part {
    fn new(layer: &Layer<'_>, maps: (usize, [usize; 4]), mode: Mode) -> Result<Self> {
        let conv = ConvShapes::of(maps, layer.weight, layer.options)?;
        let channels = conv.channels.1;
        check_affine("residual", channels, layer.affine.0, layer.affine.1)?;
        let sizes = (conv.batch, channels, channels);
        Ok(Self {
            norm: BatchNormOp::new(sizes, conv.pixels(), layer.norm, mode)?,
            conv,
            weight: layer.weight.contiguous()?,
            batch_norm: layer.norm.clone(),
            affine: (layer.affine.0.contiguous()?, layer.affine.1.contiguous()?),
            aside: layer.aside.clone(),
            convolved: OnceLock::new(),
            normalised: OnceLock::new(),
        })
    }

    /// Of its result: the channels, and the other sizes.
    fn ends(&self) -> (usize, [usize; 4]) {
        let conv = &self.conv;
        let sizes = [conv.batch, 1, conv.rows.output, conv.columns.output];
        (conv.channels.1, sizes)
    }

    fn extent(&self) -> Extent {
        let conv = &self.conv;
        Extent::new(conv.batch, conv.channels.1, conv.pixels(), true)
    }

    fn weight<T: Maps>(&self) -> candle_core::Result<u64> {
        address::<T::Parameter>(&self.weight)
    }

    fn forward<T: Maps>(
        &self,
        device: &CudaDevice,
        x: u64,
        beside: Option<u64>,
    ) -> candle_core::Result<Output<T>> {
        let from = (x, self.weight::<T>()?);
        let convolved = conv::forward_of::<T>(
            device,
            &self.conv,
            (true, true),
            from,
            (None, Activation::None),
        )?;
        let (gamma, beta) = &self.affine;
        let affine = (
            address::<T::Parameter>(gamma)?,
            address::<T::Parameter>(beta)?,
        );
        let maps = (self.extent(), (convolved.at(), beside));
        let y = self.norm.forward_on_gpu::<T>(device, maps, affine)?;
        // candle runs an op value once.
        let _ = self.convolved.set(Box::new(convolved));
        Ok(y)
    }

    /// Lays the gradients of the parameters aside; returns that of what the convolution gave.
    fn backward<T: Maps>(
        &self,
        device: &CudaDevice,
        (x, dy): (u64, u64),
    ) -> candle_core::Result<Output<T>> {
        let Some(convolved) = self.convolved.get() else {
            bail!("residual: backward before forward")
        };
        let from = (convolved.at(), dy);
        let (between, [dgamma, dbeta]) =
            self.norm
                .backward_on_gpu::<T>(device, self.extent(), from)?;
        let from = (x, between.at());
        let dw = conv::weight_gradient::<T>(device, &self.conv, (true, true), from)?;
        let channels = self.conv.channels.1;
        let (gamma, beta) = &self.affine;
        lay_aside(
            &self.aside,
            &self.weight,
            dw.into_tensor(self.weight.shape()),
        )?;
        lay_aside(&self.aside, gamma, dgamma.into_tensor(channels))?;
        lay_aside(&self.aside, beta, dbeta.into_tensor(channels))?;
        Ok(between)
    }

    fn input_gradient<T: Maps>(
        &self,
        device: &CudaDevice,
        between: &Output<T>,
    ) -> candle_core::Result<Output<T>> {
        let from = (self.weight::<T>()?, between.at());
        conv::input_gradient::<T>(device, &self.conv, (true, true), from)
    }
}

struct Residual {
    parts: Vec<Part>,
    shortcut: Option<Part>,
}

impl Residual {
    fn forward<T: Maps>(&self, device: &CudaDevice, x: u64) -> candle_core::Result<CudaStorage> {
        let Some((last, parts)) = self.parts.split_last() else {
            bail!("residual: no convolution beside the shortcut")
        };
        let mut at = x;
        for part in parts {
            let y = part.forward::<T>(device, at, None)?;
            at = y.at();
            let _ = part.normalised.set(Box::new(y));
        }
        let shortcut = match &self.shortcut {
            Some(part) => Some(part.forward::<T>(device, x, None)?),
            None => None,
        };
        let beside = shortcut.as_ref().map_or(x, Output::at);
        Ok(last.forward::<T>(device, at, Some(beside))?.into_storage())
    }

    fn backward<T: Maps>(
        &self,
        x: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let Some((first, parts)) = self.parts.split_first() else {
            bail!("residual: no convolution beside the shortcut")
        };
        needs_backward(&first.aside)?;
        let (device, at) = (device_of(x)?, address::<T>(x)?);
        let from = (address::<T>(y)?, address::<T>(dy)?);
        let masked = relu::between_of::<T>(device, from, y.elem_count(), Activation::Relu.upper())?;
        let mut through: Option<Output<T>> = None;
        for (part, before) in parts.iter().zip(&self.parts).rev() {
            let Some(given) = before.normalised.get() else {
                bail!("residual: backward before forward")
            };
            let up = through.as_ref().unwrap_or(&masked).at();
            let between = part.backward::<T>(device, (given.at(), up))?;
            through = Some(part.input_gradient(device, &between)?);
        }
        let up = through.as_ref().unwrap_or(&masked).at();
        let between = first.backward::<T>(device, (at, up))?;
        drop(through);
        let dx = match &self.shortcut {
            Some(part) => {
                let between = part.backward::<T>(device, (at, masked.at()))?;
                part.input_gradient(device, &between)?
            }
            None => masked,
        };
        let from = (first.weight::<T>()?, between.at());
        conv::add_input_gradient::<T>(device, &first.conv, from, &dx)?;
        Ok(dx.into_tensor(x.shape()))
    }
}

impl CustomOp1 for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("residual: the maps are not on the GPU")
    }

    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let y = of_maps!("residual", s.dtype(), T => self.forward::<T>(s.device(), input::<T>(s, l)?.at))?;
        let (channels, [batch, _, rows, columns]) = match self.parts.last() {
            Some(last) => last.ends(),
            None => bail!("residual: no convolution beside the shortcut"),
        };
        Ok((y, Shape::from((batch, 1, rows, columns, channels))))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        of_maps!("residual", x.dtype(), T => Ok(Some(self.backward::<T>(x, y, &dy)?)))
    }
}
