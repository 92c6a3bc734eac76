//! Every spec under `experiments/` is planned on miniature data in the layout that it is for: what
//! `isqrt train SPEC --dry-run` does.
#![allow(clippy::unwrap_used)]

use isqrt_datasets::miniature;
use isqrt_train::SpecFile;
use isqrt_train::data::RunData;
use isqrt_train::plan::Plan;
use std::path::{Path, PathBuf};

fn specs(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments");
    let mut specs: Vec<PathBuf> = std::fs::read_dir(root.join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    specs.sort();
    assert!(!specs.is_empty());
    specs
}

/// Plans a spec on the miniature of this name.
fn plan(spec: &Path, data: &Path, weights: &Path) -> Plan {
    let text = std::fs::read_to_string(spec).unwrap();
    let mut settings = vec![
        "batch=2".to_owned(),
        format!("data.root={}", data.display()),
    ];
    let file = SpecFile::read(spec, &[]).unwrap();
    if file.spec.data.set.is_some() {
        settings.pop();
    }
    if file.spec.start.is_some() {
        settings.push(format!("start.weights={}", weights.display()));
    }
    let planned = || {
        let file = SpecFile::read(spec, &settings)?;
        let data = RunData::open(&file, None)?;
        Plan::new(&file, &data)
    };
    planned().unwrap_or_else(|error| panic!("{}: {error}\n{text}", spec.display()))
}

fn miniature(dir: &Path, name: &str) -> PathBuf {
    let root = dir.join(name);
    miniature::write(name, &root, &miniature::Options::default()).unwrap();
    root
}

#[test]
fn every_recipe_can_be_planned() {
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("weights.safetensors");
    std::fs::write(&weights, "looked for, not read").unwrap();
    let [imagenet, cub, aircraft, cars] =
        ["imagenet", "cub", "aircraft", "cars"].map(|name| miniature(dir.path(), name));
    let mut dims = std::collections::BTreeMap::new();
    for folder in ["smoke", "imagenet", "finetune"] {
        for spec in specs(folder) {
            let name = spec.file_stem().unwrap().to_string_lossy().into_owned();
            let data = match name.split('-').next().unwrap() {
                "cub" => &cub,
                "aircraft" => &aircraft,
                "cars" => &cars,
                _ => &imagenet,
            };
            let plan = plan(&spec, data, &weights);
            dims.insert(name, (plan.representation, plan.data.input.0));
        }
    }
    // Lengths of representations and sizes of inputs that the paper gives.
    for (name, expected) in [
        ("resnet50-isqrt", (32_896, 224)),
        ("resnet50-gap", (2048, 224)),
        ("alexnet-isqrt", (32_896, 227)),
        ("alexnet-bcnn", (65_536, 227)),
        ("cub-resnet50-isqrt", (32_896, 448)),
        ("cars-resnet50-isqrt-8k", (8256, 448)),
        ("aircraft-resnet50-isqrt-2k", (2080, 448)),
        ("cub-vgg16-bcnn-1", (262_144, 448)),
    ] {
        assert_eq!(dims[name], expected, "{name}");
    }
}
