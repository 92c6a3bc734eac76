//! A run in its folder whose batches two devices share: stopped, taken up again, with another number of them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{Device, Tensor};
use isqrt_train::data::RunData;
use isqrt_train::run::{Console, Resume, RunResult, run};
use isqrt_train::{EpochMetrics, Result, SpecFile, StepInfo};

const TWO: [Device; 2] = [Device::Cpu, Device::Cpu];

/// Stops after some updates, or goes wrong then.
struct Watch {
    last: u64,
    panics: bool,
}

impl Console for Watch {
    fn say(&mut self, _: &str) {}

    fn step(&mut self, step: &StepInfo) -> ControlFlow<()> {
        match step.step >= self.last {
            true if self.panics => panic!("on purpose"),
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn epoch(&mut self, _: &EpochMetrics) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

fn train(out: &Path, devices: &[Device], last: u64, panics: bool) -> Result<RunResult> {
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments/smoke/e10-isqrt.toml");
    let settings = ["epochs=1", "batch=16", "ema=0.9"].map(String::from);
    let mut file = SpecFile::read(&spec, &settings)?;
    file.spec.shrink();
    let data = RunData::open(&file, Some([96, 16]))?;
    let mut watch = Watch { last, panics };
    run(&file, data, out, &Resume::Auto, devices, &mut watch)
}

#[test]
fn two_devices_stop_go_on_and_refuse_to_become_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = train(&path("whole"), &TWO, u64::MAX, false).unwrap();
    assert_eq!((whole.status.as_str(), whole.steps), ("finished", 6));
    let stopped = train(&path("parts"), &TWO, 3, false).unwrap();
    assert_eq!((stopped.status.as_str(), stopped.steps), ("stopped", 3));
    let told = train(&path("parts"), &TWO[..1], u64::MAX, false).unwrap_err();
    assert!(told.to_string().contains("begun on 2 device(s)"), "{told}");
    let parts = train(&path("parts"), &TWO, u64::MAX, false).unwrap();
    assert_eq!(parts.last, whole.last);
    let weights = |name: &str| {
        let file = path(name).join("checkpoints/final.safetensors");
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let named = tensors.iter().map(|(name, t)| (name.clone(), bits(t)));
        named.collect::<BTreeMap<_, _>>()
    };
    let (parts, whole) = (weights("parts"), weights("whole"));
    assert!(parts.len() > 5 && parts == whole, "other weights");
    let environment = std::fs::read_to_string(path("whole").join("environment.json")).unwrap();
    assert!(environment.contains("\"cpu, cpu\""), "{environment}");
}

#[test]
fn a_run_of_two_devices_that_panics_ends() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let panics = || train(&out, &TWO, 2, true);
    assert!(std::panic::catch_unwind(panics).is_err());
    // The folder is free, and the run begins where it was.
    let again = train(&out, &TWO, u64::MAX, false).unwrap();
    assert_eq!((again.status.as_str(), again.steps), ("finished", 6));
}
