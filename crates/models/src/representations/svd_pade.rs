//! SVD-Padé: the exact root of the covariance in double precision, with the Padé-approximated adjoint
//! (Song et al. 2021).
//!
//! No options. Mathematics, what the approximant is, cost, troubles: [`SvdPade`] and its module.

use isqrt_linalg::eig::SvdPade;
use isqrt_nn::Scope;

use super::{NoOptions, Options, Representation, RepresentationEntry, of_covariance};
use crate::Result;

pub(super) const SVD_PADE: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "svd_pade"
    }

    fn about(&self) -> &'static str {
        "covariance with an exact root in double precision, Padé-approximated adjoint (SVD-Padé)"
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
        options.read::<NoOptions>(self.name())?;
        let pool = SvdPade::default();
        Ok(of_covariance(true, pool.output, channels, move |x| {
            pool.forward(x)
        }))
    }
}
