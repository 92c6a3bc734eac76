//! A run that was stopped goes on where it was, whatever state the files are in.
#![allow(clippy::unwrap_used)]

mod common;

use common::{MadeUp, info, infos_of, plan_small, run_of, run_small, small, twin};
use isqrt_experiments::Error;
use isqrt_experiments::plan::{Plan, Profile, Request, State, Work};
use isqrt_experiments::record::{DataInfo, FILE, Store};
use isqrt_experiments::results::Results;
use isqrt_experiments::run::{Lab, Outcome, Task, Tick};
use isqrt_experiments::spec::Experiment;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;

const ALL: usize = 5;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_second_run_skips_everything() {
    let dir = dir();
    let request = Request::default();
    let first = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((first.ran, first.skipped), (ALL, 0));
    let before = fs::read(dir.path().join(FILE)).unwrap();
    let second = run_small(dir.path(), &request, 0).unwrap();
    assert_eq!((second.ran, second.skipped), (0, ALL));
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), before);
}

#[test]
fn a_stopped_run_keeps_what_was_done() {
    let dir = dir();
    let request = Request::default();
    assert!(matches!(
        run_small(dir.path(), &request, 2),
        Err(Error::Stopped)
    ));
    let again = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (ALL - 2, 2));
}

#[test]
fn a_last_line_cut_short_is_dropped_and_its_cell_runs_again() {
    let request = Request::default();
    for cut in [1, 2, 10, 200] {
        let dir = dir();
        run_small(dir.path(), &request, 99).unwrap();
        let path = dir.path().join(FILE);
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - cut]).unwrap();
        let read = Store::read(dir.path()).unwrap();
        assert_eq!(read.records().len(), ALL - 1);
        assert!(
            read.warnings()[0].contains("cut short"),
            "{:?}",
            read.warnings()
        );
        let again = run_small(dir.path(), &request, 99).unwrap();
        assert_eq!((again.ran, again.skipped), (1, ALL - 1));
        let whole = Store::read(dir.path()).unwrap();
        assert_eq!((whole.records().len(), whole.warnings().len()), (ALL, 0));
    }
}

#[test]
fn a_broken_line_in_the_middle_is_named_and_the_rest_is_kept() {
    let dir = dir();
    let request = Request::default();
    run_small(dir.path(), &request, 99).unwrap();
    let path = dir.path().join(FILE);
    let mut lines: Vec<String> = fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines[1] = "{\"seed\": \"x\"}".to_owned();
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    let store = Store::read(dir.path()).unwrap();
    assert_eq!(store.records().len(), ALL - 1);
    assert!(store.warnings()[0].contains("records.jsonl:2: not a record"));
}

#[test]
fn a_damaged_plan_is_written_anew() {
    let dir = dir();
    let request = Request::default();
    run_small(dir.path(), &request, 99).unwrap();
    let mut file = fs::File::create(dir.path().join("plan.json")).unwrap();
    file.write_all(b"{\"experiments\": [").unwrap();
    assert_eq!(run_small(dir.path(), &request, 0).unwrap().skipped, ALL);
}

#[test]
fn fresh_runs_everything_again_and_the_latest_record_counts() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let fresh = Request {
        fresh: true,
        ..Request::default()
    };
    let lab = MadeUp {
        shift: 30.0,
        ..MadeUp::new(99)
    };
    let (summary, heard) = run_of(&[small()], dir.path(), &fresh, &lab).unwrap();
    assert_eq!((summary.ran, heard.records.len()), (ALL, ALL));
    let store = Store::read(dir.path()).unwrap();
    assert_eq!(store.records().len(), 2 * ALL);
    let plan = plan_small(&Request::default(), &store);
    let results = Results::new(&plan.experiments[0], &store);
    let sample = |row, metric| results.sample(row, metric, "").unwrap().numbers();
    // 20 and 0.5 without the shift; the rate adds 0.2, the second seed 0.01.
    assert_eq!(sample("gap", "top1_error"), [50.2, 50.21]);
    assert_eq!(sample("five", "forward_ms"), [30.5]);
    let report = fs::read_to_string(dir.path().join("report/report.md")).unwrap();
    assert!(
        report.contains("50.2") && !report.contains("20.2"),
        "{report}"
    );
}

/// Latest record of each cell under an experiment's own name.
fn own(store: &Store, id: &str) -> BTreeMap<(String, Option<u64>), f64> {
    let own = store.records().iter().filter(|r| r.experiment == id);
    own.map(|r| ((r.cell.clone(), r.seed), r.main.value))
        .collect()
}

#[test]
fn experiments_that_share_cells_each_have_the_latest_result() {
    let dir = dir();
    let both = [small(), twin(str::to_owned)];
    let go = |fresh: bool, shift: f64, strength: usize| {
        let request = Request {
            fresh,
            ..Request::default()
        };
        let lab = MadeUp {
            shift,
            ..MadeUp::new(strength)
        };
        run_of(&both, dir.path(), &request, &lab).unwrap()
    };
    // Enough strength for the cells of one: the other has nothing to run.
    for (fresh, shift) in [(false, 0.0), (true, 1.0), (true, 2.0)] {
        let (_, heard) = go(fresh, shift, ALL);
        let store = Store::read(dir.path()).unwrap();
        let (ours, theirs) = (own(&store, "small"), own(&store, "twin"));
        assert_eq!(ours.len(), ALL);
        assert_eq!(ours, theirs, "shift {shift}");
        assert_eq!(ours[&("five/layer-time".to_owned(), None)], 1.5 + shift);
        // What is heard of is the cell that was finished.
        let mut told: Vec<_> = heard.records.iter().map(|r| &r.experiment).collect();
        told.sort();
        assert_eq!(told, [["small"; ALL], ["twin"; ALL]].concat());
        for r in &heard.records {
            assert_eq!(r.main.value, ours[&(r.cell.clone(), r.seed)], "{}", r.cell);
        }
    }
    let before = fs::read(dir.path().join(FILE)).unwrap();
    go(false, 3.0, 0);
    assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), before);
}

#[test]
fn a_shared_cell_that_diverged_is_not_copied_again_and_again() {
    let dir = dir();
    let both = [small(), twin(str::to_owned)];
    for _ in 0..3 {
        let lab = MadeUp {
            stable: 0.0,
            ..MadeUp::new(ALL)
        };
        run_of(&both, dir.path(), &Request::default(), &lab).unwrap();
        let store = Store::read(dir.path()).unwrap();
        assert_eq!(store.records().len(), 2 * ALL);
    }
}

struct Broken;

impl Lab for Broken {
    fn run(&self, task: &Task<'_>, tick: &mut Tick<'_>) -> Result<Outcome, Error> {
        match task.work {
            Work::Train(_) => Err(Error::Cell {
                cell: "training of e10net".into(),
                message: "it broke".into(),
            }),
            _ => MadeUp::new(1).run(task, tick),
        }
    }
}

#[test]
fn a_cell_that_fails_is_named_with_experiment_and_seed() {
    let dir = dir();
    let request = Request {
        seeds: Some(1),
        ..Request::default()
    };
    let error = run_of(&[small()], dir.path(), &request, &Broken)
        .err()
        .unwrap();
    // The two trainings run side by side.
    let told = ["gap", "five"]
        .map(|row| format!("small {row}/train on small seed 0: training of e10net: it broke"));
    assert!(told.contains(&error.to_string()), "{error}");
}

/// Panics in trainings, or in everything else.
struct Panics {
    trainings: bool,
}

impl Lab for Panics {
    fn run(&self, task: &Task<'_>, tick: &mut Tick<'_>) -> Result<Outcome, Error> {
        match matches!(task.work, Work::Train(_)) == self.trainings {
            true => panic!("a fault"),
            false => MadeUp::new(1).run(task, tick),
        }
    }
}

#[test]
fn work_that_panics_ends_the_run_with_an_error() {
    for trainings in [true, false] {
        let (dir, lab) = (dir(), Panics { trainings });
        let error = run_of(&[small()], dir.path(), &Request::default(), &lab);
        let error = error.err().unwrap().to_string();
        assert!(error.contains("panicked"), "{error}");
    }
}

#[test]
fn a_batch_is_no_larger_than_the_training_part_and_the_record_says_so() {
    let dir = dir();
    let store = Store::read(dir.path()).unwrap();
    let plan = |train| {
        let info = DataInfo { train, ..info() };
        let request = Request::default();
        Plan::new(&[small()], &request, &infos_of(info), &store, str::to_owned)
    };
    let batches = |train| -> Vec<usize> {
        let plan = plan(train).unwrap();
        let works = plan.experiments[0].cells.iter().map(|c| c.work.clone());
        works
            .filter_map(|w| match w {
                Some(Work::Train(t)) => Some(t.recipe.batch),
                _ => None,
            })
            .collect()
    };
    assert_eq!(batches(100), [8; 4]);
    assert_eq!(batches(5), [5; 4]);
    let error = plan(1).unwrap_err().to_string();
    assert_eq!(error, "made up: 1 training images; expected at least 2");
}

#[test]
fn more_seeds_run_only_the_new_ones() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let more = Request {
        seeds: Some(4),
        ..Request::default()
    };
    let again = run_small(dir.path(), &more, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (4, ALL));
}

#[test]
fn the_plan_knows_what_is_done_and_how_long_the_rest_takes() {
    let dir = dir();
    let request = Request::default();
    let store = Store::read(dir.path()).unwrap();
    let plan = plan_small(&request, &store);
    assert_eq!(plan.todo().count(), ALL);
    assert!(plan.seconds_left(1) > 0.0);
    run_small(dir.path(), &request, 99).unwrap();
    let store = Store::read(dir.path()).unwrap();
    let plan = plan_small(&request, &store);
    assert!(
        plan.experiments[0]
            .cells
            .iter()
            .all(|c| c.state == State::Done)
    );
    assert_eq!(plan.seconds_left(1), 0.0);
}

#[test]
fn a_search_chooses_each_rate_on_the_validation_part_and_is_resumed_too() {
    let dir = dir();
    let request = Request {
        search: true,
        ..Request::default()
    };
    // Two heads, two rates each, and what a plain run does.
    let all = ALL + 4;
    assert!(run_small(dir.path(), &request, 3).is_err());
    let again = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((again.ran, again.skipped), (all - 3, 3));
    let store = Store::read(dir.path()).unwrap();
    let trained = || store.records().iter().filter(|r| r.measure == "train");
    assert_eq!(trained().count(), 4);
    // The made-up error grows with the rate, so 0.1 is best for both heads.
    assert!(
        trained().all(|r| r.config["lr"] == 0.1),
        "{:?}",
        trained().collect::<Vec<_>>()
    );
    assert_eq!(run_small(dir.path(), &request, 0).unwrap().skipped, all);
    let rates = fs::read_to_string(dir.path().join("rates.toml")).unwrap();
    assert!(rates.contains("[rates.small.heads]\n"), "{rates}");
    assert!(
        rates.contains("gap = { lr = 0.1, outcome = [[0.1, 21.10], [0.2, 21.20]] }"),
        "{rates}"
    );
}

#[test]
fn rates_that_a_search_found_can_be_read_back() {
    let dir = dir();
    let request = Request {
        search: true,
        ..Request::default()
    };
    // The same recipe, one row of the same name, one whose name no bare key can be.
    let other = twin(|text| {
        text.replace("id = \"gap\"", "id = \"average pooling\"")
            .replace("than = \"gap\"", "than = \"average pooling\"")
            .replace("[\"gap\", \"five\"]", "[\"average pooling\", \"five\"]")
    });
    let lab = MadeUp {
        stable: 0.15,
        ..MadeUp::new(99)
    };
    run_of(&[small(), other], dir.path(), &request, &lab).unwrap();
    let text = fs::read_to_string(dir.path().join("rates.toml")).unwrap();
    let part: Experiment = toml::from_str(&text).unwrap();
    let heads = &part.rates["small"].heads;
    let names: Vec<&str> = heads.keys().map(String::as_str).collect();
    assert_eq!(names, ["average pooling", "five", "gap"]);
    for head in heads.values() {
        assert_eq!(head.lr, 0.1);
        assert!(head.outcome[1][1].is_nan(), "{head:?}");
    }
}

#[test]
fn the_paper_profile_times_but_does_not_train() {
    let dir = dir();
    let request = Request {
        profile: Profile::Paper,
        ..Request::default()
    };
    let summary = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((summary.ran, summary.not_run), (1, 2));
    let page = fs::read_to_string(dir.path().join("report/index.html")).unwrap();
    assert!(page.contains("no recipe of the paper profile is written for it"));
}

#[test]
fn a_folder_in_use_is_refused() {
    let dir = dir();
    let _held = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("in use by another run"), "{error}");
}

#[test]
fn a_record_holds_what_is_needed_to_judge_it() {
    let dir = dir();
    run_small(dir.path(), &Request::default(), 99).unwrap();
    let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
    for line in text.lines() {
        let r: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in [
            "experiment",
            "cell",
            "profile",
            "seed",
            "metric",
            "value",
            "unit",
            "paper",
            "paper_source",
            "paper_verified",
            "config",
            "commit",
            "machine",
            "data",
            "epochs",
            "started",
            "finished",
            "key",
        ] {
            assert!(r.get(key).is_some(), "{key} in {line}");
        }
        if r["measure"] == "train" {
            assert_eq!(r["epochs"].as_array().unwrap().len(), 3);
            assert_eq!(r["data"]["fingerprint"], "abc");
        } else {
            assert_eq!(r["more"][0]["paper"], 0.41);
            assert_eq!(r["more"][0]["paper_verified"], false);
        }
    }
}

/// Fine-tuning from a network that another recipe trains, which several rows share.
fn fine_tuned() -> Experiment {
    let mut e = twin(str::to_owned);
    let mut tuned = e.recipes["small"].clone();
    tuned.start = Some("small".to_owned());
    e.recipes.insert("tuned".to_owned(), tuned);
    let rates = e.rates["small"].clone();
    e.rates.insert("tuned".to_owned(), rates);
    e.train_on = vec!["tuned".to_owned()];
    for row in &mut e.rows {
        row.start_head = Some(isqrt_models::RepresentationSpec::new("gap"));
    }
    e
}

fn plan_of_tuned(request: &Request, store: &Store) -> Plan {
    let tuned = DataInfo {
        recipe: "tuned".into(),
        fingerprint: "def".into(),
        ..info()
    };
    let mut infos = infos_of(info());
    infos.own.insert("tuned".to_owned(), tuned);
    Plan::new(&[fine_tuned()], request, &infos, store, str::to_owned).unwrap()
}

#[test]
fn a_network_that_others_start_from_is_trained_once_and_first() {
    let dir = dir();
    let request = Request::default();
    let go = |strength| {
        let mut store = Store::open(dir.path()).unwrap();
        let mut plan = plan_of_tuned(&request, &store);
        let lab = MadeUp::new(strength);
        let images = isqrt_experiments::run::Library::default();
        let mut heard = common::Heard::default();
        let args = (&mut plan, &request, dir.path(), &mut store, &images);
        let (plan, request, dir, store, images) = args;
        let done = isqrt_experiments::run::run(plan, request, dir, store, images, &lab, &mut heard);
        done.map(|summary| (summary, heard))
    };
    let (summary, heard) = go(99).unwrap();
    // One timing, one network to start from, two rows of two seeds.
    assert_eq!(summary.ran, 6);
    let names: Vec<&str> = heard.records.iter().map(|r| r.measure.as_str()).collect();
    assert_eq!(names[1], "pretrain", "{names:?}");
    let first = heard.records[1].key.clone();
    let trained = heard.records.iter().filter(|r| r.measure == "train");
    assert!(trained.clone().all(|r| r.config["start"] == first.as_str()));
    assert_eq!(trained.count(), 4);
    assert_eq!(go(0).unwrap().0.skipped, 6);
    // Its weights are lost: nothing needs them, so nothing is done.
    fs::remove_dir_all(dir.path().join("weights")).unwrap();
    assert_eq!(go(0).unwrap().0.skipped, 6);
    // One more seed needs them.
    let records = fs::read_to_string(dir.path().join(FILE)).unwrap();
    let kept: Vec<&str> = records
        .lines()
        .filter(|l| !l.contains("\"seed\":1"))
        .collect();
    fs::write(dir.path().join(FILE), kept.join("\n") + "\n").unwrap();
    let (summary, heard) = go(99).unwrap();
    assert_eq!((summary.ran, summary.skipped), (3, 3));
    assert_eq!(heard.records[0].measure, "pretrain");
}

#[test]
fn rows_can_be_asked_for_alone() {
    let dir = dir();
    let request = Request {
        rows: vec!["five".to_owned()],
        ..Request::default()
    };
    let first = run_small(dir.path(), &request, 99).unwrap();
    assert_eq!((first.ran, first.not_run), (3, 2));
    let all = run_small(dir.path(), &Request::default(), 99).unwrap();
    assert_eq!((all.ran, all.skipped), (2, 3));
}

#[test]
fn quick_and_thorough_change_epochs_and_seeds() {
    use isqrt_experiments::plan::Effort;
    let dir = dir();
    let store = Store::read(dir.path()).unwrap();
    let of = |effort| {
        let request = Request {
            effort,
            ..Request::default()
        };
        let plan = plan_small(&request, &store);
        let cells = &plan.experiments[0].cells;
        let epochs = cells.iter().find_map(|c| match &c.work {
            Some(Work::Train(t)) => Some(t.recipe.epochs),
            _ => None,
        });
        (epochs.unwrap(), cells.len())
    };
    assert_eq!(of(Effort::Usual), (3, ALL));
    assert_eq!(of(Effort::Quick), (1, ALL));
    assert_eq!(of(Effort::Thorough), (6, ALL + 4));
}
