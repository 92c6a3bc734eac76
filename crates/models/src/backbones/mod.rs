//! Networks from images to feature maps, and their registry.

mod e10net;
mod tinyresnet;

use candle_core::Tensor;
use isqrt_nn::{Mode, Scope};

use crate::Result;

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

    /// A new one with its parameters in `scope`.
    ///
    /// # Errors
    /// Where parameters cannot be made.
    fn build(&self, scope: Scope<'_>) -> Result<Box<dyn Backbone>>;
}

/// All backbones. Adding one is a file beside this one and a line here.
pub const BACKBONES: &[&dyn BackboneEntry] = &[&e10net::E10NET, &tinyresnet::TINY_RESNET];
