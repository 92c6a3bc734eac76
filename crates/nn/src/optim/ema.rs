//! Exponential moving average of a network's parameters and buffers.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::check_share;
use super::state::{Import, Update};
#[cfg(feature = "cuda")]
use crate::cuda::optim::Table;
use crate::{Error, Result, Vars};

/// `a ← δ·a + (1 − δ)·p` for every parameter and buffer, from their values at the start.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    averages: BTreeMap<String, Tensor>,
}

impl Ema {
    /// Averages that start as the values of `vars`; `decay` is δ.
    ///
    /// # Errors
    /// [`Error::Option`] for a decay outside of `[0, 1)`.
    pub fn new(vars: &Vars, decay: f64) -> Result<Self> {
        check_share("ema decay", decay)?;
        let averages = current(vars)
            .map(|(name, value)| Ok((name.to_owned(), value.force_contiguous()?)))
            .collect::<Result<_>>()?;
        Ok(Self { decay, averages })
    }

    /// Moves the averages towards the values of `vars`.
    ///
    /// # Errors
    /// [`Error::State`] where `vars` has a name that the averages lack or a tensor of another shape.
    pub fn update(&mut self, vars: &Vars) -> Result<()> {
        self.check(vars)?;
        let decay = self.decay;
        #[cfg(feature = "cuda")]
        let mut table = self
            .averages
            .values()
            .next()
            .and_then(|first| Table::new("ema", first));
        for (name, value) in current(vars) {
            let Some(average) = self.averages.get_mut(name) else {
                continue;
            };
            #[cfg(feature = "cuda")]
            if let Some(table) = &mut table {
                table.push([average, &value], [])?;
                continue;
            }
            let value = value.contiguous()?;
            average.inplace_op2(
                &value,
                &Update("ema", |a, [p]: [f64; 1]| decay * a + (1.0 - decay) * p),
            )?;
        }
        #[cfg(feature = "cuda")]
        if let Some(table) = table {
            table.average(decay)?;
        }
        Ok(())
    }

    /// Exchanges the averages with the values of `vars`: to evaluate with them, and once more to
    /// train on.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn swap(&mut self, vars: &Vars) -> Result<()> {
        self.check(vars)?;
        for (name, parameter) in vars.parameters() {
            if let Some(average) = self.averages.get_mut(name) {
                let value = parameter.as_tensor().force_contiguous()?;
                parameter.set(&std::mem::replace(average, value))?;
            }
        }
        for (name, buffer) in vars.buffers() {
            if let Some(average) = self.averages.get_mut(name) {
                let value = buffer.get().force_contiguous()?;
                buffer.set(std::mem::replace(average, value));
            }
        }
        Ok(())
    }

    /// Copies of the averages by the name of what they are of.
    ///
    /// # Errors
    /// Where candle cannot copy a tensor.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let copies = self.averages.iter();
        copies
            .map(|(name, average)| Ok((name.clone(), average.force_contiguous()?)))
            .collect()
    }

    /// Takes averages that [`state`](Self::state) gave. On error nothing changes.
    ///
    /// # Errors
    /// [`Error::State`] where a tensor is missing, has another shape, or is one too many.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut import = Import::new("ema", state);
        let averages = self.averages.iter();
        let taken = averages
            .map(|(name, like)| Ok((name.clone(), import.take(name, like)?)))
            .collect::<Result<_>>()?;
        import.finish()?;
        self.averages = taken;
        Ok(())
    }

    fn check(&self, vars: &Vars) -> Result<()> {
        for (name, value) in current(vars) {
            let found = self.averages.get(name).map(Tensor::dims);
            if found != Some(value.dims()) {
                return Err(Error::State {
                    what: "ema",
                    message: format!(
                        "{name:?} of shape {:?} meets an average of shape {found:?}",
                        value.dims()
                    ),
                });
            }
        }
        Ok(())
    }
}

/// Values of all parameters and buffers.
fn current(vars: &Vars) -> impl Iterator<Item = (&str, Tensor)> {
    let parameters = vars
        .parameters()
        .map(|(name, parameter)| (name, parameter.as_detached_tensor()));
    parameters.chain(vars.buffers().map(|(name, buffer)| (name, buffer.get())))
}
