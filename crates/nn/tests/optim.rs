//! Optimisers and averages beyond PyTorch's numbers (`tests/golden.rs`): groups, state, threads,
//! and what they refuse.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use isqrt_nn::{
    AdamW, AdamWConfig, Decay, Ema, Init, Optimizer, ParamGroup, Schedule, Sgd, SgdConfig, Vars,
    clip_grad_norm, clip_grad_value, grad_norm, grad_squares,
};
use isqrt_testkit::{assert_close, randn};

const SGD: SgdConfig = SgdConfig {
    momentum: 0.9,
    nesterov: false,
    weight_decay: 0.0,
    decay: Decay::WeightsOnly,
};

/// Parameters of these names and 4x5 values each, all 1, and a buffer.
fn vars(names: &[&str], dtype: DType) -> Vars {
    let mut vars = Vars::new(3, dtype, &Device::Cpu);
    for name in names {
        let (scope, name) = name.split_once('.').unwrap();
        let mut root = vars.root();
        root.sub(scope)
            .parameter(name, &[4, 5], Init::Constant(1.0))
            .unwrap();
    }
    vars.root().buffer("running", &[3], 0.5).unwrap();
    vars
}

/// Gradients of random values for all parameters.
fn gradients(vars: &Vars, seed: u64) -> GradStore {
    let mut loss = Tensor::zeros((), vars.dtype(), &Device::Cpu).unwrap();
    for (i, (_, parameter)) in vars.parameters().enumerate() {
        let weights = randn(parameter.shape(), seed + i as u64, vars.dtype()).unwrap();
        let term = (parameter.as_tensor() * weights)
            .unwrap()
            .sum_all()
            .unwrap();
        loss = (loss + term).unwrap();
    }
    loss.backward().unwrap()
}

fn value(vars: &Vars, name: &str) -> Vec<f64> {
    let parameter = vars.parameters().find(|p| p.0 == name).unwrap().1;
    let flat = parameter
        .flatten_all()
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap();
    flat.to_vec1().unwrap()
}

#[test]
fn the_first_group_that_matches_has_a_parameter() {
    let vars = vars(&["body.w", "head.w", "head.v"], DType::F64);
    let group = |pattern: &str, lr_factor: f64| ParamGroup {
        lr_factor,
        ..ParamGroup::new(pattern)
    };
    let groups = [group("head.w", 0.0), group("head.*", 3.0)];
    let mut sgd = Sgd::with_groups(&vars, SGD, &groups).unwrap();
    let gradients = gradients(&vars, 1);
    sgd.step(&gradients, 0.1).unwrap();
    for (name, factor) in [("body.w", 1.0), ("head.w", 0.0), ("head.v", 3.0)] {
        let parameter = vars.parameters().find(|p| p.0 == name).unwrap().1;
        let gradient = gradients.get(parameter.as_tensor()).unwrap();
        let expected = gradient
            .flatten_all()
            .unwrap()
            .affine(-0.1 * factor, 1.0)
            .unwrap();
        assert_close!(value(&vars, name), expected, rtol = 1e-12, atol = 1e-15);
    }
}

#[test]
fn groups_in_toml_have_defaults() {
    let group: ParamGroup = toml::from_str("pattern = \"fc.*\"\nlr_factor = 10").unwrap();
    assert_eq!(
        group,
        ParamGroup {
            lr_factor: 10.0,
            ..ParamGroup::new("fc.*")
        }
    );
    let schedule: Schedule = toml::from_str("kind = \"constant\"").unwrap();
    assert_eq!(schedule, Schedule::Constant { warmup_epochs: 0.0 });
    assert!(toml::from_str::<Schedule>("kind = \"cosine\"\nwarmup = 1").is_err());
}

/// A state goes out and back in both types; neither side sees what the other does later.
#[test]
fn state_is_a_copy() {
    for dtype in [DType::F32, DType::F64] {
        let vars = vars(&["a.w"], dtype);
        let mut adamw = AdamW::new(&vars, AdamWConfig::default()).unwrap();
        adamw.step(&gradients(&vars, 1), 0.1).unwrap();
        let state = adamw.state().unwrap();
        let names: Vec<&str> = state.keys().map(String::as_str).collect();
        assert_eq!(names, ["a.w.exp_avg", "a.w.exp_avg_sq", "a.w.step"]);
        let before = state["a.w.exp_avg"]
            .flatten_all()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap();
        let before = before.to_vec1::<f64>().unwrap();
        let mut other = AdamW::new(&vars, AdamWConfig::default()).unwrap();
        other.load_state(&state).unwrap();
        other.step(&gradients(&vars, 2), 0.1).unwrap();
        adamw.step(&gradients(&vars, 3), 0.1).unwrap();
        assert_close!(
            state["a.w.exp_avg"].flatten_all().unwrap(),
            before,
            atol = 0.0
        );
        assert_eq!(state["a.w.step"].to_scalar::<i64>().unwrap(), 1);
    }
}

#[test]
fn parameters_without_a_gradient_stay() {
    let vars = vars(&["a.w", "b.w"], DType::F64);
    let a = vars.parameters().next().unwrap().1.clone();
    let gradients = a
        .as_tensor()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let mut adamw = AdamW::new(&vars, AdamWConfig::default()).unwrap();
    adamw.step(&gradients, 0.1).unwrap();
    assert!(value(&vars, "a.w").iter().all(|&v| v < 1.0));
    assert!(value(&vars, "b.w").iter().all(|&v| v == 1.0));
    assert_eq!(
        adamw.state().unwrap()["b.w.step"]
            .to_scalar::<i64>()
            .unwrap(),
        0
    );
}

#[test]
fn a_swap_there_and_back_changes_nothing() {
    let vars = vars(&["a.w"], DType::F32);
    let mut ema = Ema::new(&vars, 0.5).unwrap();
    let mut sgd = Sgd::new(&vars, SGD).unwrap();
    sgd.step(&gradients(&vars, 1), 0.1).unwrap();
    let buffer = vars.buffers().next().unwrap().1;
    buffer.set(Tensor::new(&[1.5f32; 3], &Device::Cpu).unwrap());
    ema.update(&vars).unwrap();
    let (trained, averaged) = (value(&vars, "a.w"), ema.state().unwrap());
    ema.swap(&vars).unwrap();
    assert_close!(
        value(&vars, "a.w"),
        averaged["a.w"].flatten_all().unwrap(),
        atol = 0.0
    );
    assert_close!(buffer.get(), [1.0, 1.0, 1.0], atol = 0.0);
    ema.swap(&vars).unwrap();
    assert_eq!(value(&vars, "a.w"), trained);
    assert_close!(buffer.get(), [1.5, 1.5, 1.5], atol = 0.0);
    assert_close!(ema.state().unwrap()["a.w"], averaged["a.w"], atol = 0.0);
}

#[test]
fn updates_do_not_depend_on_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut vars = Vars::new(3, DType::F32, &Device::Cpu);
            vars.root()
                .parameter("w", &[300, 301], Init::Normal(1.0))
                .unwrap();
            let mut adamw = AdamW::new(&vars, AdamWConfig::default()).unwrap();
            for seed in 0..3 {
                let mut gradients = gradients(&vars, seed);
                let norm = clip_grad_norm(&vars, &mut gradients, 1.0).unwrap();
                assert!(norm > 200.0, "{norm}");
                adamw.step(&gradients, 0.1).unwrap();
            }
            value(&vars, "w")
                .into_iter()
                .map(f64::to_bits)
                .collect::<Vec<_>>()
        })
    };
    let first = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(first, run(threads));
    }
}

#[test]
fn small_gradients_are_not_clipped() {
    let vars = vars(&["a.w"], DType::F64);
    let mut clipped = gradients(&vars, 1);
    let a = vars.parameters().next().unwrap().1.clone();
    let before = clipped.get(a.as_tensor()).unwrap().clone();
    clip_grad_norm(&vars, &mut clipped, 1e6).unwrap();
    clip_grad_value(&vars, &mut clipped, 1e6).unwrap();
    assert_close!(*clipped.get(a.as_tensor()).unwrap(), before, atol = 0.0);
}

#[test]
fn norms_without_clipping_leave_gradients_alone() {
    let vars = vars(&["a.w", "b.w", "c.w"], DType::F32);
    let mut gradients = gradients(&vars, 1);
    let named = |name: &str| vars.parameters().find(|(n, _)| *n == name).unwrap().1;
    gradients.remove(named("b.w").as_tensor());
    let before = gradients.get(named("a.w").as_tensor()).unwrap().clone();
    let norm = grad_norm(&vars, &gradients).unwrap();
    assert_close!(
        *gradients.get(named("a.w").as_tensor()).unwrap(),
        before,
        atol = 0.0
    );
    let squares = grad_squares(&vars, &gradients).unwrap();
    let names: Vec<&str> = squares.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["a.w", "c.w"]);
    let a = before.to_dtype(DType::F64).unwrap().sqr().unwrap();
    let a = a.sum_all().unwrap().to_scalar::<f64>().unwrap();
    assert_close!(squares[0].1, a, rtol = 1e-12);
    assert_close!(norm, (squares[0].1 + squares[1].1).sqrt(), rtol = 1e-15);
    assert_eq!(norm, clip_grad_norm(&vars, &mut gradients, 1.0).unwrap());

    let bad = Tensor::full(f32::INFINITY, (4, 5), &Device::Cpu).unwrap();
    gradients.insert(named("c.w").as_tensor(), bad);
    let message = grad_norm(&vars, &gradients).unwrap_err().to_string();
    assert_eq!(message, "grad_norm: the gradient of \"c.w\" is not finite");
}

#[test]
fn mistakes_are_named() {
    fn told<T>(result: isqrt_nn::Result<T>) -> String {
        result.err().unwrap().to_string()
    }
    let vars = vars(&["a.w", "b.w"], DType::F64);
    let adam = AdamWConfig::default();
    for (message, expected) in [
        (
            told(Sgd::new(
                &vars,
                SgdConfig {
                    momentum: 1.0,
                    ..SGD
                },
            )),
            "momentum = 1",
        ),
        (
            told(Sgd::new(
                &vars,
                SgdConfig {
                    weight_decay: -1.0,
                    ..SGD
                },
            )),
            "weight_decay = -1",
        ),
        (
            told(Sgd::new(
                &vars,
                SgdConfig {
                    momentum: 0.0,
                    nesterov: true,
                    ..SGD
                },
            )),
            "nesterov = true",
        ),
        (
            told(Sgd::with_groups(&vars, SGD, &[ParamGroup::new("c.*")])),
            "group.pattern = c.*",
        ),
        (
            told(Sgd::with_groups(
                &vars,
                SGD,
                &[ParamGroup {
                    lr_factor: f64::NAN,
                    ..ParamGroup::new("*")
                }],
            )),
            "group.lr_factor = NaN",
        ),
        (
            told(AdamW::new(
                &vars,
                AdamWConfig {
                    betas: (0.9, 1.0),
                    ..adam
                },
            )),
            "betas.1 = 1",
        ),
        (
            told(AdamW::new(
                &vars,
                AdamWConfig {
                    epsilon: 0.0,
                    ..adam
                },
            )),
            "epsilon = 0",
        ),
        (told(Ema::new(&vars, 1.0)), "ema decay = 1"),
        (
            told(clip_grad_norm(&vars, &mut gradients(&vars, 1), 0.0)),
            "max_norm = 0",
        ),
        (
            told(clip_grad_value(&vars, &mut gradients(&vars, 1), -1.0)),
            "clip value = -1",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }

    let mut endless = gradients(&vars, 1);
    let b = vars.parameters().nth(1).unwrap().1.clone();
    let infinite = Tensor::full(f64::INFINITY, (4, 5), &Device::Cpu).unwrap();
    endless.insert(b.as_tensor(), infinite);
    let message = told(clip_grad_norm(&vars, &mut endless, 1.0));
    assert!(
        message.contains("gradient of \"b.w\" is not finite"),
        "{message}"
    );

    let mut sgd = Sgd::new(&vars, SGD).unwrap();
    let state = sgd.state().unwrap();
    let mut wrong = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut state = state.clone();
        change(&mut state);
        told(sgd.load_state(&state))
    };
    let message = wrong(&|s| drop(s.remove("b.w.momentum_buffer")));
    assert!(
        message.contains("sgd: the state has no tensor \"b.w.momentum_buffer\""),
        "{message}"
    );
    let other = Tensor::zeros(7, DType::F64, &Device::Cpu).unwrap();
    let message = wrong(&|s| drop(s.insert("a.w.momentum_buffer".into(), other.clone())));
    assert!(
        message.contains("[7]") && message.contains("[4, 5]"),
        "{message}"
    );
    let message = wrong(&|s| drop(s.insert("c".into(), other.clone())));
    assert!(
        message.contains("nothing here takes the tensor \"c\""),
        "{message}"
    );

    let mut ema = Ema::new(&vars, 0.5).unwrap();
    let strange = {
        let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
        vars.root()
            .parameter("z", &[2], Init::Constant(0.0))
            .unwrap();
        vars
    };
    assert!(told(ema.update(&strange)).contains("\"z\""));
    assert!(told(ema.swap(&strange)).contains("\"z\""));

    for (schedule, expected) in [
        (
            Schedule::Constant {
                warmup_epochs: -1.0,
            },
            "schedule.warmup_epochs = -1",
        ),
        (
            Schedule::Polynomial {
                power: -1.0,
                warmup_epochs: 0.0,
            },
            "schedule.power = -1",
        ),
        (
            Schedule::Step {
                epochs: 0.0,
                factor: 0.1,
                warmup_epochs: 0.0,
            },
            "schedule.epochs = 0",
        ),
        (
            Schedule::Logarithmic {
                from: f64::NAN,
                to: 0.0,
                warmup_epochs: 0.0,
            },
            "schedule.from = NaN",
        ),
    ] {
        let message = told(schedule.check());
        assert!(message.contains(expected), "{message}");
    }
}
