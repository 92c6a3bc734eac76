//! Values and gradients of PyTorch's own ops, optimisers and schedules (`tools/golden/nn.py`).
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_nn::golden;
use isqrt_nn::ops::{block, can_block, conv2d, unblock};
use isqrt_nn::{
    AdamW, AdamWConfig, Decay, Ema, Init, Optimizer, ParamGroup, Schedule, Sgd, SgdConfig, Vars,
    clip_grad_norm, clip_grad_value,
};
use isqrt_testkit::{Golden, assert_close};

fn file() -> Golden {
    Golden::load("tests/golden/nn").unwrap()
}

/// Compares every case of this op.
fn agrees(op: &str, cases: usize) {
    let golden = file();
    let prefix = format!("{op}.");
    let names: Vec<&str> = golden
        .names()
        .filter_map(|name| name.strip_suffix(".y").filter(|n| n.starts_with(&prefix)))
        .collect();
    assert_eq!(names.len(), cases, "{op}");
    for name in names {
        let layer = golden::op(name).unwrap();
        let tensor = |key: &str| &golden[format!("{name}.{key}").as_str()];
        let x = &golden[format!("input.{op}").as_str()];
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 3e-6)] {
            let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
            let y = layer(&x).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(y.dims(), tensor("y").dims(), "{name}");
            assert_close!(y, *tensor("y"), rtol = tolerance, atol = tolerance);
            let g = tensor("g").to_dtype(dtype).unwrap();
            let loss = (y * g).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().remove(&x).unwrap();
            assert_close!(dx, *tensor("dx"), rtol = tolerance, atol = tolerance);
        }
    }
}

#[test]
fn ops_agree_with_pytorch() {
    agrees("relu6", 1);
    agrees("channel_shuffle", 1);
    agrees("max_pool2d", 9);
    agrees("avg_pool2d", 18);
    agrees("adaptive_avg_pool2d", 5);
    agrees("local_response_norm", 5);
    agrees("cross_entropy", 3);
}

#[test]
fn conv2d_agrees_with_pytorch() {
    let golden = file();
    let names = golden.names().filter_map(|n| n.strip_suffix(".y"));
    let names: Vec<&str> = names.filter(|n| n.starts_with("conv2d.")).collect();
    assert_eq!(names.len(), 12);
    let (f64s, f32s) = ((DType::F64, 1e-12), (DType::F32, 1e-5));
    for (name, (dtype, tolerance)) in names.iter().flat_map(|&n| [(n, f64s), (n, f32s)]) {
        let options = golden::convolution(name).unwrap();
        let tensor = |key: &str| {
            let name = format!("{name}.{key}");
            golden
                .names()
                .any(|n| n == name)
                .then(|| golden[name.as_str()].to_dtype(dtype).unwrap())
        };
        let var = |key| tensor(key).map(|t| Var::from_tensor(&t).unwrap());
        let (x, w, b) = (var("x").unwrap(), var("w").unwrap(), var("b"));
        for blocked in [false, true] {
            let channels = (x.dims()[1], w.dims()[0]);
            if blocked && !(can_block(channels.0, &x) && can_block(channels.1, &x)) {
                continue;
            }
            let maps = if blocked {
                block(&x).unwrap()
            } else {
                x.as_tensor().clone()
            };
            let y = conv2d(&maps, &w, b.as_deref(), options).unwrap();
            let y = if blocked { unblock(&y).unwrap() } else { y };
            let close = |found: &Tensor, key: &str| {
                let known = tensor(key).unwrap();
                let scale = known
                    .abs()
                    .unwrap()
                    .max_all()
                    .unwrap()
                    .to_dtype(DType::F64)
                    .unwrap();
                let atol = tolerance * scale.to_scalar::<f64>().unwrap();
                assert_close!(found, &known, rtol = 0.0, atol = atol);
            };
            close(&y, "y");
            let loss = (&y * tensor("g").unwrap()).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            close(gradients.get(&x).unwrap(), "dx");
            close(gradients.get(&w).unwrap(), "dw");
            if let Some(b) = &b {
                close(gradients.get(b).unwrap(), "db");
            }
        }
    }
}

/// A network of a weight, a bias and a buffer, with the golden file's start.
struct Toy {
    vars: Vars,
    weight: Var,
    bias: Var,
}

impl Toy {
    fn new(golden: &Golden) -> Self {
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        let mut root = vars.root();
        root.parameter("weight", &[3, 2], Init::Constant(0.0))
            .unwrap();
        root.parameter("bias", &[2], Init::Constant(0.0)).unwrap();
        root.buffer("running_mean", &[2], 0.0).unwrap();
        let var = |name: &str| {
            let var = vars.parameters().find(|p| p.0 == name).unwrap().1.clone();
            var.set(&golden[format!("optimiser.{name}").as_str()])
                .unwrap();
            var
        };
        let (weight, bias) = (var("weight"), var("bias"));
        Self { vars, weight, bias }
    }

    /// The squared distance from the targets of this step.
    fn loss(&self, golden: &Golden, step: usize) -> candle_core::Result<Tensor> {
        let targets = golden["optimiser.targets"].get(step)?;
        let weight = (self.weight.as_tensor() - targets.get(0)?)?
            .sqr()?
            .sum_all()?;
        let bias = (self.bias.as_tensor() - targets.get(1)?.get(0)?)?
            .sqr()?
            .sum_all()?;
        weight + bias
    }
}

/// Groups, clipping, averages and state of each optimiser over five steps.
#[test]
fn optimisers_agree_with_pytorch() {
    let golden = file();
    let groups = [ParamGroup {
        lr_factor: 10.0,
        decay_factor: 0.5,
        ..ParamGroup::new("bia*")
    }];
    for name in ["sgd", "nesterov", "adamw"] {
        for clip in ["none", "norm", "value"] {
            let expected = |what: &str| &golden[format!("optimiser.{name}.{clip}.{what}").as_str()];
            let toy = Toy::new(&golden);
            let make = || -> Box<dyn Optimizer> {
                let sgd = SgdConfig {
                    momentum: 0.9,
                    nesterov: name == "nesterov",
                    weight_decay: 0.1,
                    decay: Decay::All,
                };
                let adamw = AdamWConfig {
                    betas: (0.8, 0.95),
                    epsilon: 1e-6,
                    weight_decay: 0.1,
                    decay: Decay::All,
                };
                match name {
                    "adamw" => Box::new(AdamW::with_groups(&toy.vars, adamw, &groups).unwrap()),
                    _ => Box::new(Sgd::with_groups(&toy.vars, sgd, &groups).unwrap()),
                }
            };
            let mut optimiser = make();
            let mut average = Ema::new(&toy.vars, 0.8).unwrap();
            for step in 0..5 {
                if step == 3 {
                    // Goes out and into another one, as in a resumed run.
                    let state = optimiser.state().unwrap();
                    optimiser = make();
                    optimiser.load_state(&state).unwrap();
                    let state = average.state().unwrap();
                    average = Ema::new(&toy.vars, 0.8).unwrap();
                    average.load_state(&state).unwrap();
                }
                let mut gradients = toy.loss(&golden, step).unwrap().backward().unwrap();
                match clip {
                    "norm" => {
                        let norm = clip_grad_norm(&toy.vars, &mut gradients, 1.5).unwrap();
                        assert_close!(norm, *expected(&format!("{step}.norm")), rtol = 1e-12);
                    }
                    "value" => clip_grad_value(&toy.vars, &mut gradients, 0.7).unwrap(),
                    _ => {}
                }
                optimiser.step(&gradients, 0.01).unwrap();
                let buffer = toy.vars.buffers().next().unwrap().1;
                buffer.set((buffer.get() + toy.bias.as_detached_tensor()).unwrap());
                average.update(&toy.vars).unwrap();
                for (key, var) in [("weight", &toy.weight), ("bias", &toy.bias)] {
                    let expected = expected(&format!("{step}.{key}"));
                    assert_close!(*var.as_tensor(), *expected, rtol = 1e-12, atol = 1e-14);
                }
            }
            for (key, value) in average.state().unwrap() {
                let expected = expected(&format!("ema.{key}"));
                assert_close!(value, *expected, rtol = 1e-12, atol = 1e-14);
            }
            let state = optimiser.state().unwrap();
            let parts = if name == "adamw" { 3 } else { 1 };
            assert_eq!(state.len(), 2 * parts);
            for (key, value) in state {
                if key.ends_with(".step") {
                    assert_eq!(value.to_scalar::<i64>().unwrap(), 5);
                } else {
                    let expected = expected(&format!("state.{key}"));
                    assert_close!(value, *expected, rtol = 1e-12, atol = 1e-14);
                }
            }
        }
    }
}

#[test]
fn schedules_agree_with_pytorch() {
    let golden = file();
    let shape = golden["schedule.shape"].to_vec1::<f64>().unwrap();
    let (steps, per_epoch) = (shape[0] as usize, shape[1] as usize);
    let check = |name: &str, schedule: Schedule| {
        schedule.check().unwrap();
        let factors: Vec<f64> = (0..steps)
            .map(|step| schedule.factor(step, steps, per_epoch))
            .collect();
        let expected = &golden[format!("schedule.{name}").as_str()];
        assert_close!(factors, *expected, rtol = 1e-12, atol = 1e-14);
    };
    for (warmup_epochs, suffix) in [(0.0, ""), (2.0, ".warm")] {
        let named = |name: &str| format!("{name}{suffix}");
        check(&named("constant"), Schedule::Constant { warmup_epochs });
        check(&named("cosine"), Schedule::Cosine { warmup_epochs });
        let power = 0.9;
        check(
            &named("polynomial"),
            Schedule::Polynomial {
                power,
                warmup_epochs,
            },
        );
    }
    let warmup_epochs = 0.0;
    check(
        "step",
        Schedule::Step {
            epochs: 3.0,
            factor: 0.2,
            warmup_epochs,
        },
    );
    check(
        "multi_step",
        Schedule::MultiStep {
            milestones: vec![3.0, 7.0],
            factor: 0.1,
            warmup_epochs,
        },
    );
    check(
        "logarithmic",
        Schedule::Logarithmic {
            from: -1.0,
            to: -4.0,
            warmup_epochs,
        },
    );
}

/// The largest value of the uniform and the deviation of the normal ones, over 147456 draws.
#[test]
fn initialisers_agree_with_pytorch() {
    let golden = file();
    let mut vars = Vars::new(7, DType::F64, &Device::Cpu);
    for (name, init) in [
        ("kaiming_fan_out", Init::KaimingFanOut),
        ("kaiming_fan_in", Init::KaimingFanIn),
        ("kaiming_uniform", Init::KaimingUniform),
        ("xavier_uniform", Init::XavierUniform),
        ("xavier_normal", Init::XavierNormal),
        ("uniform_fan_in", Init::UniformFanIn),
        ("normal", Init::Normal(0.02)),
    ] {
        let drawn = vars.root().parameter(name, &[256, 64, 3, 3], init).unwrap();
        let values = drawn.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let uniform = matches!(
            init,
            Init::KaimingUniform | Init::XavierUniform | Init::UniformFanIn
        );
        let (found, tolerance) = if uniform {
            (values.iter().fold(0.0f64, |m, v| m.max(v.abs())), 1e-4)
        } else {
            let squares: f64 = values.iter().map(|v| v * v).sum();
            ((squares / values.len() as f64).sqrt(), 0.01)
        };
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01 * found, "{name}: mean {mean}");
        let expected = &golden[format!("init.{name}").as_str()];
        assert_close!(found, *expected, rtol = tolerance);
    }
}
