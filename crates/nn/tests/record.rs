//! What a forward pass tells about its layers.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use isqrt_nn::layers::{Conv2d, ConvNorm, Linear};
use isqrt_nn::ops::{
    Activation, Conv, Window, add_relu, block, global_avg_pool, is_blocked, max_pool2d, unblock,
};
use isqrt_nn::{LayerRecord, Mode, Vars, largest_magnitude, record, record_values};
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
            brick: ConvNorm::new(&mut body, ("conv", "bn"), (32, 32), 1, 1, Activation::Relu)
                .unwrap(),
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

#[test]
fn values_of_a_pass_come_with_its_layers_in_any_layout() {
    let net = Net::new();
    let x = randn((2, 32, 8, 12), 1, DType::F32).unwrap();
    for x in [block(&x).unwrap(), x] {
        for mode in [Mode::Replay, Mode::Eval] {
            let (known, records) = record(|| net.forward(&x, mode));
            let (found, values) = record_values(|| net.forward(&x, mode));
            assert_close!(found, known, rtol = 1e-4, atol = 1e-5);
            let layers: Vec<LayerRecord> = values.iter().map(|v| v.layer.clone()).collect();
            assert_eq!(layers, records);
            let of = |y: &Tensor| largest_magnitude(y).unwrap();
            let first = net.grouped.forward(&x).unwrap();
            assert_eq!(values[0].largest, of(&first));
            assert_eq!(values[6].largest, of(&found));
            // Of the convolution alone, though its norm follows in one node elsewhere.
            let normed = net.brick.forward(&first, mode).unwrap();
            assert_close!(values[2].largest, of(&normed), rtol = 1e-4);
            assert!(values[1].largest != values[2].largest);
        }
    }
}

#[test]
fn magnitudes_keep_what_is_not_finite() {
    let of = |values: &[f64]| {
        let x = Tensor::new(values, &Device::Cpu).unwrap();
        let single = largest_magnitude(&x.to_dtype(DType::F32).unwrap()).unwrap();
        let double = largest_magnitude(&x).unwrap();
        assert!(single == double || single.is_nan() && double.is_nan());
        double
    };
    assert_eq!(of(&[]), 0.0);
    assert_eq!(of(&[1.0, -3.0, 2.0]), 3.0);
    assert_eq!(of(&[1.0, f64::NEG_INFINITY]), f64::INFINITY);
    let mut many = vec![1.0; 100_000];
    for place in [0, 16_384, 99_999] {
        many[place] = f64::NAN;
        assert!(of(&many).is_nan(), "{place}");
        many[place] = 1.0;
    }
    assert!(of(&[f64::NAN, f64::INFINITY]).is_nan());
    let whole = Tensor::new(&[1_u32], &Device::Cpu).unwrap();
    assert!(largest_magnitude(&whole).is_err());
}
