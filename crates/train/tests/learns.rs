//! A problem that a small network learns in seconds, and what the engine promises about it.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::sync::Arc;

use isqrt_datasets::{ImageSet, Step};
use isqrt_models::{BackboneSpec, ModelSpec, RepresentationSpec};
use isqrt_train::{
    EpochMetrics, Error, Job, Observer, OptimiserSpec, Silent, StepInfo, TrainConfig, TrainResult,
    Trainer, train,
};

const SIDE: usize = 16;

/// Stripes: class 0 across, class 1 down, class 2 none, with a random phase, contrast and noise.
fn stripes(per_class: usize, mut state: u64) -> Arc<ImageSet> {
    let mut random = move || {
        // Xorshift, so that the set is the same wherever the test runs.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for i in 0..3 * per_class {
        let class = i % 3;
        let (phase, contrast) = (6.3 * random(), 40.0 + 30.0 * random());
        for at in 0..SIDE * SIDE {
            let along = [at / SIDE, at % SIDE, 0][class];
            let wave = (phase + 1.6 * along as f64).sin();
            for _ in 0..3 {
                pixels.push((128.0 + contrast * wave + 60.0 * (random() - 0.5)) as u8);
            }
        }
        labels.push(class as u32);
    }
    let classes = ["across", "down", "none"].map(String::from).to_vec();
    Arc::new(ImageSet::new(classes, SIDE, SIDE, pixels, labels).unwrap())
}

fn config(head: &str) -> TrainConfig {
    let toml = format!(
        "epochs = 4\nbatch = 16\nseed = 5\n\
         [optimiser]\nkind = \"sgd\"\nlr = 0.1\nweight_decay = 5e-4\n\
         [model]\nbackbone = \"e10net\"\nclasses = 3\nrepresentation = {{ name = \"{head}\" }}"
    );
    toml::from_str(&toml).unwrap()
}

type Sets = (Arc<ImageSet>, Arc<ImageSet>);

fn learn(
    config: &TrainConfig,
    augment: &[Step],
    (train_set, eval_set): Sets,
    observer: &mut dyn Observer,
) -> isqrt_train::Result<TrainResult> {
    train(
        Job::in_memory(config, augment, train_set, eval_set)?,
        observer,
    )
}

fn run(config: &TrainConfig) -> TrainResult {
    learn(config, &[], (stripes(64, 1), stripes(40, 2)), &mut Silent).unwrap()
}

fn without_time(mut result: TrainResult) -> TrainResult {
    (result.seconds, result.cpu_seconds) = (0.0, 0.0);
    for e in &mut result.epochs {
        (e.seconds, e.run_seconds, e.cpu_seconds) = (0.0, 0.0, 0.0);
        (e.images_per_second, e.wait_share) = (0.0, 0.0);
    }
    result
}

fn at_rate(lr: f64, config: TrainConfig) -> TrainConfig {
    TrainConfig {
        optimiser: OptimiserSpec::sgd(lr),
        ..config
    }
}

#[test]
fn every_head_learns() {
    for head in ["gap", "cov", "isqrt", "mpn"] {
        let result = run(&config(head));
        let total = result.evaluation.as_ref().unwrap().total;
        assert_eq!((result.epochs.len(), total), (4, 120), "{head}");
        assert!(result.top1_error < 5.0, "{head}: {result:?}");
        assert!(
            result.epochs[3].train_loss < result.epochs[0].train_loss,
            "{head}"
        );
    }
}

#[test]
fn a_seed_fixes_every_bit_whatever_the_threads() {
    let augment = [
        Step::RandomCrop {
            size: SIDE,
            padding: 2,
            reflect: true,
        },
        Step::HorizontalFlip { p: 0.5 },
    ];
    let config = TrainConfig {
        epochs: 2,
        ..config("isqrt")
    };
    let run = |config: &TrainConfig| {
        let sets = (stripes(64, 1), stripes(40, 2));
        learn(config, &augment, sets, &mut Silent).unwrap()
    };
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        without_time(pool.install(|| run(&config)))
    };
    let first = without_time(run(&config));
    assert_eq!(first, on(1));
    assert_eq!(first, on(3));
    let other = TrainConfig { seed: 6, ..config };
    assert_ne!(first.epochs[0].train_loss, run(&other).epochs[0].train_loss);
}

#[test]
fn divergence_is_an_error_with_its_place() {
    let config = at_rate(1e30, config("gap"));
    let sets = (stripes(64, 1), stripes(8, 2));
    let error = learn(&config, &[], sets, &mut Silent).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("epoch 1") && message.contains("step"),
        "{message}"
    );
}

#[test]
fn weights_spoilt_by_the_last_step_are_noticed_in_the_evaluation() {
    for head in ["gap", "cov", "isqrt", "mpn"] {
        // One step in the only epoch: its loss is from before the update and finite.
        let config = TrainConfig {
            batch: 24,
            epochs: 1,
            ..at_rate(1e30, config(head))
        };
        let sets = (stripes(8, 1), stripes(8, 2));
        let error = learn(&config, &[], sets, &mut Silent).unwrap_err();
        assert!(
            matches!(error, Error::Evaluation { epoch: 1, .. }),
            "{head}: {error:?}"
        );
        assert!(error.is_divergence(), "{head}: {error:?}");
        let message = error.to_string();
        assert!(
            message.starts_with("evaluation after epoch 1: "),
            "{message}"
        );
    }
}

/// Stops in the middle of the second epoch.
#[derive(Default)]
struct Impatient {
    steps: usize,
    epochs: usize,
}

impl Observer for Impatient {
    fn step(&mut self, info: &StepInfo) -> ControlFlow<()> {
        self.steps += 1;
        assert_eq!((info.step, info.steps), (self.steps as u64, 48));
        assert!(info.loss.is_finite());
        if info.step == 18 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()> {
        self.epochs += 1;
        assert_eq!(metrics.epoch, self.epochs);
        ControlFlow::Continue(())
    }
}

#[test]
fn an_observer_hears_everything_and_can_stop() {
    let mut observer = Impatient::default();
    let sets = (stripes(64, 1), stripes(8, 2));
    let result = learn(&config("gap"), &[], sets, &mut observer).unwrap();
    assert!(result.stopped);
    // The second epoch is not over: it has no metrics yet.
    assert_eq!(
        (observer.steps, observer.epochs, result.epochs.len()),
        (18, 1, 1)
    );
}

#[test]
fn mistakes_are_named_before_anything_runs() {
    let refused = |config: &TrainConfig| {
        learn(config, &[], (stripes(8, 1), stripes(8, 2)), &mut Silent)
            .unwrap_err()
            .to_string()
    };
    let base = config("gap");
    let four = ModelSpec {
        classes: 4,
        ..base.model.clone()
    };
    let unknown = ModelSpec {
        representation: RepresentationSpec::new("max"),
        ..base.model.clone()
    };
    for (config, part) in [
        (
            TrainConfig {
                epochs: 0,
                ..base.clone()
            },
            "epochs",
        ),
        (at_rate(f64::NAN, base.clone()), "lr"),
        (
            TrainConfig {
                batch: 100,
                ..base.clone()
            },
            "batch",
        ),
        (
            TrainConfig {
                model: four,
                ..base.clone()
            },
            "3 classes",
        ),
        (
            TrainConfig {
                model: unknown,
                ..base.clone()
            },
            "max",
        ),
    ] {
        let message = refused(&config);
        assert!(message.contains(part), "{message}");
    }
    assert!(toml::from_str::<TrainConfig>("epochs = 1\nlearning_rate = 2").is_err());
    assert!(matches!(
        learn(
            &TrainConfig { batch: 0, ..base },
            &[],
            (stripes(8, 1), stripes(8, 2)),
            &mut Silent
        ),
        Err(Error::Config { what: "batch", .. })
    ));
}

/// One epoch of a residual network with frozen statistics: they stay what they were made.
#[test]
fn frozen_statistics_stay() {
    for frozen_norm in [false, true] {
        let config = TrainConfig {
            model: ModelSpec {
                backbone: "tinyresnet".into(),
                ..config("gap").model
            },
            epochs: 1,
            frozen_norm,
            ..config("gap")
        };
        let job = Job::in_memory(&config, &[], stripes(16, 1), stripes(8, 2)).unwrap();
        let mut trainer = Trainer::new(job).unwrap();
        trainer.run(&mut Silent).unwrap();
        for (name, buffer) in trainer.network().vars().buffers() {
            let start = f32::from(name.ends_with("running_var"));
            let values = buffer.get().to_vec1::<f32>().unwrap();
            let stayed = values.iter().all(|&v| v == start);
            assert_eq!(stayed, frozen_norm, "{name}");
        }
    }
}

/// Checkpoints change what is kept and not one bit of the result.
#[test]
fn checkpointed_blocks_train_to_the_same_bits() {
    let run = |checkpoint: bool| {
        let backbone = BackboneSpec::new("resnet18").with("checkpoint", checkpoint);
        let config = TrainConfig {
            model: ModelSpec {
                backbone,
                ..config("gap").model
            },
            epochs: 1,
            ..config("gap")
        };
        let sets = (stripes(16, 1), stripes(8, 2));
        without_time(learn(&config, &[], sets, &mut Silent).unwrap())
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn precisions_of_a_gpu_need_one() {
    let mut config = config("gap");
    for precision in ["tf32", "bf16"] {
        config.precision = toml::Value::from(precision).try_into().unwrap();
        let sets = (stripes(8, 1), stripes(8, 2));
        let error = learn(&config, &[], sets, &mut Silent)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(precision) && error.contains("--set precision=f32"),
            "{error}"
        );
    }
}
