//! Feature maps in blocked channels: `(batch, channels / W, height, width, W)` with `W` channels
//! of a pixel beside each other, one cache line (16 in f32, 8 in f64).
//!
//! A convolution then needs no column matrix: a pixel's channels are contiguous, and so are the
//! weights of a block of channels. Backbones enter with [`block`], keep their maps blocked from
//! layer to layer, and leave with [`unblock`]. The ops of [`crate::ops`] tell the layouts apart by
//! the rank and the last dimension, so a volume of that shape would be taken for blocked maps.
//!
//! On a GPU all channels are one block: `(batch, 1, height, width, channels)`, which libraries call
//! channels last or NHWC. Any number of channels fills it.

pub(crate) mod conv;
mod conv_norm;
pub(crate) mod depthwise;
mod kernel;
pub(crate) mod norm;
mod winograd;

pub use conv_norm::conv_norm;
pub(crate) use conv_norm::conv_norm_of;
pub(crate) use kernel::{Isa, Lanes};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};
use isqrt_linalg::Kernel;
use rayon::prelude::*;

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Unwritten, dispatch, read, values, with_scratch};
use crate::error::shape_error;
use crate::ops::dims4;
use crate::tape;

/// Channels beside each other, or `None` for element types that are not computed in.
pub(crate) fn width(dtype: DType) -> Option<usize> {
    use isqrt_linalg::simd::Element;
    match dtype {
        DType::F32 => Some(f32::WIDTH),
        DType::F64 => Some(f64::WIDTH),
        _ => None,
    }
}

/// Whether feature maps of this shape are blocked.
pub fn is_blocked(x: &Tensor) -> bool {
    match x.dims() {
        [_, panels, _, _, _] if x.device().is_cuda() => *panels == 1,
        [_, _, _, _, lanes] => width(x.dtype()) == Some(*lanes),
        _ => false,
    }
}

/// Whether maps of so many channels, of the type and on the device of `like`, can be blocked.
pub fn can_block(channels: usize, like: &Tensor) -> bool {
    like.device().is_cuda() || width(like.dtype()).is_some_and(|w| channels.is_multiple_of(w))
}

/// Whether the channels of each group of such a convolution fill blocks, or those of all groups of a
/// depthwise one.
pub(crate) fn fills_blocks(weight: &Tensor, groups: usize) -> bool {
    let fills = |channels| can_block(channels, weight);
    match *weight.dims() {
        [out, 1, ..] if out == groups => fills(out),
        [out, inputs, ..] => fills(inputs) && fills(out / groups.max(1)),
        _ => true,
    }
}

/// `(batch, panels, height, width)` of blocked maps.
pub(crate) fn dims(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [b, p, h, w, _] if is_blocked(x) && b * p * h * w > 0 => Ok([b, p, h, w]),
        ref other => shape_error(
            op,
            format!(
                "expects blocked maps (batch, channels / 16, height, width, 16), 8 in f64, got \
                 {other:?}"
            ),
        ),
    }
}

/// Channels beside each other, and `(batch, channels or panels, height, width)`, of maps in any
/// layout.
pub(crate) fn dims_of_any_layout(op: &'static str, x: &Tensor) -> Result<(usize, [usize; 4])> {
    match x.rank() {
        5 => Ok((x.dim(4)?, dims(op, x)?)),
        _ => Ok((1, dims4(op, x)?)),
    }
}

/// Checks that so many channels (`kind` says which) of the type of `x` can be blocked.
pub(crate) fn check_fills(op: &'static str, kind: &str, channels: usize, x: &Tensor) -> Result<()> {
    if can_block(channels, x) {
        return Ok(());
    }
    let (dtype, width) = (x.dtype(), width(x.dtype()).unwrap_or(1));
    shape_error(
        op,
        format!("{channels} {kind} of {dtype:?} do not fill blocks of {width}"),
    )
}

/// Feature maps `(batch, channels, height, width)` to blocked channels.
///
/// # Errors
/// [`crate::Error::Shape`] where the channels are no multiple of 16 (f32) or 8 (f64).
pub fn block(x: &Tensor) -> Result<Tensor> {
    let [_, channels, ..] = dims4("block", x)?;
    check_fills("block", "channels", channels, x)?;
    Ok(tape::apply1(
        &x.contiguous()?,
        Relayout { into_blocks: true },
    )?)
}

/// Blocked feature maps to `(batch, channels, height, width)`.
///
/// # Errors
/// [`crate::Error::Shape`] for maps that are not blocked.
pub fn unblock(x: &Tensor) -> Result<Tensor> {
    dims("unblock", x)?;
    Ok(tape::apply1(
        &x.contiguous()?,
        Relayout { into_blocks: false },
    )?)
}

struct Relayout {
    into_blocks: bool,
}

impl Relayout {
    /// The shape after this relayout.
    fn shape(&self, from: &[usize], width: usize) -> Vec<usize> {
        match *from {
            [b, c, h, w] => vec![b, c / width, h, w, width],
            [b, p, h, w, _] => vec![b, p * width, h, w],
            _ => from.to_vec(),
        }
    }
}

/// Transposes each panel, `W` planes of pixels to pixels of `W` channels, or back. In the last panel of an image channels
/// may be missing: there are zeros in their place, or it is they that are left out.
pub(crate) fn relayout<T: Lanes>(
    x: &[T],
    (channels, pixels): (usize, usize),
    into_blocks: bool,
    isa: &Isa<T>,
) -> Vec<T> {
    let panel = pixels * T::WIDTH;
    let (planes, panels) = (channels * pixels, channels.div_ceil(T::WIDTH) * panel);
    let (from, to) = match into_blocks {
        true => (planes, panels),
        false => (panels, planes),
    };
    let mut y = Unwritten::new(x.len() / from * to);
    let images = y.places().par_chunks_exact_mut(to);
    images.zip(x.par_chunks_exact(from)).for_each(|(y, x)| {
        let panels = y.par_chunks_mut(panel).zip(x.par_chunks(panel));
        panels.for_each(|(y, x)| {
            let is_whole = x.len() == y.len();
            with_scratch(
                if is_whole { 0 } else { panel },
                |spare| match into_blocks {
                    true => into_panel(x, pixels, (y, spare), isa),
                    false => out_of_panel(x, pixels, (y, spare), isa),
                },
            );
        });
    });
    // SAFETY: every value of each panel was written.
    unsafe { y.written() }
}

/// Planes to a panel, with zeros for those that are missing; then `spare` is as large as the panel.
fn into_panel<T: Lanes>(
    planes: &[T],
    pixels: usize,
    (panel, spare): (&mut [T], &mut [T]),
    isa: &Isa<T>,
) {
    if planes.len() == panel.len() {
        return isa.interleave(planes, pixels, panel);
    }
    let whole = &mut spare[..panel.len()];
    whole[..planes.len()].copy_from_slice(planes);
    whole[planes.len()..].fill(T::ZERO);
    isa.interleave(whole, pixels, panel);
}

/// The inverse of [`into_panel`].
fn out_of_panel<T: Lanes>(
    panel: &[T],
    pixels: usize,
    (planes, spare): (&mut [T], &mut [T]),
    isa: &Isa<T>,
) {
    if planes.len() == panel.len() {
        return isa.separate(panel, pixels, planes);
    }
    let whole = &mut spare[..panel.len()];
    isa.separate(panel, pixels, whole);
    planes.copy_from_slice(&whole[..planes.len()]);
}

impl CustomOp1 for Relayout {
    fn name(&self) -> &'static str {
        "relayout"
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::conv::relayout((s, l))
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let dims = l.dims();
        let pixels = dims[2] * dims[3];
        dispatch!("block", s.dtype(), T => {
            let shape = self.shape(dims, <T as isqrt_linalg::simd::Element>::WIDTH);
            let channels = if self.into_blocks { dims[1] } else { shape[1] };
            let (sizes, isa) = ((channels, pixels), T::isa(Kernel::Auto));
            let y = relayout::<T>(values(s, l)?, sizes, self.into_blocks, isa);
            Ok((T::to_cpu_storage_owned(y), Shape::from(shape)))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let into_blocks = !self.into_blocks;
            return Ok(Some(dy.apply_op1_no_bwd(&Relayout { into_blocks })?));
        }
        let pixels = x.dim(2)? * x.dim(3)?;
        let plain = if self.into_blocks { x } else { &dy };
        let (channels, dys) = (plain.dim(1)?, read(&dy));
        dispatch!("block", x.dtype(), T => {
            let (sizes, isa) = ((channels, pixels), T::isa(Kernel::Auto));
            let dx = relayout::<T>(dys.values()?, sizes, !self.into_blocks, isa);
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
