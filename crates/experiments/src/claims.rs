//! Which of the paper's claims these numbers show, and which they do not.
//!
//! The criteria, stated in the report as well ([`CRITERION`]):
//! - trainings over several seeds: *seen* if the mean difference exceeds the pooled standard
//!   deviation and every seed agrees; *the opposite* likewise; everything else is *not told apart*
//! - timings: *seen* if the quartiles of the repeats do not overlap
//! - numbers without spread (distances): *seen* if smaller
//! - a plateau: *seen* if neighbours are not told apart by the criterion of their numbers
//! - no worse: *seen* unless larger by that criterion
//! - fewer epochs: *seen* if, in every seed, the row reaches the error that the other ends with in
//!   fewer epochs than the other; *the opposite* if later, or never, in every seed
//! - one seed, or a training that diverged, decides nothing
//!
//! Nothing here is a significance test: three seeds that agree happen by chance one time in eight.

use crate::results::{Results, Sample};
use crate::spec::{Claim, ClaimKind, Experiment};
use crate::stats::{mean, pooled_sd, show};
use serde::Serialize;

/// The criteria in words, for the report.
pub const CRITERION: &str = "Seen: over seeds, the mean difference exceeds the pooled standard \
deviation and every seed agrees; for timings, the quartiles of the repeats do not overlap; \
distances, which have no spread, are smaller. A plateau: neighbours are not told apart by that. No \
worse: not larger by that. Fewer epochs: in every seed, the final error of the other is reached in \
fewer epochs. One seed, or a training that diverged, decides nothing. \
The spread is over weights and order of the images, with one set of test images, and a few seeds \
are no proof: three that agree happen by chance one time in eight.";

/// How a claim came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// By the criterion, for every row that was measured.
    Seen,
    /// For some rows only.
    Partly,
    /// Not by the criterion, nor its opposite.
    NotSeen,
    /// The numbers say the opposite, by the same criterion.
    Opposite,
    /// The cells were not run, or too few seeds.
    NotRun,
}

impl Outcome {
    /// As shown.
    pub fn words(self) -> &'static str {
        match self {
            Self::Seen => "seen here",
            Self::Partly => "partly seen here",
            Self::NotSeen => "not seen here",
            Self::Opposite => "the opposite was seen here",
            Self::NotRun => "not decided",
        }
    }
}

/// A claim, decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The claim.
    pub text: String,
    /// How it came out.
    pub outcome: Outcome,
    /// The outcome as shown.
    pub words: String,
    /// The numbers behind it, one sentence a comparison.
    pub because: Vec<String>,
}

/// Decides all claims of an experiment.
pub fn decide(experiment: &Experiment, results: &Results<'_>) -> Vec<Verdict> {
    experiment
        .claims
        .iter()
        .map(|claim| decide_one(experiment, claim, results))
        .collect()
}

fn decide_one(experiment: &Experiment, claim: &Claim, results: &Results<'_>) -> Verdict {
    let mut outcomes = Vec::new();
    let mut because = Vec::new();
    for (row, than) in pairs(claim) {
        let (outcome, sentence) = match claim.kind {
            ClaimKind::FewerEpochs => fewer_epochs(results, row, than),
            kind => compare(experiment, results, claim, kind, row, than),
        };
        outcomes.push(outcome);
        because.push(format!(
            "{} against {}: {sentence}.",
            label(experiment, row),
            label(experiment, than)
        ));
    }
    let outcome = together(&outcomes);
    Verdict {
        text: claim.text.clone(),
        outcome,
        words: outcome.words().to_owned(),
        because,
    }
}

/// Rows against `than`; for a plateau each row against the one before.
fn pairs(claim: &Claim) -> Vec<(&str, &str)> {
    if claim.kind == ClaimKind::Plateau {
        claim
            .rows
            .windows(2)
            .map(|w| (w[1].as_str(), w[0].as_str()))
            .collect()
    } else {
        claim
            .rows
            .iter()
            .map(|r| (r.as_str(), claim.than.as_str()))
            .collect()
    }
}

fn together(outcomes: &[Outcome]) -> Outcome {
    let decided: Vec<Outcome> = outcomes
        .iter()
        .copied()
        .filter(|o| *o != Outcome::NotRun)
        .collect();
    match decided.first() {
        None => Outcome::NotRun,
        Some(first) if decided.iter().all(|o| o == first) => *first,
        _ if decided.contains(&Outcome::Seen) => Outcome::Partly,
        _ => Outcome::NotSeen,
    }
}

/// Which of two samples is smaller, by the criterion.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Less,
    More,
    Same,
    Unknown,
}

fn compare(
    experiment: &Experiment,
    results: &Results<'_>,
    claim: &Claim,
    kind: ClaimKind,
    row: &str,
    than: &str,
) -> (Outcome, String) {
    let metric = claim.metric.as_str();
    let (Some(a), Some(b)) = (results.sample(row, metric), results.sample(than, metric)) else {
        return (Outcome::NotRun, "not run".to_owned());
    };
    let (order, why) = order(&a, &b);
    let outcome = match (kind, order) {
        (_, Order::Unknown) => Outcome::NotRun,
        (ClaimKind::Plateau, Order::Same) => Outcome::Seen,
        (ClaimKind::Plateau, _) => Outcome::NotSeen,
        (ClaimKind::NoWorse, Order::More) => Outcome::NotSeen,
        (ClaimKind::NoWorse, _) => Outcome::Seen,
        (_, Order::Less) => Outcome::Seen,
        (_, Order::More) => Outcome::Opposite,
        (_, Order::Same) => Outcome::NotSeen,
    };
    let column = experiment.column(metric);
    let digits = column.and_then(|c| c.digits);
    let unit = column.map_or("", |c| c.unit.as_str());
    let sentence = format!(
        "{} and {} {unit} ({why})",
        show(a.mean(), digits),
        show(b.mean(), digits)
    );
    (outcome, sentence)
}

fn order(a: &Sample, b: &Sample) -> (Order, String) {
    let seeded = a.values.iter().chain(&b.values).any(|(s, _)| s.is_some());
    if seeded {
        return order_of_seeds(a, b);
    }
    let (x, y) = (a.mean(), b.mean());
    if !(x.is_finite() && y.is_finite()) {
        return (Order::Unknown, "not a finite number".to_owned());
    }
    let times = format!("{} times as much", show(y / x, None));
    match (a.interval(), b.interval()) {
        (Some((a_low, a_high)), Some((b_low, b_high))) if a_high < b_low || b_high < a_low => {
            let order = if a_high < b_low {
                Order::Less
            } else {
                Order::More
            };
            (order, format!("the latter {times}; quartiles apart"))
        }
        (Some(_), Some(_)) => (Order::Same, "quartiles overlap".to_owned()),
        _ if x < y => (Order::Less, format!("the latter {times}")),
        _ if x > y => (Order::More, format!("the latter {times}")),
        _ => (Order::Same, "equal".to_owned()),
    }
}

fn order_of_seeds(a: &Sample, b: &Sample) -> (Order, String) {
    let pairs: Vec<(f64, f64)> = a
        .values
        .iter()
        .filter_map(|(seed, m)| Some((m.value, b.at(*seed)?)))
        .collect();
    let n = pairs.len();
    if n < 2 {
        return (Order::Unknown, "one seed tells nothing".to_owned());
    }
    if pairs.iter().any(|(x, y)| !x.is_finite() || !y.is_finite()) {
        return (Order::Unknown, "a training diverged".to_owned());
    }
    let (xs, ys): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let difference = mean(&xs) - mean(&ys);
    let spread = pooled_sd(&xs, &ys);
    let less = pairs.iter().filter(|(x, y)| x < y).count();
    let more = pairs.iter().filter(|(x, y)| x > y).count();
    let order = if -difference > spread && less == n {
        Order::Less
    } else if difference > spread && more == n {
        Order::More
    } else {
        Order::Same
    };
    let why = format!(
        "difference {difference:+.2}, pooled sd {spread:.2}, smaller in {less} of {n} seeds"
    );
    (order, why)
}

/// For each seed: epochs until the error that `than` ends with, by `row` and by `than` itself.
fn fewer_epochs(results: &Results<'_>, row: &str, than: &str) -> (Outcome, String) {
    // A training that diverged has no last epoch, so its curve would end too early or be missing.
    let diverged = |row| {
        let mut trained = results.of_row(row).filter(|r| r.seed.is_some());
        trained.any(|r| !r.main.value.is_finite())
    };
    if diverged(row) || diverged(than) {
        return (Outcome::NotRun, "a training diverged".to_owned());
    }
    let (ours, theirs) = (results.curves(row), results.curves(than));
    let mut pairs = Vec::new();
    for (seed, their) in &theirs {
        let our = ours.iter().find(|(s, _)| s == seed);
        if let (Some((_, our)), Some(level)) = (our, their.last()) {
            let first = |curve: &[f64]| curve.iter().position(|e| e <= level).map(|i| i + 1);
            pairs.push((first(our), first(their).unwrap_or(their.len())));
        }
    }
    let n = pairs.len();
    if n < 2 {
        let why = if n == 0 {
            "not run"
        } else {
            "one seed tells nothing"
        };
        return (Outcome::NotRun, why.to_owned());
    }
    let fewer = pairs
        .iter()
        .filter(|(o, t)| o.is_some_and(|o| o < *t))
        .count();
    let more = pairs
        .iter()
        .filter(|(o, t)| o.is_none_or(|o| o > *t))
        .count();
    let outcome = match (fewer, more) {
        (f, _) if f == n => Outcome::Seen,
        (_, m) if m == n => Outcome::Opposite,
        _ => Outcome::NotSeen,
    };
    let list = |values: Vec<String>| values.join(", ");
    let sentence = format!(
        "epochs {} and {} by seed, fewer in {fewer} of {n} seeds",
        list(
            pairs
                .iter()
                .map(|(o, _)| o.map_or("never".into(), |o| o.to_string()))
                .collect()
        ),
        list(pairs.iter().map(|(_, t)| t.to_string()).collect()),
    );
    (outcome, sentence)
}

fn label(experiment: &Experiment, row: &str) -> String {
    experiment
        .row(row)
        .map_or_else(|| row.to_owned(), |r| r.label.clone())
}
