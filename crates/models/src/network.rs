//! A network: backbone, representation, linear classifier.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use isqrt_nn::layers::Linear;
use isqrt_nn::{Mode, Vars};
use serde::{Deserialize, Serialize};

use crate::{Backbone, BackboneSpec, Error, Representation, RepresentationSpec, Result};

/// What a network consists of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// What makes the feature maps.
    pub backbone: BackboneSpec,
    /// The pooling head.
    pub representation: RepresentationSpec,
    /// Outputs of the classifier.
    pub classes: usize,
}

/// A network with its parameters, named `backbone.*`, `representation.*`, `classifier.*`.
pub struct Network {
    spec: ModelSpec,
    vars: Vars,
    backbone: Box<dyn Backbone>,
    representation: Box<dyn Representation>,
    classifier: Linear,
}

impl Network {
    /// A network with initial weights from `seed`, the same on every machine; networks of one seed
    /// that share a backbone start from the same backbone.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Options`] or [`Error::Classes`] where the spec is wrong.
    pub fn new(spec: &ModelSpec, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        if spec.classes == 0 {
            return Err(Error::Classes);
        }
        let mut vars = Vars::new(seed, dtype, device);
        let mut root = vars.root();
        let BackboneSpec { options, .. } = &spec.backbone;
        let scope = root.sub("backbone");
        let backbone = spec.backbone.entry()?.build(options, scope)?;
        let head = &spec.representation;
        let scope = root.sub("representation");
        let representation = head
            .entry()?
            .build(&head.options, backbone.out_channels(), scope)?;
        let width = representation.out_dim();
        let classifier = Linear::new(root.sub("classifier"), width, spec.classes)?;
        Ok(Self {
            spec: spec.clone(),
            vars,
            backbone,
            representation,
            classifier,
        })
    }

    /// Logits `(batch, classes)` of images `(batch, 3, height, width)`.
    ///
    /// # Errors
    /// Where the images do not fit or features are not finite.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.classify(&self.represent(x, mode)?)
    }

    /// Feature maps of images, before pooling.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.backbone.forward_features(x, mode)
    }

    /// Representation of images: what the classifier sees.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn represent(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.pool(&self.features(x, mode)?, mode)
    }

    /// Representation of feature maps.
    pub(crate) fn pool(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        self.representation.forward(features, mode)
    }

    /// Logits of representations.
    pub(crate) fn classify(&self, values: &Tensor) -> Result<Tensor> {
        Ok(self.classifier.forward(values)?)
    }

    /// What it consists of.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its parameters and buffers.
    #[must_use]
    pub fn vars(&self) -> &Vars {
        &self.vars
    }

    /// Writes all parameters and buffers; see [`Vars::save`].
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, path: &Path) -> Result<()> {
        Ok(self.vars.save(path)?)
    }

    /// Takes all parameters and buffers from a file; see [`Vars::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        Ok(self.vars.load(path)?)
    }
}
