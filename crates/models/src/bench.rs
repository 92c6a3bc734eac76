//! Measurements of networks and of the ops they are made of, as data; nothing is printed here.
//! Medians of interleaved repetitions.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::Kernel;
use isqrt_linalg::bench::peak_gflops;
use isqrt_nn::layers::BatchNorm2d;
use isqrt_nn::ops::{
    Activation, Conv, Window, add_relu, block, can_block, conv2d, cross_entropy, max_pool2d,
};
use isqrt_nn::{Decay, Init, Mode, Optimizer, Sgd, SgdConfig, Vars};

use crate::{ModelSpec, Network, Result};

/// A network and its input.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkCase {
    /// The network.
    pub model: ModelSpec,
    /// Images at once.
    pub batch: usize,
    /// Side of the images.
    pub side: usize,
    /// Element type of the backbone's maps; parameters are f32.
    pub maps: DType,
}

/// Times of a network on a batch, in milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkTiming {
    /// Forward pass of a training step, with the loss.
    pub forward_ms: f64,
    /// Backward pass.
    pub backward_ms: f64,
    /// SGD with momentum and weight decay.
    pub update_ms: f64,
    /// The training step as a whole.
    pub step_ms: f64,
    /// Forward pass in evaluation.
    pub eval_ms: f64,
    /// Learnt values of the network.
    pub parameters: usize,
    /// Rate of the training step by the multiply-adds of the definition, those of the backward pass twice
    /// those of the forward pass; none where those of the pooling head are not known.
    pub gflops: Option<f64>,
}

/// Times training steps and evaluation of a network on random images on a device, in turn until
/// `budget` is over and at least three times after a warm-up.
///
/// # Errors
/// As [`Network::new`] and [`Network::forward`].
pub fn network(case: &NetworkCase, device: &Device, budget: Duration) -> Result<NetworkTiming> {
    let &NetworkCase { batch, side, .. } = case;
    let mut network = Network::new(&case.model, 1, DType::F32, device)?;
    network.compute_in(case.maps);
    let total = network.describe(side)?.total();
    let images = random("images", &[batch, 3, side, side], device)?;
    let labels: Vec<u32> = (0..batch)
        .map(|i| (i % case.model.classes.max(1)) as u32)
        .collect();
    let options = SgdConfig {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 1e-4,
        decay: Decay::All,
    };
    let mut sgd = Sgd::new(network.vars(), options)?;
    // Masks of dropout follow the step.
    let mut count = 0;
    let times = medians(budget, || {
        device.synchronize()?;
        network.vars().set_step(count);
        count += 1;
        let mut watch = Watch::start(device);
        let logits = network.forward(&images, Mode::Train)?;
        let loss = cross_entropy(&logits, &labels, 0.0)?;
        let forward = watch.lap()?;
        let gradients = network.vars().backward(&loss)?;
        let backward = watch.lap()?;
        // So small a rate that the weights stay what they are, however many steps.
        sgd.step(&gradients, 1e-6)?;
        let update = watch.lap()?;
        drop((logits, loss, gradients));
        let release = watch.lap()?;
        network.forward(&images, Mode::Eval)?;
        let eval = watch.lap()?;
        let step = forward + backward + update + release;
        Ok([forward, backward, update, step, eval])
    })?;
    let [forward_ms, backward_ms, update_ms, step_ms, eval_ms] = times;
    Ok(NetworkTiming {
        forward_ms,
        backward_ms,
        update_ms,
        step_ms,
        eval_ms,
        parameters: network.vars().parameter_count(),
        gflops: total
            .multiply_adds
            .map(|products| 6.0 * products as f64 * batch as f64 / step_ms / 1e6),
    })
}

/// Times of one op.
#[derive(Debug, Clone, PartialEq)]
pub struct OpTiming {
    /// Op, shapes.
    pub name: &'static str,
    /// Forward pass, ms.
    pub forward_ms: f64,
    /// Backward pass with all gradients, ms.
    pub backward_ms: f64,
    /// What the gradient of the input adds to `dw_ms`, ms; none where the op has no weight.
    pub dx_ms: Option<f64>,
    /// Backward pass for the weight alone, ms; likewise.
    pub dw_ms: Option<f64>,
    /// Rate of forward and full backward pass by the multiply-adds of the definition; none where
    /// memory is the limit.
    pub gflops: Option<f64>,
    /// `gflops` over the measured peak of as many threads.
    pub peak_share: Option<f64>,
}

/// A convolution: name, channels in and out, side of the input, kernel, stride.
type ConvCase = (&'static str, (usize, usize), usize, usize, usize);

const CONVOLUTIONS: [ConvCase; 8] = [
    ("conv 3x3 64 at 56x56", (64, 64), 56, 3, 1),
    ("conv 3x3 128 stride 2 at 56x56", (128, 128), 56, 3, 2),
    ("conv 3x3 256 at 14x14", (256, 256), 14, 3, 1),
    ("conv 3x3 512 at 7x7", (512, 512), 7, 3, 1),
    ("conv 1x1 256 to 64 at 56x56", (256, 64), 56, 1, 1),
    ("conv 1x1 64 to 256 at 56x56", (64, 256), 56, 1, 1),
    ("conv 1x1 512 to 2048 at 7x7", (512, 2048), 7, 1, 1),
    ("conv 7x7 stride 2, 3 to 64 at 224x224", (3, 64), 224, 7, 2),
];
/// Ops whose limit is the memory.
const OTHERS: u32 = 3;

/// Times the ops of a ResNet at its shapes through candle's tape, on the maps that it has there:
/// blocked ones past the stem's convolution. `budget` is shared among them.
///
/// # Errors
/// Those of the ops.
pub fn ops(batch: usize, device: &Device, budget: Duration) -> Result<Vec<OpTiming>> {
    let peak = match isqrt_device::gpu_of(device) {
        Some(gpu) => gpu.peak_f32() / 1e9,
        None => peak_gflops(Kernel::Auto)?,
    };
    let share = budget / (CONVOLUTIONS.len() as u32 + OTHERS);
    let mut rows = Vec::new();
    for (name, (inputs, outputs), side, kernel, stride) in CONVOLUTIONS {
        let options = Conv::new(stride, kernel / 2);
        let x = maps(batch, inputs, side, device)?;
        let weight = random("weight", &[outputs, inputs, kernel, kernel], device)?;
        let weight = Var::from_tensor(&weight)?;
        let fixed = x.as_detached_tensor();
        let [forward_ms, backward_ms, dx_ms, dw_ms] = medians(share, || {
            let (forward, backward) = pass(device, || conv2d(&x, &weight, None, options))?;
            let (_, dw) = pass(device, || conv2d(&fixed, &weight, None, options))?;
            Ok([forward, backward, backward - dw, dw])
        })?;
        let pixels = side.div_ceil(stride).pow(2);
        let products = batch * outputs * pixels * inputs * kernel * kernel;
        // Three products of this size: Y, dX, dW; two operations a multiply-add.
        let gflops = 6.0 * products as f64 / (forward_ms + backward_ms) / 1e6;
        rows.push(OpTiming {
            name,
            forward_ms,
            backward_ms,
            dx_ms: Some(dx_ms),
            dw_ms: Some(dw_ms),
            gflops: Some(gflops),
            peak_share: Some(gflops / peak),
        });
    }

    let x = maps(batch, 64, 112, device)?;
    let mut vars = Vars::new(1, DType::F32, device);
    let norm = BatchNorm2d::new(vars.root(), 64, Activation::Relu)?;
    let window = Window {
        kernel: 3,
        stride: 2,
        padding: 1,
    };
    let memory_bound = |name, [forward_ms, backward_ms]: [f64; 2]| OpTiming {
        name,
        forward_ms,
        backward_ms,
        dx_ms: None,
        dw_ms: None,
        gflops: None,
        peak_share: None,
    };
    let times = medians(share, || {
        Ok(pass(device, || norm.forward(&x, Mode::Train))?.into())
    })?;
    rows.push(memory_bound("batch norm and ReLU, 64 at 112x112", times));
    let times = medians(
        share,
        || Ok(pass(device, || max_pool2d(&x, window))?.into()),
    )?;
    rows.push(memory_bound("max-pool 3x3 stride 2, 64 at 112x112", times));
    let (x, shortcut) = (maps(batch, 256, 56, device)?, maps(batch, 256, 56, device)?);
    let times = medians(share, || {
        Ok(pass(device, || add_relu(&x, &shortcut))?.into())
    })?;
    rows.push(memory_bound("sum and ReLU, 256 at 56x56", times));
    Ok(rows)
}

/// Seconds of the forward and of the backward pass of an op.
fn pass(device: &Device, forward: impl Fn() -> isqrt_nn::Result<Tensor>) -> Result<(f64, f64)> {
    device.synchronize()?;
    let mut watch = Watch::start(device);
    let y = forward()?;
    let forward = watch.lap()?;
    let gradients = y.backward()?;
    let backward = watch.lap()?;
    drop(gradients);
    Ok((forward, backward))
}

/// Random maps as the ops of a ResNet meet them: blocked, if the channels fill blocks.
fn maps(batch: usize, channels: usize, side: usize, device: &Device) -> Result<Var> {
    let x = random("x", &[batch, channels, side, side], device)?;
    let blocked = can_block(channels, &x);
    Ok(Var::from_tensor(&if blocked { block(&x)? } else { x })?)
}

/// Standard normal values, the same for the same name.
fn random(name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    let mut vars = Vars::new(1, DType::F32, device);
    let tensor = vars.root().parameter(name, shape, Init::Normal(1.0))?;
    Ok(tensor.detach())
}

/// Seconds between calls, by when the device is done.
struct Watch<'a>(&'a Device, Instant);

impl<'a> Watch<'a> {
    fn start(device: &'a Device) -> Self {
        Self(device, Instant::now())
    }

    fn lap(&mut self) -> Result<f64> {
        self.0.synchronize()?;
        let now = Instant::now();
        let seconds = (now - self.1).as_secs_f64();
        self.1 = now;
        Ok(seconds)
    }
}

/// Runs `task`, which returns seconds, once to warm up, then until `budget` is over and at least
/// three times; the median of each of its times in milliseconds.
fn medians<const N: usize>(
    budget: Duration,
    mut task: impl FnMut() -> Result<[f64; N]>,
) -> Result<[f64; N]> {
    task()?;
    let mut rounds = Vec::new();
    let start = Instant::now();
    while rounds.len() < 3 || start.elapsed() < budget {
        rounds.push(task()?);
    }
    Ok(std::array::from_fn(|i| {
        let mut times: Vec<f64> = rounds.iter().map(|round| round[i] * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let (low, high) = (times[(times.len() - 1) / 2], times[times.len() / 2]);
        0.5 * (low + high)
    }))
}
