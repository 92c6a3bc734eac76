//! Pipelines against torchvision, on real photographs, on images of any size and on hostile bytes.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::path::Path;

use isqrt_datasets::{
    Annotation, BoundingBox, Error, Filter, IMAGENET_MEAN, IMAGENET_STD, Key, PRESETS, Pipeline,
    Scratch, Step, decode,
};
use proptest::prelude::*;
use safetensors::SafeTensors;

const KEY: Key = Key {
    seed: 1,
    epoch: 2,
    sample: 3,
};

fn pipeline(steps: Vec<Step>) -> Pipeline {
    Pipeline {
        steps,
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
        exif_orientation: false,
    }
}

struct Output {
    height: usize,
    width: usize,
    pixels: Vec<u8>,
}

fn run(
    pipeline: &Pipeline,
    image: (&[u8], usize, usize),
    annotation: Option<&Annotation>,
    key: Key,
) -> Result<Output, Error> {
    let mut pixels = Vec::new();
    let mut scratch = Scratch::new();
    let path = Path::new("image");
    let (height, width) =
        pipeline.run_decoded(image, path, annotation, key, &mut scratch, &mut pixels)?;
    Ok(Output {
        height,
        width,
        pixels,
    })
}

fn boxed(left: f32, top: f32, width: f32, height: f32) -> Annotation {
    Annotation {
        bounding_box: Some(BoundingBox {
            left,
            top,
            width,
            height,
        }),
        parts: Vec::new(),
    }
}

fn worst(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    let off = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    off.max().unwrap_or(0)
}

#[derive(serde::Deserialize)]
struct Case {
    image: String,
    steps: Vec<Step>,
    #[serde(rename = "box")]
    found: Option<[f32; 4]>,
}

#[test]
fn as_torchvision_does() {
    let bytes = include_bytes!("golden/transforms.safetensors");
    let golden = SafeTensors::deserialize(bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let cases = header.metadata().clone().unwrap();
    assert!(cases.len() > 40);
    let mut most = 0;
    for (name, case) in cases {
        let case: Case = serde_json::from_str(&case).unwrap();
        let image = golden.tensor(&format!("image.{}", case.image)).unwrap();
        let expected = golden.tensor(&format!("case.{name}")).unwrap();
        let annotation = case.found.map(|[l, t, w, h]| boxed(l, t, w, h));
        let pipeline = pipeline(case.steps);
        pipeline.check().unwrap();
        let source = (image.data(), image.shape()[1], image.shape()[0]);
        let found = run(&pipeline, source, annotation.as_ref(), KEY).unwrap();
        let shape = [pipeline.views(), found.height, found.width, 3];
        assert_eq!(expected.shape(), shape, "{name}");
        let off = worst(&found.pixels, expected.data());
        let resized = format!("{:?}", pipeline.steps).contains("Resize");
        assert!(off <= if resized { 2 } else { 0 }, "{name}: off by {off}");
        most = most.max(off);
    }
    eprintln!("at most {most} of 255 from torchvision");
}

/// Means and deviations of all hundred images after Resize(256) and CenterCrop(224) by Pillow, and eight
/// of those crops pixel by pixel.
#[test]
fn evaluation_is_pillows() {
    let Some(dir) = common::shared_data("imagenet_samples") else {
        return;
    };
    let pipeline = Pipeline::preset("imagenet-eval").unwrap();
    let mut scratch = Scratch::new();
    let mut out = Vec::new();
    let mut evaluate = |file: &Path, out: &mut Vec<u8>| {
        let bytes = std::fs::read(file).unwrap();
        let size = pipeline.run_encoded(&bytes, file, None, KEY, &mut scratch, out);
        assert_eq!(size.unwrap(), (224, 224));
    };
    let table = common::Table::read(&dir.join("reference_pillow.tsv"));
    assert_eq!(table.rows.len(), 100);
    let mut furthest = 0f64;
    for row in &table.rows {
        let file = table.cell(row, "file");
        evaluate(&dir.join(file), &mut out);
        for (channel, letter) in ["r", "g", "b"].into_iter().enumerate() {
            let values = out.iter().skip(channel).step_by(3);
            let values: Vec<f64> = values.map(|&v| f64::from(v) / 255.0).collect();
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
            for (found, name) in [(mean, "mean"), (std, "std")] {
                let known = table.number(row, &format!("crop_{name}_{letter}"));
                let off = (found - known).abs() * 255.0;
                assert!(off < 0.05, "{file} {name}: {found}, {known}");
                furthest = furthest.max(off);
            }
        }
    }
    let (mut crops, mut most) = (0, 0);
    for entry in std::fs::read_dir(dir.join("reference_crops")).unwrap() {
        let reference = entry.unwrap().path();
        let name = reference.file_name().unwrap().to_str().unwrap();
        let stem = name.strip_suffix(".r256c224.png").unwrap();
        let wnid = stem.split('_').next().unwrap();
        let image = dir.join("train").join(wnid).join(format!("{stem}.JPEG"));
        evaluate(&image, &mut out);
        let known = isqrt_datasets::decode_file(&reference).unwrap();
        most = most.max(worst(&out, &known.pixels));
        crops += 1;
    }
    assert_eq!(crops, 8);
    assert!(most <= 2, "off by {most}");
    eprintln!("statistics at most {furthest:.4} of 255 off, pixels at most {most}");
}

/// A file gives what its decoded pixels give: regions change nothing.
#[test]
fn files_and_pixels_agree() {
    let mut files = vec![
        ("made.png".into(), common::png_bytes(70, 50, 3)),
        ("made.jpg".into(), common::jpeg_bytes(90, 60)),
    ];
    if let Some(dir) = common::shared_data("imagenet_samples") {
        let table = common::Table::read(&dir.join("reference_pillow.tsv"));
        for row in table.rows.iter().step_by(9) {
            let file = dir.join(table.cell(row, "file"));
            let bytes = std::fs::read(&file).unwrap();
            files.push((file, bytes));
        }
    }
    let (mut scratch, mut out) = (Scratch::new(), Vec::new());
    for (file, bytes) in &files {
        let image = decode(bytes, file).unwrap();
        for preset in PRESETS {
            let pipeline = preset.pipeline();
            for epoch in 0..2 {
                let key = Key { epoch, ..KEY };
                let size = pipeline
                    .run_encoded(bytes, file, None, key, &mut scratch, &mut out)
                    .unwrap();
                let source = (&image.pixels[..], image.width, image.height);
                let known = run(&pipeline, source, None, key).unwrap();
                assert_eq!(size, (known.height, known.width));
                assert_eq!(Some(size), pipeline.output_size());
                assert!(out == known.pixels, "{} {}", file.display(), preset.name);
            }
        }
    }
}

#[test]
fn keys_alone_decide() {
    let pixels = common::pattern(60, 45);
    let small = common::pattern(3, 50);
    let source = (&pixels[..], 60, 45);
    for preset in PRESETS {
        let pipeline = preset.pipeline();
        let alone = |key| run(&pipeline, source, None, key).unwrap().pixels;
        // The same in any order, with buffers that other images and pipelines have used.
        let keys: Vec<Key> = (0..6)
            .map(|i| Key {
                seed: i % 2,
                epoch: i / 2,
                sample: i % 3,
            })
            .collect();
        let (mut scratch, mut out) = (Scratch::new(), vec![9; 77]);
        for &key in keys.iter().rev() {
            let other = Pipeline::preset("cub-eval").unwrap();
            for (pipeline, source) in [(&other, (&small[..], 3, 50)), (&pipeline, source)] {
                pipeline
                    .run_decoded(source, Path::new("x"), None, key, &mut scratch, &mut out)
                    .unwrap();
            }
            assert!(out == alone(key), "{}", preset.name);
        }
        let all: std::collections::HashSet<Vec<u8>> = keys.iter().map(|&key| alone(key)).collect();
        assert_eq!(all.len() > 1, pipeline.is_random(), "{}", preset.name);
    }
}

#[test]
fn presets_are_sound_and_names_are_suggested() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/loading.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    for preset in PRESETS {
        let line = format!("| `{}` | {} |", preset.name, preset.about);
        assert!(docs.contains(&line), "docs/loading.md lacks {line}");
        let pipeline = Pipeline::preset(preset.name).unwrap();
        pipeline.check().unwrap();
        assert!(pipeline.output_size().is_some(), "{}", preset.name);
        assert!(!preset.about.is_empty() && !preset.source.is_empty());
        assert_eq!(preset.name.ends_with("train"), pipeline.is_random());
        // Through an experiment file and back.
        let text = serde_json::to_string(&pipeline).unwrap();
        let again: Pipeline = serde_json::from_str(&text).unwrap();
        assert_eq!(again, pipeline);
    }
    let error = Pipeline::preset("imagnet-trian").unwrap_err().to_string();
    assert!(error.contains("nearest is \"imagenet-train\""), "{error}");
}

#[test]
fn files_spell_pipelines_out() {
    let text = r#"{"steps": [{"step": "random_resized_crop", "size": 32}, {"step": "horizontal_flip"},
                             {"step": "center_square"}], "mean": [0.5, 0.5, 0.5]}"#;
    let found: Pipeline = serde_json::from_str(text).unwrap();
    let known = Step::RandomResizedCrop {
        size: 32,
        scale: (0.08, 1.0),
        ratio: (0.75, 4.0 / 3.0),
        filter: Filter::Bilinear,
    };
    assert_eq!(found.steps[0], known);
    assert_eq!(found.steps[1], Step::HorizontalFlip { p: 0.5 });
    assert_eq!((found.mean, found.std), ([0.5; 3], IMAGENET_STD));
    for wrong in [
        r#"{"steps": [{"step": "center_crop", "size": 3, "sise": 3}]}"#,
        r#"{"steps": [{"step": "centre_crop", "size": 3}]}"#,
        r#"{"steps": [{"step": "center_crop"}]}"#,
        r#"{"steps": [{"step": "center_square", "size": 3}]}"#,
        r#"{"steps": [{"step": "mirror", "p": 0.5}]}"#,
        r#"{"steps": [{"step": "center_crop", "size": -1}]}"#,
        r#"{"steps": [], "men": [0, 0, 0]}"#,
        r#"{}"#,
    ] {
        assert!(serde_json::from_str::<Pipeline>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn nonsense_is_refused_with_the_number_of_the_step() {
    let crop = |scale, ratio| Step::RandomResizedCrop {
        size: 8,
        scale,
        ratio,
        filter: Filter::Bilinear,
    };
    let flip = Step::HorizontalFlip { p: 0.5 };
    for (steps, said) in [
        (vec![flip, Step::CenterCrop { size: 0 }], "step 2"),
        (vec![Step::CenterCrop { size: 5000 }], "expected 1 to 4096"),
        (vec![crop((0.0, 1.0), (1.0, 1.0))], "scale"),
        (vec![crop((0.5, 1.1), (1.0, 1.0))], "scale"),
        (vec![crop((0.9, 0.5), (1.0, 1.0))], "scale"),
        (vec![crop((0.5, 1.0), (f64::NAN, 1.0))], "ratio"),
        (vec![Step::HorizontalFlip { p: 1.5 }], "p = 1.5"),
        (vec![Step::Mirror {}, flip], "last step"),
        (vec![flip, Step::BoxCrop { margin: 0.0 }], "first step"),
        (vec![flip, flip], "one horizontal_flip"),
        (vec![Step::Lighting { std: -1.0 }], "std"),
        (vec![Step::CenterSquare {}; 40], "40 steps"),
    ] {
        let error = pipeline(steps).check().unwrap_err().to_string();
        assert!(error.contains(said) && !error.contains('\n'), "{error}");
    }
    let mut bad = pipeline(vec![]);
    bad.std[1] = f32::NAN;
    assert!(bad.check().unwrap_err().to_string().contains("channel 1"));
}

#[test]
fn what_an_image_lacks_is_said_with_its_path() {
    let pixels = common::pattern(20, 10);
    let fails = |step, annotation: Option<Annotation>| {
        let source = (&pixels[..], 20, 10);
        let result = run(&pipeline(vec![step]), source, annotation.as_ref(), KEY);
        let error = result.err().unwrap().to_string();
        assert!(error.starts_with("image: "), "{error}");
        error
    };
    assert!(fails(Step::BoxCrop { margin: 0.1 }, None).contains("without a bounding box"));
    for outside in [
        boxed(30.0, 2.0, 5.0, 5.0),
        boxed(2.0, 2.0, 0.0, 5.0),
        boxed(f32::NAN, 2.0, 5.0, 5.0),
        boxed(-9.0, 0.0, 5.0, 5.0),
    ] {
        let error = fails(Step::BoxCrop { margin: 0.0 }, Some(outside));
        assert!(error.contains("inside of 20x10"), "{error}");
    }
    let line = vec![7; 3 * 2_000_000];
    let steps = [Filter::Bilinear, Filter::Bicubic].map(|filter| Step::ResizeTo {
        width: 4096,
        height: 4096,
        filter,
    });
    let short = Step::Resize {
        short: 4096,
        filter: Filter::Bilinear,
    };
    for step in steps.into_iter().chain([short]) {
        for (width, height) in [(2_000_000, 1), (1, 2_000_000)] {
            let result = run(&pipeline(vec![step]), (&line, width, height), None, KEY);
            let error = result.err().unwrap().to_string();
            assert!(
                error.contains("image: ") && error.contains("extreme"),
                "{error}"
            );
        }
    }
    assert!(fails(Step::FiveCrop { size: 11 }, None).contains("at least 11x11"));
    assert!(fails(Step::TrimBottom { rows: 10 }, None).contains("10 rows"));
}

#[test]
fn boxes_follow_the_orientation_of_the_file() {
    let Some(dir) = common::shared_data("decoder_stress") else {
        return;
    };
    let (mut scratch, mut out) = (Scratch::new(), Vec::new());
    let mut crop = |file: &Path, exif_orientation, annotation: &Annotation| {
        let pipeline = Pipeline {
            exif_orientation,
            ..pipeline(vec![Step::BoxCrop { margin: 0.0 }])
        };
        let bytes = std::fs::read(file).unwrap();
        let size =
            pipeline.run_encoded(&bytes, file, Some(annotation), KEY, &mut scratch, &mut out);
        (size.unwrap(), out.clone())
    };
    let found = boxed(10.0, 20.0, 50.0, 30.0);
    // A quarter turn: the same pixels, rows where columns were.
    let file = dir.join("pillow__hopper_orientation_6.jpg");
    let (size, stored) = crop(&file, false, &found);
    assert_eq!(size, (30, 50));
    let (size, upright) = crop(&file, true, &found);
    assert_eq!(size, (50, 30));
    for (y, x) in [(0, 0), (7, 31), (29, 49)] {
        let at = (y * 50 + x) * 3;
        let turned = (x * 30 + 29 - y) * 3;
        assert_eq!(stored[at..at + 3], upright[turned..turned + 3]);
    }
}

#[test]
fn giants_leave_nothing_behind() {
    let mut scratch = Scratch::new();
    let mut out = Vec::new();
    let giant = common::pattern(6000, 5000);
    let eval = Pipeline::preset("cub-train").unwrap();
    let wide = pipeline(vec![Step::ResizeTo {
        width: 4096,
        height: 4096,
        filter: Filter::Bicubic,
    }]);
    for pipeline in [&eval, &wide, &eval] {
        pipeline
            .run_decoded(
                (&giant, 6000, 5000),
                Path::new("x"),
                None,
                KEY,
                &mut scratch,
                &mut out,
            )
            .unwrap();
        assert!(scratch.bytes() <= 64 << 20, "{} bytes", scratch.bytes());
    }
}

fn any_step() -> impl Strategy<Value = Step> {
    let size = 1usize..60;
    let filter = prop_oneof![Just(Filter::Bilinear), Just(Filter::Bicubic)];
    let pair = |low: f64, high: f64| (low..high, low..high).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        (
            size.clone(),
            pair(0.01, 1.0),
            pair(0.2, 5.0),
            filter.clone()
        )
            .prop_map(|(size, scale, ratio, filter)| Step::RandomResizedCrop {
                size,
                scale,
                ratio,
                filter
            }),
        (size.clone(), pair(0.1, 1.1), pair(0.2, 5.0), any::<bool>()).prop_map(
            |(size, scale, ratio, centred)| Step::JitterCrop {
                size,
                fraction: 0.875,
                scale,
                ratio,
                centred,
                filter: Filter::Bicubic
            }
        ),
        (size.clone(), filter.clone()).prop_map(|(short, filter)| Step::Resize { short, filter }),
        (size.clone(), size.clone(), filter).prop_map(|(width, height, filter)| Step::ResizeTo {
            width,
            height,
            filter
        }),
        Just(Step::CenterSquare {}),
        size.clone().prop_map(|size| Step::CenterCrop { size }),
        (size, 0usize..20, any::<bool>()).prop_map(|(size, padding, reflect)| Step::RandomCrop {
            size,
            padding,
            reflect
        }),
        (0.0..1.0, 0.0..1.0, 0.0..1.0, 0.0..0.5).prop_map(
            |(brightness, contrast, saturation, hue)| Step::ColorJitter {
                brightness,
                contrast,
                saturation,
                hue
            }
        ),
        (0.0..1.0).prop_map(|std| Step::Lighting { std }),
        (0.0..1.0).prop_map(|d| Step::Brightness { deviation: [d; 3] }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_steps_on_any_image(
        (width, height) in prop_oneof![(1usize..70, 1usize..70), (1usize..3, 1usize..200), (1usize..200, 1usize..3)],
        before in proptest::collection::vec(any_step(), 0..3),
        flip in proptest::option::of(0.0..=1.0),
        after in proptest::collection::vec(any_step(), 0..3),
        mirror in any::<bool>(),
        (seed, epoch, sample) in any::<(u64, u64, u64)>(),
    ) {
        let flip = flip.map(|p| Step::HorizontalFlip { p });
        let last = mirror.then_some(Step::Mirror {});
        let steps = before.into_iter().chain(flip).chain(after).chain(last).collect();
        let pipeline = pipeline(steps);
        pipeline.check().unwrap();
        let pixels = common::pattern(width, height);
        let key = Key { seed, epoch, sample };
        let found = run(&pipeline, (&pixels, width, height), None, key).unwrap();
        prop_assert_eq!(found.pixels.len(), pipeline.views() * found.height * found.width * 3);
        if let Some(size) = pipeline.output_size() {
            prop_assert_eq!(size, (found.height, found.width));
        }
        let view = found.pixels.len() / pipeline.views();
        if mirror {
            let row = found.width * 3;
            let (first, second) = found.pixels.split_at(view);
            for (a, b) in first.chunks(row).zip(second.chunks(row)) {
                let mirrored: Vec<u8> = b.chunks(3).rev().flatten().copied().collect();
                prop_assert_eq!(a, &mirrored[..]);
            }
        }
    }

    #[test]
    fn hostile_bytes_are_errors_or_images(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        preset in proptest::sample::select(&["imagenet-train", "imagenet-tencrop", "small32-train", "cars-eval"]),
        png in any::<bool>(),
    ) {
        let mut bytes = match png {
            true => common::png_bytes(40, 30, 9),
            false => common::jpeg_bytes(40, 30),
        };
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(bytes.len() / 2 + cut.index(bytes.len()));
        let pipeline = Pipeline::preset(preset).unwrap();
        let (mut scratch, mut out) = (Scratch::new(), Vec::new());
        let result = pipeline.run_encoded(&bytes, Path::new("x"), None, KEY, &mut scratch, &mut out);
        match result {
            Ok((height, width)) => prop_assert_eq!(out.len(), pipeline.views() * height * width * 3),
            Err(error) => prop_assert!(!error.to_string().contains("the decoder failed"), "{}", error),
        }
    }
}
