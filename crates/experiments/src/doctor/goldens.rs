//! The device beside what PyTorch computed.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use isqrt_nn::ops::{block, can_block, conv2d, unblock};
use isqrt_train::counted;

use super::{Checks, Error, Findings, Outcome, distance, home, place};

pub(super) fn check(checks: &mut Checks<'_, '_>) {
    let device = checks.device;
    checks.add("golden values, covariance layer and MPN-COV", || {
        covariance(device)
    });
    checks.add(
        "golden values, other methods that pool a second moment",
        || heads(device),
    );
    checks.add("golden values, convolutions", || convolutions(device));
    for op in [
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "local_response_norm",
        "relu6",
        "channel_shuffle",
        "cross_entropy",
    ] {
        checks.add(format!("golden values, {op}"), || of_op(op, device));
    }
}

/// Tensors of a golden file.
struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn read(bytes: &[u8]) -> Result<Self, Error> {
        let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?;
        Ok(Self(tensors))
    }

    fn find(&self, name: &str, key: &str) -> Option<&Tensor> {
        self.0.get(&format!("{name}.{key}"))
    }

    fn get(&self, name: &str, key: &str) -> Result<&Tensor, Error> {
        let found = self.find(name, key);
        found.ok_or_else(|| format!("the golden file has no {name}.{key}").into())
    }

    /// Names of cases, by the tensor that all of them have.
    fn cases(&self, key: &str) -> Vec<&str> {
        let suffix = format!(".{key}");
        let names = self.0.keys().filter_map(|name| name.strip_suffix(&suffix));
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        names
    }
}

/// The largest distances in f64 and f32.
#[derive(Default)]
struct Worst {
    figures: [f64; 2],
    cases: usize,
}

const TYPES: [DType; 2] = [DType::F64, DType::F32];

impl Worst {
    fn add(&mut self, at: usize, found: &Tensor, known: &Tensor) -> Result<(), Error> {
        let apart = distance(&home(found)?, &home(known)?);
        self.figures[at] = self.figures[at].max(apart);
        Ok(())
    }

    fn verdict(self, limits: (f64, f64)) -> Outcome {
        if self.cases == 0 {
            return Err("the golden file has no such case".into());
        }
        let findings = Findings::told(counted(self.cases, "case"));
        Ok(findings.both("", self.figures, limits))
    }
}

/// Output and gradient of one tensor.
fn compare<E: Into<Error>>(
    worst: &mut Worst,
    device: &Device,
    op: impl Fn(&Tensor) -> Result<Tensor, E>,
    [x, y, g, dx]: [&Tensor; 4],
) -> Result<(), Error> {
    worst.cases += 1;
    for (at, dtype) in TYPES.into_iter().enumerate() {
        let x = Var::from_tensor(&place(x, dtype, device)?)?;
        let found = op(x.as_tensor()).map_err(Into::into)?;
        worst.add(at, &found, y)?;
        let loss = (found * place(g, dtype, device)?)?.sum_all()?;
        let gradient = loss.backward()?.remove(&x).ok_or("no gradient came out")?;
        worst.add(at, &gradient, dx)?;
    }
    Ok(())
}

fn covariance(device: &Device) -> Outcome {
    let golden = Golden::read(isqrt_linalg::golden::LAYER)?;
    let mut worst = Worst::default();
    for name in golden.cases("dx") {
        let layers = isqrt_linalg::golden::layers(name);
        for layer in layers.ok_or_else(|| format!("no layer for {name}"))? {
            let get = |key| golden.get(name, key);
            let tensors = [get("x")?, get("y")?, get("g")?, get("dx")?];
            compare(&mut worst, device, layer, tensors)?;
        }
    }
    worst.verdict((1e-9, 1e-3))
}

fn heads(device: &Device) -> Outcome {
    let golden = Golden::read(isqrt_linalg::golden::HEADS)?;
    let mut worst = Worst::default();
    for name in golden.cases("dx") {
        let layer = isqrt_linalg::golden::head(name, |key| golden.find(name, key).cloned());
        let layer = layer.ok_or_else(|| format!("no method for {name}"))?;
        let get = |key| golden.get(name, key);
        let tensors = [get("x")?, get("y")?, get("g")?, get("dx")?];
        compare(&mut worst, device, layer, tensors)?;
    }
    worst.verdict((1e-9, 1e-2))
}

fn of_op(op: &str, device: &Device) -> Outcome {
    let golden = Golden::read(isqrt_nn::golden::OPS)?;
    let x = golden.get("input", op)?;
    let mut worst = Worst::default();
    let cases = golden.cases("dx").into_iter();
    for name in cases.filter(|name| name.split('.').next() == Some(op)) {
        let layer = isqrt_nn::golden::op(name).ok_or_else(|| format!("no op for {name}"))?;
        let get = |key| golden.get(name, key);
        compare(
            &mut worst,
            device,
            layer,
            [x, get("y")?, get("g")?, get("dx")?],
        )?;
    }
    worst.verdict((1e-12, 1e-5))
}

/// Convolutions of plain and of blocked maps, with the gradients of filter and bias.
fn convolutions(device: &Device) -> Outcome {
    let golden = Golden::read(isqrt_nn::golden::OPS)?;
    let mut worst = Worst::default();
    for name in golden.cases("dw") {
        let options = isqrt_nn::golden::convolution(name);
        let options = options.ok_or_else(|| format!("no convolution for {name}"))?;
        for (at, dtype) in TYPES.into_iter().enumerate() {
            let var = |key: &str| match golden.find(name, key) {
                Some(t) => place(t, dtype, device)
                    .and_then(|t| Var::from_tensor(&t))
                    .map(Some),
                None => Ok(None),
            };
            let (Some(x), Some(w), b) = (var("x")?, var("w")?, var("b")?) else {
                return Err(format!("{name} lacks a tensor").into());
            };
            let g = place(golden.get(name, "g")?, dtype, device)?;
            let fills = can_block(x.dim(1)?, &x) && can_block(w.dim(0)?, &x);
            for blocked in [false, true] {
                if blocked && !fills {
                    continue;
                }
                worst.cases += 1 - at;
                let y = match blocked {
                    true => unblock(&conv2d(&block(&x)?, &w, b.as_deref(), options)?)?,
                    false => conv2d(&x, &w, b.as_deref(), options)?,
                };
                worst.add(at, &y, golden.get(name, "y")?)?;
                let gradients = (&y * &g)?.sum_all()?.backward()?;
                for (var, key) in [(Some(&x), "dx"), (Some(&w), "dw"), (b.as_ref(), "db")] {
                    let Some(var) = var else { continue };
                    let gradient = gradients.get(var).ok_or("no gradient came out")?;
                    worst.add(at, gradient, golden.get(name, key)?)?;
                }
            }
        }
    }
    worst.verdict((1e-12, 2e-5))
}
