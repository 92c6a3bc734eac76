//! Mistakes in a TOML file are found, with file, line and what was meant.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PART, SMALL, library};
use isqrt_experiments::Error;
use isqrt_experiments::spec::Library;
use isqrt_models::BackboneSpec;
use std::path::Path;

fn load(text: &str) -> Result<isqrt_experiments::spec::Experiment, Error> {
    Library::from_files([("small.toml", text), ("_base/part.toml", PART)]).load("small")
}

fn message(text: &str) -> String {
    load(text).unwrap_err().to_string()
}

#[test]
fn parts_are_merged_and_the_leaf_wins() {
    let small = library().load("small").unwrap();
    assert_eq!((small.layer.batch, small.layer.dim), (2, 8));
    assert_eq!(small.layer.positions, 196);
    let text = format!("{SMALL}\n[layer]\ndim = 16\n");
    let leaf = load(&text).unwrap();
    assert_eq!((leaf.layer.batch, leaf.layer.dim), (2, 16));
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    let text = message(&SMALL.replace("seeds = 2", "seedz = 2"));
    assert_eq!(
        text,
        "small.toml:5: unknown key `seedz`; did you mean `seeds`?"
    );
    let text = message(&SMALL.replace("iterations = 5", "iterashons = 5"));
    assert!(text.contains("unknown field `iterashons`"), "{text}");
    let files = [
        ("small.toml", SMALL),
        ("_base/part.toml", "\n[layer]\nbach = 2"),
    ];
    let text = Library::from_files(files)
        .load("small")
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "_base/part.toml:3: unknown key `bach`; did you mean `batch`?"
    );
}

#[test]
fn wrong_names_and_values_are_explained() {
    for (old, new, expected) in [
        (
            "than = \"gap\"",
            "than = \"gab\"",
            "there is no row `gab`; did you mean `gap`?",
        ),
        (
            "iterations = 5",
            "iterations = 0",
            "row `five`: iterations = 0 is out of range",
        ),
        ("id = \"five\"", "id = \"gap\"", "two rows are called `gap`"),
        (
            "_base/part.toml",
            "_base/prat.toml",
            "did you mean `_base/part.toml`?",
        ),
        ("name = \"gap\"", "name = \"gapp\"", "gapp"),
        (
            "not_run = ",
            "head = { name = \"gap\" }\n# ",
            "`not_run` must say why",
        ),
        ("seeds = 2", "seeds = 0", "`seeds` of at least 1"),
        (
            "metric = \"top1_error\", label",
            "metric = \"top1_eror\", label",
            "`columns`: no row is measured by `top1_eror`; did you mean `top1_error`?",
        ),
        (
            "metric = \"top1_error\", label",
            "metric = \"epochs_to:gab\", label",
            "`columns`: `epochs_to:gab`: there is no row `gab`; did you mean `gap`?",
        ),
        (
            "metric = \"top1_error\"\nrows",
            "metric = \"root_error\"\nrows",
            "`claims`: no row is measured by `root_error`",
        ),
        (
            "metric = \"top1_error\", label",
            "metric = \"top1_error\", on = \"smal\", label",
            "`on = \"smal\"` is not in `train_on`; did you mean `small`?",
        ),
    ] {
        let text = message(&SMALL.replace(old, new));
        assert!(text.contains(expected), "{text}");
        assert!(text.starts_with("small.toml"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
}

#[test]
fn what_no_run_could_do_is_refused_when_the_file_is_read() {
    for (old, new, expected) in [
        (
            "measures = [\"train\"]",
            "measures = [\"layer-time\"]",
            "row `gap`: `layer-time` needs a layer of second order",
        ),
        (
            "measures = [\"train\"]",
            "measures = [\"decomposition-time\"]",
            "row `gap`: `decomposition-time` needs head `eig`",
        ),
        (
            "iterations = 5 }\nmeasures = [\"train\", \"layer-time\"]",
            "iterations = 3 }\nmeasures = [\"decomposition-time\"]",
            "row `five`: `decomposition-time` needs head `eig`",
        ),
        (
            "iterations = 5",
            "iterations = 14",
            "row `five`: iterations = 14 is out of range: f32 features bear at most 13 steps",
        ),
        (
            "iterations = 5 }\nmeasures = [\"train\", \"layer-time\"]",
            "schedule = \"cubic\", steps = 3, lower = 0.1 }\nmeasures = [\"scaling\"]",
            "row `five`: `scaling` needs a head `isqrt` with `iterations`",
        ),
        (
            "iterations = 5 }\nmeasures = [\"train\", \"layer-time\"]",
            "pre_normalization = \"frobenius\" }\nmeasures = [\"root-error\"]",
            "row `five`: `root-error` needs `mpn`, or `isqrt` with",
        ),
        (
            "name = \"isqrt\", iterations = 5 }\nmeasures = [\"train\", \"layer-time\"]",
            "name = \"mpn\", power = 0.3 }\nmeasures = [\"root-error\"]",
            "row `five`: `root-error` needs `mpn`, or `isqrt` with",
        ),
        (
            "iterations = 5",
            "iterations = 61",
            "out of range: 1 to 60 steps",
        ),
        (
            "iterations = 5",
            "schedule = \"cubic\", steps = 61, lower = 0.1",
            "out of range: 1 to 60 steps",
        ),
    ] {
        assert!(SMALL.contains(old), "{old}");
        refused(&SMALL.replace(old, new), PART, expected);
    }
    let scaling = SMALL.replace("\"layer-time\"]", "\"layer-time\", \"scaling\"]");
    refused(
        &format!("{scaling}\n[scaling]\niterations = [1, 20]\n"),
        PART,
        "`[scaling]`: iterations = 20 is out of range",
    );
    for (old, new, expected) in [
        ("epochs = 3", "epochs = 0", "recipe `small`: it needs"),
        (
            "data = \"e10\"",
            "",
            "recipe `small`: it needs either `data`",
        ),
        ("\"e10\"", "\"e11\"", "no set \"e11\" of the program's own"),
        (
            "batch = 8",
            "batch = 8\nstart = \"smal\"",
            "there is no recipe `smal`; did you mean `small`?",
        ),
        (
            "[recipes.small]",
            "[recipes.smal]",
            "there is no recipe `small`; did you mean `smal`?",
        ),
        (
            "fallback = 0.1",
            "",
            "row `five`: it has no rate in `rates.small.heads`, so `rates.small.fallback` must",
        ),
        ("fallback = 0.1", "fallback = -1.0", "row `five`"),
        ("lr = 0.2", "lr = 0.0", "row `gap`: `lr = 0`"),
        ("[0.1, 0.2]\nf", "[0.1, nan]\nf", "`rates.small.grid`"),
        (
            "dim = 8",
            "dim = 0",
            "row `five`: `[layer]`: batch 2, dim 0",
        ),
        (
            "dim = 8",
            "dim = 3000000000\npositions = 3000000000",
            "row `five`: `[layer]`: batch 2, dim 3000000000",
        ),
        (
            "batch = 2\n",
            "batch = 9000000\n",
            "row `five`: `[layer]`: batch 9000000",
        ),
    ] {
        assert!(PART.contains(old), "{old}");
        refused(SMALL, &PART.replace(old, new), expected);
    }
    let timed = SMALL.replace("name = \"gap\"", "name = \"eig\"").replace(
        "measures = [\"train\"]",
        "measures = [\"decomposition-time\"]",
    );
    let text = format!("{timed}\n[decomposition]\ndim = 0\n");
    refused(&text, PART, "row `gap`: `[decomposition]`: batch 16, dim 0");
}

fn refused(small: &str, part: &str, expected: &str) {
    let files = [("small.toml", small), ("_base/part.toml", part)];
    let text = Library::from_files(files)
        .load("small")
        .unwrap_err()
        .to_string();
    assert!(text.contains(expected), "{expected} in {text}");
    assert!(text.starts_with("small.toml: "), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn a_part_that_extends_itself_is_an_error() {
    let part = "extends = [\"small.toml\"]";
    let files = [("small.toml", SMALL), ("_base/part.toml", part)];
    let text = Library::from_files(files)
        .load("small")
        .unwrap_err()
        .to_string();
    assert!(text.contains("extends itself"), "{text}");
}

#[test]
fn an_unknown_experiment_names_the_nearest_and_all() {
    let text = Library::embedded()
        .load("iteration")
        .unwrap_err()
        .to_string();
    assert!(text.contains("did you mean `iterations`?"), "{text}");
    assert!(
        text.contains("decomposition-time, deeper, fine-grained, followups"),
        "{text}"
    );
}

#[test]
fn every_embedded_experiment_loads_and_is_what_lies_in_the_folder() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments");
    let folder = Library::from_dir(&dir).unwrap();
    let embedded = Library::embedded();
    assert_eq!(folder.ids(), embedded.ids());
    for id in embedded.ids() {
        // As text: errors that are not numbers are unequal to themselves.
        let [a, b] = [&folder, &embedded].map(|l| format!("{:?}", l.load(&id).unwrap()));
        assert!(a == b, "{id}");
    }
}

#[test]
fn every_paper_value_names_its_source() {
    for experiment in Library::embedded().load_many(&[]).unwrap() {
        for value in experiment.rows.iter().flat_map(|r| &r.paper) {
            assert!(!value.source.is_empty(), "{}: {value:?}", experiment.id);
            assert!(
                !(value.source.contains("recalled") && value.verified),
                "{value:?}"
            );
        }
    }
}

#[test]
fn the_example_of_the_documentation_loads() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reproducing.md");
    let text = std::fs::read_to_string(docs).unwrap();
    let example = text
        .split("```toml")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let base = include_str!("../../../experiments/_base/timing.toml");
    let files = [("mine.toml", example), ("_base/timing.toml", base)];
    let mine = Library::from_files(files).load("mine").unwrap();
    assert_eq!(mine.rows.len(), 2);
}

#[test]
fn a_folder_without_experiments_and_an_unknown_backbone_are_told() {
    let none = Library::from_files([]);
    let text = none.load_many(&[]).unwrap_err().to_string();
    assert!(text.contains("no experiment"), "{text}");
    refused(
        SMALL,
        &PART.replace("e10net", "e10nett"),
        "did you mean `e10net`?",
    );
}

#[test]
fn a_backbone_takes_options_and_wrong_ones_are_told() {
    let with = |backbone: &str| PART.replace("\"e10net\"", backbone);
    assert_ne!(PART, with("\"tinyresnet\""));
    let good = with(r#"{ name = "resnet20", reduction = 16 }"#);
    let library = Library::from_files([("small.toml", SMALL), ("_base/part.toml", &good)]);
    let backbone = &library.load("small").unwrap().recipes["small"].backbone;
    assert_eq!(
        backbone,
        &BackboneSpec::new("resnet20").with("reduction", 16)
    );
    let bad = with(r#"{ name = "resnet20", reductoin = 16 }"#);
    refused(SMALL, &bad, "unknown field `reductoin`");
}

#[test]
fn transforms_are_named_or_spelled_out() {
    let with = |transforms: &str| {
        let line = format!("[recipes.small]\n{transforms}");
        PART.replace("[recipes.small]", &line)
    };
    assert!(PART.contains("[recipes.small]"));
    let crop = r#"train_transforms = [{ step = "resize_to", width = 32, height = 32 },
                                       { step = "random_crop", size = 32, padding = 2 }]"#;
    let library = with(crop);
    let library = Library::from_files([("small.toml", SMALL), ("_base/part.toml", &library)]);
    let recipe = &library.load("small").unwrap().recipes["small"];
    let (train, eval, side) = recipe.pipelines().unwrap();
    assert!(train.is_random() && !eval.is_random());
    assert_eq!(side, 32);
    for (transforms, expected) in [
        (
            r#"train_transforms = "small32-trian""#,
            "nearest is \"small32-train\"",
        ),
        (r#"eval_transforms = "small32-train""#, "must not be random"),
        (r#"train_transforms = "small64-train""#, "kept in memory"),
        (r#"train_transforms = "imagenet-train""#, "kept in memory"),
        (r#"eval_transforms = "cub-eval""#, "several views"),
        (
            r#"train_transforms = [{ step = "centre_crop", size = 32 }]"#,
            "centre_crop",
        ),
        (
            r#"train_transforms = [{ step = "center_crop", size = 0 }]"#,
            "size = 0",
        ),
        (
            "train_transforms = 7",
            "the name of a preset, or a list of steps",
        ),
    ] {
        let part = with(transforms);
        let library = Library::from_files([("small.toml", SMALL), ("_base/part.toml", &part)]);
        let error = library.load("small").unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains(".toml"),
            "{error}"
        );
    }
}

#[test]
fn a_small_set_is_seen_for_more_epochs_and_looked_at_less_often() {
    let mut recipe = library().load("small").unwrap().recipes["small"].clone();
    (recipe.epochs, recipe.eval_every, recipe.batch) = (10, 2, 64);
    recipe.updates = 500;
    let fit = |images| {
        let mut fitted = recipe.clone();
        fitted.fit(images);
        (fitted.epochs, fitted.eval_every, fitted.batch)
    };
    assert_eq!(fit(64 * 50), (10, 2, 64));
    assert_eq!(fit(64 * 10 + 3), (50, 10, 64));
    assert_eq!(fit(5), (500, 100, 5));
}
