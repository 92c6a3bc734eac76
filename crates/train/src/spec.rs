//! An experiment file for `isqrt train`: everything that a run depends on, as data.
//!
//! `docs/training.md` has every key with its default. Parts that several files share are named in
//! `extends`; see [`crate::layers`] for how they are laid over each other.

use std::path::{Path, PathBuf};

use isqrt_datasets::ListOptions;
use isqrt_models::{BackboneSpec, ClassifierSpec, ModelSpec, RepresentationSpec};
use isqrt_nn::{ParamGroup, Schedule};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::layers::Layers;
use crate::run::weights_file;
use crate::{Error, GpuSpec, NonFinite, OptimiserSpec, Precision, Result, TrainConfig, Transforms};

/// A training run. Unknown keys are errors; keys with a default may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What the run is, for people.
    #[serde(default)]
    pub title: String,
    /// Where the recipe comes from: paper, section, repository, script.
    #[serde(default)]
    pub source: String,
    /// What the recipe leaves out or changes.
    #[serde(default)]
    pub note: String,
    /// Fixes weights, order, augmentation and the split; 0 by default.
    #[serde(default)]
    pub seed: u64,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images an update, of all ranks together.
    pub batch: usize,
    /// Parts in which a batch is computed; 1 by default. See [`TrainConfig::accumulate`].
    #[serde(default = "one")]
    pub accumulate: usize,
    /// `f32` by default.
    #[serde(default)]
    pub precision: Precision,
    /// How a GPU computes, see [`GpuSpec`].
    #[serde(default, skip_serializing_if = "GpuSpec::is_default")]
    pub gpu: GpuSpec,
    /// Label smoothing, a share; 0 by default.
    #[serde(default)]
    pub label_smoothing: f64,
    /// Largest norm of all gradients together; not limited by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Share that an average of the weights keeps of itself at each update; off by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// `"stop"` by default, or `{ skip = 10 }`.
    #[serde(default)]
    pub non_finite: NonFinite,
    /// The network.
    pub model: Model,
    /// Weights to begin with; initial ones from the seed by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// The images.
    pub data: DataSpec,
    /// What moves the parameters.
    pub optimiser: OptimiserSpec,
    /// Learning rate over time; cosine to 0 by default.
    #[serde(default)]
    pub schedule: Schedule,
    /// Parameters that learn or decay at their own pace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ParamGroup>,
    /// Evaluation after epochs and at the end.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// What is kept of the run.
    #[serde(default)]
    pub checkpoints: CheckpointSpec,
    /// What is written down while it runs.
    #[serde(default)]
    pub log: LogSpec,
    /// Looks into the network; off by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnostics: Option<DiagnosticsSpec>,
}

fn one() -> usize {
    1
}

/// The network of a run; the data say how many classes there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What makes the feature maps, by name or with options.
    pub backbone: BackboneSpec,
    /// The pooling head, by name or with options.
    pub representation: RepresentationSpec,
    /// Hidden layers of the classifier; none by default.
    #[serde(default, skip_serializing_if = "ClassifierSpec::is_linear")]
    pub classifier: ClassifierSpec,
    /// Patterns of parameters that stay as they are, like `backbone.*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub frozen: Vec<String>,
    /// Batch norm keeps its statistics. Off by default.
    #[serde(default)]
    pub frozen_norm: bool,
}

/// Weights to begin with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// File of any layout that `isqrt convert` reads, a checkpoint of another run included.
    pub weights: PathBuf,
    /// Take what fits, so that a first-order network or one for other classes can be started from. On by
    /// default.
    #[serde(default = "yes")]
    pub partial: bool,
    /// Order of the covariance's triangle in the file, where it may have either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub triangle: Option<TriangleOrder>,
}

fn yes() -> bool {
    true
}

/// The order of the entries of a symmetric matrix in a file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TriangleOrder {
    /// The authors' code since December 2018; ours.
    Upper,
    /// Before; MatConvNet.
    Lower,
}

/// The images of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// A set that the program makes: `e10`. Without it `root` says where the images are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<MadeSet>,
    /// Folder, archive or list in any known layout; `--data` on the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// Which of several labels (FGVC-Aircraft); the usual ones by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// What becomes of training images: a preset or a list of steps.
    pub train_transforms: Transforms,
    /// The same for evaluation; its views (mirror, ten crops) are averaged.
    pub eval_transforms: Transforms,
    /// Mean and deviation that channels are normalised with.
    #[serde(default)]
    pub normalise: Normalise,
    /// Where the best epoch is chosen.
    #[serde(default)]
    pub validation: Validation,
    /// Decode once and keep the pixels; for small images. Off by default.
    #[serde(default)]
    pub in_memory: bool,
    /// Threads that prepare images; as many as there are cores by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<usize>,
    /// Batches that are prepared ahead; 2 by default.
    #[serde(default = "two")]
    pub prefetch: usize,
    /// Images that cannot be read are left out, up to so many percent; the first one ends the run by
    /// default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_broken_percent: Option<f64>,
}

fn two() -> usize {
    2
}

/// Sets that the program makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MadeSet {
    /// The embedded textures.
    E10,
}

/// Mean and deviation that channels are normalised with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// ImageNet's.
    #[default]
    ImageNet,
    /// Those of the training images, which must be in memory.
    Train,
}

/// Where the best epoch is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Validation {
    /// On the set's own validation part, or one that is carved from train; the test part is looked at
    /// once, at the end.
    #[default]
    Carve,
    /// On the part that is reported on, with all training images in training: the authors' protocol, which
    /// makes the best epoch's error too small. The last epoch's is not concerned.
    Test,
}

/// Evaluation of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationSpec {
    /// Epochs from one to the next; the last epoch always has one. 1 by default.
    pub every: usize,
    /// Images a pass; those of a training pass by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// At the end, C of linear SVMs (one against all others) on the normalised representations of
    /// training images, seen as in evaluation; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub svm: Option<f64>,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            every: 1,
            batch: None,
            svm: None,
        }
    }
}

/// What is kept of a run. The last state is always kept, and the best weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// Epochs from one to the next; the last epoch always has one. 1 by default.
    pub every_epochs: usize,
    /// Updates from one to the next within an epoch; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<u64>,
    /// Keep the weights of every so many epochs for good, as `epoch-0010.safetensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<usize>,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self {
            every_epochs: 1,
            every_steps: None,
            keep_every: None,
        }
    }
}

/// What is written down while a run goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSpec {
    /// Updates a line of `metrics.jsonl`; 50 by default.
    pub every_steps: u64,
    /// Also write TensorBoard's files. On by default.
    pub tensorboard: bool,
}

impl Default for LogSpec {
    fn default() -> Self {
        Self {
            every_steps: 50,
            tensorboard: true,
        }
    }
}

/// Looks into the network: spectrum of the pooled covariance, distance of the layer's output to the
/// exact root, norm of the gradients of each stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiagnosticsSpec {
    /// Updates from one to the next.
    pub every_steps: u64,
    /// Images of the batch that are looked at; 4 by default.
    #[serde(default = "four")]
    pub images: usize,
}

fn four() -> usize {
    4
}

/// A spec, and where each of its values stands.
#[derive(Debug, Clone)]
pub struct SpecFile {
    /// What it says.
    pub spec: Spec,
    layers: Layers,
}

impl SpecFile {
    /// Reads a file with its parts and lays `settings` (`a.b=v`) over them.
    ///
    /// # Errors
    /// [`Error::Spec`] with file, line and key.
    pub fn read(path: &Path, settings: &[String]) -> Result<Self> {
        Self::read_on(path, settings, None)
    }

    /// The same with the images of this folder, archive or list.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_on(path: &Path, settings: &[String], data: Option<&str>) -> Result<Self> {
        let mut layers = Layers::read(path)?;
        for setting in settings {
            layers.set(setting)?;
        }
        if let Some(root) = data {
            layers.set_data(root);
        }
        let spec: Spec = layers.read_as()?;
        let this = Self { spec, layers };
        this.check()?;
        Ok(this)
    }

    /// An error about a key, with the place where it was set.
    #[must_use]
    pub fn problem(&self, key: &str, message: &str) -> Error {
        self.layers.problem(key, message)
    }

    /// An error of a setting with the place where it was set; others as they are.
    #[must_use]
    pub fn place(&self, error: Error) -> Error {
        match &error {
            Error::Config {
                what,
                value,
                expected,
            } => self.problem(what, &format!("is {value}: {expected}")),
            Error::Nn(isqrt_nn::Error::Option {
                what,
                value,
                expected,
            }) => self.problem(key_of(what), &format!("is {value}: {expected}")),
            Error::Model(isqrt_models::Error::Linalg(
                error @ isqrt_linalg::Error::Option { option, .. },
            )) => self.problem(
                &format!("model.representation.{option}"),
                &error.to_string(),
            ),
            Error::Model(error @ isqrt_models::Error::OnePosition { .. }) => {
                self.problem("model.backbone", &error.to_string())
            }
            Error::Model(error @ isqrt_models::Error::Unknown { what, .. }) => {
                self.problem(&format!("model.{what}"), &error.to_string())
            }
            Error::Model(isqrt_models::Error::Options { name, message }) => {
                let part = match &self.spec.model.backbone.name == name {
                    true => "model.backbone",
                    false => "model.representation",
                };
                self.problem(part, &format!("{name}: {message}"))
            }
            _ => error,
        }
    }

    /// The file of the weights to start from, if the spec names one; of a run's folder that of its result.
    ///
    /// # Errors
    /// [`Error::Spec`] where it is not there.
    pub fn start_weights(&self) -> Result<Option<PathBuf>> {
        let Some(start) = &self.spec.start else {
            return Ok(None);
        };
        let path = weights_file(&start.weights)
            .map_err(|error| self.problem("start.weights", &error.to_string()))?;
        match path.is_file() {
            true => Ok(Some(path)),
            false => Err(self.problem(
                "start.weights",
                &format!("is {}, and there is no such file", path.display()),
            )),
        }
    }

    fn check(&self) -> Result<()> {
        let Spec {
            data,
            evaluation,
            checkpoints,
            log,
            diagnostics,
            ..
        } = &self.spec;
        let problem = |key: &str, message: &str| Err(self.problem(key, message));
        // One class stands for those that the data have.
        let config = self.spec.config(1);
        config.check().map_err(|error| self.place(error))?;
        if data.set.is_some() && data.root.is_some() {
            return problem(
                "data.root",
                "and `data.set` are both given: say one of them where the images come from",
            );
        }
        let mut views = [1, 1];
        for (i, (key, transforms)) in [
            ("data.train_transforms", &data.train_transforms),
            ("data.eval_transforms", &data.eval_transforms),
        ]
        .into_iter()
        .enumerate()
        {
            match transforms.pipeline() {
                Err(error) => return problem(key, &error.to_string()),
                Ok(pipeline) if i == 1 && pipeline.is_random() => {
                    return problem(
                        key,
                        "changes images at random, which an evaluation must not",
                    );
                }
                Ok(pipeline) if pipeline.output_size().is_none() => {
                    return problem(
                        key,
                        "leaves images of different sizes, which make no batch: end it with a crop or a \
                         resize of both sides",
                    );
                }
                Ok(pipeline) => views[i] = pipeline.views(),
            }
        }
        if views[0] != 1 {
            return problem(
                "data.train_transforms",
                "makes several views of an image, which only an evaluation averages",
            );
        }
        if data.normalise == Normalise::Train && !data.in_memory {
            return problem(
                "data.normalise",
                "is \"train\", for which `data.in_memory = true` is needed",
            );
        }
        if let Some(percent) = data.skip_broken_percent
            && !(0.0..=100.0).contains(&percent)
        {
            return problem("data.skip_broken_percent", "must be between 0 and 100");
        }
        for (key, value) in [
            ("evaluation.every", Some(evaluation.every as u64)),
            ("evaluation.batch", evaluation.batch.map(|n| n as u64)),
            (
                "checkpoints.every_epochs",
                Some(checkpoints.every_epochs as u64),
            ),
            ("checkpoints.every_steps", checkpoints.every_steps),
            (
                "checkpoints.keep_every",
                checkpoints.keep_every.map(|n| n as u64),
            ),
            ("log.every_steps", Some(log.every_steps)),
            (
                "diagnostics.every_steps",
                diagnostics.as_ref().map(|d| d.every_steps),
            ),
            (
                "diagnostics.images",
                diagnostics.as_ref().map(|d| d.images as u64),
            ),
        ] {
            if value == Some(0) {
                return problem(key, "must be at least 1");
            }
        }
        if let Some(c) = evaluation.svm
            && !(c > 0.0 && c.is_finite())
        {
            return problem(
                "evaluation.svm",
                "must be a positive number, the C of the SVM",
            );
        }
        self.check_schedule()
    }

    /// A drop that never comes, or a warm-up that never ends, is a slip.
    fn check_schedule(&self) -> Result<()> {
        let epochs = self.spec.epochs as f64;
        let schedule = &self.spec.schedule;
        if schedule.warmup_epochs() >= epochs {
            return Err(self.problem(
                "schedule.warmup_epochs",
                &format!("must be less than `epochs`, {epochs}"),
            ));
        }
        if let Schedule::MultiStep { milestones, .. } = schedule {
            if !milestones.is_sorted() {
                return Err(self.problem("schedule.milestones", "must not fall"));
            }
            if milestones.first().is_some_and(|&first| first >= epochs) {
                return Err(self.problem(
                    "schedule.milestones",
                    &format!("are epochs, and all come after the last one, {epochs}"),
                ));
            }
        }
        Ok(())
    }
}

/// The key of an option that isqrt-nn names.
fn key_of(what: &str) -> &str {
    match what {
        "momentum" => "optimiser.momentum",
        "nesterov" => "optimiser.nesterov",
        "weight_decay" => "optimiser.weight_decay",
        "betas.0" | "betas.1" => "optimiser.betas",
        "epsilon" => "optimiser.epsilon",
        "group.pattern" | "group.lr_factor" | "group.decay_factor" => "groups",
        what => what,
    }
}

impl Spec {
    /// Leaves everything in it that a run can do, as short as it can be.
    pub fn shrink(&mut self) {
        self.epochs = 1;
        // A curve that begins with a warm-up may need more epochs than there are.
        self.schedule = isqrt_nn::Schedule::Constant { warmup_epochs: 0.0 };
        self.evaluation.every = 1;
        self.checkpoints.every_steps = Some(1);
        self.log.every_steps = 1;
        let diagnostics = DiagnosticsSpec {
            every_steps: 1,
            images: 1,
        };
        self.diagnostics.get_or_insert(diagnostics).every_steps = 1;
    }

    /// What the engine needs of it, for so many classes.
    #[must_use]
    pub fn config(&self, classes: usize) -> TrainConfig {
        TrainConfig {
            model: ModelSpec {
                classifier: self.model.classifier.clone(),
                ..ModelSpec::new(
                    self.model.backbone.clone(),
                    self.model.representation.clone(),
                    classes,
                )
            },
            epochs: self.epochs,
            batch: self.batch,
            accumulate: self.accumulate,
            optimiser: self.optimiser.clone(),
            schedule: self.schedule.clone(),
            groups: self.groups.clone(),
            frozen: self.model.frozen.clone(),
            frozen_norm: self.model.frozen_norm,
            label_smoothing: self.label_smoothing,
            clip_norm: self.clip_norm,
            ema: self.ema,
            precision: self.precision,
            gpu: self.gpu,
            non_finite: self.non_finite,
            seed: self.seed,
        }
    }

    /// How the images are listed.
    #[must_use]
    pub fn list_options(&self) -> ListOptions {
        ListOptions {
            labels: self.data.labels.clone(),
            ..ListOptions::default()
        }
    }

    /// The spec without where the images lie, for files that go from hand to hand.
    #[must_use]
    pub fn anywhere(&self) -> Self {
        let mut spec = self.clone();
        spec.data.root = None;
        spec
    }

    /// The whole spec as TOML.
    ///
    /// # Errors
    /// [`Error::Spec`] for what TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Spec {
            file: "spec.toml".to_owned(),
            line: None,
            key: String::new(),
            message: error.to_string(),
        })
    }

    /// SHA-256 of all that the results depend on: not of words for people, of where the images lie, of
    /// threads that prepare them, of what is kept and logged.
    ///
    /// # Errors
    /// As [`to_toml`](Self::to_toml).
    pub fn hash(&self) -> Result<String> {
        let hash = Sha256::digest(self.decisive().to_toml()?.as_bytes());
        Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Without what makes no difference to the weights.
    pub(crate) fn decisive(&self) -> Self {
        let mut plain = self.clone();
        for words in [&mut plain.title, &mut plain.source, &mut plain.note] {
            words.clear();
        }
        plain.data.root = None;
        plain.data.workers = None;
        plain.data.prefetch = two();
        plain.checkpoints = CheckpointSpec::default();
        plain.log = LogSpec::default();
        plain.diagnostics = None;
        plain.evaluation.svm = None;
        plain.evaluation.batch = None;
        plain
    }
}
