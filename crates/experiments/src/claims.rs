//! Which of the paper's claims these numbers show, and which they do not; and whether the paper's order of
//! the rows of a table is found.
//!
//! The criteria, stated in the report as well ([`CRITERION`]):
//! - trainings: *seen* if a paired t test over runs (seeds, and data sets where there are several) tells
//!   the two apart at p < 0.05 in that direction; *the opposite* likewise; everything else is *not told
//!   apart*
//! - timings: *seen* if the quartiles of the repeats do not overlap
//! - numbers without spread (distances): *seen* if smaller
//! - a plateau: *no difference seen* if neighbours are not told apart by the criterion of their numbers,
//!   else *the opposite*
//! - no worse: *seen* if smaller by that criterion, *the opposite* if larger, otherwise *no difference seen*
//! - fewer epochs: *seen* if, in every run, the row reaches the error that the other ends with in
//!   fewer epochs than the other; *the opposite* if later, or never, in every run
//! - one run, or a training that diverged, decides nothing

use crate::results::{Results, Sample};
use crate::spec::{Claim, ClaimKind, Column, Experiment};
use crate::stats::{mean, paired_test, show};
use serde::Serialize;

/// The criteria in words, for the report.
pub const CRITERION: &str = "Seen: a paired t test over runs (seeds, and data sets where there are \
several) tells the two apart at p < 0.05; for timings, the quartiles of the repeats do not overlap; \
distances, which have no spread, are smaller. A plateau, or being no worse: rows that this does not tell apart show no difference, which is no proof that there \
is none. Fewer epochs: in every run, the final error of the other is reached in \
fewer epochs. One run, or a training that diverged, decides nothing. The test is over weights and \
order of the images, with one set of test images, and where networks are fine-tuned with one network \
to start from: its runs are not independent, and their p values too small; p values are not corrected for the number of \
claims, of which one in twenty is seen by chance.";

/// Two rows are told apart by trainings below this p value.
const SIGNIFICANT: f64 = 0.05;

/// How a claim came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// By the criterion, for every row that was measured.
    Seen,
    /// For some rows only, and for none the opposite.
    Partly,
    /// For some rows, and nothing tells the others apart, as the claim has it too.
    NoWorse,
    /// Nothing tells the rows apart, as the claim has it; few runs might not tell them apart anyway.
    NoDifference,
    /// The same for some rows; the others are not decided.
    PartlyNoDifference,
    /// Not by the criterion, nor its opposite.
    NotSeen,
    /// For some rows the numbers say the opposite.
    PartlyOpposite,
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
            Self::Partly => "seen here for some rows",
            Self::NoWorse => "seen here for some rows, no difference for the others",
            Self::NoDifference => "no difference seen here",
            Self::PartlyNoDifference => "no difference seen here for some rows",
            Self::PartlyOpposite => "the opposite was seen here for some rows",
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
            ClaimKind::FewerEpochs => fewer_epochs(results, claim, row, than),
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
    let all = |good: &[Outcome]| outcomes.iter().all(|o| good.contains(o));
    let any = |outcome| outcomes.contains(&outcome);
    use Outcome::{
        NoDifference, NoWorse, NotRun, NotSeen, Opposite, Partly, PartlyNoDifference,
        PartlyOpposite, Seen,
    };
    match outcomes.first() {
        None => NotRun,
        Some(first) if all(&[*first]) => *first,
        _ if any(Opposite) => PartlyOpposite,
        _ if all(&[Seen, NoDifference]) => NoWorse,
        _ if any(Seen) => Partly,
        _ if any(NoDifference) => PartlyNoDifference,
        _ if any(NotSeen) => NotSeen,
        _ => NotRun,
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
    let sample = |row| results.sample(row, metric, &claim.on);
    let (Some(a), Some(b)) = (sample(row), sample(than)) else {
        return (Outcome::NotRun, "not run".to_owned());
    };
    let (order, why) = order(&a, &b);
    let outcome = match (kind, order) {
        (_, Order::Unknown) => Outcome::NotRun,
        (ClaimKind::Plateau | ClaimKind::NoWorse, Order::Same) => Outcome::NoDifference,
        (ClaimKind::Plateau, _) => Outcome::Opposite,
        (_, Order::Less) => Outcome::Seen,
        (_, Order::More) => Outcome::Opposite,
        (_, Order::Same) => Outcome::NotSeen,
    };
    let column = experiment.column(metric);
    let digits = column.and_then(|c| c.digits);
    let measured = a.values.first().map_or("", |(_, m)| m.unit.as_str());
    let unit = column.map_or(measured, |c| c.unit.as_str());
    // Not in the table, so it is named.
    let what = match column {
        None => format!("{} ", metric.replace('_', " ")),
        Some(_) => String::new(),
    };
    let over = match (claim.on.as_str(), experiment.train_on.len()) {
        ("", 2..) => " in the mean of all sets",
        _ => "",
    };
    let sentence = format!(
        "{what}{} and {} {unit}{over} ({why})",
        show(a.mean(), digits),
        show(b.mean(), digits)
    );
    (outcome, sentence)
}

fn order(a: &Sample, b: &Sample) -> (Order, String) {
    if a.is_seeded() || b.is_seeded() {
        return order_of_runs(a, b);
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

fn order_of_runs(a: &Sample, b: &Sample) -> (Order, String) {
    let pairs = a.pairs(b);
    if pairs.len() < 2 {
        return (Order::Unknown, "one run tells nothing".to_owned());
    }
    if pairs.iter().any(|(x, y)| !x.is_finite() || !y.is_finite()) {
        return (Order::Unknown, "a training diverged".to_owned());
    }
    let differences: Vec<f64> = pairs.iter().map(|(x, y)| x - y).collect();
    let (difference, p) = (mean(&differences), paired_test(&differences));
    let order = match (p < SIGNIFICANT, difference < 0.0) {
        (true, true) => Order::Less,
        (true, false) => Order::More,
        _ => Order::Same,
    };
    let p = match p {
        p if p < 0.001 => "p < 0.001".to_owned(),
        p => format!("p = {p:.3}"),
    };
    let n = pairs.len();
    (
        order,
        format!("difference {difference:+.2}, {n} pairs, {p}"),
    )
}

/// For each run: epochs until the error that `than` ends with, by `row` and by `than` itself.
fn fewer_epochs(results: &Results<'_>, claim: &Claim, row: &str, than: &str) -> (Outcome, String) {
    // A training that diverged has no last epoch, so its curve would end too early or be missing.
    let diverged = |row| {
        let mut trained = results.of_row(row).filter(|r| r.seed.is_some());
        trained.any(|r| !r.main.value.is_finite())
    };
    if diverged(row) || diverged(than) {
        return (Outcome::NotRun, "a training diverged".to_owned());
    }
    let metric = format!("epochs_to:{than}");
    let sample = |row| results.sample(row, &metric, &claim.on);
    let (Some(ours), Some(theirs)) = (sample(row), sample(than)) else {
        return (Outcome::NotRun, "not run".to_owned());
    };
    let pairs = ours.pairs(&theirs);
    let n = pairs.len();
    if n < 2 {
        return (Outcome::NotRun, "one run tells nothing".to_owned());
    }
    let fewer = pairs.iter().filter(|(o, t)| o < t).count();
    // Never, which is not a number, is later.
    let more = pairs.iter().filter(|(o, t)| o.is_nan() || o > t).count();
    let outcome = match (fewer, more) {
        (f, _) if f == n => Outcome::Seen,
        (_, m) if m == n => Outcome::Opposite,
        _ => Outcome::NotSeen,
    };
    let list = |values: Vec<f64>| {
        let shown = values.into_iter().map(|v| match v.is_nan() {
            true => "never".to_owned(),
            false => format!("{v}"),
        });
        shown.collect::<Vec<_>>().join(", ")
    };
    let (ours, theirs) = pairs.into_iter().unzip();
    let sentence = format!(
        "epochs {} and {} by run, fewer in {fewer} of {n} runs",
        list(ours),
        list(theirs)
    );
    (outcome, sentence)
}

/// Whether the rows come in the paper's order, in a sentence; none where the paper gives fewer than two
/// numbers beside which ours stand.
pub fn ordering(experiment: &Experiment, column: &Column, results: &Results<'_>) -> Option<String> {
    let rows: Vec<(f64, Sample)> = experiment
        .rows
        .iter()
        .filter_map(|row| {
            let paper = row.paper_value(&column.metric, &column.on)?.value;
            let sample = results.sample(&row.id, &column.metric, &column.on)?;
            sample.mean().is_finite().then_some((paper, sample))
        })
        .collect();
    let [mut same, mut other, mut level] = [[0, 0]; 3];
    for (i, (paper, a)) in rows.iter().enumerate() {
        for (other_paper, b) in &rows[i + 1..] {
            if paper == other_paper {
                continue;
            }
            let (found, _) = order(a, b);
            let agree = (paper < other_paper) == (a.mean() < b.mean());
            let counts = match (a.mean() == b.mean(), agree) {
                (true, _) => &mut level,
                (_, true) => &mut same,
                _ => &mut other,
            };
            counts[0] += 1;
            counts[1] += usize::from(matches!(found, Order::Less | Order::More));
        }
    }
    let all = same[0] + other[0] + level[0];
    if all == 0 {
        return None;
    }
    let verdict = match (same[0] == all, same[0] == all && same[1] == all, other[1]) {
        (_, true, _) => "The paper's order was found here, every pair told apart by the criterion",
        (true, ..) => {
            "The paper's order was found here, but not every pair told apart by the criterion"
        }
        (_, _, 0) => "The paper's order was not found whole here, nor was any pair of it refuted",
        _ => "The paper's order was not found here",
    };
    let pairs = |[count, sure]: [usize; 2], what: &str| {
        let come = if count == 1 { "comes" } else { "come" };
        format!("{count} {come} in the {what} ({sure} told apart)")
    };
    let of = match all {
        1 => "the one pair of rows that it orders".to_owned(),
        n => format!("{n} pairs of rows that it orders"),
    };
    let on = match column.on.as_str() {
        "" => String::new(),
        on => format!(" on {on}"),
    };
    Some(format!(
        "{verdict}: of {of} by {}{on}, {}, {}.",
        column.label,
        pairs(same, "same order"),
        pairs(other, "opposite one"),
    ))
}

fn label(experiment: &Experiment, row: &str) -> String {
    experiment
        .row(row)
        .map_or_else(|| row.to_owned(), |r| r.label.clone())
}
