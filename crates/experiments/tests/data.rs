//! Which images a plan is made for, before any is decoded.
#![allow(clippy::unwrap_used)]

mod common;

use common::{small, twin};
use isqrt_datasets::Broken;
use isqrt_datasets::textures::Set;
use isqrt_experiments::run::{Library, Source};
use isqrt_experiments::spec::{Experiment, Transforms};

/// The small experiment for images of the user's.
fn for_anybody(mut e: Experiment) -> Experiment {
    let recipe = e.recipes.get_mut("small").unwrap();
    recipe.up_to_side = Some(40);
    e
}

/// Other inputs of the same images.
fn larger(mut e: Experiment) -> Experiment {
    let recipe = e.recipes.get_mut("small").unwrap();
    recipe.eval_transforms = Transforms::Preset("small64-eval".to_owned());
    recipe.train_transforms = recipe.eval_transforms.clone();
    e
}

#[test]
fn experiments_whose_recipes_make_other_inputs_of_the_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Own(dir.path().to_owned());
    let (first, same) = (small(), twin(str::to_owned));
    let other = larger(same.clone());
    let infos = source.describe_unwritten(&[&first, &same], true).unwrap();
    assert_eq!(infos.unwrap().own["small"].side, 32);
    let message = "twin.toml: recipe `small` makes other inputs than that of `small`: give one of them \
                   another name";
    let both = [&first, &other];
    let error = source.describe_unwritten(&both, true).unwrap_err();
    assert_eq!(error.to_string(), message);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let error = Library::open(&source, &both, true, Broken::Fail).unwrap_err();
    assert_eq!(error.to_string(), message);

    let images = Set::named("e10").unwrap();
    let images = images.write(dir.path(), 1, true).unwrap();
    let source = Source::Users(images, Default::default());
    let both = [&for_anybody(first), &for_anybody(other)];
    let error = Library::open(&source, &both, true, Broken::Fail).unwrap_err();
    let message = "twin.toml: recipe `small` makes other inputs of these images than `small` of \
                   `small`: run the two one after the other";
    assert_eq!(error.to_string(), message);
}

#[test]
fn images_of_the_users_take_the_recipe_for_their_size() {
    let dir = tempfile::tempdir().unwrap();
    let set = Set::named("mini-cub").unwrap();
    let root = set.write(dir.path(), 1, true).unwrap();
    let source = Source::Users(root, Default::default());
    let small = small();
    let error = Library::open(&source, &[&small], true, Broken::Fail).unwrap_err();
    assert!(
        error.to_string().contains("no recipe is for images of"),
        "{error}"
    );
    let mut wide = for_anybody(small);
    wide.recipes.get_mut("small").unwrap().up_to_side = Some(64);
    let library = Library::open(&source, &[&wide], true, Broken::Fail).unwrap();
    let infos = library.infos();
    assert!(infos.own.is_empty());
    assert_eq!(infos.users.unwrap().classes, set.classes);
}

#[test]
fn own_images_are_described_without_mending_them() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Own(dir.path().to_owned());
    let set = Set::named("e10").unwrap();
    let root = set.write(dir.path(), 1, true).unwrap();
    let describe = || source.describe_unwritten(&[&small()], true).unwrap();
    assert!(describe().is_none());
    let lost = root.join("val/01-23-45/0000.png");
    std::fs::remove_file(&lost).unwrap();
    let info = describe().unwrap().own["small"].clone();
    assert_eq!((info.train, info.test), (80, 40));
    assert!(!lost.exists());

    // Of one that is whole all is known, though another is not written.
    let birds = Set::named("mini-cub").unwrap();
    birds.write(dir.path(), 1, true).unwrap();
    let mut both = small();
    let mut recipe = both.recipes["small"].clone();
    recipe.data = birds.name.to_owned();
    both.recipes.insert("birds".to_owned(), recipe);
    both.train_on.push("birds".to_owned());
    let infos = source.describe_unwritten(&[&both], true).unwrap().unwrap();
    assert!(!infos.own["birds"].fingerprint.is_empty());
    assert!(infos.own["small"].fingerprint.is_empty());
}
