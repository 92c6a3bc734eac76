//! Ops on a GPU beside the CPU, forward and backward. Passed over where there is no GPU;
//! tools/cuda/check.sh runs it without one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_device::{Choice, Error};
use isqrt_nn::layers::{ConvNorm, Dropout, GradientCheckpoint, Linear, residual};
use isqrt_nn::ops::{self, Activation, BatchNorm, Conv, LocalResponseNorm, Pool};
use isqrt_nn::{
    AdamW, AdamWConfig, Buffer, Decay, Ema, Mode, Optimizer, Sgd, SgdConfig, Vars, clip_grad_norm,
    clip_grad_value, grad_squares,
};

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
    same_within(gpu, what, operands, (1e-12, 1e-5), op);
}

/// As [`same`], within these shares of the largest value in f64 and f32.
fn same_within(
    gpu: &Device,
    what: &str,
    operands: &[Tensor],
    limits: (f64, f64),
    op: impl Fn(&[Tensor]) -> isqrt_nn::Result<Tensor>,
) {
    for (dtype, limit) in [(DType::F64, limits.0), (DType::F32, limits.1)] {
        let ours = run(&op, operands, dtype, gpu);
        let theirs = run(&op, operands, dtype, &Device::Cpu);
        for (part, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(a.len(), b.len(), "{what} {dtype:?} part {part}");
            let most = b.iter().fold(1e-300_f64, |m, v| m.max(v.abs()));
            for (a, b) in a.iter().zip(b) {
                let close = (a - b).abs() <= limit * most || a.is_nan() && b.is_nan();
                assert!(
                    close,
                    "{what} {dtype:?} part {part}: {a} and {b} of at most {most}"
                );
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
fn shuffles() {
    let Some(gpu) = gpu() else { return };
    for shape in [[1, 1, 1, 1], [3, 5, 2, 7], [2, 58, 4, 3]] {
        let [batch, channels, height, width] = shape;
        let operands = [numbers(&shape, 0.1), numbers(&shape, 0.6)];
        let shuffle = |x: &[Tensor]| ops::channel_shuffle(&x[0], &x[1]);
        same(&gpu, "channel_shuffle", &operands, shuffle);
        same(&gpu, "channel_shuffle, channels last", &operands, |x| {
            last(&x[0], |first| match first.rank() {
                5 => ops::channel_shuffle(first, &ops::block(&x[1])?),
                _ => ops::channel_shuffle(first, &x[1]),
            })
        });
        let x = numbers(&[batch, 2 * channels, height, width], 0.2);
        let x = std::slice::from_ref(&x);
        let unit = |x: &Tensor| ops::shuffle_unit(x, |half| Ok(half.sqr()?));
        same(&gpu, "shuffle_unit", x, |x| unit(&x[0]));
        let last_of = |x: &[Tensor]| last(&x[0], unit);
        same(&gpu, "shuffle_unit, channels last", x, last_of);
        same(&gpu, "two units", x, |x| last(&x[0], |x| unit(&unit(x)?)));
        // No gradient of the branch, or of the input.
        let constant = numbers(&shape, 0.7);
        let like = |x: &Tensor, t: &Tensor| Ok(t.to_dtype(x.dtype())?.to_device(x.device())?);
        same(&gpu, "shuffle_unit of a constant", x, |x| {
            ops::shuffle_unit(&x[0], |_| like(&x[0], &constant))
        });
        let both = &x[0];
        same(&gpu, "shuffle_unit on a constant", &operands[..1], |x| {
            ops::shuffle_unit(&like(&x[0], both)?, |half| Ok((half * &x[0])?))
        });
        // Values of bf16 are passed on as they are.
        let [first, second] = [&operands[0], &operands[1]]
            .map(|t| t.to_dtype(DType::BF16).unwrap().to_device(&gpu).unwrap());
        let in_bf16 = ops::channel_shuffle(&first, &second).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let in_f32 = ops::channel_shuffle(&wide(&first), &wide(&second)).unwrap();
        assert_eq!(home(&in_bf16), home(&in_f32));
    }
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

/// `op` of maps with the channels of a pixel beside each other on the GPU, of plain ones on the CPU.
fn last(x: &Tensor, op: impl Fn(&Tensor) -> isqrt_nn::Result<Tensor>) -> isqrt_nn::Result<Tensor> {
    match x.device().is_cuda() {
        true => ops::unblock(&op(&ops::block(x)?)?),
        false => op(x),
    }
}

#[test]
fn layouts() {
    let Some(gpu) = gpu() else { return };
    for shape in [[1, 1, 1, 1], [3, 5, 7, 2], [2, 33, 9, 41]] {
        let x = numbers(&shape, 0.2);
        same(&gpu, "block", std::slice::from_ref(&x), |x| {
            last(&x[0], |x| Ok(x.clone()))
        });
        let blocked = ops::block(&x.to_device(&gpu).unwrap()).unwrap();
        let [b, c, h, w] = shape;
        assert_eq!(blocked.dims(), [b, 1, h, w, c]);
        let pixels = x.permute((0, 2, 3, 1)).unwrap().unsqueeze(1).unwrap();
        assert_eq!(home(&blocked), home(&pixels));
    }
}

#[test]
fn convolutions() {
    let Some(gpu) = gpu() else { return };
    let options = |stride, padding, dilation, groups, activation| Conv {
        stride,
        padding,
        dilation,
        groups,
        activation,
    };
    for (x, w, conv) in [
        (
            [2, 3, 9, 8],
            [4, 3, 3, 3],
            options((1, 1), (1, 1), (1, 1), 1, Activation::None),
        ),
        (
            [1, 4, 7, 7],
            [6, 4, 1, 1],
            options((2, 2), (0, 0), (1, 1), 1, Activation::Relu),
        ),
        (
            [2, 6, 10, 7],
            [4, 3, 3, 2],
            options((2, 1), (2, 0), (1, 2), 2, Activation::Relu6),
        ),
        (
            [2, 5, 6, 6],
            [5, 1, 3, 3],
            options((1, 1), (1, 1), (1, 1), 5, Activation::None),
        ),
    ] {
        let operands = [numbers(&x, 0.1), numbers(&w, 0.7), numbers(&w[..1], 0.4)];
        same(&gpu, "conv2d with bias", &operands, |x| {
            ops::conv2d(&x[0], &x[1], Some(&x[2]), conv)
        });
        same(&gpu, "conv2d", &operands[..2], |x| {
            ops::conv2d(&x[0], &x[1], None, conv)
        });
        same(&gpu, "conv2d, channels last", &operands, |x| {
            last(&x[0], |maps| ops::conv2d(maps, &x[1], Some(&x[2]), conv))
        });
        same(&gpu, "conv2d into blocks", &operands, |x| {
            match x[0].device().is_cuda() {
                true => ops::unblock(&ops::conv2d_into_blocks(&x[0], &x[1], Some(&x[2]), conv)?),
                false => ops::conv2d(&x[0], &x[1], Some(&x[2]), conv),
            }
        });
    }
}

/// Running statistics where `like` is.
fn norm(like: &Tensor, channels: usize, activation: Activation) -> BatchNorm {
    let place = |t: Tensor| {
        let t = t.to_dtype(like.dtype()).unwrap();
        Buffer::new(t.to_device(like.device()).unwrap())
    };
    BatchNorm {
        running_mean: place(numbers(&[channels], 0.6)),
        running_var: place((numbers(&[channels], 0.2).abs().unwrap() + 0.5).unwrap()),
        momentum: 0.1,
        epsilon: 1e-5,
        activation,
    }
}

#[test]
fn batch_norms() {
    let Some(gpu) = gpu() else { return };
    for shape in [[4, 3, 5, 5], [2, 8, 3, 7], [2, 70, 3, 2], [3, 64, 20, 20]] {
        let c = shape[1];
        // Far from zero: variances must not suffer.
        let x = (numbers(&shape, 0.9) + 50.0).unwrap();
        // Some values are above 6.
        let gamma = (numbers(&[c], 0.8) * 5.0).unwrap();
        let operands = [x, gamma, numbers(&[c], 0.5)];
        for activation in Activation::ALL {
            for mode in [Mode::Train, Mode::Eval, Mode::Frozen] {
                let what = format!("batch_norm {shape:?} {mode:?} {activation:?}");
                let plain = |x: &[Tensor]| {
                    let norm = norm(&x[0], c, activation);
                    let y = ops::batch_norm(&x[0], &x[1], &x[2], &norm, mode)?;
                    // The running statistics move alike.
                    let stats = [norm.running_mean.get(), norm.running_var.get()];
                    let stats = Tensor::stack(&stats, 0)?
                        .sum_all()?
                        .broadcast_as(y.shape())?;
                    Ok((y + (stats * 0.01)?)?)
                };
                same_within(&gpu, &what, &operands, (1e-10, 3e-4), plain);
                same_within(&gpu, &what, &operands, (1e-10, 3e-4), |x| {
                    let norm = norm(&x[0], c, activation);
                    last(&x[0], |maps| {
                        ops::batch_norm(maps, &x[1], &x[2], &norm, mode)
                    })
                });
            }
        }
    }
}

#[test]
fn convolutions_with_norms() {
    let Some(gpu) = gpu() else { return };
    for (x, w, stride) in [
        ([2, 3, 9, 8], [8, 3, 3, 3], 2),
        ([3, 4, 5, 5], [6, 4, 1, 1], 1),
    ] {
        let c = w[0];
        let conv = Conv::new(stride, w[2] / 2);
        let operands = [
            numbers(&x, 0.1),
            numbers(&w, 0.7),
            // Some values are above 6.
            (numbers(&[c], 0.8) * 5.0).unwrap(),
            numbers(&[c], 0.5),
        ];
        let modes = [Mode::Train, Mode::Eval, Mode::Frozen];
        let all = modes.map(|mode| Activation::ALL.map(|activation| (mode, activation)));
        for (mode, activation) in all.into_iter().flatten() {
            let what = format!("conv_norm {mode:?} {activation:?}");
            same(&gpu, &what, &operands, |x| {
                let norm = norm(&x[0], c, activation);
                let y = match x[0].device().is_cuda() {
                    true => {
                        let maps = ops::block(&x[0])?;
                        ops::unblock(&ops::conv_norm(
                            &maps,
                            &x[1],
                            conv,
                            (&x[2], &x[3]),
                            &norm,
                            mode,
                        )?)?
                    }
                    false => {
                        let y = ops::conv2d(&x[0], &x[1], None, conv)?;
                        ops::batch_norm(&y, &x[2], &x[3], &norm, mode)?
                    }
                };
                let stats = [norm.running_mean.get(), norm.running_var.get()];
                let stats = Tensor::stack(&stats, 0)?
                    .sum_all()?
                    .broadcast_as(y.shape())?;
                Ok((y + (stats * 0.01)?)?)
            });
        }
    }
}

#[test]
fn pooling() {
    let Some(gpu) = gpu() else { return };
    let pools = [
        (2, 2, 0, false, true),
        (3, 2, 1, false, true),
        (3, 1, 1, false, false),
        (3, 2, 0, true, false),
        (5, 3, 2, true, true),
    ];
    for (kernel, stride, padding, ceil_mode, count_include_pad) in pools {
        let pool = Pool {
            kernel: (kernel, kernel),
            stride: (stride, stride),
            padding: (padding, padding),
            ceil_mode,
            count_include_pad,
        };
        let x = numbers(&[2, 5, 8, 9], 0.3);
        let x = std::slice::from_ref(&x);
        same(&gpu, "max_pool2d", x, |x| ops::max_pool2d(&x[0], pool));
        same(&gpu, "max_pool2d, channels last", x, |x| {
            last(&x[0], |x| ops::max_pool2d(x, pool))
        });
        same(&gpu, "avg_pool2d", x, |x| ops::avg_pool2d(&x[0], pool));
    }
    let x = numbers(&[2, 5, 8, 9], 0.3);
    for output in [(1, 1), (3, 2), (7, 9), (12, 5)] {
        same(&gpu, "adaptive_avg_pool2d", std::slice::from_ref(&x), |x| {
            ops::adaptive_avg_pool2d(&x[0], output)
        });
    }
    same(&gpu, "global_avg_pool", std::slice::from_ref(&x), |x| {
        ops::global_avg_pool(&x[0])
    });
    for size in [1, 2, 5] {
        let norm = LocalResponseNorm {
            k: 2.0,
            alpha: 0.3,
            ..LocalResponseNorm::new(size)
        };
        same(&gpu, "local_response_norm", std::slice::from_ref(&x), |x| {
            ops::local_response_norm(&x[0], norm)
        });
    }
}

#[test]
fn dropout_has_the_masks_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for len in [1, 63, 64, 65, 5000] {
        let key = ops::MaskKey {
            seed: 3,
            layer: 1 << 40,
            step: (1 << 33) + 5,
        };
        let x = (numbers(&[len], 0.0).abs().unwrap() + 1.0).unwrap();
        same(&gpu, "dropout", &[x], |x| {
            ops::dropout(&x[0], 0.4, key, Mode::Train)
        });
    }
}

/// A residual block with these convolutions (channels, kernel, stride): its output, the gradients of
/// its input and of all its parameters, and its running statistics.
fn block_of(
    shapes: &[((usize, usize), usize, usize)],
    shortcut: bool,
    mode: Mode,
    (device, dtype, maps): (&Device, DType, DType),
) -> Vec<Vec<f64>> {
    let mut vars = Vars::new(3, dtype, device);
    let mut root = vars.root();
    let mut convs = vec![];
    for (i, &(channels, kernel, stride)) in shapes.iter().enumerate() {
        let names = (&*format!("conv{i}"), &*format!("bn{i}"));
        let activation = match i + 1 < shapes.len() {
            true => Activation::Relu,
            false => Activation::None,
        };
        convs.push(ConvNorm::new(&mut root, names, channels, kernel, stride, activation).unwrap());
    }
    let (inputs, outputs) = (shapes[0].0.0, shapes[shapes.len() - 1].0.1);
    let stride = shapes.iter().map(|s| s.2).product();
    let names = ("downsample.0", "downsample.1");
    let shortcut = shortcut.then(|| {
        ConvNorm::new(
            &mut root,
            names,
            (inputs, outputs),
            1,
            stride,
            Activation::None,
        )
        .unwrap()
    });
    for (name, parameter) in vars.parameters() {
        if name.contains("bn") || name.contains("downsample.1") {
            let value = numbers(parameter.dims(), 0.01 * name.len() as f64);
            let value = value.to_dtype(dtype).unwrap().to_device(device).unwrap();
            parameter.set(&value).unwrap();
        }
    }
    let x = numbers(&[3, inputs, 6, 7], 0.1);
    let x = x.to_dtype(maps).unwrap().to_device(device).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let y = match device.is_cuda() {
        true => {
            let maps = ops::block(&x).unwrap();
            ops::unblock(&residual(&convs, shortcut.as_ref(), &maps, mode).unwrap()).unwrap()
        }
        false => residual(&convs, shortcut.as_ref(), &x, mode).unwrap(),
    };
    let weights = numbers(y.dims(), 0.3).to_dtype(dtype).unwrap();
    let weights = weights.to_device(device).unwrap();
    let loss = (y.to_dtype(dtype).unwrap() * weights).unwrap();
    let gradients = vars.backward(&loss.sum_all().unwrap()).unwrap();
    let mut out = vec![home(&y), home(gradients.get(&x).unwrap())];
    for (_, parameter) in vars.parameters() {
        out.push(home(gradients.get(parameter.as_tensor()).unwrap()));
    }
    out.extend(vars.buffers().map(|(_, b)| home(&b.get())));
    out
}

type Shapes = &'static [((usize, usize), usize, usize)];
/// As in ResNets: two convolutions or three, with and without a stride and a convolution beside them.
const BLOCKS: [(Shapes, bool); 4] = [
    (&[((8, 8), 3, 1), ((8, 8), 3, 1)], false),
    (&[((4, 8), 3, 2), ((8, 8), 3, 1)], true),
    (&[((12, 3), 1, 1), ((3, 3), 3, 1), ((3, 12), 1, 1)], false),
    (&[((8, 4), 1, 1), ((4, 4), 3, 2), ((4, 16), 1, 1)], true),
];

#[test]
fn residual_blocks_are_one_node() {
    residual_blocks();
}

/// What is measured before a pass leaves no trace in what the pass adds to.
#[test]
fn algorithms_that_are_timed_give_the_same() {
    isqrt_device::set_search(isqrt_device::Search::Timed);
    residual_blocks();
    isqrt_device::set_search(isqrt_device::Search::Ranked);
}

fn residual_blocks() {
    let Some(gpu) = gpu() else { return };
    for (shapes, shortcut) in BLOCKS {
        for mode in [Mode::Train, Mode::Frozen, Mode::Eval] {
            for (dtype, limit) in [(DType::F64, 1e-11), (DType::F32, 1e-4)] {
                let of = |device| block_of(shapes, shortcut, mode, (device, dtype, dtype));
                let (ours, theirs) = (of(&gpu), of(&Device::Cpu));
                assert_eq!(ours.len(), theirs.len());
                for (part, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                    let most = b.iter().fold(1e-300_f64, |m, v| m.max(v.abs()));
                    for (a, b) in a.iter().zip(b) {
                        assert!(
                            (a - b).abs() <= limit * most,
                            "{shapes:?} {mode:?} {dtype:?} part {part}: {a} and {b} of {most}"
                        );
                    }
                }
            }
        }
    }
}

/// In bf16 a block is as near to f32 as its convolutions one by one, which a recorded pass takes.
#[test]
fn residual_blocks_in_bf16() {
    let Some(gpu) = gpu() else { return };
    for (shapes, shortcut) in BLOCKS {
        let of = |maps| block_of(shapes, shortcut, Mode::Train, (&gpu, DType::F32, maps));
        let full = of(DType::F32);
        let apart = |values: Vec<Vec<f64>>| -> Vec<f64> {
            let size = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
            let parts = values.iter().zip(&full).map(|(a, b)| {
                let apart = size(&mut a.iter().zip(b).map(|(a, b)| a - b));
                apart / size(&mut b.iter().copied())
            });
            parts.collect()
        };
        let ours = apart(of(DType::BF16));
        let one_by_one = apart(isqrt_nn::record(|| of(DType::BF16)).0);
        for (part, (a, b)) in ours.iter().zip(&one_by_one).enumerate() {
            assert!(*a < 1.3 * b + 5e-3, "{shapes:?} part {part}: {a} and {b}");
        }
    }
}

/// A sum of two rectified ways is the CPU's too.
#[test]
fn a_branch_that_ends_in_a_rectifier_stays_rectified() {
    let Some(gpu) = gpu() else { return };
    let of = |device: &Device| {
        let mut vars = Vars::new(3, DType::F64, device);
        let conv = ConvNorm::new(
            &mut vars.root(),
            ("conv", "bn"),
            (4, 4),
            1,
            1,
            Activation::Relu,
        )
        .unwrap();
        let x = numbers(&[2, 4, 3, 3], 0.1).to_device(device).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = match device.is_cuda() {
            true => ops::unblock(
                &residual(&[conv], None, &ops::block(&x).unwrap(), Mode::Train).unwrap(),
            ),
            false => residual(&[conv], None, &x, Mode::Train),
        };
        home(&y.unwrap())
    };
    for (a, b) in of(&gpu).iter().zip(of(&Device::Cpu)) {
        assert!((a - b).abs() < 1e-12, "{a} {b}");
    }
}

#[test]
fn a_block_whose_gradients_would_be_lost_says_so() {
    let Some(gpu) = gpu() else { return };
    let mut vars = Vars::new(3, DType::F32, &gpu);
    let conv = ConvNorm::new(
        &mut vars.root(),
        ("conv", "bn"),
        (4, 4),
        1,
        1,
        Activation::None,
    )
    .unwrap();
    let x = numbers(&[2, 4, 3, 3], 0.1).to_dtype(DType::F32).unwrap();
    let x = Var::from_tensor(&x.to_device(&gpu).unwrap()).unwrap();
    let maps = ops::block(&x).unwrap();
    let y = residual(&[conv], None, &maps, Mode::Train).unwrap();
    let told = y.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(told.contains("call Vars::backward"), "{told}");
}

/// A network with everything that training needs, after some steps: parameters, buffers and losses.
fn train(device: &Device, dtype: DType, adamw: bool) -> Vec<Vec<f64>> {
    let mut vars = Vars::new(7, dtype, device);
    let mut root = vars.root();
    let stem = ConvNorm::new(&mut root, ("conv1", "bn1"), (3, 8), 3, 1, Activation::Relu).unwrap();
    let second =
        ConvNorm::new(&mut root, ("conv2", "bn2"), (8, 16), 3, 2, Activation::Relu).unwrap();
    let checkpoint = GradientCheckpoint::new(&root);
    let dropout = Dropout::new(root.sub("dropout"), 0.2).unwrap();
    let linear = Linear::new(root.sub("fc"), 16, 5).unwrap();
    let mut optimizer: Box<dyn Optimizer> = match adamw {
        true => Box::new(AdamW::new(&vars, AdamWConfig::default()).unwrap()),
        false => {
            let config = SgdConfig {
                momentum: 0.9,
                nesterov: true,
                weight_decay: 1e-2,
                decay: Decay::default(),
            };
            Box::new(Sgd::new(&vars, config).unwrap())
        }
    };
    let mut ema = Ema::new(&vars, 0.9).unwrap();
    let mut out = vec![];
    for step in 0..3 {
        vars.set_step(step);
        let x = numbers(&[4, 3, 8, 8], 0.1 * step as f64);
        let x = x.to_dtype(dtype).unwrap().to_device(device).unwrap();
        let part = second.clone();
        let y = stem.forward_into_blocks(&x, Mode::Train).unwrap();
        let y = checkpoint
            .forward(&y, Mode::Train, move |x, mode| part.forward(x, mode))
            .unwrap();
        let y = if ops::is_blocked(&y) {
            ops::unblock(&y).unwrap()
        } else {
            y
        };
        let y = dropout
            .forward(&ops::global_avg_pool(&y).unwrap(), Mode::Train)
            .unwrap();
        let loss = ops::cross_entropy(&linear.forward(&y).unwrap(), &[0, 1, 2, 3], 0.1).unwrap();
        let mut gradients = vars.backward(&loss).unwrap();
        let squares = grad_squares(&vars, &gradients).unwrap();
        out.push(squares.iter().map(|(_, sum)| *sum).collect());
        clip_grad_value(&vars, &mut gradients, 0.05).unwrap();
        let norm = clip_grad_norm(&vars, &mut gradients, 0.1).unwrap();
        optimizer.step(&gradients, 0.1).unwrap();
        ema.update(&vars).unwrap();
        out.push(vec![home(&loss)[0], norm]);
    }
    out.extend(vars.parameters().map(|(_, p)| home(p.as_tensor())));
    out.extend(vars.buffers().map(|(_, b)| home(&b.get())));
    out.extend(ema.state().unwrap().values().map(home));
    out.extend(optimizer.state().unwrap().values().map(home));
    out
}

#[test]
fn a_network_trains_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for adamw in [false, true] {
        let (ours, theirs) = (
            train(&gpu, DType::F64, adamw),
            train(&Device::Cpu, DType::F64, adamw),
        );
        assert_eq!(ours.len(), theirs.len());
        for (part, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            let most = b.iter().fold(1e-300_f64, |m, v| m.max(v.abs()));
            for (a, b) in a.iter().zip(b) {
                assert!(
                    (a - b).abs() <= 1e-9 * most,
                    "adamw {adamw} part {part}: {a} and {b}"
                );
            }
        }
    }
}

/// Maps in bf16 have parameters in f32; results are those of the same values in f32 within bf16's
/// rounding (2⁻⁸).
#[test]
fn maps_in_bf16() {
    let Some(gpu) = gpu() else { return };
    let place = |t: &Tensor, dtype| {
        t.to_dtype(DType::BF16)
            .unwrap()
            .to_dtype(dtype)
            .unwrap()
            .to_device(&gpu)
            .unwrap()
    };
    let gradients = |dtype| {
        let x = Var::from_tensor(&place(&numbers(&[2, 3, 8, 8], 0.1), dtype)).unwrap();
        let w = Var::from_tensor(&place(&numbers(&[16, 3, 3, 3], 0.7), DType::F32)).unwrap();
        let gamma = Var::from_tensor(&place(&numbers(&[16], 0.8), DType::F32)).unwrap();
        let beta = Var::from_tensor(&place(&numbers(&[16], 0.5), DType::F32)).unwrap();
        let norm = norm(&w, 16, Activation::Relu);
        let maps = ops::block(&x).unwrap();
        let y = ops::conv_norm(
            &maps,
            &w,
            Conv::new(1, 1),
            (&gamma, &beta),
            &norm,
            Mode::Train,
        )
        .unwrap();
        let y = ops::add_relu(&y, &y).unwrap();
        assert_eq!(y.dtype(), dtype);
        let y = ops::unblock(&y).unwrap().to_dtype(DType::F32).unwrap();
        let gradients = (&y * &place(&numbers(y.dims(), 0.3), DType::F32))
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let mut out = vec![
            home(&y),
            home(&norm.running_mean.get()),
            home(&norm.running_var.get()),
        ];
        for var in [&x, &w, &gamma, &beta] {
            let gradient = gradients.get(var.as_tensor()).unwrap();
            assert_eq!(gradient.dtype(), var.dtype());
            out.push(home(gradient));
        }
        out
    };
    let (ours, theirs) = (gradients(DType::BF16), gradients(DType::F32));
    for (part, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        let size = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let apart: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        let share = size(&apart) / size(b);
        // What sits at a rectifier's edge goes elsewhere.
        assert!(share < 0.03, "part {part}: {share}");
    }
}
