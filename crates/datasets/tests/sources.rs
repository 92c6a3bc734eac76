//! Data sets in the layouts of their owners: the official lists with their official counts, small
//! trees, and the line that each broken list gives.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::path::Path;

use common::{Table, put, shared_data};
use isqrt_datasets::formats::matlab::{StructArray, Value};
use isqrt_datasets::formats::matlab_writer::{Options, write};
use isqrt_datasets::formats::tar;
use isqrt_datasets::{BoundingBox, ListOptions, Listing, SOURCES, Sample, list, list_with};

fn source(root: &Path) -> &'static str {
    SOURCES.iter().find(|s| (s.recognises)(root)).unwrap().name
}

/// Numbers of training, validation and test samples.
fn counts(listing: &Listing) -> [usize; 3] {
    let count = |part: &Option<Vec<Sample>>| part.as_ref().map_or(0, Vec::len);
    [
        listing.train.len(),
        count(&listing.val),
        count(&listing.test),
    ]
}

/// The error of listing `root`, one line that names `at`.
fn complaint(root: &Path, at: &str) -> String {
    let text = list(root).unwrap_err().to_string();
    assert!(text.contains(at) && text.contains("expected"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn puts(root: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        put(&root.join(name), text.as_bytes());
    }
}

fn bounding_box(sample: &Sample) -> [f32; 4] {
    let found = sample.annotation.as_ref().unwrap().bounding_box.unwrap();
    let BoundingBox {
        left,
        top,
        width,
        height,
    } = found;
    [left, top, width, height]
}

// CUB-200-2011

const CUB: [(&str, &str); 6] = [
    (
        "images.txt",
        "1 002.B/b1.jpg\n2 001.A/a1.jpg\r\n3 002.B/b2.jpg\n4 001.A/a2.jpg\n",
    ),
    ("image_class_labels.txt", "1 2\n2 1\n3 2\n4 1\n"),
    ("train_test_split.txt", "1 1\n2 1\n3 0\n4 0\n"),
    ("classes.txt", "2 002.B\n1 001.A\n"),
    ("bounding_boxes.txt", "1 60.0 27.0 325.0 304.0\n"),
    ("parts/part_locs.txt", "3 1 0.0 0.0 0\n3 2 186.0 45.5 1\n"),
];

#[test]
fn cub_official_and_mini() {
    if let Some(root) = shared_data("cub_metadata") {
        for root in [root.join("CUB_200_2011"), root] {
            assert_eq!(source(&root), "cub-200-2011");
            let found = list(&root).unwrap();
            assert_eq!(counts(&found), [5994, 0, 5794]);
            assert_eq!(found.classes.len(), 200);
            assert_eq!(found.classes[0], "001.Black_footed_Albatross");
            let first = &found.train[0];
            assert_eq!(
                &*first.name,
                "images/001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg"
            );
            assert_eq!(bounding_box(first), [139.0, 30.0, 153.0, 264.0]);
            for sample in found.train.iter().chain(found.test.iter().flatten()) {
                let folder = format!("images/{}/", found.classes[sample.label as usize]);
                assert!(sample.name.starts_with(&folder), "{sample:?}");
            }
        }
    }
    if let Some(root) = shared_data("cub_mini") {
        let found = list(&root).unwrap();
        assert_eq!(counts(&found), [300, 0, 290]);
        assert_eq!(found.classes.len(), 10);
        let image = found.test.unwrap()[0].decode().unwrap();
        assert_eq!(image.width.min(image.height), 112);
    }
}

#[test]
fn cub_reads_labels_parts_and_boxes_by_number() {
    let home = tempfile::tempdir().unwrap();
    puts(&home.path().join("CUB_200_2011"), &CUB);
    let found = list(home.path()).unwrap();
    assert_eq!(found.classes, ["001.A", "002.B"]);
    let seen = |part: &[Sample]| -> Vec<(String, u32)> {
        part.iter().map(|s| (s.name.to_string(), s.label)).collect()
    };
    assert_eq!(
        seen(&found.train),
        [
            ("images/002.B/b1.jpg".into(), 1),
            ("images/001.A/a1.jpg".into(), 0)
        ]
    );
    let test = found.test.unwrap();
    assert_eq!(
        seen(&test),
        [
            ("images/002.B/b2.jpg".into(), 1),
            ("images/001.A/a2.jpg".into(), 0)
        ]
    );
    assert_eq!(bounding_box(&found.train[0]), [60.0, 27.0, 325.0, 304.0]);
    let parts = &test[0].annotation.as_ref().unwrap().parts;
    assert_eq!((parts.len(), parts[1].x, parts[1].y), (2, 186.0, 45.5));
    assert!(parts[1].visible && !parts[0].visible);
    assert!(test[1].annotation.is_none());
    let options = ListOptions {
        labels: Some("family".into()),
        ..Default::default()
    };
    let error = list_with(home.path(), &options).unwrap_err().to_string();
    assert!(
        error.contains("cub-200-2011 has one kind of labels"),
        "{error}"
    );
}

#[test]
fn cub_lists_that_are_broken() {
    let broken = [
        ("images.txt", "1\n", "line 1"),
        (
            "images.txt",
            "1 a.jpg\n1 b.jpg\n",
            "line 2: image 1 a second time",
        ),
        (
            "images.txt",
            "1 ../../secret.jpg\n",
            "line 1: the path \"../../secret.jpg\", which leaves",
        ),
        ("images.txt", "1 /etc/passwd\n", "line 1: the absolute path"),
        ("image_class_labels.txt", "1 2\n2 1\n3 3\n", "line 3: \"3\""),
        (
            "image_class_labels.txt",
            "1 2\n2 1\n",
            "no line for image 3 (images/002.B/b2.jpg)",
        ),
        (
            "image_class_labels.txt",
            "1 2\n9 1\n",
            "line 2: image 9 is not in images.txt",
        ),
        (
            "train_test_split.txt",
            "1 1\n1 1\n",
            "line 2: this image a second time",
        ),
        ("train_test_split.txt", "1 1\n2 yes\n", "line 2: \"yes\""),
        (
            "train_test_split.txt",
            "1 1\n2 1\n3 1\n4 1\n",
            "4 training and 0 test images",
        ),
        ("train_test_split.txt", "\u{0}\n", "line 1"),
        ("classes.txt", "1 001.A\n1 002.B\n", "2 lines for 1 classes"),
        ("classes.txt", "", "0 lines"),
        ("bounding_boxes.txt", "1 1 2 3\n", "line 1"),
        ("bounding_boxes.txt", "1 1 2 3 inf\n", "line 1"),
        ("parts/part_locs.txt", "1 1 2 3 2\n", "line 1"),
    ];
    for (name, text, expected) in broken {
        let home = tempfile::tempdir().unwrap();
        puts(home.path(), &CUB);
        puts(home.path(), &[(name, text)]);
        let error = complaint(home.path(), name);
        assert!(error.contains(expected), "{error}");
    }
    let home = tempfile::tempdir().unwrap();
    puts(home.path(), &CUB);
    put(&home.path().join("images.txt"), b"1 \xFF\xFE");
    assert!(complaint(home.path(), "images.txt").contains("UTF-8"));
    std::fs::remove_file(home.path().join("classes.txt")).unwrap();
    puts(home.path(), &CUB[..1]);
    let error = list(home.path()).unwrap_err().to_string();
    assert!(error.contains("classes.txt: cannot read"), "{error}");
}

// Stanford Cars

fn texts(texts: &[&str]) -> Value {
    Value::Cells(texts.iter().map(|t| Value::Text((*t).to_owned())).collect())
}

/// Rows with a box, then the given fields: a text or a number each.
fn annotations(fields: &[&str], rows: &[(&str, &[f64])]) -> Value {
    let corners = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"];
    let mut values = Vec::new();
    for (path, numbers) in rows {
        values.push(Value::Text((*path).to_owned()));
        values.extend([11.0, 21.0, 110.0, 60.0].map(|n| Value::Numbers(vec![n])));
        values.extend(numbers.iter().map(|n| Value::Numbers(vec![*n])));
    }
    let fields = [&fields[..1], &corners, &fields[1..]].concat();
    let fields = fields.into_iter().map(str::to_owned).collect();
    Value::Structs(StructArray { fields, values })
}

fn put_mat(path: &Path, variables: &[(&str, &Value)]) {
    put(path, &write(variables, Options::default()).unwrap());
}

fn put_cars(root: &Path) {
    let names = texts(&[
        "AM General Hummer SUV 2000",
        " Ram C/V Cargo Van Minivan 2012 ",
    ]);
    put_mat(
        &root.join("devkit/cars_meta.mat"),
        &[("class_names", &names)],
    );
    let train = annotations(
        &["fname", "class"],
        &[("00001.jpg", &[2.0]), ("00002.jpg", &[1.0])],
    );
    put_mat(
        &root.join("devkit/cars_train_annos.mat"),
        &[("annotations", &train)],
    );
    let test = annotations(&["fname", "class"], &[("00001.jpg", &[1.0])]);
    put_mat(
        &root.join("cars_test_annos_withlabels.mat"),
        &[("annotations", &test)],
    );
}

#[test]
fn cars_official_and_mini() {
    if let Some(root) = shared_data("cars_metadata") {
        assert_eq!(source(&root), "stanford-cars");
        let found = list(&root).unwrap();
        assert_eq!(counts(&found), [8144, 0, 8041]);
        assert_eq!(found.classes.len(), 196);
        assert_eq!(&*found.train[0].name, "cars_train/00001.jpg");
        assert_eq!(found.train[0].label, 13);
        assert_eq!(bounding_box(&found.train[0]), [38.0, 115.0, 531.0, 260.0]);
        assert_eq!(&*found.test.unwrap()[8040].name, "cars_test/08041.jpg");
    }
    if let Some(root) = shared_data("cars_mini") {
        for root in [root.join("stanford_cars"), root] {
            let found = list(&root).unwrap();
            assert_eq!(counts(&found), [259, 0, 173]);
            assert_eq!(found.classes.len(), 10);
            let image = found.test.unwrap()[172].decode().unwrap();
            assert!(image.width.min(image.height) <= 96);
        }
    }
}

#[test]
fn cars_with_a_devkit() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("stanford_cars");
    put_cars(&root);
    let found = list(home.path()).unwrap();
    assert_eq!(found.classes[1], "Ram C/V Cargo Van Minivan 2012");
    assert_eq!(counts(&found), [2, 0, 1]);
    assert_eq!(found.train[0].label, 1);
    assert_eq!(bounding_box(&found.train[0]), [10.0, 20.0, 100.0, 40.0]);
    assert_eq!(found.train[0].path(), root.join("cars_train/00001.jpg"));
    // As some copies are nested.
    std::fs::create_dir_all(root.join("cars_train/cars_train")).unwrap();
    let found = list(home.path()).unwrap();
    assert_eq!(&*found.train[0].name, "cars_train/00001.jpg");
    assert_eq!(
        found.train[0].path(),
        root.join("cars_train/cars_train/00001.jpg")
    );

    std::fs::rename(
        root.join("cars_test_annos_withlabels.mat"),
        root.join("devkit/cars_test_annos.mat"),
    )
    .unwrap();
    let error = complaint(&root, "stanford_cars");
    assert!(
        error.contains("put cars_test_annos_withlabels.mat here or into devkit"),
        "{error}"
    );
}

#[test]
fn cars_in_one_file() {
    let home = tempfile::tempdir().unwrap();
    let names = texts(&["A", "B"]);
    let rows: [(&str, &[f64]); 2] = [
        ("car_ims/000001.jpg", &[2.0, 0.0]),
        ("car_ims/000002.jpg", &[1.0, 1.0]),
    ];
    let rows = annotations(&["relative_im_path", "class", "test"], &rows);
    let path = home.path().join("cars_annos.mat");
    put_mat(&path, &[("annotations", &rows), ("class_names", &names)]);
    let found = list(home.path()).unwrap();
    assert_eq!(counts(&found), [1, 0, 1]);
    assert_eq!(&*found.train[0].name, "car_ims/000001.jpg");
    // Both generations: the one whose images are there.
    put_cars(home.path());
    assert_eq!(
        &*list(home.path()).unwrap().train[0].name,
        "cars_train/00001.jpg"
    );
    std::fs::create_dir(home.path().join("car_ims")).unwrap();
    assert_eq!(
        &*list(home.path()).unwrap().train[0].name,
        "car_ims/000001.jpg"
    );
}

#[test]
fn cars_files_that_are_broken() {
    let train = "devkit/cars_train_annos.mat";
    type Rows<'a> = (&'a [&'a str], &'a [(&'a str, &'a [f64])]);
    let broken: [(Rows, &str); 5] = [
        (
            (&["fname", "class"], &[("1.jpg", &[1.0]), ("2.jpg", &[3.0])]),
            "row 2, field class: 3; expected a whole number from 1 to 2",
        ),
        (
            (&["fname", "class"], &[("1.jpg", &[0.5])]),
            "row 1, field class: 0.5",
        ),
        (
            (&["fname"], &[("1.jpg", &[])]),
            "field class: there is only: fname, bbox_x1",
        ),
        (
            (&["fname", "class"], &[("../../x.jpg", &[1.0])]),
            "row 1, field fname: the path \"../../x.jpg\", which leaves",
        ),
        ((&["fname", "class"], &[]), "0 training and 1 test images"),
    ];
    for ((fields, rows), expected) in broken {
        let home = tempfile::tempdir().unwrap();
        put_cars(home.path());
        put_mat(
            &home.path().join(train),
            &[("annotations", &annotations(fields, rows))],
        );
        let error = list(home.path()).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("expected"),
            "{error}"
        );
    }
    let home = tempfile::tempdir().unwrap();
    put_cars(home.path());
    puts(
        home.path(),
        &[(train, "version https://git-lfs.github.com/spec/v1\n")],
    );
    assert!(complaint(home.path(), "cars_train_annos.mat").contains("not a MATLAB 5 file"));
    std::fs::remove_file(home.path().join(train)).unwrap();
    assert!(complaint(home.path(), "cars_train_annos.mat").contains("unpack car_devkit.tgz"));
}

// FGVC-Aircraft

const AIRCRAFT: [(&str, &str); 8] = [
    ("variants.txt", "F-16A/B\nBAE 146-200\n"),
    ("images_variant_train.txt", "0000002 BAE 146-200\n"),
    ("images_variant_val.txt", "0000001 F-16A/B\n"),
    (
        "images_variant_trainval.txt",
        "0000001 F-16A/B\n0000002 BAE 146-200\n",
    ),
    ("images_variant_test.txt", "0000003 F-16A/B\n"),
    (
        "images_family_trainval.txt",
        "0000001 F-16\n0000002 BAE 146\n",
    ),
    ("images_family_test.txt", "0000003 F-16\n"),
    ("images_box.txt", "0000001 3 144 998 431\n"),
];

fn labelled(labels: &str) -> ListOptions {
    ListOptions {
        labels: Some(labels.to_owned()),
        ..Default::default()
    }
}

#[test]
fn aircraft_official() {
    let Some(root) = shared_data("aircraft_metadata") else {
        return;
    };
    for root in [
        root.join("fgvc-aircraft-2013b/data"),
        root.join("fgvc-aircraft-2013b"),
        root,
    ] {
        assert_eq!(source(&root), "fgvc-aircraft-2013b");
        let found = list(&root).unwrap();
        assert_eq!(counts(&found), [6667, 0, 3333]);
        assert_eq!(found.classes.len(), 100);
        assert_eq!(&*found.train[0].name, "images/1025794.jpg");
        assert!(found.classes.contains(&"F-16A/B".to_owned()));
        let mut seen = [false; 100];
        found
            .train
            .iter()
            .for_each(|s| seen[s.label as usize] = true);
        assert!(seen.iter().all(|seen| *seen));
    }
}

#[test]
fn aircraft_labels_of_every_kind() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    puts(&data, &AIRCRAFT);
    let found = list(home.path()).unwrap();
    assert_eq!(found.classes, ["F-16A/B", "BAE 146-200"]);
    assert_eq!(counts(&found), [2, 0, 1]);
    assert_eq!(bounding_box(&found.train[0]), [2.0, 143.0, 996.0, 288.0]);
    assert!(found.train[1].annotation.is_none());
    assert_eq!(found.train[0].path(), data.join("images/0000001.jpg"));
    let families = list_with(home.path(), &labelled("family")).unwrap();
    assert_eq!(families.classes, ["BAE 146", "F-16"]);
    assert_eq!(families.train[0].label, 1);
    let error = list_with(home.path(), &labelled("engine"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"engine\"; FGVC-Aircraft has: variant, family, manufacturer"),
        "{error}"
    );
    let error = list_with(home.path(), &labelled("manufacturer"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("images_manufacturer_"), "{error}");
    std::fs::remove_file(data.join("images_variant_trainval.txt")).unwrap();
    let found = list(home.path()).unwrap();
    let names: Vec<&str> = found.train.iter().map(|s| &*s.name).collect();
    assert_eq!(names, ["images/0000002.jpg", "images/0000001.jpg"]);
}

#[test]
fn aircraft_lists_that_are_broken() {
    let broken = [
        (
            "images_variant_trainval.txt",
            "0000001\n",
            "line 1: \"0000001\"",
        ),
        (
            "images_variant_trainval.txt",
            "../1 F-16A/B\n",
            "line 1: the path",
        ),
        (
            "images_variant_trainval.txt",
            "1 F-16A/B\n2 Zeppelin\n",
            "line 2: the class \"Zeppelin\" is not in variants.txt",
        ),
        ("images_variant_test.txt", "\n\n", "the list is empty"),
        ("images_box.txt", "1 2 3 4\n", "line 1"),
        ("variants.txt", "A\nA\n", "a class is listed twice"),
    ];
    for (name, text, expected) in broken {
        let home = tempfile::tempdir().unwrap();
        puts(home.path(), &AIRCRAFT);
        puts(home.path(), &[(name, text)]);
        let error = complaint(home.path(), name);
        assert!(error.contains(expected), "{error}");
    }
}

// ImageNet

/// Numbers of the devkit are 1 for n02 and 2 for n01; number 3 is no class.
fn put_devkit(folder: &Path) {
    let row = |id: f64, wnid: &str, children: f64| {
        let number = |n: f64| Value::Numbers(vec![n]);
        let text = |t: &str| Value::Text(t.to_owned());
        [
            number(id),
            text(wnid),
            text("a, b"),
            number(children),
            number(3.0),
        ]
    };
    let rows = [
        row(1.0, "n00000002", 0.0),
        row(2.0, "n00000001", 0.0),
        row(3.0, "n00000003", 2.0),
    ];
    let fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "num_children",
        "num_train_images",
    ];
    let synsets = Value::Structs(StructArray {
        fields: fields.map(str::to_owned).into(),
        values: rows.into_iter().flatten().collect(),
    });
    let data = folder.join("ILSVRC2012_devkit_t12/data");
    put_mat(&data.join("meta.mat"), &[("synsets", &synsets)]);
    puts(
        &data,
        &[("ILSVRC2012_validation_ground_truth.txt", "1\n2\n1\n")],
    );
}

const VAL: [(&str, &str); 3] = [
    ("ILSVRC2012_val_00000001.JPEG", "n00000002"),
    ("ILSVRC2012_val_00000002.JPEG", "n00000001"),
    ("ILSVRC2012_val_00000003.JPEG", "n00000002"),
];

fn put_imagenet(base: &Path, flat: bool) {
    for wnid in ["n00000001", "n00000002"] {
        for i in [10, 2] {
            put(
                &base.join(format!("train/{wnid}/{wnid}_{i}.JPEG")),
                wnid.as_bytes(),
            );
        }
    }
    for (name, wnid) in VAL {
        let folder = if flat {
            "val".to_owned()
        } else {
            format!("val/{wnid}")
        };
        put(&base.join(folder).join(name), name.as_bytes());
    }
}

fn put_kaggle_lists(folder: &Path) {
    let solution = "ImageId,PredictionString\nILSVRC2012_val_00000003,n00000002 85 1 499 272 \n\
         ILSVRC2012_val_00000002,n00000001 1 1 9 9 n00000001 2 2 8 8\nILSVRC2012_val_00000001,n00000002 1 2 3 4\n";
    let mapping = "n00000001 one, uno\nn00000002 two\n";
    puts(
        folder,
        &[
            ("LOC_val_solution.csv", solution),
            ("LOC_synset_mapping.txt", mapping),
        ],
    );
}

/// The official archives: a tar of tars, a tar of all validation images, the devkit packed.
fn put_imagenet_archives(root: &Path) {
    let class = |wnid: &str| {
        let image = |i: u32| (format!("{wnid}_{i}.JPEG"), wnid.as_bytes().to_vec());
        let files = [image(10), image(2)];
        (format!("{wnid}.tar"), tar::write(&files).unwrap())
    };
    let classes = [class("n00000002"), class("n00000001")];
    put(
        &root.join("ILSVRC2012_img_train.tar"),
        &tar::write(&classes).unwrap(),
    );
    let images = VAL.map(|(name, _)| (name.to_owned(), name.as_bytes().to_vec()));
    put(
        &root.join("ILSVRC2012_img_val.tar"),
        &tar::write(&images).unwrap(),
    );
    put_packed_devkit(root);
}

fn put_packed_devkit(root: &Path) {
    let home = tempfile::tempdir().unwrap();
    put_devkit(home.path());
    let data = "ILSVRC2012_devkit_t12/data";
    let files = ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"].map(|name| {
        let name = format!("{data}/{name}");
        let bytes = std::fs::read(home.path().join(&name)).unwrap();
        (name, bytes)
    });
    let mut packed = Vec::new();
    let mut writer = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::fast());
    writer.write_all(&tar::write(&files).unwrap()).unwrap();
    writer.finish().unwrap();
    put(&root.join("ILSVRC2012_devkit_t12.tar.gz"), &packed);
}

/// Names, labels and contents of all samples.
fn all(root: &Path) -> Vec<(String, u32, Vec<u8>)> {
    let found = list(root).unwrap();
    assert_eq!(found.classes, ["n00000001", "n00000002"]);
    let mut bytes = Vec::new();
    let samples = found.train.iter().chain(found.val.as_ref().unwrap());
    samples
        .map(|sample| {
            sample.read(&mut bytes).unwrap();
            (sample.name.to_string(), sample.label, bytes.clone())
        })
        .collect()
}

#[test]
fn every_layout_of_imagenet_gives_the_same_samples() {
    let home = tempfile::tempdir().unwrap();
    let [folders, flat, beside, kaggle, sorted] =
        ["folders", "flat", "beside/here", "kaggle", "sorted"].map(|name| home.path().join(name));
    put_imagenet(&folders, false);
    put_imagenet(&flat, true);
    put_devkit(&flat);
    put_imagenet(&beside, true);
    put_devkit(beside.parent().unwrap());
    put_imagenet(&kaggle.join("ILSVRC/Data/CLS-LOC"), true);
    put_kaggle_lists(&kaggle);
    put_imagenet(&sorted.join("ILSVRC/Data/CLS-LOC"), false);
    let expected = all(&folders);
    assert_eq!(source(&folders), "folder");
    assert_eq!(expected[4].0, "val/n00000001/ILSVRC2012_val_00000002.JPEG");
    for root in [
        flat,
        beside,
        sorted,
        kaggle.join("ILSVRC/Data/CLS-LOC"),
        kaggle.join("ILSVRC"),
        kaggle,
    ] {
        assert_eq!(source(&root), "imagenet-1k");
        assert_eq!(all(&root), expected, "{}", root.display());
    }
    // Archives; then one of the two unpacked.
    let archives = home.path().join("archives");
    put_imagenet_archives(&archives);
    let [train, val] = ["train", "val"].map(|part| format!("ILSVRC2012_img_{part}.tar"));
    let unpacked = |archive: &str, name: &str, flat: bool| {
        let root = home.path().join(name);
        put_imagenet(&root, flat);
        put_packed_devkit(&root);
        std::fs::copy(archives.join(archive), root.join(archive)).unwrap();
        let part = if archive == val { "val" } else { "train" };
        std::fs::remove_dir_all(root.join(part)).unwrap();
        root
    };
    for root in [
        unpacked(&train, "val in folders", false),
        unpacked(&train, "val flat", true),
        unpacked(&val, "train in folders", false),
        archives,
    ] {
        // The second time from the index.
        for _ in 0..2 {
            assert_eq!(source(&root), "imagenet-archives");
            assert_eq!(all(&root), expected, "{}", root.display());
        }
    }
}

#[test]
fn imagenet_archives_that_lack_something() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    put_imagenet_archives(root);
    let devkit = root.join("ILSVRC2012_devkit_t12.tar.gz");
    let packed = std::fs::read(&devkit).unwrap();
    put(&devkit, &packed[..packed.len() / 2]);
    assert!(complaint(root, "devkit_t12.tar.gz").contains("cannot be unpacked"));
    std::fs::remove_file(&devkit).unwrap();
    assert!(complaint(root, "val").contains("ILSVRC2012_devkit_t12.tar.gz or"));
    put(&devkit, &packed);
    let val = root.join("ILSVRC2012_img_val.tar");
    put(&val, &tar::write(&[]).unwrap());
    assert!(complaint(root, "ILSVRC2012_img_val.tar").contains("is not in it"));
    put(&root.join("ILSVRC2012_img_train.tar"), &[7; 2000]);
    assert!(complaint(root, "ILSVRC2012_img_train.tar").contains("no tar archive"));
}

#[test]
fn imagenet_without_its_ground_truth_or_with_a_broken_one() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    put_imagenet(root, true);
    assert!(complaint(root, "val").contains("ILSVRC2012_devkit_t12/ or"));
    put_devkit(root);
    let truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt";
    for (text, expected) in [
        ("1\n3\n", "line 2: \"3\"; expected a number from 1 to 2"),
        ("1\n\n-1", "line 3"),
        ("", "no images"),
    ] {
        puts(root, &[(truth, text)]);
        let error = list(root).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    put_devkit(root);
    std::fs::rename(root.join("train/n00000001"), root.join("train/n00000009")).unwrap();
    let error = complaint(root, "train");
    assert!(
        error.contains("n00000009 is none of the ground truth"),
        "{error}"
    );

    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    put_imagenet(&root.join("ILSVRC/Data/CLS-LOC"), true);
    put_kaggle_lists(root);
    let line = "ILSVRC2012_val_00000003,n00000002 1 2 3 4\n";
    for (text, expected) in [
        ("ILSVRC2012_val_1,n00000007 1 2 3 4\n", "line 2"),
        ("../../secret,n00000002 1 2 3 4\n", "line 2"),
        ("ILSVRC2012_val_1\n", "line 2"),
        (
            &line.repeat(2),
            "ILSVRC2012_val_00000003.JPEG is listed twice",
        ),
    ] {
        puts(
            root,
            &[(
                "LOC_val_solution.csv",
                &format!("ImageId,PredictionString\n{text}"),
            )],
        );
        let error = complaint(root, "LOC_val_solution.csv");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn imagenet_ground_truth_is_that_of_everyone() {
    let (Some(devkit), Some(mini)) = (
        shared_data("imagenet_devkit"),
        shared_data("imagenet_val_mini"),
    ) else {
        return;
    };
    // A tree with the real devkit beside it and an image a class.
    let home = tempfile::tempdir().unwrap();
    let data = "ILSVRC2012_devkit_t12/data";
    for name in ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"] {
        put(
            &home.path().join(data).join(name),
            &std::fs::read(devkit.join(data).join(name)).unwrap(),
        );
    }
    let words = std::fs::read_to_string(devkit.join("synset_words.txt")).unwrap();
    let mut wnids: Vec<&str> = words.lines().map(|line| &line[..9]).collect();
    wnids.sort_unstable();
    for wnid in &wnids {
        put(&home.path().join("train").join(wnid).join("1.JPEG"), b"x");
    }
    put(&home.path().join("val/ILSVRC2012_val_00000001.JPEG"), b"x");
    let found = list(home.path()).unwrap();
    assert_eq!(found.classes, wnids);
    let val = found.val.unwrap();
    assert_eq!(val.len(), 50_000);
    for label in 0..1000 {
        assert_eq!(val.iter().filter(|s| s.label == label).count(), 50);
    }
    let table = Table::read(&mini.join("labels.tsv"));
    assert_eq!(table.rows.len(), 60);
    for row in &table.rows {
        let (file, wnid) = (table.cell(row, "file"), table.cell(row, "wnid"));
        let name = file.replace("val/", &format!("val/{wnid}/"));
        let sample = val.iter().find(|s| *s.name == *name).unwrap();
        assert_eq!(f64::from(sample.label), table.number(row, "index0"));
        assert!(sample.path().ends_with(file));
    }
}

#[test]
fn what_lies_beside_class_folders_does_not_matter() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    put_imagenet(root, false);
    let expected = all(root);
    let archive = tar::write(&[("readme".to_owned(), vec![1])]).unwrap();
    for name in [
        "notes.tar",
        "ILSVRC2012_img_val.tar",
        "ILSVRC2012_img_train.tar",
    ] {
        put(&root.join(name), &archive);
    }
    puts(
        root,
        &[("train.csv", "id,whatever\n1,2\n"), ("all.tar.gz", "x")],
    );
    assert_eq!(source(root), "folder");
    assert_eq!(all(root), expected);
}

#[test]
fn a_part_of_imagenet_has_labels_of_its_own() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    put_imagenet(root, true);
    put_devkit(root);
    let third = "n00000005";
    std::fs::rename(root.join("train/n00000001"), root.join("train").join(third)).unwrap();
    complaint(root, "train");
    std::fs::remove_dir_all(root.join("train").join(third)).unwrap();
    for i in 0..2 {
        put(&root.join(format!("train/n00000002/{i}.JPEG")), b"x");
    }
    let found = list(root).unwrap();
    assert_eq!(found.classes, ["n00000002"]);
    let val = found.val.unwrap();
    assert_eq!(val.len(), 2);
    assert!(
        val.iter()
            .all(|s| s.label == 0 && s.name.contains("n00000002"))
    );
}
