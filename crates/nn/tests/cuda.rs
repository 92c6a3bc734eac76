//! Ops on a GPU beside the CPU, forward and backward. Passed over where there is no GPU;
//! tools/cuda/check.sh runs it without one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_device::{Choice, Error};
use isqrt_nn::ops;

fn gpu() -> Option<Device> {
    match Choice::Cuda(0).open() {
        Ok(opened) => Some(opened.device),
        Err(Error::NoDriver { .. }) => {
            eprintln!("passed over: no GPU");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Numbers between -1.8 and 2.2 from a sequence without period in sight, other ones for another `salt`.
fn numbers(shape: &[usize], salt: f64) -> Tensor {
    let noise = |i: f64| (i * 0.754_877_666 + salt).fract() + (i * 0.569_840_291).fract() - 0.9;
    let len: usize = shape.iter().product();
    let values: Vec<f64> = (0..len).map(|i| 2.0 * noise(i as f64)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn home(t: &Tensor) -> Vec<f64> {
    let t = t
        .to_device(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Output and gradients of all operands.
fn run(
    op: &dyn Fn(&[Tensor]) -> isqrt_nn::Result<Tensor>,
    operands: &[Tensor],
    dtype: DType,
    device: &Device,
) -> Vec<Vec<f64>> {
    let place = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let vars: Vec<Var> = operands
        .iter()
        .map(|t| Var::from_tensor(&place(t)).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let weights = place(&numbers(y.dims(), 0.3));
    let gradients = (&y * &weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let mut out = vec![home(&y)];
    out.extend(
        vars.iter()
            .map(|v| home(gradients.get(v.as_tensor()).unwrap())),
    );
    out
}

/// The same within rounding on both devices, in both precisions.
fn same(
    gpu: &Device,
    what: &str,
    operands: &[Tensor],
    op: impl Fn(&[Tensor]) -> isqrt_nn::Result<Tensor>,
) {
    for (dtype, limit) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        let ours = run(&op, operands, dtype, gpu);
        let theirs = run(&op, operands, dtype, &Device::Cpu);
        for (part, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(a.len(), b.len(), "{what} {dtype:?} part {part}");
            let most = b.iter().fold(1e-300_f64, |m, v| m.max(v.abs()));
            for (a, b) in a.iter().zip(b) {
                let close = (a - b).abs() <= limit * most || a.is_nan() && b.is_nan();
                assert!(close, "{what} {dtype:?} part {part}: {a} and {b}");
            }
        }
    }
}

#[test]
fn rectifiers() {
    let Some(gpu) = gpu() else { return };
    for shape in [vec![7], vec![2, 3, 5, 9], vec![1, 300, 3]] {
        let x = numbers(&shape, 0.0);
        same(&gpu, "relu", std::slice::from_ref(&x), |x| ops::relu(&x[0]));
        let wide = (&x * 6.0).unwrap();
        same(&gpu, "relu6", &[wide], |x| ops::relu6(&x[0]));
        let operands = [x, numbers(&shape, 0.4)];
        same(&gpu, "add_relu", &operands, |x| ops::add_relu(&x[0], &x[1]));
    }
    let x = Tensor::new(&[f32::NAN, -1.0, 0.0, 2.0, f32::INFINITY], &gpu).unwrap();
    let y = ops::relu(&x).unwrap().to_vec1::<f32>().unwrap();
    assert!(y[0].is_nan());
    assert_eq!(y[1..], [0.0, 0.0, 2.0, f32::INFINITY]);
}

#[test]
fn linear_layers() {
    let Some(gpu) = gpu() else { return };
    for (batch, inputs, out) in [(1, 1, 1), (3, 7, 5), (33, 130, 70)] {
        let operands = [
            numbers(&[batch, inputs], 0.1),
            numbers(&[out, inputs], 0.2),
            numbers(&[out], 0.5),
        ];
        same(&gpu, "linear", &operands, |x| {
            ops::linear(&x[0], &x[1], &x[2])
        });
    }
}

#[test]
fn cross_entropy() {
    let Some(gpu) = gpu() else { return };
    for (batch, classes) in [(1, 2), (5, 3), (70, 1000)] {
        let labels: Vec<u32> = (0..batch).map(|i| (i * 7 % classes) as u32).collect();
        for smoothing in [0.0, 0.1] {
            let logits = (numbers(&[batch, classes], 0.1) * 4.0).unwrap();
            same(&gpu, "cross_entropy", &[logits], |x| {
                ops::cross_entropy(&x[0], &labels, smoothing)
            });
        }
    }
}
