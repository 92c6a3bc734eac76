//! MPN-COV: covariance pooling with a matrix power by eigendecomposition (Li et al. 2017).
//!
//! Option: `power` (0.5, in (0, 1]). `(B, d, H, W)` to `(B, d(d+1)/2)`. Mathematics, cost, troubles:
//! [`MpnCov`] and its module.

use isqrt_linalg::eig::MpnCov;
use isqrt_nn::Scope;
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry, of_covariance};
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
        pool.validate()?;
        let is_root = power == 0.5;
        Ok(of_covariance(is_root, pool.output, channels, move |x| {
            pool.forward(x)
        }))
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
