//! Every backbone with every representation: builds, learns, saves and loads.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Var};
use isqrt_models::{
    BACKBONES, BackboneSpec, ClassifierSpec, ModelSpec, Network, REPRESENTATIONS,
    RepresentationSpec,
};
use isqrt_nn::Mode;
use isqrt_nn::ops::cross_entropy;
use isqrt_testkit::{assert_close, randn};

fn spec(backbone: impl Into<BackboneSpec>, representation: RepresentationSpec) -> ModelSpec {
    ModelSpec::new(backbone, representation, 3)
}

/// Parameters of the network that a spec in TOML describes, or the error.
fn parameters(text: &str) -> Result<usize, String> {
    let spec: ModelSpec = toml::from_str(text).map_err(|e| e.to_string())?;
    let network = Network::new(&spec, 1, DType::F32, &Device::Cpu).map_err(|e| e.to_string())?;
    Ok(network.vars().parameter_count())
}

fn network(spec: &ModelSpec, seed: u64) -> Network {
    Network::new(spec, seed, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn with_zero_init_residual_blocks_begin_as_their_shortcuts() {
    for (name, blocks, last) in [
        ("resnet8", 3, "bn2.weight"),
        ("resnet18", 8, "bn2.weight"),
        ("resnet50", 16, "bn3.weight"),
    ] {
        let weights = |zero: bool| {
            let mut backbone = BackboneSpec::from(name);
            backbone.options.set("zero_init_residual", zero);
            let network = network(&spec(backbone, RepresentationSpec::new("gap")), 7);
            let parameters = network.vars().parameters();
            let values = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            parameters
                .map(|(name, var)| (name.to_owned(), values(var)))
                .collect::<Vec<_>>()
        };
        let mut changed = 0;
        for ((path, ones), (_, zeros)) in weights(false).into_iter().zip(weights(true)) {
            if ones != zeros {
                assert!(path.contains("layer") && path.ends_with(last), "{path}");
                assert!(zeros.iter().all(|x| *x == 0.0), "{path}");
                changed += 1;
            }
        }
        assert_eq!(changed, blocks, "{name}");
    }
    let error = parameters(
        r#"backbone = { name = "preresnet20", zero_init_residual = true }
        representation = "gap"
        classes = 3"#,
    );
    assert!(error.unwrap_err().contains("zero_init_residual"));
}

/// Small networks with every head, large ones with one each, of all heads in turn.
#[test]
fn combinations_build_differentiate_save_and_load() {
    combine(false);
}

/// Some minutes: `just test-all`.
#[test]
#[ignore = "takes minutes"]
fn every_combination_builds_differentiates_saves_and_loads() {
    combine(true);
}

fn combine(all: bool) {
    let folder = tempfile::tempdir().unwrap();
    let images = |side: usize| randn((4, 3, side, side), 1, DType::F32).unwrap();
    for (i, backbone) in BACKBONES.iter().enumerate() {
        // One position alone has no covariance.
        let images = images(if backbone.name().starts_with("alexnet") {
            64
        } else {
            32
        });
        let heads = REPRESENTATIONS.iter().cycle().skip(i);
        for representation in heads.take(REPRESENTATIONS.len()) {
            let name = format!("{} with {}", backbone.name(), representation.name());
            let head = RepresentationSpec::new(representation.name());
            let mut spec = spec(BackboneSpec::second_order(backbone.name()).unwrap(), head);
            if spec.representation.name == "flat" {
                spec.classifier.hidden = vec![64, 32];
            }
            let first = network(&spec, 7);

            // A forward pass in training moves the running statistics, so that they are tested too.
            first.vars().set_step(0);
            let logits = first.forward(&images, Mode::Train).unwrap();
            assert_eq!(logits.dims(), [4, 3], "{name}");
            let loss = cross_entropy(&logits, &[0, 1, 2, 0], 0.0).unwrap();
            let gradients = loss.backward().unwrap();
            for (parameter, var) in first.vars().parameters() {
                let gradient = gradients.get(var.as_tensor());
                let gradient =
                    gradient.unwrap_or_else(|| panic!("{name}: no gradient of {parameter}"));
                let size = gradient
                    .sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
                assert!(
                    size.is_finite() && size > 0.0,
                    "{name}: gradient of {parameter} is {size}"
                );
            }

            // Each parameter belongs to a layer that ran, in one stage.
            let description = first.describe(images.dim(3).unwrap()).unwrap();
            assert_eq!(
                description.total().parameters,
                first.vars().parameter_count(),
                "{name}"
            );

            let path = folder.path().join("network.safetensors");
            first.save(&path).unwrap();
            let mut second = network(&spec, 8);
            let other = second.forward(&images, Mode::Eval).unwrap();
            second.load(&path).unwrap();
            let expected = first.forward(&images, Mode::Eval).unwrap();
            assert_close!(
                second.forward(&images, Mode::Eval).unwrap(),
                expected,
                atol = 0.0
            );
            let change = (other - expected)
                .unwrap()
                .abs()
                .unwrap()
                .sum_all()
                .unwrap();
            assert!(
                change.to_scalar::<f32>().unwrap() > 0.0,
                "{name}: the seed changes nothing"
            );
            // A large or deep network takes seconds: it meets one head, each another one.
            let (values, tensors) = (first.vars().parameter_count(), first.vars().parameters());
            if !all && (values > 5_000_000 || tensors.count() > 80) {
                break;
            }
        }
    }
}

#[test]
fn one_seed_gives_one_backbone_whatever_the_head() {
    let heads = ["gap", "isqrt"].map(RepresentationSpec::new);
    let [a, b] = heads.map(|head| network(&spec("e10net", head), 3));
    for (name, var) in a
        .vars()
        .parameters()
        .filter(|(name, _)| name.starts_with("backbone"))
    {
        let (_, other) = b
            .vars()
            .parameters()
            .find(|(other, _)| *other == name)
            .unwrap();
        assert_close!(var.as_tensor(), other.as_tensor(), atol = 0.0);
    }
}

#[test]
fn a_checkpoint_of_another_network_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    network(&spec("e10net", RepresentationSpec::new("gap")), 1)
        .save(&path)
        .unwrap();
    let mut other = network(&spec("e10net", RepresentationSpec::new("cov")), 1);
    let message = other.load(&path).unwrap_err().to_string();
    assert!(
        message.contains("classifier.weight") && message.contains("shape"),
        "{message}"
    );
    let message = other
        .load(&folder.path().join("none"))
        .unwrap_err()
        .to_string();
    assert!(message.contains("none"), "{message}");
}

#[test]
fn specs_are_read_and_mistakes_are_named() {
    let read = |head: &str| {
        parameters(&format!(
            "backbone = \"e10net\"\nclasses = 10\nrepresentation = {head}"
        ))
    };
    let conv = 7 * 7 * 3 * 32 + 32 * 32 + 4 * 32;
    for good in [
        r#"{ name = "isqrt" }"#,
        r#"{ name = "isqrt", iterations = 3, pre_normalization = "frobenius" }"#,
        r#"{ name = "isqrt", post_compensation = false, side = "gram", memory = "lean" }"#,
        r#"{ name = "isqrt", schedule = "cubic", steps = 3, lower = 0.1 }"#,
        r#"{ name = "isqrt", coefficients = [[1.5, -0.5, 0.0]] }"#,
        r#"{ name = "mpn", power = 0.5 }"#,
        r#"{ name = "deepo2p", epsilon = 0.1 }"#,
        r#"{ name = "mtp", degree = 4, iterations = 5 }"#,
        r#"{ name = "mpa", degree = 3 }"#,
        r#"{ name = "svd_pade" }"#,
    ] {
        assert_eq!(read(good), Ok(conv + 528 * 10 + 10), "{good}");
    }
    for (head, values) in [
        (r#"{ name = "isqrt", output = "full" }"#, 1024),
        (r#"{ name = "bcnn" }"#, 1024),
        (r#"{ name = "impbcnn", iterations = 5, epsilon = 0 }"#, 1024),
        (r#"{ name = "impbcnn", root = "svd" }"#, 1024),
        (r#"{ name = "cbp" }"#, 8192),
        (
            r#"{ name = "cbp", projection = "random_maclaurin", dim = 64 }"#,
            64,
        ),
        (
            r#"{ name = "g2denet", beta = 0.5, normalize = false }"#,
            1089,
        ),
        (r#"{ name = "g2denet", output = "triangle" }"#, 561),
    ] {
        assert_eq!(read(head), Ok(conv + values * 10 + 10), "{head}");
    }
    // Three taps along the channels.
    let taps = conv + 528 * 10 + 10 + 3;
    assert_eq!(read(r#"{ name = "dropcov" }"#), Ok(taps));
    for (bad, part) in [
        (
            r#"{ name = "isqrt", iteration = 3 }"#,
            "unknown field `iteration`",
        ),
        (r#"{ name = "isqrt", iterations = 0 }"#, "iterations"),
        (
            r#"{ name = "isqrt", iterations = 3, schedule = "cubic" }"#,
            "give one of",
        ),
        (r#"{ name = "isqrt", iterations = 14 }"#, "iterations = 14"),
        (
            r#"{ name = "isqrt", iterations = 13, pre_normalization = "frobenius" }"#,
            "iterations = 13",
        ),
        (r#"{ name = "isqrt", schedule = "septic" }"#, "septic"),
        (r#"{ name = "gap", power = 2 }"#, "power"),
        (r#"{ name = "mpn", power = 2 }"#, "power = 2"),
        (r#"{ name = "deepo2p", epsilon = 0 }"#, "epsilon = 0"),
        (r#"{ name = "cbp", dim = 0 }"#, "dim must be 1 to 1048576"),
        (r#"{ name = "cbp", dim = 2000000 }"#, "dim must be 1"),
        (r#"{ name = "cbp", projection = "fft" }"#, "fft"),
        (r#"{ name = "impbcnn", root = "eig" }"#, "eig"),
        (r#"{ name = "impbcnn", iterations = 0 }"#, "iterations = 0"),
        (
            r#"{ name = "impbcnn", root = "svd", iterations = 5 }"#,
            "iterations belong to root",
        ),
        (r#"{ name = "g2denet", beta = -1 }"#, "beta = -1"),
        (r#"{ name = "mtp", degree = 31 }"#, "degree = 31"),
        (r#"{ name = "mpa", degree = 9 }"#, "degree = 9"),
        (r#"{ name = "mpa", iterations = 21 }"#, "iterations = 21"),
        (r#"{ name = "dropcov", p = 0.5 }"#, "unknown field `p`"),
        (
            r#"{ name = "gax" }"#,
            "known are gap, cov, isqrt, mpn, flat, deepo2p, bcnn, cbp, impbcnn, g2denet, mtp, mpa, \
             svd_pade, dropcov",
        ),
        (r#"{ iterations = 3 }"#, "name"),
    ] {
        let message = read(bad).unwrap_err();
        assert!(message.contains(part), "{bad}: {message}");
    }
}

#[test]
fn options_of_a_backbone_are_read_and_mistakes_are_named() {
    let read = |backbone: &str| {
        parameters(&format!(
            "backbone = {backbone}\nclasses = 10\nrepresentation = {{ name = \"gap\" }}"
        ))
    };
    let plain = 11_689_512 - 990 * 513;
    assert_eq!(read(r#""resnet18""#), Ok(plain));
    assert_eq!(read(r#"{ name = "resnet18", last_stride = 1 }"#), Ok(plain));
    for (bad, part) in [
        (r#""resnet9""#, "known are e10net, "),
        (r#"{ last_stride = 1 }"#, "name"),
        ("3", "a name, or a table"),
        (r#"{ name = "e10net", reduction = 8 }"#, "reduction"),
        (
            r#"{ name = "resnet18", stride = 1 }"#,
            "unknown field `stride`",
        ),
        (
            r#"{ name = "resnet18", last_stride = 3 }"#,
            "last_stride must be 1 or 2",
        ),
        (
            r#"{ name = "resnet18", reduction = 0 }"#,
            "at least 1 channel",
        ),
        (
            r#"{ name = "resnet20", reduction = 9223372036854775807 }"#,
            "at most 65536",
        ),
        (
            r#"{ name = "preresnet20", stem_stride = 0 }"#,
            "stem_stride must be 1 or 2",
        ),
        (
            r#"{ name = "mobilenet_v2", last_stride = 3 }"#,
            "last_stride must be 1 or 2",
        ),
        (
            r#"{ name = "shufflenet_v2_x1_0", last_stride = 0 }"#,
            "last_stride must be 1 or 2",
        ),
    ] {
        let message = read(bad).unwrap_err();
        assert!(message.contains(part), "{bad}: {message}");
    }
}

#[test]
fn a_spec_is_written_as_it_was_read() {
    for backbone in [
        r#""resnet50""#,
        r#"{"name":"resnet50","last_stride":1,"reduction":256}"#,
    ] {
        let spec: BackboneSpec = serde_json::from_str(backbone).unwrap();
        let again = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<BackboneSpec>(&again).unwrap(), spec);
        assert_eq!(again.starts_with('{'), backbone.starts_with('{'), "{again}");
    }
}

/// Every gradient and buffer, bit for bit, of blocked maps and of plain ones.
#[test]
fn checkpointed_blocks_have_the_gradients_of_plain_ones() {
    for (name, dtype) in [("resnet18", DType::F32), ("resnet50", DType::F64)] {
        let images = Var::from_tensor(&randn((2, 3, 40, 40), 1, dtype).unwrap()).unwrap();
        let [plain, ours] = [false, true].map(|checkpoint| {
            let backbone = BackboneSpec::new(name)
                .with("last_stride", 1)
                .with("checkpoint", checkpoint);
            let spec = spec(backbone, RepresentationSpec::new("gap"));
            let network = Network::new(&spec, 7, dtype, &Device::Cpu).unwrap();
            let logits = network.forward(&images, Mode::Train).unwrap();
            let loss = cross_entropy(&logits, &[0, 2], 0.0).unwrap();
            let gradients = network.vars().backward(&loss).unwrap();
            (network, gradients)
        });
        let parameters = plain.0.vars().parameters();
        let twins = ours.0.vars().parameters();
        let pairs = parameters
            .zip(twins)
            .chain([(("x", &images), ("x", &images))]);
        for ((name, known), (_, found)) in pairs {
            let known = plain.1.get(known).unwrap_or_else(|| panic!("{name}"));
            let found = ours.1.get(found).unwrap_or_else(|| panic!("{name}"));
            assert_close!(found, known, atol = 0.0);
        }
        for ((_, found), (_, known)) in ours.0.vars().buffers().zip(plain.0.vars().buffers()) {
            assert_close!(found.get(), known.get(), atol = 0.0);
        }
    }
}

/// VGG drops after its hidden layers, AlexNet before them.
#[test]
fn dropout_of_the_hidden_layers_has_the_place_that_is_asked_for() {
    let images = randn((8, 3, 32, 32), 1, DType::F32).unwrap();
    let zeros = |drop_inputs: bool| {
        let mut spec = spec("e10net", RepresentationSpec::new("flat").with("side", 2));
        spec.classifier = ClassifierSpec {
            hidden: vec![64],
            dropout: 0.9,
            drop_inputs,
        };
        let network = network(&spec, 1);
        network.vars().set_step(0);
        // What the last layer saw: its weight's gradient is zero where its input is.
        let logits = network.forward(&images, Mode::Train).unwrap();
        let loss = logits.narrow(1, 0, 1).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let weights = network.vars().parameters();
        let (_, weight) = weights.last().unwrap();
        let values = gradients.get(weight).unwrap().get(0).unwrap();
        let values = values.to_vec1::<f32>().unwrap();
        values.iter().filter(|&&v| v == 0.0).count() as f64 / values.len() as f64
    };
    // The ReLU of eight images leaves nearly every value somewhere.
    assert!(zeros(false) > 0.2, "{}", zeros(false));
    assert!(zeros(true) < 0.1, "{}", zeros(true));
}

#[test]
fn short_names_are_the_published_networks() {
    let named = |name: &str| ModelSpec::named(name, 10).unwrap();
    for (name, backbone, head, hidden) in [
        ("resnet50", "resnet50", "gap", 0),
        (
            "resnet50+isqrt",
            "resnet50 (last_stride = 1, reduction = 256)",
            "isqrt",
            0,
        ),
        (
            "resnet50+bcnn",
            "resnet50 (last_stride = 1, reduction = 256)",
            "bcnn",
            0,
        ),
        ("vgg16", "vgg16", "flat", 2),
        ("vgg16+gap", "vgg16", "gap", 0),
        (
            "vgg16_bn+isqrt",
            "vgg16_bn (last_pool = false, reduction = 256)",
            "isqrt",
            2,
        ),
        ("vgg16+bcnn", "vgg16 (last_pool = false)", "bcnn", 0),
        ("alexnet+mpn", "alexnet (last_pool = false)", "mpn", 2),
    ] {
        let spec = named(name);
        assert_eq!(spec.backbone.to_string(), backbone, "{name}");
        assert_eq!(spec.representation.name, head, "{name}");
        assert_eq!(spec.classifier.hidden.len(), hidden, "{name}");
    }
    for (name, part) in [
        ("resnet5+isqrt", "did you mean `resnet5"),
        ("resnet50+isqr", "did you mean `isqrt`"),
        ("isqrt", "is a pooling head"),
        ("", "known are"),
    ] {
        let message = ModelSpec::named(name, 10).unwrap_err().to_string();
        assert!(message.contains(part), "{name}: {message}");
    }
    // More values than a machine has.
    let spec = ModelSpec::named("e10net+isqrt", 1 << 30).unwrap();
    let error = Network::new(&spec, 1, DType::F32, &Device::Cpu)
        .err()
        .unwrap();
    assert!(error.to_string().contains("classifier.weight"), "{error}");
}
