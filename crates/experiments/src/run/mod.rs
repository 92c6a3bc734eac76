//! Doing the cells of a plan, one after the other, recording each before the next begins.
//!
//! [`Lab`] is what does the work: [`Machine room`](RealLab) for real, something quick in tests.

mod data;
mod decomposition;
mod head;
mod layer;
mod root;
mod training;

pub use data::{Data, Source};

use crate::error::{Error, Result};
use crate::machine::{Machine, commit, now};
use crate::plan::{Cell, Plan, Planned, Request, State, Work};
use crate::record::{EpochRecord, Measurement, Record, Store};
use crate::report;
use crate::spec::{Experiment, Row};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// Is told how a run goes on. All methods do nothing by default.
pub trait Progress {
    /// A cell begins: its place among those to be run, and seconds left for all of them.
    fn started(&mut self, _step: &Step<'_>) {}
    /// The running cell is this far, from 0 to 1, with a few words. Breaking stops the run.
    fn tick(&mut self, _fraction: f64, _words: &str) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    /// A cell was done and is on the disk.
    fn finished(&mut self, _record: &Record) {}
}

/// The cell that begins.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Experiment id.
    pub experiment: &'a str,
    /// Name of the cell.
    pub cell: &'a str,
    /// Its seed.
    pub seed: Option<u64>,
    /// Counted from 1.
    pub number: usize,
    /// Of how many.
    pub of: usize,
    /// Seconds left for this and the later cells.
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

/// Does the work of a cell.
pub trait Lab {
    /// Does it.
    ///
    /// # Errors
    /// [`Error::Cell`] where the work fails, [`Error::Stopped`] where `tick` breaks.
    fn run(
        &mut self,
        work: &Work,
        seed: Option<u64>,
        data: Option<&Data>,
        tick: &mut Tick<'_>,
    ) -> Result<Outcome>;
}

/// Trains, times and measures.
#[derive(Debug, Default)]
pub struct RealLab {
    decompositions: decomposition::Cache,
}

impl Lab for RealLab {
    fn run(
        &mut self,
        work: &Work,
        seed: Option<u64>,
        data: Option<&Data>,
        tick: &mut Tick<'_>,
    ) -> Result<Outcome> {
        let measurements = match work {
            Work::Train(t) => return training::run(t, seed.unwrap_or(0), false, data, tick),
            Work::Search(t) => return training::run(t, seed.unwrap_or(0), true, data, tick),
            Work::LayerTime { head, layer } => layer::run(head, layer, tick)?,
            Work::RootError { head, layer } => root::run(head, layer)?,
            Work::DecompositionTime {
                head,
                decomposition,
            } => self.decompositions.run(head, decomposition)?,
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

/// Runs the cells of a plan that are not done. The report is written after each of them, so that
/// it is never behind the records.
///
/// # Errors
/// The first cell that fails; what was done before it is recorded.
pub fn run(
    plan: &mut Plan,
    request: &Request,
    dir: &Path,
    store: &mut Store,
    data: Option<&Data>,
    lab: &mut dyn Lab,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    let machine = Machine::here();
    let commit = commit();
    let of = plan.todo().count();
    let mut summary = Summary::default();
    plan.write(dir)?;
    report::write(dir)?;
    for e in 0..plan.experiments.len() {
        for c in 0..plan.experiments[e].cells.len() {
            // Searches that have ended since fill in rates, keys and states.
            plan.experiments[e].resolve(store, &machine, request.fresh);
            let cell = plan.experiments[e].cells[c].clone();
            let Some(work) = &cell.work else {
                summary.not_run += 1;
                continue;
            };
            if cell.state == State::Done {
                summary.skipped += 1;
                share(&plan.experiments[e], &cell, store)?;
                continue;
            }
            let name = cell.name();
            progress.started(&Step {
                experiment: &plan.experiments[e].experiment.id,
                cell: &name,
                seed: cell.seed,
                number: summary.ran + 1,
                of,
                seconds_left: plan.seconds_left(),
            });
            // Another experiment of this very run may have done the same work.
            let twin = plan.experiments[..e]
                .iter()
                .flat_map(|p| &p.cells)
                .any(|other| other.key == cell.key && other.state == State::Done);
            if twin {
                share(&plan.experiments[e], &cell, store)?;
            } else {
                let started = now();
                let clock = Instant::now();
                let outcome = lab
                    .run(work, cell.seed, data, &mut |f, w| progress.tick(f, w))
                    .map_err(|error| in_cell(&plan.experiments[e], &cell, error))?;
                let mut record = record(&plan.experiments[e], &cell, outcome)?;
                record.machine = machine.clone();
                record.commit = commit.clone();
                record.started = started;
                record.finished = now();
                record.seconds = clock.elapsed().as_secs_f64();
                store.append(record)?;
            }
            summary.ran += 1;
            plan.experiments[e].cells[c].state = State::Done;
            plan.estimate(store);
            plan.write(dir)?;
            report::write(dir)?;
            if let Some(record) = own_record(&plan.experiments[e], &cell, store) {
                progress.finished(record);
            }
        }
    }
    write_rates(plan, dir, store)?;
    report::write(dir)?;
    Ok(summary)
}

/// What searches have found, in the form of `experiments/_base/rates.toml`.
fn write_rates(plan: &Plan, dir: &Path, store: &Store) -> Result<()> {
    // Several experiments may search with one recipe, and a row of theirs may bear the same name:
    // the first of them is written.
    let mut recipes: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
    for p in plan.experiments.iter().filter(|p| p.search) {
        let Some(data) = &p.data else { continue };
        for row in &p.experiment.rows {
            if let Some((lr, grid)) = p.search_outcome(&row.id, store) {
                let pairs: Vec<String> = grid
                    .iter()
                    .map(|[rate, error]| format!("[{}, {}]", toml_rate(*rate), toml_error(*error)))
                    .collect();
                let heads = recipes.entry(&data.recipe).or_default();
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
        measure: if cell.is_search() {
            "search"
        } else {
            cell.measure.name()
        }
        .to_owned(),
        profile: planned.profile.name().to_owned(),
        smoke: planned.smoke,
        seed: cell.seed,
        main,
        more: measurements.collect(),
        epochs: outcome.epochs,
        config: serde_json::to_value(&cell.work).unwrap_or_default(),
        key: cell.key.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        data: planned.data.clone(),
        ..Record::default()
    };
    if !matches!(cell.work, Some(Work::Train(_) | Work::Search(_))) {
        record.data = None;
    }
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
            .find(|p| p.metric == m.metric && !cell.is_search());
        m.paper = found.map(|p| p.value);
        m.paper_source = found.map(|p| match p.setting.as_str() {
            "" => p.source.clone(),
            setting => format!("{} ({setting})", p.source),
        });
        m.paper_verified = found.map(|p| p.verified);
    }
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
