//! What several updates came to, in the memory of a GPU until somebody asks: a step that reads its loss
//! back waits for the GPU, which then waits for the next step.

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};

use crate::{Result, Vars};

/// What updates came to since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Entries {
    /// Losses, each times its images.
    pub loss: f64,
    /// Images whose largest logit is that of their label, the first of equals.
    pub correct: f64,
    /// Losses and gradients that were not finite.
    pub bad: f64,
    /// Norm of the last gradients.
    pub norm: f64,
}

/// Losses, right answers and norms of several updates on a GPU.
#[derive(Debug)]
pub struct Ledger {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    values: Tensor,
}

/// Doubles of a ledger, as in `images.cu`.
const FIELDS: usize = 5;

impl Ledger {
    /// None for the CPU, where reading costs nothing.
    ///
    /// # Errors
    /// Where the GPU has no memory left.
    pub fn new(device: &Device) -> Result<Option<Self>> {
        if !device.is_cuda() {
            return Ok(None);
        }
        let values = Tensor::zeros(FIELDS, candle_core::DType::F64, device)?;
        Ok(Some(Self { values }))
    }

    /// Adds the mean loss of a pass and its right answers.
    ///
    /// # Errors
    /// For logits that are not on the GPU.
    pub fn add(&self, loss: &Tensor, logits: &Tensor, labels: &[u32]) -> Result<()> {
        #[cfg(feature = "cuda")]
        crate::cuda::ledger::add(&self.values, loss, logits, labels)?;
        #[cfg(not(feature = "cuda"))]
        let _ = (loss, logits, labels);
        Ok(())
    }

    /// [`clip_grad_norm`](crate::clip_grad_norm) without waiting: the norm comes with the next look, and
    /// whether it is finite.
    ///
    /// # Errors
    /// As there, but for gradients that are not finite.
    pub fn clip_grad_norm(
        &self,
        vars: &Vars,
        gradients: &mut GradStore,
        max_norm: f64,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        crate::optim::clip_on_gpu(vars, gradients, max_norm, &self.values)?;
        #[cfg(not(feature = "cuda"))]
        let _ = (vars, gradients, max_norm);
        Ok(())
    }

    /// Waits for the GPU, reads what there is and starts anew.
    ///
    /// # Errors
    /// For what went wrong on the GPU meanwhile.
    pub fn take(&mut self) -> Result<Entries> {
        let values = self.values.to_vec1::<f64>()?;
        self.values = self.values.zeros_like()?;
        let of = |field: usize| values.get(field).copied().unwrap_or(f64::NAN);
        Ok(Entries {
            loss: of(0),
            correct: of(1),
            bad: of(2),
            norm: of(3),
        })
    }
}
