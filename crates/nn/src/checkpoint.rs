//! Gradient checkpointing (Chen et al. 2016): a part of a network keeps its input alone and is
//! computed again in the backward pass.
//!
//! The tape sees one node in place of the part. Its adjoint runs the part once more on a variable
//! of its own and differentiates that; the gradients of the part's parameters, for which candle's
//! node has no way out, are laid aside and join the others in
//! [`Vars::backward`](crate::Vars::backward).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

#[cfg(feature = "cuda")]
use candle_core::backend::BackendDevice;
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var, WithDType};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Storage};

use crate::element::{dispatch, read};
use crate::tape;
use crate::vars::Step;
use crate::{Error, Mode, Result, Scope};

/// Gradients of parameters that do not go over the tape: of layers' weights, and of all that is
/// within checkpointed parts. Only there while a [`Vars::backward`](crate::Vars::backward) runs, and
/// for the thread that runs it: candle differentiates where it is called.
pub(crate) type Aside = Arc<Mutex<Option<(ThreadId, GradStore)>>>;

/// Runs parts of a network without keeping what is inside them.
#[derive(Debug, Clone)]
pub struct GradientCheckpoint {
    step: Step,
    aside: Aside,
}

impl GradientCheckpoint {
    /// For parts of the network whose parameters live in this scope's [`Vars`](crate::Vars). No
    /// parameters of its own.
    #[must_use]
    pub fn new(scope: &Scope<'_>) -> Self {
        Self {
            step: scope.step(),
            aside: scope.aside(),
        }
    }

    /// `part(x, mode)`, of which only `x` is kept for the backward pass, which must then be
    /// [`Vars::backward`](crate::Vars::backward). It runs `part` again with
    /// [`Mode::replayed`], and dropout makes the same masks again; `part` must give the same
    /// values and may take tensors with gradients from its argument and from parameters alone.
    ///
    /// In evaluation too: parameters are on the tape there as well. For an `x` that no gradient flows
    /// to, such as the images, this is `part(x, mode)` itself.
    ///
    /// # Errors
    /// Those of `part`, also from the backward pass.
    pub fn forward<F>(&self, x: &Tensor, mode: Mode, part: F) -> Result<Tensor>
    where
        F: Fn(&Tensor, Mode) -> Result<Tensor> + Send + Sync + 'static,
    {
        let y = part(x, mode)?;
        if !x.track_op() {
            return Ok(y);
        }
        // The tape inside the part ends here, and with it all that it holds.
        let values = y.detach().contiguous()?;
        drop(y);
        Ok(tape::apply1(
            x,
            Node {
                y: Mutex::new(Some(values)),
                part,
                mode: mode.replayed(),
                step: self.step.clone(),
                number: self.step.get(),
                aside: Arc::clone(&self.aside),
            },
        )?)
    }
}

struct Node<F> {
    /// The result of the part until candle asks for it.
    y: Mutex<Option<Tensor>>,
    part: F,
    /// Of the second pass.
    mode: Mode,
    step: Step,
    /// The step of the first pass.
    number: Option<u64>,
    aside: Aside,
}

impl<F> Node<F>
where
    F: Fn(&Tensor, Mode) -> Result<Tensor>,
{
    /// The gradient of `x`; those of the parameters are laid aside.
    fn gradient(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        /// Puts the step back even where the part panics.
        struct Restore<'a>(&'a Step, Option<u64>);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                self.0.replace(self.1);
            }
        }
        let leaf = Var::from_tensor(&x.detach())?;
        let y = {
            let _restore = Restore(&self.step, self.step.replace(self.number));
            (self.part)(&leaf, self.mode)?
        };
        let y = tape::apply1(&y, Seed(dy.clone()))?;
        let mut gradients = {
            let _pass = tape::Pass::begin();
            y.backward()?
        };
        // A part that makes nothing of `x` has no gradient for it, but candle waits for one.
        let dx = match gradients.remove(&leaf) {
            Some(dx) => dx.detach(),
            None => x.zeros_like()?.detach(),
        };
        // Gradients may hang on the tape of the part, and would keep all of it.
        let ids: Vec<_> = gradients.get_ids().copied().collect();
        for id in ids {
            if let Some(gradient) = gradients.get_id(id).map(Tensor::detach) {
                gradients.insert_id(id, gradient);
            }
        }
        match own(&mut lock(&self.aside)) {
            Some(aside) => aside.extend(gradients)?,
            None => return Err(outside()),
        }
        Ok(dx)
    }
}

impl<F> CustomOp1 for Node<F>
where
    F: Fn(&Tensor, Mode) -> Result<Tensor>,
{
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some(y) = lock(&self.y).take() else {
            candle_core::bail!("checkpoint: forward for the second time")
        };
        let values = dispatch!("checkpoint", y.dtype(), T => {
            Ok(T::to_cpu_storage_owned(read(&y).values::<T>()?.to_vec()))
        })?;
        Ok((values, y.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some(y) = lock(&self.y).take() else {
            candle_core::bail!("checkpoint: forward for the second time")
        };
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cuda(values) => Ok((values.try_clone(layout)?, y.shape().clone())),
            _ => candle_core::bail!("checkpoint: the part left {:?}", s.device().id()),
        }
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        // Before all the work, not after it.
        needs_backward(&self.aside)?;
        Ok(Some(self.gradient(x, dy)?))
    }
}

/// An error where no [`Vars::backward`](crate::Vars::backward) runs.
pub(crate) fn needs_backward(aside: &Aside) -> candle_core::Result<()> {
    match own(&mut lock(aside)) {
        Some(_) => Ok(()),
        None => Err(outside().into()),
    }
}

fn outside() -> Error {
    Error::State {
        what: "backward",
        message: "gradients of parameters in a part that is one node of the tape (a checkpointed part, a \
                  residual block on a GPU) would be lost: call Vars::backward instead of Tensor::backward"
            .to_owned(),
    }
}

/// A scalar whose gradient with respect to its argument is this tensor: where a backward pass
/// starts that goes on from another.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let scalar =
            dispatch!("seed", s.dtype(), T => Ok(T::to_cpu_storage_owned(vec![0.0 as T])))?;
        Ok((scalar, Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let scalar = s.device().zeros_impl(&Shape::from(()), s.dtype())?;
        Ok((scalar, Shape::from(())))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// Differentiates `loss`, with the gradients that its checkpointed parts lay aside.
pub(crate) fn backward(aside: &Aside, loss: &Tensor) -> Result<GradStore> {
    /// Nothing stays behind, even where the pass ends early.
    struct Clear<'a>(&'a Aside);
    impl Drop for Clear<'_> {
        fn drop(&mut self) {
            lock(self.0).take();
        }
    }
    {
        let mut aside = lock(aside);
        if aside.is_some() {
            return Err(Error::State {
                what: "backward",
                message: "another backward pass of these parameters is under way".to_owned(),
            });
        }
        *aside = Some((thread::current().id(), GradStore::default()));
    }
    let clear = Clear(aside);
    let _pass = tape::Pass::begin();
    let mut gradients = loss.backward()?;
    if let Some((_, aside)) = lock(clear.0).take() {
        gradients.extend(aside)?;
    }
    Ok(gradients)
}

/// Lays the gradient of a parameter aside where a [`Vars::backward`](crate::Vars::backward) runs;
/// elsewhere gives it back for the tape. The tape adds each gradient to zeros: two more tensors of
/// its size, which for the weights of a large layer is most of what they cost.
pub(crate) fn past_the_tape(
    aside: Option<&Aside>,
    parameter: &Tensor,
    gradient: Tensor,
) -> candle_core::Result<Option<Tensor>> {
    let Some(mut aside) = aside.map(|aside| lock(aside)) else {
        return Ok(Some(gradient));
    };
    let Some(store) = own(&mut aside) else {
        return Ok(Some(gradient));
    };
    let sum = match store.remove(parameter) {
        Some(other) => (other + gradient)?,
        None => gradient,
    };
    store.insert(parameter, sum);
    Ok(None)
}

/// Lays the gradient of a parameter aside that has no way over the tape.
#[cfg(feature = "cuda")]
pub(crate) fn lay_aside(
    aside: &Aside,
    parameter: &Tensor,
    gradient: Tensor,
) -> candle_core::Result<()> {
    match past_the_tape(Some(aside), parameter, gradient)? {
        None => Ok(()),
        Some(_) => Err(outside().into()),
    }
}

/// What this thread's backward pass lays aside, if it runs one.
fn own(aside: &mut Option<(ThreadId, GradStore)>) -> Option<&mut GradStore> {
    let (owner, store) = aside.as_mut()?;
    (*owner == thread::current().id()).then_some(store)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
