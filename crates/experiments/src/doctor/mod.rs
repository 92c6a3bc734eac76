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
    /// What was compared, within which limit.
    pub figures: Vec<Figure>,
    /// All that in words, or what went wrong.
    pub detail: String,
}

/// A figure, and the most that it may be.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Figure {
    /// Of what it is; empty where there is one thing alone.
    pub of: String,
    /// Most often the largest difference, as a share of the largest value; `null` in JSON where it is not finite.
    pub value: f64,
    /// The most it may be.
    pub limit: f64,
}

impl Figure {
    fn within(&self) -> bool {
        // Not a number is not within.
        self.value <= self.limit
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.of.is_empty() {
            write!(f, "{} ", self.of)?;
        }
        match self.limit == 0.0 {
            true => write!(f, "{}, 0 is expected", self.value),
            false => write!(f, "{:.1e}, at most {:.1e}", self.value, self.limit),
        }
    }
}

/// What a check found out.
#[derive(Default)]
struct Findings {
    note: Option<String>,
    figures: Vec<Figure>,
}

impl Findings {
    fn told(note: String) -> Self {
        Self {
            note: Some(note),
            figures: vec![],
        }
    }

    fn figure(mut self, of: impl Into<String>, value: f64, limit: f64) -> Self {
        let of = of.into();
        self.figures.push(Figure { of, value, limit });
        self
    }

    /// A figure in f64 and in f32.
    fn both(self, of: &str, [double, single]: [f64; 2], limits: (f64, f64)) -> Self {
        let of = |dtype| format!("{of} {dtype}").trim_start().to_owned();
        let with = self.figure(of("f64"), double, limits.0);
        with.figure(of("f32"), single, limits.1)
    }

    fn verdict(self, check: String) -> Verdict {
        let said = self.figures.iter().map(ToString::to_string);
        let said: Vec<String> = self.note.into_iter().chain(said).collect();
        Verdict {
            check,
            ok: self.figures.iter().all(Figure::within),
            figures: self.figures,
            detail: said.join("; "),
        }
    }
}

type Error = Box<dyn std::error::Error>;
type Outcome = Result<Findings, Error>;

/// Runs on this device, one after another, the checks whose names contain one of these texts in capitals or not
/// (all where there is none), and says each verdict when it is known.
pub fn check(device: &Device, only: &[String], mut say: impl FnMut(&Verdict)) {
    Checks::new(device, only, &mut Heard::Verdicts(&mut say)).all();
}

/// The names of the checks that [`check`] would run, and of those of [`check_together`] where devices are several.
pub fn names(devices: &[Device], only: &[String]) -> Vec<String> {
    let mut names = vec![];
    let mut heard = Heard::Names(&mut names);
    if let Some(device) = devices.first() {
        let mut checks = Checks::new(device, only, &mut heard);
        checks.all();
        if devices.len() > 1 {
            checks.together(devices);
        }
    }
    names
}

/// Runs the checks of several GPUs that share work, all at once: sums over them.
pub fn check_together(devices: &[Device], only: &[String], mut say: impl FnMut(&Verdict)) {
    let device = devices.first().unwrap_or(&Device::Cpu);
    Checks::new(device, only, &mut Heard::Verdicts(&mut say)).together(devices);
}

/// What is wanted of the checks.
enum Heard<'a> {
    Verdicts(&'a mut dyn FnMut(&Verdict)),
    Names(&'a mut Vec<String>),
}

/// Checks of a device, and who hears of them.
struct Checks<'a, 'b> {
    device: &'a Device,
    /// In small letters.
    only: Vec<String>,
    heard: &'a mut Heard<'b>,
}

impl<'a, 'b> Checks<'a, 'b> {
    fn new(device: &'a Device, only: &[String], heard: &'a mut Heard<'b>) -> Self {
        let only = only.iter().map(|text| text.to_lowercase()).collect();
        Self {
            device,
            only,
            heard,
        }
    }

    fn all(&mut self) {
        goldens::check(self);
        layer::check(self);
        ops::check(self);
        networks::check(self);
    }

    fn together(&mut self, devices: &[Device]) {
        let check = format!("sums over {} devices", devices.len());
        self.add(check, || together::sums(devices));
    }

    fn add(&mut self, check: impl Into<String>, run: impl FnOnce() -> Outcome) {
        let check = check.into();
        let name = check.to_lowercase();
        if !self.only.is_empty() && !self.only.iter().any(|text| name.contains(text.as_str())) {
            return;
        }
        match self.heard {
            Heard::Names(names) => names.push(check),
            Heard::Verdicts(say) => match run() {
                Ok(findings) => say(&findings.verdict(check)),
                Err(error) => self.failed(check, &error),
            },
        }
    }

    /// A check that came to nothing; also of one that was not asked for, where others hang on it.
    fn failed(&mut self, check: String, error: &Error) {
        match self.heard {
            Heard::Names(names) => names.push(check),
            Heard::Verdicts(say) => say(&Verdict {
                check,
                ok: false,
                figures: vec![],
                detail: isqrt_train::without_backtrace(&error.to_string()),
            }),
        }
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

fn within(value: f64, limit: f64) -> Findings {
    Findings::default().figure("", value, limit)
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
            assert!(!within(bad, 1e9).verdict("bad".to_owned()).ok);
        }
        let both = Findings::told("2 cases".to_owned()).both("loss", [0.0, 0.25], (0.0, 0.125));
        let verdict = both.verdict("both".to_owned());
        assert!(!verdict.ok);
        let expected = "2 cases; loss f64 0, 0 is expected; loss f32 2.5e-1, at most 1.2e-1";
        assert_eq!(verdict.detail, expected);
    }

    #[test]
    fn checks_can_be_chosen_by_their_names() {
        let mut run = vec![];
        let only = ["ReLU6".to_owned(), "constant".to_owned()];
        check(&Device::Cpu, &only, |verdict| {
            run.push(verdict.check.clone())
        });
        let expected = [
            "golden values, relu6",
            "layer, constant features",
            "relu6, gradient and beside the CPU",
        ];
        assert_eq!(run, expected);
        assert_eq!(names(&[Device::Cpu], &only), expected);
        let two = names(&[Device::Cpu, Device::Cpu], &[]);
        assert_eq!(two.last().unwrap(), "sums over 2 devices");
        assert_eq!(two.len(), names(&[Device::Cpu], &[]).len() + 1);
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
        let mut heard = Heard::Verdicts(&mut say);
        let mut checks = Checks::new(&Device::Cpu, &[], &mut heard);
        goldens::check(&mut checks);
        layer::check(&mut checks);
        ops::check(&mut checks);
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(count > 35, "{count}");
    }

    #[test]
    fn ranks_on_the_processor_sum_alike() {
        let mut verdicts = vec![];
        let devices = [Device::Cpu, Device::Cpu, Device::Cpu];
        check_together(&devices, &[], |verdict| verdicts.push(verdict.clone()));
        assert!(verdicts.len() == 1 && verdicts[0].ok, "{verdicts:?}");
    }
}
