//! G²DeNet: the square root of a Gaussian's embedding (Wang et al. 2017).
//!
//! Options: `beta` (1, weight of the mean), `epsilon` (1e-3, added to the eigenvalues), `output`
//! (`"full"`: `(d+1)²` values, 263 169 for 512 channels; or `"triangle"`), `normalize` (true: signed
//! root and l2 normalisation after it, as in the authors' code, whose root of the features before it is
//! left out). Mathematics, choices, cost, troubles:
//! [`GaussianEmbedding`].

use isqrt_linalg::bilinear;
use isqrt_linalg::eig::GaussianEmbedding;
use isqrt_nn::Scope;
use serde::Deserialize;

use super::{Form, Options, Representation, RepresentationEntry, symmetric};
use crate::Result;

pub(super) const G2DENET: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "g2denet"
    }

    fn about(&self) -> &'static str {
        "root of a Gaussian's embedding (G2DeNet); options beta, epsilon, output, normalize"
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
        _scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>> {
        let keys: Keys = options.read(self.name())?;
        let pool = GaussianEmbedding {
            beta: keys.beta,
            epsilon: keys.epsilon,
            output: keys.output.into(),
        };
        pool.validate()?;
        Ok(symmetric(pool.output, channels + 1, move |x| {
            let y = pool.forward(x)?;
            match keys.normalize {
                true => bilinear::normalize(&y.flatten_from(1)?),
                false => Ok(y),
            }
        }))
    }
}

/// The keys in a spec.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    beta: f64,
    epsilon: f64,
    output: Form,
    normalize: bool,
}

impl Default for Keys {
    fn default() -> Self {
        let GaussianEmbedding { beta, epsilon, .. } = GaussianEmbedding::default();
        Self {
            beta,
            epsilon,
            output: Form::Full,
            normalize: true,
        }
    }
}
