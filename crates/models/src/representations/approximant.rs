//! MTP and MPA: the covariance's root by a matrix Taylor polynomial or a matrix Padé approximant (Song et
//! al. 2022).
//!
//! Options: `degree` (10 for `mtp`, 5 for `mpa`), `iterations` (8, of the Lyapunov equation backward).
//! Mathematics, cost, troubles: [`isqrt_linalg::approximant`].

use isqrt_linalg::approximant::{Approximant, Form};
use isqrt_nn::Scope;
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry, of_covariance};
use crate::Result;

pub(super) const MTP: Entry = Entry(Form::Taylor);
pub(super) const MPA: Entry = Entry(Form::Pade);

pub(super) struct Entry(Form);

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        match self.0 {
            Form::Taylor => "mtp",
            Form::Pade => "mpa",
        }
    }

    fn about(&self) -> &'static str {
        match self.0 {
            Form::Taylor => {
                "covariance with a root by matrix Taylor polynomial (MTP); options degree, iterations"
            }
            Form::Pade => {
                "covariance with a root by matrix Padé approximant (MPA); options degree, iterations"
            }
        }
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
        let Keys { degree, iterations } = options.read(self.name())?;
        let mut pool = match self.0 {
            Form::Taylor => Approximant::taylor(),
            Form::Pade => Approximant::pade(),
        };
        pool.degree = degree.unwrap_or(pool.degree);
        pool.iterations = iterations.unwrap_or(pool.iterations);
        pool.validate()?;
        Ok(of_covariance(true, pool.output, channels, move |x| {
            pool.forward(x)
        }))
    }
}

/// The keys in a spec.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    degree: Option<usize>,
    iterations: Option<usize>,
}
