//! The MATLAB reader: real annotation files, files of our own writing, hostile bytes.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::path::Path;

use isqrt_datasets::formats::matlab::{MAX_INFLATED_BYTES, MatFile, Row, StructArray, Value};
use isqrt_datasets::formats::matlab_writer::{Options, write};
use proptest::prelude::*;

const PLAIN: Options = Options {
    compressed: false,
    big_endian: false,
};

fn parse(bytes: &[u8]) -> Result<MatFile, String> {
    MatFile::parse(bytes, Path::new("x.mat")).map_err(|e| e.to_string())
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn annotations(rows: usize) -> Value {
    let row = |i: usize| {
        let number = |n: usize| Value::Numbers(vec![n as f64]);
        [
            number(i * 3),
            number(i % 7 + 1),
            text(&format!("{i:05}.jpg")),
        ]
    };
    Value::Structs(StructArray {
        fields: ["bbox_x1", "class", "fname"].map(str::to_owned).into(),
        values: (0..rows).flat_map(row).collect(),
    })
}

#[test]
fn stanford_cars_as_scipy_reads_it() {
    let Some(dir) = common::shared_data("cars_metadata") else {
        return;
    };
    let fields = |row: &Row| {
        let numbers = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"];
        let numbers = numbers.map(|field| row.integer(field, 0..=9999).unwrap());
        (numbers, row.text("fname").unwrap().to_owned())
    };
    let known = [
        (
            "devkit/cars_train_annos.mat",
            8144,
            ([39, 116, 569, 375, 14], "00001.jpg"),
            ([20, 240, 862, 677, 17], "08144.jpg"),
        ),
        (
            "cars_test_annos_withlabels.mat",
            8041,
            ([30, 52, 246, 147, 181], "00001.jpg"),
            ([77, 73, 506, 380, 32], "08041.jpg"),
        ),
    ];
    for (name, count, first, last) in known {
        let file = MatFile::open(&dir.join(name)).unwrap();
        let rows: Vec<Row> = file
            .variable("annotations")
            .unwrap()
            .rows()
            .unwrap()
            .collect();
        assert_eq!(rows.len(), count);
        assert_eq!(fields(&rows[0]), (first.0, first.1.to_owned()));
        assert_eq!(fields(&rows[count - 1]), (last.0, last.1.to_owned()));
        let error = rows[1].text("class").unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("annotations, row 2, field class"),
            "{error}"
        );
    }
    let file = MatFile::open(&dir.join("devkit/cars_meta.mat")).unwrap();
    let names = file.variable("class_names").unwrap().texts().unwrap();
    assert_eq!(names.len(), 196);
    assert_eq!(names[0], "AM General Hummer SUV 2000");
    assert!(names.contains(&"Ram C/V Cargo Van Minivan 2012"));
    let file = MatFile::open(&dir.join("devkit/cars_test_annos.mat")).unwrap();
    let row = file
        .variable("annotations")
        .unwrap()
        .rows()
        .unwrap()
        .next()
        .unwrap();
    let error = row.number("class").unwrap_err().to_string();
    assert!(
        error.contains("field class: there is only: bbox_x1"),
        "{error}"
    );
}

#[test]
fn cars_mini_written_by_scipy() {
    let Some(dir) = common::shared_data("cars_mini/stanford_cars") else {
        return;
    };
    for (name, count) in [
        ("devkit/cars_train_annos.mat", 259),
        ("cars_test_annos_withlabels.mat", 173),
    ] {
        let file = MatFile::open(&dir.join(name)).unwrap();
        assert_eq!(
            file.variable("annotations").unwrap().rows().unwrap().len(),
            count
        );
    }
}

#[test]
fn imagenet_devkit_as_scipy_reads_it() {
    let Some(dir) = common::shared_data("imagenet_devkit") else {
        return;
    };
    let file = MatFile::open(&dir.join("ILSVRC2012_devkit_t12/data/meta.mat")).unwrap();
    let rows: Vec<Row> = file.variable("synsets").unwrap().rows().unwrap().collect();
    assert_eq!(rows.len(), 1860);
    assert_eq!(rows[0].text("WNID").unwrap(), "n02119789");
    assert_eq!(rows[0].text("words").unwrap(), "kit fox, Vulpes macrotis");
    assert_eq!(rows[0].number("num_train_images").unwrap(), 1300.0);
    assert_eq!(rows[0].value("children").unwrap(), &Value::Numbers(vec![]));
    assert_eq!(rows[1859].text("WNID").unwrap(), "n13809207");
    assert_eq!(
        rows[1859].value("children").unwrap(),
        &Value::Numbers(vec![1046.0])
    );
    let leaves = rows
        .iter()
        .filter(|row| row.number("num_children").unwrap() == 0.0);
    let (count, images) = leaves.fold((0, 0.0), |(count, images), row| {
        (count + 1, images + row.number("num_train_images").unwrap())
    });
    assert_eq!((count, images), (1000, 1_281_167.0));
}

/// An element with a full tag, padded.
fn element(kind: u32, bytes: &[u8]) -> Vec<u8> {
    let mut all = [kind.to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
    all.extend(bytes);
    all.resize(all.len().next_multiple_of(8), 0);
    all
}

fn array(class: u32, dimensions: &[u32], content: &[u8]) -> Vec<u8> {
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let head = [
        element(6, &words(&[class, 0])),
        element(5, &words(dimensions)),
        element(1, b"x"),
    ];
    element(14, &[&head.concat(), content].concat())
}

fn file(elements: &[u8]) -> Vec<u8> {
    let header = write(&[], PLAIN).unwrap();
    [&header, elements].concat()
}

#[test]
fn numbers_of_every_type() {
    let stored: [(u32, Vec<u8>, f64); 10] = [
        (1, vec![0xFE], -2.0),
        (2, vec![0xFE], 254.0),
        (3, (-300i16).to_le_bytes().into(), -300.0),
        (4, 65000u16.to_le_bytes().into(), 65000.0),
        (5, (-70000i32).to_le_bytes().into(), -70000.0),
        (6, 4_000_000_000u32.to_le_bytes().into(), 4e9),
        (7, 1.5f32.to_le_bytes().into(), 1.5),
        (9, (-1e300f64).to_le_bytes().into(), -1e300),
        (12, (-5i64).to_le_bytes().into(), -5.0),
        (13, (1u64 << 60).to_le_bytes().into(), (1u64 << 60) as f64),
    ];
    for (kind, bytes, expected) in stored {
        // The class double, whatever type the values are stored in.
        let found = parse(&file(&array(6, &[1, 1], &element(kind, &bytes)))).unwrap();
        assert_eq!(
            found.variable("x").unwrap().value(),
            &Value::Numbers(vec![expected])
        );
    }
}

#[test]
fn text_of_every_type_and_what_is_passed_over() {
    let stored: [(u32, Vec<u8>, u32, &str); 5] = [
        (16, "Škoda".into(), 5, "Škoda"),
        (
            17,
            "Š😀".encode_utf16().flat_map(u16::to_le_bytes).collect(),
            3,
            "Š😀",
        ),
        (
            18,
            "Š😀"
                .chars()
                .flat_map(|c| (c as u32).to_le_bytes())
                .collect(),
            2,
            "Š😀",
        ),
        (2, vec![b'a', 0xE9], 2, "aé"),
        (4, vec![b'a', 0], 1, "a"),
    ];
    for (kind, bytes, count, expected) in stored {
        let found = parse(&file(&array(4, &[1, count], &element(kind, &bytes)))).unwrap();
        assert_eq!(found.variable("x").unwrap().value(), &text(expected));
    }
    for (class, content) in [
        (5, vec![]),
        (16, vec![]),
        (3, vec![]),
        (4, element(2, b"ab")),
    ] {
        let found = parse(&file(&array(class, &[2, 1], &content))).unwrap();
        let value = found.variable("x").unwrap();
        assert!(matches!(value.value(), Value::Unsupported(_)), "{value:?}");
        let error = value.texts().unwrap_err().to_string();
        assert!(error.contains("not supported"), "{error}");
    }
}

#[test]
fn other_versions_say_how_to_convert() {
    let mut hdf5 = write(&[], PLAIN).unwrap();
    hdf5[..10].copy_from_slice(b"MATLAB 7.3");
    let four = [0u32, 1, 3, 0, 2]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect::<Vec<_>>();
    let four_big = [1000u32, 1, 3, 0, 2]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect::<Vec<_>>();
    for (bytes, name) in [
        (hdf5, "7.3"),
        (b"\x89HDF\r\n\x1a\n".to_vec(), "7.3"),
        (four, "MATLAB 4"),
        (four_big, "MATLAB 4"),
    ] {
        let error = parse(&bytes).unwrap_err();
        for part in ["x.mat", name, "save('x.mat', '-v7')", "savemat"] {
            assert!(error.contains(part), "{error}");
        }
    }
    for bytes in [&b""[..], &[0; 500], b"<html>404</html>", &[b'x'; 500]] {
        let error = parse(bytes).unwrap_err();
        assert!(error.contains("not a MATLAB 5 file"), "{error}");
    }
}

#[test]
fn errors_name_the_variable_and_the_field() {
    let annotations = annotations(3);
    let file = parse(&write(&[("annotations", &annotations)], PLAIN).unwrap()).unwrap();
    let error = file.variable("annos").unwrap_err().to_string();
    assert!(
        error.contains("no variable annos, only: annotations"),
        "{error}"
    );
    let variable = file.variable("annotations").unwrap();
    let error = variable.texts().unwrap_err().to_string();
    assert!(
        error.contains("annotations: a structure array of 3"),
        "{error}"
    );
    let row = variable.rows().unwrap().nth(2).unwrap();
    assert_eq!(row.integer("class", 1..=7).unwrap(), 3);
    let error = row.integer("class", 1..=2).unwrap_err().to_string();
    assert!(
        error.contains("row 3, field class: 3; expected a whole number from 1 to 2"),
        "{error}"
    );
}

/// Deflated zeros.
fn bomb(bytes: usize) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    let zeros = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        encoder.write_all(&zeros).unwrap();
    }
    let mut all = 15u32.to_le_bytes().to_vec();
    let deflated = encoder.finish().unwrap();
    all.extend((deflated.len() as u32).to_le_bytes());
    all.extend(deflated);
    all
}

#[test]
fn bombs_and_lies_are_errors() {
    let error = parse(&file(&bomb(1 << 30))).unwrap_err();
    assert!(error.contains("inflates to more than 32 MiB"), "{error}");
    // Several that stay below the limit each.
    let one = write(
        &[("x", &Value::Numbers(vec![1e9; MAX_INFLATED_BYTES / 20]))],
        Options::default(),
    )
    .unwrap();
    parse(&one).unwrap();
    let error = parse(&file(&one[128..].repeat(4))).unwrap_err();
    assert!(error.contains("inflates to more than 32 MiB"), "{error}");
    // Dimensions that promise far more than there is, also when their product overflows.
    for class in [1, 2, 4, 6, 9] {
        for dimensions in [&[1, u32::MAX][..], &[u32::MAX; 40], &[1 << 16; 4]] {
            for content in [
                vec![],
                [element(5, &32u32.to_le_bytes()), element(1, &[b'a'; 32])].concat(),
            ] {
                let outcome = parse(&file(&array(class, dimensions, &content)));
                let supported = class != 4 || dimensions[0] == 1;
                assert_eq!(
                    outcome.is_err(),
                    supported,
                    "{class} {dimensions:?} {outcome:?}"
                );
            }
        }
    }
    // Rows without fields take no bytes, however many.
    let none = [element(5, &32u32.to_le_bytes()), element(1, b"")].concat();
    let found = parse(&file(&array(2, &[1, u32::MAX], &none))).unwrap();
    assert_eq!(found.variable("x").unwrap().rows().unwrap().len(), 0);
    let mut nested = array(6, &[1, 1], &element(2, &[1]));
    for _ in 0..20_000 {
        nested = array(1, &[1, 1], &nested);
    }
    let error = parse(&file(&nested)).unwrap_err();
    assert!(error.contains("nested deeper than 16"), "{error}");
}

#[test]
fn every_truncation_is_an_error() {
    let (a, b) = (
        annotations(5),
        Value::Cells(vec![text("Škoda"), Value::Numbers(vec![0.5, 2.0])]),
    );
    for compressed in [false, true] {
        let options = Options {
            compressed,
            big_endian: false,
        };
        let bytes = write(&[("a", &a), ("b", &b)], options).unwrap();
        let first = write(&[("a", &a)], options).unwrap().len();
        for length in 0..bytes.len() {
            let outcome = parse(&bytes[..length]);
            // Whole variables are a whole file.
            assert_eq!(
                outcome.is_ok(),
                length == 128 || length == first,
                "{length}"
            );
        }
    }
}

#[test]
fn no_changed_byte_panics_or_hangs() {
    let (a, b) = (
        annotations(5),
        Value::Cells(vec![text("Škoda"), Value::Numbers(vec![0.5, 2.0])]),
    );
    let mut state = 1u64;
    let mut next = move |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut refused = 0;
    for (compressed, big_endian) in [(false, false), (false, true), (true, false)] {
        let good = write(
            &[("a", &a), ("b", &b)],
            Options {
                compressed,
                big_endian,
            },
        )
        .unwrap();
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..=next(3) {
                let at = next(bytes.len());
                bytes[at] = match next(4) {
                    0 => 0,
                    1 => 0xFF,
                    _ => next(256) as u8,
                };
            }
            match parse(&bytes) {
                Ok(file) => {
                    for name in file.names() {
                        let variable = file.variable(name).unwrap();
                        let _ = variable.texts();
                        for row in variable.rows().into_iter().flatten() {
                            let _ = (row.text("fname"), row.integer("class", 1..=7));
                        }
                    }
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.contains('\n') && error.len() < 1000, "{error}");
                }
            }
        }
    }
    assert!(refused > 10_000, "{refused}");
}

fn value() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<u8>().prop_map(f64::from),
        any::<u16>().prop_map(f64::from),
        -1e9..1e9f64,
    ];
    let leaf = prop_oneof![
        proptest::collection::vec(number, 0..5).prop_map(Value::Numbers),
        // Within the Basic Multilingual Plane and beyond.
        proptest::collection::vec(any::<char>(), 1..8)
            .prop_map(|c| Value::Text(c.into_iter().collect())),
        Just(text("")),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::Cells),
            (1..4usize, 0..3usize, proptest::collection::vec(inner, 12)).prop_map(
                |(fields, rows, values)| {
                    Value::Structs(StructArray {
                        fields: (0..fields).map(|i| "field".repeat(i + 1)).collect(),
                        values: values.into_iter().take(fields * rows).collect(),
                    })
                }
            ),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(value in value(), compressed: bool, big_endian: bool) {
        let options = Options { compressed, big_endian };
        let other = Value::Numbers(vec![1.0]);
        let bytes = write(&[("before", &other), ("it", &value)], options).unwrap();
        let file = parse(&bytes).unwrap();
        prop_assert_eq!(file.variable("it").unwrap().value(), &value);
        prop_assert_eq!(file.variable("before").unwrap().value(), &other);
    }
}
