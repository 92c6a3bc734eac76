//! The channels of two maps in turns: what ends a unit of ShuffleNetV2, and the unit that splits its input.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::dims4;
use crate::Result;
use crate::element::{Element, Unwritten, dispatch, read, values};
use crate::error::shape_error;
use crate::record::note_op;
use crate::tape::{self, Inbox};

/// Concatenation of two maps and a channel shuffle in two groups (Zhang et al. 2018): channel `2c` is
/// channel `c` of the first, channel `2c + 1` that of the second. On a GPU two ops of candle.
///
/// # Shapes
/// `(batch, channels, height, width)` each, to `(batch, 2 channels, height, width)`; not blocked
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
    let y = match first.device().is_cpu() {
        true => tape::join(&first.contiguous()?, &second.contiguous()?, Turns(sizes))?,
        false => {
            let pairs = Tensor::stack(&[first, second], 2)?;
            pairs.reshape(sizes.both())?
        }
    };
    note_op("channel_shuffle", &y);
    Ok(y)
}

/// [`channel_shuffle`] of the first half of the channels of `x` and of what `branch` makes of the second one: a
/// unit of ShuffleNetV2 with stride 1 (Ma et al. 2018, figure 3c). On the CPU the first half is read where it lies, and
/// the gradient of `x` is written once. What the branch makes depends on its half, if it has a gradient at all.
///
/// # Shapes
/// `(batch, 2 channels, height, width)`, to the same; `branch` keeps the shape of its half
///
/// # Errors
/// [`crate::Error::Shape`] for an odd number of channels or another shape of the branch; whatever it gives.
pub fn shuffle_unit(x: &Tensor, branch: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let [_, channels, ..] = dims4("shuffle_unit", x)?;
    if channels % 2 != 0 {
        let message = format!("expects an even number of channels, got {:?}", x.dims());
        return shape_error("shuffle_unit", message);
    }
    let first = x.narrow(1, 0, channels / 2)?;
    if !x.device().is_cpu() {
        let second = x.narrow(1, channels / 2, channels / 2)?;
        return channel_shuffle(&first, &branch(second)?);
    }
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

/// Of a half: two of them make a map.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    channels: usize,
    rows: usize,
    columns: usize,
}

impl Sizes {
    fn of(half: &Tensor) -> Result<Self> {
        let [batch, channels, rows, columns] = dims4("channel_shuffle", half)?;
        Ok(Self {
            batch,
            channels,
            rows,
            columns,
        })
    }

    fn both(self) -> Shape {
        Shape::from((self.batch, 2 * self.channels, self.rows, self.columns))
    }

    fn plane(self) -> usize {
        self.rows * self.columns
    }

    /// Values of an image.
    fn image(self) -> usize {
        self.channels * self.plane()
    }

    /// Channels of both in turns; images of the first lie `stride` values apart.
    fn turns<T: Element>(self, (first, stride): (&[T], usize), second: &[T]) -> Vec<T> {
        let plane = self.plane();
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
        let plane = self.plane();
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
        Ok((y, self.0.both()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _other: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dys = read(&dy);
        dispatch!("channel_shuffle", x.dtype(), T => {
            let (first, second) = self.0.apart(dys.values::<T>()?);
            let tensor = |values| Tensor::from_vec(values, x.shape(), x.device());
            Ok((Some(tensor(first)?), Some(tensor(second)?)))
        })
    }
}

/// The second half of a map. Its gradient is joined with that of the first half, which comes before it by way of
/// [`BesideFirst`].
struct SecondHalf(Sizes, Arc<Inbox>);

impl CustomOp1 for SecondHalf {
    fn name(&self) -> &'static str {
        "second_half"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Sizes {
            batch,
            channels,
            rows,
            columns,
        } = self.0;
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
        Ok((y, Shape::from((batch, channels, rows, columns))))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (first, dy) = (self.1.take(y)?, dy.contiguous()?);
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
        Ok((y, self.sizes.both()))
    }

    fn bwd(
        &self,
        second: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
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
