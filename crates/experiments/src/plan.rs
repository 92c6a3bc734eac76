//! From experiments to a list of cells: rows x measures x recipes x seeds.
//!
//! A cell's key is a hash of everything that decides its result: the resolved configuration, the
//! fingerprint of the data, [`PROTOCOL`], and for timings the machine. A cell whose key is among
//! the records is done. The commit is recorded but not part of the key, or every commit would throw
//! all results away; a change that alters results raises [`PROTOCOL`].

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::record::{DataInfo, Record, Store};
use crate::run::paper;
use crate::spec::{
    DecompositionSettings, Experiment, LayerSettings, Measure, NetworkSettings, Recipe, Row,
    ScalingSettings,
};
use isqrt_models::RepresentationSpec;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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
/// 3: trainings side by side on one thread each; heads by their names in the registry.
/// 4: candle's own threads are left out.
pub const PROTOCOL: u32 = 4;

/// Seed of the learning-rate search, not among the seeds that are reported.
pub const SEARCH_SEED: u64 = 100;

/// Why a row is not run that was not asked for.
pub const LEFT_OUT: &str = "left out by --row";

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

/// How much time the mini profile takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// A sixth of the epochs, three seeds at most, fewest repeats: a look at everything.
    Quick,
    /// As the experiments say.
    #[default]
    Usual,
    /// Twice the epochs, two seeds more.
    Thorough,
}

/// What the user asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Which protocol.
    pub profile: Profile,
    /// How long.
    pub effort: Effort,
    /// Number of seeds instead of the experiment's.
    pub seeds: Option<u64>,
    /// Smallest size of everything, one seed.
    pub smoke: bool,
    /// Search the learning rates instead of using the recorded ones.
    pub search: bool,
    /// Run cells that are done again.
    pub fresh: bool,
    /// Only these rows; all if there are none.
    pub rows: Vec<String>,
    /// For the paper profile: where the data sets are, each in a folder of its name, with start weights in
    /// `weights/`.
    pub root: Option<PathBuf>,
    /// For the paper profile: where the recipes are, see [`crate::spec::Library::write`].
    pub specs: PathBuf,
    /// Where the work is done, if that is not the CPU of this machine: timings of another device are others.
    pub machine: Option<Machine>,
}

impl Request {
    /// The machine that does the work.
    pub fn machine(&self) -> Machine {
        self.machine.clone().unwrap_or_else(Machine::here)
    }
}

/// What is known of the images of a plan.
#[derive(Clone, Debug, Default)]
pub struct Infos {
    /// The program's own, by recipe.
    pub own: BTreeMap<String, DataInfo>,
    /// Those that the user has brought, with their recipe; networks are trained on them alone then.
    pub users: Option<DataInfo>,
    /// Whether the user has brought some at all: where none of the experiments can take them, they are not
    /// opened.
    pub brought: bool,
}

/// What a cell does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measure", rename_all = "kebab-case")]
pub enum Work {
    /// Train a network and report its error on the test part.
    Train(Training),
    /// Train a network and report its error on the validation part.
    Search(Training),
    /// Train a network, report its error on the test part, and keep it for others to start from.
    Pretrain(Training),
    /// Time the layer.
    LayerTime {
        /// Which layer.
        head: RepresentationSpec,
        /// Shape and repeats.
        layer: LayerSettings,
    },
    /// Distance to the exact root and its gradient.
    RootError {
        /// Which layer.
        head: RepresentationSpec,
        /// Shape.
        layer: LayerSettings,
    },
    /// Distance of single from double precision.
    Precision {
        /// Which layer.
        head: RepresentationSpec,
        /// Shape.
        layer: LayerSettings,
    },
    /// What the layer is and does.
    Abilities {
        /// Which layer.
        head: RepresentationSpec,
        /// Shape.
        layer: LayerSettings,
    },
    /// Time one matrix and a batch.
    DecompositionTime {
        /// Which decomposition, or the layer.
        head: RepresentationSpec,
        /// Shape and repeats.
        decomposition: DecompositionSettings,
    },
    /// Time a whole network.
    NetworkTime {
        /// Its head.
        head: RepresentationSpec,
        /// The rest of it, and its input.
        network: NetworkSettings,
    },
    /// Images a second of a whole network.
    Throughput {
        /// Its head.
        head: RepresentationSpec,
        /// The rest of it, and its input.
        network: NetworkSettings,
    },
    /// Time and memory at growing sizes.
    Scaling {
        /// Which layer.
        head: RepresentationSpec,
        /// Sizes and repeats.
        scaling: ScalingSettings,
    },
    /// Train as a file of `isqrt train` says, on the paper's data.
    PaperRun(paper::Run),
}

/// How a network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Its head.
    pub head: RepresentationSpec,
    /// Everything but the rate.
    pub recipe: Recipe,
    /// The learning rate; none while a search has yet to find it.
    pub lr: Option<f64>,
    /// Head of the network that this one starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_head: Option<RepresentationSpec>,
    /// Key of the cell that makes that network; empty while it is not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub start: String,
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
    /// Recipe of a training, or the data set of a run of the paper profile.
    #[serde(default)]
    pub on: String,
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
        let on = match self.on.as_str() {
            "" => String::new(),
            on => format!(" on {on}"),
        };
        match &self.work {
            Some(Work::Search(t)) => {
                format!("{}/search@{}{on}", self.row, t.lr.unwrap_or(f64::NAN))
            }
            Some(Work::Pretrain(_)) => format!("{}/pretrain{on}", self.row),
            _ => format!("{}/{}{on}", self.row, self.measure.name()),
        }
    }

    /// Whether the cell belongs to a learning-rate search.
    pub fn is_search(&self) -> bool {
        matches!(self.work, Some(Work::Search(_)))
    }

    /// Whether the cell is a training of the mini profile, which has a thread to itself beside others.
    pub fn is_training(&self) -> bool {
        self.work.as_ref().is_some_and(|w| w.training().is_some())
    }

    /// Whether its number stands in the table: not that of a search, nor of a network that others start from.
    pub fn is_shown(&self) -> bool {
        !matches!(self.work, Some(Work::Search(_) | Work::Pretrain(_)))
    }
}

impl Work {
    /// How a network is trained, if one is.
    pub fn training(&self) -> Option<&Training> {
        match self {
            Self::Train(t) | Self::Search(t) | Self::Pretrain(t) => Some(t),
            _ => None,
        }
    }

    fn training_mut(&mut self) -> Option<&mut Training> {
        match self {
            Self::Train(t) | Self::Search(t) | Self::Pretrain(t) => Some(t),
            _ => None,
        }
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
    /// The data of its trainings, by recipe.
    pub data: BTreeMap<String, DataInfo>,
    /// Which protocol.
    pub profile: Profile,
    /// How long.
    #[serde(default)]
    pub effort: Effort,
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
        data: &Infos,
        store: &Store,
        command: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let machine = request.machine();
        let known = known(store);
        let mut planned = Vec::new();
        for experiment in experiments {
            let trains = needs_data(experiment, request);
            let mut p = Planned {
                id: experiment.id.clone(),
                experiment: experiment.clone(),
                cells: Vec::new(),
                data: BTreeMap::new(),
                profile: request.profile,
                effort: request.effort,
                smoke: request.smoke,
                search: request.search && trains,
                command: command(&experiment.id),
            };
            if trains {
                p.data = data_of(experiment, data);
            }
            apply(&mut p.experiment, request);
            p.cells = cells(&p, request, data.brought)?;
            for cell in &mut p.cells {
                cell.seconds = estimate(cell, &p.data, &known);
            }
            p.resolve(store, &machine, request.fresh);
            p.leave_out(&request.rows, store);
            planned.push(p);
        }
        let mut plan = Self {
            experiments: planned,
        };
        plan.count_twins_once();
        Ok(plan)
    }

    /// Work that several cells share is done once and costs the others nothing.
    fn count_twins_once(&mut self) {
        let mut seen = BTreeSet::new();
        for cell in self.experiments.iter_mut().flat_map(|p| &mut p.cells) {
            if !cell.key.is_empty() && !seen.insert(cell.key.clone()) {
                cell.seconds = 0.0;
            }
        }
    }

    /// Seconds that the cells still to be run should take, trainings side by side on so many threads.
    pub fn seconds_left(&self, threads: usize) -> f64 {
        let (mut alone, mut beside, mut longest) = (0.0, 0.0, 0.0_f64);
        for (_, cell) in self.todo() {
            if cell.is_training() {
                beside += cell.seconds;
                longest = longest.max(cell.seconds);
            } else {
                alone += cell.seconds;
            }
        }
        alone + (beside / threads.max(1) as f64).max(longest)
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
        let known = known(store);
        for p in &mut self.experiments {
            for cell in p.cells.iter_mut().filter(|c| c.state == State::Todo) {
                cell.seconds = estimate(cell, &p.data, &known);
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
        all.experiments
            .sort_by_key(|p| (p.experiment.order, p.id.clone()));
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(&all)
            .map_err(|e| Error::io("write", &path)(std::io::Error::other(e)))?;
        crate::files::write_atomically(&path, &text)
    }
}

impl Planned {
    /// Fills in rates that searches have found and the networks that trainings start from, and with
    /// them keys and states.
    pub fn resolve(&mut self, store: &Store, machine: &Machine, fresh: bool) {
        for i in 0..self.cells.len() {
            if !self.cells[i].key.is_empty() {
                continue;
            }
            let found = match &self.cells[i].work {
                Some(Work::Train(t) | Work::Pretrain(t)) if t.lr.is_none() => {
                    let (row, on) = (&self.cells[i].row, &self.cells[i].on);
                    self.search_outcome(row, on, store).map(|(lr, _)| lr)
                }
                _ => None,
            };
            let start = self.start_of(&self.cells[i]);
            let cell = &mut self.cells[i];
            // Images that are not written yet have a name alone, for a plan.
            let of = |d: &DataInfo| match d.fingerprint.is_empty() {
                true => d.name.clone(),
                false => d.fingerprint.clone(),
            };
            let fingerprint = self.data.get(&cell.on).map_or_else(String::new, of);
            let Some(work) = &mut cell.work else { continue };
            if let Some(t) = work.training_mut() {
                t.lr = t.lr.or(found);
                if let Some(key) = start {
                    t.start = key;
                }
                if t.lr.is_none() || (t.recipe.start.is_some() && t.start.is_empty()) {
                    continue;
                }
            }
            cell.key = key(work, cell.seed, &fingerprint, machine);
            if !fresh && store.latest(&cell.key).is_some() {
                cell.state = State::Done;
            }
        }
    }

    /// Of other rows than these only what is done is shown, and the networks that these start from are made.
    fn leave_out(&mut self, rows: &[String], store: &Store) {
        if rows.is_empty() {
            return;
        }
        let wanted = |cell: &Cell| rows.contains(&cell.row);
        let starts: BTreeSet<String> = (self.cells.iter().filter(|c| wanted(c)))
            .filter_map(|c| Some(c.work.as_ref()?.training()?.start.clone()))
            .filter(|start| !start.is_empty())
            .collect();
        for cell in &mut self.cells {
            if cell.state == State::Todo && !wanted(cell) && !starts.contains(&cell.key) {
                cell.state = match store.latest(&cell.key) {
                    Some(_) => State::Done,
                    None => State::NotRun(LEFT_OUT.to_owned()),
                };
            }
        }
    }

    /// Key of the cell that makes the network which this one starts from.
    fn start_of(&self, cell: &Cell) -> Option<String> {
        let t = cell.work.as_ref()?.training()?;
        let (recipe, head) = (t.recipe.start.as_ref()?, t.start_head.as_ref()?);
        self.cells
            .iter()
            .find(|c| match &c.work {
                Some(Work::Pretrain(p)) => {
                    c.on == *recipe && p.head == *head && p.recipe.backbone == t.recipe.backbone
                }
                _ => false,
            })
            .map(|c| c.key.clone())
    }

    /// The rate with the smallest validation error for a row and recipe, and the whole grid, once
    /// every cell of its search is done.
    pub fn search_outcome(
        &self,
        row: &str,
        on: &str,
        store: &Store,
    ) -> Option<(f64, Vec<[f64; 2]>)> {
        let mut grid = Vec::new();
        for cell in self.cells.iter().filter(|c| c.row == row && c.on == on) {
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

/// Whether the request trains networks on images of the mini profile for this experiment.
pub fn needs_data(experiment: &Experiment, request: &Request) -> bool {
    request.profile == Profile::Mini && experiment.trains()
}

/// The data of an experiment's recipes, those to start from included.
fn data_of(e: &Experiment, data: &Infos) -> BTreeMap<String, DataInfo> {
    if let Some(users) = &data.users {
        let one = (users.recipe.clone(), users.clone());
        return BTreeMap::from_iter(e.from_scratch().then_some(one));
    }
    own_recipes(e)
        .filter_map(|name| Some((name.to_owned(), data.own.get(name)?.clone())))
        .collect()
}

/// Names of the recipes that an experiment's rows go through, those to start from included.
pub fn own_recipes(e: &Experiment) -> impl Iterator<Item = &str> {
    e.train_on.iter().flat_map(|name| {
        let start = e.recipes.get(name).and_then(|r| r.start.as_deref());
        start.into_iter().chain([name.as_str()])
    })
}

/// Changes an experiment to the effort that is asked for.
fn apply(e: &mut Experiment, request: &Request) {
    match request.effort {
        Effort::Usual => {}
        Effort::Quick => {
            for recipe in e.recipes.values_mut() {
                recipe.epochs = recipe.epochs.div_ceil(6);
                recipe.updates = recipe.updates.div_ceil(6);
            }
            for repeats in e.repeats() {
                *repeats = (*repeats).min(3);
            }
            e.seeds = e.seeds.min(3);
        }
        Effort::Thorough => {
            for recipe in e.recipes.values_mut() {
                recipe.epochs *= 2;
                recipe.updates *= 2;
            }
            for repeats in e.repeats() {
                *repeats *= 2;
            }
            e.seeds += 2;
        }
    }
    if request.smoke {
        shrink(e);
    }
    if let Some(seeds) = request.seeds {
        e.seeds = seeds;
    }
}

fn cells(p: &Planned, request: &Request, users: bool) -> Result<Vec<Cell>> {
    let mut cells = Vec::new();
    // Timings first: they are short, and nothing else should run beside them.
    let measures = [
        Measure::Abilities,
        Measure::DecompositionTime,
        Measure::LayerTime,
        Measure::RootError,
        Measure::Precision,
        Measure::Scaling,
        Measure::NetworkTime,
        Measure::Throughput,
        Measure::Train,
    ];
    for measure in measures {
        for row in &p.experiment.rows {
            if row.measures.contains(&measure) {
                cells.extend(row_cells(p, row, measure, request, users)?);
            }
        }
    }
    // Networks to start from once, before all else; searches before the trainings that need their outcome.
    let mut seen: Vec<Work> = Vec::new();
    cells.retain(|c: &Cell| match &c.work {
        Some(work @ Work::Pretrain(_)) if seen.contains(work) => false,
        Some(work @ Work::Pretrain(_)) => {
            seen.push(work.clone());
            true
        }
        _ => true,
    });
    cells.sort_by_key(|c: &Cell| {
        let turn = match &c.work {
            Some(Work::Pretrain(_)) => 0,
            Some(Work::Search(_)) => 1,
            _ => 2,
        };
        (c.measure == Measure::Train, turn)
    });
    Ok(cells)
}

fn row_cells(
    p: &Planned,
    row: &Row,
    measure: Measure,
    request: &Request,
    users: bool,
) -> Result<Vec<Cell>> {
    let e = &p.experiment;
    let Some(head) = row.head.clone() else {
        return Ok(Vec::new());
    };
    let cell = |on: &str, work: Option<Work>, seed, state| Cell {
        row: row.id.clone(),
        label: row.label.clone(),
        measure,
        on: on.to_owned(),
        seed,
        work,
        key: String::new(),
        state,
        seconds: 0.0,
    };
    let layer = e.layer.clone();
    let mut network = e.network.clone();
    if let Some(backbone) = &row.backbone {
        network.backbone = backbone.clone();
    }
    let work = match measure {
        Measure::LayerTime => Work::LayerTime { head, layer },
        Measure::RootError => Work::RootError { head, layer },
        Measure::Precision => Work::Precision { head, layer },
        Measure::Abilities => Work::Abilities { head, layer },
        Measure::DecompositionTime => Work::DecompositionTime {
            head,
            decomposition: e.decomposition.clone(),
        },
        Measure::NetworkTime => {
            network.batches.clear();
            Work::NetworkTime { head, network }
        }
        Measure::Throughput => Work::Throughput { head, network },
        Measure::Scaling => Work::Scaling {
            head,
            scaling: e.scaling.clone(),
        },
        Measure::Train if request.profile == Profile::Paper => {
            return Ok(paper_cells(row, request, cell));
        }
        Measure::Train if users && !e.from_scratch() => {
            let why = "networks are fine-tuned from one of the program's own sets to others; images of \
                       your own can only be trained on from scratch";
            return Ok(vec![cell("", None, None, State::NotRun(why.to_owned()))]);
        }
        Measure::Train => return train_cells(p, row, &head, request, users, cell),
    };
    Ok(vec![cell("", Some(work), None, State::Todo)])
}

/// The runs of a row with the paper's protocol.
fn paper_cells(
    row: &Row,
    request: &Request,
    cell: impl Fn(&str, Option<Work>, Option<u64>, State) -> Cell,
) -> Vec<Cell> {
    if row.paper_runs.is_empty() {
        let why = "no recipe of the paper profile is written for it";
        return vec![cell("", None, None, State::NotRun(why.to_owned()))];
    }
    let seeds = request.seeds.unwrap_or(1);
    let mut cells = Vec::new();
    for (set, spec) in &row.paper_runs {
        match paper::Run::find(request, set, spec) {
            Err(why) => cells.push(cell(set, None, None, State::NotRun(why))),
            Ok(run) => {
                for seed in 0..seeds {
                    let work = Work::PaperRun(run.clone());
                    cells.push(cell(set, Some(work), Some(seed), State::Todo));
                }
            }
        }
    }
    cells
}

fn train_cells(
    p: &Planned,
    row: &Row,
    head: &RepresentationSpec,
    request: &Request,
    users: bool,
    cell: impl Fn(&str, Option<Work>, Option<u64>, State) -> Cell,
) -> Result<Vec<Cell>> {
    let e = &p.experiment;
    let wrong = |message: String| Error::Spec {
        file: format!("{}.toml", e.id),
        line: None,
        message,
    };
    let names: Vec<&str> = match users {
        true => p.data.keys().map(String::as_str).collect(),
        false => e.train_on.iter().map(String::as_str).collect(),
    };
    // A training on the images of one recipe, with the recorded rate of this row.
    let training =
        |on: &str, head: &RepresentationSpec, row_id: &str| -> Result<(Training, Vec<f64>)> {
            let data = (p.data.get(on)).ok_or_else(|| {
                wrong(format!(
                    "networks are trained with `{on}`, but there is no data"
                ))
            })?;
            let recipe = e.recipes.get(on);
            let mut recipe = recipe
                .ok_or_else(|| wrong(format!("there is no recipe `{on}`")))?
                .clone();
            if data.train < 2 {
                return Err(Error::Unsupported(format!(
                    "{}: {} training images; expected at least 2",
                    data.name, data.train
                )));
            }
            if let Some(backbone) = &row.backbone {
                recipe.backbone = backbone.clone();
            }
            // The cell's configuration says what it comes to.
            recipe.fit(data.train);
            let rates = e.rates.get(on).cloned().unwrap_or_default();
            let lr = rates.heads.get(row_id).map_or(rates.fallback, |h| h.lr);
            let start_head = recipe
                .start
                .is_some()
                .then(|| row.start_head.clone().unwrap_or_else(|| head.clone()));
            let training = Training {
                head: head.clone(),
                recipe,
                lr: Some(lr),
                start_head,
                start: String::new(),
            };
            Ok((training, rates.grid))
        };
    let mut out = Vec::new();
    for on in names {
        let (mut wanted, grid) = training(on, head, &row.id)?;
        if let (Some(start), Some(start_head)) = (&wanted.recipe.start, &wanted.start_head) {
            let id = rate_id(e, start, &wanted, start_head, row);
            let (first, _) = training(start, start_head, &id)?;
            out.push(cell(
                start,
                Some(Work::Pretrain(first)),
                Some(0),
                State::Todo,
            ));
        }
        if request.search {
            for lr in &grid {
                let mut tried = wanted.clone();
                tried.lr = Some(*lr);
                out.push(cell(
                    on,
                    Some(Work::Search(tried)),
                    Some(SEARCH_SEED),
                    State::Todo,
                ));
            }
            wanted.lr = None;
        }
        for seed in 0..e.seeds {
            out.push(cell(
                on,
                Some(Work::Train(wanted.clone())),
                Some(seed),
                State::Todo,
            ));
        }
    }
    Ok(out)
}

/// Under which row's name the rate stands with which a network to start from is trained: that of the
/// row that has its head and backbone.
fn rate_id(
    e: &Experiment,
    start: &str,
    wanted: &Training,
    start_head: &RepresentationSpec,
    row: &Row,
) -> String {
    let backbone = |r: &Row| {
        let recipe = e.recipes.get(start).map(|recipe| recipe.backbone.clone());
        r.backbone.clone().or(recipe)
    };
    e.rows
        .iter()
        .find(|r| {
            r.head.as_ref() == Some(start_head)
                && backbone(r).as_ref() == Some(&wanted.recipe.backbone)
        })
        .map_or_else(|| format!("{}-start", row.id), |r| r.id.clone())
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
    e.network.batch = 1;
    e.network.repeats = 1;
    e.network.batches.truncate(1);
    e.scaling = ScalingSettings {
        dims: vec![8, 16],
        positions: vec![4, 16],
        batches: vec![1, 2],
        iterations: vec![1, 2],
        repeats: 1,
    };
    for recipe in e.recipes.values_mut() {
        recipe.epochs = 1;
        recipe.updates = 0;
        recipe.batch = 16;
    }
    for rates in e.rates.values_mut() {
        rates.grid.truncate(2);
    }
    e.seeds = 1;
}

fn key(work: &Work, seed: Option<u64>, fingerprint: &str, machine: &Machine) -> String {
    let device = machine.device.as_str();
    let (data, machine) = match work {
        Work::Train(_) | Work::Search(_) | Work::Pretrain(_) => (fingerprint, None),
        Work::RootError { .. } | Work::Precision { .. } | Work::PaperRun(_) => ("", None),
        _ => ("", Some((&machine.cpu, machine.cores, machine.threads))),
    };
    let mut work = serde_json::to_value(work).unwrap_or_default();
    if let Some(run) = work.as_object_mut() {
        // Of a run of the paper profile: an estimate.
        run.remove("seconds");
    }
    if let Some(recipe) = work.get_mut("recipe").and_then(|r| r.as_object_mut()) {
        // A guess of the plan and names, which decide no result.
        for field in ["seconds_per_1000", "up_to_side", "data", "start"] {
            recipe.remove(field);
        }
    }
    let mut parts = serde_json::json!([PROTOCOL, work, seed, data, machine]);
    // Another device's numbers are others, those of trainings too.
    if let (Some(parts), false) = (parts.as_array_mut(), device == "cpu") {
        parts.push(device.into());
    }
    let text = parts.to_string();
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// What a record tells of the time that cells take.
struct Known {
    work: Work,
    /// Training images.
    images: usize,
    smoke: bool,
    seconds: f64,
}

fn known(store: &Store) -> Vec<Known> {
    let known = |record: &Record| {
        Some(Known {
            work: Work::deserialize(&record.config).ok()?,
            images: record.data.as_ref().map_or(0, |d| d.train),
            smoke: record.smoke,
            seconds: record.seconds,
        })
    };
    store.records().iter().filter_map(known).collect()
}

/// Seconds that a cell should take: the mean of like cells among the records; else a guess, scaled
/// by how wrong it was for the cells of the same kind so far.
fn estimate(cell: &Cell, data: &BTreeMap<String, DataInfo>, known: &[Known]) -> f64 {
    let Some(work) = &cell.work else { return 0.0 };
    // Measured, not guessed.
    if let Work::PaperRun(run) = work {
        return run.seconds;
    }
    let images = data.get(&cell.on).map_or(0, |d| d.train);
    let (mut alike, mut kind) = (Vec::new(), (0.0, 0.0));
    for theirs in known {
        let same_images = work.training().is_none() || theirs.images == images;
        if same_cost(&theirs.work, work) && same_images {
            alike.push(theirs.seconds);
        }
        if theirs.work.training().is_some() == work.training().is_some()
            && theirs.smoke == is_smoke(work)
        {
            kind.0 += theirs.seconds;
            kind.1 += guess(&theirs.work, theirs.images);
        }
    }
    if !alike.is_empty() {
        return crate::stats::mean(&alike);
    }
    let scale = if kind.1 > 0.0 { kind.0 / kind.1 } else { 1.0 };
    guess(work, images) * scale
}

/// Only for the estimate: tiny cells say nothing about the time of whole ones.
fn is_smoke(work: &Work) -> bool {
    match work {
        Work::Train(t) | Work::Search(t) | Work::Pretrain(t) => t.recipe.epochs <= 1,
        Work::LayerTime { layer, .. }
        | Work::RootError { layer, .. }
        | Work::Precision { layer, .. }
        | Work::Abilities { layer, .. } => layer.dim <= 32,
        Work::DecompositionTime { decomposition, .. } => decomposition.dim <= 32,
        Work::NetworkTime { network, .. } | Work::Throughput { network, .. } => network.batch <= 1,
        Work::Scaling { scaling, .. } => scaling.repeats <= 1,
        Work::PaperRun(run) => run.smoke,
    }
}

/// Heads with a decomposition take longer.
fn slowness(head: &RepresentationSpec) -> f64 {
    match head.name.as_str() {
        "mpn" | "deepo2p" => 4.0,
        "g2denet" | "impbcnn" | "svd_pade" => 10.0,
        _ => 1.0,
    }
}

/// A first guess, from what a machine with AVX2 took: trainings on one thread, the rest on four.
fn guess(work: &Work, images: usize) -> f64 {
    match work {
        Work::Train(t) | Work::Search(t) | Work::Pretrain(t) => {
            let seen = (images * t.recipe.epochs) as f64;
            let slow = 1.0 + (slowness(&t.head) - 1.0) / 4.0;
            0.2 + t.recipe.seconds_per_1000 * slow * seen / 1000.0
        }
        Work::LayerTime { head, layer } | Work::Abilities { head, layer } => {
            let flops = layer_flops(layer.batch, layer.dim);
            0.1 + layer.repeats as f64 * slowness(head) * flops / 1e11
        }
        Work::RootError { layer, .. } | Work::Precision { layer, .. } => {
            0.1 + layer_flops(8, layer.dim) / 5e9
        }
        Work::DecompositionTime {
            decomposition: d, ..
        } => 0.1 + d.repeats as f64 * layer_flops(d.batch + 1, d.dim) / 5e10,
        Work::NetworkTime { head, network: n } => {
            let images = (n.batch * (n.repeats + 1)) as f64;
            images * (n.side as f64 / 224.0).powi(2) * (0.02 + 0.01 * slowness(head))
        }
        Work::Throughput { head, network: n } => {
            let images = n.batches.iter().sum::<usize>() as f64 * (n.repeats + 1) as f64;
            // On all threads and on one.
            4.0 * images * (n.side as f64 / 224.0).powi(2) * (0.02 + 0.01 * slowness(head))
        }
        Work::Scaling { scaling, .. } => {
            let flops = scaling.sizes().map(|[b, d, m, _]| layer_flops(b, d.min(m)));
            0.5 + (scaling.repeats + 1) as f64 * flops.sum::<f64>() / 5e10
        }
        Work::PaperRun(run) => run.seconds,
    }
}

/// About thirty products of two matrices an image.
fn layer_flops(batch: usize, dim: usize) -> f64 {
    30.0 * 2.0 * batch as f64 * (dim as f64).powi(3)
}

/// Same work but for the rate, which costs nothing.
fn same_cost(a: &Work, b: &Work) -> bool {
    match (a.training(), b.training()) {
        (Some(a), Some(b)) => {
            let size = |r: &Recipe| (r.backbone.clone(), r.epochs, r.batch);
            a.head == b.head && size(&a.recipe) == size(&b.recipe)
        }
        _ => a == b,
    }
}
