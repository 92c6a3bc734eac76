//! The channels of two maps in turns: what ends a unit of ShuffleNetV2, and the unit that splits its input.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, WithDType};
#[cfg(feature = "cuda")]
use isqrt_device::cuda::{address, input};
use rayon::prelude::*;

use super::dims4;
use crate::Result;
use crate::blocked::is_blocked;
#[cfg(feature = "cuda")]
use crate::cuda::{self, shuffle::Halves};
use crate::element::{Element, Unwritten, dispatch, read, values};
use crate::error::shape_error;
use crate::record::note_op;
use crate::tape::{self, Inbox};

/// Concatenation of two maps and a channel shuffle in two groups (Zhang et al. 2018): channel `2c` is
/// channel `c` of the first, channel `2c + 1` that of the second.
///
/// # Shapes
/// `(batch, channels, height, width)` each, to `(batch, 2 channels, height, width)`; blocked ones on a GPU alone
///
/// # Errors
/// [`crate::Error::Shape`] where the shapes differ or are not of that form.
pub fn channel_shuffle(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(first)?;
    if first.dims() != second.dims() {
        let (first, second) = (first.dims(), second.dims());
        let message = format!("expects equal shapes, got {first:?} and {second:?}");
        return shape_error("channel_shuffle", message);
    }
    let y = tape::join(&first.contiguous()?, &second.contiguous()?, Turns(sizes))?;
    note_op("channel_shuffle", &y);
    Ok(y)
}

/// [`channel_shuffle`] of the first half of the channels of `x` and of what `branch` makes of the second one: a
/// unit of ShuffleNetV2 with stride 1 (Ma et al. 2018, figure 3c). The first half is read where it lies, and
/// the gradient of `x` is written once. What the branch makes depends on its half, if it has a gradient at all.
///
/// # Shapes
/// `(batch, 2 channels, height, width)`, to the same, blocked on a GPU alone; `branch` keeps the shape of its half
///
/// # Errors
/// [`crate::Error::Shape`] for an odd number of channels or another shape of the branch; whatever it gives.
pub fn shuffle_unit(x: &Tensor, branch: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (at, channels) = channels_of("shuffle_unit", x)?;
    if channels % 2 != 0 {
        let message = format!("expects an even number of channels, got {:?}", x.dims());
        return shape_error("shuffle_unit", message);
    }
    let first = x.narrow(at, 0, channels / 2)?;
    let (x, sizes) = (x.contiguous()?, Sizes::of(&first)?);
    let kept = Arc::new(Inbox::default());
    let half = SecondHalf(sizes, Arc::clone(&kept));
    let second = branch(tape::apply1(&x, half)?)?;
    if second.dims() != first.dims() {
        let (first, second) = (first.dims(), second.dims());
        let message = format!("the branch made {second:?} of its half {first:?}");
        return shape_error("shuffle_unit", message);
    }
    if x.track_op() && !second.track_op() {
        return channel_shuffle(&first, &second);
    }
    let op = BesideFirst {
        sizes,
        kept: x.track_op().then_some(kept),
        x: x.detach(),
    };
    let y = tape::apply1(&second.contiguous()?, op)?;
    note_op("channel_shuffle", &y);
    Ok(y)
}

/// The dimension that channels are, and how many there are.
fn channels_of(op: &'static str, maps: &Tensor) -> Result<(usize, usize)> {
    // On the CPU, where halves rarely fill blocks, these are not taken.
    match maps.device().is_cuda() && is_blocked(maps) {
        true => Ok((4, maps.dims()[4])),
        false => Ok((1, dims4(op, maps)?[1])),
    }
}

/// Of a half: two of them make a map.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// The dimension that channels are.
    at: usize,
    /// Images, or pixels whose channels lie beside each other.
    #[cfg(feature = "cuda")]
    rows: usize,
    channels: usize,
    /// Values of a channel in a row.
    plane: usize,
}

impl Sizes {
    fn of(half: &Tensor) -> Result<Self> {
        let (at, channels) = channels_of("channel_shuffle", half)?;
        let product = |dims: &[usize]| dims.iter().product();
        Ok(Self {
            at,
            #[cfg(feature = "cuda")]
            rows: product(&half.dims()[..at]),
            channels,
            plane: product(&half.dims()[at + 1..]),
        })
    }

    /// A shape with so many channels.
    fn with_channels(self, shape: &Shape, channels: usize) -> Shape {
        let mut dims = shape.dims().to_vec();
        dims[self.at] = channels;
        Shape::from(dims)
    }

    /// Values of a row.
    fn image(self) -> usize {
        self.channels * self.plane
    }

    #[cfg(feature = "cuda")]
    fn halves(self, turns: bool) -> Halves {
        Halves {
            rows: self.rows,
            channels: self.channels,
            inner: self.plane,
            turns,
        }
    }

    /// Channels of both in turns; images of the first lie `stride` values apart.
    fn turns<T: Element>(self, (first, stride): (&[T], usize), second: &[T]) -> Vec<T> {
        let plane = self.plane;
        let mut y = Unwritten::new(2 * second.len());
        let pairs = y.places().par_chunks_exact_mut(2 * plane).with_min_len(8);
        let seconds = second.par_chunks_exact(plane).with_min_len(8);
        pairs
            .zip(seconds)
            .enumerate()
            .for_each(|(at, (pair, second))| {
                let from = at / self.channels * stride + at % self.channels * plane;
                let (even, odd) = pair.split_at_mut(plane);
                even.copy_from_slice(&first[from..from + plane]);
                odd.copy_from_slice(second);
            });
        // SAFETY: as many pairs of planes were written as `second` has planes.
        unsafe { y.written() }
    }

    /// The even channels and the odd ones.
    fn apart<T: Element>(self, both: &[T]) -> (Vec<T>, Vec<T>) {
        let plane = self.plane;
        let len = both.len() / 2;
        let (mut first, mut second) = (Unwritten::new(len), Unwritten::new(len));
        let firsts = first.places().par_chunks_exact_mut(plane).with_min_len(8);
        let seconds = second.places().par_chunks_exact_mut(plane).with_min_len(8);
        let pairs = both.par_chunks_exact(2 * plane).with_min_len(8);
        pairs
            .zip(firsts.zip(seconds))
            .for_each(|(pair, (first, second))| {
                let (even, odd) = pair.split_at(plane);
                first.copy_from_slice(even);
                second.copy_from_slice(odd);
            });
        // SAFETY: each plane of both was written.
        unsafe { (first.written(), second.written()) }
    }
}

/// Two maps.
struct Turns(Sizes);

impl CustomOp2 for Turns {
    fn name(&self) -> &'static str {
        "channel_shuffle"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("channel_shuffle", s1.dtype(), T => {
            let first = (values::<T>(s1, l1)?, self.0.image());
            Ok(T::to_cpu_storage_owned(self.0.turns(first, values::<T>(s2, l2)?)))
        })?;
        Ok((y, self.0.with_channels(l1.shape(), 2 * self.0.channels)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::of_maps!("channel_shuffle", s1.dtype(), T => {
            let first = (input::<T>(s1, l1)?.at, self.0.image());
            let second = input::<T>(s2, l2)?.at;
            let y = cuda::shuffle::join::<T>(s1.device(), self.0.halves(true), first, second)?;
            Ok(y.into_storage())
        })?;
        Ok((y, self.0.with_channels(l1.shape(), 2 * self.0.channels)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _other: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (first, second) = part_on_gpu(self.0, (x, &dy), true)?;
            return Ok((first, Some(second)));
        }
        let dys = read(&dy);
        dispatch!("channel_shuffle", x.dtype(), T => {
            let (first, second) = self.0.apart(dys.values::<T>()?);
            let tensor = |values| Tensor::from_vec(values, x.shape(), x.device());
            Ok((Some(tensor(first)?), Some(tensor(second)?)))
        })
    }
}

/// The gradients of two maps in turns, of the shape of one; the first where it is wanted.
#[cfg(feature = "cuda")]
fn part_on_gpu(
    sizes: Sizes,
    (half, dy): (&Tensor, &Tensor),
    wants_first: bool,
) -> candle_core::Result<(Option<Tensor>, Tensor)> {
    let device = cuda::device_of(half)?;
    cuda::of_maps!("channel_shuffle", half.dtype(), T => {
        let (first, second) =
            cuda::shuffle::part::<T>(device, sizes.halves(true), address::<T>(dy)?, wants_first)?;
        let first = first.map(|first| first.into_tensor(half.shape()));
        Ok((first, second.into_tensor(half.shape())))
    })
}

/// The second half of a map. Its gradient is joined with that of the first half, which comes before it by way of
/// [`BesideFirst`].
struct SecondHalf(Sizes, Arc<Inbox>);

impl CustomOp1 for SecondHalf {
    fn name(&self) -> &'static str {
        "second_half"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let image = self.0.image();
        let y = dispatch!("second_half", s.dtype(), T => {
            let x = values::<T>(s, l)?;
            let mut y = Unwritten::new(x.len() / 2);
            y.places()
                .par_chunks_exact_mut(image)
                .zip(x.par_chunks_exact(2 * image))
                .for_each(|(y, x)| y.copy_from_slice(&x[image..]));
            // SAFETY: each image was written.
            Ok(T::to_cpu_storage_owned(unsafe { y.written() }))
        })?;
        Ok((y, self.0.with_channels(l.shape(), self.0.channels)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::of_maps!("second_half", s.dtype(), T => {
            let (x, halves) = (input::<T>(s, l)?.at, self.0.halves(false));
            let (_, second) = cuda::shuffle::part::<T>(s.device(), halves, x, false)?;
            Ok(second.into_storage())
        })?;
        Ok((y, self.0.with_channels(l.shape(), self.0.channels)))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (first, dy) = (self.1.take(y)?, dy.contiguous()?);
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (device, halves) = (cuda::device_of(x)?, self.0.halves(false));
            return cuda::of_maps!("second_half", x.dtype(), T => {
                let (first, second) = (address::<T>(&first)?, address::<T>(&dy)?);
                let first = (first, self.0.image());
                let dx = cuda::shuffle::join::<T>(device, halves, first, second)?;
                Ok(Some(dx.into_tensor(x.shape())))
            });
        }
        let (firsts, dys) = (read(&first), read(&dy));
        let image = self.0.image();
        dispatch!("second_half", x.dtype(), T => {
            let (first, second) = (firsts.values::<T>()?, dys.values::<T>()?);
            let mut dx = Unwritten::new(2 * second.len());
            dx.places()
                .par_chunks_exact_mut(2 * image)
                .zip(first.par_chunks_exact(image).zip(second.par_chunks_exact(image)))
                .for_each(|(dx, (first, second))| {
                    dx[..image].copy_from_slice(first);
                    dx[image..].copy_from_slice(second);
                });
            // SAFETY: both halves of each image were written.
            Ok(Some(Tensor::from_vec(unsafe { dx.written() }, x.shape(), x.device())?))
        })
    }
}

/// A map in turns with the first half of `x`.
struct BesideFirst {
    sizes: Sizes,
    x: Tensor,
    /// Where [`SecondHalf`] looks for the gradient of the first half; none where `x` needs none.
    kept: Option<Arc<Inbox>>,
}

impl CustomOp1 for BesideFirst {
    fn name(&self) -> &'static str {
        "channel_shuffle"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let xs = read(&self.x);
        let y = dispatch!("channel_shuffle", s.dtype(), T => {
            let first = (xs.values::<T>()?, 2 * self.sizes.image());
            Ok(T::to_cpu_storage_owned(self.sizes.turns(first, values::<T>(s, l)?)))
        })?;
        Ok((y, self.x.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::of_maps!("channel_shuffle", s.dtype(), T => {
            let first = (address::<T>(&self.x)?, 2 * self.sizes.image());
            let (second, halves) = (input::<T>(s, l)?.at, self.sizes.halves(true));
            let y = cuda::shuffle::join::<T>(s.device(), halves, first, second)?;
            Ok(y.into_storage())
        })?;
        Ok((y, self.x.shape().clone()))
    }

    fn bwd(
        &self,
        second: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if second.device().is_cuda() {
            let (first, dx) = part_on_gpu(self.sizes, (second, &dy), self.kept.is_some())?;
            if let Some(kept) = &self.kept {
                kept.add(first)?;
            }
            return Ok(Some(dx));
        }
        let dys = read(&dy);
        dispatch!("channel_shuffle", second.dtype(), T => {
            let (even, odd) = self.sizes.apart(dys.values::<T>()?);
            let tensor = |values| Tensor::from_vec(values, second.shape(), second.device());
            if let Some(kept) = &self.kept {
                kept.add(Some(tensor(even)?))?;
            }
            Ok(Some(tensor(odd)?))
        })
    }
}
