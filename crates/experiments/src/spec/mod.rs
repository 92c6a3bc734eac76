//! What an experiment may say.
//!
//! One TOML file is one table or figure of the paper: `rows` (the methods), what is measured for
//! each (`measures`), the paper's values with their source, the `columns` of the table, the
//! `figures` and the `claims` that are checked against the numbers. Parts shared by several files
//! live in `_base/` and are named in `extends`. See `docs/reproducing.md` for a worked example.

mod embedded;
mod load;
mod size;

pub use load::Library;
pub(crate) use load::schedule;
pub use size::{check_decomposition_size, check_size};

use isqrt_datasets::Pipeline;
use isqrt_models::{BackboneSpec, RepresentationSpec};
pub use isqrt_train::Transforms;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One table or figure of the paper.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Experiment {
    /// The file's name without `.toml`.
    #[serde(skip)]
    pub id: String,
    /// Parts to start from, as paths below `experiments/`; later ones win, this file wins over all.
    pub extends: Vec<String>,
    /// Heading in the report.
    pub title: String,
    /// Which table or figure of the paper this is.
    pub paper_item: String,
    /// One or two sentences: what is measured, and on what.
    pub about: String,
    /// What a reader must know before comparing our column with the paper's.
    pub caveat: String,
    /// The same where the images are the program's own.
    pub own_caveat: String,
    /// Place in the report; experiments of one place stand by name.
    pub order: u32,
    /// Seeds of a training row: 0, 1, ... `seeds - 1`.
    pub seeds: u64,
    /// Recipes that every training row goes through, each on the data set that it names.
    pub train_on: Vec<String>,
    /// Shape and effort of the timing of the layer.
    pub layer: LayerSettings,
    /// Shape and effort of the timing of decompositions.
    pub decomposition: DecompositionSettings,
    /// Network, images and effort of the timing of whole networks.
    pub network: NetworkSettings,
    /// Sizes at which time and memory of the layer are measured.
    pub scaling: ScalingSettings,
    /// How small networks are trained, and on what.
    pub recipes: BTreeMap<String, Recipe>,
    /// Learning rates found by a search, by recipe.
    pub rates: BTreeMap<String, Rates>,
    /// The methods.
    pub rows: Vec<Row>,
    /// What the table shows for each row.
    pub columns: Vec<Column>,
    /// Plots.
    pub figures: Vec<Figure>,
    /// What the paper says, in a form that numbers can decide.
    pub claims: Vec<Claim>,
}

/// Shape and effort of one timing of the layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerSettings {
    /// Images in a batch.
    pub batch: usize,
    /// Channels `d`.
    pub dim: usize,
    /// Positions `M = h * w`.
    pub positions: usize,
    /// Timed repeats; the median is reported.
    pub repeats: usize,
}

impl Default for LayerSettings {
    fn default() -> Self {
        Self {
            batch: 32,
            dim: 256,
            positions: 196,
            repeats: 9,
        }
    }
}

/// Shape and effort of one timing of an eigen- or singular value decomposition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecompositionSettings {
    /// Side of the covariance matrix.
    pub dim: usize,
    /// Matrices in the batched case.
    pub batch: usize,
    /// Timed repeats; the median is reported.
    pub repeats: usize,
}

impl Default for DecompositionSettings {
    fn default() -> Self {
        Self {
            dim: 256,
            batch: 16,
            repeats: 9,
        }
    }
}

/// A whole network with the head of a row, and what it is fed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// Name in the registry of backbones, or a table with the name and its options.
    pub backbone: BackboneSpec,
    /// Side of the images.
    pub side: usize,
    /// Classes.
    pub classes: usize,
    /// Images at once.
    pub batch: usize,
    /// Timed repeats; the median is reported.
    pub repeats: usize,
    /// Numbers of images at once of a throughput.
    pub batches: Vec<usize>,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            backbone: BackboneSpec::new(""),
            side: 224,
            classes: 1000,
            batch: 8,
            repeats: 3,
            batches: Vec::new(),
        }
    }
}

/// Sizes around one in the middle: in each series one of the four grows and the others stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScalingSettings {
    /// Channels `d`.
    pub dims: Vec<usize>,
    /// Positions `M`.
    pub positions: Vec<usize>,
    /// Images `B`.
    pub batches: Vec<usize>,
    /// Steps `N`.
    pub iterations: Vec<usize>,
    /// Timed repeats; the median is reported.
    pub repeats: usize,
}

impl Default for ScalingSettings {
    fn default() -> Self {
        Self {
            dims: vec![64, 128, 256, 512],
            positions: vec![16, 49, 196, 784],
            batches: vec![1, 4, 16, 64],
            iterations: vec![1, 2, 3, 5, 7, 10],
            repeats: 3,
        }
    }
}

impl ScalingSettings {
    /// Images, channels, positions and steps where none of them grows.
    pub const MIDDLE: [usize; 4] = [8, 256, 196, 5];

    /// Name, place in [`Self::MIDDLE`] and values of each series.
    pub fn series(&self) -> [(&'static str, usize, &[usize]); 4] {
        [
            ("B", 0, &self.batches),
            ("d", 1, &self.dims),
            ("M", 2, &self.positions),
            ("N", 3, &self.iterations),
        ]
    }

    /// All sizes: images, channels, positions, steps.
    pub fn sizes(&self) -> impl Iterator<Item = [usize; 4]> {
        self.series().into_iter().flat_map(|(_, place, values)| {
            values.iter().map(move |value| {
                let mut size = Self::MIDDLE;
                size[place] = *value;
                size
            })
        })
    }
}

/// How a small network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Which of the program's own data sets (`isqrt_datasets::textures`) it is for; none for images
    /// that the user brings.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// For images that the user brings: used when their shorter side is at most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_to_side: Option<u32>,
    /// The recipe that a network of the same backbone is trained with first; its weights, without
    /// the classifier, are where this training starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// What becomes of training images: the name of a preset (`isqrt data presets`) or a list of steps.
    pub train_transforms: Transforms,
    /// The same for the images that are evaluated on; nothing random, and inputs of the same size.
    pub eval_transforms: Transforms,
    /// Name in the registry of backbones, or a table with the name and its options.
    pub backbone: BackboneSpec,
    /// Passes over the training images.
    pub epochs: usize,
    /// Updates at least: a set too small for so many in `epochs` is seen for more, and looked at as much
    /// less often.
    #[serde(skip_serializing_if = "is_zero")]
    pub updates: usize,
    /// Epochs from one look at the images that errors are reported on to the next; the last has one always.
    pub eval_every: usize,
    /// Images in a step.
    pub batch: usize,
    /// Of SGD.
    pub momentum: f64,
    /// On weights only.
    pub weight_decay: f64,
    /// Seconds for a thousand images seen in training, on a 4-core machine: the plan's first guess,
    /// replaced by measured times as soon as there are any.
    pub seconds_per_1000: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            data: String::new(),
            up_to_side: None,
            start: None,
            train_transforms: Transforms::Preset("small32-eval".to_owned()),
            eval_transforms: Transforms::Preset("small32-eval".to_owned()),
            backbone: BackboneSpec::new(""),
            epochs: 1,
            updates: 0,
            eval_every: 1,
            batch: 64,
            momentum: 0.9,
            weight_decay: 5e-4,
            seconds_per_1000: 0.2,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Recipe {
    /// As it is run on so many training images: no batch is larger than all of them, and there are at
    /// least so many [`updates`](Self::updates).
    pub fn fit(&mut self, images: usize) {
        self.batch = self.batch.min(images).max(1);
        let epochs = self.updates.div_ceil((images / self.batch).max(1));
        if epochs > self.epochs {
            self.eval_every = (self.eval_every * epochs).div_ceil(self.epochs);
            self.epochs = epochs;
        }
        self.updates = 0;
    }

    /// What becomes of images in training and in evaluation.
    pub fn transforms(&self) -> [&Transforms; 2] {
        [&self.train_transforms, &self.eval_transforms]
    }

    /// Pipelines of training and of evaluation, and the side of their square inputs.
    ///
    /// # Errors
    /// A sentence where they do not fit each other.
    pub fn pipelines(&self) -> std::result::Result<(Pipeline, Pipeline, u32), String> {
        let get = |transforms: &Transforms| transforms.pipeline().map_err(|e| e.to_string());
        let train = get(&self.train_transforms)?;
        let eval = get(&self.eval_transforms)?;
        if eval.is_random() || eval.views() != 1 || train.views() != 1 {
            return Err(
                "`eval_transforms` must not be random, and neither may make several views".into(),
            );
        }
        // Images are kept in memory as they are before the first random step.
        if train.split_random().0.output_size() != eval.output_size() {
            return Err("the steps of `train_transforms` before the first random one must bring images to \
                        the size that `eval_transforms` gives, since they are kept in memory like that"
                .into());
        }
        match (train.output_size(), eval.output_size()) {
            (Some((height, width)), Some(other)) if height == width && other == (height, width) => {
                Ok((train, eval, height as u32))
            }
            (of_train, of_eval) => Err(format!(
                "`train_transforms` and `eval_transforms` must give squares of one size, and they give \
                 {of_train:?} and {of_eval:?} (rows, columns)"
            )),
        }
    }
}

/// The outcome of a learning-rate search for one recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// How and where it was found.
    pub note: String,
    /// Rates that a search tries.
    pub grid: Vec<f64>,
    /// Rate of a head that was not searched.
    pub fallback: f64,
    /// By row id.
    pub heads: BTreeMap<String, HeadRate>,
}

/// The learning rate of one head and what the search saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadRate {
    /// The chosen rate.
    pub lr: f64,
    /// Pairs of rate and validation error in percent, the whole grid; not a number where it diverged.
    #[serde(default, deserialize_with = "nan_if_null")]
    pub outcome: Vec<[f64; 2]>,
}

/// JSON has no number for what diverged and null in its place.
fn nan_if_null<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<[f64; 2]>, D::Error> {
    let pairs = Vec::<[Option<f64>; 2]>::deserialize(d)?;
    let numbers = pairs
        .into_iter()
        .map(|pair| pair.map(|v| v.unwrap_or(f64::NAN)));
    Ok(numbers.collect())
}

/// One method, one line of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Short name, unique in the experiment; used in records and on the command line.
    pub id: String,
    /// As shown.
    pub label: String,
    /// Place on the x axis of figures.
    #[serde(default)]
    pub x: Option<f64>,
    /// The pooling head as a network's spec has it, or `eig` and `svd` for the timing of a bare
    /// decomposition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<RepresentationSpec>,
    /// Backbone instead of the recipe's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backbone: Option<BackboneSpec>,
    /// Head of the network that a fine-tuning starts from, where it is another than the row's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_head: Option<RepresentationSpec>,
    /// What the row is trained with in the paper profile: files of `isqrt train` below
    /// `experiments/`, by the folder below the data root that they need.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub paper_runs: BTreeMap<String, String>,
    /// What is measured; empty if nothing is.
    #[serde(default)]
    pub measures: Vec<Measure>,
    /// Why nothing is measured.
    #[serde(default)]
    pub not_run: Option<String>,
    /// What the paper says about this row.
    #[serde(default)]
    pub paper: Vec<PaperValue>,
}

/// What is done with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Train a network with this head, once for each seed and recipe; `top1_error`, `top5_error` and
    /// `accuracy` in percent, `train_seconds`.
    Train,
    /// Time the layer; `forward_backward_ms`, `forward_ms`, `backward_ms` an image.
    LayerTime,
    /// Distance to the exact root and its gradient; `root_error`, `gradient_error`, `products`.
    RootError,
    /// Time one matrix and a batch; `single_ms`, `batch_ms` a matrix.
    DecompositionTime,
    /// Time a whole network with this head; `network_ms`, `network_forward_ms` an image.
    NetworkTime,
    /// Images a second, forward and backward, of a whole network, for each batch on one thread and
    /// on all: `images_per_s:BATCH:1` and `images_per_s:BATCH:all`.
    Throughput,
    /// Time and memory of the layer at growing sizes: `ms:d=64`, ..., and the exponents of fitted
    /// powers, `exponent:d`, ...; `memory:d=64`, ... and `memory_exponent:d`, ...
    Scaling,
    /// Distance of results in single precision from double precision; `f32_error`,
    /// `f32_gradient_error`.
    Precision,
    /// What the layer is and does, found out by running it: `forward_by`, `backward_by` (words),
    /// `gradient_check`, `thread_gain`.
    Abilities,
}

impl Measure {
    /// As written in TOML and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::LayerTime => "layer-time",
            Self::RootError => "root-error",
            Self::DecompositionTime => "decomposition-time",
            Self::NetworkTime => "network-time",
            Self::Throughput => "throughput",
            Self::Scaling => "scaling",
            Self::Precision => "precision",
            Self::Abilities => "abilities",
        }
    }

    /// Its metrics; those that end in a colon go on with a size, or with the id of a row.
    pub fn metrics(self) -> &'static [&'static str] {
        match self {
            Self::Train => &[
                "top1_error",
                "top5_error",
                "accuracy",
                "correct",
                "parameters",
                "train_seconds",
                "svm_error",
                "epochs_to:",
                "seconds_to:",
            ],
            Self::LayerTime => &["forward_backward_ms", "forward_ms", "backward_ms"],
            Self::RootError => &["root_error", "gradient_error", "products"],
            Self::DecompositionTime => &["single_ms", "batch_ms"],
            Self::NetworkTime => &["network_ms", "network_forward_ms", "parameters"],
            Self::Throughput => &["images_per_s:"],
            Self::Scaling => &["ms:", "memory:", "exponent:", "memory_exponent:"],
            Self::Precision => &["f32_error", "f32_gradient_error"],
            Self::Abilities => &["forward_by", "backward_by", "gradient_check", "thread_gain"],
        }
    }
}

/// A metric as it stands in [`Measure::metrics`], up to and with a colon, and what follows that.
pub(crate) fn metric_kind(metric: &str) -> (&str, &str) {
    metric.split_at(metric.find(':').map_or(metric.len(), |at| at + 1))
}

/// A number of the paper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaperValue {
    /// Which of our metrics it stands beside.
    pub metric: String,
    /// Of which recipe, where rows are trained with several.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// The number, in the unit of the metric.
    pub value: f64,
    /// Where it was measured, when the paper gives several; each becomes a column.
    #[serde(default)]
    pub setting: String,
    /// Where the number comes from.
    pub source: String,
    /// Whether it was checked against that source; otherwise it is shown as unverified.
    #[serde(default)]
    pub verified: bool,
}

/// A column of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Which metric. `epochs_to:ROW` and `seconds_to:ROW` are those until the error that ROW ends with is
    /// reached, seed by seed.
    pub metric: String,
    /// Of which recipe, where rows are trained with several.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// Heading.
    pub label: String,
    /// Unit, as shown.
    #[serde(default)]
    pub unit: String,
    /// Digits after the point; without it, three significant digits.
    #[serde(default)]
    pub digits: Option<usize>,
}

/// A plot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Heading.
    pub title: String,
    /// What is drawn.
    pub kind: FigureKind,
    /// Metrics drawn, one series each; for `sweep` the points of each row's curve.
    pub metrics: Vec<String>,
    /// Places of the metrics of a `sweep` on the x axis.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<f64>,
    /// Of which recipe, where rows are trained with several.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// Rows on the curve, in order (for `x`), or the rows to compare (for `epochs` and `bars`).
    pub rows: Vec<String>,
    /// A second curve of other rows (for `x`), such as other schedules.
    #[serde(default)]
    pub also: Vec<String>,
    /// Name of the curve of `rows`.
    #[serde(default)]
    pub label: String,
    /// Name of the curve of `also`.
    #[serde(default)]
    pub also_label: String,
    /// Rows drawn as level lines.
    #[serde(default)]
    pub levels: Vec<String>,
    /// Text of the x axis.
    pub x_label: String,
    /// Text of the y axis, with the unit.
    pub y_label: String,
    /// Logarithmic y axis.
    #[serde(default)]
    pub log: bool,
    /// Logarithmic x axis.
    #[serde(default)]
    pub log_x: bool,
}

/// Kinds of plots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FigureKind {
    /// A metric against the rows' `x`.
    X,
    /// Error on the evaluation images against the epoch.
    Epochs,
    /// A metric as a bar for each row.
    Bars,
    /// Several metrics of each row as a curve.
    Sweep,
}

/// A sentence of the paper in a form that numbers can decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The sentence.
    pub text: String,
    /// How it is decided.
    pub kind: ClaimKind,
    /// Metric that is compared; less is better.
    pub metric: String,
    /// Of which recipe; without it, all that rows are trained with, pair by pair.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// Rows that should come out better, or that should form the plateau.
    pub rows: Vec<String>,
    /// Row that should come out worse; unused by `plateau`.
    #[serde(default)]
    pub than: String,
}

/// How a claim is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimKind {
    /// Each of `rows` has a smaller metric than `than`.
    Less,
    /// Neighbours among the rows are not told apart.
    Plateau,
    /// None of `rows` has a larger metric than `than`, as far as can be told.
    NoWorse,
    /// Each of `rows` reaches the final error of `than` in fewer epochs.
    FewerEpochs,
}

impl Row {
    /// The paper's number: that without a setting, or the first where it gives several.
    pub fn paper_value(&self, metric: &str, on: &str) -> Option<&PaperValue> {
        let mut values: Vec<&PaperValue> = (self.paper.iter())
            .filter(|p| p.metric == metric && (p.on.is_empty() || on.is_empty() || p.on == on))
            .collect();
        values.sort_by_key(|p| !p.setting.is_empty());
        values.first().copied()
    }
}

impl Experiment {
    /// The row with this id.
    pub fn row(&self, id: &str) -> Option<&Row> {
        self.rows.iter().find(|r| r.id == id)
    }

    /// The column of this metric.
    pub fn column(&self, metric: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.metric == metric)
    }

    /// Repeats of all timings.
    pub(crate) fn repeats(&mut self) -> [&mut usize; 4] {
        [
            &mut self.layer.repeats,
            &mut self.decomposition.repeats,
            &mut self.network.repeats,
            &mut self.scaling.repeats,
        ]
    }

    /// Whether some row is trained.
    pub fn trains(&self) -> bool {
        self.rows
            .iter()
            .any(|r| r.measures.contains(&Measure::Train))
    }

    /// Whether rows are trained from initial weights, as they can be on anybody's images.
    pub fn from_scratch(&self) -> bool {
        self.train_on
            .iter()
            .all(|name| self.recipes.get(name).is_some_and(|r| r.start.is_none()))
    }

    /// The recipe for images of the user's whose shorter side is `side` pixels: the one with the
    /// smallest `up_to_side` that is large enough.
    pub fn recipe_for(&self, side: u32) -> Option<(&str, &Recipe)> {
        self.recipes
            .iter()
            .filter_map(|(name, r)| Some((r.up_to_side.filter(|most| side <= *most)?, name, r)))
            .min_by_key(|(most, ..)| *most)
            .map(|(_, name, r)| (name.as_str(), r))
    }
}
