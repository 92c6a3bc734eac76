//! A network: backbone, representation, classifier.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use isqrt_nn::{Mode, Vars};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, LoadOptions, Record};
use crate::classifier::{Classifier, ClassifierSpec};
use crate::{Backbone, BackboneSpec, Error, Representation, RepresentationSpec, Result};

/// What a network consists of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// What makes the feature maps.
    pub backbone: BackboneSpec,
    /// The pooling head.
    pub representation: RepresentationSpec,
    /// Hidden layers of the classifier; none by default.
    #[serde(default, skip_serializing_if = "ClassifierSpec::is_linear")]
    pub classifier: ClassifierSpec,
    /// Outputs of the classifier.
    pub classes: usize,
}

impl ModelSpec {
    /// A network with a linear classifier.
    #[must_use]
    pub fn new(
        backbone: impl Into<BackboneSpec>,
        representation: RepresentationSpec,
        classes: usize,
    ) -> Self {
        Self {
            backbone: backbone.into(),
            representation,
            classifier: ClassifierSpec::default(),
            classes,
        }
    }

    /// A network as it was published, by its short name: `resnet50` is that of the backbone's
    /// authors, `resnet50+isqrt` the backbone with another head and with what the head asks for:
    /// [`second_order`](crate::BackboneEntry::second_order) for covariance heads,
    /// [`bilinear`](crate::BackboneEntry::bilinear) for those that work on all channels.
    ///
    /// The backbone's hidden layers of the classifier stay with its own head and with heads that
    /// take the reduction; all others get a linear classifier.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that there are; [`Error::HeadAlone`] for a head's name.
    pub fn named(name: &str, classes: usize) -> Result<Self> {
        let (backbone, head) = match name.split_once('+') {
            Some((backbone, head)) => (backbone, Some(head)),
            None => (name, None),
        };
        let mut backbone = BackboneSpec::new(backbone);
        let is_head = RepresentationSpec::new(name).entry().is_ok();
        let entry = backbone.entry().map_err(|error| match is_head {
            true => Error::HeadAlone(name.to_owned()),
            false => error,
        })?;
        let own = entry.own_head();
        let (representation, hidden) = match head {
            Some(head) if head != own.name => {
                let representation = RepresentationSpec::new(head);
                let head = representation.entry()?;
                match (head.second_order(), head.reduces()) {
                    (true, true) => backbone.options = entry.second_order(),
                    (true, false) => backbone.options = entry.bilinear(),
                    (false, _) => {}
                }
                (representation, head.second_order() && head.reduces())
            }
            _ => (own, true),
        };
        let mut spec = Self::new(backbone, representation, classes);
        if hidden {
            spec.classifier = entry.classifier();
        }
        Ok(spec)
    }

    /// Backbone and head in one word, as [`named`](Self::named) takes it.
    #[must_use]
    pub fn short_name(&self) -> String {
        format!("{}+{}", self.backbone.name, self.representation.name)
    }
}

/// Backbone and head with their options: `resnet50 (last_stride = 1) + isqrt (iterations = 5)`.
impl fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {}", self.backbone, self.representation)
    }
}

/// A network with its parameters, named `backbone.*`, `representation.*`, `classifier.*`.
pub struct Network {
    spec: ModelSpec,
    vars: Vars,
    backbone: Box<dyn Backbone>,
    representation: Box<dyn Representation>,
    classifier: Classifier,
    /// Element type of the backbone's feature maps.
    maps: DType,
}

impl Network {
    /// A network with initial weights from `seed`, the same on every machine; networks of one seed
    /// that share a backbone start from the same backbone.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Options`] or [`Error::Classes`] where the spec is wrong.
    pub fn new(spec: &ModelSpec, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        Self::within(spec, seed, (dtype, device), usize::MAX)
    }

    /// [`new`](Self::new) of at most so many values.
    pub(crate) fn within(
        spec: &ModelSpec,
        seed: u64,
        (dtype, device): (DType, &Device),
        most: usize,
    ) -> Result<Self> {
        if spec.classes == 0 {
            return Err(Error::Classes);
        }
        let mut vars = Vars::new(seed, dtype, device).limit(most);
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
        let scope = root.sub("classifier");
        let classifier = Classifier::new(&spec.classifier, width, spec.classes, scope)?;
        Ok(Self {
            spec: spec.clone(),
            vars,
            backbone,
            representation,
            classifier,
            maps: dtype,
        })
    }

    /// Logits `(batch, classes)` of images `(batch, 3, height, width)`.
    ///
    /// # Errors
    /// Where the images do not fit or features are not finite.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.classify(&self.represent(x, mode)?, mode)
    }

    /// Logits of representations `(batch, out_dim)`.
    ///
    /// # Errors
    /// Where the length does not fit.
    pub fn classify(&self, representation: &Tensor, mode: Mode) -> Result<Tensor> {
        self.classifier.forward(representation, mode)
    }

    /// Feature maps of images, before pooling.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let maps = self
            .backbone
            .forward_features(&x.to_dtype(self.maps)?, mode)?;
        Ok(maps.to_dtype(self.vars.dtype())?)
    }

    /// Lets the backbone compute with feature maps of this type: on a GPU bf16, with parameters in f32.
    /// Maps leave it in the type of the parameters.
    pub fn compute_in(&mut self, maps: DType) {
        self.maps = maps;
    }

    /// A copy on another device.
    ///
    /// # Errors
    /// Where it does not fit there.
    pub fn on(&self, device: &Device) -> Result<Self> {
        let mut other = Self::new(&self.spec, 0, self.vars.dtype(), device)?;
        other.maps = self.maps;
        let values: Vec<(String, Tensor)> = self.values().collect();
        let values = values.iter().map(|(name, t)| (name.as_str(), t.clone()));
        other.set_values(&values.collect())?;
        Ok(other)
    }

    /// Representation of images: what the classifier sees.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn represent(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.pool(&self.features(x, mode)?, mode)
    }

    /// Logits of feature maps.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn head(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        self.classify(&self.pool(features, mode)?, mode)
    }

    /// Representation of feature maps `(batch, channels, height, width)`, as
    /// [`features`](Self::features) gives them.
    ///
    /// # Errors
    /// Where they are not finite or of another shape; [`Error::OnePosition`].
    pub fn pool(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        let is_one = matches!(features.dims(), [_, _, 1, 1]);
        if is_one && self.representation.is_centred() {
            return Err(Error::OnePosition {
                head: self.spec.representation.name.clone(),
                backbone: self.spec.backbone.name.clone(),
            });
        }
        self.representation.forward(features, mode)
    }

    /// Length of the representation.
    #[must_use]
    pub fn out_dim(&self) -> usize {
        self.representation.out_dim()
    }

    /// What it consists of.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Names and shapes of its parameters and buffers, sorted.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let parameters = self
            .vars
            .parameters()
            .map(|(name, var)| (name, var.dims().to_vec()));
        let buffers = self
            .vars
            .buffers()
            .map(|(name, buffer)| (name, buffer.get().dims().to_vec()));
        parameters.chain(buffers)
    }

    /// Its parameters and buffers by name.
    pub(crate) fn values(&self) -> impl Iterator<Item = (String, Tensor)> {
        let parameters = self.vars.parameters();
        let parameters = parameters.map(|(name, var)| (name.to_owned(), var.as_detached_tensor()));
        let buffers = self.vars.buffers();
        parameters.chain(buffers.map(|(name, buffer)| (name.to_owned(), buffer.get())))
    }

    /// Sets parameters and buffers to values of their shapes and the network's element type.
    pub(crate) fn set_values(&self, values: &HashMap<&str, Tensor>) -> Result<()> {
        // All moved before the first is set, so that an error leaves the network as it was.
        let moved = values.iter().map(|(name, value)| {
            let value = value.to_device(self.vars.device())?;
            Ok((*name, value))
        });
        let values: HashMap<&str, Tensor> = moved.collect::<Result<_>>()?;
        for (name, var) in self.vars.parameters() {
            if let Some(value) = values.get(name) {
                var.set(value)?;
            }
        }
        for (name, buffer) in self.vars.buffers() {
            if let Some(value) = values.get(name) {
                buffer.set(value.clone());
            }
        }
        Ok(())
    }

    /// Multiply-adds of the pooling head, where they are known.
    pub(crate) fn pool_multiply_adds(&self, positions: usize) -> Option<u64> {
        self.representation.multiply_adds(positions)
    }

    /// Whether the representation approximates the square root of the covariance: see
    /// [`Representation::approximates_root`].
    #[must_use]
    pub fn approximates_root(&self) -> bool {
        self.representation.approximates_root()
    }

    /// Side of the matrix whose upper triangle the representation is, row by row, if it is one.
    #[must_use]
    pub fn triangle(&self) -> Option<usize> {
        self.representation.triangle()
    }

    /// Side of the maps that a hidden layer of the classifier sees as one vector: 1 but for the first
    /// layer after `flat`.
    pub(crate) fn side_of_flat(&self, name: &str) -> usize {
        let first = name.starts_with("classifier.hidden0.");
        match first && self.spec.representation.name == "flat" {
            true => (self.out_dim() / self.backbone.out_channels().max(1)).isqrt(),
            false => 1,
        }
    }

    /// Name of the weight that multiplies the representation.
    pub(crate) fn first_linear(&self) -> &'static str {
        match self.spec.classifier.is_linear() {
            true => "classifier.weight",
            false => "classifier.hidden0.weight",
        }
    }

    /// Its parameters and buffers.
    #[must_use]
    pub fn vars(&self) -> &Vars {
        &self.vars
    }

    /// Writes all parameters and buffers with the spec; see [`checkpoint::save`].
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, path: &Path) -> Result<()> {
        checkpoint::save(self, path, &Record::default())
    }

    /// Takes all parameters and buffers from a file; see [`checkpoint::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        checkpoint::load(self, path, &LoadOptions::default())?;
        Ok(())
    }
}
