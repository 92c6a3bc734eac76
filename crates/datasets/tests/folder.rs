//! Trees on disk: what is read, and the one clear line that each broken tree gives.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{encode, jpeg_bytes, png_bytes, put, tree};
use isqrt_datasets::{DataSet, Pipeline, decode, image_folder, split};
use png::{BitDepth, ColorType};

#[test]
fn reads_a_tree_and_ignores_what_is_no_image() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    tree(root, &["train", "valid", "test"], 2);
    put(&root.join("train/cat/.hidden.png"), b"x");
    put(&root.join("train/.cache/x.png"), b"x");
    put(&root.join("train/cat/notes.txt"), b"x");
    put(&root.join("classes.tsv"), b"x");
    put(&root.join("train/cat/more/deep.JPEG"), &jpeg_bytes(8, 8));
    let folder = image_folder(root).unwrap();
    assert_eq!(folder.classes, ["cat", "dog"]);
    let names: Vec<&str> = folder.train.iter().map(|s| &*s.name).collect();
    assert_eq!(
        names,
        [
            "train/cat/0.png",
            "train/cat/1.png",
            "train/cat/more/deep.JPEG",
            "train/dog/0.png",
            "train/dog/1.png"
        ]
    );
    assert_eq!(folder.val.unwrap().len(), 4);
    assert_eq!(folder.test.unwrap()[3].label, 1);
}

#[test]
fn class_folders_alone_are_a_training_part() {
    let home = tempfile::tempdir().unwrap();
    tree(home.path(), &["."], 8);
    let folder = image_folder(home.path()).unwrap();
    assert_eq!(folder.train.len(), 16);
    let parts = split(folder, 5).unwrap();
    let sizes = (parts.train.len(), parts.val.len(), parts.test.len());
    assert_eq!(sizes, (10, 2, 4));
    assert!(parts.note.contains("no held-out part"), "{}", parts.note);
}

/// The error of opening `root`; checks that it is one line that names `at`.
fn complaint(root: &Path, at: &Path) -> String {
    let text = DataSet::open(root, &Pipeline::identity(), 0)
        .unwrap_err()
        .to_string();
    assert!(text.contains(&at.display().to_string()), "{text}");
    assert!(text.contains("expected"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn broken_trees_give_one_clear_line() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);

    let missing = at("missing");
    assert!(complaint(&missing, &missing).contains("no such folder"));

    put(&at("file"), b"x");
    assert!(complaint(&at("file"), &at("file")).contains("this is a file"));

    std::fs::create_dir(at("empty")).unwrap();
    assert!(complaint(&at("empty"), &at("empty")).contains("no folders"));

    std::fs::create_dir_all(at("classless/train")).unwrap();
    assert!(complaint(&at("classless"), &at("classless/train")).contains("no class folders"));

    put(&at("single/train/cat/0.png"), &png_bytes(4, 4, 0));
    assert!(complaint(&at("single"), &at("single/train")).contains("only one class"));

    tree(&at("hollow"), &["train"], 2);
    std::fs::create_dir_all(at("hollow/train/emu")).unwrap();
    assert!(complaint(&at("hollow"), &at("hollow/train/emu")).contains("no images"));

    tree(&at("untrained"), &["val"], 2);
    assert!(complaint(&at("untrained"), &at("untrained")).contains("no train folder"));

    tree(&at("above/pets"), &["train"], 2);
    assert!(complaint(&at("above"), &at("above")).contains("pets/ holds one"));

    tree(&at("uneven"), &["train", "val"], 2);
    std::fs::rename(at("uneven/val/dog"), at("uneven/val/fox")).unwrap();
    let text = complaint(&at("uneven"), &at("uneven/val"));
    assert!(text.contains("lacks the class folders dog"), "{text}");
    assert!(text.contains("fox"), "{text}");

    tree(&at("twice"), &["train", "val", "validation"], 2);
    assert!(complaint(&at("twice"), &at("twice")).contains("val, validation"));
}

#[test]
fn broken_files_are_named() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    let bad = root.join("train/cat/1.jpg");
    let jpeg = jpeg_bytes(64, 64);
    let cases: [(&[u8], &str); 6] = [
        (b"", "the file is empty"),
        (b"not an image at all\n", "looks like text"),
        (&jpeg[..jpeg.len() - 30], "broken JPEG"),
        (&png_bytes(8, 8, 1)[..80], "broken PNG"),
        (b"GIF89a......", "GIF"),
        (&jpeg_bytes(65535, 65535)[..200], "65535x65535"),
    ];
    for (bytes, says) in cases {
        tree(root, &["train", "val", "test"], 1);
        put(&bad, bytes);
        let text = complaint(root, &bad);
        assert!(text.contains(says), "{says}: {text}");
    }
}

#[test]
fn different_sizes_need_a_resize() {
    let home = tempfile::tempdir().unwrap();
    tree(home.path(), &["train", "val", "test"], 2);
    let odd = home.path().join("train/dog/1.png");
    put(&odd, &png_bytes(12, 9, 1));
    assert!(complaint(home.path(), &odd).contains("12x9"));
    let set = DataSet::open(home.path(), &Pipeline::square(8), 0).unwrap();
    assert_eq!(set.train.image_size(), (8, 8));
}

#[cfg(unix)]
#[test]
fn unreadable_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    tree(home.path(), &["train", "val", "test"], 2);
    let forbid = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let file = home.path().join("train/cat/0.png");
    forbid(&file, 0o000);
    if std::fs::read(&file).is_ok() {
        return; // an administrator reads everything
    }
    let open = || {
        DataSet::open(home.path(), &Pipeline::identity(), 0)
            .unwrap_err()
            .to_string()
    };
    assert!(open().contains("0.png"), "{}", open());
    forbid(&file, 0o644);
    let folder = home.path().join("train/cat");
    forbid(&folder, 0o000);
    let text = open();
    forbid(&folder, 0o755);
    assert!(text.contains("cat: cannot"), "{text}");
}

#[test]
fn content_decides_the_format_and_every_colour_type_becomes_rgb() {
    let at = Path::new("x.jpg");
    let rgb = decode(&png_bytes(5, 4, 9), at).unwrap();
    assert_eq!(
        (rgb.width, rgb.height, &rgb.pixels[..6]),
        (5, 4, &[9, 0, 9, 8, 0, 9][..])
    );

    let gray = decode(
        &encode(2, 1, ColorType::Grayscale, BitDepth::Eight, &[3, 200]),
        at,
    )
    .unwrap();
    assert_eq!(gray.pixels, [3, 3, 3, 200, 200, 200]);
    let alpha = [10, 20, 30, 0, 40, 50, 60, 255];
    let rgba = decode(&encode(2, 1, ColorType::Rgba, BitDepth::Eight, &alpha), at).unwrap();
    assert_eq!(rgba.pixels, [10, 20, 30, 40, 50, 60]);
    let wide = encode(
        1,
        1,
        ColorType::Rgb,
        BitDepth::Sixteen,
        &[1, 99, 2, 99, 3, 99],
    );
    assert_eq!(decode(&wide, at).unwrap().pixels, [1, 2, 3]);
    let bits = encode(2, 1, ColorType::Grayscale, BitDepth::One, &[0b0100_0000]);
    assert_eq!(decode(&bits, at).unwrap().pixels, [0, 0, 0, 255, 255, 255]);

    let jpeg = decode(&jpeg_bytes(9, 3), Path::new("x.png")).unwrap();
    assert_eq!((jpeg.width, jpeg.height), (9, 3));
    assert!(jpeg.pixels.iter().all(|&v| v == 128));
}

#[test]
fn the_fingerprint_sees_content_and_not_the_place() {
    let homes: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    for home in &homes {
        tree(home.path(), &["train", "val", "test"], 2);
    }
    put(
        &homes[2].path().join("test/dog/1.png"),
        &png_bytes(8, 8, 77),
    );
    let prints: Vec<String> = homes
        .iter()
        .map(|home| {
            DataSet::open(home.path(), &Pipeline::identity(), 0)
                .unwrap()
                .fingerprint()
        })
        .collect();
    assert_eq!(prints[0].len(), 64);
    assert_eq!(prints[0], prints[1]);
    assert_ne!(prints[0], prints[2]);
}
