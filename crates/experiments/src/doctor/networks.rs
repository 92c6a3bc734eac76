//! Whole networks: a training step of each backbone, and weights through a file.

use candle_core::{DType, Device};
use isqrt_models::{BACKBONES, BackboneSpec, ModelSpec, Network, RepresentationSpec};
use isqrt_nn::ops::cross_entropy;
use isqrt_nn::{Decay, Mode, Optimizer, Sgd, SgdConfig, grad_norm};

use super::{Checks, Error, Outcome, both_within, distance, features, home, place, within};

pub(super) fn check(checks: &mut Checks<'_>) {
    let device = checks.device;
    for entry in BACKBONES {
        let name = entry.name();
        checks.add(
            format!("training step, {name}, beside the CPU"),
            training_step(name, device),
        );
    }
    if device.is_cuda() {
        for name in ["resnet8", "vgg11"] {
            let check = format!("training step, {name} in bf16, beside f32");
            checks.add(check, step_in_bf16(name, device));
        }
    }
    checks.add("weights, saved and loaded", save_and_load(device));
}

/// Losses of SGD on two images and norms of their gradients, the first step's gradients in the second.
fn steps_of(
    backbone: &str,
    device: &Device,
    (dtype, maps): (DType, DType),
    steps: u64,
) -> Result<[Vec<f64>; 2], Error> {
    let spec = ModelSpec {
        backbone: BackboneSpec::new(backbone),
        representation: RepresentationSpec::new("isqrt"),
        classifier: Default::default(),
        classes: 3,
    };
    let mut network = Network::new(&spec, 1, dtype, device)?;
    network.compute_in(maps);
    let options = SgdConfig {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 1e-4,
        decay: Decay::All,
    };
    let mut sgd = Sgd::new(network.vars(), options)?;
    let images = features((2, 3, SIDE * SIDE))?.reshape((2, 3, SIDE, SIDE))?;
    let images = place(&images, dtype, device)?;
    let [mut losses, mut norms] = [vec![], vec![]];
    for step in 0..steps {
        network.vars().set_step(step);
        let logits = network.forward(&images, Mode::Train)?;
        let loss = cross_entropy(&logits, &[0, 2], 0.0)?;
        losses.extend(home(&loss)?);
        let gradients = network.vars().backward(&loss)?;
        norms.push(grad_norm(network.vars(), &gradients)?);
        sgd.step(&gradients, 1e-3)?;
    }
    Ok([losses, norms])
}

/// Two steps in f64, where rounding cannot grow to anything, one in f32, whose layout on a GPU is another.
fn training_step(backbone: &str, device: &Device) -> Outcome {
    let apart = |dtype, steps| -> Result<[f64; 2], Error> {
        let there = steps_of(backbone, device, (dtype, dtype), steps)?;
        let here = steps_of(backbone, &Device::Cpu, (dtype, dtype), steps)?;
        Ok([0, 1].map(|i| distance(&there[i], &here[i])))
    };
    let (double, single) = (apart(DType::F64, 2)?, apart(DType::F32, 1)?);
    let (ok, said) = both_within(double[0], single[0], (1e-7, 1e-3));
    // Rectifiers of a batch of two turn at rounding.
    let (too, also) = both_within(double[1], single[1], (1e-6, 5e-2));
    Ok((
        ok && too,
        format!("loss {said}; norm of the gradients {also}"),
    ))
}

/// Maps in bf16 beside those in f32 on the same GPU.
fn step_in_bf16(backbone: &str, device: &Device) -> Outcome {
    let full = steps_of(backbone, device, (DType::F32, DType::F32), 1)?;
    let short = steps_of(backbone, device, (DType::F32, DType::BF16), 1)?;
    let (ok, said) = within(distance(&short[0], &full[0]), 5e-2);
    let (too, also) = within(distance(&short[1], &full[1]), 0.3);
    Ok((
        ok && too,
        format!("loss {said}; norm of the gradients {also}"),
    ))
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
