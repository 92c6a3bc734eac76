//! How often matrices were factorised, so that a report can tell by which means a layer works.

use std::sync::atomic::{AtomicU64, Ordering};

static COUNTS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// What can be done to a matrix beside products.
#[derive(Clone, Copy)]
pub(crate) enum Factorisation {
    Eig,
    Svd,
    Cholesky,
}

/// Factorisations since the program began, of all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factorisations {
    /// Eigendecompositions.
    pub eig: u64,
    /// Singular value decompositions.
    pub svd: u64,
    /// Cholesky factorisations, to solve linear systems.
    pub cholesky: u64,
}

impl Factorisations {
    /// Those so far.
    pub fn so_far() -> Self {
        let [eig, svd, cholesky] = [0, 1, 2].map(|i: usize| COUNTS[i].load(Ordering::Relaxed));
        Self { eig, svd, cholesky }
    }
}

pub(crate) fn count(what: Factorisation) {
    COUNTS[what as usize].fetch_add(1, Ordering::Relaxed);
}
