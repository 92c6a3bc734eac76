//! Files of torch.save and safetensors: real ones, and networks under the names of others.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use isqrt_models::checkpoint::{
    self, Checkpoint, Element, LoadOptions, Preprocessing, Record, Triangle,
};
use isqrt_models::{BackboneSpec, ModelSpec, Network, RepresentationSpec};
use isqrt_nn::Mode;
use isqrt_nn::ops::cross_entropy;
use isqrt_testkit::{Golden, assert_close, hashed, hashed_weights as weights, randn};

fn small(name: &str) -> PathBuf {
    Path::new("tests/golden/checkpoints").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&small(name)).unwrap()
}

fn refusal(name: &str) -> String {
    Checkpoint::open(&small(name)).unwrap_err().to_string()
}

fn values(file: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = file.read(name).unwrap().to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// `i / 8` for the places of a 4x6 matrix, as tools/golden/checkpoints.py has it.
fn eighths(places: impl IntoIterator<Item = usize>) -> Vec<f64> {
    places.into_iter().map(|i| i as f64 / 8.0).collect()
}

#[test]
fn a_dictionary_of_tensors_is_read_from_every_format_of_torch_save() {
    for name in ["archive.pth", "legacy.pth", "protocol4.pth"] {
        let file = open(name);
        let listed: Vec<_> = file.tensors().collect();
        assert_eq!(
            listed,
            [
                ("a.bias", &[4][..], Element::F32),
                ("a.num_batches_tracked", &[], Element::I64),
                ("a.weight", &[4, 6], Element::F32),
            ],
            "{name}"
        );
        assert_eq!(values(&file, "a.weight"), eighths(0..24), "{name}");
        assert_eq!(values(&file, "a.bias"), [0.5, -0.25, 2.0, 8.0], "{name}");
        assert_eq!(file.group(), None);
    }
}

#[test]
fn views_halves_and_parameters_have_their_values() {
    for name in ["forms.pth", "forms_legacy.pth"] {
        let file = open(name);
        let transposed = (0..6).flat_map(|c| (0..4).map(move |r| 6 * r + c));
        assert_eq!(file.shape("transposed"), Some(&[6, 4][..]));
        assert_eq!(values(&file, "transposed"), eighths(transposed), "{name}");
        assert_eq!(values(&file, "row"), eighths(12..18), "{name}");
        let strided = (0..24).filter(|i| i % 2 == 1);
        assert_eq!(values(&file, "strided"), eighths(strided), "{name}");
        for whole in ["half", "bfloat16", "double"] {
            assert_eq!(values(&file, whole), eighths(0..24), "{name} {whole}");
        }
        assert_eq!(values(&file, "parameter"), eighths(8..32), "{name}");
        assert_eq!(file.shape("empty"), Some(&[0, 3][..]));
        assert!(values(&file, "empty").is_empty(), "{name}");
        assert_eq!(values(&file, "scalar"), [3.5], "{name}");
        let message = file.read("int").unwrap_err().to_string();
        assert!(
            message.contains("\"int\" has elements of type I32"),
            "{message}"
        );
    }
}

#[test]
fn the_network_is_found_beside_its_optimiser() {
    for name in ["nested.pth", "nested_legacy.pth"] {
        let file = open(name);
        assert_eq!(file.group(), Some("state_dict"));
        assert_eq!(file.others(), ["epoch", "arch", "best_prec1", "optimizer"]);
        assert_eq!(file.shape("module.0.weight"), Some(&[2, 2][..]));
        assert_eq!(file.tensors().count(), 7);
    }
}

#[test]
fn what_is_no_dictionary_of_tensors_is_refused_by_name() {
    for (name, part) in [
        ("module.pth", "torch.nn.modules.container.Sequential"),
        ("module_legacy.pth", "torch.nn.modules.container.Sequential"),
        ("namespace.pth", "argparse.Namespace"),
        ("negated.pth", "negated or conjugated"),
        ("nothing.pth", "holds no tensors by name"),
        ("none.pth", "cannot be read"),
        ("", "is not a file"),
    ] {
        let message = refusal(name);
        assert!(
            message.contains(part) && message.contains("checkpoints"),
            "{name}: {message}"
        );
    }
}

/// A network with the authors' head on few channels, so that it is small.
fn isqrt(backbone: &str, reduction: usize, classes: usize) -> ModelSpec {
    let mut spec = ModelSpec::named(&format!("{backbone}+isqrt"), classes).unwrap();
    spec.backbone = spec.backbone.with("reduction", reduction);
    if !spec.classifier.is_linear() {
        spec.classifier.hidden = vec![64, 64];
        spec.classifier.dropout = 0.0;
    }
    spec
}

fn network(spec: &ModelSpec, seed: u64) -> Network {
    Network::new(spec, seed, DType::F32, &Device::Cpu).unwrap()
}

/// Names and shapes of all that a checkpoint of a network has.
fn shapes(network: &Network) -> Vec<(String, Vec<usize>)> {
    let parameters = network.vars().parameters();
    let parameters = parameters.map(|(name, var)| (name.to_owned(), var.dims().to_vec()));
    let buffers = network.vars().buffers();
    let buffers = buffers.map(|(name, buffer)| (name.to_owned(), buffer.get().dims().to_vec()));
    parameters.chain(buffers).collect()
}

/// Values that follow from the names, as tools/golden/checkpoints.py makes them, under other names.
fn renamed(network: &Network, theirs: impl Fn(&str) -> String) -> Vec<(String, Tensor)> {
    let shapes = shapes(network).into_iter();
    shapes
        .map(|(name, shape)| {
            let name = theirs(&name);
            let value = weights(&name, &shape).to_dtype(DType::F32).unwrap();
            (name, value)
        })
        .collect()
}

/// A file of them, with a counter of batches as PyTorch has them.
fn write_hashed(network: &Network, theirs: impl Fn(&str) -> String, wrap: &str, path: &Path) {
    let mut tensors = renamed(network, theirs);
    let count = Tensor::new(1.0_f32, &Device::Cpu).unwrap();
    tensors.push(("bn1.num_batches_tracked".to_owned(), count));
    for (name, _) in &mut tensors {
        *name = format!("{wrap}{name}");
    }
    checkpoint::write(tensors, HashMap::new(), path).unwrap();
}

/// The authors' and torchvision's name of one of ours, written down apart from the library.
fn theirs_of_resnet(name: &str) -> String {
    name.replace("backbone.", "").replace("classifier.", "fc.")
}

fn theirs_of_chain(name: &str, places: [&str; 3]) -> String {
    name.replace(
        "backbone.layer_reduce_bn.",
        "representation.conv_dr_block.1.",
    )
    .replace("backbone.layer_reduce.", "representation.conv_dr_block.0.")
    .replace("backbone.", "")
    .replace("classifier.hidden0.", places[0])
    .replace("classifier.hidden1.", places[1])
    .replace("classifier.weight", &format!("{}weight", places[2]))
    .replace("classifier.bias", &format!("{}bias", places[2]))
}

fn scalar(x: &Tensor) -> f64 {
    x.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn weights_of_others_give_their_logits_and_gradients() {
    let golden = Golden::load("tests/golden/checkpoints/nets").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let vgg =
        |name: &str| theirs_of_chain(name, ["classifier.0.", "classifier.3.", "classifier.6."]);
    let alex =
        |name: &str| theirs_of_chain(name, ["classifier.1.", "classifier.4.", "classifier.6."]);
    let mut alexnet = ModelSpec::named("alexnet", 5).unwrap();
    alexnet.classifier.hidden = vec![64, 64];
    alexnet.classifier.dropout = 0.0;
    let lower = Some(Triangle::Lower);
    type Theirs<'a> = &'a dyn Fn(&str) -> String;
    type Case<'a> = (
        &'a str,
        ModelSpec,
        Theirs<'a>,
        &'a str,
        Option<Triangle>,
        [usize; 2],
    );
    let cases: [Case; 4] = [
        (
            "resnet50",
            ModelSpec::named("resnet50", 5).unwrap(),
            &theirs_of_resnet,
            "",
            None,
            [64, 96],
        ),
        (
            "mpncovresnet50",
            isqrt("resnet50", 32, 5),
            &theirs_of_resnet,
            "",
            lower,
            [64, 96],
        ),
        (
            "mpncovvgg16_bn",
            isqrt("vgg16_bn", 32, 5),
            &vgg,
            "module.",
            None,
            [64, 96],
        ),
        ("alexnet", alexnet, &alex, "", None, [96, 96]),
    ];
    for (key, spec, theirs, wrap, triangle, [height, width]) in cases {
        let path = folder.path().join("network.pth");
        write_hashed(&network(&spec, 1), theirs, wrap, &path);
        let options = LoadOptions {
            triangle,
            partial: false,
        };
        // In f64 all but the last digits; in f32 what f32 has, and gradients with the statistics
        // of the file, since those of a small batch magnify rounding.
        for (dtype, mode, tolerances) in [
            (DType::F64, Mode::Train, (1e-9, 1e-8)),
            (DType::F64, Mode::Frozen, (1e-9, 1e-8)),
            (DType::F32, Mode::Frozen, (1e-4, 1e-3)),
        ] {
            let mut network = Network::new(&spec, 1, dtype, &Device::Cpu).unwrap();
            let report = checkpoint::load(&mut network, &path, &options).unwrap();
            assert!(
                report.is_complete() && report.counters == 1,
                "{key}: {report:?}"
            );
            network.vars().set_step(0);

            let images = hashed("images", &[2, 3, height, width]);
            let images = images.to_dtype(dtype).unwrap();
            let logits = network.forward(&images, mode).unwrap();
            let kind = if mode == Mode::Train { "train" } else { "eval" };
            let known = golden[&format!("{key}.{kind}")].to_dtype(dtype).unwrap();
            let largest = scalar(&known.abs().unwrap().max_all().unwrap());
            assert_close!(&logits, known, rtol = 0.0, atol = tolerances.0 * largest);

            let loss = cross_entropy(&logits, &[0, 1], 0.0).unwrap();
            let gradients = loss.backward().unwrap();
            let prefix = format!("{key}.{kind}.gradient.");
            let norms = golden.names().filter(|name| name.starts_with(&prefix));
            let norms = norms.map(|name| scalar(&golden[name].get(0).unwrap()));
            let largest = norms.fold(0.0, f64::max);
            for (name, var) in network.vars().parameters() {
                let name = theirs(name);
                let found = gradients.get(var.as_tensor()).unwrap();
                let mut found = found.to_dtype(DType::F64).unwrap();
                if triangle == lower && name == "fc.weight" {
                    found = to_lower(&found, 32);
                }
                let known: Vec<f64> = golden[&format!("{prefix}{name}")].to_vec1().unwrap();
                let norm = scalar(&found.sqr().unwrap().sum_all().unwrap()).sqrt();
                let probe = hashed(&format!("{name}.probe"), var.dims());
                let product = scalar(&(&found * probe).unwrap().sum_all().unwrap());
                // Biases before batch norm have the gradient 0, but for rounding.
                let bound = tolerances.1 * (known[0] + 1e-3 * largest);
                for (found, known) in [(norm, known[0]), (product, known[1])] {
                    let off = (found - known).abs();
                    assert!(
                        off <= bound,
                        "{key} {mode:?} {dtype:?} {name}: {found}, {known}"
                    );
                }
            }
        }
    }
}

/// Columns from the upper triangle's order to the lower one's.
fn to_lower(weight: &Tensor, n: usize) -> Tensor {
    let place =
        |row: usize, column: usize| row * n - row * row.saturating_sub(1) / 2 + column - row;
    let columns: Vec<u32> = (0..n)
        .flat_map(|row| (0..=row).map(move |column| place(column, row) as u32))
        .collect();
    let columns = Tensor::new(columns, &Device::Cpu).unwrap();
    weight.index_select(&columns, 1).unwrap()
}

#[test]
fn the_order_of_the_triangle_is_asked_for_and_never_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("released.pth");
    let spec = isqrt("resnet18", 4, 3);
    let mut network = network(&spec, 1);
    write_hashed(&network, theirs_of_resnet, "", &path);
    let message = network.load(&path).unwrap_err().to_string();
    assert!(
        message.contains("upper") && message.contains("lower"),
        "{message}"
    );

    let mut load = |triangle| {
        let options = LoadOptions {
            triangle: Some(triangle),
            partial: false,
        };
        checkpoint::load(&mut network, &path, &options).unwrap();
        let weight = network
            .vars()
            .parameters()
            .find(|(name, _)| *name == "classifier.weight");
        weight.unwrap().1.as_detached_tensor().copy().unwrap()
    };
    let (upper, lower) = (load(Triangle::Upper), load(Triangle::Lower));
    let known = weights("fc.weight", &[3, 10]).to_dtype(DType::F32).unwrap();
    assert_close!(&upper, &known, atol = 0.0);
    // Rows of the lower triangle: 00 10 11 20 21 22 30 31 32 33.
    let order = Tensor::new(&[0_u32, 1, 3, 6, 2, 4, 7, 5, 8, 9], &Device::Cpu).unwrap();
    assert_close!(lower, known.index_select(&order, 1).unwrap(), atol = 0.0);
    assert_close!(to_lower(&load(Triangle::Lower), 4), known, atol = 0.0);

    // Files of main.py have but one order, and say so.
    let none = Record::default();
    let trained = folder.path().join("trained.pth");
    checkpoint::export(&network, &trained, "trained", Triangle::Upper, &none).unwrap();
    network.load(&trained).unwrap();
    let options = LoadOptions {
        triangle: Some(Triangle::Lower),
        partial: false,
    };
    let message = checkpoint::load(&mut network, &trained, &options)
        .unwrap_err()
        .to_string();
    assert!(message.contains("upper order, not the lower"), "{message}");
    let error =
        checkpoint::export(&network, &trained, "trained", Triangle::Lower, &none).unwrap_err();
    assert!(error.to_string().contains("the lower order"), "{error}");
    // A file that we wrote under other names tells its order.
    let told = folder.path().join("told.safetensors");
    checkpoint::export(&network, &told, "flat", Triangle::Lower, &none).unwrap();
    network.load(&told).unwrap();
}

#[test]
fn every_layout_is_written_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let images = randn((2, 3, 64, 64), 1, DType::F32).unwrap();
    for (spec, layouts) in [
        (
            isqrt("resnet18", 4, 3),
            &["isqrt", "flat", "trained", "fine-tuned"][..],
        ),
        (isqrt("vgg16_bn", 4, 3), &["isqrt", "torchvision", "timm"]),
        (isqrt("alexnet", 4, 3), &["isqrt", "torchvision"]),
        (
            isqrt("mobilenet_v2", 8, 3),
            &["isqrt", "torchvision", "timm"],
        ),
    ] {
        let first = network(&spec, 1);
        let expected = first.forward(&images, Mode::Eval).unwrap();
        for layout in layouts {
            for name in ["a.pth", "a.pt", "a.PTH.tar", "a.safetensors"] {
                let path = folder.path().join(name);
                let written =
                    checkpoint::export(&first, &path, layout, Triangle::Upper, &Record::default())
                        .unwrap();
                let mut second = network(&spec, 2);
                let options = LoadOptions {
                    triangle: Some(Triangle::Upper),
                    partial: false,
                };
                let report = checkpoint::load(&mut second, &path, &options).unwrap();
                assert_eq!((written.name, report.layout), (*layout, *layout));
                let found = second.forward(&images, Mode::Eval).unwrap();
                assert_close!(found, &expected, atol = 0.0);
                let file = Checkpoint::open(&path).unwrap();
                assert_eq!(
                    checkpoint::classes(&file, &spec).unwrap(),
                    Some(3),
                    "{layout}"
                );
            }
        }
    }
    let network = network(&isqrt("resnet18", 4, 3), 1);
    let path = folder.path().join("a.pth");
    let error = checkpoint::export(
        &network,
        &path,
        "keras",
        Triangle::Upper,
        &Record::default(),
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("flat, trained, fine-tuned"),
        "{error}"
    );
}

#[test]
fn every_name_is_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let spec = ModelSpec::new("resnet18", RepresentationSpec::new("gap"), 3);
    let mut network = network(&spec, 1);
    let mut tensors = renamed(&network, theirs_of_resnet);
    let place = |tensors: &[(String, Tensor)], name: &str| {
        tensors.iter().position(|(other, _)| other == name).unwrap()
    };
    let at = place(&tensors, "layer1.0.conv1.weight");
    tensors[at].0 = "layer1.0.conv_1.weight".to_owned();
    let at = place(&tensors, "fc.weight");
    tensors[at].1 = hashed("fc.weight", &[7, 512]);
    tensors.push(("teacher.weight".to_owned(), hashed("teacher.weight", &[2])));
    checkpoint::write(tensors, HashMap::new(), &path).unwrap();

    let before = network
        .vars()
        .parameters()
        .next()
        .unwrap()
        .1
        .as_detached_tensor();
    let message = network.load(&path).unwrap_err().to_string();
    for part in [
        "missing: backbone.layer1.0.conv1.weight (looked for as layer1.0.conv1.weight); nearest unused: \
         layer1.0.conv_1.weight",
        "shape: fc.weight is [7, 512], the network needs [3, 512]",
        "unused: teacher.weight",
        "100 taken, 1 missing, 1 of another shape, 2 unused",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let after = network
        .vars()
        .parameters()
        .next()
        .unwrap()
        .1
        .as_detached_tensor();
    assert_close!(after, before, atol = 0.0);

    let options = LoadOptions {
        partial: true,
        ..LoadOptions::default()
    };
    let report = checkpoint::load(&mut network, &path, &options).unwrap();
    assert_eq!(
        (report.taken, report.lines().len(), report.layout),
        (100, 4, "flat")
    );

    // Nothing of another network fits, whatever is allowed.
    let error = checkpoint::load(&mut network, &small("archive.pth"), &options).unwrap_err();
    assert!(
        error.to_string().contains("has no tensor of resnet18+gap"),
        "{error}"
    );
}

#[test]
fn our_files_tell_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let backbone = BackboneSpec::new("resnet18").with("last_stride", 1);
    let spec = ModelSpec::new(
        backbone,
        RepresentationSpec::new("isqrt").with("iterations", 3),
        4,
    );
    let record = Record {
        preprocessing: Some(Preprocessing::IMAGENET),
        pipeline: Some(serde_json::json!({ "steps": [] })),
        classes: vec!["a \"quoted\" name".to_owned(), "père".to_owned()],
        training: Some(serde_json::json!({ "epochs": 60, "top1_error": 22.14 })),
    };
    checkpoint::save(&network(&spec, 1), &path, &record).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint::model(&file).unwrap(), Some(spec));
    assert_eq!(checkpoint::record(&file).unwrap(), record);
    assert_eq!(checkpoint::model(&open("archive.pth")).unwrap(), None);

    // Nothing is left of a file that cannot be written.
    let absent = folder.path().join("no/such/folder/a.safetensors");
    let error = checkpoint::save(&network(&isqrt("resnet18", 4, 3), 1), &absent, &record);
    assert!(error.unwrap_err().to_string().contains("cannot be written"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_network_in_f64_takes_weights_in_f16() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let spec = ModelSpec::new("e10net", RepresentationSpec::new("gap"), 3);
    let first = network(&spec, 1);
    let parameters = first.vars().parameters();
    let buffers = first.vars().buffers();
    let half = |value: Tensor| value.to_dtype(DType::F16).unwrap();
    let tensors = parameters
        .map(|(name, var)| (name.to_owned(), half(var.as_detached_tensor())))
        .chain(buffers.map(|(name, buffer)| (name.to_owned(), half(buffer.get()))));
    checkpoint::write(tensors.collect(), HashMap::new(), &path).unwrap();
    let mut second = Network::new(&spec, 2, DType::F64, &Device::Cpu).unwrap();
    second.load(&path).unwrap();
    let pairs = first.vars().parameters().zip(second.vars().parameters());
    for ((_, known), (_, found)) in pairs {
        let known: Tensor = Var::as_detached_tensor(known).to_dtype(DType::F64).unwrap();
        assert_close!(found.as_tensor(), known, rtol = 1e-3, atol = 1e-6);
    }
}

#[test]
fn one_odd_tensor_does_not_spoil_the_others() {
    let file = open("expanded.pth");
    assert_eq!(values(&file, "good"), eighths(0..24));
    let message = file.read("wide").unwrap_err().to_string();
    assert!(message.contains("\"wide\" has the shape [10]"), "{message}");
}

/// zip's search for archives within other files takes names of 21 characters for one.
#[test]
fn archives_of_any_name_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(small("archive.pth")).unwrap();
    let mut source = zip::ZipArchive::new(std::io::Cursor::new(whole)).unwrap();
    for length in 1..=64 {
        let path = folder.path().join("a.pth");
        let mut target = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        for i in 0..source.len() {
            let mut entry = source.by_index(i).unwrap();
            let name = entry.name().unwrap().split_once('/').unwrap().1.to_owned();
            let options = zip::write::SimpleFileOptions::default()
                .compression_method(zip::CompressionMethod::Stored);
            let name = format!("{}/{name}", "r".repeat(length));
            target.start_file(name, options).unwrap();
            std::io::copy(&mut entry, &mut target).unwrap();
        }
        target.finish().unwrap();
        let file = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{length}: {e}"));
        assert_eq!(values(&file, "a.weight"), eighths(0..24));
    }
    // As torch writes them, with the records of 64-bit archives.
    for name in ["archive21_characters_.pth", "archive.pth"] {
        assert_eq!(values(&open(name), "a.weight"), eighths(0..24), "{name}");
    }
}

/// Whatever a file has, the network is as before where it is refused.
#[test]
fn doubtful_values_and_names_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let spec = ModelSpec::new("e10net", RepresentationSpec::new("gap"), 3);
    let mut network = network(&spec, 1);
    let good = renamed(&network, str::to_owned);
    let with = |name: &str, value: Tensor| {
        let mut tensors = good.clone();
        tensors.retain(|(other, _)| other != name);
        tensors.push((name.to_owned(), value));
        tensors
    };
    let device = &Device::Cpu;
    let nan = Tensor::new(&[0.0, f64::NAN, 1.0], device).unwrap();
    let large = Tensor::new(&[0.0, 1e300, 1.0], device).unwrap();
    let bytes = Tensor::new(&[1_u8, 2, 3], device).unwrap();
    let bias = weights("classifier.bias", &[3]);
    for (tensors, part) in [
        (
            with("classifier.bias", nan),
            "\"classifier.bias\" that are not finite",
        ),
        // Infinite in the network's f32.
        (
            with("classifier.bias", large),
            "\"classifier.bias\" that are not finite",
        ),
        (with("classifier.bias", bytes), "of type U8"),
        (
            with("module.classifier.bias", bias),
            "both \"classifier.bias\" and \"module.",
        ),
    ] {
        checkpoint::write(tensors, HashMap::new(), &path).unwrap();
        let before: Vec<f32> = network
            .vars()
            .parameters()
            .next()
            .unwrap()
            .1
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let message = network.load(&path).unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
        let after: Vec<f32> = network
            .vars()
            .parameters()
            .next()
            .unwrap()
            .1
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(before, after);
    }
    let spec = isqrt("resnet18", 4, 3);
    let order = HashMap::from([("isqrt.triangle".to_owned(), "Lower".to_owned())]);
    let mut network = Network::new(&spec, 1, DType::F32, device).unwrap();
    checkpoint::write(renamed(&network, theirs_of_resnet), order, &path).unwrap();
    let message = network.load(&path).unwrap_err().to_string();
    assert!(message.contains("\"Lower\" of triangles"), "{message}");
}

/// Numbers in a file ask for no memory: a network is not larger than its file.
#[test]
fn a_network_is_not_larger_than_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let spec = ModelSpec::new("resnet18", RepresentationSpec::new("gap"), 1 << 22);
    let metadata = HashMap::from([(
        "isqrt.model".to_owned(),
        serde_json::to_string(&spec).unwrap(),
    )]);
    let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    checkpoint::write(
        vec![("classifier.bias".to_owned(), tensor)],
        metadata,
        &path,
    )
    .unwrap();
    let file = Checkpoint::open(&path).unwrap();
    let told = checkpoint::model(&file).unwrap().unwrap();
    let error = checkpoint::network(&file, &told, &LoadOptions::default());
    let message = error.err().unwrap().to_string();
    assert!(
        message.contains("more values than there may be"),
        "{message}"
    );

    let empty = Tensor::zeros((2_000_000, 0), DType::F32, &Device::Cpu).unwrap();
    checkpoint::write(vec![("fc.weight".to_owned(), empty)], HashMap::new(), &path).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint::classes(&file, &spec).unwrap(), None);
}

#[test]
fn files_have_the_usual_rights_and_links_stay() {
    let folder = tempfile::tempdir().unwrap();
    let spec = ModelSpec::new("e10net", RepresentationSpec::new("gap"), 3);
    let network = network(&spec, 1);
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    let path = folder.path().join("a.safetensors");
    network.save(&path).unwrap();
    let rights = |path: &Path| std::fs::metadata(path).unwrap().permissions();
    assert_eq!(rights(&path), rights(&plain));
    // A header of this length begins with the letters of an archive.
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut long = 0x4B50_u64.to_le_bytes().to_vec();
    long.extend_from_slice(&bytes[8..8 + header]);
    long.resize(8 + 0x4B50, b' ');
    long.extend_from_slice(&bytes[8 + header..]);
    std::fs::write(&path, long).unwrap();
    assert_eq!(
        checkpoint::model(&Checkpoint::open(&path).unwrap()).unwrap(),
        Some(spec)
    );

    #[cfg(unix)]
    {
        let link = folder.path().join("link.safetensors");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        network.save(&link).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(Checkpoint::open(&path).is_ok());
    }
    let message = network
        .save(&folder.path().join("a.bin"))
        .unwrap_err()
        .to_string();
    assert!(message.contains("name it .safetensors"), "{message}");
}

/// Whatever has been put before all names.
#[test]
fn names_within_another_object_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pt");
    let spec = ModelSpec::new("resnet20", RepresentationSpec::new("gap"), 3);
    let mut network = network(&spec, 1);
    for prefix in ["model.", "module.", "_orig_mod.", "encoder."] {
        let theirs = |name: &str| format!("{prefix}{}", theirs_of_resnet(name));
        checkpoint::write(renamed(&network, theirs), HashMap::new(), &path).unwrap();
        let report = checkpoint::load(&mut network, &path, &LoadOptions::default()).unwrap();
        assert!(report.is_complete(), "{prefix}");
        let file = Checkpoint::open(&path).unwrap();
        assert_eq!(
            checkpoint::classes(&file, &spec).unwrap(),
            Some(3),
            "{prefix}"
        );
    }
}

/// timm's hidden layers are convolutions over whole maps.
#[test]
fn layers_are_written_with_the_shapes_that_they_have_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    let mut spec = ModelSpec::named("vgg11", 3).unwrap();
    spec.classifier.hidden = vec![8, 8];
    let network = network(&spec, 1);
    checkpoint::export(&network, &path, "timm", Triangle::Upper, &Record::default()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(
        file.shape("pre_logits.fc1.weight"),
        Some(&[8, 512, 7, 7][..])
    );
    assert_eq!(file.shape("pre_logits.fc2.weight"), Some(&[8, 8, 1, 1][..]));
    assert_eq!(file.shape("head.fc.weight"), Some(&[3, 8][..]));
}
