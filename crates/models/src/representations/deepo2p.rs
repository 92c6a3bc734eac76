//! DeepO²P: the matrix logarithm of the second moment (Ionescu et al. 2015).
//!
//! Option: `epsilon` (1e-3), added to the eigenvalues. Mathematics, choices, cost and troubles:
//! [`DeepO2P`].

use isqrt_linalg::eig::DeepO2P;
use isqrt_nn::Scope;
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry, symmetric};
use crate::Result;

pub(super) const DEEPO2P: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "deepo2p"
    }

    fn about(&self) -> &'static str {
        "logarithm of the second moment by eigendecomposition (DeepO2P); option epsilon"
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
        let Keys { epsilon } = options.read(self.name())?;
        let pool = DeepO2P {
            epsilon,
            ..DeepO2P::default()
        };
        pool.validate()?;
        Ok(symmetric(pool.output, channels, move |x| pool.forward(x)))
    }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    epsilon: f64,
}

impl Default for Keys {
    fn default() -> Self {
        let epsilon = DeepO2P::default().epsilon;
        Self { epsilon }
    }
}
