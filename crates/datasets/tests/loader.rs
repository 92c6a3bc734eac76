//! Order, shares of ranks, positions, broken images, normalisation of batches; threads that come and go.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{png_bytes, put};
use isqrt_datasets::{
    Batch, Broken, Epoch, ImageSet, Images, Loader, LoaderConfig, Pipeline, Position, Remainder,
    Root, Sample, Shard, Step,
};

/// `n` images of 6x6 pixels, all different.
fn set(n: usize) -> Arc<ImageSet> {
    let pixels = (0..n * 6 * 6 * 3).map(|i| (i * 31 % 251) as u8).collect();
    let labels = (0..n).map(|i| (i % 3) as u32).collect();
    let classes = ["a", "b", "c"].map(str::to_owned).to_vec();
    Arc::new(ImageSet::new(classes, 6, 6, pixels, labels).unwrap())
}

/// `n` files of different sizes.
fn files(dir: &Path, n: usize) -> Vec<Sample> {
    let root = Root::new(dir);
    let one = |i: usize| {
        let name = format!("{i:03}.png");
        let (width, height) = (20 + i as u32 % 7, 17 + i as u32 % 5);
        put(&dir.join(&name), &png_bytes(width, height, i as u8));
        Sample::file(&root, name, (i % 3) as u32)
    };
    (0..n).map(one).collect()
}

fn random() -> Pipeline {
    let steps = vec![
        Step::RandomCrop {
            size: 6,
            padding: 2,
            reflect: true,
        },
        Step::HorizontalFlip { p: 0.5 },
    ];
    let pipeline = Pipeline {
        steps,
        ..Pipeline::identity()
    };
    pipeline.normalising([0.5, 0.4, 0.3], [0.2, 0.25, 0.5])
}

fn crops() -> Pipeline {
    Pipeline::imagenet_train(8)
}

const CONFIG: LoaderConfig = LoaderConfig {
    batch: 4,
    shuffle: true,
    remainder: Remainder::Keep,
    seed: 9,
    workers: Some(2),
    prefetch: 2,
    shard: Shard { rank: 0, ranks: 1 },
    broken: Broken::Fail,
};

fn loader(images: impl Into<Images>, pipeline: Pipeline, config: LoaderConfig) -> Loader {
    Loader::new(images, pipeline, config).unwrap()
}

fn all(epoch: Epoch) -> Vec<Batch> {
    epoch.map(Result::unwrap).collect()
}

fn batches(loader: &Loader, epoch: usize) -> Vec<Batch> {
    all(loader.epoch(epoch).unwrap())
}

#[test]
fn the_same_for_any_number_of_workers() {
    let home = tempfile::tempdir().unwrap();
    let samples = files(home.path(), 23);
    for (images, pipeline) in [
        (Images::from(set(23)), random()),
        (Images::from(samples), crops()),
    ] {
        let with = |workers: usize, prefetch: usize| {
            let config = LoaderConfig {
                workers: Some(workers),
                prefetch,
                ..CONFIG
            };
            batches(&loader(images.clone(), pipeline.clone(), config), 3)
        };
        let expected = with(0, 1);
        assert_eq!(expected.len(), 6);
        for (workers, prefetch) in [(1, 1), (2, 3), (7, 1)] {
            assert_eq!(with(workers, prefetch), expected);
        }
        // Also inside a pool whose threads are all busy.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .unwrap();
        assert_eq!(pool.install(|| with(2, 1)), expected);
    }
}

/// Pixels of each sample of an epoch.
fn by_sample(batches: &[Batch]) -> BTreeMap<u32, Vec<u8>> {
    let pairs = batches
        .iter()
        .flat_map(|b| b.indices.iter().copied().zip(b.images.iter().cloned()));
    let found: BTreeMap<u32, Vec<u8>> = pairs.collect();
    assert_eq!(found.len(), batches.iter().map(Batch::len).sum::<usize>());
    found
}

#[test]
fn pixels_belong_to_a_sample_and_not_to_a_batch() {
    let with = |batch: usize, ranks: usize| {
        let mut found = BTreeMap::new();
        for rank in 0..ranks {
            let shard = Shard { rank, ranks };
            let config = LoaderConfig {
                batch,
                shard,
                ..CONFIG
            };
            found.extend(by_sample(&batches(&loader(set(20), random(), config), 1)));
        }
        found
    };
    let expected = with(3, 1);
    assert_eq!(expected.len(), 20);
    assert_eq!(with(10, 1), expected);
    assert_eq!(with(2, 3), expected);
    let other_epoch = by_sample(&batches(&loader(set(20), random(), CONFIG), 2));
    assert_ne!(other_epoch, expected);
}

#[test]
fn every_sample_once_in_another_order_each_epoch() {
    let ours = loader(set(23), Pipeline::identity(), CONFIG);
    assert_ne!(ours.order(0), ours.order(1));
    let mut order = ours.order(0);
    order.sort_unstable();
    assert_eq!(order, (0..23).collect::<Vec<u32>>());
    let sizes: Vec<usize> = batches(&ours, 0).iter().map(Batch::len).collect();
    assert_eq!(sizes, [4, 4, 4, 4, 4, 3]);
    let config = LoaderConfig {
        remainder: Remainder::Drop,
        ..CONFIG
    };
    let ours = loader(set(23), random(), config);
    assert_eq!((ours.batches(), batches(&ours, 0).len()), (5, 5));
    assert_eq!(ours.epoch(0).unwrap().len(), 5);
}

#[test]
fn ranks_share_an_epoch_exactly() {
    for (n, batch, ranks) in [(23, 4, 3), (24, 4, 3), (2, 4, 5), (7, 1, 3), (100, 7, 2)] {
        for remainder in [Remainder::Keep, Remainder::Drop] {
            let of_rank = |rank: usize| {
                let config = LoaderConfig {
                    batch,
                    remainder,
                    shard: Shard { rank, ranks },
                    ..CONFIG
                };
                Loader::new(set(n), Pipeline::identity(), config).map(|ours| {
                    let found = batches(&ours, 1);
                    assert_eq!(found.len(), ours.batches());
                    found
                })
            };
            let Ok(first) = of_rank(0) else {
                assert!(remainder == Remainder::Drop && n < batch * ranks);
                continue;
            };
            let mut seen: Vec<u32> = Vec::new();
            let all: Vec<Vec<Batch>> = (0..ranks).map(|rank| of_rank(rank).unwrap()).collect();
            for (step, of_first) in first.iter().enumerate() {
                let sizes: Vec<usize> = all.iter().map(|batches| batches[step].len()).collect();
                let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
                assert!(most - least <= 1, "{sizes:?}");
                if remainder == Remainder::Drop {
                    assert_eq!(of_first.len(), batch);
                }
                seen.extend(all.iter().flat_map(|batches| &batches[step].indices));
            }
            assert!(all.iter().all(|batches| batches.len() == first.len()));
            let count = seen.len();
            // Step by step the ranks take what a single process with their batches together would.
            let config = LoaderConfig {
                batch: batch * ranks,
                remainder,
                ..CONFIG
            };
            assert_eq!(seen, loader(set(n), Pipeline::identity(), config).order(1));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), count);
            let left_out = match remainder {
                Remainder::Keep => 0,
                Remainder::Drop => n % (batch * ranks),
            };
            assert_eq!(count, n - left_out);
        }
    }
}

#[test]
fn an_epoch_goes_on_where_it_stopped() {
    for workers in [0, 3] {
        let config = LoaderConfig {
            workers: Some(workers),
            ..CONFIG
        };
        let ours = loader(set(23), random(), config);
        let whole = batches(&ours, 5);
        for done in 0..=6 {
            let text = serde_json::to_string(&ours.position(5, done)).unwrap();
            let position: Position = serde_json::from_str(&text).unwrap();
            let again = loader(set(23), random(), config);
            let epoch = again.resume(&position).unwrap();
            assert_eq!(epoch.len(), 6 - done);
            assert_eq!(all(epoch), whole[done..]);
        }
    }
    let position = loader(set(23), random(), CONFIG).position(5, 2);
    for (n, config) in [
        (24, CONFIG),
        (23, LoaderConfig { batch: 5, ..CONFIG }),
        (23, LoaderConfig { seed: 8, ..CONFIG }),
    ] {
        let error = loader(set(n), random(), config).resume(&position);
        assert!(error.unwrap_err().to_string().contains("cannot go on"));
    }
    let error = loader(set(23), random(), CONFIG).resume(&Position {
        batch: 7,
        ..position
    });
    assert!(error.is_err());
}

#[test]
fn normalises_and_transposes() {
    let set = set(2);
    let config = LoaderConfig {
        shuffle: false,
        ..CONFIG
    };
    let (mean, std) = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5]);
    let ours = loader(
        set.clone(),
        Pipeline::identity().normalising(mean, std),
        config,
    );
    let batch = &batches(&ours, 0)[0];
    assert_eq!(
        (batch.len(), batch.height, batch.width, batch.views),
        (2, 6, 6, 1)
    );
    assert_eq!(batch.labels, set.labels());
    let values = batch.normalised(ours.levels());
    for (i, c, y, x) in [(0, 0, 0, 0), (1, 2, 4, 5), (1, 1, 2, 3)] {
        let got = values[((i * 3 + c) * 6 + y) * 6 + x];
        let value = f32::from(set.image(i)[(y * 6 + x) * 3 + c]) / 255.0;
        let want = (value - mean[c]) / std[c];
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
}

#[test]
fn several_views_of_each_image() {
    let home = tempfile::tempdir().unwrap();
    let pipeline = Pipeline::preset("imagenet-tencrop").unwrap();
    let ours = loader(files(home.path(), 3), pipeline, CONFIG);
    let batch = &batches(&ours, 0)[0];
    assert_eq!((batch.len(), batch.views, batch.height), (3, 10, 224));
    let values = batch.normalised(ours.levels());
    assert_eq!(values.len(), 3 * 10 * 3 * 224 * 224);
    // The sixth view, top left of the mirror image, is the mirror of the second, top right.
    let (view, row) = (3 * 224 * 224, 224);
    let [second, sixth] = [1, 5].map(|i| &values[i * view..i * view + row]);
    assert!(sixth.iter().eq(second.iter().rev()));
}

#[test]
fn an_epoch_dropped_early_ends() {
    let set = set(400);
    let ours = loader(set.clone(), random(), CONFIG);
    for taken in 0..4 {
        assert_eq!(ours.epoch(0).unwrap().take(taken).count(), taken);
    }
    drop(ours);
    // The workers hold the set: when all epochs and loaders are gone, nobody else does.
    assert_eq!(Arc::strong_count(&set), 1);
}

/// Twenty files, of which three are broken and one is gone.
fn some_broken(dir: &Path) -> Vec<Sample> {
    let samples = files(dir, 20);
    put(&dir.join("003.png"), b"not an image");
    put(&dir.join("004.png"), &png_bytes(20, 20, 4)[..60]);
    put(&dir.join("011.png"), b"");
    std::fs::remove_file(dir.join("017.png")).unwrap();
    samples
}

#[test]
fn the_first_broken_image_ends_the_epoch() {
    let home = tempfile::tempdir().unwrap();
    let samples = some_broken(home.path());
    for workers in [0, 1, 4] {
        let config = LoaderConfig {
            shuffle: false,
            workers: Some(workers),
            ..CONFIG
        };
        let ours = loader(samples.clone(), crops(), config);
        let mut epoch = ours.epoch(0).unwrap();
        let error = epoch.next().unwrap().unwrap_err().to_string();
        let path = home.path().join("003.png").display().to_string();
        assert!(error.starts_with(&path), "{error}");
        assert!(epoch.next().is_none());
    }
}

#[test]
fn broken_images_can_be_left_out() {
    let home = tempfile::tempdir().unwrap();
    let samples = some_broken(home.path());
    let skip = |most: f64| LoaderConfig {
        broken: Broken::Skip { most },
        ..CONFIG
    };
    let ours = loader(samples.clone(), crops(), skip(0.2));
    for epoch in 0..3 {
        let found = batches(&ours, epoch);
        assert_eq!(found.len(), 5);
        assert_eq!(by_sample(&found).len(), 16);
    }
    // Each once, though it was met three times.
    let skipped = ours.skipped();
    let names: Vec<&str> = skipped.iter().map(|s| &*s.name).collect();
    assert_eq!(names, ["003.png", "004.png", "011.png", "017.png"]);
    assert!(skipped[2].problem.contains("is empty"), "{skipped:?}");

    let ours = loader(samples.clone(), crops(), skip(0.15));
    let mut epoch = ours.epoch(0).unwrap();
    let error = epoch.find_map(Result::err).unwrap().to_string();
    assert!(
        error.contains("4 of 20 images could not be read, more than 15 %"),
        "{error}"
    );
    assert!(Loader::new(samples, crops(), skip(1.5)).is_err());
}

#[test]
fn settings_that_make_no_sense_are_errors() {
    let bad = |change: &dyn Fn(&mut LoaderConfig)| {
        let mut config = CONFIG;
        change(&mut config);
        Loader::new(set(5), random(), config)
            .unwrap_err()
            .to_string()
    };
    assert!(bad(&|c| c.batch = 0).contains("at least 1"));
    assert!(bad(&|c| (c.batch, c.remainder) = (6, Remainder::Drop)).contains("smaller batch"));
    assert!(bad(&|c| c.shard.rank = 1).contains("ranks count from 0"));
    let odd = random().normalising([0.0; 3], [1.0, f32::NAN, 1.0]);
    let error = Loader::new(set(5), odd, CONFIG).unwrap_err().to_string();
    assert!(error.contains("deviation"), "{error}");
    let none: Vec<Sample> = Vec::new();
    assert!(Loader::new(none, random(), CONFIG).is_err());
    let classes = vec!["a".to_owned()];
    assert!(ImageSet::new(classes.clone(), 2, 2, vec![0; 11], vec![0]).is_err());
    assert!(ImageSet::new(classes.clone(), 2, 2, vec![0; 12], vec![1]).is_err());
    assert!(ImageSet::new(classes, 2, 2, vec![], vec![]).is_err());
}

#[test]
fn an_archive_that_is_gone_is_no_broken_image() {
    let home = tempfile::tempdir().unwrap();
    let archive: Arc<Path> = home.path().join("gone.tar").into();
    let samples = vec![Sample::piece(&archive, (512, 100), "a.png", 0); 8];
    let config = LoaderConfig {
        broken: Broken::Skip { most: 1.0 },
        ..CONFIG
    };
    let error = batches_or_error(samples, config);
    assert!(
        error.contains("gone.tar: cannot read the archive"),
        "{error}"
    );
    // Nor are all files of a folder that is gone.
    let folder = home.path().join("disk");
    std::fs::create_dir(&folder).unwrap();
    let samples = files(&folder, 8);
    std::fs::remove_dir_all(&folder).unwrap();
    let error = batches_or_error(samples, config);
    assert!(error.contains("cannot read the file"), "{error}");
}

fn batches_or_error(samples: Vec<Sample>, config: LoaderConfig) -> String {
    let ours = loader(samples, crops(), config);
    let mut epoch = ours.epoch(0).unwrap();
    epoch.find_map(Result::err).unwrap().to_string()
}

#[cfg(unix)]
#[test]
fn a_pipe_is_no_image_and_nobody_waits_for_it() {
    let home = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(home.path().join("000.png"))
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return;
    }
    let samples = vec![Sample::file(&Root::new(home.path()), "000.png", 0)];
    let error = batches_or_error(samples, CONFIG);
    assert!(error.contains("it is no file"), "{error}");
}
