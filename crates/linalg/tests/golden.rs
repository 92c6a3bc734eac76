//! Golden values and gradients made by PyTorch (`tools/golden/layer.py`).
#![allow(clippy::unwrap_used)]

use candle_core::Var;
use isqrt_linalg::golden::layers;
use isqrt_testkit::{Golden, assert_close};

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
        for layer in layers(name).unwrap() {
            let x = Var::from_tensor(tensor("x")).unwrap();
            let y = layer(&x).unwrap();
            assert_close!(y, *tensor("y"), rtol = 1e-11, atol = 1e-12);
            let loss = (y * tensor("g")).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().remove(&x).unwrap();
            assert_close!(dx, *tensor("dx"), rtol = 1e-9, atol = 1e-11);
        }
    }
}
