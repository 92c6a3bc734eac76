//! The engine on a GPU beside the CPU. Passed over where there is no GPU; tools/cuda/check.sh runs it without
//! one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::sync::{Arc, RwLock};

use candle_core::Device;
use isqrt_datasets::{ImageSet, Step};
use isqrt_device::Choice;
use isqrt_train::{
    Collective, Error, Job, Line, Observer, Rank, Silent, TrainConfig, TrainResult, train,
};

fn gpu() -> Option<Device> {
    match Choice::Cuda(0).open() {
        Ok(opened) => Some(opened.device),
        Err(isqrt_device::Error::NoDriver { .. }) => {
            eprintln!("passed over: no GPU");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

const SIDE: usize = 16;

/// Stripes across or down, with some noise.
fn stripes(count: usize) -> Arc<ImageSet> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for i in 0..count {
        for at in 0..SIDE * SIDE {
            let along = [at / SIDE, at % SIDE][i % 2];
            let wave = (1.6 * along as f64 + i as f64).sin();
            let noise = (0.754_877_666 * (3 * at + 7 * i) as f64).fract() - 0.5;
            pixels.extend([(128.0 + 50.0 * wave + 40.0 * noise) as u8; 3]);
        }
        labels.push((i % 2) as u32);
    }
    let classes = ["across", "down"].map(String::from).to_vec();
    Arc::new(ImageSet::new(classes, SIDE, SIDE, pixels, labels).unwrap())
}

fn config(more: &str) -> TrainConfig {
    let toml = format!(
        "epochs = 2\nbatch = 8\nseed = 5\n{more}\n\
         [optimiser]\nkind = \"sgd\"\nlr = 0.05\nweight_decay = 5e-4\n\
         [model]\nbackbone = \"e10net\"\nclasses = 2\nrepresentation = {{ name = \"isqrt\" }}"
    );
    toml::from_str(&toml).unwrap()
}

/// What a recipe sets for the whole program: those that set other things than usual do it alone.
static SETTINGS: RwLock<()> = RwLock::new(());

fn run(config: &TrainConfig, device: &Device) -> isqrt_train::Result<TrainResult> {
    let _as_usual = SETTINGS.read().unwrap();
    run_alone(config, device)
}

fn run_alone(config: &TrainConfig, device: &Device) -> isqrt_train::Result<TrainResult> {
    let job = Job::in_memory(
        config,
        &[Step::HorizontalFlip { p: 0.5 }],
        stripes(48),
        stripes(20),
    )?;
    let device = device.clone();
    train(Job { device, ..job }, &mut Silent)
}

/// Updates that wait for their loss and those that do not; clipped, averaged, in parts.
#[test]
fn a_run_is_that_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for more in [
        "",
        "clip_norm = 0.5\nema = 0.9",
        "non_finite = { skip = 1 }\nlabel_smoothing = 0.1",
        "accumulate = 2\nclip_norm = 1.0",
    ] {
        let config = config(&format!("precision = \"f64\"\n{more}"));
        let (ours, theirs) = (
            run(&config, &gpu).unwrap(),
            run(&config, &Device::Cpu).unwrap(),
        );
        for (a, b) in ours.epochs.iter().zip(&theirs.epochs) {
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-7 * b.abs();
            assert!(close(a.train_loss, b.train_loss), "{more}: {a:?}, {b:?}");
            assert!(
                close(a.eval_loss.unwrap(), b.eval_loss.unwrap()),
                "{more}: {a:?}, {b:?}"
            );
            assert_eq!(
                (a.train_error, a.eval_error),
                (b.train_error, b.eval_error),
                "{more}"
            );
        }
        assert_eq!(ours.top1_error, theirs.top1_error, "{more}");
    }
}

/// A rank each on these devices; what they came to.
fn run_on(config: &TrainConfig, devices: &[Device]) -> Vec<isqrt_train::Result<TrainResult>> {
    observed(config, devices, |_| Box::new(Silent))
}

fn observed(
    config: &TrainConfig,
    devices: &[Device],
    observer: impl Fn(usize) -> Box<dyn Observer> + Sync,
) -> Vec<isqrt_train::Result<TrainResult>> {
    let _as_usual = SETTINGS.read().unwrap();
    let work = |rank: &Rank, device: &Device| {
        let job = Job::in_memory(config, &[], stripes(48), stripes(20))?;
        let device = device.clone();
        let job = Job {
            device,
            collective: rank,
            ..job
        };
        train(job, observer(rank.rank()).as_mut())
    };
    Rank::on_each(devices, work).unwrap()
}

fn two_gpus() -> Option<[Device; 2]> {
    let first = gpu()?;
    match Choice::Cuda(1).open() {
        Ok(second) => Some([first, second.device]),
        Err(isqrt_device::Error::NoDevice { .. }) => {
            eprintln!("passed over: one GPU");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn several_gpus_are_several_ranks_of_the_cpu() {
    let Some(gpus) = two_gpus() else { return };
    for more in [
        "clip_norm = 0.5\nema = 0.9",
        "non_finite = { skip = 1 }\naccumulate = 2",
    ] {
        let config = config(&format!("precision = \"f64\"\n{more}"));
        let ours = run_on(&config, &gpus);
        let theirs = run_on(&config, &[Device::Cpu, Device::Cpu]);
        let [first, second] = &ours[..] else { panic!() };
        let (first, second) = (first.as_ref().unwrap(), second.as_ref().unwrap());
        assert_eq!(first.evaluation, second.evaluation, "{more}");
        let theirs = theirs[0].as_ref().unwrap();
        for (a, b) in first.epochs.iter().zip(&theirs.epochs) {
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-7 * b.abs();
            assert!(close(a.train_loss, b.train_loss), "{more}: {a:?}, {b:?}");
            assert!(
                close(a.eval_loss.unwrap(), b.eval_loss.unwrap()),
                "{more}: {a:?}, {b:?}"
            );
        }
        assert_eq!(first.top1_error, theirs.top1_error, "{more}");
    }
}

#[test]
fn sums_over_gpus_keep_their_types() {
    let Some(gpus) = two_gpus() else { return };
    use candle_core::{DType, Tensor};
    let sums = |rank: &Rank, gpu: &Device| {
        let own = |dtype| {
            let values = Tensor::arange(0u32, 6, &Device::Cpu).unwrap();
            let values = (values.to_dtype(dtype).unwrap() + rank.rank() as f64).unwrap();
            values.reshape((2, 3)).unwrap().to_device(gpu).unwrap()
        };
        let mut bucket = [DType::F32, DType::F64].map(|t| (t.as_str().to_owned(), own(t)));
        // Not contiguous.
        bucket[0].1 = bucket[0].1.t().unwrap();
        rank.all_reduce(&mut bucket)?;
        let mut copied = [("copied".to_owned(), own(DType::F32))];
        rank.broadcast(1, &mut copied)?;
        rank.barrier()?;
        let flat = |t: &Tensor| {
            let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64);
            t.unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        let last = bucket.iter().chain(&copied).map(|(_, t)| flat(t));
        Ok(last.collect::<Vec<_>>())
    };
    let all = Rank::on_each(&gpus, sums).unwrap();
    for found in all {
        let found = found.unwrap();
        assert_eq!(found[0], [1.0, 7.0, 3.0, 9.0, 5.0, 11.0]);
        assert_eq!(found[1], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert_eq!(found[2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}

/// An observer that fails after the second update.
struct Fails;

impl Observer for Fails {
    fn line(&mut self, _: &Line) -> isqrt_train::Result<()> {
        Err(Error::Collective("on purpose".to_owned()))
    }
}

/// One that fails while the other goes on, which has work for NCCL under way.
#[test]
fn a_gpu_that_fails_ends_the_run_of_all() {
    let Some(gpus) = two_gpus() else { return };
    let config = config("");
    let came = observed(&config, &gpus, |rank| match rank {
        1 => Box::new(Fails),
        _ => Box::new(Silent),
    });
    let told: Vec<String> = came
        .into_iter()
        .map(|r| r.unwrap_err().to_string())
        .collect();
    assert!(told[1].ends_with("on purpose"), "{told:?}");
    assert!(
        told[0].contains("rank 1") && told[0].contains("on purpose"),
        "{told:?}"
    );
    // Others can begin where this one ended.
    for result in run_on(&config, &gpus) {
        result.unwrap();
    }
}

#[test]
fn gpus_that_diverge_do_so_together() {
    let Some(gpus) = two_gpus() else { return };
    let mut config = config("");
    config.optimiser = toml::from_str("kind = \"sgd\"\nlr = 1e30").unwrap();
    for result in run_on(&config, &gpus) {
        assert!(result.unwrap_err().is_divergence());
    }
}

#[test]
fn shorter_formats_are_near() {
    let Some(gpu) = gpu() else { return };
    let _alone = SETTINGS.write().unwrap();
    let loss = |precision: &str, device: &Device| {
        let config = config(&format!("precision = \"{precision}\""));
        run_alone(&config, device).unwrap().epochs[0].train_loss
    };
    let full = loss("f32", &Device::Cpu);
    let near = |what: &str, found: f64, limit: f64| {
        let apart = (found / full - 1.0).abs();
        assert!(apart < limit, "{what}: {found}, f32 {full}");
    };
    for (precision, limit) in [("f32", 1e-3), ("tf32", 0.05), ("bf16", 0.1)] {
        near(precision, loss(precision, &gpu), limit);
    }
}

/// Kernels of the layer by name, and what is measured.
#[test]
fn kernels_are_those_of_the_recipe() {
    let Some(gpu) = gpu() else { return };
    let _alone = SETTINGS.write().unwrap();
    let train = |gpu_spec: &str, device: &Device| {
        let config = config(gpu_spec);
        let before = isqrt_device::cuda::launches();
        let loss = run_alone(&config, device).unwrap().epochs[0].train_loss;
        (loss, isqrt_device::cuda::launches() - before)
    };
    let (full, _) = train("", &Device::Cpu);
    // Small matrices, in one launch.
    let (_, usual) = train("", &gpu);
    for (kernel, limit) in [("tensor-cores", 1e-3), ("tensor-cores-tf32", 0.05)] {
        let (loss, launches) = train(&format!("gpu.layer = \"{kernel}\""), &gpu);
        assert!(
            (loss / full - 1.0).abs() < limit,
            "{kernel}: {loss}, f32 {full}"
        );
        assert!(
            launches > usual,
            "{kernel}: {launches} launches, else {usual}"
        );
    }
    assert_eq!(isqrt_linalg::measured_kernels(), [""; 0]);
    let (loss, _) = train(
        "gpu = { layer = \"fastest\", convolutions = \"timed\" }",
        &gpu,
    );
    assert!((loss / full - 1.0).abs() < 1e-3, "{loss}, f32 {full}");
    let measured = isqrt_linalg::measured_kernels();
    assert!(
        measured[0].starts_with("cuda:0: covariance layer of [8, "),
        "{measured:?}"
    );
    isqrt_train::GpuSpec::default().begin();
}

#[test]
fn what_runs_away_is_told() {
    let Some(gpu) = gpu() else { return };
    let mut config = config("");
    config.optimiser = toml::from_str("kind = \"sgd\"\nlr = 1e30").unwrap();
    let error = run(&config, &gpu).unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { epoch: 1, .. }),
        "{error}"
    );
    assert!(error.is_divergence());
    assert!(error.to_string().contains("non_finite.skip=0"), "{error}");
    config.non_finite = toml::from_str::<toml::Table>("x = { skip = 0 }").unwrap()["x"]
        .clone()
        .try_into()
        .unwrap();
    let error = run(&config, &gpu).unwrap_err();
    assert!(error.is_divergence(), "{error}");
}
