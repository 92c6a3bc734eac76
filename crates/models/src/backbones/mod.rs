//! Networks from images to feature maps, and their registry. Each has its page: source, names, options.

pub mod alexnet;
mod chain;
pub mod e10net;
pub mod mobilenet;
mod reduction;
mod residual;
pub mod resnet;
pub mod shufflenet;
pub mod small_chain;
pub mod small_resnet;
pub mod tinyresnet;
pub mod vgg;

use std::fmt;

use candle_core::Tensor;
use isqrt_nn::{Mode, Scope};
use serde::{Deserialize, Serialize, Serializer};

use crate::options::{NoOptions, Options, Part};
use crate::{ClassifierSpec, Error, Layout, RepresentationSpec, Result};

/// Makes feature maps of images.
pub trait Backbone: Send + Sync {
    /// `(batch, 3, height, width)` to `(batch, out_channels, height', width')`.
    ///
    /// # Errors
    /// Where the images are too small.
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor>;

    /// Channels of the feature maps.
    fn out_channels(&self) -> usize;
}

/// A backbone that can be asked for by name.
pub trait BackboneEntry: Sync {
    /// The name in specs.
    fn name(&self) -> &'static str;

    /// One line for people.
    fn about(&self) -> &'static str;

    /// Side of the images that it was made for.
    fn image_side(&self) -> usize {
        224
    }

    /// The options that covariance heads need where the defaults are made for global average
    /// pooling: more positions and fewer channels, the latter by the option `reduction`.
    fn second_order(&self) -> Options {
        Options::default()
    }

    /// The options that heads of bilinear pooling need, which were published on all channels of
    /// AlexNet and VGG; those of [`second_order`](Self::second_order) on wider networks, where a
    /// classifier would have billions of values.
    fn bilinear(&self) -> Options {
        self.second_order()
    }

    /// The representation that the published network has: global average pooling by default.
    fn own_head(&self) -> RepresentationSpec {
        RepresentationSpec::new("gap")
    }

    /// The classifier of the published network: linear by default.
    fn classifier(&self) -> ClassifierSpec {
        ClassifierSpec::default()
    }

    /// The names that other programs give to its parameters, see [`Layout`].
    fn layouts(&self) -> &'static [Layout] {
        &[Layout::FLAT]
    }

    /// A new one with its parameters in `scope`.
    ///
    /// # Errors
    /// [`Error::Options`] for an option that it does not know or whose value it cannot take.
    fn build(&self, options: &Options, scope: Scope<'_>) -> Result<Box<dyn Backbone>>;
}

/// All backbones. Adding one is a file beside this one and a line here.
pub const BACKBONES: &[&dyn BackboneEntry] = &[
    &e10net::E10NET,
    &tinyresnet::TINY_RESNET,
    &small_chain::ALEXNET_SMALL,
    &small_chain::VGG_SMALL,
    &resnet::RESNET18,
    &resnet::RESNET34,
    &resnet::RESNET50,
    &resnet::RESNET101,
    &resnet::RESNET152,
    &small_resnet::RESNET8,
    &small_resnet::RESNET14,
    &small_resnet::RESNET20,
    &small_resnet::RESNET32,
    &small_resnet::RESNET44,
    &small_resnet::RESNET56,
    &small_resnet::RESNET110,
    &small_resnet::PRERESNET20,
    &small_resnet::PRERESNET56,
    &small_resnet::PRERESNET110,
    &small_resnet::PRERESNET164,
    &alexnet::ALEXNET,
    &alexnet::ALEXNET_BN,
    &vgg::VGG11,
    &vgg::VGG11_BN,
    &vgg::VGG13,
    &vgg::VGG13_BN,
    &vgg::VGG16,
    &vgg::VGG16_BN,
    &vgg::VGG19,
    &vgg::VGG19_BN,
    &mobilenet::MOBILENET_V2,
    &shufflenet::SHUFFLENET_V2_X1_0,
];

/// A backbone by name with its options: in TOML `backbone = "resnet50"` or
/// `backbone = { name = "resnet50", last_stride = 1, reduction = 256 }`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(from = "Part")]
pub struct BackboneSpec {
    /// Name in [`BACKBONES`].
    pub name: String,
    /// All other keys.
    pub options: Options,
}

impl BackboneSpec {
    /// One with default options.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            options: Options::default(),
        }
    }

    /// One with the options that covariance heads need, see [`BackboneEntry::second_order`].
    ///
    /// # Errors
    /// As [`entry`](Self::entry).
    pub fn second_order(name: impl Into<String>) -> Result<Self> {
        let mut spec = Self::new(name);
        spec.options = spec.entry()?.second_order();
        Ok(spec)
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
    pub fn entry(&self) -> Result<&'static dyn BackboneEntry> {
        let found = BACKBONES.iter().find(|entry| entry.name() == self.name);
        found.copied().ok_or_else(|| Error::Unknown {
            what: "backbone",
            name: self.name.clone(),
            known: BACKBONES
                .iter()
                .map(|e| e.name())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}

/// The name, and the options behind it: `resnet50 (last_stride = 1, reduction = 256)`.
impl fmt::Display for BackboneSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.write_behind(&self.name, f)
    }
}

impl From<&str> for BackboneSpec {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl From<Part> for BackboneSpec {
    fn from(Part { name, options }: Part) -> Self {
        Self { name, options }
    }
}

impl Serialize for BackboneSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if self.options.is_empty() {
            return serializer.serialize_str(&self.name);
        }
        let (name, options) = (self.name.clone(), self.options.clone());
        Part { name, options }.serialize(serializer)
    }
}
