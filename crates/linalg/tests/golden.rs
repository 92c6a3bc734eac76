//! Golden values and gradients made by PyTorch (`tools/golden/layer.py`).
#![allow(clippy::unwrap_used)]

use candle_core::{Tensor, Var};
use isqrt_linalg::eig::MpnCov;
use isqrt_linalg::{CovPool, Memory, PreNormalization, Result, Root, Schedule, Side};
use isqrt_testkit::{Golden, assert_close};

type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Every way in which we compute what `name` stands for.
fn layers(name: &str) -> Vec<Layer> {
    let parts: Vec<&str> = name.split('.').collect();
    if let Some(power) = parts[1].strip_prefix("mpn-") {
        let power = format!("{power}.{}", parts[2]).parse().unwrap();
        return vec![Box::new(move |x| {
            MpnCov {
                power,
                ..MpnCov::default()
            }
            .forward(x)
        })];
    }
    if parts[1] == "plain" {
        return vec![Box::new(|x| CovPool::plain().forward(x))];
    }
    let iterations = parts[2].parse().unwrap();
    let mut all: Vec<Layer> = Vec::new();
    for side in [Side::Auto, Side::Covariance, Side::Gram] {
        for memory in [Memory::Keep, Memory::Lean] {
            let root = Root {
                schedule: Schedule::NewtonSchulz { iterations },
                pre_normalization: match parts[1] {
                    "frobenius" => PreNormalization::Frobenius,
                    _ => PreNormalization::Trace,
                },
                post_compensation: parts[1] != "trace-alone",
                side,
                memory,
            };
            all.push(Box::new(move |x| {
                CovPool::with_root(root.clone()).forward(x)
            }));
        }
    }
    all
}

#[test]
fn agrees_with_pytorch() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/layer.safetensors"
    );
    let golden = Golden::load(path).unwrap();
    let names: Vec<&str> = golden
        .names()
        .filter_map(|name| name.strip_suffix(".x"))
        .collect();
    assert_eq!(names.len(), 15);
    for name in names {
        let tensor = |key: &str| &golden[format!("{name}.{key}").as_str()];
        for layer in layers(name) {
            let x = Var::from_tensor(tensor("x")).unwrap();
            let y = layer(&x).unwrap();
            assert_close!(y, *tensor("y"), rtol = 1e-11, atol = 1e-12);
            let loss = (y * tensor("g")).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().remove(&x).unwrap();
            assert_close!(dx, *tensor("dx"), rtol = 1e-9, atol = 1e-11);
        }
    }
}
