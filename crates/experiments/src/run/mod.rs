//! Doing the cells of a plan and recording each: timings alone, one after the other; trainings side by
//! side, each on a thread of its own.
//!
//! [`Lab`] is what does the work: [`RealLab`] for real, something quick in tests.

mod abilities;
mod data;
mod decomposition;
mod head;
mod layer;
mod network;
pub mod paper;
mod precision;
mod probe;
mod root;
mod scaling;
mod training;

pub use data::{Data, Library, Source};

use crate::error::{Error, Result};
use crate::machine::{Machine, commit, now};
use crate::plan::{Cell, Plan, Planned, Request, State, Work};
use crate::record::{EpochRecord, Measurement, Record, Store};
use crate::report;
use crate::spec::{Experiment, Row};
use candle_core::Device;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Is told how a run goes on. All methods do nothing by default.
pub trait Progress {
    /// A cell begins: its place among those to be run, and seconds left for all of them.
    fn started(&mut self, _step: &Step<'_>) {}
    /// A running cell is this far, from 0 to 1, with a few words. Breaking stops the run.
    fn tick(&mut self, _step: &Step<'_>, _fraction: f64, _words: &str) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    /// A cell was done and is on the disk.
    fn finished(&mut self, _step: &Step<'_>, _record: &Record) {}
}

/// A cell that is running.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Experiment id.
    pub experiment: &'a str,
    /// Name of the cell.
    pub cell: &'a str,
    /// Its seed.
    pub seed: Option<u64>,
    /// Counted from 1, in the order in which cells begin.
    pub number: usize,
    /// Of how many.
    pub of: usize,
    /// Cells that are done.
    pub done: usize,
    /// Seconds left for those that are not.
    pub seconds_left: f64,
}

/// What a cell yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The main number first.
    pub measurements: Vec<Measurement>,
    /// Metrics after each epoch of a training.
    pub epochs: Vec<EpochRecord>,
}

/// Called with the fraction that is done and a few words; breaking stops the cell.
pub type Tick<'a> = dyn FnMut(f64, &str) -> ControlFlow<()> + 'a;

/// One cell's work and what it needs.
#[derive(Clone, Debug)]
pub struct Task<'a> {
    /// What to do.
    pub work: &'a Work,
    /// Of the cell.
    pub key: &'a str,
    /// Of a training.
    pub seed: Option<u64>,
    /// Images of a training.
    pub data: Option<&'a Data>,
    /// Weights to start from.
    pub start: Option<PathBuf>,
    /// Where to put the weights of a network that others start from, and what a long run keeps.
    pub keep: PathBuf,
    /// Whether what is done is to be done again.
    pub fresh: bool,
}

/// Does the work of a cell; of several trainings at once.
pub trait Lab: Sync {
    /// Does it.
    ///
    /// # Errors
    /// [`Error::Cell`] where the work fails, [`Error::Stopped`] where `tick` breaks.
    fn run(&self, task: &Task<'_>, tick: &mut Tick<'_>) -> Result<Outcome>;
}

/// Trains, times and measures.
#[derive(Debug)]
pub struct RealLab {
    decompositions: decomposition::Cache,
    device: Device,
}

impl RealLab {
    /// Works on a device.
    #[must_use]
    pub fn on(device: &Device) -> Self {
        Self {
            decompositions: decomposition::Cache::default(),
            device: device.clone(),
        }
    }
}

impl Lab for RealLab {
    fn run(&self, task: &Task<'_>, tick: &mut Tick<'_>) -> Result<Outcome> {
        let device = &self.device;
        let measurements = match task.work {
            Work::Train(t) | Work::Search(t) | Work::Pretrain(t) => {
                return training::run(t, task, device, tick);
            }
            Work::PaperRun(run) => return run.train(task, device, tick),
            Work::LayerTime { head, layer } => layer::run(head, layer, device, tick)?,
            Work::RootError { head, layer } => root::run(head, layer)?,
            Work::Precision { head, layer } => precision::run(head, layer)?,
            Work::Abilities { head, layer } => abilities::run(head, layer)?,
            Work::DecompositionTime {
                head,
                decomposition,
            } => self.decompositions.run(head, decomposition, device)?,
            Work::NetworkTime { head, network } => network::time(head, network, device, tick)?,
            Work::Throughput { head, network } => network::throughput(head, network, device, tick)?,
            Work::Scaling { head, scaling } => scaling::run(head, scaling, device, tick)?,
        };
        Ok(Outcome {
            measurements,
            epochs: Vec::new(),
        })
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Cells that were run.
    pub ran: usize,
    /// Cells that were done already.
    pub skipped: usize,
    /// Cells that are not to be run.
    pub not_run: usize,
}

/// A cell by its place in the plan: experiment, cell.
type Place = (usize, usize);

/// Runs the cells of a plan that are not done. The report is written again and again meanwhile, at most
/// two seconds behind the records, and whatever the end.
///
/// # Errors
/// The first cell that fails; what was done before it, and beside it, is recorded.
pub fn run(
    plan: &mut Plan,
    request: &Request,
    dir: &Path,
    store: &mut Store,
    data: &Library,
    lab: &dyn Lab,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    let of = plan.todo().count();
    let mut run = Run {
        machine: request.machine(),
        commit: commit(),
        threads: threads(),
        of,
        begun: 0,
        reported: Instant::now(),
        summary: Summary::default(),
        plan,
        request,
        dir,
        store,
        data,
        lab,
        progress,
    };
    run.begin()?;
    let done = run.alone().and_then(|()| run.side_by_side());
    let shown = run.plan.write(dir).and_then(|()| report::write(dir));
    done?;
    shown?;
    write_rates(run.plan, dir, run.store)?;
    Ok(run.summary)
}

/// How far the report may be behind the records.
const REPORT: Duration = Duration::from_secs(2);

/// How often a training tells how far it is.
const TELL: Duration = Duration::from_millis(100);

/// A run under way.
struct Run<'a> {
    plan: &'a mut Plan,
    request: &'a Request,
    dir: &'a Path,
    store: &'a mut Store,
    data: &'a Library,
    lab: &'a dyn Lab,
    progress: &'a mut dyn Progress,
    machine: Machine,
    commit: String,
    threads: usize,
    /// Cells that were to be run when it began.
    of: usize,
    begun: usize,
    /// When the report was last written.
    reported: Instant,
    summary: Summary,
}

/// What a cell is called.
struct Names {
    experiment: String,
    cell: String,
}

/// What a training that runs beside others says.
enum Message {
    Tick(f64, String),
    /// Boxed: a tick should not be as large as a result.
    Done(Box<Result<Outcome>>),
}

impl Run<'_> {
    /// Counts what is done and shares it with cells of the same work.
    fn begin(&mut self) -> Result<()> {
        for (e, c) in self.places() {
            let cell = &self.plan.experiments[e].cells[c];
            match cell.state {
                State::NotRun(_) => self.summary.not_run += 1,
                State::Done if self.is_lost(cell) => {
                    self.plan.experiments[e].cells[c].state = State::Todo;
                    self.of += 1;
                }
                State::Done => {
                    self.summary.skipped += 1;
                    share(&self.plan.experiments[e], cell, self.store)?;
                }
                State::Todo => {}
            }
        }
        self.plan.write(self.dir)?;
        report::write(self.dir).map(drop)
    }

    /// Whether others start from the weights of this cell, which are not there any more.
    fn is_lost(&self, cell: &Cell) -> bool {
        matches!(cell.work, Some(Work::Pretrain(_)))
            && !weights_of(self.dir, &cell.key).is_file()
            && self.plan.todo().any(|(_, c)| {
                let training = c.work.as_ref().and_then(Work::training);
                training.is_some_and(|t| t.start == cell.key)
            })
    }

    fn places(&self) -> Vec<Place> {
        let cells = |(e, p): (usize, &Planned)| (0..p.cells.len()).map(move |c| (e, c));
        self.plan
            .experiments
            .iter()
            .enumerate()
            .flat_map(cells)
            .collect()
    }

    fn cell(&self, (e, c): Place) -> &Cell {
        &self.plan.experiments[e].cells[c]
    }

    /// All that is timed or takes the whole machine.
    fn alone(&mut self) -> Result<()> {
        for place in self.places() {
            let cell = self.cell(place).clone();
            if cell.state != State::Todo || cell.is_training() {
                continue;
            }
            let Some(work) = &cell.work else { continue };
            let number = self.start(place);
            if self.store.latest(&cell.key).is_some() && self.is_twin(place) {
                self.finish(place, number, None)?;
                continue;
            }
            let (started, clock) = (now(), Instant::now());
            let task = Task {
                work,
                key: &cell.key,
                seed: cell.seed,
                data: None,
                start: None,
                keep: self.dir.join("paper"),
                fresh: self.request.fresh,
            };
            let names = self.names(place);
            let step = self.step(&cell, &names, number);
            let progress = &mut *self.progress;
            let lab = self.lab;
            let outcome = no_panic(|| lab.run(&task, &mut |f, w| progress.tick(&step, f, w)))
                .map_err(|error| in_cell(&self.plan.experiments[place.0], &cell, error))?;
            self.finish(place, number, Some((outcome, started, clock)))?;
        }
        Ok(())
    }

    /// Trainings, each on one thread, as many at once as there are threads; longest first, but those that
    /// others wait for before them.
    fn side_by_side(&mut self) -> Result<()> {
        let workers = self.threads.max(1);
        let stop = AtomicBool::new(false);
        let (lab, data, dir) = (self.lab, self.data, self.dir);
        let keep = dir.join("weights");
        std::thread::scope(|scope| {
            let (sender, inbox) = mpsc::channel::<(Place, Message)>();
            let mut running: BTreeMap<Place, (usize, u64, Instant)> = BTreeMap::new();
            let mut first_error = None;
            loop {
                while running.len() < workers && first_error.is_none() {
                    let place = match self.next(&running) {
                        Ok(Some(place)) => place,
                        Ok(None) => break,
                        Err(error) => {
                            stop.store(true, Ordering::Relaxed);
                            first_error = Some(error);
                            break;
                        }
                    };
                    let cell = self.cell(place).clone();
                    let number = self.start(place);
                    running.insert(place, (number, now(), Instant::now()));
                    let (sender, stop, keep) = (sender.clone(), &stop, keep.clone());
                    scope.spawn(move || {
                        let start = (cell.work.as_ref().and_then(Work::training))
                            .filter(|t| !t.start.is_empty())
                            .map(|t| weights_of(dir, &t.start));
                        let keep = keep.join(format!("{}.safetensors", cell.key));
                        let mut told = Instant::now();
                        let mut tick = |fraction, words: &str| {
                            if told.elapsed() >= TELL {
                                told = Instant::now();
                                let tick = Message::Tick(fraction, words.to_owned());
                                // Nobody listens any more only where the run is over.
                                let _ = sender.send((place, tick));
                            }
                            match stop.load(Ordering::Relaxed) {
                                true => ControlFlow::Break(()),
                                false => ControlFlow::Continue(()),
                            }
                        };
                        let outcome = cell.work.as_ref().map(|work| {
                            let task = Task {
                                work,
                                key: &cell.key,
                                seed: cell.seed,
                                data: data.get(&cell.on),
                                start,
                                keep,
                                fresh: false,
                            };
                            on_one_thread(|| lab.run(&task, &mut tick))
                        });
                        let outcome = outcome.unwrap_or_else(|| Ok(Outcome::default()));
                        let _ = sender.send((place, Message::Done(Box::new(outcome))));
                    });
                }
                if running.is_empty() {
                    return first_error.map_or(Ok(()), Err);
                }
                let Ok((place, message)) = inbox.recv() else {
                    return Ok(());
                };
                let Some(&(number, started, clock)) = running.get(&place) else {
                    continue;
                };
                match message {
                    Message::Tick(fraction, words) => {
                        let cell = self.cell(place).clone();
                        let names = self.names(place);
                        let step = self.step(&cell, &names, number);
                        if self.progress.tick(&step, fraction, &words).is_break() {
                            stop.store(true, Ordering::Relaxed);
                            first_error.get_or_insert(Error::Stopped);
                        }
                    }
                    Message::Done(outcome) => {
                        running.remove(&place);
                        let cell = self.cell(place).clone();
                        let finished = outcome
                            .map_err(|e| in_cell(&self.plan.experiments[place.0], &cell, e))
                            .and_then(|o| self.finish(place, number, Some((o, started, clock))));
                        if let Err(error) = finished {
                            // The others end as well; those that are done by then are recorded.
                            stop.store(true, Ordering::Relaxed);
                            first_error.get_or_insert(error);
                        }
                    }
                }
            }
        })
    }

    /// The next training that can begin.
    fn next(&mut self, running: &BTreeMap<Place, (usize, u64, Instant)>) -> Result<Option<Place>> {
        loop {
            for p in &mut self.plan.experiments {
                // Searches that have ended since fill in rates, keys and states.
                p.resolve(self.store, &self.machine, self.request.fresh);
            }
            let busy: BTreeSet<&str> = running.keys().map(|p| self.cell(*p).key.as_str()).collect();
            let places = self.places();
            let made = |key: &str| {
                places.iter().all(|p| {
                    let cell = self.cell(*p);
                    cell.key != key || cell.state == State::Done
                })
            };
            let ready = places.iter().copied().filter(|p| {
                let cell = self.cell(*p);
                let start =
                    (cell.work.as_ref().and_then(Work::training)).map_or("", |t| t.start.as_str());
                cell.state == State::Todo
                    && cell.is_training()
                    && !cell.key.is_empty()
                    && !busy.contains(cell.key.as_str())
                    && (start.is_empty() || made(start))
            });
            let urgent = |cell: &Cell| !cell.is_shown();
            let best = ready.max_by(|a, b| {
                let (x, y) = (self.cell(*a), self.cell(*b));
                let order = urgent(x).cmp(&urgent(y));
                order.then(x.seconds.total_cmp(&y.seconds)).then(b.cmp(a))
            });
            match best {
                Some(place) if self.is_twin(place) => {
                    let number = self.start(place);
                    self.finish(place, number, None)?;
                }
                other => return Ok(other),
            }
        }
    }

    fn names(&self, place: Place) -> Names {
        Names {
            experiment: self.plan.experiments[place.0].id.clone(),
            cell: self.cell(place).name(),
        }
    }

    /// Whether another cell of this very run has done the same work.
    fn is_twin(&self, place: Place) -> bool {
        let key = &self.cell(place).key;
        self.places().into_iter().any(|other| {
            other != place && self.cell(other).key == *key && self.cell(other).state == State::Done
        })
    }

    fn step<'b>(&self, cell: &Cell, names: &'b Names, number: usize) -> Step<'b> {
        Step {
            experiment: &names.experiment,
            cell: &names.cell,
            seed: cell.seed,
            number,
            of: self.of,
            done: self.summary.ran,
            seconds_left: self.plan.seconds_left(self.threads),
        }
    }

    /// Tells that a cell begins; its number.
    fn start(&mut self, place: Place) -> usize {
        self.begun += 1;
        let cell = self.cell(place).clone();
        let names = self.names(place);
        let step = self.step(&cell, &names, self.begun);
        self.progress.started(&step);
        self.begun
    }

    /// Records what a cell has come to; without an outcome, what its twin has.
    fn finish(
        &mut self,
        place: Place,
        number: usize,
        outcome: Option<(Outcome, u64, Instant)>,
    ) -> Result<()> {
        let (e, c) = place;
        let cell = self.cell(place).clone();
        match outcome {
            None => share(&self.plan.experiments[e], &cell, self.store)?,
            Some((outcome, started, clock)) => {
                let mut record = record(&self.plan.experiments[e], &cell, outcome)?;
                record.machine = self.machine.clone();
                record.commit = self.commit.clone();
                record.started = started;
                record.finished = now();
                record.seconds = clock.elapsed().as_secs_f64();
                self.store.append(record)?;
            }
        }
        self.summary.ran += 1;
        self.plan.experiments[e].cells[c].state = State::Done;
        if self.reported.elapsed() >= REPORT {
            self.plan.estimate(self.store);
            self.plan.write(self.dir)?;
            report::write(self.dir)?;
            self.reported = Instant::now();
        }
        if let Some(record) = own_record(&self.plan.experiments[e], &cell, self.store) {
            let names = self.names(place);
            let step = self.step(&cell, &names, number);
            self.progress.finished(&step, record);
        }
        Ok(())
    }
}

/// Trainings that run side by side.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Where the weights of a network lie that others start from.
fn weights_of(dir: &Path, key: &str) -> PathBuf {
    dir.join("weights").join(format!("{key}.safetensors"))
}

/// A panic becomes an error: what was done before is kept, and trainings beside it end.
fn no_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::Cell {
            cell: "the program".to_owned(),
            message: "panicked, which is a fault of its own: see above".to_owned(),
        })
    })
}

/// Does it with a pool of one thread, so that trainings beside each other leave each other alone.
fn on_one_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|e| Error::Unsupported(format!("no thread for a training: {e}")))?;
    no_panic(|| pool.install(work))
}

/// What searches have found, in the form of `experiments/_base/rates.toml`.
fn write_rates(plan: &Plan, dir: &Path, store: &Store) -> Result<()> {
    // Several experiments may search with one recipe, and a row of theirs may bear the same name:
    // the first of them is written.
    let mut recipes: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
    for p in plan.experiments.iter().filter(|p| p.search) {
        let rows = || p.experiment.rows.iter();
        for (on, row) in p.data.keys().flat_map(|on| rows().map(move |r| (on, r))) {
            if let Some((lr, grid)) = p.search_outcome(&row.id, on, store) {
                let pairs: Vec<String> = grid
                    .iter()
                    .map(|[rate, error]| format!("[{}, {}]", toml_rate(*rate), toml_error(*error)))
                    .collect();
                let heads = recipes.entry(on).or_default();
                if heads.iter().all(|(id, _)| *id != row.id) {
                    let lr = toml_rate(lr);
                    let rate = format!("{{ lr = {lr}, outcome = [{}] }}", pairs.join(", "));
                    heads.push((&row.id, rate));
                }
            }
        }
    }
    if recipes.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    for (recipe, heads) in recipes {
        text.push_str(&format!("[rates.{}.heads]\n", toml_key(recipe)));
        for (row, rate) in heads {
            text.push_str(&format!("{} = {rate}\n", toml_key(row)));
        }
    }
    crate::files::write_atomically(&dir.join("rates.toml"), text.as_bytes())
}

/// With a point or an exponent, so that no rate is taken for a whole number.
fn toml_rate(rate: f64) -> String {
    format!("{rate:?}")
}

/// Two digits; a training that diverged has an error that is not a number, which TOML spells so.
fn toml_error(error: f64) -> String {
    if error.is_finite() {
        format!("{error:.2}")
    } else {
        "nan".to_owned()
    }
}

/// A key as it is where TOML allows that, else between quotes.
fn toml_key(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(bare) {
        key.to_owned()
    } else {
        // The escapes of JSON are among those of TOML.
        serde_json::Value::from(key).to_string()
    }
}

/// An error of a lab knows its part of the work; this adds which cell it was.
fn in_cell(planned: &Planned, cell: &Cell, error: Error) -> Error {
    match error {
        Error::Cell {
            cell: part,
            message,
        } => Error::Cell {
            cell: full_name(planned, cell),
            message: format!("{part}: {message}"),
        },
        other => other,
    }
}

/// Experiment, cell and seed.
fn full_name(planned: &Planned, cell: &Cell) -> String {
    let seed = cell.seed.map_or_else(String::new, |s| format!(" seed {s}"));
    format!("{} {}{seed}", planned.experiment.id, cell.name())
}

/// A record without machine and times, which the caller knows.
fn record(planned: &Planned, cell: &Cell, outcome: Outcome) -> Result<Record> {
    let name = cell.name();
    let mut measurements = outcome.measurements.into_iter();
    let main = measurements.next().ok_or_else(|| Error::Cell {
        cell: full_name(planned, cell),
        message: "nothing was measured".to_owned(),
    })?;
    let mut record = Record {
        experiment: planned.experiment.id.clone(),
        cell: name,
        row: cell.row.clone(),
        measure: match &cell.work {
            Some(Work::Search(_)) => "search",
            Some(Work::Pretrain(_)) => "pretrain",
            _ => cell.measure.name(),
        }
        .to_owned(),
        on: cell.on.clone(),
        profile: planned.profile.name().to_owned(),
        smoke: planned.smoke,
        seed: cell.seed,
        main,
        more: measurements.collect(),
        epochs: outcome.epochs,
        config: serde_json::to_value(&cell.work).unwrap_or_default(),
        key: cell.key.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        data: planned.data.get(&cell.on).cloned(),
        ..Record::default()
    };
    add_paper(&mut record, &planned.experiment, cell);
    Ok(record)
}

/// Puts the paper's values beside ours; a search has none.
fn add_paper(record: &mut Record, experiment: &Experiment, cell: &Cell) {
    let values = experiment
        .row(&cell.row)
        .map_or(&[][..], |r: &Row| &r.paper);
    for m in std::iter::once(&mut record.main).chain(&mut record.more) {
        let found = values
            .iter()
            .find(|p| p.metric == m.metric && is_on(&p.on, &cell.on) && cell.is_shown());
        m.paper = found.map(|p| p.value);
        m.paper_source = found.map(|p| match p.setting.as_str() {
            "" => p.source.clone(),
            setting => format!("{} ({setting})", p.source),
        });
        m.paper_verified = found.map(|p| p.verified);
    }
}

/// Whether something said of a recipe (of all, if it is empty) is said of this one.
pub(crate) fn is_on(said: &str, on: &str) -> bool {
    said.is_empty() || said == on
}

/// A cell that another experiment or profile has done gets a record of its own, with its own name
/// and its own paper value, so that records can be read without knowing who shared with whom. One
/// that it has from an earlier run (before a `--fresh` one) is no longer the result, so it gets
/// another.
fn share(planned: &Planned, cell: &Cell, store: &mut Store) -> Result<()> {
    let Some(done) = store.latest(&cell.key).cloned() else {
        return Ok(());
    };
    if own_record(planned, cell, store).is_some_and(|own| same_run(own, &done)) {
        return Ok(());
    }
    let mut own = done;
    own.experiment = planned.experiment.id.clone();
    own.cell = cell.name();
    own.row = cell.row.clone();
    own.on = cell.on.clone();
    own.profile = planned.profile.name().to_owned();
    add_paper(&mut own, &planned.experiment, cell);
    store.append(own)
}

/// The latest record of this cell under the experiment's own name.
fn own_record<'a>(planned: &Planned, cell: &Cell, store: &'a Store) -> Option<&'a Record> {
    let name = cell.name();
    store.records().iter().rev().find(|r| {
        r.key == cell.key
            && r.experiment == planned.experiment.id
            && r.cell == name
            && r.profile == planned.profile.name()
    })
}

/// Whether two records tell of one and the same run of a cell.
fn same_run(a: &Record, b: &Record) -> bool {
    // Reading a number back may change its last bit.
    let close = |x: f64, y: f64| x.total_cmp(&y).is_eq() || (x - y).abs() <= 1e-12 * x.abs();
    (a.started, a.finished) == (b.started, b.finished)
        && close(a.seconds, b.seconds)
        && (close(a.main.value, b.main.value) || a.main.value.is_nan() && b.main.value.is_nan())
}
