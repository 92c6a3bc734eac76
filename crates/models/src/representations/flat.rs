//! The maps themselves as one vector, averaged to a fixed size first, as AlexNet (Krizhevsky et al.
//! 2012) and VGG (Simonyan and Zisserman 2015) hand them to their linear layers.
//!
//! # Shapes
//! `(B, d, H, W)` to `(B, d·side²)`; option `side` (7). torchvision's `AdaptiveAvgPool2d` and
//! `flatten`: with maps of that size the average is the maps.
//!
//! # Cost and memory
//! `dHW` additions; nothing is kept for the backward pass.
//!
//! # Known troubles
//! First order, and bound to places. The linear layers after it have most of these networks' values.

use candle_core::Tensor;
use isqrt_nn::ops::adaptive_avg_pool2d;
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry};
use crate::{Error, Result};

pub(super) const FLAT: Entry = Entry;

pub(super) struct Entry;

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    side: usize,
}

impl Default for Keys {
    fn default() -> Self {
        Self { side: 7 }
    }
}

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "flat"
    }

    fn about(&self) -> &'static str {
        "maps averaged to a fixed size, flattened, as AlexNet and VGG have them; option side"
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        _scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        let Keys { side } = options.read(self.name())?;
        let width = side.checked_mul(side).and_then(|s| s.checked_mul(channels));
        match width {
            Some(width) if width > 0 => Ok(Box::new(Flat { side, width })),
            _ => Err(Error::Options {
                name: self.name().to_owned(),
                message: "side must be at least 1 and its square times the channels a length"
                    .to_owned(),
            }),
        }
    }
}

struct Flat {
    side: usize,
    width: usize,
}

impl Representation for Flat {
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        Ok(adaptive_avg_pool2d(x, (self.side, self.side))?.flatten_from(1)?)
    }

    fn multiply_adds(&self, _positions: usize) -> Option<u64> {
        Some(0)
    }

    fn out_dim(&self) -> usize {
        self.width
    }
}
