//! The ops of networks, one by one, and the optimisers.

use candle_core::{DType, Device, Tensor, Var};
use isqrt_nn::ops::{
    Activation, BatchNorm, Conv, LocalResponseNorm, MaskKey, Pool, adaptive_avg_pool2d, add,
    add_relu, avg_pool2d, batch_norm, block, channel_shuffle, conv_norm, conv2d, cross_entropy,
    dropout, global_avg_pool, is_blocked, linear, local_response_norm, max_pool2d, relu, relu6,
    shuffle_unit, unblock,
};
use isqrt_nn::{
    AdamW, AdamWConfig, Buffer, Decay, Ema, Init, Mode, Optimizer, Sgd, SgdConfig, Vars,
    clip_grad_norm, clip_grad_value,
};
use isqrt_testkit::{Gradcheck, gradcheck};
use isqrt_train::counted;

use super::{Checks, Error, Findings, Outcome, distance, home, noise, place, within};

type Op = Box<dyn Fn(&[Tensor]) -> isqrt_nn::Result<Tensor>>;

/// Ops that take maps with the channels of a pixel beside each other too, as their first operand.
const BLOCKED: [&str; 7] = [
    "conv2d",
    "batch_norm",
    "conv_norm",
    "max_pool2d",
    "relu",
    "relu6",
    "shuffle_unit",
];

/// An op and what it is tried on.
struct Case {
    name: &'static str,
    operands: Vec<Tensor>,
    op: Op,
    /// Whether it has no kink near the operands.
    smooth: bool,
}

pub(super) fn check(checks: &mut Checks<'_, '_>) {
    let device = checks.device;
    let cases = match cases() {
        Ok(cases) => cases,
        Err(error) => return checks.failed("ops".to_owned(), &error),
    };
    let mut names: Vec<&str> = cases.iter().map(|case| case.name).collect();
    names.dedup();
    for name in names {
        let cases = cases.iter().filter(|case| case.name == name);
        checks.add(format!("{name}, gradient and beside the CPU"), || {
            tried(cases, device)
        });
    }
    for adamw in [false, true] {
        let name = if adamw { "AdamW" } else { "SGD" };
        checks.add(
            format!("{name}, averages and clipping, beside the CPU"),
            || optimiser(device, adamw),
        );
    }
}

/// Values 0.1 apart and 0.03 away from 0, mixed: no kink within a step.
fn apart(shape: &[usize]) -> candle_core::Result<Tensor> {
    let len: usize = shape.iter().product();
    // A step that has no divisor in common with the length visits each place once.
    let step = (0..).map(|k| len / 3 + 1 + k).find(|&step| {
        let (mut a, mut b) = (len, step);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    });
    let step = step.unwrap_or(1);
    let value = |i: usize| 0.1 * ((i * step % len) as f64 - (len / 2) as f64) + 0.03;
    Tensor::from_vec((0..len).map(value).collect::<Vec<_>>(), shape, &Device::Cpu)
}

/// Running statistics beside `x`.
fn norm_of(x: &Tensor, channels: usize, activation: Activation) -> isqrt_nn::Result<BatchNorm> {
    let near = |t: Tensor| place(&t, x.dtype(), x.device()).map(Buffer::new);
    Ok(BatchNorm {
        running_mean: near(noise(&[channels], 0.6)?)?,
        running_var: near((noise(&[channels], 0.2)?.abs()? + 0.5)?)?,
        momentum: 0.1,
        epsilon: 1e-5,
        activation,
    })
}

/// Modes and what follows.
fn norms() -> impl Iterator<Item = (Mode, Activation)> {
    let modes = [Mode::Train, Mode::Frozen, Mode::Eval];
    modes
        .into_iter()
        .flat_map(|mode| Activation::ALL.map(|activation| (mode, activation)))
}

/// The output, with the running statistics that it left in each value; where an activation follows alone, since no
/// gradient flows to them.
fn with_statistics(y: Tensor, norm: &BatchNorm) -> isqrt_nn::Result<Tensor> {
    if norm.activation == Activation::None {
        return Ok(y);
    }
    let both = [norm.running_mean.get(), norm.running_var.get()];
    let both = Tensor::stack(&both, 0)?.sum_all()?.detach();
    Ok(y.broadcast_add(&(both * 0.01)?)?)
}

fn cases() -> Result<Vec<Case>, Error> {
    let mut cases = vec![];
    let mut case = |name, operands: Vec<Tensor>, smooth, op: Op| {
        cases.push(Case {
            name,
            operands,
            op,
            smooth,
        });
    };
    for (x, w, options) in [
        ([2, 3, 6, 5], [4, 3, 3, 3], Conv::new(2, 1)),
        ([2, 4, 4, 4], [2, 4, 1, 1], Conv::new(1, 0)),
        (
            [1, 2, 7, 6],
            [2, 2, 3, 2],
            Conv {
                dilation: (2, 1),
                ..Conv::new(1, 2)
            },
        ),
        (
            [2, 4, 5, 5],
            [6, 2, 3, 3],
            Conv {
                groups: 2,
                ..Conv::new(1, 1)
            },
        ),
        (
            [2, 4, 5, 5],
            [4, 1, 3, 3],
            Conv {
                groups: 4,
                ..Conv::new(1, 1)
            },
        ),
    ] {
        let operands = vec![noise(&x, 0.1)?, noise(&w, 0.7)?, noise(&w[..1], 0.5)?];
        let op: Op = Box::new(move |t| conv2d(&t[0], &t[1], Some(&t[2]), options));
        case("conv2d", operands, true, op);
    }
    for (mode, activation) in norms() {
        let operands = vec![
            noise(&[3, 4, 3, 2], 0.9)?,
            // Some values are above 6.
            (noise(&[4], 0.8)? * 8.0)?,
            noise(&[4], 0.5)?,
        ];
        let op: Op = Box::new(move |t| {
            let norm = norm_of(&t[1], 4, activation)?;
            let y = batch_norm(&t[0], &t[1], &t[2], &norm, mode)?;
            with_statistics(y, &norm)
        });
        case("batch_norm", operands, activation == Activation::None, op);
    }
    for (mode, activation) in norms() {
        let operands = vec![
            noise(&[2, 3, 5, 4], 0.1)?,
            noise(&[4, 3, 3, 3], 0.7)?,
            noise(&[4], 0.8)?,
            noise(&[4], 0.5)?,
        ];
        let op: Op = Box::new(move |t| {
            let (norm, options) = (norm_of(&t[1], 4, activation)?, Conv::new(2, 1));
            let y = match is_blocked(&t[0]) {
                true => conv_norm(&t[0], &t[1], options, (&t[2], &t[3]), &norm, mode)?,
                false => {
                    let y = conv2d(&t[0], &t[1], None, options)?;
                    batch_norm(&y, &t[2], &t[3], &norm, mode)?
                }
            };
            with_statistics(y, &norm)
        });
        case("conv_norm", operands, activation == Activation::None, op);
    }
    let pool = Pool {
        kernel: (3, 2),
        stride: (2, 2),
        padding: (1, 0),
        ceil_mode: true,
        count_include_pad: false,
    };
    let maps = || apart(&[2, 4, 5, 6]);
    let one = |op: fn(&Tensor) -> isqrt_nn::Result<Tensor>| -> Op { Box::new(move |t| op(&t[0])) };
    case(
        "max_pool2d",
        vec![maps()?],
        true,
        Box::new(move |t| max_pool2d(&t[0], pool)),
    );
    case(
        "avg_pool2d",
        vec![maps()?],
        true,
        Box::new(move |t| avg_pool2d(&t[0], pool)),
    );
    let adaptive = one(|x| adaptive_avg_pool2d(x, (3, 4)));
    case("adaptive_avg_pool2d", vec![maps()?], true, adaptive);
    case("global_avg_pool", vec![maps()?], true, one(global_avg_pool));
    case("relu", vec![maps()?], true, one(relu));
    case("relu6", vec![maps()?], true, one(relu6));
    let two = |op: fn(&Tensor, &Tensor) -> isqrt_nn::Result<Tensor>| -> Op {
        Box::new(move |t| op(&t[0], &t[1]))
    };
    let pair = || -> Result<Vec<Tensor>, Error> { Ok(vec![maps()?, noise(&[2, 4, 5, 6], 0.3)?]) };
    // Plain maps alone: a second operand of a case stays as it is.
    let flat = |t: Vec<Tensor>| -> Result<Vec<Tensor>, Error> {
        Ok(t.iter()
            .map(Tensor::flatten_all)
            .collect::<Result<_, _>>()?)
    };
    case("add", flat(pair()?)?, true, two(add));
    case("add_relu", flat(pair()?)?, false, two(add_relu));
    case("channel_shuffle", pair()?, true, two(channel_shuffle));
    let unit = |x: &Tensor| shuffle_unit(x, |half| Ok(half.sqr()?));
    case("shuffle_unit", vec![maps()?], true, one(unit));
    let lrn = LocalResponseNorm {
        size: 3,
        alpha: 0.1,
        beta: 0.75,
        k: 1.0,
    };
    let op: Op = Box::new(move |t| local_response_norm(&t[0], lrn));
    case(
        "local_response_norm",
        vec![noise(&[2, 5, 3, 2], 0.4)?],
        true,
        op,
    );
    let operands = vec![
        noise(&[3, 7], 0.1)?,
        noise(&[5, 7], 0.2)?,
        noise(&[5], 0.5)?,
    ];
    case(
        "linear",
        operands,
        true,
        Box::new(|t| linear(&t[0], &t[1], &t[2])),
    );
    for smoothing in [0.0, 0.1] {
        let op: Op = Box::new(move |t| cross_entropy(&t[0], &[1, 0, 4], smoothing));
        case("cross_entropy", vec![noise(&[3, 5], 0.3)?], true, op);
    }
    let key = MaskKey {
        seed: 3,
        layer: 5,
        step: 7,
    };
    let op: Op = Box::new(move |t| dropout(&t[0], 0.3, key, Mode::Train));
    case("dropout", vec![maps()?], true, op);
    Ok(cases)
}

/// Output and gradients of all operands; with `last`, of maps with the channels of a pixel beside each other.
fn run(case: &Case, dtype: DType, device: &Device, last: bool) -> Result<Vec<Vec<f64>>, Error> {
    let mut vars = vec![];
    for operand in &case.operands {
        vars.push(Var::from_tensor(&place(operand, dtype, device)?)?);
    }
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = apply(case, &tensors, last)?;
    let weights = place(&noise(y.dims(), 0.3)?, dtype, device)?;
    let gradients = (&y * weights)?.sum_all()?.backward()?;
    let mut out = vec![home(&y)?];
    for var in &vars {
        out.push(home(gradients.get(var).ok_or("no gradient came out")?)?);
    }
    Ok(out)
}

fn apply(case: &Case, tensors: &[Tensor], last: bool) -> isqrt_nn::Result<Tensor> {
    let mut tensors = tensors.to_vec();
    if last {
        tensors[0] = block(&tensors[0])?;
    }
    let y = (case.op)(&tensors)?;
    if is_blocked(&y) { unblock(&y) } else { Ok(y) }
}

fn tried<'a>(cases: impl Iterator<Item = &'a Case>, device: &Device) -> Outcome {
    let (mut worst, mut gradients) = ([0.0_f64; 2], 0);
    for case in cases {
        let blocks = BLOCKED.contains(&case.name);
        for last in [false, true] {
            // On the CPU blocks are of 8 or 16 channels, and the tests have those.
            if last && !(blocks && device.is_cuda()) {
                continue;
            }
            if case.smooth {
                let mut operands = vec![];
                for operand in &case.operands {
                    operands.push(operand.to_device(device)?);
                }
                let of = |t: &[Tensor]| apply(case, t, last).map_err(candle_core::Error::from);
                gradcheck(of, &operands, Gradcheck::default())?;
                gradients += operands.len();
            }
            let known = run(case, DType::F64, &Device::Cpu, false)?;
            for (at, dtype) in [DType::F64, DType::F32].into_iter().enumerate() {
                let found = run(case, dtype, device, last)?;
                for (found, known) in found.iter().zip(&known) {
                    worst[at] = worst[at].max(distance(found, known));
                }
            }
        }
    }
    let findings = match gradients {
        0 => Findings::default(),
        n => {
            let gradients = counted(n, "gradient");
            Findings::told(format!("{gradients} within 1e-7 of differences"))
        }
    };
    Ok(findings.both("", worst, (1e-11, 2e-5)))
}

/// Weights, averages and state after three steps in f64.
fn optimiser(device: &Device, adamw: bool) -> Outcome {
    let train = |device: &Device| -> Result<Vec<Vec<f64>>, Error> {
        let mut vars = Vars::new(3, DType::F64, device);
        let mut root = vars.root();
        root.parameter("weight", &[5, 3, 2, 2], Init::Normal(1.0))?;
        root.parameter("bias", &[7], Init::Normal(1.0))?;
        let mut optimiser: Box<dyn Optimizer> = match adamw {
            true => Box::new(AdamW::new(&vars, AdamWConfig::default())?),
            false => Box::new(Sgd::new(
                &vars,
                SgdConfig {
                    momentum: 0.9,
                    nesterov: true,
                    weight_decay: 1e-2,
                    decay: Decay::All,
                },
            )?),
        };
        let mut average = Ema::new(&vars, 0.9)?;
        let mut out = vec![];
        for step in 0..3 {
            let mut loss = Tensor::zeros((), DType::F64, device)?;
            for (_, parameter) in vars.parameters() {
                let target = noise(parameter.dims(), 0.1 * f64::from(step))?;
                let off = (parameter.as_tensor() - target.to_device(device)?)?;
                loss = (loss + off.sqr()?.sum_all()?)?;
            }
            let mut gradients = vars.backward(&loss)?;
            clip_grad_value(&vars, &mut gradients, 1.5)?;
            out.push(vec![clip_grad_norm(&vars, &mut gradients, 2.0)?]);
            optimiser.step(&gradients, 0.1)?;
            average.update(&vars)?;
        }
        for (_, parameter) in vars.parameters() {
            out.push(home(parameter.as_tensor())?);
        }
        for state in [average.state()?, optimiser.state()?] {
            for value in state.values() {
                out.push(home(value)?);
            }
        }
        Ok(out)
    };
    let (found, known) = (train(device)?, train(&Device::Cpu)?);
    let apart = found.iter().zip(&known).map(|(a, b)| distance(a, b));
    Ok(within(apart.fold(0.0, f64::max), 1e-12))
}
