//! The real binary with weights: convert, features, classify.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::e10;
use isqrt_models::checkpoint::{self, Preprocessing, Record, Triangle};
use isqrt_models::{ModelSpec, Network};
use isqrt_nn::Mode;

struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    /// `own.safetensors` and `released.pth` (lower triangles) of `e10net+isqrt`, and `photos` with
    /// ten images.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scene = Self { folder };
        let network = scene.network();
        let record = Record {
            preprocessing: Some(Preprocessing {
                resize: 32,
                crop: 32,
                ..Preprocessing::IMAGENET
            }),
            pipeline: None,
            classes: ["elk", "fox", "gnu", "hen"].map(str::to_owned).to_vec(),
            training: Some(serde_json::json!({ "epochs": 3 })),
        };
        checkpoint::save(&network, &scene.at("own.safetensors"), &record).unwrap();
        let path = scene.at("released.pth");
        checkpoint::export(&network, &path, "flat", Triangle::Lower, &Record::default()).unwrap();
        let sizes = e10::Sizes {
            train: 1,
            val: 1,
            test: 1,
        };
        e10::generate(&scene.at("photos"), 1, sizes).unwrap();
        scene
    }

    fn network(&self) -> Network {
        let spec = ModelSpec::named("e10net+isqrt", 4).unwrap();
        Network::new(&spec, 3, DType::F32, &Device::Cpu).unwrap()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_isqrt"))
            .args(words)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Standard output of a command that succeeds.
    fn good(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{words:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line of a command that fails, which says all of `parts`.
    fn bad(&self, words: &[&str], parts: &[&str]) {
        let output = self.run(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}

fn weights(path: &Path) -> Vec<f32> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let weight = &tensors["classifier.weight"];
    weight.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn convert_there_and_back() {
    let scene = Scene::new();
    let known = weights(&scene.at("own.safetensors"));
    scene.bad(
        &["convert", "released.pth", "a.safetensors"],
        &["--model", "released.pth"],
    );
    let model = [
        "convert",
        "released.pth",
        "a.safetensors",
        "--model",
        "e10net+isqrt",
    ];
    scene.bad(&model, &["upper", "lower", "chance"]);
    assert!(!scene.at("a.safetensors").exists());

    let text = scene.good(&[&model[..], &["--triangle", "lower"]].concat());
    assert!(
        text.contains("4 classes") && text.contains("layout flat"),
        "{text}"
    );
    assert_eq!(weights(&scene.at("a.safetensors")), known);
    scene.good(&[&model[..], &["--triangle", "upper"]].concat());
    assert_ne!(weights(&scene.at("a.safetensors")), known);

    // Ours to ours keeps what it tells of itself.
    scene.good(&["convert", "own.safetensors", "b.safetensors"]);
    let [first, second] = ["own.safetensors", "b.safetensors"]
        .map(|name| checkpoint::Checkpoint::open(&scene.at(name)).unwrap());
    assert_eq!(
        checkpoint::record(&first).unwrap(),
        checkpoint::record(&second).unwrap()
    );
    assert_eq!(
        checkpoint::model(&first).unwrap(),
        checkpoint::model(&second).unwrap()
    );

    scene.bad(&["convert", "own.safetensors", "c.pth"], &["--to"]);
    scene.bad(
        &["convert", "own.safetensors", "c.pth", "--to", "keras"],
        &["keras", "flat"],
    );
    let to = [
        "convert",
        "own.safetensors",
        "c.pth",
        "--to",
        "flat",
        "--to-triangle",
        "lower",
    ];
    scene.good(&to);
    let [released, again] =
        ["released.pth", "c.pth"].map(|name| std::fs::read(scene.at(name)).unwrap());
    assert!(released == again);

    // Another number of classes, or another network.
    let other = [
        "convert",
        "own.safetensors",
        "d.safetensors",
        "--classes",
        "9",
    ];
    scene.bad(
        &other,
        &["classifier.weight is [4, 528], the network needs [9, 528]"],
    );
    let partial = scene.run(&[&other[..], &["--partial", "--json"]].concat());
    assert!(partial.status.success());
    assert_eq!(
        String::from_utf8(partial.stderr).unwrap().lines().count(),
        2
    );
    let row: serde_json::Value = serde_json::from_slice(&partial.stdout).unwrap();
    assert_eq!((&row["misshapen"], &row["classes"]), (&2.into(), &9.into()));
    std::fs::write(scene.at("junk.pth"), b"junk").unwrap();
    scene.bad(
        &[
            "convert",
            "junk.pth",
            "e.safetensors",
            "--model",
            "resnet18",
        ],
        &["junk.pth", "neither"],
    );
}

#[test]
fn features_are_those_of_the_network() {
    let scene = Scene::new();
    let run = [
        "features",
        "--weights",
        "own.safetensors",
        "--images",
        "photos/train",
    ];
    let text = scene.good(&[&run[..], &["--out", "f.safetensors", "--batch", "4"]].concat());
    assert!(
        text.contains("10 images, 528 values and 4 logits"),
        "{text}"
    );
    let file = candle_core::safetensors::load(scene.at("f.safetensors"), &Device::Cpu).unwrap();
    let names: Vec<u8> = file["images"].to_vec1().unwrap();
    let names = String::from_utf8(names).unwrap();
    assert_eq!(names.lines().count(), 10);

    let network = scene.network();
    let images: Vec<Tensor> = names
        .lines()
        .map(|name| {
            let image = isqrt_datasets::decode_file(&scene.at(name)).unwrap();
            let pixels = Tensor::new(image.pixels, &Device::Cpu).unwrap();
            let pixels = pixels
                .reshape((32, 32, 3))
                .unwrap()
                .permute((2, 0, 1))
                .unwrap();
            let row = |values: [f32; 3]| {
                Tensor::new(&values, &Device::Cpu)
                    .unwrap()
                    .reshape((3, 1, 1))
            };
            let Preprocessing { mean, std, .. } = Preprocessing::IMAGENET;
            let pixels = (pixels.to_dtype(DType::F32).unwrap() / 255.0).unwrap();
            let pixels = pixels.broadcast_sub(&row(mean).unwrap()).unwrap();
            pixels.broadcast_div(&row(std).unwrap()).unwrap()
        })
        .collect();
    let images = Tensor::stack(&images, 0).unwrap();
    let representation = network.represent(&images, Mode::Eval).unwrap();
    let logits = network.forward(&images, Mode::Eval).unwrap();
    for (name, known) in [("representation", representation), ("logits", logits)] {
        assert_eq!(file[name].dims(), known.dims());
        let off = (&file[name] - known).unwrap().abs().unwrap();
        let off: f32 = off.max_all().unwrap().to_scalar().unwrap();
        assert!(off < 1e-5, "{name}: {off}");
    }

    // A list has its own order; a bad image leaves nothing.
    std::fs::write(
        scene.at("list.txt"),
        names.lines().rev().collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    let list = [
        "features",
        "--weights",
        "own.safetensors",
        "--images",
        "list.txt",
    ];
    scene.good(&[&list[..], &["--out", "g.safetensors"]].concat());
    let reversed = candle_core::safetensors::load(scene.at("g.safetensors"), &Device::Cpu).unwrap();
    let first = |file: &Tensor, row| file.get(row).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(first(&reversed["logits"], 9), first(&file["logits"], 0));
    std::fs::write(scene.at("photos/train/zz.jpg"), b"no image").unwrap();
    scene.bad(
        &[&run[..], &["--out", "h.safetensors"]].concat(),
        &["zz.jpg"],
    );
    let left = std::fs::read_dir(scene.folder.path()).unwrap();
    assert!(
        left.map(|e| e.unwrap().file_name())
            .all(|n| !n.to_str().unwrap().starts_with("h."))
    );
}

#[test]
fn classify_prints_the_most_probable_classes() {
    let scene = Scene::new();
    let run = [
        "classify",
        "--weights",
        "own.safetensors",
        "--images",
        "photos/test",
    ];
    let text = scene.good(&[&run[..], &["--json", "--top", "3"]].concat());
    let rows: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 10);
    for row in &rows {
        let top: Vec<f64> = row["top"]
            .as_array()
            .unwrap()
            .iter()
            .map(|class| class["probability"].as_f64().unwrap())
            .collect();
        assert!(top.len() == 3 && top.is_sorted_by(|a, b| a >= b), "{row}");
        assert!(top.iter().sum::<f64>() < 1.0, "{row}");
    }
    // Names are those of the weights, or others.
    let class = rows[0]["top"][0]["class"].as_u64().unwrap() as usize;
    let own = ["elk", "fox", "gnu", "hen"][class];
    assert_eq!(rows[0]["top"][0]["name"], own);
    std::fs::write(scene.at("names.txt"), "ant\nbee\ncat\ndog\n").unwrap();
    let text = scene.good(&[&run[..], &["--labels", "names.txt"]].concat());
    let first = text.lines().nth(1).unwrap();
    assert!(
        first.ends_with(["ant", "bee", "cat", "dog"][class]),
        "{text}"
    );

    // A pipeline that is none.
    let record = Record {
        pipeline: Some(serde_json::json!({ "steps": [{ "step": "fold" }] })),
        ..Record::default()
    };
    checkpoint::save(&scene.network(), &scene.at("odd.safetensors"), &record).unwrap();
    let odd = [
        "classify",
        "--weights",
        "odd.safetensors",
        "--images",
        "photos/test",
    ];
    scene.bad(&odd, &["odd.safetensors", "pipeline", "fold"]);

    // A broken image keeps nobody from the others.
    std::fs::write(scene.at("photos/test/broken.png"), "no image").unwrap();
    // With batches of one, one batch has none.
    let output = scene.run(&[&run[..], &["--batch", "1"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("photos/test").count(), 10, "{text}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("broken.png"), "{said}");
    assert!(
        said.ends_with("1 of 11 images could not be decoded\n"),
        "{said}"
    );
    std::fs::remove_file(scene.at("photos/test/broken.png")).unwrap();
    std::fs::write(scene.at("names.txt"), "ant\n").unwrap();
    scene.bad(
        &[&run[..], &["--labels", "names.txt"]].concat(),
        &["1 lines", "4 classes"],
    );
    scene.bad(
        &[&run[..], &["--crop", "64", "--resize", "32"]].concat(),
        &["64", "32"],
    );
    scene.bad(
        &[
            "classify",
            "--weights",
            "none.pth",
            "--images",
            "photos",
            "--model",
            "resnet18",
        ],
        &["none.pth"],
    );
}

#[test]
fn what_is_read_is_never_written_over_and_specs_are_not_overruled() {
    let scene = Scene::new();
    let before = std::fs::read(scene.at("own.safetensors")).unwrap();
    let own = "own.safetensors";
    scene.bad(
        &["convert", own, own, "--to", "flat"],
        &["over the file that is read"],
    );
    let features = [
        "features",
        "--weights",
        own,
        "--images",
        "photos/train",
        "--out",
    ];
    scene.bad(
        &[&features[..], &[own]].concat(),
        &["over the file that is read"],
    );
    scene.bad(
        &[&features[..], &["f.pth"]].concat(),
        &["f.pth", "safetensors"],
    );
    assert_eq!(std::fs::read(scene.at(own)).unwrap(), before);

    let other = [
        "classify",
        "--weights",
        own,
        "--images",
        "photos/test",
        "--model",
        "e10net+cov",
    ];
    scene.bad(&other, &["e10net + isqrt", "leave --model out"]);
    scene.good(&[&other[..6], &["e10net+isqrt"]].concat());

    // Without a word from the file, small images stay small.
    scene.good(&["convert", own, "f.pth", "--to", "flat"]);
    let plain = [
        "features",
        "--weights",
        "f.pth",
        "--images",
        "photos/test",
        "--triangle",
        "upper",
    ];
    let plain = [&plain[..], &["--model", "e10net+isqrt", "--out"]].concat();
    scene.good(&[&plain[..], &["a.safetensors"]].concat());
    scene.good(
        &[
            &plain[..],
            &["b.safetensors", "--resize", "32", "--crop", "32"],
        ]
        .concat(),
    );
    let [a, b] = ["a", "b"].map(|n| std::fs::read(scene.at(&format!("{n}.safetensors"))).unwrap());
    assert!(a == b);

    // A spec of one's own, whose classes stand.
    std::fs::write(
        scene.at("spec.toml"),
        "backbone = \"e10net\"\nrepresentation = { name = \"isqrt\" }\nclasses = 9\n",
    )
    .unwrap();
    let spec = [
        "convert",
        "f.pth",
        "g.safetensors",
        "--model",
        "spec.toml",
        "--triangle",
        "upper",
    ];
    scene.bad(&spec, &["network needs [9, 528]"]);
    let text = scene.good(&[&spec[..], &["--partial"]].concat());
    assert!(text.contains("9 classes"), "{text}");
    // A classifier that was not taken has no names.
    let other = [
        "convert",
        own,
        "h.safetensors",
        "--classes",
        "5",
        "--partial",
    ];
    scene.good(&other);
    let classes = |name| {
        let file = checkpoint::Checkpoint::open(&scene.at(name)).unwrap();
        checkpoint::record(&file).unwrap().classes.len()
    };
    assert_eq!((classes(own), classes("h.safetensors")), (4, 0));
    let text = scene.good(&["models", "spec.toml", "--json"]);
    assert!(text.contains("classifier"), "{text}");
}
