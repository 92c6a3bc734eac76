//! Damaged and hostile files: an error, no panic, no large allocation, no long wait.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use isqrt_models::checkpoint::Checkpoint;

/// Notes the largest amount of memory in use.
struct Watch;

static USED: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(used, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static WATCH: Watch = Watch;

/// More than a small file may ever cost. One test runs at a time (see `tests`), so that memory is
/// that of the file under test.
const LIMIT: usize = 300 << 20;

/// Far more than any file of a few MB takes, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads all that a file has; the first error. Fails where that takes much memory.
fn read(path: &Path) -> Result<(), String> {
    MOST.store(USED.load(Ordering::Relaxed), Ordering::Relaxed);
    let before = USED.load(Ordering::Relaxed);
    let start = Instant::now();
    let result = Checkpoint::open(path).and_then(|file| {
        let names: Vec<String> = file.tensors().map(|(name, ..)| name.to_owned()).collect();
        names.iter().try_for_each(|name| file.read(name).map(drop))
    });
    let most = MOST.load(Ordering::Relaxed) - before;
    let took = start.elapsed();
    assert!(took < PATIENCE, "{} took {took:?}", path.display());
    assert!(most < LIMIT, "{} took {most} bytes", path.display());
    result.map_err(|error| error.to_string())
}

fn read_bytes(bytes: &[u8]) -> Result<(), String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.flush().unwrap();
    read(file.path())
}

fn samples() -> Vec<PathBuf> {
    let folder = std::fs::read_dir("tests/golden/checkpoints").unwrap();
    let mut paths: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    // The golden results are large and one safetensors file like another.
    paths.retain(|path| path.extension().is_some_and(|e| e == "pth"));
    paths.sort();
    assert!(paths.len() > 10);
    paths
}

/// A safetensors file with one tensor, built by hand.
fn safetensors(header: &str, values: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(values);
    bytes
}

/// An archive of `torch.save` with this pickle and one storage of 16 bytes.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 16])] {
        archive.start_file(name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// A dictionary with one tensor of `shape` and `strides` (numbers below 2^31) on that storage.
fn tensor(count: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let number = |value: i32| [&b"J"[..], &value.to_le_bytes()].concat();
    let tuple = |values: &[i32]| {
        let values: Vec<u8> = values.iter().flat_map(|&v| number(v)).collect();
        [&b"("[..], &values, b"t"].concat()
    };
    [
        &b"\x80\x02}(X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"[..],
        b"ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu",
        &number(count),
        b"tQK\0",
        &tuple(shape),
        &tuple(strides),
        b"\x89}tRu.",
    ]
    .concat()
}

fn truncated_and_altered_files_are_errors_or_other_values() {
    for path in samples() {
        let whole = std::fs::read(&path).unwrap();
        let readable = read(&path).is_ok();
        let cuts = (0..whole.len()).step_by(whole.len() / 97 + 1);
        for cut in cuts {
            let result = read_bytes(&whole[..cut]);
            assert!(
                !readable || result.is_err(),
                "{} cut at {cut}",
                path.display()
            );
        }
        // Every byte of small files, every 17th of others, in three ways.
        let step = if whole.len() < 3000 { 1 } else { 17 };
        for at in (0..whole.len()).step_by(step) {
            for change in [0x01, 0x80, 0xFF] {
                let mut bytes = whole.clone();
                bytes[at] ^= change;
                let _ = read_bytes(&bytes);
            }
        }
    }
}

fn altered_values_are_found_by_the_checksum_of_the_archive() {
    let whole = std::fs::read("tests/golden/checkpoints/archive.pth").unwrap();
    // The bias is 0.5, -0.25, 2.0, 8.0.
    let values: Vec<u8> = [0.5_f32, -0.25]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let at = whole.windows(8).position(|w| w == values).unwrap();
    let mut bytes = whole;
    bytes[at] ^= 1;
    let message = read_bytes(&bytes).unwrap_err();
    assert!(
        message.contains("a.bias") && message.contains("hecksum"),
        "{message}"
    );
}

fn shapes_that_the_file_does_not_hold_are_refused() {
    assert_eq!(read_bytes(&archive(&tensor(4, &[2, 2], &[2, 1]))), Ok(()));
    for (count, shape, strides, part) in [
        (4, &[2, 3][..], &[3, 1][..], "more than its storage"),
        // Many times the same element.
        (4, &[1 << 30, 1 << 30], &[0, 0], "more than its storage"),
        (4, &[i32::MAX; 9], &[i32::MAX; 9], "more than its storage"),
        (4, &[2], &[1, 1], "as many strides"),
        (4, &[-2], &[1], "negative"),
        (4, &[1; 40], &[1; 40], "40 dimensions"),
        // A storage larger than its file.
        (1 << 30, &[1 << 30], &[1], "another length"),
    ] {
        let message = read_bytes(&archive(&tensor(count, shape, strides))).unwrap_err();
        assert!(message.contains(part), "{shape:?}: {message}");
    }
    for (header, part) in [
        (
            r#"{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}"#,
            "damaged",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            "damaged",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            "4 bytes of values where",
        ),
        (r#"{"a":"#, "damaged"),
        (r#"{"__metadata__":{"format":"pt"}}"#, "no tensors|damaged"),
    ] {
        let message = read_bytes(&safetensors(header, &[0; 4])).unwrap_err();
        assert!(
            part.split('|').any(|part| message.contains(part)),
            "{header}: {message}"
        );
    }
    let mut huge = safetensors("{}", &[]);
    huge[..8].copy_from_slice(&90_000_000_u64.to_le_bytes());
    assert!(
        read_bytes(&huge)
            .unwrap_err()
            .contains("longer than the file")
    );
}

fn pickles_that_would_run_code_or_fill_memory_are_refused() {
    let nested = |open: &[u8], count: usize, close: &[u8]| {
        [
            b"\x80\x02",
            open.repeat(count).as_slice(),
            close.repeat(count - 1).as_slice(),
            b".",
        ]
        .concat()
    };
    let call = b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.".to_vec();
    let by_text = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.".to_vec();
    // A list that holds itself, a dictionary within itself.
    let cycles = b"\x80\x02}q\0X\x01\0\0\0ah\0s.".to_vec();
    // One text, remembered, pushed a million times.
    let million = [
        &b"\x80\x02X\x04\0\0\0aaaaq\x000("[..],
        &b"h\0".repeat(1_000_000),
        b"t.",
    ]
    .concat();
    let values = [&b"\x80\x02("[..], &b"N".repeat(3_000_000), b"t."].concat();
    let text = [&b"\x80\x02X"[..], &u32::MAX.to_le_bytes(), b"abc."].concat();
    for (what, pickle, part) in [
        ("a call", call, "os.system"),
        ("a call by text", by_text, "builtins.eval"),
        ("a cycle", cycles, "no tensors"),
        ("deep lists", nested(b"]", 1_000_000, b"a"), "no tensors"),
        (
            "deep tuples",
            nested(b")", 1_000_000, b"\x86"),
            "no tensors",
        ),
        ("a long tuple", million, "no tensors"),
        ("too many values", values, "more than 2000000 values"),
        ("a text longer than the file", text, "ends too early"),
        ("an empty stack", b"\x80\x02R.".to_vec(), "empty stack"),
        ("no mark", b"\x80\x02t.".to_vec(), "mark"),
        (
            "an unknown opcode",
            b"\x80\x02\xff.".to_vec(),
            "opcode 0xff",
        ),
        (
            "a memo of nothing",
            b"\x80\x02h\x05.".to_vec(),
            "never made",
        ),
        ("no end", b"\x80\x02N".to_vec(), "ends too early"),
    ] {
        let message = read_bytes(&archive(&pickle)).unwrap_err();
        assert!(message.contains(part), "{what}: {message}");
    }
}

/// One tensor, remembered as 2.
const REMEMBERED: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage\
    ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85\x89}tRq\x02";

fn pickles_that_repeat_themselves_stay_small() {
    // A name of 1 MiB and a tensor, 65 536 times in one dictionary.
    let name = [
        &b"X"[..],
        &(1_u32 << 20).to_le_bytes(),
        &vec![b'n'; 1 << 20],
        b"q\x01",
    ]
    .concat();
    let long = [
        b"\x80\x02",
        REMEMBERED,
        &name,
        b"00}(",
        &b"h\x01h\x02".repeat(65_536),
        b"u.",
    ]
    .concat();
    assert!(read_bytes(&archive(&long)).is_err());
    // The same with a short name is one tensor.
    let short = [
        b"\x80\x02",
        REMEMBERED,
        b"X\x01\0\0\0aq\x0100}(",
        &b"h\x01h\x02".repeat(65_536),
        b"u.",
    ];
    assert_eq!(read_bytes(&archive(&short.concat())), Ok(()));
    // Thousands of dictionaries that are one, with a thousand names.
    let names: Vec<u8> = (0..1000_u32)
        .flat_map(|i| {
            [
                &b"X\x04\0\0\0"[..],
                &(0x6161_6161 + i).to_le_bytes(),
                b"h\x02",
            ]
            .concat()
        })
        .collect();
    let outer: Vec<u8> = (0..100_000_u32)
        .flat_map(|i| {
            [
                &b"X\x04\0\0\0"[..],
                &(0x6161_6161 + i).to_le_bytes(),
                b"h\x03",
            ]
            .concat()
        })
        .collect();
    let shared = [
        b"\x80\x02",
        REMEMBERED,
        b"0}q\x03(",
        &names,
        b"u0}(",
        &outer,
        b"u.",
    ]
    .concat();
    assert_eq!(read_bytes(&archive(&shared)), Ok(()));
    // One long tuple as the arguments of many calls, many ids, many texts.
    let tuple = [&b"("[..], &b"N".repeat(200_000), b"tq\x01"].concat();
    let calls = b"ctorch._utils\n_rebuild_parameter\nh\x01R".repeat(1000);
    for (what, pickle, part) in [
        (
            "arguments",
            [b"\x80\x02", tuple.as_slice(), &calls, b"."].concat(),
            "200000 arguments",
        ),
        (
            "an id",
            [b"\x80\x02", tuple.as_slice(), b"Q."].concat(),
            "200000 parts",
        ),
        (
            "memos",
            [b"\x80\x02N", b"\x94".repeat(20_000_000).as_slice(), b"."].concat(),
            "MiB",
        ),
        (
            "numbers",
            [b"\x80\x02", b"K\x01\x85".repeat(900_000).as_slice(), b"."].concat(),
            "no tensors",
        ),
    ] {
        let message = read_bytes(&archive(&pickle)).unwrap_err();
        assert!(message.contains(part), "{what}: {message}");
    }
    // What Python 2 wrote: a dictionary of pairs.
    let pairs = [
        &b"\x80\x02"[..],
        REMEMBERED,
        b"0ccollections\nOrderedDict\n]]X\x01\0\0\0aah\x02aa\x85R.",
    ];
    assert_eq!(read_bytes(&archive(&pairs.concat())), Ok(()));
}

fn empty_tensors_may_lie_anywhere() {
    let mut bytes = tensor(4, &[0, 512], &[512, 1]);
    // The offset, after the persistent id.
    let at = bytes.windows(4).position(|w| w == b"tQK\0").unwrap() + 3;
    bytes[at] = 200;
    assert_eq!(read_bytes(&archive(&bytes)), Ok(()));
}

fn archives_that_would_grow_are_refused() {
    let plain = archive(&tensor(4, &[4], &[1]));
    // Says that its files are compressed.
    let mut deflated = plain.clone();
    for (at, _) in plain
        .windows(4)
        .enumerate()
        .filter(|(_, w)| *w == b"PK\x01\x02")
    {
        deflated[at + 10] = 8;
    }
    let message = read_bytes(&deflated).unwrap_err();
    assert!(message.contains("compressed"), "{message}");
    // Both entries of the directory at the same place: the storage is the pickle.
    let mut overlapping = plain.clone();
    let places: Vec<usize> = plain
        .windows(4)
        .enumerate()
        .filter_map(|(at, w)| (w == b"PK\x01\x02").then_some(at))
        .collect();
    let first = plain[places[0] + 42..places[0] + 46].to_vec();
    overlapping[places[1] + 42..places[1] + 46].copy_from_slice(&first);
    let message = read_bytes(&overlapping).unwrap_err();
    assert!(message.contains("archive"), "{message}");
    // Says that it is huge.
    let mut huge = plain;
    for at in places {
        for field in [20, 24] {
            huge[at + field..at + field + 4].copy_from_slice(&0xFFFF_FF00_u32.to_le_bytes());
        }
    }
    assert!(read_bytes(&huge).unwrap_err().contains("archive"));
}

fn other_files_are_named() {
    for (bytes, part) in [
        (&b""[..], "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "git lfs pull",
        ),
        (b"MATLAB 5.0 MAT-file, Platform", "MATLAB"),
        (
            b"\x80\x04\x95\0\0\0\0\0\0\0\0}.",
            "not one that torch.save wrote",
        ),
        (b"\x89HDF\r\n\x1a\n", "neither"),
        (b"PK\x05\x06", "archive"),
    ] {
        let message = read_bytes(bytes).unwrap_err();
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// One test, so that no other runs beside it and its memory alone is counted.
#[test]
fn tests() {
    other_files_are_named();
    archives_that_would_grow_are_refused();
    pickles_that_would_run_code_or_fill_memory_are_refused();
    shapes_that_the_file_does_not_hold_are_refused();
    pickles_that_repeat_themselves_stay_small();
    empty_tensors_may_lie_anywhere();
    altered_values_are_found_by_the_checksum_of_the_archive();
    truncated_and_altered_files_are_errors_or_other_values();
}
