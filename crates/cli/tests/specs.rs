//! Every spec under `experiments/` is planned on miniature data in the layout that it is for: what
//! `isqrt train SPEC --dry-run` does.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
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
fn plan(spec: &Path, data: &Path) -> Plan {
    let text = std::fs::read_to_string(spec).unwrap();
    let file = SpecFile::read(spec, &[]).unwrap();
    let mut settings = vec![
        format!("batch={}", 2 * file.spec.accumulate),
        format!("data.root={}", data.display()),
    ];
    if file.spec.data.set.is_some() {
        settings.pop();
    }
    let planned = || {
        let file = SpecFile::read(spec, &settings)?;
        let data = RunData::open(&file, None)?;
        Plan::new(&file, &data, &Device::Cpu)
    };
    planned().unwrap_or_else(|error| panic!("{}: {error}\n{text}", spec.display()))
}

/// Numbers of the recipes, from the scripts that `source` in each names: jiangtaoxie/fast-MPN-COV
/// (`train.sh`, `finetune.sh`, `finetune_mpncovvggd16.sh`, `two_stage_finetune.sh`, main.py's defaults) and
/// jiangtaoxie/matconvnet.fast-mpn-cov.
#[test]
fn recipes_are_those_of_the_authors() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments");
    let scratch = "epochs = 65\nbatch = 160\noptimiser.lr = 0.1\noptimiser.weight_decay = 0.0001\n\
                   schedule.kind = \"multi_step\"\nschedule.milestones = [30.0, 45.0, 60.0]\n\
                   schedule.factor = 0.1";
    let matconvnet = "epochs = 60\nbatch = 256\naccumulate = 4\noptimiser.lr = 0.0631\n\
                      optimiser.weight_decay = 0.0001\nschedule.milestones = [30.0, 45.0]";
    let alexnet = "epochs = 20\nbatch = 100\noptimiser.weight_decay = 0.0005\nschedule.from = -1.2\n\
                   schedule.to = -5.2";
    let resnet = "epochs = 100\nbatch = 10\noptimiser.lr = 0.0012\noptimiser.weight_decay = 0.0001\n\
                  schedule.kind = \"constant\"\ngroups[0].lr_factor = 5.0\ngroups[0].decay_factor = 1.0";
    let vgg = "epochs = 40\nbatch = 10\noptimiser.lr = 0.003\noptimiser.weight_decay = 0.0001\n\
               schedule.milestones = [20.0]\ngroups[0].lr_factor = 20.0";
    let bcnn = "epochs = 100\noptimiser.lr = 0.001\noptimiser.weight_decay = 0.0005\n\
                groups[0].lr_factor = 1000.0\ngroups[0].decay_factor = 0.0";
    for (name, wanted) in [
        ("imagenet/resnet50-isqrt", scratch),
        ("imagenet/resnet101-isqrt", scratch),
        ("imagenet/resnet50-isqrt-matconvnet", matconvnet),
        ("imagenet/alexnet-isqrt", alexnet),
        ("finetune/cub-resnet50-isqrt", resnet),
        ("finetune/cars-resnet101-isqrt", resnet),
        ("finetune/aircraft-vgg16-isqrt", vgg),
        ("finetune/cub-vgg16-bcnn-1", bcnn),
        ("finetune/cub-vgg16-bcnn-2", bcnn),
        ("finetune/cub-vgg16-bcnn-1", "batch = 40"),
        ("finetune/cub-vgg16-bcnn-2", "batch = 10"),
    ] {
        let file = SpecFile::read(&root.join(format!("{name}.toml")), &[]).unwrap();
        let spec: toml::Value = toml::from_str(&file.spec.to_toml().unwrap()).unwrap();
        for line in wanted.lines() {
            let (key, value) = line.split_once(" = ").unwrap();
            let found = key
                .split('.')
                .try_fold(&spec, |at, key| match key.strip_suffix("[0]") {
                    Some(key) => at.get(key)?.get(0),
                    None => at.get(key),
                });
            let found = found.map_or_else(|| "nothing".to_owned(), ToString::to_string);
            assert_eq!(found, value, "{name}: {key}");
        }
    }
}

fn miniature(dir: &Path, name: &str) -> PathBuf {
    let root = dir.join(name);
    miniature::write(name, &root, &miniature::Options::default()).unwrap();
    root
}

#[test]
fn every_recipe_can_be_planned() {
    let dir = tempfile::tempdir().unwrap();
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
            let plan = plan(&spec, data);
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
