//! Improved B-CNN: bilinear pooling with a matrix square root (Lin and Maji 2017).
//!
//! Options: `root` (`"newton"`, or `"svd"`), `iterations` (10, of Newton's root and of the Lyapunov
//! equation backward), `epsilon` (1e-3, added to the eigenvalues). `d²` values. Mathematics, cost,
//! troubles: [`ImprovedBilinear`].

use isqrt_linalg::Output;
use isqrt_linalg::bilinear::{ImprovedBilinear, NewtonOrSvd};
use isqrt_nn::Scope;
use serde::Deserialize;

use super::{Options, Representation, RepresentationEntry, symmetric};
use crate::{Error, Result};

pub(super) const IMPBCNN: Entry = Entry;

pub(super) struct Entry;

impl RepresentationEntry for Entry {
    fn name(&self) -> &'static str {
        "impbcnn"
    }

    fn about(&self) -> &'static str {
        "bilinear pooling with a matrix square root (Improved B-CNN); options root, iterations, epsilon"
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
        let Keys {
            root,
            iterations,
            epsilon,
        } = options.read(self.name())?;
        let mut pool = ImprovedBilinear::default();
        match (root, iterations) {
            (RootBy::Newton, Some(iterations)) => pool.root = NewtonOrSvd::Newton { iterations },
            (RootBy::Newton, None) => {}
            (RootBy::Svd, None) => pool.root = NewtonOrSvd::Svd,
            (RootBy::Svd, Some(_)) => {
                return Err(Error::Options {
                    name: self.name().to_owned(),
                    message: "iterations belong to root = \"newton\"".to_owned(),
                });
            }
        }
        pool.epsilon = epsilon.unwrap_or(pool.epsilon);
        pool.validate()?;
        Ok(symmetric(Output::Full, channels, move |x| pool.forward(x)))
    }
}

/// The keys in a spec.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    root: RootBy,
    iterations: Option<usize>,
    epsilon: Option<f64>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RootBy {
    #[default]
    Newton,
    Svd,
}
