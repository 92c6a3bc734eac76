//! The records of one planned experiment, by row and metric.

use crate::plan::Planned;
use crate::record::{Measurement, Record, Store};
use crate::stats::{mean, sd};

/// The records that belong to the cells of a plan, searches left out.
#[derive(Clone, Debug)]
pub struct Results<'a> {
    records: Vec<(&'a str, &'a Record)>,
}

/// One metric of one row over its seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Seed and value, by seed; one entry without a seed for timings.
    pub values: Vec<(Option<u64>, Measurement)>,
}

impl<'a> Results<'a> {
    /// Looks up the latest record of each cell.
    pub fn new(planned: &'a Planned, store: &'a Store) -> Self {
        let records = planned
            .cells
            .iter()
            .filter(|c| !c.is_search() && !c.key.is_empty())
            .filter_map(|c| Some((c.row.as_str(), store.latest(&c.key)?)))
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

    /// One metric of a row; none where it was not measured.
    pub fn sample(&self, row: &str, metric: &str) -> Option<Sample> {
        let mut values: Vec<_> = self
            .of_row(row)
            .filter_map(|r| Some((r.seed, r.get(metric)?.clone())))
            .collect();
        values.sort_by_key(|(seed, _)| *seed);
        (!values.is_empty()).then_some(Sample { values })
    }

    /// Error on the evaluation images after each epoch, one curve a seed.
    pub fn curves(&self, row: &str) -> Vec<(u64, Vec<f64>)> {
        self.of_row(row)
            .filter(|r| !r.epochs.is_empty())
            .map(|r| {
                let curve = r.epochs.iter().map(|e| e.eval_error).collect();
                (r.seed.unwrap_or(0), curve)
            })
            .collect()
    }
}

impl Sample {
    /// The bare values.
    pub fn numbers(&self) -> Vec<f64> {
        self.values.iter().map(|(_, m)| m.value).collect()
    }

    /// Mean over seeds.
    pub fn mean(&self) -> f64 {
        mean(&self.numbers())
    }

    /// Lower and upper end of an error bar: mean -+ sd over seeds, or quartiles of repeats.
    pub fn interval(&self) -> Option<(f64, f64)> {
        match self.values.as_slice() {
            [(_, one)] => Some((one.low?, one.high?)),
            _ => {
                let (m, s) = (self.mean(), sd(&self.numbers()));
                Some((m - s, m + s))
            }
        }
    }

    /// Value of a seed.
    pub fn at(&self, seed: Option<u64>) -> Option<f64> {
        self.values
            .iter()
            .find(|(s, _)| *s == seed)
            .map(|(_, m)| m.value)
    }
}
