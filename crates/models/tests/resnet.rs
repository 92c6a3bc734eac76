//! The ResNets against torchvision: parameter counts, shapes, and values from equal weights.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device};
use isqrt_models::{BackboneSpec, ModelSpec, Network, RepresentationSpec};
use isqrt_nn::Mode;
use isqrt_testkit::randn;

fn network(backbone: BackboneSpec, head: &str, classes: usize) -> Network {
    let spec = ModelSpec {
        backbone,
        representation: RepresentationSpec::new(head),
        classes,
    };
    Network::new(&spec, 1, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn parameter_counts_are_those_of_torchvision_and_of_the_authors() {
    for (name, count) in [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ] {
        let network = network(name.into(), "gap", 1000);
        assert_eq!(network.vars().parameter_count(), count, "{name}");
    }
    // The sizes of the released weights, mpncovresnet50 and mpncovresnet101.
    for (name, count) in [("resnet50", 56_929_832), ("resnet101", 75_921_960)] {
        let backbone = BackboneSpec::second_order(name).unwrap();
        let network = network(backbone, "isqrt", 1000);
        assert_eq!(network.vars().parameter_count(), count, "{name} with iSQRT");
    }
}

#[test]
fn the_last_stage_keeps_the_resolution_for_covariance_heads() {
    let x = randn((1, 3, 64, 96), 1, DType::F32).unwrap();
    for (backbone, shape) in [
        (BackboneSpec::new("resnet18"), [1, 512, 2, 3]),
        (BackboneSpec::new("resnet50"), [1, 2048, 2, 3]),
        (
            BackboneSpec::new("resnet18").with("last_stride", 1),
            [1, 512, 4, 6],
        ),
        (
            BackboneSpec::new("resnet50")
                .with("last_stride", 1)
                .with("reduction", 32),
            [1, 32, 4, 6],
        ),
    ] {
        let network = network(backbone, "gap", 2);
        let features = network.features(&x, Mode::Eval).unwrap();
        assert_eq!(features.dims(), shape);
    }
}
