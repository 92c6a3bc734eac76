//! Whether a device computes what it should: small checks, each with a verdict.
//!
//! The reference is the plain implementation of `isqrt_linalg::reference` on the CPU in f64, or the CPU's
//! own ops, which have their checks in the tests. Only [`bench()`] times anything.

use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::bench::{DecompositionRow, LayerCase, LayerTiming, decompositions};
use isqrt_linalg::{CovPool, Memory, Output, PreNormalization, Root, Schedule, Side};
use isqrt_models::bench::{NetworkCase, NetworkTiming};
use isqrt_models::{BACKBONES, BackboneSpec, ModelSpec, Network, RepresentationSpec};
use isqrt_nn::ops::cross_entropy;
use isqrt_nn::{Decay, Mode, Optimizer, Sgd, SgdConfig};
use isqrt_train::Precision;
use std::time::Duration;

/// What came of a check.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Verdict {
    /// What was checked.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// The figure and its limit, or what went wrong.
    pub detail: String,
}

type Outcome = Result<(bool, String), Box<dyn std::error::Error>>;

/// Runs all checks on this device, one after another, and says each verdict when it is known. Returns
/// whether all are as they should be.
pub fn check(device: &Device, mut say: impl FnMut(&Verdict)) -> bool {
    let mut all = true;
    let mut note = |check: String, outcome: Outcome| {
        let (ok, detail) = outcome
            .unwrap_or_else(|error| (false, isqrt_train::without_backtrace(&error.to_string())));
        all &= ok;
        say(&Verdict { check, ok, detail });
    };
    for (dtype, limit) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
        for side in [Side::Gram, Side::Covariance] {
            let check = format!(
                "layer, {} side, {}, beside the CPU in f64",
                side_name(side),
                dtype.as_str()
            );
            note(check, beside_the_cpu(device, dtype, side, limit));
        }
    }
    note(
        "layer, gradient beside differences, f64".to_owned(),
        differences(device),
    );
    note(
        "layer, root of a multiple, f64".to_owned(),
        multiples(device),
    );
    note(
        "layer, squares to the covariance, f64".to_owned(),
        squares(device),
    );
    note("layer, constant features".to_owned(), constant(device));
    note(
        "layer, features of 1e-25 and 1e25, f32".to_owned(),
        far(device),
    );
    for entry in BACKBONES {
        let name = entry.name();
        note(
            format!("training step, {name}, beside the CPU"),
            training_step(name, device),
        );
    }
    note(
        "weights, saved and loaded".to_owned(),
        save_and_load(device),
    );
    all
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Gram => "Gram",
        Side::Covariance => "covariance",
        Side::Auto => "either",
    }
}

/// Rectified noise, as features are.
fn features(shape: (usize, usize, usize)) -> candle_core::Result<Tensor> {
    // Two irrational steps: no period in sight, and the same on every machine.
    let noise = |i: f64| (i * 0.754_877_666).fract() + (i * 0.569_840_291).fract() - 0.9;
    let len = shape.0 * shape.1 * shape.2;
    let values: Vec<f64> = (0..len).map(|i| noise(i as f64).max(0.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

fn home(t: &Tensor) -> candle_core::Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// Output and gradient, for an upstream gradient that differs from place to place.
fn run(
    pool: &CovPool,
    x: &Tensor,
    dtype: DType,
    device: &Device,
) -> Result<(Vec<f64>, Vec<f64>), Box<dyn std::error::Error>> {
    let x = Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?)?;
    let y = pool.forward(x.as_tensor())?;
    let weights: Vec<f64> = (0..y.elem_count())
        .map(|i| ((i * 7 % 13) as f64 - 6.0) / 6.0)
        .collect();
    let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu)?;
    let loss = (&y * weights.to_dtype(dtype)?.to_device(device)?)?.sum_all()?;
    let gradients = loss.backward()?;
    let dx = gradients.get(x.as_tensor()).ok_or("no gradient came out")?;
    Ok((home(&y)?, home(dx)?))
}

/// Largest difference, as a share of the largest value; infinite where one is not a number.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let most = b.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(
        0.0_f64,
        |m, v| if v.is_nan() { f64::INFINITY } else { m.max(v) },
    );
    if most == 0.0 { apart } else { apart / most }
}

fn within(figure: f64, limit: f64) -> (bool, String) {
    (
        figure <= limit,
        format!("{figure:.1e}, at most {limit:.0e}"),
    )
}

fn beside_the_cpu(device: &Device, dtype: DType, side: Side, limit: f64) -> Outcome {
    let mut worst = 0.0_f64;
    for shape in [(3, 24, 10), (1, 70, 67)] {
        let x = features(shape)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
        for iterations in [1, 3, 5] {
            for pre_normalization in [
                PreNormalization::Trace,
                PreNormalization::Frobenius,
                PreNormalization::Spectral,
            ] {
                for (output, memory) in [
                    (Output::Triangle, Memory::Keep),
                    (Output::Full, Memory::Lean),
                ] {
                    let pool = CovPool {
                        output,
                        ..CovPool::with_root(Root {
                            schedule: Schedule::NewtonSchulz { iterations },
                            pre_normalization,
                            side,
                            memory,
                            ..Root::default()
                        })
                    };
                    let (y, dx) = run(&pool, &x, DType::F64, &Device::Cpu)?;
                    let (ours, our_dx) = run(&pool, &x, dtype, device)?;
                    worst = worst.max(distance(&ours, &y)).max(distance(&our_dx, &dx));
                }
            }
        }
    }
    Ok(within(worst, limit))
}

/// The derivative along a direction, by central differences.
fn differences(device: &Device) -> Outcome {
    let pool = CovPool::isqrt(5);
    let (x, direction) = (
        features((2, 8, 6))?,
        features((2, 8, 6))?.affine(-1.0, 0.6)?,
    );
    let (_, dx) = run(&pool, &x, DType::F64, device)?;
    let along: f64 = dx.iter().zip(home(&direction)?).map(|(a, b)| a * b).sum();
    let step = 1e-5;
    let loss = |sign: f64| -> Result<f64, Box<dyn std::error::Error>> {
        let moved = (&x + (&direction * (sign * step))?)?;
        let (y, _) = run(&pool, &moved, DType::F64, device)?;
        Ok(y.iter()
            .enumerate()
            .map(|(i, y)| y * ((i * 7 % 13) as f64 - 6.0) / 6.0)
            .sum())
    };
    let slope = (loss(1.0)? - loss(-1.0)?) / (2.0 * step);
    Ok(within(
        (slope - along).abs() / along.abs().max(1e-300),
        1e-7,
    ))
}

/// `C(4 X) = 4 C(X)` with post-compensation.
fn multiples(device: &Device) -> Outcome {
    let (pool, x) = (CovPool::isqrt(5), features((2, 9, 14))?);
    let (y, _) = run(&pool, &x, DType::F64, device)?;
    let (four, _) = run(&pool, &(&x * 4.0)?, DType::F64, device)?;
    let y: Vec<f64> = y.iter().map(|y| 4.0 * y).collect();
    Ok(within(distance(&four, &y), 1e-13))
}

/// After many steps `C² = Σ`, for a covariance of full rank.
fn squares(device: &Device) -> Outcome {
    let x = features((1, 5, 40))?;
    let full = |pool: CovPool| CovPool {
        output: Output::Full,
        ..pool
    };
    let (root, _) = run(&full(CovPool::isqrt(14)), &x, DType::F64, device)?;
    let (covariance, _) = run(&full(CovPool::plain()), &x, DType::F64, device)?;
    let root = Tensor::from_vec(root, (5, 5), &Device::Cpu)?;
    Ok(within(
        distance(&home(&root.matmul(&root)?)?, &covariance),
        1e-10,
    ))
}

fn constant(device: &Device) -> Outcome {
    let x = Tensor::full(3.0_f64, (2, 5, 7), &Device::Cpu)?;
    let (y, dx) = run(&CovPool::isqrt(5), &x, DType::F32, device)?;
    let zero = y.iter().chain(&dx).all(|&v| v == 0.0);
    Ok((zero, "zeros, and zero gradients, are expected".to_owned()))
}

fn far(device: &Device) -> Outcome {
    let mut worst = 0.0_f64;
    for scale in [1e-25, 1e25] {
        let x = (features((2, 8, 12))? * scale)?.to_dtype(DType::F32)?;
        let (y, dx) = run(&CovPool::isqrt(5), &x, DType::F64, &Device::Cpu)?;
        let (ours, our_dx) = run(&CovPool::isqrt(5), &x, DType::F32, device)?;
        worst = worst.max(distance(&ours, &y)).max(distance(&our_dx, &dx));
    }
    Ok(within(worst, 2e-4))
}

/// Losses of SGD on two images, the first step's gradients in the second: two steps in f64, where rounding
/// cannot grow to anything, one in f32, whose layout on a GPU is another.
fn training_step(backbone: &str, device: &Device) -> Outcome {
    let losses = |device: &Device, dtype, steps| -> Result<Vec<f64>, Box<dyn std::error::Error>> {
        let spec = ModelSpec {
            backbone: BackboneSpec::new(backbone),
            representation: RepresentationSpec::new("isqrt"),
            classifier: Default::default(),
            classes: 3,
        };
        let network = Network::new(&spec, 1, dtype, device)?;
        let options = SgdConfig {
            momentum: 0.9,
            nesterov: false,
            weight_decay: 1e-4,
            decay: Decay::All,
        };
        let mut sgd = Sgd::new(network.vars(), options)?;
        let images = features((2, 3, SIDE * SIDE))?.reshape((2, 3, SIDE, SIDE))?;
        let images = images.to_dtype(dtype)?.to_device(device)?;
        let mut losses = vec![];
        for step in 0..steps {
            network.vars().set_step(step);
            let logits = network.forward(&images, Mode::Train)?;
            let loss = cross_entropy(&logits, &[0, 2], 0.0)?;
            losses.extend(home(&loss)?);
            if step + 1 < steps {
                let gradients = network.vars().backward(&loss)?;
                sgd.step(&gradients, 1e-3)?;
            }
        }
        Ok(losses)
    };
    let apart = |dtype, steps| -> Result<f64, Box<dyn std::error::Error>> {
        let there = losses(device, dtype, steps)?;
        Ok(distance(&there, &losses(&Device::Cpu, dtype, steps)?))
    };
    let (double, single) = (apart(DType::F64, 2)?, apart(DType::F32, 1)?);
    let (well, said) = within(double, 1e-7);
    let (too, also) = within(single, 1e-3);
    Ok((well && too, format!("f64 {said}; f32 {also}")))
}

/// Side of the images of a training step: the smallest that every backbone takes.
const SIDE: usize = 80;

/// Through a file, bit for bit.
fn save_and_load(device: &Device) -> Outcome {
    let folder = std::env::temp_dir().join(format!("isqrt-doctor-{}", std::process::id()));
    let path = folder.join("weights.safetensors");
    let outcome = (|| -> Outcome {
        std::fs::create_dir_all(&folder)?;
        let spec = ModelSpec {
            backbone: BackboneSpec::new("resnet8"),
            representation: RepresentationSpec::new("isqrt"),
            classifier: Default::default(),
            classes: 3,
        };
        let network = Network::new(&spec, 1, DType::F32, device)?;
        isqrt_models::checkpoint::save(&network, &path, &Default::default())?;
        let mut other = Network::new(&spec, 2, DType::F32, device)?;
        isqrt_models::checkpoint::load(&mut other, &path, &Default::default())?;
        let mut same = true;
        for ((_, a), (_, b)) in network.vars().parameters().zip(other.vars().parameters()) {
            same &= home(a.as_tensor())? == home(b.as_tensor())?;
        }
        Ok((same, "the same bits are expected".to_owned()))
    })();
    // What is left is in the folder for temporary files.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// What [`bench()`] timed.
#[derive(Clone, Debug, PartialEq)]
pub enum Timing {
    /// The paper's layer: batch, steps, and a row an implementation.
    Layer(usize, usize, Vec<LayerTiming>),
    /// Decompositions beside it.
    Decomposition(Vec<DecompositionRow>),
    /// A training step of a network: name, batch, precision.
    Network(String, usize, Precision, NetworkTiming),
}

/// Times the paper's layer (d = 256, 14x14, N = 1, 3, 5, 7), decompositions of its covariance, and a
/// training step of ResNet-50 with it at 224x224 in each precision that the device has. A part that fails
/// does not keep the others from running: `each` hears of all.
pub fn bench(device: &Device, batch: usize, mut each: impl FnMut(Result<Timing, String>)) {
    const LAYER: Duration = Duration::from_secs(2);
    const NETWORK: Duration = Duration::from_secs(10);
    for iterations in [1, 3, 5, 7] {
        let case = LayerCase {
            pool: CovPool::isqrt(iterations),
            batch,
            d: 256,
            positions: 196,
        };
        let rows = isqrt_linalg::bench::layer(&case, device, LAYER);
        let rows = rows.map(|rows| Timing::Layer(batch, iterations, rows));
        each(rows.map_err(|error| error.to_string()));
    }
    let rows = decompositions(256, &[1, batch.min(32)], device, LAYER);
    each(rows.map(Timing::Decomposition).map_err(|e| e.to_string()));
    let precisions: &[Precision] = match device.is_cpu() {
        true => &[Precision::F32],
        false => &[Precision::F32, Precision::Tf32, Precision::Bf16],
    };
    for head in ["gap", "isqrt"] {
        for &precision in precisions {
            let name = format!("resnet50+{head}");
            each(network_step(&name, device, batch, (precision, NETWORK)));
        }
    }
    isqrt_device::set_precision(isqrt_device::Precision::Full);
}

fn network_step(
    name: &str,
    device: &Device,
    batch: usize,
    (precision, budget): (Precision, Duration),
) -> Result<Timing, String> {
    let time = || -> Result<Timing, Box<dyn std::error::Error>> {
        precision.begin(device)?;
        let case = NetworkCase {
            model: ModelSpec::named(name, 1000)?,
            batch,
            side: 224,
            maps: precision.maps(),
        };
        let timing = isqrt_models::bench::network(&case, device, budget)?;
        Ok(Timing::Network(name.to_owned(), batch, precision, timing))
    };
    time().map_err(|error| isqrt_train::without_backtrace(&error.to_string()))
}
