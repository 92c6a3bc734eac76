//! The hidden linear layers of AlexNet (Krizhevsky et al. 2012) and VGG (Simonyan and Zisserman
//! 2015) with torchvision's structure: average pooling to a fixed size, then two linear layers with
//! ReLU and dropout. Initial values are PyTorch's defaults; torchvision draws those of VGG's layers
//! from N(0, 0.01²).
//!
//! Options: `side` (7, of the pooled maps), `hidden` (4096), `dropout` (0.5), `drop_features`
//! (false: dropout after each of the two ReLUs; true: before each of the two layers, AlexNet).

use candle_core::Tensor;
use isqrt_nn::layers::{Dropout, Linear};
use isqrt_nn::ops::{adaptive_avg_pool2d, relu};
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry};
use crate::{Error, Result};

pub(super) const FC: Entry = Entry;

pub(super) struct Entry;

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    side: usize,
    hidden: usize,
    dropout: f64,
    drop_features: bool,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            side: 7,
            hidden: 4096,
            dropout: 0.5,
            drop_features: false,
        }
    }
}

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "fc"
    }

    fn about(&self) -> &'static str {
        "two hidden linear layers with ReLU and dropout, as in AlexNet and VGG; options side, hidden, \
         dropout, drop_features"
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        mut scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        let Keys {
            side,
            hidden,
            dropout,
            drop_features,
        } = options.read(self.name())?;
        let inputs = side.checked_mul(side).and_then(|s| s.checked_mul(channels));
        let inputs = inputs.filter(|&n| n > 0 && hidden > 0 && n.checked_mul(hidden).is_some());
        let Some(inputs) = inputs else {
            return Err(Error::Options {
                name: self.name().to_owned(),
                message: "side and hidden must be at least 1, and their products fit into memory"
                    .to_owned(),
            });
        };
        Ok(Box::new(Hidden {
            side,
            layers: [
                Linear::new(scope.sub("fc1"), inputs, hidden)?,
                Linear::new(scope.sub("fc2"), hidden, hidden)?,
            ],
            dropouts: [
                Dropout::new(scope.sub("dropout1"), dropout)?,
                Dropout::new(scope.sub("dropout2"), dropout)?,
            ],
            drop_features,
            hidden,
        }))
    }
}

struct Hidden {
    side: usize,
    layers: [Linear; 2],
    dropouts: [Dropout; 2],
    drop_features: bool,
    hidden: usize,
}

impl Representation for Hidden {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = adaptive_avg_pool2d(x, (self.side, self.side))?.flatten_from(1)?;
        for (layer, dropout) in self.layers.iter().zip(&self.dropouts) {
            if self.drop_features {
                x = relu(&layer.forward(&dropout.forward(&x, mode)?)?)?;
            } else {
                x = dropout.forward(&relu(&layer.forward(&x)?)?, mode)?;
            }
        }
        Ok(x)
    }

    fn out_dim(&self) -> usize {
        self.hidden
    }
}
