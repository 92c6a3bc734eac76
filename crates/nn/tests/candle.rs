//! What we rely on candle for, checked by gradient, and what we do not, with the reason shown:
//! the next candle release is judged by a test run.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor, Var};
use isqrt_nn::ops::{Window, max_pool2d, relu};
use isqrt_testkit::{Gradcheck, assert_close, gradcheck, randn};

fn random(shape: &[usize]) -> Tensor {
    randn(shape, 3, DType::F64).unwrap()
}

#[track_caller]
fn sound(f: impl Fn(&Tensor) -> Result<Tensor>) {
    gradcheck(|t| f(&t[0]), &[random(&[2, 3, 4])], Gradcheck::default()).unwrap();
}

#[test]
fn shape_ops_that_networks_use() {
    sound(|x| x.flatten_from(1));
    sound(|x| x.reshape((4, 6)));
    sound(|x| x.permute((2, 0, 1))?.contiguous());
    sound(|x| x.narrow(1, 1, 2));
    sound(|x| Tensor::cat(&[x, &x.sqr()?], 1));
    sound(|x| x.copy());
}

#[test]
fn arithmetic_that_losses_use() {
    sound(|x| x + x.sqr()?);
    sound(|x| (x * 3.0)? - 1.0);
    sound(|x| x.sum_all());
    sound(|x| x.mean_all());
    sound(|x| x.sum(1));
    sound(|x| x.broadcast_mul(&x.sum_keepdim(2)?));
    sound(|x| x.matmul(&x.transpose(1, 2)?.contiguous()?));
}

/// A tensor that two nodes use gets the sum of both gradients: shortcuts depend on it.
#[test]
fn gradients_of_shared_tensors_add_up() {
    sound(|x| {
        let y = x.sqr()?;
        y.mul(&y)? + &y
    });
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
    let overlapping = Var::from_tensor(&random(&[1, 1, 5, 5])).unwrap();
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
