//! Values of the ops against candle's or a plain formula, and what they refuse.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_nn::layers::{ChannelDropout, ConvNorm, Dropout};
use isqrt_nn::ops::{
    Activation, BatchNorm, Conv, LocalResponseNorm, MaskKey, Pool, Window, avg_pool2d, batch_norm,
    block, can_block, conv_norm, conv2d, cross_entropy, dropout, global_avg_pool, is_blocked,
    linear, local_response_norm, max_pool2d, relu, relu6, unblock,
};
use isqrt_nn::{Buffer, Decay, Init, Mode, Optimizer, Sgd, SgdConfig, Vars};
use isqrt_testkit::{assert_close, randn};

fn random(shape: &[usize], seed: u64) -> Tensor {
    randn(shape, seed, DType::F64).unwrap()
}

#[test]
fn conv2d_agrees_with_candle_in_both_types() {
    for (kernel, stride, padding) in [
        (1, 1, 0),
        (3, 1, 1),
        (5, 2, 2),
        (7, 2, 3),
        (2, 3, 0),
        (1, 2, 0),
    ] {
        let (x, w) = (
            random(&[3, 4, 12, 11], 1),
            random(&[5, 4, kernel, kernel], 2),
        );
        let expected = x.conv2d(&w, padding, stride, 1, 1).unwrap();
        let options = Conv::new(stride, padding);
        assert_close!(
            conv2d(&x, &w, None, options).unwrap(),
            expected,
            atol = 1e-12
        );
        let (x, w) = (
            x.to_dtype(DType::F32).unwrap(),
            w.to_dtype(DType::F32).unwrap(),
        );
        assert_close!(
            conv2d(&x, &w, None, options).unwrap(),
            expected,
            atol = 1e-4
        );
    }
}

fn norm(dtype: DType) -> BatchNorm {
    let buffer = |v: f64| {
        Buffer::new(
            Tensor::full(v, 2, &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap(),
        )
    };
    BatchNorm {
        running_mean: buffer(0.0),
        running_var: buffer(1.0),
        momentum: 0.1,
        epsilon: 1e-5,
        activation: Activation::None,
    }
}

#[test]
fn batch_norm_normalises_and_keeps_unbiased_statistics() {
    // A mean far larger than the deviation: a naive sum of squares in f32 would lose it all.
    let x = ((random(&[4, 2, 8, 8], 1) * 0.01).unwrap() + 100.0).unwrap();
    let x = x.to_dtype(DType::F32).unwrap();
    let (one, zero) = (
        Tensor::ones(2, DType::F32, &Device::Cpu),
        Tensor::zeros(2, DType::F32, &Device::Cpu),
    );
    let norm = norm(DType::F32);
    let y = batch_norm(&x, &one.unwrap(), &zero.unwrap(), &norm, Mode::Train).unwrap();
    let wide = y.to_dtype(DType::F64).unwrap();
    assert!(wide.mean_all().unwrap().to_scalar::<f64>().unwrap().abs() < 1e-4);
    let values = x
        .to_dtype(DType::F64)
        .unwrap()
        .transpose(0, 1)
        .unwrap()
        .contiguous()
        .unwrap();
    let values = values.reshape((2, 256)).unwrap();
    let mean = values.mean(1).unwrap();
    let var = values.var(1).unwrap();
    assert_close!(norm.running_mean.get(), (mean * 0.1).unwrap(), rtol = 1e-6);
    assert_close!(
        norm.running_var.get(),
        ((var * 0.1).unwrap() + 0.9).unwrap(),
        rtol = 1e-6
    );
    let power = (wide.sqr().unwrap().mean_all().unwrap())
        .to_scalar::<f64>()
        .unwrap();
    assert!((power - 1e-4 / (1e-4 + 1e-5)).abs() < 0.02, "{power}");
}

/// `γ·(x − running mean)/√(running variance + ε) + β`, as PyTorch computes it in evaluation: plain
/// and blocked maps, alone and after a convolution. A single value a channel will do.
#[test]
fn frozen_batch_norm_takes_the_running_statistics_and_leaves_them() {
    let options = Conv::default();
    let (gamma, beta) = (random(&[16], 2), random(&[16], 3));
    let mean = random(&[16], 4);
    let var = (random(&[16], 5).sqr().unwrap() + 0.1).unwrap();
    let weight = random(&[16, 16, 1, 1], 6);
    let channel = |t: &Tensor| t.reshape((1, 16, 1, 1)).unwrap();
    let formula = |x: &Tensor| {
        let x = x.broadcast_sub(&channel(&mean)).unwrap();
        let deviation = (&var + 1e-5).unwrap().sqrt().unwrap();
        let x = x.broadcast_div(&channel(&deviation)).unwrap();
        let x = x.broadcast_mul(&channel(&gamma)).unwrap();
        x.broadcast_add(&channel(&beta)).unwrap()
    };
    let norm = BatchNorm {
        running_mean: Buffer::new(mean.clone()),
        running_var: Buffer::new(var.clone()),
        ..norm(DType::F64)
    };
    for shape in [[3, 16, 4, 5], [1, 16, 1, 1]] {
        let x = random(&shape, 1);
        let y = batch_norm(&x, &gamma, &beta, &norm, Mode::Frozen).unwrap();
        assert_close!(y, formula(&x), rtol = 1e-12, atol = 1e-12);
        let x = block(&x).unwrap();
        let y = batch_norm(&x, &gamma, &beta, &norm, Mode::Frozen).unwrap();
        let known = formula(&unblock(&x).unwrap());
        assert_close!(unblock(&y).unwrap(), known, rtol = 1e-12, atol = 1e-12);
        let convolved = conv2d(&x, &weight, None, options).unwrap();
        let y = conv_norm(&x, &weight, options, (&gamma, &beta), &norm, Mode::Frozen).unwrap();
        let known = formula(&unblock(&convolved).unwrap());
        assert_close!(unblock(&y).unwrap(), known, rtol = 1e-12, atol = 1e-12);
    }
    assert_close!(norm.running_mean.get(), mean, atol = 0.0);
    assert_close!(norm.running_var.get(), var, atol = 0.0);
}

/// Output and gradients of the pass that it repeats, bit for bit; statistics stay.
#[test]
fn a_replayed_pass_is_that_of_training_without_its_update() {
    let x = Var::from_tensor(&random(&[3, 2, 4, 4], 1)).unwrap();
    let maps = Var::from_tensor(&block(&random(&[3, 16, 4, 4], 2)).unwrap()).unwrap();
    let weight = random(&[16, 16, 3, 3], 3);
    let options = Conv::new(1, 1);
    let ones = |n| Tensor::ones(n, DType::F64, &Device::Cpu).unwrap();
    let wide = |start: f64| Buffer::new((ones(16) * start).unwrap());
    let run = |mode| {
        let plain = norm(DType::F64);
        let fused = BatchNorm {
            running_mean: wide(0.0),
            running_var: wide(1.0),
            ..norm(DType::F64)
        };
        let y = batch_norm(&x, &ones(2), &ones(2), &plain, mode).unwrap();
        let affine = (&ones(16), &ones(16));
        let z = conv_norm(&maps, &weight, options, affine, &fused, mode).unwrap();
        let loss = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let values = [
            y.clone(),
            z.clone(),
            loss(&y).remove(&x).unwrap(),
            loss(&z).remove(&maps).unwrap(),
        ];
        let statistics = [plain, fused].map(|norm| (norm.running_mean, norm.running_var));
        (values, statistics)
    };
    let (known, moved) = run(Mode::Train);
    let (found, kept) = run(Mode::Replay);
    for (found, known) in found.iter().zip(&known) {
        assert_close!(found, known, atol = 0.0);
    }
    for (mean, var) in kept {
        let n = mean.get().elem_count();
        assert_close!(mean.get(), vec![0.0; n], atol = 0.0);
        assert_close!(var.get(), vec![1.0; n], atol = 0.0);
    }
    for (mean, _) in moved {
        let off = mean.get().abs().unwrap().min_all().unwrap();
        assert!(off.to_scalar::<f64>().unwrap() > 0.0);
    }
}

#[test]
fn batch_norm_of_blocked_maps_is_that_of_plain_ones() {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        // A large mean, so that careless sums would show.
        let x = randn(&[3, 32, 5, 7], 1, dtype).unwrap();
        let x = x.affine(0.5, 40.0).unwrap();
        let (gamma, beta) = (
            randn(&[32], 2, dtype).unwrap(),
            randn(&[32], 3, dtype).unwrap(),
        );
        let run = |blocked: bool| {
            let full = |v: f64| Tensor::full(v, 32, &Device::Cpu).unwrap();
            let buffer = |v| Buffer::new(full(v).to_dtype(dtype).unwrap());
            let norm = BatchNorm {
                running_mean: buffer(0.0),
                running_var: buffer(1.0),
                activation: Activation::Relu,
                ..norm(dtype)
            };
            let y = if blocked {
                let y = batch_norm(&block(&x).unwrap(), &gamma, &beta, &norm, Mode::Train);
                unblock(&y.unwrap()).unwrap()
            } else {
                batch_norm(&x, &gamma, &beta, &norm, Mode::Train).unwrap()
            };
            (y, norm.running_mean.get(), norm.running_var.get())
        };
        let (known, found) = (run(false), run(true));
        assert_close!(found.0, known.0, atol = tolerance);
        assert_close!(found.1, known.1, atol = tolerance);
        assert_close!(found.2, known.2, atol = tolerance);
    }
}

#[test]
fn blocks_of_channels_lie_beside_each_other() {
    let x = Tensor::arange(0f32, 2.0 * 32.0 * 6.0, &Device::Cpu).unwrap();
    let x = x.reshape((2, 32, 2, 3)).unwrap();
    let y = block(&x).unwrap();
    assert_eq!(y.dims(), [2, 2, 2, 3, 16]);
    let at = |i: [usize; 5]| {
        let y = i.iter().fold(y.clone(), |y, &i| y.get(i).unwrap());
        y.to_scalar::<f32>().unwrap()
    };
    // Image 1, channel 16 + 3, row 1, column 2.
    assert_eq!(at([1, 1, 1, 2, 3]), ((32 + 19) * 6 + 5) as f32);
    assert_close!(unblock(&y).unwrap(), x, atol = 0.0);
    let message = block(&x.narrow(1, 0, 20).unwrap()).unwrap_err().to_string();
    assert!(message.contains("20 channels"), "{message}");
    assert!(unblock(&x).is_err());
}

#[test]
fn pooling_of_a_known_image() {
    let x = Tensor::arange(0f64, 16.0, &Device::Cpu)
        .unwrap()
        .reshape((1, 1, 4, 4))
        .unwrap();
    let window = Window {
        kernel: 3,
        stride: 2,
        padding: 1,
    };
    let flat = |t: Tensor| t.flatten_all().unwrap();
    assert_close!(
        flat(max_pool2d(&x, window).unwrap()),
        [5.0, 7.0, 13.0, 15.0],
        atol = 0.0
    );
    let ninths = [10.0, 24.0, 51.0, 90.0].map(|v: f64| v / 9.0);
    assert_close!(flat(avg_pool2d(&x, window).unwrap()), ninths, atol = 1e-12);
    assert_close!(flat(global_avg_pool(&x).unwrap()), [7.5], atol = 1e-12);
}

#[test]
fn nan_is_not_swallowed() {
    let x = Tensor::new(&[[[[1.0, f64::NAN], [3.0, 4.0]]]], &Device::Cpu).unwrap();
    let window = Window {
        kernel: 2,
        stride: 2,
        padding: 0,
    };
    let clipped = [relu(&x).unwrap(), relu6(&x).unwrap()];
    for y in clipped.into_iter().chain([max_pool2d(&x, window).unwrap()]) {
        let values = y.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert!(values.iter().any(|v| v.is_nan()));
    }
}

#[test]
fn cross_entropy_of_known_logits() {
    let logits = Tensor::new(&[[0.0, 0.0], [1000.0, 0.0]], &Device::Cpu).unwrap();
    let ln2 = std::f64::consts::LN_2;
    assert_close!(
        cross_entropy(&logits, &[0, 0], 0.0).unwrap(),
        ln2 / 2.0,
        rtol = 1e-12
    );
    // Smoothing 0.2: the sure answer pays 0.1·1000 for the other class.
    let expected = (ln2 + 100.0) / 2.0;
    assert_close!(
        cross_entropy(&logits, &[0, 0], 0.2).unwrap(),
        expected,
        rtol = 1e-12
    );
}

/// Three steps by hand of PyTorch's rule, weights decayed and biases not.
#[test]
fn sgd_follows_the_rule() {
    for nesterov in [false, true] {
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        let weight = vars
            .root()
            .parameter("w", &[1, 1], Init::Constant(1.0))
            .unwrap();
        let bias = vars
            .root()
            .parameter("b", &[1], Init::Constant(1.0))
            .unwrap();
        let config = SgdConfig {
            momentum: 0.9,
            nesterov,
            weight_decay: 0.1,
            decay: Decay::WeightsOnly,
        };
        let mut sgd = Sgd::new(&vars, config).unwrap();
        let mut expected = [(1.0, 0.0, 0.1), (1.0, 0.0, 0.0)];
        for _ in 0..3 {
            // L = w² + b², so the gradients are 2w and 2b.
            let loss = (weight.sqr().unwrap().sum_all().unwrap()
                + bias.sqr().unwrap().sum_all().unwrap())
            .unwrap();
            sgd.step(&loss.backward().unwrap(), 0.05).unwrap();
            for (p, v, decay) in &mut expected {
                let g = 2.0 * *p + *decay * *p;
                *v = 0.9 * *v + g;
                *p -= 0.05 * if nesterov { g + 0.9 * *v } else { *v };
            }
        }
        assert_close!(weight.flatten_all().unwrap(), [expected[0].0], rtol = 1e-13);
        assert_close!(bias, [expected[1].0], rtol = 1e-13);
        assert_eq!(
            sgd.state().unwrap().into_keys().collect::<Vec<_>>(),
            ["b.momentum_buffer", "w.momentum_buffer"]
        );
    }
}

fn mask_key(step: u64) -> MaskKey {
    MaskKey {
        seed: 5,
        layer: 9,
        step,
    }
}

/// Values of any type with these ones dropped are 0, the others are doubled; half of them go.
#[test]
fn dropout_drops_its_share_and_keeps_the_mean() {
    let ones = Tensor::ones((40, 1001), DType::F32, &Device::Cpu).unwrap();
    let masked = |p: f64, step: u64| {
        let y = dropout(&ones, p, mask_key(step), Mode::Train).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for p in [0.1, 0.5, 0.9] {
        let y = masked(p, 1);
        let n = y.len() as f64;
        let kept = y.iter().filter(|&&v| v != 0.0).count() as f64;
        // Five deviations of a binomial count.
        assert!((kept - n * (1.0 - p)).abs() < 5.0 * (n * p * (1.0 - p)).sqrt());
        let scale = (1.0 / (1.0 - p)) as f32;
        assert!(y.iter().all(|&v| v == 0.0 || v == scale));
    }
    // Neighbouring steps share no more than chance has it.
    let both = masked(0.5, 1).into_iter().zip(masked(0.5, 2));
    let same = both.filter(|(a, b)| a == b).count() as f64 / 40040.0;
    assert!((same - 0.5).abs() < 0.0125, "{same}");
    let wide = ones.to_dtype(DType::F64).unwrap();
    let wide = dropout(&wide, 0.5, mask_key(1), Mode::Train).unwrap();
    assert_close!(wide.flatten_all().unwrap(), masked(0.5, 1), atol = 0.0);
}

#[test]
fn dropout_is_the_identity_in_evaluation() {
    let x = random(&[2, 3], 1);
    let y = dropout(&x, 0.7, mask_key(1), Mode::Eval).unwrap();
    assert_close!(y, x, atol = 0.0);
    let y = dropout(&x, 0.0, mask_key(1), Mode::Train).unwrap();
    assert_close!(y, x, atol = 0.0);
}

/// Layers of one network have masks of their own, which the step changes and a resumed run repeats.
#[test]
fn dropout_layers_follow_seed_name_and_step() {
    let x = Tensor::ones((4, 64), DType::F32, &Device::Cpu).unwrap();
    let masks = |seed: u64, step: u64| {
        let mut vars = Vars::new(seed, DType::F32, &Device::Cpu);
        let layers = ["a", "b"].map(|name| Dropout::new(vars.root().sub(name), 0.5).unwrap());
        vars.set_step(step);
        layers.map(|layer| {
            let y = layer.forward(&x, Mode::Train).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
    };
    let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
    Dropout::new(vars.root().sub("a"), 0.5).unwrap();
    assert!(Dropout::new(vars.root().sub("a"), 0.5).is_err());
    let first = masks(1, 0);
    assert_eq!(first, masks(1, 0));
    assert_ne!(first[0], first[1]);
    assert_ne!(first, masks(1, 1));
    assert_ne!(first, masks(2, 0));

    let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
    let layer = Dropout::new(vars.root().sub("drop"), 0.5).unwrap();
    let message = layer.forward(&x, Mode::Train).unwrap_err().to_string();
    assert!(message.contains("set_step"), "{message}");
    layer.forward(&x, Mode::Eval).unwrap();
}

#[test]
fn channel_dropout_drops_whole_channels_and_has_their_gradient() {
    let x = random(&[6, 50, 3, 2], 1);
    let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
    let layer = ChannelDropout::new(vars.root().sub("drop")).unwrap();
    assert!(ChannelDropout::new(vars.root().sub("drop")).is_err());
    let message = layer.forward(&x, 0.3, Mode::Train).unwrap_err().to_string();
    assert!(message.contains("set_step"), "{message}");
    vars.set_step(0);
    let var = Var::from_tensor(&x).unwrap();
    let y = layer.forward(&var, 0.3, Mode::Train).unwrap();
    let dx = y
        .sum_all()
        .unwrap()
        .backward()
        .unwrap()
        .remove(&var)
        .unwrap();
    assert_close!(y, (dx.clone() * &x).unwrap(), rtol = 1e-15);
    let channels = dx.reshape((300, 6)).unwrap().to_vec2::<f64>().unwrap();
    let scale = 1.0 / (1.0 - 0.3);
    for channel in &channels {
        assert!([0.0, scale].contains(&channel[0]), "{channel:?}");
        assert!(channel.iter().all(|&v| v == channel[0]), "{channel:?}");
    }
    let kept = channels.iter().filter(|channel| channel[0] > 0.0).count();
    assert!((170..250).contains(&kept), "{kept}");

    let all = layer.forward(&x, 1.0, Mode::Train).unwrap();
    assert_close!(all, x.zeros_like().unwrap(), atol = 0.0);
    assert_close!(layer.forward(&x, 0.3, Mode::Eval).unwrap(), x, atol = 0.0);
    assert!(layer.forward(&x, 1.5, Mode::Train).is_err());
    let flat = Tensor::ones(3, DType::F64, &Device::Cpu).unwrap();
    assert!(layer.forward(&flat, 0.3, Mode::Train).is_err());
}

#[test]
fn a_drawn_buffer_follows_seed_and_name_and_is_no_parameter() {
    let draw = |seed: u64, name: &str| {
        let mut vars = Vars::new(seed, DType::F32, &Device::Cpu);
        let buffer = vars.root().drawn_buffer(name, &[64], Init::Signs).unwrap();
        assert!(vars.root().drawn_buffer(name, &[64], Init::Signs).is_err());
        assert_eq!((vars.parameters().count(), vars.buffers().count()), (0, 1));
        buffer.get().to_vec1::<f32>().unwrap()
    };
    assert_eq!(draw(1, "a"), draw(1, "a"));
    assert_ne!(draw(1, "a"), draw(2, "a"));
    assert_ne!(draw(1, "a"), draw(1, "b"));
}

#[test]
fn random_and_windowed_ops_do_not_depend_on_threads() {
    let x = random(&[5, 7, 31, 37], 1).to_dtype(DType::F32).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let x = Var::from_tensor(&x).unwrap();
            let window = Pool {
                ceil_mode: true,
                ..Pool::new((3, 2))
            };
            let y = dropout(&x, 0.3, mask_key(1), Mode::Train).unwrap();
            let y = local_response_norm(&y, LocalResponseNorm::new(5)).unwrap();
            let y = avg_pool2d(&max_pool2d(&y, window).unwrap(), window).unwrap();
            let loss = y.sqr().unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().remove(&x).unwrap();
            let values = dx.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    let first = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(first, run(threads));
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let (x, w) = (random(&[19, 3, 10, 10], 1), random(&[4, 3, 3, 3], 2));
    let (x, w) = (
        x.to_dtype(DType::F32).unwrap(),
        w.to_dtype(DType::F32).unwrap(),
    );
    let one = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let w = Var::from_tensor(&w).unwrap();
            let y = conv2d(&x, &w, None, Conv::new(1, 1)).unwrap();
            let buffers = || Buffer::new(one.clone());
            let norm = BatchNorm {
                running_mean: buffers(),
                running_var: buffers(),
                momentum: 0.1,
                epsilon: 1e-5,
                activation: Activation::Relu,
            };
            let y = batch_norm(&y, &one, &one, &norm, Mode::Train).unwrap();
            let head = w
                .as_tensor()
                .flatten_all()
                .unwrap()
                .narrow(0, 0, 12)
                .unwrap();
            let bias = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
            let y = linear(
                &global_avg_pool(&y).unwrap(),
                &head.reshape((3, 4)).unwrap(),
                &bias,
            );
            let loss = cross_entropy(&y.unwrap(), &[1; 19], 0.0).unwrap();
            let gradient = loss.backward().unwrap().get(w.as_tensor()).unwrap().clone();
            gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
    };
    let first: Vec<u32> = run(1).into_iter().map(f32::to_bits).collect();
    for threads in [2, 3, 5] {
        assert_eq!(
            first,
            run(threads)
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn blocked_ops_do_not_depend_on_threads() {
    // Small maps, and more than go through Winograd's convolution at a time.
    for shape in [[5, 16, 9, 9], [3, 16, 41, 34]] {
        blocked_ops_on_threads(&randn(&shape, 1, DType::F32).unwrap());
    }
}

fn blocked_ops_on_threads(x: &Tensor) {
    let w = randn(&[48, 16, 3, 3], 2, DType::F32).unwrap();
    let alone = randn(&[48, 1, 3, 3], 3, DType::F32).unwrap();
    let wide = randn(&[256, 48, 1, 1], 4, DType::F32).unwrap();
    let half = randn(&[32, 256, 3, 3], 5, DType::F32).unwrap();
    let depthwise = Conv {
        groups: 48,
        ..Conv::new(1, 1)
    };
    let one = Tensor::ones(48, DType::F32, &Device::Cpu).unwrap();
    let options = Conv::new(1, 1);
    let window = Window {
        kernel: 3,
        stride: 2,
        padding: 1,
    };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let [x, w, alone, wide, half] =
                [x, &w, &alone, &wide, &half].map(|t| Var::from_tensor(t).unwrap());
            let buffer = || Buffer::new(one.clone());
            let norm = BatchNorm {
                running_mean: buffer(),
                running_var: buffer(),
                activation: Activation::Relu,
                ..norm(DType::F32)
            };
            let y = block(&x).unwrap();
            let y = conv_norm(&y, &w, options, (&one, &one), &norm, Mode::Train).unwrap();
            let y = conv2d(&y, &alone, None, depthwise).unwrap();
            let y = unblock(&max_pool2d(&y, window).unwrap()).unwrap();
            // Plain maps depthwise, into blocks, and with another stride.
            let y = conv2d(&y, &alone, None, depthwise).unwrap();
            let y = conv2d(&block(&y).unwrap(), &wide, None, Conv::new(1, 0)).unwrap();
            let y = conv2d(&y, &half, None, Conv::new(2, 1)).unwrap();
            let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let bits = |t: &Tensor| -> Vec<u32> {
                let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect()
            };
            let gradient = |v: &Var| bits(gradients.get(v.as_tensor()).unwrap());
            [
                bits(&y),
                gradient(&x),
                gradient(&w),
                gradient(&alone),
                gradient(&wide),
                gradient(&half),
            ]
        })
    };
    let first = run(1);
    for threads in [2, 3, 5] {
        assert!(first == run(threads), "{threads} threads");
    }
}

#[test]
fn mistakes_are_named() {
    let told = |result: isqrt_nn::Result<Tensor>| result.unwrap_err().to_string();
    let x = random(&[2, 3, 4, 4], 1);
    let w = |shape: &[usize]| random(shape, 2);
    let message = told(conv2d(&x, &w(&[2, 4, 3, 3]), None, Conv::default()));
    assert!(
        message.contains("[2, 4, 3, 3]") && message.contains("[2, 3, 4, 4]"),
        "{message}"
    );
    assert!(told(conv2d(&x, &w(&[2, 3, 5, 5]), None, Conv::default())).contains("does not fit"));
    assert!(told(conv2d(&x, &w(&[2, 3, 1, 1]), None, Conv::new(0, 0))).contains("stride"));
    assert!(
        told(conv2d(
            &w(&[2, 2]),
            &w(&[2, 3, 1, 1]),
            None,
            Conv::default()
        ))
        .contains("height")
    );
    for (options, word) in [
        (
            Conv {
                groups: 0,
                ..Conv::default()
            },
            "groups",
        ),
        (
            Conv {
                dilation: (1, 0),
                ..Conv::default()
            },
            "dilation",
        ),
        (
            Conv {
                groups: 2,
                ..Conv::default()
            },
            "2 group(s) does not fit",
        ),
        (
            Conv {
                dilation: (5, 5),
                ..Conv::default()
            },
            "does not fit",
        ),
        (Conv::new(1, usize::MAX), "does not fit"),
        (Conv::new(1, 1 << 40), "does not fit"),
    ] {
        let message = told(conv2d(&x, &w(&[2, 3, 2, 2]), None, options));
        assert!(message.contains(word), "{message}");
    }
    // A stride beyond the image leaves one output.
    let far = conv2d(&x, &w(&[2, 3, 2, 2]), None, Conv::new(usize::MAX, 1)).unwrap();
    assert_eq!(far.dims(), [2, 2, 1, 1]);
    let far = max_pool2d(
        &x,
        Window {
            kernel: 2,
            stride: usize::MAX,
            padding: 0,
        },
    );
    assert_eq!(far.unwrap().dims()[2..], [1, 1]);
    let beyond = Pool {
        padding: (0, 1 << 39),
        stride: (1, 1),
        ..Pool::new((1, 1 << 40))
    };
    assert!(max_pool2d(&x, beyond).is_ok());
    let maps = block(&random(&[1, 16, 4, 4], 3)).unwrap();
    let message = told(conv2d(&maps, &w(&[20, 16, 3, 3]), None, Conv::new(1, 1)));
    assert!(message.contains("20 output channels"), "{message}");
    let bias = w(&[3]);
    assert!(told(conv2d(&x, &w(&[2, 3, 1, 1]), Some(&bias), Conv::default())).contains("bias"));
    let window = Window {
        kernel: 2,
        stride: 2,
        padding: 2,
    };
    assert!(told(max_pool2d(&x, window)).contains("padding"));
    assert!(
        told(avg_pool2d(
            &x,
            Window {
                kernel: 9,
                stride: 1,
                padding: 0
            }
        ))
        .contains("window of 9")
    );
    assert!(told(linear(&w(&[2, 3]), &w(&[4, 2]), &w(&[4]))).contains("linear"));
    assert!(told(cross_entropy(&w(&[2, 3]), &[0, 3], 0.0)).contains("label 3"));
    assert!(told(cross_entropy(&w(&[2, 3]), &[0], 0.0)).contains("1 labels"));
    assert!(told(cross_entropy(&w(&[1, 3]), &[0], 1.5)).contains("smoothing"));
    let tall = Pool {
        padding: (0, 2),
        ..Pool::new((9, 3))
    };
    let message = told(max_pool2d(&x, tall));
    assert!(
        message.contains("window of 9") && message.contains("max_pool2d"),
        "{message}"
    );
    let wide = Pool {
        padding: (0, 2),
        ..Pool::new((2, 3))
    };
    assert!(told(avg_pool2d(&x, wide)).contains("padding = 2"));
    let still = Pool {
        stride: (1, 0),
        ..Pool::new((2, 2))
    };
    assert!(told(max_pool2d(&x, still)).contains("stride = 0"));
    for p in [-0.1, 1.0, f64::NAN] {
        assert!(told(dropout(&x, p, mask_key(0), Mode::Eval)).contains("dropout p"));
    }
    let lrn = LocalResponseNorm::new(5);
    for (norm, expected) in [
        (LocalResponseNorm::new(0), "size = 0"),
        (LocalResponseNorm { alpha: -1.0, ..lrn }, "alpha = -1"),
        (
            LocalResponseNorm {
                beta: f64::NAN,
                ..lrn
            },
            "beta = NaN",
        ),
        (LocalResponseNorm { k: 0.0, ..lrn }, "k = 0"),
    ] {
        let message = told(local_response_norm(&x, norm));
        assert!(message.contains(expected), "{message}");
    }
    assert!(told(local_response_norm(&w(&[2, 3]), lrn)).contains("[2, 3]"));
    let half = x.to_dtype(DType::F16).unwrap();
    assert!(told(relu(&half)).contains("f32 or f64"));
    let single = random(&[1, 2, 1, 1], 1);
    let one = Tensor::ones(2, DType::F64, &Device::Cpu).unwrap();
    let message = told(batch_norm(
        &single,
        &one,
        &one,
        &norm(DType::F64),
        Mode::Train,
    ));
    assert!(message.contains("more than one value"), "{message}");
}

#[test]
fn a_convolution_between_layouts_is_that_of_plain_maps() {
    for ((inputs, outputs), kernel, stride) in [
        ((12, 16), 1, 1),
        ((12, 16), 3, 2),
        ((16, 12), 1, 1),
        ((16, 12), 3, 1),
        ((24, 20), 3, 2),
        ((4, 16), 3, 1),
    ] {
        for mode in [Mode::Train, Mode::Eval] {
            let mut vars = Vars::new(3, DType::F64, &Device::Cpu);
            let (names, channels) = (("conv", "bn"), (inputs, outputs));
            let scope = &mut vars.root();
            let conv = ConvNorm::new(scope, names, channels, kernel, stride, Activation::Relu6);
            let conv = conv.unwrap();
            // So that some values are above 6.
            for (_, scale) in vars.parameters().filter(|(name, _)| *name == "bn.weight") {
                scale.set(&(scale.as_tensor() * 5.0).unwrap()).unwrap();
            }
            let x = Var::from_tensor(&random(&[3, inputs, 5, 7], 1)).unwrap();
            let run = |blocked: bool| {
                let mut maps = x.as_tensor().clone();
                if blocked && can_block(inputs, &maps) {
                    maps = block(&maps).unwrap();
                }
                let mut y = match blocked {
                    true => conv.forward_in_any_layout(&maps, mode).unwrap(),
                    false => conv.forward(&maps, mode).unwrap(),
                };
                assert_eq!(is_blocked(&y), blocked && can_block(outputs, &y));
                if is_blocked(&y) {
                    y = unblock(&y).unwrap();
                }
                let loss = (&y * random(y.dims(), 2)).unwrap().sum_all().unwrap();
                let gradients = vars.backward(&loss).unwrap();
                let parameters = vars.parameters().map(|(_, var)| var).chain([&x]);
                let gradient = |var: &Var| gradients.get(var).unwrap().clone();
                let mut all: Vec<Tensor> = parameters.map(gradient).collect();
                all.push(y);
                all
            };
            let (known, found) = (run(false), run(true));
            for (found, known) in found.iter().zip(&known) {
                assert_close!(found, known, rtol = 1e-10, atol = 1e-10);
            }
        }
    }
}
