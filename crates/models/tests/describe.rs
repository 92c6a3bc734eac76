//! Networks as tables of stages.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device};
use isqrt_models::{ModelSpec, Network};

fn network(spec: &ModelSpec) -> Network {
    Network::new(spec, 1, DType::F32, &Device::Cpu).unwrap()
}

/// Billions of multiply-adds as torchvision 0.26 publishes them (`_ops` of its weights).
#[test]
fn multiply_adds_are_those_of_torchvision() {
    for (name, billions) in [("resnet18", 1.814), ("alexnet", 0.714)] {
        let network = network(&ModelSpec::named(name, 1000).unwrap());
        let total = network.describe(224).unwrap().total();
        let found = (total.multiply_adds.unwrap() as f64 / 1e6).round() / 1e3;
        assert_eq!(found, billions, "{name}");
        assert_eq!(total.parameters, network.vars().parameter_count(), "{name}");
    }
}

#[test]
fn stages_hold_their_layers_norms_and_poolings() {
    let mut spec = ModelSpec::named("resnet18+isqrt", 1000).unwrap();
    spec.backbone = spec.backbone.with("reduction", 32);
    let network = network(&spec);
    let description = network.describe(64).unwrap();
    let found: Vec<(&str, &[usize], u64)> = description
        .stages
        .iter()
        .map(|s| (s.name.as_str(), &s.shape[..], s.activation_bytes))
        .collect();
    let maps = |channels: u64, side: u64| 4 * channels * side * side;
    let expected: [(&str, &[usize], u64); 8] = [
        // Convolution, norm, and the pooling after them.
        (
            "backbone.conv1",
            &[64, 16, 16],
            2 * maps(64, 32) + maps(64, 16),
        ),
        // Two blocks of two convolutions, two norms and a sum; later ones with a shortcut.
        ("backbone.layer1", &[64, 16, 16], 10 * maps(64, 16)),
        ("backbone.layer2", &[128, 8, 8], 12 * maps(128, 8)),
        ("backbone.layer3", &[256, 4, 4], 12 * maps(256, 4)),
        ("backbone.layer4", &[512, 4, 4], 12 * maps(512, 4)),
        ("backbone.layer_reduce", &[32, 4, 4], 2 * maps(32, 4)),
        ("representation", &[528], 4 * 528),
        ("classifier", &[1000], 4 * 1000),
    ];
    assert_eq!(found, expected);
    for size in [0, 4096] {
        let message = network.describe(size).unwrap_err().to_string();
        assert!(message.contains("1 to 2048"), "{message}");
    }
}
