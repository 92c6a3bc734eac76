//! Whether a device computes what it should: small checks, each with a verdict.
//!
//! The references are central differences, what PyTorch computed (the golden files of the tests), and the
//! CPU's own ops in f64. Only [`bench()`] times anything.

mod goldens;
mod layer;
mod networks;
mod ops;
mod timing;
mod together;

use candle_core::{DType, Device, Tensor};

pub use timing::{Timing, bench};

/// What came of a check.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Verdict {
    /// What was checked.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// The figure and its limit, or what went wrong.
    pub detail: String,
}

type Error = Box<dyn std::error::Error>;
type Outcome = Result<(bool, String), Error>;

/// Runs all checks on this device, one after another, and says each verdict when it is known. Returns
/// whether all are as they should be.
pub fn check(device: &Device, mut say: impl FnMut(&Verdict)) -> bool {
    let mut checks = Checks {
        device,
        say: &mut say,
        all: true,
    };
    goldens::check(&mut checks);
    layer::check(&mut checks);
    ops::check(&mut checks);
    networks::check(&mut checks);
    checks.all
}

/// Runs the checks of several GPUs that share work, all at once: sums over them. Returns whether all is as it
/// should be.
pub fn check_together(devices: &[Device], mut say: impl FnMut(&Verdict)) -> bool {
    let mut checks = Checks {
        device: devices.first().unwrap_or(&Device::Cpu),
        say: &mut say,
        all: true,
    };
    checks.add(
        format!("sums over {} devices", devices.len()),
        together::sums(devices),
    );
    checks.all
}

/// Checks of a device, and who hears of them.
struct Checks<'a> {
    device: &'a Device,
    say: &'a mut dyn FnMut(&Verdict),
    all: bool,
}

impl Checks<'_> {
    fn add(&mut self, check: impl Into<String>, outcome: Outcome) {
        let told = |error: Error| (false, isqrt_train::without_backtrace(&error.to_string()));
        let (ok, detail) = outcome.unwrap_or_else(told);
        self.all &= ok;
        let check = check.into();
        (self.say)(&Verdict { check, ok, detail });
    }
}

/// Rectified noise, as features are.
fn features(shape: (usize, usize, usize)) -> candle_core::Result<Tensor> {
    noise(&[shape.0, shape.1, shape.2], 0.0)?.relu()
}

/// Numbers between -0.9 and 1.1, others for another `salt`.
fn noise(shape: &[usize], salt: f64) -> candle_core::Result<Tensor> {
    // Two irrational steps: no period in sight, and the same on every machine.
    let noise = |i: f64| (i * 0.754_877_666 + salt).fract() + (i * 0.569_840_291).fract() - 0.9;
    let len: usize = shape.iter().product();
    let values: Vec<f64> = (0..len).map(|i| noise(i as f64)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A tensor as it is wanted there.
fn place(t: &Tensor, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    t.to_dtype(dtype)?.to_device(device)
}

fn home(t: &Tensor) -> candle_core::Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// Largest difference, as a share of the largest value; infinite where one is not a number.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let most = b.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(
        0.0_f64,
        |m, v| if v.is_nan() { f64::INFINITY } else { m.max(v) },
    );
    if most == 0.0 { apart } else { apart / most }
}

fn within(figure: f64, limit: f64) -> (bool, String) {
    (
        figure <= limit,
        format!("{figure:.1e}, at most {limit:.0e}"),
    )
}

/// Two figures, in f64 and in f32.
fn both_within(double: f64, single: f64, limits: (f64, f64)) -> (bool, String) {
    let (well, said) = within(double, limits.0);
    let (too, also) = within(single, limits.1);
    (well && too, format!("f64 {said}; f32 {also}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_are_none_are_never_within() {
        assert_eq!(distance(&[1.0, 2.5], &[1.0, 2.0]), 0.25);
        assert_eq!(distance(&[0.5], &[0.0]), 0.5);
        assert_eq!(distance(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        for bad in [distance(&[f64::NAN], &[1.0]), f64::NAN] {
            assert!(!within(bad, 1e9).0);
        }
    }

    #[test]
    fn the_processor_passes_all_but_the_long_checks() {
        let mut wrong = vec![];
        let mut count = 0;
        let mut say = |verdict: &Verdict| {
            count += 1;
            if !verdict.ok {
                wrong.push(verdict.clone());
            }
        };
        let mut checks = Checks {
            device: &Device::Cpu,
            say: &mut say,
            all: true,
        };
        goldens::check(&mut checks);
        layer::check(&mut checks);
        ops::check(&mut checks);
        let all = checks.all;
        assert!(all && wrong.is_empty(), "{wrong:#?}");
        assert!(count > 35, "{count}");
    }

    #[test]
    fn ranks_on_the_processor_sum_alike() {
        let mut verdicts = vec![];
        let devices = [Device::Cpu, Device::Cpu, Device::Cpu];
        assert!(check_together(&devices, |verdict| verdicts.push(verdict.clone())));
        assert_eq!(verdicts.len(), 1);
    }
}
