//! Pooling heads, from feature maps to one vector an image, and their registry.

mod cov;
mod flat;
mod gap;
mod isqrt;
mod mpn;

use candle_core::Tensor;
use isqrt_nn::{Mode, Scope};
use serde::{Deserialize, Serialize};

use crate::options::{NoOptions, Options};
use crate::{Error, Result};

/// Makes one vector of a feature map.
pub trait Representation: Send + Sync {
    /// `(batch, channels, height, width)` to `(batch, out_dim)`.
    ///
    /// # Errors
    /// Where the features are not finite or of another shape.
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor>;

    /// Length of the vector.
    fn out_dim(&self) -> usize;

    /// The side `n` of a symmetric matrix, where the vector is its upper triangle row by row,
    /// `n (n + 1) / 2` values: the order in which checkpoints of others may differ.
    fn triangle(&self) -> Option<usize> {
        None
    }
}

/// A representation that can be asked for by name.
pub trait RepresentationEntry: Sync {
    /// The name in specs.
    fn name(&self) -> &'static str;

    /// One line for people.
    fn about(&self) -> &'static str;

    /// Whether it takes the backbone as covariance heads need it, see
    /// [`BackboneEntry::second_order`](crate::BackboneEntry::second_order).
    fn second_order(&self) -> bool {
        false
    }

    /// Whether a covariance head takes the backbone's reduction to fewer channels too; the older
    /// ones work on all of them.
    fn reduces(&self) -> bool {
        self.second_order()
    }

    /// A new one for feature maps of `channels`; parameters, if it has any, go to `scope`.
    ///
    /// # Errors
    /// [`Error::Options`] for an option that it does not know or whose value it cannot take.
    fn build(
        &self,
        options: &Options,
        channels: usize,
        scope: Scope<'_>,
    ) -> Result<Box<dyn Representation>>;
}

/// All representations. Adding one is a file beside this one and a line here.
pub const REPRESENTATIONS: &[&dyn RepresentationEntry] =
    &[&gap::GAP, &cov::COV, &isqrt::ISQRT, &mpn::MPN, &flat::FLAT];

/// A representation by name with its options: in TOML
/// `representation = { name = "isqrt", iterations = 5 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RepresentationSpec {
    /// Name in [`REPRESENTATIONS`].
    pub name: String,
    /// All other keys.
    #[serde(flatten)]
    pub options: Options,
}

impl RepresentationSpec {
    /// One with default options.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            options: Options::default(),
        }
    }

    /// With an option more.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        self.options.set(key, value);
        self
    }

    /// The entry of this name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that there are.
    pub fn entry(&self) -> Result<&'static dyn RepresentationEntry> {
        let found = REPRESENTATIONS
            .iter()
            .find(|entry| entry.name() == self.name);
        found.copied().ok_or_else(|| Error::Unknown {
            what: "representation",
            name: self.name.clone(),
            known: REPRESENTATIONS
                .iter()
                .map(|e| e.name())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}
