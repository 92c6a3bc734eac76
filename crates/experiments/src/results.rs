//! The records of one planned experiment, by row, recipe and metric.

use crate::plan::Planned;
use crate::record::{Measurement, Record, Store};
use crate::run::is_on;
use crate::stats::{mean, sd};
use std::collections::BTreeMap;

/// The records that belong to the cells of a plan; searches and networks that others start from left
/// out.
#[derive(Clone, Debug)]
pub struct Results<'a> {
    records: Vec<(&'a str, &'a Record)>,
}

/// Which of the runs of a row: recipe and seed.
pub type Run = (String, Option<u64>);

/// One metric of one row over its runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Run and value, by run; one entry without a seed for timings.
    pub values: Vec<(Run, Measurement)>,
}

impl<'a> Results<'a> {
    /// Looks up the latest record of each cell.
    pub fn new(planned: &'a Planned, store: &'a Store) -> Self {
        let records = planned
            .cells
            .iter()
            .filter(|c| c.is_shown() && !c.key.is_empty())
            .filter_map(|c| Some((c.row.as_str(), store.latest_of(&planned.id, c)?)))
            .collect();
        Self { records }
    }

    /// Records of a row.
    pub fn of_row(&self, row: &str) -> impl Iterator<Item = &'a Record> {
        self.records
            .iter()
            .filter(move |(r, _)| *r == row)
            .map(|(_, record)| *record)
    }

    /// All records.
    pub fn all(&self) -> impl Iterator<Item = &'a Record> {
        self.records.iter().map(|(_, record)| *record)
    }

    /// One metric of a row, of one recipe or of all (empty); none where it was not measured.
    pub fn sample(&self, row: &str, metric: &str, on: &str) -> Option<Sample> {
        let mut values: Vec<(Run, Measurement)> = match metric.split_once("_to:") {
            Some((of, other)) => self.reached(row, other, on, of),
            None => self
                .of_row(row)
                .filter(|r| is_on(on, &r.on))
                .filter_map(|r| Some(((r.on.clone(), r.seed), r.get(metric)?.clone())))
                .collect(),
        };
        values.sort_by(|a, b| a.0.cmp(&b.0));
        (!values.is_empty()).then_some(Sample { values })
    }

    /// Epochs, or seconds of training, until the error that `other` ends with in the same run is reached;
    /// runs that never reach it are not a number.
    fn reached(&self, row: &str, other: &str, on: &str, of: &str) -> Vec<(Run, Measurement)> {
        let last: BTreeMap<Run, f64> = self
            .of_row(other)
            .filter_map(|r| Some(((r.on.clone(), r.seed), r.epochs.last()?.eval_error)))
            .collect();
        let of_row = self.of_row(row).filter(|r| is_on(on, &r.on));
        of_row
            .filter_map(|r| {
                let run = (r.on.clone(), r.seed);
                let level = *last.get(&run)?;
                let place = r.epochs.iter().position(|e| e.eval_error <= level);
                let (value, unit) = match of {
                    "epochs" => (place.map(|i| r.epochs[i].epoch as f64), "epochs"),
                    _ => {
                        let spent = |i| r.epochs[..=i].iter().map(|e| e.seconds).sum::<f64>();
                        (place.map(spent), "s")
                    }
                };
                let metric = format!("{of}_to:{other}");
                Some((
                    run,
                    Measurement::new(&metric, value.unwrap_or(f64::NAN), unit),
                ))
            })
            .collect()
    }

    /// Error on the evaluation images after each epoch, one curve a run.
    pub fn curves(&self, row: &str, on: &str) -> Vec<(Run, Vec<f64>)> {
        self.of_row(row)
            .filter(|r| !r.epochs.is_empty() && is_on(on, &r.on))
            .map(|r| {
                let curve = r.epochs.iter().map(|e| e.eval_error).collect();
                ((r.on.clone(), r.seed), curve)
            })
            .collect()
    }
}

impl Sample {
    /// The bare values.
    pub fn numbers(&self) -> Vec<f64> {
        self.values.iter().map(|(_, m)| m.value).collect()
    }

    /// Those that are numbers: without runs that diverged, or never reached what was asked for.
    pub fn finite(&self) -> Vec<f64> {
        let mut numbers = self.numbers();
        numbers.retain(|v| v.is_finite());
        numbers
    }

    /// Mean over runs.
    pub fn mean(&self) -> f64 {
        mean(&self.numbers())
    }

    /// The result where it is no number.
    pub fn words(&self) -> Option<&str> {
        let first = self.values.first().map(|(_, m)| m.words.as_str());
        first.filter(|words| !words.is_empty())
    }

    /// Whether it is of trainings with seeds.
    pub fn is_seeded(&self) -> bool {
        self.values.iter().any(|((_, seed), _)| seed.is_some())
    }

    /// Lower and upper end of an error bar: mean -+ sd over runs, or quartiles of repeats.
    pub fn interval(&self) -> Option<(f64, f64)> {
        match self.values.as_slice() {
            [(_, one)] => Some((one.low?, one.high?)),
            _ => {
                let (m, s) = (self.mean(), sd(&self.numbers()));
                Some((m - s, m + s))
            }
        }
    }

    /// Value of a run.
    pub fn at(&self, run: &Run) -> Option<f64> {
        self.values
            .iter()
            .find(|(r, _)| r == run)
            .map(|(_, m)| m.value)
    }

    /// Values of the runs that both have.
    pub fn pairs(&self, other: &Self) -> Vec<(f64, f64)> {
        self.values
            .iter()
            .filter_map(|(run, m)| Some((m.value, other.at(run)?)))
            .collect()
    }
}
