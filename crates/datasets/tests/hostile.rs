//! Damaged and hostile files of every kind that is read: an answer or an error, no panic, no long wait,
//! no large allocation. Bytes are changed with a seed; `ISQRT_FUZZ_SECONDS` says for how long.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use isqrt_datasets::formats::matlab::{MatFile, StructArray, Value};
use isqrt_datasets::formats::{matlab_writer, tar};
use isqrt_datasets::{
    Error, IndexCache, Key, ListOptions, Pipeline, Scratch, decode, list, list_with,
};

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

/// What a file of a few KB may cost at most. An image header may promise [`isqrt_datasets::MAX_PIXELS`]
/// pixels of three bytes, which a decoder sets aside with its own planes beside them.
const LIMIT: usize = 1 << 30;
/// The same for everything but images.
const SMALL_LIMIT: usize = 200 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn watched<T>(what: &str, limit: usize, task: impl FnOnce() -> T) -> T {
    let before = USED.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let start = Instant::now();
    let result = task();
    let took = start.elapsed();
    let most = MOST.load(Ordering::Relaxed).saturating_sub(before);
    assert!(took < PATIENCE, "{what} took {took:?}");
    assert!(most < limit, "{what} took {} MB", most >> 20);
    result
}

/// xorshift64*, so that every run does the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }

    /// Cuts, flips, overwrites, repeats and moves bytes.
    fn change(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..1 + self.below(5) {
            if bytes.is_empty() {
                break;
            }
            let at = self.below(bytes.len());
            let end = (at + 1 + self.below(40)).min(bytes.len());
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes[at] = [0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF][self.below(6)],
                3 => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                4 => {
                    // A number of four bytes, such as a length.
                    let number = [0, 1, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x0100_0000][self.below(5)];
                    let bits = u32::to_le_bytes(number);
                    for (byte, bits) in bytes[at..end].iter_mut().zip(bits) {
                        *byte = bits;
                    }
                }
                _ => drop(bytes.drain(at..end)),
            }
        }
        bytes
    }
}

type Read = dyn Fn(&Path, &[u8]);

/// A kind of file: what to change, and what to do with the result.
struct Target {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    limit: usize,
    read: Box<Read>,
}

fn mat_files() -> Target {
    let text = |text: &str| Value::Text(text.to_owned());
    let number = |n: f64| Value::Numbers(vec![n]);
    let row = |i: u32| [number(f64::from(i * 300)), text(&format!("{i:05}.jpg"))];
    let annotations = Value::Structs(StructArray {
        fields: ["class", "fname"].map(str::to_owned).into(),
        values: (0..9).flat_map(row).collect(),
    });
    let names = Value::Numbers((0..40).map(f64::from).collect());
    let seeds = [(false, false), (true, false), (false, true)].map(|(compressed, big_endian)| {
        let options = matlab_writer::Options {
            compressed,
            big_endian,
        };
        let variables = [("annotations", &annotations), ("numbers", &names)];
        matlab_writer::write(&variables, options).unwrap()
    });
    Target {
        name: "mat",
        seeds: seeds.into(),
        limit: SMALL_LIMIT,
        read: Box::new(|path, bytes| {
            let Ok(file) = MatFile::parse(bytes, path) else {
                return;
            };
            for name in file.names() {
                if let Ok(rows) = file.variable(name).and_then(|v| v.rows()) {
                    rows.for_each(|row| drop((row.number("class"), row.text("fname"))));
                }
            }
        }),
    }
}

fn archives() -> Target {
    let file = |name: &str, text: &str| (name.to_owned(), text.as_bytes().to_vec());
    let shard = [
        file("a.jpg", "A"),
        file("a.cls", "0"),
        file("b.jpg", "B"),
        file("b.cls", "1"),
    ];
    let class = |class: &str| {
        let image = file(&format!("{class}_1.JPEG"), class);
        (format!("{class}.tar"), tar::write(&[image]).unwrap())
    };
    let seeds = [
        tar::write(&shard).unwrap(),
        tar::write(&[class("n01"), class("n02")]).unwrap(),
    ];
    Target {
        name: "tar",
        seeds: seeds.into(),
        limit: SMALL_LIMIT,
        read: Box::new(|path, bytes| {
            std::fs::write(path, bytes).unwrap();
            let cache = IndexCache::Off;
            let options = ListOptions {
                cache,
                ..ListOptions::default()
            };
            if let Ok(found) = list_with(path, &options) {
                let mut content = Vec::new();
                for sample in &found.train {
                    assert!(!sample.name.split('/').any(|part| part == ".."));
                    let _ = sample.read(&mut content);
                }
            }
        }),
    }
}

/// The index beside an archive that is whole.
fn indices(folder: &Path) -> Target {
    let archive = folder.join("indexed.tar");
    let file = |name: &str| (name.to_owned(), vec![7; 600]);
    let files = [file("cat/1.jpg"), file("dog/2.jpg"), file("dog/3.jpg")];
    std::fs::write(&archive, tar::write(&files).unwrap()).unwrap();
    let index = folder.join("indexed.tar.isqrt-index");
    list(&archive).unwrap();
    let seed = std::fs::read(&index).unwrap();
    Target {
        name: "index",
        seeds: vec![seed],
        limit: SMALL_LIMIT,
        read: Box::new(move |_, bytes| {
            std::fs::write(&index, bytes).unwrap();
            // Whatever became of the index, reading ends within the archive or with an error.
            if let Ok(found) = list(&archive) {
                let mut content = Vec::new();
                for sample in &found.train {
                    let _ = sample.read(&mut content);
                }
            }
        }),
    }
}

fn lists(name: &'static str, seed: &str) -> Target {
    Target {
        name,
        seeds: vec![seed.as_bytes().to_vec()],
        limit: SMALL_LIMIT,
        read: Box::new(|path, bytes| {
            std::fs::write(path, bytes).unwrap();
            match list(path) {
                Ok(found) => {
                    for sample in &found.train {
                        assert!(sample.path().starts_with(path.parent().unwrap()));
                        assert!(!sample.name.split('/').any(|part| part == ".."));
                    }
                }
                Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
            }
        }),
    }
}

fn images() -> Target {
    let mut seeds = vec![common::png_bytes(17, 9, 3), common::jpeg_bytes(16, 8)];
    if let Some(dir) = common::shared_data("decoder_stress") {
        let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().collect();
        paths.sort_by_key(std::fs::DirEntry::path);
        for entry in paths {
            let bytes = std::fs::read(entry.path()).unwrap();
            if bytes.len() < 20_000 && !entry.path().ends_with("expected.tsv") {
                seeds.push(bytes);
            }
        }
    }
    let train = Pipeline::preset("imagenet-train").unwrap();
    Target {
        name: "image",
        seeds,
        limit: LIMIT,
        read: Box::new(move |path, bytes| {
            let problem = |error: Error| match error {
                Error::Decode { problem, .. } => {
                    assert!(!problem.contains("the decoder failed"), "panicked inside");
                }
                other => panic!("{other}"),
            };
            match decode(bytes, path) {
                Ok(image) => assert_eq!(image.pixels.len(), image.width * image.height * 3),
                Err(error) => problem(error),
            }
            let (mut scratch, mut out) = (Scratch::default(), Vec::new());
            let key = Key {
                seed: 1,
                epoch: 0,
                sample: bytes.len() as u64,
            };
            match train.run_encoded(bytes, path, None, key, &mut scratch, &mut out) {
                Ok(size) => assert_eq!((size, out.len()), ((224, 224), 224 * 224 * 3)),
                Err(error) => problem(error),
            }
        }),
    }
}

#[test]
fn changed_bytes() {
    let seconds = std::env::var("ISQRT_FUZZ_SECONDS").ok();
    let seconds: f64 = seconds.map_or(6.0, |s| s.parse().unwrap());
    let home = tempfile::tempdir().unwrap();
    let targets = [
        mat_files(),
        archives(),
        indices(home.path()),
        lists(
            "csv",
            "path,label,split\na/1.jpg,cat,train\n\"b, 2.jpg\",dog,val\nc.jpg,dog,\n",
        ),
        lists("txt", "some where/1.jpg 3\nb.jpg 0\n# c\nd.jpg 12\n"),
        images(),
    ];
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    for target in &targets {
        let path = home.path().join(format!("x.{}", target.name));
        let share = Duration::from_secs_f64(seconds / targets.len() as f64);
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < share {
            let seed = &target.seeds[dice.below(target.seeds.len())];
            let bytes = dice.change(seed);

            watched(target.name, target.limit, || (target.read)(&path, &bytes));
            count += 1;
        }
        eprintln!("{}: {count} files", target.name);
        assert!(count > 20, "{}: only {count} files", target.name);
    }
}
