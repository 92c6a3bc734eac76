//! Which images a plan is made for, before any is decoded.
#![allow(clippy::unwrap_used)]

mod common;

use common::{small, twin};
use isqrt_datasets::{Broken, e10};
use isqrt_experiments::run::{Data, Source};
use isqrt_experiments::spec::Transforms;

const SMOKE: e10::Sizes = e10::Sizes {
    train: 8,
    val: 4,
    test: 4,
};

#[test]
fn experiments_whose_recipes_make_other_inputs_of_the_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Embedded(dir.path().to_owned());
    let (first, same) = (small(), twin(str::to_owned));
    let mut other = same.clone();
    let recipe = other.recipes.get_mut("small").unwrap();
    recipe.eval_transforms = Transforms::Preset("small64-eval".to_owned());
    recipe.train_transforms = recipe.eval_transforms.clone();
    let info = source.describe_unwritten(&[&first, &same], true).unwrap();
    assert_eq!(info.unwrap().side, 32);
    let message = "twin.toml: recipe `small` makes other inputs of these images than `small` of \
                   `small`: run the two one after the other";
    let both = [&first, &other];
    let error = source.describe_unwritten(&both, true).unwrap_err();
    assert_eq!(error.to_string(), message);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let error = source.describe_unwritten(&[], true).unwrap_err();
    assert_eq!(error.to_string(), "no experiment trains networks");
    let error = Data::open(&source, &both, true, Broken::Fail).unwrap_err();
    assert_eq!(error.to_string(), message);
}

#[test]
fn embedded_images_are_described_without_mending_them() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Embedded(dir.path().to_owned());
    let root = dir.path().join("e10-smoke");
    e10::generate(&root, 1, SMOKE).unwrap();
    let describe = || source.describe_unwritten(&[&small()], true).unwrap();
    assert!(describe().is_none());
    let lost = root
        .join("val")
        .join(&e10::class_names()[0])
        .join("0000.png");
    std::fs::remove_file(&lost).unwrap();
    let info = describe().unwrap();
    assert_eq!((info.train, info.test), (80, 40));
    assert!(!lost.exists());
}
