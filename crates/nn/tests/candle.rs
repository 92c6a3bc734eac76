//! What we rely on candle for, checked by gradient, and what we do not, with the reason shown: the
//! next candle release is judged by a test run. The list is [`isqrt_testkit::candle_ops`].
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor, Var};
use isqrt_nn::ops::{Window, max_pool2d, relu};
use isqrt_testkit::{assert_close, candle_ops, randn};

#[test]
fn what_training_relies_on_has_right_gradients() {
    candle_ops::check_all(&Device::Cpu).unwrap();
}

fn gradient(f: impl Fn(&Tensor) -> Result<Tensor>, x: &[f64], shape: &[usize]) -> Tensor {
    let x = Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let gradients = f(&x).unwrap().sum_all().unwrap().backward().unwrap();
    gradients.get(x.as_tensor()).unwrap().flatten_all().unwrap()
}

/// Why `max_pool2d` is ours: candle shares a window's gradient out among all its elements, each
/// divided by the window's size, so that a maximum gets a quarter of what it should.
#[test]
fn max_pool_of_candle_is_wrong_and_ours_is_not() {
    let window = Window {
        kernel: 2,
        stride: 2,
        padding: 0,
    };
    let x = [1.0, 2.0, 3.0, 4.0];
    let ours = gradient(|x| Ok(max_pool2d(x, window)?), &x, &[1, 1, 2, 2]);
    assert_close!(ours, [0.0, 0.0, 0.0, 1.0], atol = 0.0);

    let theirs = gradient(|x| x.max_pool2d(2), &x, &[1, 1, 2, 2])
        .to_vec1::<f64>()
        .unwrap();
    assert_ne!(
        theirs[3], 1.0,
        "candle's gradient is right now: is our own still needed?"
    );
    let overlapping = Var::from_tensor(&randn((1, 1, 5, 5), 3, DType::F64).unwrap()).unwrap();
    let pooled = overlapping.max_pool2d_with_stride(3, 2).unwrap();
    let refused = pooled.sum_all().unwrap().backward();
    assert!(
        refused.is_err(),
        "candle differentiates overlapping windows now"
    );
}

/// Why `relu` is ours: the derivative at 0, which inputs of exact zeros (after a ReLU) meet often.
#[test]
fn relu_at_zero() {
    let x = [-1.0, 0.0, 2.0];
    assert_close!(
        gradient(|x| Ok(relu(x)?), &x, &[3]),
        [0.0, 0.0, 1.0],
        atol = 0.0
    );
    assert_close!(
        gradient(Tensor::relu, &x, &[3]),
        [0.0, 1.0, 1.0],
        atol = 0.0
    );
}
