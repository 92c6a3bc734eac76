//! Parameters and buffers by name.
//!
//! Names are those of PyTorch (`layer1.conv.weight`, `bn.running_mean`) and always come sorted.
//! Parameters learn; buffers (running statistics) are saved with them but never given to an
//! optimiser.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::checkpoint::{self, Aside};
use crate::error::shape_error;
use crate::init::fnv1a;
use crate::{Error, Init, Result};

/// A named tensor that layers update outside of the tape, shared between its layer and [`Vars`].
#[derive(Debug, Clone)]
pub struct Buffer(Arc<Mutex<Tensor>>);

impl Buffer {
    /// A buffer with this value.
    #[must_use]
    pub fn new(value: Tensor) -> Self {
        Self(Arc::new(Mutex::new(value)))
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> Tensor {
        self.lock().clone()
    }

    /// Replaces the value.
    pub fn set(&self, value: Tensor) {
        *self.lock() = value;
    }

    fn lock(&self) -> MutexGuard<'_, Tensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn values(&self) -> Result<Vec<f64>> {
        Ok(self.get().to_dtype(DType::F64)?.to_vec1()?)
    }

    /// Moves each value towards `target` by the share `momentum`.
    pub(crate) fn blend(&self, momentum: f64, target: impl Fn(usize) -> f64) -> Result<()> {
        let mut values = self.values()?;
        for (i, value) in values.iter_mut().enumerate() {
            *value += momentum * (target(i) - *value);
        }
        let mut slot = self.lock();
        *slot = Tensor::from_vec(values, slot.shape(), slot.device())?.to_dtype(slot.dtype())?;
        Ok(())
    }
}

/// All parameters and buffers of a network.
#[derive(Debug)]
pub struct Vars {
    seed: u64,
    dtype: DType,
    device: Device,
    parameters: BTreeMap<String, Var>,
    buffers: BTreeMap<String, Buffer>,
    /// Layers that draw random numbers.
    sources: BTreeSet<String>,
    step: Step,
    aside: Aside,
    /// Values that may still be made.
    left: usize,
}

/// Number of the training pass, shared with the layers that draw random numbers.
#[derive(Debug, Clone)]
pub(crate) struct Step(Arc<AtomicU64>);

impl Step {
    const UNSET: u64 = u64::MAX;

    /// The number, once it is set.
    pub(crate) fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&step| step != Self::UNSET)
    }

    /// Sets the number and gives what it was.
    pub(crate) fn replace(&self, step: Option<u64>) -> Option<u64> {
        let old = self.0.swap(step.unwrap_or(Self::UNSET), Ordering::Relaxed);
        Some(old).filter(|&step| step != Self::UNSET)
    }
}

/// Where a layer's random numbers come from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) seed: u64,
    /// A hash of the layer's name.
    pub(crate) layer: u64,
    pub(crate) step: Step,
}

impl Vars {
    /// No parameters yet; those to come start from `seed`.
    #[must_use]
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self {
            seed,
            dtype,
            device: device.clone(),
            parameters: BTreeMap::new(),
            buffers: BTreeMap::new(),
            sources: BTreeSet::new(),
            step: Step(Arc::new(AtomicU64::new(Step::UNSET))),
            aside: Aside::default(),
            left: usize::MAX,
        }
    }

    /// With at most so many values in all parameters and buffers to come, for shapes that somebody
    /// else's file tells.
    #[must_use]
    pub fn limit(mut self, values: usize) -> Self {
        self.left = values;
        self
    }

    /// Says which training pass comes next: layers that draw random numbers (dropout) make them
    /// from the seed, their name and this number, so a resumed run draws what an unbroken one does.
    ///
    /// Each pass needs its own; a pass of one batch in several parts needs one a part.
    pub fn set_step(&self, step: u64) {
        self.step.replace(Some(step));
    }

    /// Gradients of a scalar `loss`, those of parameters in checkpointed parts
    /// ([`GradientCheckpoint`](crate::layers::GradientCheckpoint)) included, which
    /// [`Tensor::backward`] refuses. Without such parts the two give the same; this one takes less
    /// memory, since weights of layers do not go over candle's tape, and `loss` may be differentiated
    /// again after it failed (after the other only where an op of this crate failed).
    ///
    /// # Errors
    /// Those of the ops; [`Error::State`] while another backward pass of these parameters runs.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        checkpoint::backward(&self.aside, loss)
    }

    /// Where the layers of a network make their parameters.
    pub fn root(&mut self) -> Scope<'_> {
        Scope {
            vars: self,
            prefix: String::new(),
        }
    }

    /// Parameters, sorted by name.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.parameters
            .iter()
            .map(|(name, var)| (name.as_str(), var))
    }

    /// Buffers, sorted by name.
    pub fn buffers(&self) -> impl Iterator<Item = (&str, &Buffer)> {
        self.buffers
            .iter()
            .map(|(name, buffer)| (name.as_str(), buffer))
    }

    /// Number of learnt values.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parameters.values().map(|var| var.elem_count()).sum()
    }

    /// Device of all of them.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type of the parameters.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Values of one parameter: 16 GiB in f32.
const MOST_VALUES: usize = 1 << 32;

/// A place in the tree of names, where layers make their parameters.
#[derive(Debug)]
pub struct Scope<'a> {
    vars: &'a mut Vars,
    prefix: String,
}

impl Scope<'_> {
    /// The scope called `name` within this one.
    pub fn sub(&mut self, name: impl std::fmt::Display) -> Scope<'_> {
        let prefix = self.path(&name.to_string());
        Scope {
            vars: self.vars,
            prefix,
        }
    }

    /// The type of the parameters made here.
    pub fn dtype(&self) -> DType {
        self.vars.dtype()
    }

    /// A new parameter.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken, [`Error::Shape`] for more than 2³² values or more than
    /// [`Vars::limit`] allows.
    pub fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let name = self.new_name(name)?;
        let var = Var::from_tensor(&self.draw(&name, shape, init)?)?;
        let tensor = var.as_tensor().clone();
        self.vars.parameters.insert(name, var);
        Ok(tensor)
    }

    /// A new buffer filled with `value`.
    ///
    /// # Errors
    /// As [`parameter`](Self::parameter).
    pub fn buffer(&mut self, name: &str, shape: &[usize], value: f64) -> Result<Buffer> {
        self.drawn_buffer(name, shape, Init::Constant(value))
    }

    /// A new buffer of random numbers, drawn as a parameter's are: from the network's seed and the
    /// name. A random map that a checkpoint keeps and no optimiser touches.
    ///
    /// # Errors
    /// As [`parameter`](Self::parameter).
    pub fn drawn_buffer(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Buffer> {
        let name = self.new_name(name)?;
        let buffer = Buffer::new(self.draw(&name, shape, init)?);
        self.vars.buffers.insert(name, buffer.clone());
        Ok(buffer)
    }

    fn draw(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let count = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
        let Some(count) = count.filter(|&count| count <= MOST_VALUES.min(self.vars.left)) else {
            return shape_error(
                "network",
                format!(
                    "{name:?} of shape {shape:?} has more values than there may be ({})",
                    MOST_VALUES.min(self.vars.left)
                ),
            );
        };
        self.vars.left -= count;
        let (seed, device) = (self.vars.seed, &self.vars.device);
        let value = match self.vars.dtype {
            DType::F32 => Tensor::from_vec(init.draw::<f32>(seed, name, shape), shape, device)?,
            _ => Tensor::from_vec(init.draw::<f64>(seed, name, shape), shape, device)?,
        };
        Ok(value.to_dtype(self.vars.dtype)?)
    }

    /// Random numbers of the layer that lives here.
    pub(crate) fn source(&mut self) -> Result<Source> {
        // One name, one stream: two layers of a name would draw the same numbers.
        if !self.vars.sources.insert(self.prefix.clone()) {
            return Err(Error::Duplicate(self.prefix.clone()));
        }
        Ok(Source {
            seed: self.vars.seed,
            layer: fnv1a(self.prefix.as_bytes()) as u64,
            step: self.step(),
        })
    }

    /// The name of this place, for records of a forward pass.
    pub(crate) fn name(&self) -> Arc<str> {
        self.prefix.as_str().into()
    }

    /// The number of the pass, as layers see it.
    pub(crate) fn step(&self) -> Step {
        self.vars.step.clone()
    }

    /// Where gradients go that pass the tape by.
    pub(crate) fn aside(&self) -> Aside {
        Arc::clone(&self.vars.aside)
    }

    fn path(&self, name: &str) -> String {
        match self.prefix.as_str() {
            "" => name.to_owned(),
            prefix => format!("{prefix}.{name}"),
        }
    }

    fn new_name(&self, name: &str) -> Result<String> {
        let name = self.path(name);
        if self.vars.parameters.contains_key(&name) || self.vars.buffers.contains_key(&name) {
            return Err(Error::Duplicate(name));
        }
        Ok(name)
    }
}
