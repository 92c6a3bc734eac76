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
pub use size::{check_decomposition_size, check_size};

use isqrt_datasets::Pipeline;
use isqrt_models::BackboneSpec;
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
    /// Seeds of a training row: 0, 1, ... `seeds - 1`.
    pub seeds: u64,
    /// Shape and effort of the timing of the layer.
    pub layer: LayerSettings,
    /// Shape and effort of the timing of decompositions.
    pub decomposition: DecompositionSettings,
    /// How networks are trained, by the size of the images.
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

/// How a small network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Used when the images' shorter side is at most this.
    pub up_to_side: u32,
    /// What becomes of training images: the name of a preset (`isqrt data presets`) or a list of steps.
    pub train_transforms: Transforms,
    /// The same for the images that are evaluated on; nothing random, and inputs of the same size.
    pub eval_transforms: Transforms,
    /// Name in the registry of backbones, or a table with the name and its options.
    pub backbone: BackboneSpec,
    /// Passes over the training images.
    pub epochs: usize,
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
            up_to_side: u32::MAX,
            train_transforms: Transforms::Preset("small32-eval".to_owned()),
            eval_transforms: Transforms::Preset("small32-eval".to_owned()),
            backbone: BackboneSpec::new(""),
            epochs: 1,
            batch: 64,
            momentum: 0.9,
            weight_decay: 5e-4,
            seconds_per_1000: 0.2,
        }
    }
}

impl Recipe {
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
    /// Pairs of rate and validation error in percent, the whole grid.
    #[serde(default)]
    pub outcome: Vec<[f64; 2]>,
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
    /// The pooling head or the decomposition.
    #[serde(default)]
    pub head: Option<Head>,
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

/// A pooling head, or what takes its place in a timing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Which one.
    pub name: HeadName,
    /// Newton-Schulz steps of `isqrt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<usize>,
    /// Schedule of `isqrt` other than Newton-Schulz.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Minimax>,
    /// Steps of the minimax schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Lower bound of the square roots of the eigenvalues of `A` that matter, in (0, 1); the
    /// minimax schedule is made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lower: Option<f64>,
}

/// Names of heads and decompositions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadName {
    /// Global average pooling.
    #[default]
    Gap,
    /// Covariance without a root.
    Cov,
    /// iSQRT-COV.
    Isqrt,
    /// MPN-COV: exact root by eigendecomposition.
    Mpn,
    /// An eigendecomposition alone (timing only).
    Eig,
    /// A singular value decomposition alone (timing only).
    Svd,
}

/// Families of minimax schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Minimax {
    /// `T = aI + bM`.
    Cubic,
    /// `T = aI + bM + cM^2`.
    Quintic,
    /// `T` up to `M^4`.
    Nonic,
}

/// What is done with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Train a network with this head, once for each seed; metric `top1_error` in percent.
    Train,
    /// Time the layer; `forward_backward_ms`, `forward_ms`, `backward_ms` an image.
    LayerTime,
    /// Distance to the exact root and its gradient; `root_error`, `gradient_error`, `products`.
    RootError,
    /// Time one matrix and a batch; `single_ms`, `batch_ms` a matrix.
    DecompositionTime,
}

impl Measure {
    /// As written in TOML and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::LayerTime => "layer-time",
            Self::RootError => "root-error",
            Self::DecompositionTime => "decomposition-time",
        }
    }
}

/// A number of the paper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaperValue {
    /// Which of our metrics it stands beside.
    pub metric: String,
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
    /// Which metric.
    pub metric: String,
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
    /// Metrics drawn, one series each unless `rows` groups say otherwise.
    pub metrics: Vec<String>,
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
    /// Neighbours among the rows differ by no more than the spread.
    Plateau,
    /// None of `rows` has a larger metric than `than` by more than the spread.
    NoWorse,
    /// Each of `rows` reaches the final error of `than` in fewer epochs.
    FewerEpochs,
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

    /// The recipe for images whose shorter side is `side` pixels: the one with the smallest
    /// `up_to_side` that is large enough.
    pub fn recipe_for(&self, side: u32) -> Option<(&str, &Recipe)> {
        self.recipes
            .iter()
            .filter(|(_, r)| side <= r.up_to_side)
            .min_by_key(|(_, r)| r.up_to_side)
            .map(|(name, r)| (name.as_str(), r))
    }
}
