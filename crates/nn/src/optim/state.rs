//! State by name: in-place updates, export and import.

use std::collections::BTreeMap;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use rayon::prelude::*;

use super::group::Member;
use crate::element::{Element, dispatch, values};
use crate::{Error, Result};

/// What an optimiser keeps about a parameter.
#[derive(Debug)]
pub(super) struct Slot<const N: usize> {
    pub(super) parameter: Var,
    pub(super) lr_factor: f64,
    pub(super) weight_decay: f64,
    /// Zeros of the parameter's shape at first.
    pub(super) tensors: [Tensor; N],
    /// Updates so far.
    pub(super) steps: u64,
}

/// The slots of all parameters, whose `N` tensors have these names.
#[derive(Debug)]
pub(super) struct Slots<const N: usize> {
    what: &'static str,
    names: [&'static str; N],
    /// Whether the number of updates belongs to the state.
    counted: bool,
    slots: BTreeMap<String, Slot<N>>,
}

impl<const N: usize> Slots<N> {
    pub(super) fn new(
        what: &'static str,
        names: [&'static str; N],
        counted: bool,
        members: Vec<Member<'_>>,
    ) -> Result<Self> {
        let slot = |member: Member<'_>| {
            let zeros = member.parameter.as_tensor().zeros_like()?;
            let mut tensors = [(); N].map(|()| zeros.clone());
            for tensor in &mut tensors {
                // They are updated in place: no two may share their memory.
                *tensor = zeros.force_contiguous()?;
            }
            let slot = Slot {
                parameter: member.parameter.clone(),
                lr_factor: member.lr_factor,
                weight_decay: member.weight_decay,
                tensors,
                steps: 0,
            };
            Ok((member.name.to_owned(), slot))
        };
        Ok(Self {
            what,
            names,
            counted,
            slots: members.into_iter().map(slot).collect::<Result<_>>()?,
        })
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot<N>> {
        self.slots.values_mut()
    }

    /// For one launch that updates all parameters, where they are on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn table(&self, op: &'static str) -> Option<crate::cuda::optim::Table> {
        let first = self.slots.values().next()?;
        crate::cuda::optim::Table::new(op, first.parameter.as_tensor())
    }

    pub(super) fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, slot) in &self.slots {
            for (tensor, part) in slot.tensors.iter().zip(self.names) {
                state.insert(format!("{name}.{part}"), tensor.force_contiguous()?);
            }
            if self.counted {
                let steps = Tensor::new(slot.steps as i64, &Device::Cpu)?;
                state.insert(format!("{name}.step"), steps);
            }
        }
        Ok(state)
    }

    pub(super) fn import(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut import = Import::new(self.what, state);
        let mut taken = vec![];
        for (name, slot) in &self.slots {
            let mut tensors = slot.tensors.clone();
            for (tensor, part) in tensors.iter_mut().zip(self.names) {
                *tensor = import.take(&format!("{name}.{part}"), tensor)?;
            }
            let steps = match self.counted {
                true => import.steps(&format!("{name}.step"))?,
                false => 0,
            };
            taken.push((tensors, steps));
        }
        import.finish()?;
        for (slot, (tensors, steps)) in self.slots.values_mut().zip(taken) {
            (slot.tensors, slot.steps) = (tensors, steps);
        }
        Ok(())
    }
}

/// Named tensors that are taken one by one, each with its check.
pub(super) struct Import<'a> {
    what: &'static str,
    left: BTreeMap<&'a str, &'a Tensor>,
}

impl<'a> Import<'a> {
    pub(super) fn new(what: &'static str, state: &'a BTreeMap<String, Tensor>) -> Self {
        let left = state.iter().map(|(name, t)| (name.as_str(), t)).collect();
        Self { what, left }
    }

    /// A copy of the tensor of this name, which must have the shape of `like`.
    pub(super) fn take(&mut self, name: &str, like: &Tensor) -> Result<Tensor> {
        let Some(tensor) = self.left.remove(name) else {
            return self.failed(format!("the state has no tensor {name:?}"));
        };
        if tensor.dims() != like.dims() {
            return self.failed(format!(
                "{name:?} has shape {:?}, {:?} is needed",
                tensor.dims(),
                like.dims()
            ));
        }
        let tensor = tensor.to_device(like.device())?.to_dtype(like.dtype())?;
        Ok(tensor.force_contiguous()?)
    }

    /// The number of this name.
    fn steps(&mut self, name: &str) -> Result<u64> {
        let like = Tensor::new(0i64, &Device::Cpu)?;
        let steps = self.take(name, &like)?.to_scalar::<i64>()?;
        u64::try_from(steps).or_else(|_| self.failed(format!("{name:?} is {steps}, below 0")))
    }

    /// Refuses what is left.
    pub(super) fn finish(self) -> Result<()> {
        match self.left.keys().next() {
            Some(name) => self.failed(format!("nothing here takes the tensor {name:?}")),
            None => Ok(()),
        }
    }

    fn failed<T>(&self, message: String) -> Result<T> {
        Err(Error::State {
            what: self.what,
            message,
        })
    }
}

/// An in-place update `t ← f(t, others)`, element by element in f64.
pub(super) struct Update<F>(pub(super) &'static str, pub(super) F);

/// Values that one task works through.
const BLOCK: usize = 1 << 14;

impl<F> Update<F> {
    fn run<const N: usize>(
        &self,
        target: (&mut CpuStorage, &Layout),
        others: [(&CpuStorage, &Layout); N],
    ) -> candle_core::Result<()>
    where
        F: Fn(f64, [f64; N]) -> f64 + Sync,
    {
        let Self(name, update) = self;
        let (target, layout) = target;
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{name}: the target is not contiguous")
        };
        dispatch!(name, target.dtype(), T => {
            let mut slices = [&[] as &[T]; N];
            for (slice, (storage, layout)) in slices.iter_mut().zip(others) {
                *slice = values::<T>(storage, layout)?;
                if slice.len() != end - start {
                    candle_core::bail!("{name}: {} values for {}", slice.len(), end - start)
                }
            }
            update_values(&mut T::of_storage(target)?[start..end], slices, update);
            Ok(())
        })
    }
}

fn update_values<T: Element, const N: usize>(
    target: &mut [T],
    others: [&[T]; N],
    update: &(impl Fn(f64, [f64; N]) -> f64 + Sync),
) {
    let blocks = target.par_chunks_mut(BLOCK).enumerate();
    blocks.for_each(|(block, target)| {
        let others = others.map(|other| &other[block * BLOCK..][..target.len()]);
        for (i, value) in target.iter_mut().enumerate() {
            let others = others.map(|other| other[i].to_f64());
            *value = T::from_f64(update(value.to_f64(), others));
        }
    });
}

impl<F: Fn(f64, [f64; 1]) -> f64 + Sync> InplaceOp2 for Update<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        lt: &Layout,
        a: &CpuStorage,
        la: &Layout,
    ) -> candle_core::Result<()> {
        self.run((target, lt), [(a, la)])
    }
}

impl<F: Fn(f64, [f64; 2]) -> f64 + Sync> InplaceOp3 for Update<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        lt: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<()> {
        self.run((target, lt), [(a, la), (b, lb)])
    }
}
