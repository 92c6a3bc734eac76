//! CBP: compact bilinear pooling (Gao et al. 2016).
//!
//! Options: `projection` (`"tensor_sketch"`, or `"random_maclaurin"`), `dim` (8192 values, at most
//! 1 048 576). Mathematics, cost, troubles: [`CompactBilinear`].
//!
//! The random map is drawn from the network's seed and saved with it as buffers of whole numbers: `hash1`,
//! `hash2`, `sign1`, `sign2` of `d` values for the sketch; `sign1`, `sign2` of `dim x d` for Random
//! Maclaurin, 16 MiB each for 512 channels in f32.

use candle_core::Tensor;
use isqrt_linalg::bilinear::{CompactBilinear, Projection};
use isqrt_nn::{Buffer, Init, Mode, Scope};
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry};
use crate::{Error, Result};

pub(super) const CBP: Entry = Entry;

pub(super) struct Entry;

/// More values than anyone wants, few enough for their places to be exact in f32.
const MOST: usize = 1 << 20;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "cbp"
    }

    fn about(&self) -> &'static str {
        "bilinear pooling, projected at random (CBP); options projection, dim"
    }

    fn second_order(&self) -> bool {
        true
    }

    fn reduces(&self) -> bool {
        false
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        mut scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        let Keys { projection, dim } = options.read(self.name())?;
        if !(1..=MOST).contains(&dim) {
            return Err(Error::Options {
                name: self.name().to_owned(),
                message: format!("dim must be 1 to {MOST}, got {dim}"),
            });
        }
        let mut pair = |names: [&str; 2], shape: &[usize], init: Init| -> Result<[Buffer; 2]> {
            let [first, second] = names.map(|name| scope.drawn_buffer(name, shape, init));
            Ok([first?, second?])
        };
        let (hashes, shape) = match projection {
            Kind::TensorSketch => {
                let below = Init::Below(dim as u32);
                (
                    Some(pair(["hash1", "hash2"], &[channels], below)?),
                    vec![channels],
                )
            }
            Kind::RandomMaclaurin => (None, vec![dim, channels]),
        };
        let signs = pair(["sign1", "sign2"], &shape, Init::Signs)?;
        Ok(Box::new(Compact { hashes, signs, dim }))
    }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    projection: Kind,
    dim: usize,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            projection: Kind::TensorSketch,
            dim: 8192,
        }
    }
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    TensorSketch,
    RandomMaclaurin,
}

struct Compact {
    /// Of the sketch.
    hashes: Option<[Buffer; 2]>,
    signs: [Buffer; 2],
    dim: usize,
}

impl Representation for Compact {
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        let values = |buffers: &[Buffer; 2]| [buffers[0].get(), buffers[1].get()];
        let signs = values(&self.signs);
        let projection = match &self.hashes {
            Some(hashes) => Projection::TensorSketch {
                hashes: values(hashes),
                signs,
                dim: self.dim,
            },
            None => Projection::RandomMaclaurin { signs },
        };
        Ok(CompactBilinear { projection }.forward(x)?)
    }

    fn out_dim(&self) -> usize {
        self.dim
    }
}
