//! Ranks that are threads of this process, each with a device of its own: GPUs sum by NCCL, the CPU in
//! memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device};

use crate::collective::{Collective, Named};
use crate::{Error, Result};

/// One of them. Where it is dropped early, for an error or a panic, the others hear of it at their next call.
#[derive(Debug)]
pub struct Rank {
    number: usize,
    meeting: Arc<Meeting>,
}

/// What a rank brings to a meeting.
#[derive(Debug, Clone)]
enum Item {
    Nothing,
    Numbers(Vec<f64>),
    Tensors(Vec<Named>),
    /// Names, shapes and types of tensors on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Shapes(Vec<(String, Vec<usize>, DType)>),
}

#[derive(Debug)]
struct Meeting {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// One a rank, or none on the CPU.
    #[cfg(feature = "cuda")]
    gpus: Vec<isqrt_device::cuda::Communicator>,
}

#[derive(Debug, Default)]
struct State {
    /// Meetings that are over.
    rounds: u64,
    brought: Vec<(usize, Item)>,
    /// What was brought to the last one, by rank.
    last: Arc<[(usize, Item)]>,
    failed: Option<String>,
}

impl Rank {
    /// A rank for each device: different GPUs, or the CPU as often as wanted.
    ///
    /// # Errors
    /// Where NCCL is missing, or the GPUs do not reach each other.
    pub fn all(devices: &[Device]) -> Result<Vec<Self>> {
        #[cfg(feature = "cuda")]
        let gpus = {
            let gpus = devices.iter().filter_map(|device| match device {
                Device::Cuda(gpu) => Some(gpu.clone()),
                _ => None,
            });
            let gpus: Vec<_> = gpus.collect();
            match gpus.len() == devices.len() {
                true => isqrt_device::cuda::Communicator::all(&gpus)
                    .map_err(candle_core::Error::from)?,
                false => Vec::new(),
            }
        };
        let meeting = Arc::new(Meeting {
            size: devices.len(),
            state: Mutex::default(),
            changed: Condvar::new(),
            #[cfg(feature = "cuda")]
            gpus,
        });
        let rank = |number| Self {
            number,
            meeting: Arc::clone(&meeting),
        };
        Ok((0..devices.len()).map(rank).collect())
    }

    /// Tells the others that this one will not come any more.
    pub fn fail(&self, problem: &str) {
        self.meeting
            .state()
            .failed
            .get_or_insert_with(|| format!("rank {}: {problem}", self.number));
        self.meeting.changed.notify_all();
        #[cfg(feature = "cuda")]
        std::thread::scope(|scope| {
            // At once: one may wait for another.
            for gpu in &self.meeting.gpus {
                scope.spawn(|| gpu.abort());
            }
        });
    }

    /// A rank for each device, with a thread of its own for `work`; what each of them came to.
    ///
    /// # Errors
    /// As [`all`](Self::all).
    pub fn on_each<T: Send>(
        devices: &[Device],
        work: impl Fn(&Self, &Device) -> Result<T> + Sync,
    ) -> Result<Vec<Result<T>>> {
        let ranks = Self::all(devices)?;
        let work = &work;
        Ok(std::thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .into_iter()
                .zip(devices)
                .map(|(rank, device)| scope.spawn(move || rank.at_work(device, work)))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|came| came.unwrap_or_else(|_| Err(gone())))
                .collect()
        }))
    }

    /// Does its work, and tells the others where that fails.
    pub(crate) fn at_work<T>(
        &self,
        device: &Device,
        work: impl Fn(&Self, &Device) -> Result<T>,
    ) -> Result<T> {
        let came = work(self, device);
        if let Err(error) = &came {
            self.fail(&error.to_string());
        }
        came
    }

    /// Waits for all ranks; what each of them brought.
    fn meet(&self, own: Item) -> Result<Arc<[(usize, Item)]>> {
        let meeting = &*self.meeting;
        let mut state = meeting.state();
        let round = state.rounds;
        state.brought.push((self.number, own));
        if state.brought.len() == meeting.size {
            let mut brought = std::mem::take(&mut state.brought);
            brought.sort_by_key(|(number, _)| *number);
            state.last = brought.into();
            state.rounds += 1;
            meeting.changed.notify_all();
        }
        loop {
            if state.rounds != round {
                return Ok(Arc::clone(&state.last));
            }
            if let Some(problem) = &state.failed {
                return Err(Error::Collective(problem.clone()));
            }
            let waited = meeting.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The tensors of every rank.
    fn tensors(&self, own: &[Named]) -> Result<Vec<Vec<Named>>> {
        let all = self.meet(Item::Tensors(own.to_vec()))?;
        let of = |(number, item): &(usize, Item)| match item {
            Item::Tensors(theirs) if alike(own, theirs) => Ok(theirs.clone()),
            _ => Err(others(*number)),
        };
        all.iter().map(of).collect()
    }

    /// Replaces tensors on a GPU by what NCCL makes of those of all ranks, once all are there and nothing of ours
    /// can fail any more: none waits on its GPU for one that never comes.
    #[cfg(feature = "cuda")]
    fn on_gpu(
        &self,
        bucket: &mut [Named],
        call: impl FnOnce(
            &isqrt_device::cuda::Communicator,
            &[isqrt_device::cuda::Exchange],
        ) -> isqrt_device::Result<()>,
    ) -> Result<bool> {
        let Some(gpu) = self.meeting.gpus.get(self.number) else {
            return Ok(false);
        };
        let mut moves = Vec::with_capacity(bucket.len());
        let mut results = Vec::with_capacity(bucket.len());
        for (name, tensor) in bucket.iter_mut() {
            // Held by the bucket until the work is on its way.
            *tensor = tensor.contiguous()?;
            let (exchange, result) = match tensor.dtype() {
                DType::F32 => moved::<f32>(tensor)?,
                DType::F64 => moved::<f64>(tensor)?,
                other => {
                    let problem = format!("{name} is of type {}", other.as_str());
                    return Err(Error::Collective(problem));
                }
            };
            moves.push(exchange);
            results.push(result);
        }
        let shape = |(name, tensor): &Named| (name.clone(), tensor.dims().to_vec(), tensor.dtype());
        let own: Vec<_> = bucket.iter().map(shape).collect();
        for (number, item) in self.meet(Item::Shapes(own.clone()))?.iter() {
            match item {
                Item::Shapes(theirs) if *theirs == own => {}
                _ => return Err(others(*number)),
            }
        }
        call(gpu, &moves).map_err(|error| Error::Collective(error.to_string()))?;
        for ((_, tensor), result) in bucket.iter_mut().zip(results) {
            *tensor = result;
        }
        Ok(true)
    }
}

/// A tensor on a GPU, and memory for what becomes of it.
#[cfg(feature = "cuda")]
fn moved<T: isqrt_device::cuda::Real + isqrt_device::cuda::Moved>(
    tensor: &candle_core::Tensor,
) -> Result<(isqrt_device::cuda::Exchange, candle_core::Tensor)> {
    use isqrt_device::cuda::{Exchange, Output, address};
    let device = tensor.device().as_cuda_device()?;
    let to =
        Output::<T>::new("all_reduce", device, tensor.dims()).map_err(candle_core::Error::from)?;
    let exchange = Exchange {
        from: address::<T>(tensor)?,
        to: to.at(),
        count: tensor.elem_count(),
        dtype: T::NUMBER,
    };
    Ok((exchange, to.into_tensor(tensor.shape())))
}

fn alike(a: &[Named], b: &[Named]) -> bool {
    let mut pairs = a.iter().zip(b);
    a.len() == b.len()
        && pairs.all(|((name, a), (other, b))| {
            name == other && a.dims() == b.dims() && a.dtype() == b.dtype()
        })
}

/// A thread that did not come back.
pub(crate) fn gone() -> Error {
    Error::Collective("a thread panicked".to_owned())
}

fn others(number: usize) -> Error {
    Error::Collective(format!("rank {number} has other tensors"))
}

impl Meeting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return self.fail("it panicked");
        }
        // After its last meeting this is heard by nobody.
        let ended = || format!("rank {} has ended", self.number);
        self.meeting.state().failed.get_or_insert_with(ended);
        self.meeting.changed.notify_all();
    }
}

#[cfg(feature = "cuda")]
impl Drop for Meeting {
    fn drop(&mut self) {
        std::thread::scope(|scope| {
            // At once: NCCL may let one wait for another.
            for gpu in self.gpus.drain(..) {
                scope.spawn(|| drop(gpu));
            }
        });
    }
}

impl Collective for Rank {
    fn rank(&self) -> usize {
        self.number
    }

    fn size(&self) -> usize {
        self.meeting.size
    }

    fn all_reduce(&self, bucket: &mut [Named]) -> Result<()> {
        #[cfg(feature = "cuda")]
        // SAFETY: results and operands live on, or are freed behind the work.
        if self.on_gpu(bucket, |gpu, values| unsafe { gpu.sum(values) })? {
            return Ok(());
        }
        let all = self.tensors(bucket)?;
        for (i, (_, sum)) in bucket.iter_mut().enumerate() {
            let mut theirs = all.iter().filter_map(|tensors| tensors.get(i));
            let Some((_, first)) = theirs.next() else {
                continue;
            };
            *sum = first.clone();
            for (_, tensor) in theirs {
                *sum = (&*sum + tensor)?;
            }
        }
        Ok(())
    }

    fn all_reduce_sums(&self, values: &mut [f64]) -> Result<()> {
        let all = self.meet(Item::Numbers(values.to_vec()))?;
        values.fill(0.0);
        for (number, item) in all.iter() {
            match item {
                Item::Numbers(theirs) if theirs.len() == values.len() => {
                    for (sum, value) in values.iter_mut().zip(theirs) {
                        *sum += value;
                    }
                }
                _ => return Err(others(*number)),
            }
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, bucket: &mut [Named]) -> Result<()> {
        #[cfg(feature = "cuda")]
        // SAFETY: as in `all_reduce`.
        if self.on_gpu(bucket, |gpu, values| unsafe { gpu.broadcast(root, values) })? {
            return Ok(());
        }
        let all = self.tensors(bucket)?;
        if let Some(theirs) = all.get(root) {
            bucket.clone_from_slice(theirs);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.meet(Item::Nothing).map(|_| ())
    }
}
