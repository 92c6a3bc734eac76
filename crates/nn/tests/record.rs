//! What a forward pass tells about its layers.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use isqrt_nn::layers::{Conv2d, ConvNorm, Linear};
use isqrt_nn::ops::{
    Conv, Window, add_relu, block, global_avg_pool, is_blocked, max_pool2d, unblock,
};
use isqrt_nn::{LayerRecord, Mode, Vars, record};
use isqrt_testkit::{assert_close, randn};

struct Net {
    grouped: Conv2d,
    brick: ConvNorm,
    linear: Linear,
}

impl Net {
    fn new() -> Self {
        let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
        let mut scope = vars.root();
        let options = Conv {
            groups: 2,
            ..Conv::new(2, 1)
        };
        let mut body = scope.sub("body");
        Self {
            grouped: Conv2d::new(body.sub("grouped"), 32, 32, 3, options).unwrap(),
            brick: ConvNorm::new(&mut body, ("conv", "bn"), (32, 32), 1, 1, true).unwrap(),
            linear: Linear::new(scope.sub("head"), 32, 5).unwrap(),
        }
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let x = self.grouped.forward(x).unwrap();
        let y = add_relu(&self.brick.forward(&x, mode).unwrap(), &x).unwrap();
        let window = Window {
            kernel: 2,
            stride: 2,
            padding: 0,
        };
        let y = max_pool2d(&y, window).unwrap();
        let y = if is_blocked(&y) {
            unblock(&y).unwrap()
        } else {
            y
        };
        self.linear.forward(&global_avg_pool(&y).unwrap()).unwrap()
    }
}

#[test]
fn a_pass_tells_what_each_layer_did_in_any_layout_and_mode() {
    let net = Net::new();
    let x = randn((2, 32, 8, 12), 1, DType::F32).unwrap();
    let layer = |path: &str, op, shape: &[usize], parameters, multiply_adds| LayerRecord {
        path: path.into(),
        op,
        shape: shape.to_vec(),
        parameters,
        multiply_adds,
        elements: shape.iter().product(),
    };
    let maps = [2, 32, 4, 6];
    let expected = [
        // 16 channels of a group, 9 taps.
        layer(
            "body.grouped",
            "conv2d",
            &maps,
            32 * 16 * 9,
            2 * 32 * 24 * 16 * 9,
        ),
        layer("body.conv", "conv2d", &maps, 32 * 32, 2 * 32 * 24 * 32),
        layer("body.bn", "batch_norm", &maps, 64, 0),
        layer("body.bn", "add_relu", &maps, 0, 0),
        layer("body.bn", "max_pool2d", &[2, 32, 2, 3], 0, 0),
        layer("body.bn", "global_avg_pool", &[2, 32], 0, 0),
        layer("head", "linear", &[2, 5], 5 * 33, 2 * 5 * 32),
    ];
    for x in [block(&x).unwrap(), x] {
        for mode in [Mode::Replay, Mode::Eval] {
            let known = net.forward(&x, mode);
            let (found, records) = record(|| net.forward(&x, mode));
            assert_close!(found, known, atol = 0.0);
            assert_eq!(records, expected);
        }
    }
}

#[test]
fn records_end_with_their_pass() {
    let x = randn((1, 2, 4, 4), 1, DType::F32).unwrap();
    let pool = || global_avg_pool(&x).unwrap();
    pool();
    let (inner, outer) = record(|| {
        pool();
        let (_, inner) = record(|| (pool(), pool()));
        inner
    });
    assert_eq!((inner.len(), outer.len()), (2, 1));
    assert_eq!(&*outer[0].path, "");
    let panicked = std::panic::catch_unwind(|| record(|| panic!("a pass that fails")));
    assert!(panicked.is_err());
    pool();
    assert!(record(|| ()).1.is_empty());
}
