//! A run that is stopped and taken up again is the run that was not, bit for bit; and what ranks, parts
//! of a batch and left-out updates do to a run.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{ImageSet, Step};
use isqrt_models::checkpoint::Record;
use isqrt_train::{
    Collective, Error, Job, Line, Moment, NonFinite, Observer, Rank, Result, Saved, Silent,
    Snapshot, StepInfo, TrainConfig, Trainer,
};

const SIDE: usize = 16;

fn images(per_class: usize, mut state: u64) -> Arc<ImageSet> {
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u8
    };
    let labels: Vec<u32> = (0..3 * per_class).map(|i| (i % 3) as u32).collect();
    let pixel = |label: u32, at: usize, noise: u8| {
        let stripe = [at / SIDE, at % SIDE, 0][label as usize] % 4;
        (60 * stripe) as u8 + noise / 4
    };
    let mut pixels = Vec::new();
    for &label in &labels {
        for at in 0..SIDE * SIDE * 3 {
            pixels.push(pixel(label, at / 3, random()));
        }
    }
    let classes = ["across", "down", "none"].map(String::from).to_vec();
    Arc::new(ImageSet::new(classes, SIDE, SIDE, pixels, labels).unwrap())
}

fn config(more: &str) -> TrainConfig {
    let model =
        "[model]\nbackbone = \"e10net\"\nclasses = 3\nrepresentation = { name = \"dropcov\" }";
    let toml = format!("epochs = 3\nbatch = 12\nseed = 5\n{more}\n{model}");
    toml::from_str(&toml).unwrap_or_else(|e| panic!("{e}: {toml}"))
}

const SGD: &str = "ema = 0.9\n[optimiser]\nkind = \"sgd\"\nlr = 0.05\nweight_decay = 1e-3";
const ADAMW: &str = "accumulate = 2\nclip_norm = 1.0\n[optimiser]\nkind = \"adamw\"\nlr = 0.002";

const AUGMENT: [Step; 2] = [
    Step::RandomCrop {
        size: SIDE,
        padding: 2,
        reflect: true,
    },
    Step::HorizontalFlip { p: 0.5 },
];

fn job(config: &TrainConfig) -> Job<'_> {
    let job = Job::in_memory(config, &AUGMENT, images(20, 1), images(5, 2)).unwrap();
    Job {
        log_every: 3,
        ..job
    }
}

/// Parameters, running statistics, everything, as bits.
fn bits(trainer: &Trainer<'_>) -> Vec<(String, Vec<u32>)> {
    let vars = trainer.network().vars();
    let parameters = vars
        .parameters()
        .map(|(name, var)| (name.to_owned(), var.as_tensor().clone()));
    let buffers = vars
        .buffers()
        .map(|(name, buffer)| (name.to_owned(), buffer.get()));
    let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    parameters
        .chain(buffers)
        .map(|(name, tensor)| (name, values(tensor).iter().map(|v| v.to_bits()).collect()))
        .collect()
}

/// Keeps a state after one update, and then stops or goes on; keeps the lines without their times.
struct Keeper {
    at: u64,
    stop: bool,
    path: PathBuf,
    lines: Vec<String>,
}

impl Keeper {
    fn new(at: u64, path: &Path) -> Self {
        Self {
            at,
            stop: true,
            path: path.to_owned(),
            lines: Vec::new(),
        }
    }
}

impl Observer for Keeper {
    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        match self.stop && info.step == self.at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let mut value = serde_json::to_value(line).unwrap();
        let times = [
            "seconds",
            "run_seconds",
            "cpu_seconds",
            "images_per_second",
            "wait_share",
        ];
        for key in times {
            value.as_object_mut().unwrap().remove(key);
        }
        self.lines.push(value.to_string());
        Ok(())
    }

    fn snapshot(&mut self, snapshot: &Snapshot<'_>, moment: Moment) -> Result<()> {
        match moment {
            Moment::Stop => snapshot.save(&self.path, "test", &Record::default()),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_run_taken_up_after_any_update_is_the_run_that_was_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    for more in [SGD, ADAMW] {
        let config = config(more);
        let mut whole = Trainer::new(job(&config)).unwrap();
        let mut heard = Keeper::new(u64::MAX, dir.path());
        whole.run(&mut heard).unwrap();
        // In the middle of an epoch, at its end, at the start of the next.
        for at in [1, 4, 5, 6, 14] {
            let path = dir.path().join("state.safetensors");
            let mut before = Keeper::new(at, &path);
            Trainer::new(job(&config))
                .unwrap()
                .run(&mut before)
                .unwrap();
            // With another number of threads too.
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(1 + at as usize % 3)
                .build()
                .unwrap();
            let mut after = Keeper::new(u64::MAX, &path);
            let resumed = pool.install(|| {
                let saved = Saved::open(&path, "test").unwrap();
                let mut trainer = Trainer::new(job(&config)).unwrap();
                trainer.resume(&saved).unwrap();
                trainer.run(&mut after).unwrap();
                bits(&trainer)
            });
            assert!(resumed == bits(&whole), "{more}: other weights after {at}");
            let lines = [before.lines, after.lines].concat();
            assert_eq!(lines, heard.lines, "{more}: other lines after {at}");
        }
    }
}

#[test]
fn a_state_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let config = config(SGD);
    let mut keeper = Keeper::new(2, &path);
    Trainer::new(job(&config))
        .unwrap()
        .run(&mut keeper)
        .unwrap();
    let refused =
        |path: &Path, identity: &str| Saved::open(path, identity).unwrap_err().to_string();
    assert!(refused(&path, "other").contains("another spec"), "foreign");
    let bytes = std::fs::read(&path).unwrap();
    for share in [0, 1, 2, 3] {
        let cut = dir.path().join("cut.safetensors");
        std::fs::write(&cut, &bytes[..bytes.len() * share / 4]).unwrap();
        let message = refused(&cut, "test");
        assert!(message.contains("cut.safetensors"), "{message}");
    }
    let weights = dir.path().join("weights.safetensors");
    let trainer = Trainer::new(job(&config)).unwrap();
    trainer.network().save(&weights).unwrap();
    assert!(refused(&weights, "test").contains("no state"));
    // And a file with a state is a file of weights for everybody else.
    let mut trainer = Trainer::new(job(&config)).unwrap();
    trainer
        .start_from(|network| Ok(network.load(&path)?))
        .unwrap();
}

#[test]
fn parts_of_a_batch_give_the_gradient_of_the_whole() {
    let of = |accumulate: usize| {
        let plain = "[optimiser]\nkind = \"sgd\"\nlr = 0.05";
        let config = TrainConfig {
            epochs: 1,
            accumulate,
            // Batch norm would see the parts.
            frozen_norm: true,
            ..config(plain)
        };
        let mut config = config;
        config.model.representation = isqrt_models::RepresentationSpec::new("isqrt");
        let mut trainer = Trainer::new(job(&config)).unwrap();
        trainer.run(&mut Silent).unwrap();
        bits(&trainer)
    };
    near(&of(1), &of(3), 1e-4);
}

fn near(a: &[(String, Vec<u32>)], b: &[(String, Vec<u32>)], most: f32) {
    for ((name, a), (_, b)) in a.iter().zip(b) {
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
            assert!((a - b).abs() <= most * a.abs().max(1.0), "{name}: {a} {b}");
        }
    }
}

/// What each of two ranks comes to: its result, its weights, and the averaged network's values.
type Outcome = (
    isqrt_train::TrainResult,
    Vec<(String, Vec<u32>)>,
    Vec<Vec<f32>>,
);

fn two_ranks(config: &TrainConfig) -> Vec<Outcome> {
    let ranks = Rank::all(&[Device::Cpu, Device::Cpu]).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    let mut job = job(config);
                    job.collective = &rank;
                    let mut trainer = Trainer::new(job).unwrap();
                    let result = trainer.run(&mut Silent).unwrap();
                    let weights = bits(&trainer);
                    let averaged = trainer.into_averaged().unwrap();
                    let flat = |value: Tensor| value.flatten_all().unwrap().to_vec1().unwrap();
                    let buffers = averaged.vars().buffers();
                    let averages = buffers.map(|(_, b)| flat(b.get())).collect();
                    (result, weights, averages)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Running statistics are each rank's own while an epoch goes on, and so are their averages.
#[test]
fn ranks_share_averages() {
    let config = config("ema = 0.9\n[optimiser]\nkind = \"sgd\"\nlr = 0.05");
    let ranks = two_ranks(&config);
    assert!(!ranks[0].2.is_empty());
    assert!(ranks[0].1 == ranks[1].1, "ranks have other weights");
    assert!(ranks[0].2 == ranks[1].2, "ranks have other averages");
}

/// Two ranks and one process on the same batches: the same weights but for rounding, the same counts.
#[test]
fn ranks_share_a_batch_and_an_evaluation() {
    let mut config = config("frozen_norm = true\n[optimiser]\nkind = \"sgd\"\nlr = 0.05");
    config.model.representation = isqrt_models::RepresentationSpec::new("isqrt");
    let mut alone = Trainer::new(job(&config)).unwrap();
    let expected = alone.run(&mut Silent).unwrap();
    let results = two_ranks(&config);
    let (first, second) = (&results[0], &results[1]);
    assert!(first.1 == second.1, "ranks have other weights");
    near(&bits(&alone), &first.1, 1e-3);
    let evaluation = |result: &isqrt_train::TrainResult| result.evaluation.clone().unwrap();
    assert_eq!(evaluation(&first.0), evaluation(&second.0));
    assert_eq!(evaluation(&first.0).total, evaluation(&expected).total);
    let losses = (first.0.epochs[2].train_loss, expected.epochs[2].train_loss);
    assert!((losses.0 - losses.1).abs() < 1e-3, "{losses:?}");
}

/// An observer that panics after some updates.
struct Panics(u64);

impl Observer for Panics {
    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        assert!(info.step < self.0, "on purpose");
        ControlFlow::Continue(())
    }
}

#[test]
fn no_rank_waits_for_one_that_is_gone() {
    let config = config(SGD);
    let train = |rank: Rank, last: u64| {
        let mut job = job(&config);
        job.collective = &rank;
        let mut trainer = Trainer::new(job).unwrap();
        trainer.run(&mut Panics(last)).map(|_| ())
    };
    let mut ranks = Rank::all(&[Device::Cpu, Device::Cpu]).unwrap();
    let (second, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let (panicked, told) = std::thread::scope(|scope| {
        let gone = scope.spawn(|| train(second, 2));
        let told = train(first, u64::MAX);
        (gone.join(), told)
    });
    assert!(panicked.is_err());
    let told = told.unwrap_err().to_string();
    assert!(
        told.contains("rank 1") && told.contains("panicked"),
        "{told}"
    );
}

#[test]
fn ranks_with_other_tensors_are_told() {
    let ranks = Rank::all(&[Device::Cpu, Device::Cpu]).unwrap();
    let sums = |(rank, len): (Rank, usize)| {
        let zeros = Tensor::zeros(len, DType::F32, &Device::Cpu).unwrap();
        rank.all_reduce(&mut [("a".to_owned(), zeros)])
    };
    let told = std::thread::scope(|scope| {
        let threads = ranks.into_iter().zip([2, 3]);
        let threads: Vec<_> = threads.map(|r| scope.spawn(move || sums(r))).collect();
        let told = threads.into_iter().map(|t| t.join().unwrap());
        told.collect::<Vec<_>>()
    });
    for told in told {
        let told = told.unwrap_err().to_string();
        assert!(told.contains("has other tensors"), "{told}");
    }
}

/// Spoils a weight after the second update, and mends it after the third.
struct Saboteur<'a> {
    trainer: &'a Mutex<Option<candle_core::Var>>,
    good: Option<Tensor>,
    lines: Vec<Line>,
}

impl Observer for Saboteur<'_> {
    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        let var = self.trainer.lock().unwrap().clone().unwrap();
        if info.step == 2 {
            self.good = Some(var.as_tensor().copy().unwrap());
            let bad = (var.as_tensor() * f64::NAN).unwrap();
            var.set(&bad).unwrap();
        } else if let Some(good) = self.good.take() {
            var.set(&good).unwrap();
        }
        ControlFlow::Continue(())
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        self.lines.push(line.clone());
        Ok(())
    }
}

#[test]
fn an_update_that_is_not_finite_is_left_out_or_ends_the_run_with_the_layer() {
    let run = |non_finite| {
        let config = TrainConfig {
            non_finite,
            ..config(SGD)
        };
        let mut trainer = Trainer::new(job(&config)).unwrap();
        let name = "backbone.conv1.weight";
        let found = trainer
            .network()
            .vars()
            .parameters()
            .find(|(n, _)| *n == name);
        let names: Vec<_> = trainer.network().vars().parameters().map(|p| p.0).collect();
        let var = found.unwrap_or_else(|| panic!("{names:?}")).1.clone();
        let var = Mutex::new(Some(var));
        let mut saboteur = Saboteur {
            trainer: &var,
            good: None,
            lines: Vec::new(),
        };
        let result = trainer.run(&mut saboteur);
        (result, saboteur.lines)
    };
    let (result, _) = run(NonFinite::Stop);
    let error = result.unwrap_err();
    assert!(error.is_divergence());
    let message = error.to_string();
    assert!(
        message.contains("step 3 of epoch 1") && message.contains("backbone.conv1"),
        "{message}"
    );

    let (result, lines) = run(NonFinite::Skip(1));
    let result = result.unwrap();
    assert_eq!((result.steps, result.skipped_steps), (15, 1));
    assert!(result.epochs[2].train_loss.is_finite());
    let skipped = |line: &&Line| matches!(line, Line::Skipped { step: 3, .. });
    assert_eq!(lines.iter().filter(skipped).count(), 1);

    let (result, _) = run(NonFinite::Skip(0));
    assert!(matches!(result, Err(Error::NonFinite { .. })));
}

/// What is frozen stays, decay or not; everything else learns.
#[test]
fn frozen_parameters_stay() {
    for optimiser in [
        SGD,
        "[optimiser]\nkind = \"adamw\"\nlr = 0.01\nweight_decay = 0.1",
    ] {
        let mut config = config(optimiser);
        config.frozen = vec!["backbone.conv1*".to_owned()];
        let mut trainer = Trainer::new(job(&config)).unwrap();
        let before = bits(&trainer);
        trainer.run(&mut Silent).unwrap();
        let mut stayed = 0;
        for ((name, was), (_, is)) in before.iter().zip(bits(&trainer)) {
            if name.contains("running") {
                continue;
            }
            let frozen = name.starts_with("backbone.conv1");
            assert_eq!(*was == is, frozen, "{name}");
            stayed += usize::from(frozen);
        }
        assert!(stayed > 0);
    }
}
