//! B-CNN: bilinear pooling with signed root and l2 normalisation (Lin et al. 2015).
//!
//! No options; `d²` values (262 144 for 512 channels). Mathematics, cost: [`Bilinear`].

use isqrt_linalg::Output;
use isqrt_linalg::bilinear::Bilinear;
use isqrt_nn::Scope;

use super::{NoOptions, Options, Representation, RepresentationEntry, symmetric};
use crate::Result;

pub(super) const BCNN: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "bcnn"
    }

    fn about(&self) -> &'static str {
        "bilinear pooling, signed root, l2 normalisation (B-CNN)"
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
        options.read::<NoOptions>(self.name())?;
        Ok(symmetric(Output::Full, channels, |x| Bilinear.forward(x)))
    }
}
