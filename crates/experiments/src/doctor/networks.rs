//! Whole networks: a training step of each backbone, and weights through a file.

use candle_core::{DType, Device};
use isqrt_models::{BACKBONES, BackboneSpec, ModelSpec, Network, RepresentationSpec};
use isqrt_nn::ops::cross_entropy;
use isqrt_nn::{Decay, Mode, Optimizer, Sgd, SgdConfig};

use super::{Checks, Error, Findings, Outcome, distance, features, home, place, within};

pub(super) fn check(checks: &mut Checks<'_, '_>) {
    let device = checks.device;
    for entry in BACKBONES {
        let name = entry.name();
        checks.add(format!("training step, {name}, beside the CPU"), || {
            training_step(name, device)
        });
    }
    if device.is_cuda() {
        for (name, way) in [
            ("resnet8", Way::Bf16),
            ("vgg11", Way::Bf16),
            ("resnet8", Way::Tf32),
            ("resnet8", Way::Timed),
        ] {
            let (words, _) = way.words();
            let check = format!("training step, {name} {words}, beside f32");
            checks.add(check, || step_otherwise(name, way, device));
        }
    }
    checks.add("weights, saved and loaded", || save_and_load(device));
}

/// What steps of SGD on two images leave.
struct Steps {
    losses: Vec<f64>,
    /// Of the first step, by parameter.
    gradients: Vec<(String, Vec<f64>)>,
}

impl Steps {
    /// Largest difference of a gradient, as a share of the largest value of its parameter, or of a small part
    /// of the largest of all: the gradient of a bias before a batch norm is rounding.
    fn gradients_apart(&self, other: &Self) -> Result<f64, Error> {
        const SMALL: f64 = 1e-4;
        let most = |values: &[f64]| values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let largest = other.gradients.iter().map(|(_, values)| most(values));
        let least = SMALL * largest.fold(0.0, f64::max);
        let mut worst = 0.0_f64;
        for ((name, found), (_, known)) in self.gradients.iter().zip(&other.gradients) {
            if name.starts_with("backbone.") && name.ends_with("weight") && most(known) == 0.0 {
                return Err(format!("no gradient reaches {name}").into());
            }
            if found.len() != known.len() {
                return Err(format!("a gradient of {name} has another size").into());
            }
            let scale = most(known).max(least);
            for (a, b) in found.iter().zip(known) {
                // Not a number is as far as can be.
                let apart = (a - b).abs() / scale;
                worst = if apart.is_nan() {
                    f64::INFINITY
                } else {
                    worst.max(apart)
                };
            }
        }
        Ok(worst)
    }

    /// Differences of all gradients together, as shares of them: those of the backbone, and the others.
    fn parts_apart(&self, other: &Self) -> [f64; 2] {
        let mut sums = [[0.0; 2]; 2];
        for ((name, found), (_, known)) in self.gradients.iter().zip(&other.gradients) {
            let [apart, all] = &mut sums[usize::from(!name.starts_with("backbone."))];
            *apart += found
                .iter()
                .zip(known)
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f64>();
            *all += known.iter().map(|b| b * b).sum::<f64>();
        }
        sums.map(|[apart, all]| (apart / all).sqrt())
    }
}

/// Steps of a backbone with the paper's head and what that asks of it.
fn steps_of(
    backbone: &str,
    device: &Device,
    (dtype, maps): (DType, DType),
    steps: u64,
) -> Result<Steps, Error> {
    let spec = ModelSpec {
        classifier: Default::default(),
        ..ModelSpec::named(&format!("{backbone}+isqrt"), 3)?
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
    let (mut losses, mut kept) = (vec![], vec![]);
    for step in 0..steps {
        network.vars().set_step(step);
        let logits = network.forward(&images, Mode::Train)?;
        let loss = cross_entropy(&logits, &[0, 2], 0.0)?;
        losses.extend(home(&loss)?);
        let gradients = network.vars().backward(&loss)?;
        if step == 0 {
            for (name, parameter) in network.vars().parameters() {
                let gradient = gradients.get(parameter);
                let gradient = gradient.ok_or_else(|| format!("no gradient of {name}"))?;
                kept.push((name.to_owned(), home(gradient)?));
            }
        }
        sgd.step(&gradients, 1e-3)?;
    }
    let gradients = kept;
    Ok(Steps { losses, gradients })
}

/// Two steps in f64, where rounding cannot grow to anything, and one in f32, whose layout on a GPU is another.
fn training_step(backbone: &str, device: &Device) -> Outcome {
    let of = |dtype, steps, device| steps_of(backbone, device, (dtype, dtype), steps);
    let (there, here) = (of(DType::F64, 2, device)?, of(DType::F64, 2, &Device::Cpu)?);
    let apart = there.gradients_apart(&here)?;
    let (short, ours) = (of(DType::F32, 1, device)?, of(DType::F32, 1, &Device::Cpu)?);
    let losses = [
        distance(&there.losses, &here.losses),
        distance(&short.losses, &ours.losses),
    ];
    // Rectifiers of a batch of two turn at rounding, and a deep network makes much of it: no farther from f64
    // than the CPU's f32, but for chance. Gradients of zero would be 1 away.
    let [backbone, head] = short.parts_apart(&here);
    let limit = (5.0 * ours.parts_apart(&here)[0]).clamp(5e-2, 0.5);
    let findings = Findings::default().both("loss", losses, (1e-7, 1e-3));
    let findings = findings.figure("each gradient f64", apart, 1e-6);
    let findings = findings.figure("backbone's gradients f32", backbone, limit);
    Ok(findings.figure("classifier's", head, 1e-2))
}

/// What else a GPU has than f32 by the algorithms that cuDNN ranks first.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Maps in bf16, products rounded to TF32.
    Bf16,
    Tf32,
    /// Algorithms by their time.
    Timed,
}

impl Way {
    /// In words, with the most that a loss, gradients of the backbone and others may differ.
    fn words(self) -> (&'static str, [f64; 3]) {
        match self {
            Self::Bf16 => ("in bf16", [5e-2, 0.3, 0.1]),
            Self::Tf32 => ("in tf32", [1e-2, 0.1, 5e-2]),
            Self::Timed => ("with timed algorithms", [1e-3, 5e-2, 1e-2]),
        }
    }
}

/// One step in another way beside f32 on the same GPU.
fn step_otherwise(backbone: &str, way: Way, device: &Device) -> Outcome {
    let of = |maps| steps_of(backbone, device, (DType::F32, maps), 1);
    let full = of(DType::F32)?;
    // Of the whole program: as before afterwards, whatever came of it.
    let (precision, search) = (isqrt_device::precision(), isqrt_device::search());
    let other = match way {
        Way::Timed => {
            isqrt_device::set_search(isqrt_device::Search::Timed);
            of(DType::F32)
        }
        Way::Bf16 | Way::Tf32 => {
            isqrt_device::set_precision(isqrt_device::Precision::Tf32);
            of(if way == Way::Bf16 {
                DType::BF16
            } else {
                DType::F32
            })
        }
    };
    isqrt_device::set_precision(precision);
    isqrt_device::set_search(search);
    let other = other?;
    let [loss, backbone, head] = way.words().1;
    let findings = Findings::default().figure("loss", distance(&other.losses, &full.losses), loss);
    let [apart, head_apart] = other.parts_apart(&full);
    let findings = findings.figure("backbone's gradients", apart, backbone);
    Ok(findings.figure("classifier's", head_apart, head))
}

/// Side of the images of a training step: small, with more than one position at the end of every backbone.
const SIDE: usize = 96;

/// Through a file, to the same values.
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
        let mut worst = 0.0_f64;
        for ((_, a), (_, b)) in network.vars().parameters().zip(other.vars().parameters()) {
            worst = worst.max(distance(&home(b.as_tensor())?, &home(a.as_tensor())?));
        }
        Ok(within(worst, 0.0))
    })();
    // What is left is in the folder for temporary files.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn steps(weight: [f64; 2], bias: f64) -> Steps {
        let gradients = vec![
            ("backbone.conv.weight".to_owned(), weight.to_vec()),
            ("backbone.conv.bias".to_owned(), vec![bias]),
        ];
        Steps {
            losses: vec![],
            gradients,
        }
    }

    #[test]
    fn gradients_in_another_order_are_told_apart_and_rounding_is_not() {
        let known = steps([3.0, 4.0], 1e-17);
        assert_eq!(
            steps([4.0, 3.0], 1e-17).gradients_apart(&known).unwrap(),
            0.25
        );
        assert!(steps([3.0, 4.0], -1e-17).gradients_apart(&known).unwrap() < 1e-12);
        let [apart, none] = steps([3.0, 3.5], 0.0).parts_apart(&known);
        assert!((apart - 0.1).abs() < 1e-12, "{apart}");
        assert!(none.is_nan());
    }

    #[test]
    fn a_gradient_where_none_should_be_is_told() {
        let known = steps([3.0, 4.0], 0.0);
        assert!(steps([3.0, 4.0], 1e3).gradients_apart(&known).unwrap() > 1e6);
        let apart = steps([3.0, 4.0], f64::NAN).gradients_apart(&known).unwrap();
        assert_eq!(apart, f64::INFINITY);
    }

    #[test]
    fn a_backbone_without_gradients_is_no_pass() {
        let none = steps([0.0, 0.0], 1.0);
        let said = none.gradients_apart(&none).unwrap_err().to_string();
        assert_eq!(said, "no gradient reaches backbone.conv.weight");
    }
}
