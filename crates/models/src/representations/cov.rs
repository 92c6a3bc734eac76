//! Covariance pooling without a root.

use isqrt_linalg::CovPool;
use isqrt_nn::Scope;

use super::{NoOptions, Options, Representation, RepresentationEntry, symmetric};
use crate::Result;

pub(super) const COV: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "cov"
    }

    fn about(&self) -> &'static str {
        "plain covariance, upper triangle"
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
        let pool = CovPool::plain();
        Ok(symmetric(pool.output, channels, move |x| pool.forward(x)))
    }
}
