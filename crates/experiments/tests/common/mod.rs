//! A small experiment, a lab that makes numbers up, and a run with both.
#![allow(dead_code, clippy::unwrap_used)]

use isqrt_experiments::plan::{Infos, Plan, Request, Training, Work};
use isqrt_experiments::record::{DataInfo, EpochRecord, Measurement, Record, Store};
use isqrt_experiments::run::{self, Lab, Outcome, Progress, Step, Summary, Task, Tick, run};
use isqrt_experiments::spec::{Experiment, Library};
use isqrt_experiments::{Error, Result};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

pub const SMALL: &str = r#"
extends = ["_base/part.toml"]
title = "A small experiment"
paper_item = "Table 0"
seeds = 2
train_on = ["small"]
columns = [
  { metric = "top1_error", label = "error", unit = "%", digits = 1 },
  { metric = "forward_ms", label = "FP", unit = "ms" },
]
[[rows]]
id = "gap"
label = "average <pooling>"
head = { name = "gap" }
measures = ["train"]
[[rows]]
id = "five"
label = "N = 5"
x = 5
head = { name = "isqrt", iterations = 5 }
measures = ["train", "layer-time"]
paper = [{ metric = "forward_ms", value = 0.41, source = "Table 0, recalled" }]
[[rows]]
id = "later"
label = "G²DeNet"
not_run = "not yet run: comes later"
paper = [{ metric = "forward_ms", value = 4.76, source = "README", verified = true }]
[[claims]]
text = "second order is ahead of first order"
kind = "less"
metric = "top1_error"
rows = ["five"]
than = "gap"
[[figures]]
title = "Curves"
kind = "epochs"
metrics = ["top1_error"]
rows = ["gap", "five"]
x_label = "epoch"
y_label = "error (%)"
"#;

pub const PART: &str = r#"
[recipes.small]
data = "e10"
backbone = "e10net"
epochs = 3
batch = 8
[rates.small]
grid = [0.1, 0.2]
fallback = 0.1
[rates.small.heads]
gap = { lr = 0.2, outcome = [[0.1, 31.5], [0.2, 25.5], [0.4, nan]] }
[layer]
batch = 2
dim = 8
"#;

pub fn library() -> Library {
    Library::from_files([("small.toml", SMALL), ("_base/part.toml", PART)])
}

/// The small experiment under another id, changed by `change`.
pub fn twin(change: impl Fn(&str) -> String) -> Experiment {
    let text = change(SMALL);
    Library::from_files([("twin.toml", text.as_str()), ("_base/part.toml", PART)])
        .load("twin")
        .unwrap()
}

pub fn small() -> Experiment {
    library().load("small").unwrap()
}

pub fn infos() -> Infos {
    infos_of(info())
}

pub fn infos_of(info: DataInfo) -> Infos {
    Infos {
        own: [(info.recipe.clone(), info)].into(),
        users: None,
        brought: false,
    }
}

pub fn info() -> DataInfo {
    DataInfo {
        name: "made up".into(),
        fingerprint: "abc".into(),
        classes: 2,
        train: 100,
        val: 10,
        test: 20,
        side: 32,
        recipe: "small".into(),
        ..DataInfo::default()
    }
}

/// Numbers that depend on the work and `shift` alone; fails when its strength is used up, as a
/// kill would. Trainings with a rate above `stable` diverge.
pub struct MadeUp {
    pub strength: AtomicUsize,
    pub shift: f64,
    pub stable: f64,
}

impl MadeUp {
    pub fn new(strength: usize) -> Self {
        Self {
            strength: strength.into(),
            shift: 0.0,
            stable: f64::INFINITY,
        }
    }
}

impl Lab for MadeUp {
    fn run(&self, task: &Task<'_>, _tick: &mut Tick<'_>) -> Result<Outcome> {
        let less = |strength: usize| strength.checked_sub(1);
        self.strength
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .map_err(|_| Error::Stopped)?;
        let seed = task.seed;
        let train = |t: &Training| {
            let base = if t.head.name == "gap" { 20.0 } else { 5.0 };
            let lr = t.lr.unwrap();
            let value = base + lr + seed.unwrap() as f64 * 0.01 + self.shift;
            let value = if lr > self.stable { f64::NAN } else { value };
            Outcome {
                measurements: vec![Measurement::new("top1_error", value, "%")],
                epochs: (1..=3)
                    .map(|epoch| EpochRecord {
                        epoch,
                        eval_error: value + 3.0 - epoch as f64,
                        ..EpochRecord::default()
                    })
                    .collect(),
            }
        };
        let timed = |metric, ms: f64| {
            let ms = ms + self.shift;
            Measurement::with_spread(metric, ms, 0.9 * ms, 1.1 * ms, "ms/image")
        };
        Ok(match task.work {
            Work::Train(t) | Work::Search(t) | Work::Pretrain(t) => {
                if let Work::Pretrain(_) = task.work {
                    std::fs::create_dir_all(task.keep.parent().unwrap()).unwrap();
                    std::fs::write(&task.keep, "weights").unwrap();
                }
                train(t)
            }
            _ => Outcome {
                measurements: vec![timed("forward_backward_ms", 1.5), timed("forward_ms", 0.5)],
                epochs: Vec::new(),
            },
        })
    }
}

/// Keeps the records that it hears of.
#[derive(Default)]
pub struct Heard {
    pub records: Vec<Record>,
}

impl Progress for Heard {
    fn finished(&mut self, _step: &Step<'_>, record: &Record) {
        self.records.push(record.clone());
    }
}

/// Plans and runs the small experiment in a folder.
pub fn run_small(dir: &Path, request: &Request, strength: usize) -> Result<Summary> {
    run_of(&[small()], dir, request, &MadeUp::new(strength)).map(|(summary, _)| summary)
}

/// Plans and runs some experiments in a folder.
pub fn run_of(
    experiments: &[Experiment],
    dir: &Path,
    request: &Request,
    lab: &dyn Lab,
) -> Result<(Summary, Heard)> {
    let mut store = Store::open(dir)?;
    let mut plan = plan_of(experiments, request, &store);
    let mut heard = Heard::default();
    let summary = run(
        &mut plan,
        request,
        dir,
        &mut store,
        &run::Library::default(),
        lab,
        &mut heard,
    )?;
    Ok((summary, heard))
}

pub fn plan_small(request: &Request, store: &Store) -> Plan {
    plan_of(&[small()], request, store)
}

pub fn plan_of(experiments: &[Experiment], request: &Request, store: &Store) -> Plan {
    let command = |id: &str| format!("isqrt reproduce {id}");
    Plan::new(experiments, request, &infos(), store, command).unwrap()
}
