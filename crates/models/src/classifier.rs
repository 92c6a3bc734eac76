//! The classifier: one linear layer, or hidden layers before it as in AlexNet and VGG.

use candle_core::Tensor;
use isqrt_nn::layers::{Dropout, Linear};
use isqrt_nn::ops::relu;
use isqrt_nn::{Mode, Scope};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Hidden layers of a classifier; none by default.
///
/// AlexNet (Krizhevsky et al. 2012) and VGG (Simonyan and Zisserman 2015) have two of 4096 values,
/// and so have the authors' covariance networks on them (32896 to 4096 to 4096 to 1000).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassifierSpec {
    /// Outputs of each hidden linear layer, ReLU after it.
    pub hidden: Vec<usize>,
    /// Probability that dropout drops a value at each hidden layer.
    pub dropout: f64,
    /// Dropout before each hidden layer (AlexNet) and not after its ReLU (VGG).
    pub drop_inputs: bool,
}

impl Default for ClassifierSpec {
    fn default() -> Self {
        Self {
            hidden: Vec::new(),
            dropout: 0.5,
            drop_inputs: false,
        }
    }
}

impl ClassifierSpec {
    /// With the two hidden layers of 4096 values that AlexNet and VGG have.
    #[must_use]
    pub fn two_hidden(drop_inputs: bool) -> Self {
        Self {
            hidden: vec![4096, 4096],
            drop_inputs,
            ..Self::default()
        }
    }

    /// Whether it is one linear layer.
    #[must_use]
    pub fn is_linear(&self) -> bool {
        self.hidden.is_empty()
    }
}

pub(crate) struct Classifier {
    hidden: Vec<(Linear, Dropout)>,
    drop_inputs: bool,
    last: Linear,
}

impl Classifier {
    /// Parameters `hidden0.*`, `hidden1.*` and so on, and those of the last layer in `scope` itself.
    /// Initial values are PyTorch's defaults; torchvision draws those of VGG's layers from
    /// N(0, 0.01²).
    pub(crate) fn new(
        spec: &ClassifierSpec,
        inputs: usize,
        classes: usize,
        mut scope: Scope<'_>,
    ) -> Result<Self> {
        let mut width = inputs;
        let mut hidden = Vec::with_capacity(spec.hidden.len());
        for (i, &outputs) in spec.hidden.iter().enumerate() {
            let mut scope = scope.sub(format!("hidden{i}"));
            let dropout = Dropout::new(scope.sub("dropout"), spec.dropout)?;
            hidden.push((Linear::new(scope, width, outputs)?, dropout));
            width = outputs;
        }
        Ok(Self {
            hidden,
            drop_inputs: spec.drop_inputs,
            last: Linear::new(scope, width, classes)?,
        })
    }

    /// `(batch, inputs)` to `(batch, classes)`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for (layer, dropout) in &self.hidden {
            x = match self.drop_inputs {
                true => relu(&layer.forward(&dropout.forward(&x, mode)?)?)?,
                false => dropout.forward(&relu(&layer.forward(&x)?)?, mode)?,
            };
        }
        Ok(self.last.forward(&x)?)
    }
}
