//! Pooling heads, from feature maps to one vector an image, and their registry. Each has its page: equation, source,
//! shapes, options, cost, memory, known troubles.

/// Declares an enum of words in specs that stands for one of isqrt-linalg's (which knows no serde).
macro_rules! words {
    ($name:ident => $target:ident { $first:ident $(, $other:ident)* }) => {
        #[derive(Debug, Clone, Copy, Default, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum $name {
            #[default]
            $first,
            $($other),*
        }
        impl From<$name> for $target {
            fn from(word: $name) -> Self {
                match word {
                    $name::$first => Self::$first,
                    $($name::$other => Self::$other),*
                }
            }
        }
    };
}

pub mod approximant;
pub mod bcnn;
pub mod cbp;
pub mod cov;
pub mod deepo2p;
pub mod dropcov;
pub mod flat;
pub mod g2denet;
pub mod gap;
pub mod impbcnn;
pub mod isqrt;
pub mod mpn;
pub mod svd_pade;

use std::fmt;

use candle_core::Tensor;
use isqrt_linalg::Output;
use isqrt_nn::{Mode, Scope};
use serde::{Deserialize, Serialize};

use crate::options::{NoOptions, Options, Part};
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

    /// Multiply-adds of one image's forward pass over so many positions, symmetric products counted
    /// half; none where they are not known, as with decompositions.
    fn multiply_adds(&self, positions: usize) -> Option<u64> {
        let _ = positions;
        None
    }

    /// The side `n` of a symmetric matrix, where the vector is its upper triangle row by row,
    /// `n (n + 1) / 2` values: the order in which checkpoints of others may differ.
    fn triangle(&self) -> Option<usize> {
        None
    }

    /// Whether the vector approximates the square root of the covariance itself (divisor: the number
    /// of positions), its upper triangle or the whole matrix row by row: what can be held against
    /// the exact root. False for roots of something else (a moment about zero, a normalised covariance)
    /// and for those that are normalised afterwards.
    fn approximates_root(&self) -> bool {
        false
    }

    /// Whether it is of a covariance about the mean, which over a single position is zero whatever the
    /// features are.
    fn is_centred(&self) -> bool {
        false
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

    /// Whether a covariance head takes the backbone's reduction to fewer channels; those of bilinear
    /// pooling were published without, see [`BackboneEntry::bilinear`](crate::BackboneEntry::bilinear).
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
pub const REPRESENTATIONS: &[&dyn RepresentationEntry] = &[
    &gap::GAP,
    &cov::COV,
    &isqrt::ISQRT,
    &mpn::MPN,
    &flat::FLAT,
    &deepo2p::DEEPO2P,
    &bcnn::BCNN,
    &cbp::CBP,
    &impbcnn::IMPBCNN,
    &g2denet::G2DENET,
    &approximant::MTP,
    &approximant::MPA,
    &svd_pade::SVD_PADE,
    &dropcov::DROPCOV,
];

words!(Form => Output { Triangle, Full });

/// A layer without parameters that gives symmetric matrices of `side` rows, the same in training and
/// evaluation, as a representation.
fn symmetric<F>(output: Output, side: usize, forward: F) -> Box<dyn Representation>
where
    F: Fn(&Tensor) -> isqrt_linalg::Result<Tensor> + Send + Sync + 'static,
{
    Box::new(Symmetric {
        output,
        side,
        is_root: false,
        is_centred: false,
        forward,
    })
}

/// The same of a covariance about the mean, which says whether it
/// [approximates its root](Representation::approximates_root).
fn of_covariance<F>(
    is_root: bool,
    output: Output,
    side: usize,
    forward: F,
) -> Box<dyn Representation>
where
    F: Fn(&Tensor) -> isqrt_linalg::Result<Tensor> + Send + Sync + 'static,
{
    Box::new(Symmetric {
        output,
        side,
        is_root,
        is_centred: true,
        forward,
    })
}

struct Symmetric<F> {
    output: Output,
    side: usize,
    is_root: bool,
    is_centred: bool,
    forward: F,
}

impl<F> Representation for Symmetric<F>
where
    F: Fn(&Tensor) -> isqrt_linalg::Result<Tensor> + Send + Sync,
{
    fn forward(&self, x: &Tensor, _mode: Mode) -> Result<Tensor> {
        Ok((self.forward)(x)?.flatten_from(1)?)
    }

    fn out_dim(&self) -> usize {
        self.output.len(self.side)
    }

    fn triangle(&self) -> Option<usize> {
        matches!(self.output, Output::Triangle).then_some(self.side)
    }

    fn approximates_root(&self) -> bool {
        self.is_root
    }

    fn is_centred(&self) -> bool {
        self.is_centred
    }
}

/// A representation by name with its options: in TOML `representation = "gap"` or
/// `representation = { name = "isqrt", iterations = 5 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Part")]
pub struct RepresentationSpec {
    /// Name in [`REPRESENTATIONS`].
    pub name: String,
    /// All other keys.
    #[serde(flatten)]
    pub options: Options,
}

/// The name, and the options behind it: `isqrt (iterations = 5)`.
impl fmt::Display for RepresentationSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.write_behind(&self.name, f)
    }
}

impl From<Part> for RepresentationSpec {
    fn from(Part { name, options }: Part) -> Self {
        Self { name, options }
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::{DType, Device};
    use isqrt_nn::Vars;

    /// A head that forgets to say so would take weights of the other order without a word.
    #[test]
    fn triangles_say_that_they_are() {
        let mut found = 0;
        for entry in REPRESENTATIONS.iter().filter(|entry| entry.second_order()) {
            let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
            let options = Options::default();
            let head = entry.build(&options, 7, vars.root()).unwrap();
            for side in [7, 8] {
                let is_triangle = head.out_dim() == side * (side + 1) / 2;
                assert_eq!(
                    head.triangle() == Some(side),
                    is_triangle,
                    "{}",
                    entry.name()
                );
                found += usize::from(is_triangle);
            }
        }
        assert!(found >= 8, "{found}");
    }

    /// One that forgets to say so would train on zeros.
    #[test]
    fn covariances_say_that_a_single_position_tells_them_nothing() {
        let maps = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu)?.reshape((1, 3, 1, 1));
        let (one, other) = (
            maps([0.5, 1.0, 2.0]).unwrap(),
            maps([1.5, 0.2, 0.1]).unwrap(),
        );
        let mut centred = 0;
        for entry in REPRESENTATIONS {
            let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
            let options = Options::default();
            let head = entry.build(&options, 3, vars.root()).unwrap();
            let seen = |x| {
                let y = head.forward(x, Mode::Eval).unwrap();
                y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let is_blind = seen(&one) == seen(&other);
            assert_eq!(head.is_centred(), is_blind, "{}", entry.name());
            centred += usize::from(is_blind);
        }
        assert!(centred >= 6, "{centred}");
    }
}
