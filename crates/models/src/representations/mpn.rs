//! MPN-COV: covariance pooling with a matrix power by eigendecomposition (Li et al. 2017).

use candle_core::Tensor;
use isqrt_linalg::Output;
use isqrt_linalg::eig::MpnCov;
use isqrt_nn::{Mode, Scope};
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry};
use crate::Result;

pub(super) const MPN: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "mpn"
    }

    fn about(&self) -> &'static str {
        "covariance to a power by eigendecomposition (MPN-COV)"
    }

    fn second_order(&self) -> bool {
        true
    }

    fn build(
        &self,
        options: &Options,
        channels: usize,
        _scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        let Keys { power } = options.read(self.name())?;
        let pool = MpnCov {
            power,
            ..MpnCov::default()
        };
        Ok(Box::new(Mpn { pool, channels }))
    }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    power: f64,
}

impl Default for Keys {
    fn default() -> Self {
        Self { power: 0.5 }
    }
}

struct Mpn {
    pool: MpnCov,
    channels: usize,
}

impl Representation for Mpn {
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        Ok(self.pool.forward(x)?)
    }

    fn out_dim(&self) -> usize {
        self.pool.output.len(self.channels)
    }

    fn triangle(&self) -> Option<usize> {
        matches!(self.pool.output, Output::Triangle).then_some(self.channels)
    }
}
