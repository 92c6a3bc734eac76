//! Claims are decided by the numbers, both ways.
#![allow(clippy::unwrap_used)]

mod common;

use common::{infos, small};
use isqrt_experiments::claims::{CRITERION, Outcome, Verdict, decide, ordering};
use isqrt_experiments::plan::Infos;
use isqrt_experiments::plan::{Plan, Request};
use isqrt_experiments::record::{EpochRecord, Measurement, Record, Store};
use isqrt_experiments::results::Results;
use isqrt_experiments::spec::{Claim, ClaimKind, Experiment, PaperValue};
use isqrt_models::RepresentationSpec;

/// Errors of `five` and of `gap`, one value a seed, decided by one claim.
fn verdict(kind: ClaimKind, five: &[f64], gap: &[f64]) -> Verdict {
    let flat = |v: &[f64]| v.iter().map(|e| vec![*e]).collect::<Vec<_>>();
    verdict_of_curves(kind, &flat(five), &flat(gap))
}

fn verdict_of_curves(kind: ClaimKind, five: &[Vec<f64>], gap: &[Vec<f64>]) -> Verdict {
    let mut experiment = small();
    experiment.claims = vec![claim(kind)];
    decide_with(&experiment, five, gap)
}

fn claim(kind: ClaimKind) -> Claim {
    Claim {
        text: "five is ahead".into(),
        kind,
        metric: "top1_error".into(),
        on: String::new(),
        rows: if kind == ClaimKind::Plateau {
            vec!["gap".into(), "five".into()]
        } else {
            vec!["five".into()]
        },
        than: "gap".into(),
    }
}

fn decide_with(experiment: &Experiment, five: &[Vec<f64>], gap: &[Vec<f64>]) -> Verdict {
    with_results(experiment, five, gap, |results| {
        decide(experiment, results).remove(0)
    })
}

/// What somebody makes of records with these curves.
fn with_results<T>(
    experiment: &Experiment,
    five: &[Vec<f64>],
    gap: &[Vec<f64>],
    look: impl FnOnce(&Results<'_>) -> T,
) -> T {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let request = Request {
        seeds: Some(five.len().max(1) as u64),
        ..Request::default()
    };
    let plan = Plan::new(
        std::slice::from_ref(experiment),
        &request,
        &infos(),
        &store,
        |_| String::new(),
    );
    let plan = plan.unwrap();
    for cell in &plan.experiments[0].cells {
        let curves = if cell.row == "gap" { gap } else { five };
        let Some(curve) = cell.seed.and_then(|s| curves.get(s as usize)) else {
            continue;
        };
        let epochs = curve.iter().enumerate().map(|(i, e)| EpochRecord {
            epoch: i + 1,
            eval_error: *e,
            ..EpochRecord::default()
        });
        store
            .append(Record {
                row: cell.row.clone(),
                on: cell.on.clone(),
                seed: cell.seed,
                key: cell.key.clone(),
                main: Measurement::new("top1_error", *curve.last().unwrap(), "%"),
                epochs: epochs.collect(),
                ..Record::default()
            })
            .unwrap();
    }
    look(&Results::new(&plan.experiments[0], &store))
}

#[test]
fn ahead_beyond_chance_is_seen() {
    let v = verdict(ClaimKind::Less, &[2.0, 2.2, 1.9], &[21.0, 22.0, 20.0]);
    assert_eq!(v.outcome, Outcome::Seen);
    assert!(v.because[0].contains("3 pairs, p < 0.001"), "{v:?}");
    assert!(v.because[0].contains("difference -18.97"), "{v:?}");
}

#[test]
fn the_same_numbers_swapped_are_the_opposite() {
    let v = verdict(ClaimKind::Less, &[21.0, 22.0, 20.0], &[2.0, 2.2, 1.9]);
    assert_eq!(v.outcome, Outcome::Opposite);
}

#[test]
fn what_chance_may_do_is_not_seen() {
    // Runs of one seed differ by as much in each: small, but sure.
    let v = verdict(ClaimKind::Less, &[1.0, 2.0, 3.0], &[1.1, 2.11, 3.1]);
    assert_eq!(v.outcome, Outcome::Seen);
    // Two of three seeds agree.
    let v = verdict(ClaimKind::Less, &[1.0, 1.1, 2.0], &[3.0, 3.1, 1.9]);
    assert_eq!(v.outcome, Outcome::NotSeen);
    assert!(v.because[0].contains("p = 0."), "{v:?}");
}

#[test]
fn the_order_of_the_rows_is_held_against_the_papers() {
    let paper = |value| PaperValue {
        metric: "top1_error".into(),
        on: String::new(),
        value,
        setting: String::new(),
        source: "a table".into(),
        verified: true,
    };
    let mut e = small();
    e.rows[0].paper = vec![paper(24.7)];
    e.rows[1].paper = vec![paper(22.1)];
    let sentence = |five: &[f64], gap: &[f64]| {
        let flat = |v: &[f64]| v.iter().map(|e| vec![*e]).collect::<Vec<_>>();
        with_results(&e, &flat(five), &flat(gap), |results| {
            ordering(&e, &e.columns[0], results)
        })
    };
    let said = |five: &[f64], gap: &[f64]| sentence(five, gap).unwrap();
    let text = said(&[5.0, 5.1, 5.2], &[20.0, 20.2, 20.1]);
    assert!(
        text.starts_with("The paper's order was found here, every pair told apart"),
        "{text}"
    );
    assert!(text.contains("of the one pair of rows"), "{text}");
    assert!(
        text.contains("1 comes in the same order (1 told apart)"),
        "{text}"
    );
    let text = said(&[5.0, 9.1, 5.2], &[5.1, 8.0, 7.0]);
    assert!(text.contains("but not every pair told apart"), "{text}");
    let text = said(&[20.0, 20.2, 20.1], &[5.0, 5.1, 5.2]);
    assert!(
        text.starts_with("The paper's order was not found here"),
        "{text}"
    );
    e.rows[1].paper.clear();
    let none = with_results(&e, &[vec![1.0]], &[vec![2.0]], |results| {
        ordering(&e, &e.columns[0], results)
    });
    assert_eq!(none, None);
}

#[test]
fn one_seed_or_a_diverged_one_decides_nothing() {
    assert_eq!(
        verdict(ClaimKind::Less, &[1.0], &[20.0]).outcome,
        Outcome::NotRun
    );
    let v = verdict(ClaimKind::Less, &[1.0, f64::NAN], &[20.0, 21.0]);
    assert_eq!(v.outcome, Outcome::NotRun);
    let v = verdict(ClaimKind::Less, &[], &[]);
    assert_eq!(v.outcome, Outcome::NotRun);
}

#[test]
fn a_plateau_is_no_difference_beyond_the_spread() {
    let v = verdict(ClaimKind::Plateau, &[2.0, 2.4, 1.9], &[2.1, 2.2, 2.0]);
    assert_eq!(v.outcome, Outcome::NoDifference);
    let v = verdict(ClaimKind::Plateau, &[4.5, 4.4, 4.9], &[2.1, 2.2, 2.0]);
    assert_eq!(v.outcome, Outcome::Opposite);
}

#[test]
fn an_opposite_is_not_hidden_among_several_rows() {
    let mut experiment = small();
    let mut claim = claim(ClaimKind::Less);
    claim.rows = vec!["five".into(), "gap".into()];
    claim.than = "gap".into();
    experiment.claims = vec![claim];
    let better = decide_with(
        &experiment,
        &[vec![1.0], vec![1.11]],
        &[vec![4.0], vec![4.1]],
    );
    assert_eq!(better.outcome, Outcome::Partly);
    let worse = decide_with(
        &experiment,
        &[vec![4.0], vec![4.1]],
        &[vec![1.0], vec![1.11]],
    );
    assert_eq!(worse.outcome, Outcome::PartlyOpposite);
    assert!(worse.words.contains("for some rows"));
}

#[test]
fn no_worse_for_several_rows_says_which() {
    let mut experiment = small();
    let mut claim = claim(ClaimKind::NoWorse);
    claim.than = "gap".into();
    let mut decided = |rows: &[&str]| {
        claim.rows = rows.iter().map(|r| (*r).to_owned()).collect();
        experiment.claims = vec![claim.clone()];
        let (five, gap) = ([vec![1.0], vec![1.11]], [vec![4.0], vec![4.1]]);
        decide_with(&experiment, &five, &gap).outcome
    };
    assert_eq!(decided(&["five", "gap"]), Outcome::NoWorse);
    assert_eq!(decided(&["gap", "later"]), Outcome::PartlyNoDifference);
    assert_eq!(decided(&["five", "later"]), Outcome::Partly);
}

#[test]
fn no_worse_is_level_or_better() {
    let level = verdict(ClaimKind::NoWorse, &[2.0, 2.4, 1.9], &[2.1, 2.2, 2.0]);
    assert_eq!(level.outcome, Outcome::NoDifference);
    let better = verdict(ClaimKind::NoWorse, &[1.0, 1.11], &[4.0, 4.1]);
    let worse = verdict(ClaimKind::NoWorse, &[4.0, 4.1], &[1.0, 1.11]);
    assert_eq!(
        (better.outcome, worse.outcome),
        (Outcome::Seen, Outcome::Opposite)
    );
}

#[test]
fn fewer_epochs_to_the_error_that_the_other_ends_with() {
    let slow = vec![vec![50.0, 30.0, 20.0], vec![50.0, 31.0, 21.0]];
    let fast = vec![vec![15.0, 9.0, 5.0], vec![16.0, 9.0, 5.0]];
    let v = verdict_of_curves(ClaimKind::FewerEpochs, &fast, &slow);
    assert_eq!(v.outcome, Outcome::Seen);
    assert!(
        v.because[0].contains("epochs 1, 1 and 3, 3 by run"),
        "{v:?}"
    );
    let v = verdict_of_curves(ClaimKind::FewerEpochs, &slow, &fast);
    assert_eq!(v.outcome, Outcome::Opposite);
    assert!(v.because[0].contains("never, never"), "{v:?}");
}

#[test]
fn fewer_epochs_are_not_counted_where_a_training_diverged() {
    let slow = vec![vec![50.0, 30.0, 20.0], vec![50.0, 31.0, 21.0]];
    let fast = vec![vec![15.0, 9.0, 5.0], vec![16.0, f64::NAN]];
    for (five, gap) in [(&fast, &slow), (&slow, &fast)] {
        let v = verdict_of_curves(ClaimKind::FewerEpochs, five, gap);
        assert_eq!(v.outcome, Outcome::NotRun);
        assert!(v.because[0].contains("a training diverged"), "{v:?}");
    }
}

#[test]
fn the_report_states_the_criterion_of_every_kind() {
    for words in [
        "paired t test",
        "timings",
        "distances",
        "plateau",
        "no worse",
        "Fewer epochs",
        "One run",
        "diverged",
    ] {
        assert!(CRITERION.contains(words), "{words}");
    }
}

#[test]
fn timings_need_quartiles_that_do_not_overlap() {
    let time = |fast: (f64, f64, f64), slow: (f64, f64, f64)| {
        let mut e = small();
        e.rows[0].measures = vec![isqrt_experiments::spec::Measure::LayerTime];
        e.rows[0].head = Some(RepresentationSpec::new("mpn"));
        e.rows[1].measures = vec![isqrt_experiments::spec::Measure::LayerTime];
        e.claims = vec![Claim {
            metric: "forward_ms".into(),
            ..claim(ClaimKind::Less)
        }];
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let plan = Plan::new(
            std::slice::from_ref(&e),
            &Request::default(),
            &Infos::default(),
            &store,
            |_| String::new(),
        );
        let plan = plan.unwrap();
        for cell in &plan.experiments[0].cells {
            let (low, mid, high) = if cell.row == "five" { fast } else { slow };
            let main = Measurement::with_spread("forward_ms", mid, low, high, "ms");
            let record = Record {
                key: cell.key.clone(),
                main,
                ..Record::default()
            };
            store.append(record).unwrap();
        }
        decide(&e, &Results::new(&plan.experiments[0], &store))
            .remove(0)
            .outcome
    };
    assert_eq!(time((0.9, 1.0, 1.1), (2.9, 3.0, 3.1)), Outcome::Seen);
    assert_eq!(time((0.9, 1.0, 2.0), (1.5, 3.0, 3.1)), Outcome::NotSeen);
    assert_eq!(time((2.9, 3.0, 3.1), (0.9, 1.0, 1.1)), Outcome::Opposite);
}
