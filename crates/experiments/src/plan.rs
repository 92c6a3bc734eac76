//! From experiments to a list of cells: rows x measures x seeds.
//!
//! A cell's key is a hash of everything that decides its result: the resolved configuration, the
//! fingerprint of the data, [`PROTOCOL`], and for timings the machine. A cell whose key is among
//! the records is done. The commit is recorded but not part of the key, or every commit would throw
//! all results away; a change that alters results raises [`PROTOCOL`].

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::record::{DataInfo, Store};
use crate::spec::{
    DecompositionSettings, Experiment, Head, HeadName, LayerSettings, Measure, Recipe, Row,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Raised when the code changes in a way that changes results, so that no record from before is
/// shown as a result of the code after. What counts as such a change:
/// - kernels, ops or the order of their sums: timings change, and so do bits of outputs and
///   gradients, which after some epochs are other networks
/// - what is measured and how: repeats, warm-up, synthetic features, what a metric means
/// - training: initial weights, order, augmentation, optimiser, schedule, defaults that no recipe
///   names
///
/// What does not: texts, the report, the plan's estimates, and whatever stands in a cell's
/// configuration, which is part of its key anyway.
///
/// 2: blocked convolutions, AVX2 and nonic kernels, and an unrolled product loop.
pub const PROTOCOL: u32 = 2;

/// Seed of the learning-rate search, not among the seeds that are reported.
pub const SEARCH_SEED: u64 = 100;

/// Name of the plan in a run folder.
pub const FILE: &str = "plan.json";

/// How faithful a run is to the paper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Small networks on small data; minutes on a laptop.
    #[default]
    Mini,
    /// The paper's protocol on the paper's data.
    Paper,
}

impl Profile {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mini => "mini",
            Self::Paper => "paper",
        }
    }
}

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Which protocol.
    pub profile: Profile,
    /// Number of seeds instead of the experiment's.
    pub seeds: Option<u64>,
    /// Smallest size of everything, one seed.
    pub smoke: bool,
    /// Search the learning rates instead of using the recorded ones.
    pub search: bool,
    /// Run cells that are done again.
    pub fresh: bool,
}

/// What a cell does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measure", rename_all = "kebab-case")]
pub enum Work {
    /// Train a network and report its error on the test part.
    Train(Training),
    /// Train a network and report its error on the validation part.
    Search(Training),
    /// Time the layer.
    LayerTime {
        /// Which layer.
        head: Head,
        /// Shape and repeats.
        layer: LayerSettings,
    },
    /// Distance to the exact root and its gradient.
    RootError {
        /// Which layer.
        head: Head,
        /// Shape.
        layer: LayerSettings,
    },
    /// Time one matrix and a batch.
    DecompositionTime {
        /// Which decomposition, or the layer.
        head: Head,
        /// Shape and repeats.
        decomposition: DecompositionSettings,
    },
}

/// How a network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Its head.
    pub head: Head,
    /// Everything but the rate.
    pub recipe: Recipe,
    /// The learning rate; none while a search has yet to find it.
    pub lr: Option<f64>,
}

/// Where a cell stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// To be run.
    Todo,
    /// Among the records.
    Done,
    /// Not to be run, and why.
    NotRun(String),
}

/// One result to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Row id.
    pub row: String,
    /// Row as shown.
    pub label: String,
    /// What is measured for that row.
    pub measure: Measure,
    /// Of a training.
    pub seed: Option<u64>,
    /// What to do; none for a row that is not run.
    pub work: Option<Work>,
    /// Hash of what decides the result; empty while it is not known.
    pub key: String,
    /// Where it stands.
    pub state: State,
    /// How long it should take.
    pub seconds: f64,
}

impl Cell {
    /// Name of the cell in records and on screen.
    pub fn name(&self) -> String {
        match &self.work {
            Some(Work::Search(t)) => {
                format!("{}/search@{}", self.row, t.lr.unwrap_or(f64::NAN))
            }
            _ => format!("{}/{}", self.row, self.measure.name()),
        }
    }

    /// Whether the cell belongs to a learning-rate search.
    pub fn is_search(&self) -> bool {
        matches!(self.work, Some(Work::Search(_)))
    }
}

/// The cells of one experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Experiment id.
    pub id: String,
    /// The experiment, resolved.
    pub experiment: Experiment,
    /// In the order in which they run.
    pub cells: Vec<Cell>,
    /// The data of its trainings.
    pub data: Option<DataInfo>,
    /// Which protocol.
    pub profile: Profile,
    /// Smallest size only.
    pub smoke: bool,
    /// Whether rates come from a search in this run.
    pub search: bool,
    /// Command that runs this experiment again.
    pub command: String,
}

/// Everything that a run folder was asked to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// In the order of the report.
    pub experiments: Vec<Planned>,
}

impl Plan {
    /// Makes the plan of one request.
    ///
    /// # Errors
    /// [`Error::Spec`] where an experiment trains networks and has no recipe for the data.
    pub fn new(
        experiments: &[Experiment],
        request: &Request,
        data: Option<&DataInfo>,
        store: &Store,
        command: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let machine = Machine::here();
        let mut planned = Vec::new();
        for experiment in experiments {
            let mut p = Planned {
                id: experiment.id.clone(),
                experiment: experiment.clone(),
                cells: Vec::new(),
                data: data.filter(|_| needs_data(experiment, request)).cloned(),
                profile: request.profile,
                smoke: request.smoke,
                search: request.search && needs_data(experiment, request),
                command: command(&experiment.id),
            };
            if request.smoke {
                shrink(&mut p.experiment);
            }
            p.cells = cells(&p, request)?;
            for cell in &mut p.cells {
                cell.seconds = estimate(cell, p.data.as_ref(), store);
            }
            p.resolve(store, &machine, request.fresh);
            planned.push(p);
        }
        let mut plan = Self {
            experiments: planned,
        };
        plan.count_twins_once();
        Ok(plan)
    }

    /// Work that several experiments share is done by the first of them and costs the others
    /// nothing.
    fn count_twins_once(&mut self) {
        let mut seen = std::collections::BTreeSet::new();
        for cell in self.experiments.iter_mut().flat_map(|p| &mut p.cells) {
            if !cell.key.is_empty() && !seen.insert(cell.key.clone()) {
                cell.seconds = 0.0;
            }
        }
    }

    /// Seconds that the cells still to be run should take.
    pub fn seconds_left(&self) -> f64 {
        self.todo().map(|(_, c)| c.seconds).sum()
    }

    /// Cells still to be run, with their experiment.
    pub fn todo(&self) -> impl Iterator<Item = (&Planned, &Cell)> {
        self.experiments
            .iter()
            .flat_map(|p| p.cells.iter().map(move |c| (p, c)))
            .filter(|(_, c)| c.state == State::Todo)
    }

    /// Estimates the remaining cells again, now that more has been measured.
    pub fn estimate(&mut self, store: &Store) {
        for p in &mut self.experiments {
            for cell in p.cells.iter_mut().filter(|c| c.state == State::Todo) {
                cell.seconds = estimate(cell, p.data.as_ref(), store);
            }
        }
        self.count_twins_once();
    }

    /// Reads the plan of a run folder; a folder without one has an empty plan.
    ///
    /// # Errors
    /// [`Error::Io`] if the file is there and cannot be read or understood.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => {
                let mut plan: Self = serde_json::from_slice(&text)
                    .map_err(|e| Error::io("read", path)(std::io::Error::other(e)))?;
                for p in &mut plan.experiments {
                    p.experiment.id = p.id.clone();
                }
                Ok(plan)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(Error::io("read", path)(e)),
        }
    }

    /// Writes the plan into a run folder. Experiments that are there already and not part of this
    /// plan stay, so that one report shows them all.
    ///
    /// # Errors
    /// [`Error::Io`] as usual; a damaged older plan is replaced.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut all = Self::read(dir).unwrap_or_default();
        for p in &self.experiments {
            let same = |old: &&mut Planned| old.id == p.id;
            match all.experiments.iter_mut().find(same) {
                Some(old) => *old = p.clone(),
                None => all.experiments.push(p.clone()),
            }
        }
        all.experiments.sort_by_key(|p| p.id.clone());
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(&all)
            .map_err(|e| Error::io("write", &path)(std::io::Error::other(e)))?;
        crate::files::write_atomically(&path, &text)
    }
}

impl Planned {
    /// Fills in rates that searches have found, and with them keys and states.
    pub fn resolve(&mut self, store: &Store, machine: &Machine, fresh: bool) {
        let fingerprint = self.data.as_ref().map_or("", |d| d.fingerprint.as_str());
        for i in 0..self.cells.len() {
            let open = matches!(&self.cells[i].work, Some(Work::Train(t)) if t.lr.is_none());
            if open {
                let found = self.search_outcome(&self.cells[i].row, store);
                if let (Some(Work::Train(t)), Some((lr, _))) = (&mut self.cells[i].work, found) {
                    t.lr = Some(lr);
                }
            }
            let cell = &mut self.cells[i];
            let Some(work) = &cell.work else { continue };
            if matches!(work, Work::Train(t) if t.lr.is_none()) {
                continue;
            }
            if cell.key.is_empty() {
                cell.key = key(work, cell.seed, fingerprint, machine);
                if !fresh && store.latest(&cell.key).is_some() {
                    cell.state = State::Done;
                }
            }
        }
    }

    /// The rate with the smallest validation error for a row, and the whole grid, once every cell
    /// of its search is done.
    pub fn search_outcome(&self, row: &str, store: &Store) -> Option<(f64, Vec<[f64; 2]>)> {
        let mut grid = Vec::new();
        for cell in self.cells.iter().filter(|c| c.row == row) {
            if let Some(Work::Search(t)) = &cell.work {
                if cell.state != State::Done {
                    return None;
                }
                grid.push([t.lr?, store.latest(&cell.key)?.main.value]);
            }
        }
        // NaN, a diverged training, sorts last.
        let best = grid.iter().min_by(|a, b| a[1].total_cmp(&b[1]))?;
        Some((best[0], grid.clone()))
    }
}

/// Whether the request trains networks for this experiment.
pub fn needs_data(experiment: &Experiment, request: &Request) -> bool {
    request.profile == Profile::Mini
        && experiment
            .rows
            .iter()
            .any(|r| r.measures.contains(&Measure::Train))
}

fn cells(p: &Planned, request: &Request) -> Result<Vec<Cell>> {
    let mut cells = Vec::new();
    // Timings first: they are short, and nothing else should run beside them.
    let measures = [
        Measure::DecompositionTime,
        Measure::LayerTime,
        Measure::RootError,
        Measure::Train,
    ];
    for measure in measures {
        for row in &p.experiment.rows {
            if row.measures.contains(&measure) {
                cells.extend(row_cells(p, row, measure, request)?);
            }
        }
    }
    // The searches before the trainings that need their outcome.
    cells.sort_by_key(|c: &Cell| (c.measure == Measure::Train, !c.is_search()));
    Ok(cells)
}

fn row_cells(p: &Planned, row: &Row, measure: Measure, request: &Request) -> Result<Vec<Cell>> {
    let e = &p.experiment;
    let Some(head) = row.head.clone() else {
        return Ok(Vec::new());
    };
    let cell = |work: Option<Work>, seed, state| Cell {
        row: row.id.clone(),
        label: row.label.clone(),
        measure,
        seed,
        work,
        key: String::new(),
        state,
        seconds: 0.0,
    };
    let one = |work| Ok(vec![cell(Some(work), None, State::Todo)]);
    match measure {
        Measure::LayerTime => one(Work::LayerTime {
            head,
            layer: e.layer.clone(),
        }),
        Measure::RootError => one(Work::RootError {
            head,
            layer: e.layer.clone(),
        }),
        Measure::DecompositionTime => one(Work::DecompositionTime {
            head,
            decomposition: e.decomposition.clone(),
        }),
        Measure::Train if request.profile == Profile::Paper => {
            let why = "training in the paper profile needs ImageNet and a later version";
            Ok(vec![cell(None, None, State::NotRun(why.to_owned()))])
        }
        Measure::Train => {
            let data = p.data.as_ref().ok_or_else(|| Error::Spec {
                file: format!("{}.toml", e.id),
                line: None,
                message: "networks are trained, but there is no data".to_owned(),
            })?;
            let recipe = e.recipes.get(&data.recipe).ok_or_else(|| Error::Spec {
                file: format!("{}.toml", e.id),
                line: None,
                message: format!("there is no recipe `{}`", data.recipe),
            })?;
            if data.train < 2 {
                return Err(Error::Unsupported(format!(
                    "{}: {} training images; expected at least 2",
                    data.name, data.train
                )));
            }
            let mut recipe = recipe.clone();
            // Of fewer images than a batch holds, all make one; the cell's configuration says so.
            recipe.batch = recipe.batch.min(data.train);
            let rates = e.rates.get(&data.recipe).cloned().unwrap_or_default();
            let training = |lr| Training {
                head: head.clone(),
                recipe: recipe.clone(),
                lr,
            };
            let mut out = Vec::new();
            if request.search {
                for lr in &rates.grid {
                    let work = Work::Search(training(Some(*lr)));
                    out.push(cell(Some(work), Some(SEARCH_SEED), State::Todo));
                }
            }
            let recorded = rates.heads.get(&row.id).map_or(rates.fallback, |h| h.lr);
            let lr = (!request.search).then_some(recorded);
            let seeds = request.seeds.unwrap_or(e.seeds);
            let seeds = if request.smoke { 1 } else { seeds };
            for seed in 0..seeds {
                out.push(cell(
                    Some(Work::Train(training(lr))),
                    Some(seed),
                    State::Todo,
                ));
            }
            Ok(out)
        }
    }
}

/// The smallest size at which everything still runs.
fn shrink(e: &mut Experiment) {
    e.layer = LayerSettings {
        batch: 4,
        dim: 32,
        positions: 16,
        repeats: 3,
    };
    e.decomposition = DecompositionSettings {
        dim: 32,
        batch: 2,
        repeats: 3,
    };
    for recipe in e.recipes.values_mut() {
        recipe.epochs = 1;
        recipe.batch = 16;
    }
    for rates in e.rates.values_mut() {
        rates.grid.truncate(2);
    }
}

fn key(work: &Work, seed: Option<u64>, fingerprint: &str, machine: &Machine) -> String {
    let (data, machine) = match work {
        Work::Train(_) | Work::Search(_) => (fingerprint, None),
        Work::RootError { .. } => ("", None),
        Work::LayerTime { .. } | Work::DecompositionTime { .. } => {
            ("", Some((&machine.cpu, machine.cores, machine.threads)))
        }
    };
    let mut work = serde_json::to_value(work).unwrap_or_default();
    // A guess of the plan, which decides no result.
    if let Some(recipe) = work.get_mut("recipe").and_then(|r| r.as_object_mut()) {
        recipe.remove("seconds_per_1000");
        recipe.remove("up_to_side");
    }
    let text = serde_json::json!([PROTOCOL, work, seed, data, machine]).to_string();
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Seconds that a cell should take: the mean of like cells among the records; else a guess, scaled
/// by how wrong it was for the cells of the same kind so far.
fn estimate(cell: &Cell, data: Option<&DataInfo>, store: &Store) -> f64 {
    let Some(work) = &cell.work else { return 0.0 };
    let (mut alike, mut kind) = (Vec::new(), (0.0, 0.0));
    for record in store.records() {
        let Ok(theirs) = serde_json::from_value::<Work>(record.config.clone()) else {
            continue;
        };
        let trained = record.data.as_ref().map(|d| d.train);
        if same_cost(&theirs, work) && trained == trained_on(work, data) {
            alike.push(record.seconds);
        }
        if is_training(&theirs) == is_training(work) && record.smoke == is_smoke(work) {
            kind.0 += record.seconds;
            kind.1 += guess(&theirs, trained.unwrap_or(0));
        }
    }
    if !alike.is_empty() {
        return crate::stats::mean(&alike);
    }
    let scale = if kind.1 > 0.0 { kind.0 / kind.1 } else { 1.0 };
    guess(work, data.map_or(0, |d| d.train)) * scale
}

fn is_training(work: &Work) -> bool {
    matches!(work, Work::Train(_) | Work::Search(_))
}

/// Only for the estimate: tiny cells say nothing about the time of whole ones.
fn is_smoke(work: &Work) -> bool {
    match work {
        Work::Train(t) | Work::Search(t) => t.recipe.epochs <= 1,
        Work::LayerTime { layer, .. } | Work::RootError { layer, .. } => layer.dim <= 32,
        Work::DecompositionTime { decomposition, .. } => decomposition.dim <= 32,
    }
}

/// A first guess, from what a 4-core machine took.
fn guess(work: &Work, images: usize) -> f64 {
    match work {
        Work::Train(t) | Work::Search(t) => {
            let seen = (images * t.recipe.epochs) as f64;
            let head = if t.head.name == HeadName::Mpn {
                2.0
            } else {
                1.0
            };
            0.2 + t.recipe.seconds_per_1000 * head * seen / 1000.0
        }
        Work::LayerTime { head, layer } => {
            let slow = if head.name == HeadName::Mpn {
                10.0
            } else {
                1.0
            };
            0.1 + layer.repeats as f64 * slow * layer_flops(layer.batch, layer.dim) / 2e11
        }
        Work::RootError { layer, .. } => 0.1 + layer_flops(8, layer.dim) / 5e9,
        Work::DecompositionTime {
            decomposition: d, ..
        } => 0.1 + d.repeats as f64 * layer_flops(d.batch + 1, d.dim) / 5e10,
    }
}

/// About thirty products of two matrices an image.
fn layer_flops(batch: usize, dim: usize) -> f64 {
    30.0 * 2.0 * batch as f64 * (dim as f64).powi(3)
}

fn trained_on(work: &Work, data: Option<&DataInfo>) -> Option<usize> {
    matches!(work, Work::Train(_) | Work::Search(_))
        .then(|| data.map(|d| d.train))
        .flatten()
}

/// Same work but for the rate, which costs nothing.
fn same_cost(a: &Work, b: &Work) -> bool {
    match (a, b) {
        (Work::Train(a) | Work::Search(a), Work::Train(b) | Work::Search(b)) => {
            a.head == b.head && a.recipe == b.recipe
        }
        _ => a == b,
    }
}
