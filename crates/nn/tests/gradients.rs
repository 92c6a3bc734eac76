//! Every op of this crate against central differences, in f64, over several shapes.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use isqrt_nn::ops::{
    Activation, BatchNorm, Conv, LocalResponseNorm, MaskKey, Pool, Window, adaptive_avg_pool2d,
    add, add_relu, avg_pool2d, batch_norm, block, channel_shuffle, conv_norm, conv2d,
    conv2d_into_blocks, cross_entropy, dropout, global_avg_pool, linear, local_response_norm,
    max_pool2d, relu, relu6, shuffle_unit, unblock,
};
use isqrt_nn::{Buffer, Mode};
use isqrt_testkit::{Gradcheck, gradcheck, randn};

const MODES: [Mode; 4] = [Mode::Train, Mode::Frozen, Mode::Replay, Mode::Eval];

fn random(shape: &[usize], seed: u64) -> Tensor {
    randn(shape, seed, DType::F64).unwrap()
}

/// Values 0.1 apart and 0.03 away from 0, in random order: no kink within a step.
fn apart(shape: &[usize], seed: u64) -> Tensor {
    let count: usize = shape.iter().product();
    let keys = random(&[count], seed).to_vec1::<f64>().unwrap();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    let mut values = vec![0.0; count];
    for (rank, &place) in order.iter().enumerate() {
        values[place] = 0.1 * (rank as f64 - (count / 2) as f64) + 0.03;
    }
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[track_caller]
fn check(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> isqrt_nn::Result<Tensor>) {
    gradcheck(|t| Ok(f(t)?), inputs, Gradcheck::default()).unwrap();
}

#[test]
fn conv2d_of_any_kernel_stride_and_padding() {
    // (batch, in, height, width), (out, kernel height, kernel width), stride, padding
    let cases = [
        ([2, 3, 5, 6], (4, 3, 3), 1, 1),
        ([2, 3, 6, 5], (2, 1, 1), 1, 0),
        ([3, 2, 7, 7], (3, 1, 1), 2, 0),
        ([1, 2, 9, 8], (3, 5, 5), 2, 2),
        ([2, 1, 7, 9], (2, 3, 2), 3, 1),
        ([1, 2, 4, 4], (2, 4, 4), 1, 0),
        ([1, 1, 8, 8], (2, 2, 3), 4, 2),
        ([18, 1, 3, 3], (1, 2, 2), 1, 1),
    ];
    for (i, (x, (out, kh, kw), stride, padding)) in cases.into_iter().enumerate() {
        let inputs = [
            random(&x, i as u64),
            random(&[out, x[1], kh, kw], 100 + i as u64),
        ];
        check(&inputs, |t| {
            conv2d(&t[0], &t[1], None, Conv::new(stride, padding))
        });
    }
}

#[test]
fn conv2d_with_dilation_groups_bias_and_activation() {
    let uneven = Conv {
        stride: (2, 1),
        padding: (0, 2),
        dilation: (1, 3),
        ..Conv::default()
    };
    let grouped = |groups, conv| Conv { groups, ..conv };
    let depthwise = Conv {
        dilation: (2, 2),
        ..grouped(4, Conv::new(2, 2))
    };
    // (batch, in, height, width), (out, in / groups, kernel height, kernel width)
    for (i, (x, w, options)) in [
        ([2, 3, 6, 7], [4, 3, 3, 2], uneven),
        ([2, 4, 5, 5], [6, 2, 3, 3], grouped(2, Conv::new(1, 1))),
        ([2, 4, 7, 6], [8, 1, 3, 3], depthwise),
        ([2, 6, 3, 4], [3, 2, 1, 1], grouped(3, Conv::new(1, 0))),
        ([2, 16, 5, 4], [16, 8, 3, 3], grouped(2, Conv::new(2, 1))),
        ([2, 16, 4, 4], [16, 4, 3, 3], grouped(4, Conv::new(1, 1))),
        ([2, 16, 4, 5], [16, 1, 3, 3], grouped(16, Conv::new(1, 1))),
        ([1, 16, 5, 6], [16, 1, 3, 3], grouped(16, Conv::new(2, 1))),
        ([2, 5, 4, 6], [5, 1, 3, 2], grouped(5, Conv::new(2, 1))),
        ([2, 12, 4, 3], [8, 12, 3, 3], Conv::new(1, 1)),
        ([2, 9, 3, 4], [16, 9, 1, 1], Conv::new(2, 0)),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 40 + 3 * i as u64;
        // Outputs stay away from the kink by luck of the seed: a step is 1e-5, so a kink inside
        // one would show as a failure, not pass unseen.
        let inputs = [
            random(&x, seed),
            random(&w, seed + 1),
            random(&w[..1], seed + 2),
        ];
        for activation in Activation::ALL {
            let options = Conv {
                activation,
                ..options
            };
            check(&inputs, |t| conv2d(&t[0], &t[1], Some(&t[2]), options));
            if w[0] % 8 == 0 {
                check(&inputs, |t| {
                    conv2d_into_blocks(&t[0], &t[1], Some(&t[2]), options)
                });
                let y = conv2d_into_blocks(&inputs[0], &inputs[1], Some(&inputs[2]), options);
                let known = conv2d(&inputs[0], &inputs[1], Some(&inputs[2]), options).unwrap();
                let off = (unblock(&y.unwrap()).unwrap() - known)
                    .unwrap()
                    .abs()
                    .unwrap();
                let off = off.max_all().unwrap().to_scalar::<f64>().unwrap();
                // Enough channels go through blocks, others through the same products.
                let enough = options.groups == 1 && x[1] >= 8;
                assert!(off <= if enough { 1e-12 } else { 0.0 });
            }
            if x[1] == 16 {
                let inputs = [
                    block(&inputs[0]).unwrap(),
                    inputs[1].clone(),
                    inputs[2].clone(),
                ];
                check(&inputs, |t| conv2d(&t[0], &t[1], Some(&t[2]), options));
            }
        }
    }
}

#[test]
fn conv2d_of_strided_inputs() {
    let inputs = [random(&[2, 5, 6, 3], 1), random(&[4, 3, 3, 3], 2)];
    check(&inputs, |t| {
        conv2d(&t[0].permute((0, 3, 1, 2))?, &t[1], None, Conv::default())
    });
}

fn norm(channels: usize, activation: Activation) -> BatchNorm {
    let values = |from: f64| -> Vec<f64> { (0..channels).map(|c| from + 0.3 * c as f64).collect() };
    let buffer = |from| Buffer::new(Tensor::new(values(from), &Device::Cpu).unwrap());
    BatchNorm {
        running_mean: buffer(-0.2),
        running_var: buffer(0.5),
        momentum: 0.1,
        epsilon: 1e-5,
        activation,
    }
}

#[test]
fn batch_norm_in_every_mode_with_every_activation() {
    for (i, shape) in [[4, 3, 2, 3], [2, 1, 5, 5], [3, 2, 1, 1]]
        .into_iter()
        .enumerate()
    {
        for activation in Activation::ALL {
            for mode in MODES {
                let channels = shape[1];
                let seed = 10 * i as u64;
                // Some values are above 6.
                let gamma = (random(&[channels], seed + 1) + 5.0).unwrap();
                // Values spread by 0.1 stay away from the kinks only by luck of the seed: a step is
                // 1e-5, so a kink inside one would show as a failure, not pass unseen.
                let inputs = [random(&shape, seed), gamma, random(&[channels], seed + 2)];
                check(&inputs, |t| {
                    batch_norm(&t[0], &t[1], &t[2], &norm(channels, activation), mode)
                });
            }
        }
    }
}

#[test]
fn blocked_maps() {
    let x = random(&[2, 16, 3, 5], 1);
    check(std::slice::from_ref(&x), |t| block(&t[0]));
    check(&[block(&x).unwrap()], |t| unblock(&t[0]));
    for (i, (kernel, stride, padding)) in [(3, 1, 1), (1, 1, 0), (1, 2, 0), (3, 2, 1), (2, 3, 2)]
        .into_iter()
        .enumerate()
    {
        let inputs = [
            block(&x).unwrap(),
            random(&[8, 16, kernel, kernel], 20 + i as u64),
        ];
        check(&inputs, |t| {
            conv2d(&t[0], &t[1], None, Conv::new(stride, padding))
        });
    }
    for (i, (kernel, stride)) in [(3, 1), (1, 2), (3, 2)].into_iter().enumerate() {
        for activation in Activation::ALL {
            for mode in MODES {
                let seed = 30 + i as u64;
                let gamma = (random(&[16], seed) + 5.0).unwrap();
                let weight = random(&[16, 16, kernel, kernel], seed + 1);
                let inputs = [block(&x).unwrap(), weight, gamma, random(&[16], seed + 2)];
                let options = Conv::new(stride, kernel / 2);
                check(&inputs, |t| {
                    let norm = norm(16, activation);
                    conv_norm(&t[0], &t[1], options, (&t[2], &t[3]), &norm, mode)
                });
                let (known, fused) = (norm(16, activation), norm(16, activation));
                let [x, w, gamma, beta] = &inputs;
                let y = conv2d(x, w, None, options).unwrap();
                let y = batch_norm(&y, gamma, beta, &known, mode).unwrap();
                let z = conv_norm(x, w, options, (gamma, beta), &fused, mode).unwrap();
                let off = |a: &Tensor, b: &Tensor| {
                    let off = (a - b).unwrap().abs().unwrap().max_all().unwrap();
                    off.to_scalar::<f64>().unwrap()
                };
                assert!(off(&y, &z) < 1e-12);
                assert!(off(&known.running_var.get(), &fused.running_var.get()) < 1e-12);
            }
        }
    }
    // Plain maps: one node in evaluation.
    let plain = random(&[2, 6, 5, 4], 60);
    for (groups, kernel, stride) in [(1, 1, 1), (6, 3, 1), (6, 3, 2), (2, 3, 1)] {
        for (activation, mode) in Activation::ALL
            .into_iter()
            .flat_map(|a| MODES.map(|m| (a, m)))
        {
            let options = Conv {
                groups,
                ..Conv::new(stride, kernel / 2)
            };
            let weight = random(&[6, 6 / groups, kernel, kernel], 61);
            let gamma = (random(&[6], 62) + 5.0).unwrap();
            let inputs = [plain.clone(), weight, gamma, random(&[6], 63)];
            check(&inputs, |t| {
                let norm = norm(6, activation);
                conv_norm(&t[0], &t[1], options, (&t[2], &t[3]), &norm, mode)
            });
            let [x, w, gamma, beta] = &inputs;
            let y = conv2d(x, w, None, options).unwrap();
            let y = batch_norm(&y, gamma, beta, &norm(6, activation), mode).unwrap();
            let fused = norm(6, activation);
            let z = conv_norm(x, w, options, (gamma, beta), &fused, mode).unwrap();
            let off = (y - z).unwrap().abs().unwrap().max_all().unwrap();
            assert!(off.to_scalar::<f64>().unwrap() < 1e-12);
        }
    }
    // An activation between the two, and groups that fill no blocks: two nodes.
    let grouped = Conv {
        groups: 4,
        ..Conv::new(1, 1)
    };
    let clipped = Conv {
        activation: Activation::Relu,
        ..Conv::new(1, 1)
    };
    for (channels, options) in [(4, grouped), (16, clipped)] {
        let weight = random(&[16, channels, 3, 3], 50);
        let gamma = (random(&[16], 51) + 2.0).unwrap();
        let inputs = [block(&x).unwrap(), weight, gamma, random(&[16], 52)];
        let f = |t: &[Tensor]| {
            let norm = norm(16, Activation::None);
            conv_norm(&t[0], &t[1], options, (&t[2], &t[3]), &norm, Mode::Train)
        };
        check(&inputs, f);
        let [x, w, gamma, beta] = &inputs;
        let y = conv2d(x, w, None, options).unwrap();
        let y = batch_norm(&y, gamma, beta, &norm(16, Activation::None), Mode::Train).unwrap();
        let off = (y - f(&inputs).unwrap()).unwrap().abs().unwrap();
        assert!(off.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-12);
    }
    let maps = block(&apart(&[2, 16, 5, 6], 5)).unwrap();
    for (kernel, stride, padding) in [(3, 2, 1), (2, 2, 0), (3, 1, 1)] {
        let window = Window {
            kernel,
            stride,
            padding,
        };
        check(std::slice::from_ref(&maps), |t| max_pool2d(&t[0], window));
        let known = max_pool2d(&unblock(&maps).unwrap(), window).unwrap();
        let found = unblock(&max_pool2d(&maps, window).unwrap()).unwrap();
        let equal = (known - found).unwrap().abs().unwrap().sum_all().unwrap();
        assert_eq!(equal.to_scalar::<f64>().unwrap(), 0.0);
    }
    for activation in Activation::ALL {
        for mode in MODES {
            let gamma = (random(&[16], 2) + 5.0).unwrap();
            let inputs = [block(&x).unwrap(), gamma, random(&[16], 3)];
            check(&inputs, |t| {
                batch_norm(&t[0], &t[1], &t[2], &norm(16, activation), mode)
            });
        }
    }
}

#[test]
fn relu_and_add_relu() {
    check(&[apart(&[3, 7], 1)], |t| relu(&t[0]));
    check(&[apart(&[2, 3, 4, 4], 2)], |t| relu(&t[0]));
    check(&[apart(&[4, 5], 3)], |t| relu(&t[0].t()?));
    check(&[random(&[2, 3, 4], 4), random(&[2, 3, 4], 5)], |t| {
        add_relu(&t[0], &t[1])
    });
}

#[test]
fn pooling_of_any_window() {
    for (i, (kernel, stride, padding)) in [
        (2, 2, 0),
        (3, 2, 1),
        (3, 1, 1),
        (2, 3, 1),
        (5, 2, 2),
        (1, 2, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let window = Window {
            kernel,
            stride,
            padding,
        };
        check(&[apart(&[2, 2, 7, 6], i as u64)], |t| {
            max_pool2d(&t[0], window)
        });
        check(&[random(&[2, 2, 7, 6], i as u64)], |t| {
            avg_pool2d(&t[0], window)
        });
        check(&[random(&[2, 2, 7, 6], i as u64)], |t| {
            adaptive_avg_pool2d(&t[0], (kernel, stride + 6))
        });
    }
    // Height and width apart: kernel, stride, padding.
    for (i, (kernel, stride, padding)) in [
        ((2, 3), (1, 2), (1, 0)),
        ((3, 1), (2, 3), (0, 0)),
        ((1, 4), (3, 1), (0, 2)),
        ((3, 3), (2, 2), (1, 1)),
        ((2, 2), (4, 3), (1, 1)),
        ((8, 7), (1, 2), (2, 3)),
    ]
    .into_iter()
    .enumerate()
    {
        for (ceil_mode, count_include_pad) in
            [(false, true), (false, false), (true, true), (true, false)]
        {
            let pool = Pool {
                kernel,
                stride,
                padding,
                ceil_mode,
                count_include_pad,
            };
            let seed = 50 + i as u64;
            check(&[apart(&[2, 1, 7, 6], seed)], |t| max_pool2d(&t[0], pool));
            check(&[random(&[2, 1, 7, 6], seed)], |t| avg_pool2d(&t[0], pool));
        }
    }
    check(&[random(&[3, 4, 5, 6], 1)], |t| global_avg_pool(&t[0]));
    check(&[random(&[1, 1, 1, 1], 2)], |t| global_avg_pool(&t[0]));
}

/// The backward pass makes the mask of the forward pass again, over several blocks too.
#[test]
fn dropout_of_any_share() {
    for (i, (shape, p)) in [
        ([2, 3, 4, 5], 0.5),
        ([1, 1, 1, 7], 0.1),
        ([3, 5, 2, 5], 0.9),
    ]
    .into_iter()
    .enumerate()
    {
        let key = MaskKey {
            seed: 1,
            layer: 2,
            step: i as u64,
        };
        for mode in MODES {
            check(&[random(&shape, i as u64)], |t| {
                dropout(&t[0], p, key, mode)
            });
        }
        check(&[random(&shape, i as u64)], |t| {
            dropout(&t[0].permute((3, 1, 0, 2))?, p, key, Mode::Train)
        });
    }
}

#[test]
fn local_response_norm_of_any_option() {
    // (batch, channels, height, width), size, alpha, beta, k
    for (i, (shape, size, alpha, beta, k)) in [
        ([2, 7, 2, 3], 5, 0.3, 0.75, 1.0),
        ([1, 6, 3, 1], 4, 2.0, 0.75, 2.0),
        ([2, 5, 1, 2], 3, 1.0, 0.5, 0.5),
        ([1, 4, 2, 2], 1, 1.0, 1.0, 1.0),
        ([2, 3, 2, 2], 9, 0.7, 1.3, 1.0),
        ([1, 8, 2, 2], 2, 1e-4, 0.75, 1.0),
        ([1, 3, 2, 2], 3, 1.0, 0.0, 1.0),
    ]
    .into_iter()
    .enumerate()
    {
        let norm = LocalResponseNorm {
            size,
            alpha,
            beta,
            k,
        };
        check(&[random(&shape, i as u64)], |t| {
            local_response_norm(&t[0], norm)
        });
    }
}

#[test]
fn linear_of_small_and_of_shared_out_sizes() {
    for (i, (batch, inputs, outputs)) in [(3, 4, 2), (1, 1, 1), (2, 70, 67)].into_iter().enumerate()
    {
        let seed = 10 * i as u64;
        let tensors = [
            random(&[batch, inputs], seed),
            random(&[outputs, inputs], seed + 1),
            random(&[outputs], seed + 2),
        ];
        check(&tensors, |t| linear(&t[0], &t[1], &t[2]));
    }
}

#[test]
fn cross_entropy_with_and_without_smoothing() {
    for smoothing in [0.0, 0.1] {
        check(&[random(&[4, 5], 1)], |t| {
            cross_entropy(&t[0], &[0, 4, 2, 2], smoothing)
        });
        check(&[random(&[1, 1], 1)], |t| {
            cross_entropy(&t[0], &[0], smoothing)
        });
    }
}

/// A step of a small network: what one op hands to the next.
#[test]
fn a_residual_block_end_to_end() {
    let same = Conv::new(1, 1);
    let inputs = [
        random(&[3, 2, 5, 5], 1),
        random(&[2, 2, 3, 3], 2),
        random(&[2, 2, 3, 3], 3),
        random(&[3, 2], 4),
    ];
    check(&inputs, |t| {
        let (gamma, beta) = (Tensor::new(&[1.0, 1.3], &Device::Cpu)?, random(&[2], 9));
        let y = conv2d(&t[0], &t[1], None, same)?;
        let y = batch_norm(&y, &gamma, &beta, &norm(2, Activation::Relu), Mode::Train)?;
        let y = conv2d(&y, &t[2], None, same)?;
        let y = batch_norm(&y, &gamma, &beta, &norm(2, Activation::None), Mode::Train)?;
        let y = max_pool2d(
            &add_relu(&y, &t[0])?,
            Window {
                kernel: 3,
                stride: 2,
                padding: 1,
            },
        )?;
        let bias = Tensor::zeros(3, DType::F64, &Device::Cpu)?;
        cross_entropy(
            &linear(&global_avg_pool(&y)?, &t[3], &bias)?,
            &[0, 2, 1],
            0.1,
        )
    });
}

#[test]
fn relu6_sums_and_channel_shuffle() {
    // From -12.7 to 12.8, so both kinks are passed.
    check(&[apart(&[2, 2, 8, 8], 1)], |t| relu6(&t[0]));
    let inputs = [random(&[2, 3, 2, 4], 2), random(&[2, 3, 2, 4], 3)];
    check(&inputs, |t| add(&t[0], &t[1]));
    check(&inputs, |t| channel_shuffle(&t[0], &t[1]));
    // A unit, and a chain of two, beside the ops that it stands for.
    let x = random(&[2, 6, 3, 4], 70);
    let weight = random(&[3, 3, 3, 3], 71);
    let branch = |half: Tensor, weight: &Tensor| conv2d(&half, weight, None, Conv::new(1, 1));
    let unit = |x: &Tensor, weight: &Tensor| shuffle_unit(x, |half| branch(half, weight));
    let plain = |x: &Tensor, weight: &Tensor| {
        let (first, second) = (x.narrow(1, 0, 3)?, x.narrow(1, 3, 3)?);
        channel_shuffle(&first, &branch(second, weight)?)
    };
    let inputs = [x.clone(), weight.clone()];
    check(&inputs, |t| unit(&t[0], &t[1]));
    check(&inputs, |t| unit(&unit(&t[0], &t[1])?, &t[1]));
    // Of a branch without a gradient, the first half still has one.
    let constant = random(&[2, 3, 3, 4], 73);
    check(std::slice::from_ref(&x), |t| {
        shuffle_unit(&t[0], |_| Ok(constant.clone()))
    });
    // Without a gradient of the input.
    check(std::slice::from_ref(&weight), |t| unit(&x, &t[0]));
    let y = plain(&plain(&x, &weight).unwrap(), &weight).unwrap();
    let z = unit(&unit(&x, &weight).unwrap(), &weight).unwrap();
    let off = (y - z).unwrap().abs().unwrap().max_all().unwrap();
    assert!(off.to_scalar::<f64>().unwrap() == 0.0);
    let odd = random(&[1, 5, 2, 2], 72);
    let message = shuffle_unit(&odd, Ok).unwrap_err().to_string();
    assert!(message.contains("even number of channels"), "{message}");
    let cut = |half: Tensor| Ok(half.narrow(2, 0, 2)?);
    let message = shuffle_unit(&x, cut).unwrap_err().to_string();
    assert!(
        message.contains("the branch made [2, 3, 2, 4]"),
        "{message}"
    );
}
