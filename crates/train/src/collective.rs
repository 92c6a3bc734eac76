//! What the ranks of a run say to each other. The engine speaks to a [`Collective`] and to nothing else,
//! so that another way of talking is one implementation of it.

use candle_core::{DType, Tensor};
use isqrt_nn::{Ema, Vars};

use crate::Result;

/// A tensor with the name that it has on every rank.
pub type Named = (String, Tensor);

/// Several processes that train one network. All ranks call the same methods in the same order.
pub trait Collective: Send + Sync + std::fmt::Debug {
    /// The number of this one, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Replaces each tensor by its sum over the ranks, which have the same names, shapes and types in the
    /// same order. The sum is the same bits on every rank.
    ///
    /// # Errors
    /// [`crate::Error::Collective`] where a rank is gone or has other tensors.
    fn all_reduce(&self, bucket: &mut [Named]) -> Result<()>;

    /// The same for plain numbers.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    fn all_reduce_sums(&self, values: &mut [f64]) -> Result<()>;

    /// Replaces each tensor by that of rank `root`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    fn broadcast(&self, root: usize, bucket: &mut [Named]) -> Result<()>;

    /// Waits for all ranks.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    fn barrier(&self) -> Result<()>;
}

/// A single process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: &mut [Named]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_sums(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: usize, _: &mut [Named]) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

/// Bytes of a bucket, as in PyTorch's DistributedDataParallel: large enough for a ring to be busy, small
/// enough for the next one to be filled meanwhile.
pub(crate) const BUCKET_BYTES: usize = 25 << 20;

/// Hands tensors over in buckets of about [`BUCKET_BYTES`], in their order.
pub(crate) fn in_buckets(
    tensors: impl IntoIterator<Item = Result<Named>>,
    mut each: impl FnMut(&mut Vec<Named>) -> Result<()>,
) -> Result<()> {
    let mut bucket = Vec::new();
    let mut bytes = 0;
    for tensor in tensors {
        let tensor = tensor?;
        bytes += tensor.1.elem_count() * tensor.1.dtype().size_in_bytes();
        bucket.push(tensor);
        if bytes >= BUCKET_BYTES {
            each(&mut bucket)?;
            bucket.clear();
            bytes = 0;
        }
    }
    match bucket.is_empty() {
        true => Ok(()),
        false => each(&mut bucket),
    }
}

/// Gives every rank the parameters and running statistics of rank 0.
pub(crate) fn share_weights(vars: &Vars, collective: &dyn Collective) -> Result<()> {
    if collective.size() == 1 {
        return Ok(());
    }
    let parameters = vars
        .parameters()
        .map(|(name, var)| Ok((name.to_owned(), var.as_detached_tensor())));
    let mut shared = std::collections::BTreeMap::new();
    in_buckets(parameters, |bucket| {
        collective.broadcast(0, bucket)?;
        shared.extend(bucket.drain(..));
        Ok(())
    })?;
    for (name, var) in vars.parameters() {
        // Rank 0 has its own already.
        if let (Some(value), true) = (shared.get(name), collective.rank() != 0) {
            var.set(value)?;
        }
    }
    share_statistics(vars, collective)
}

/// Gives every rank the running statistics of rank 0, so that all evaluate and keep the same network.
pub(crate) fn share_statistics(vars: &Vars, collective: &dyn Collective) -> Result<()> {
    if collective.size() == 1 {
        return Ok(());
    }
    let mut buffers: Vec<Named> = vars
        .buffers()
        .map(|(name, buffer)| (name.to_owned(), buffer.get()))
        .collect();
    collective.broadcast(0, &mut buffers)?;
    for ((_, buffer), (_, value)) in vars.buffers().zip(buffers) {
        buffer.set(value);
    }
    Ok(())
}

/// Gives every rank the averages of rank 0, whose running statistics are those that all take.
pub(crate) fn share_averages(ema: &mut Ema, collective: &dyn Collective) -> Result<()> {
    if collective.size() == 1 {
        return Ok(());
    }
    let mut averages: Vec<Named> = ema.state()?.into_iter().collect();
    collective.broadcast(0, &mut averages)?;
    Ok(ema.load_state(&averages.into_iter().collect())?)
}

/// Zeros in the place of a gradient that a rank does not have.
pub(crate) fn zeros_like(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(tensor.shape(), dtype, tensor.device())?)
}
