//! Order, augmentation and normalisation of batches; threads that come and go.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use isqrt_datasets::{Augment, Batch, ImageSet, Loader, LoaderConfig};

const AUGMENT: Augment = Augment {
    flip: true,
    pad_crop: 2,
};

/// `n` images of 6x5 pixels, all different.
fn set(n: usize) -> Arc<ImageSet> {
    let pixels = (0..n * 6 * 5 * 3).map(|i| (i * 31 % 251) as u8).collect();
    let labels = (0..n).map(|i| (i % 3) as u32).collect();
    let classes = ["a", "b", "c"].map(str::to_owned).to_vec();
    Arc::new(ImageSet::new(classes, 6, 5, pixels, labels).unwrap())
}

fn config(augment: Augment) -> LoaderConfig {
    LoaderConfig {
        batch: 4,
        shuffle: true,
        drop_last: false,
        seed: 9,
        augment,
        mean: [0.5, 0.4, 0.3],
        std: [0.2, 0.25, 0.5],
    }
}

fn batches(loader: &Loader, epoch: usize) -> Vec<Batch> {
    loader.epoch(epoch).map(Result::unwrap).collect()
}

#[test]
fn the_same_for_any_number_of_threads() {
    let loader = Loader::new(set(23), config(AUGMENT)).unwrap();
    let ahead = batches(&loader, 3);
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(pool.install(|| batches(&loader, 3)), ahead);
    }
}

#[test]
fn pixels_belong_to_a_sample_and_not_to_a_batch() {
    let images_by_sample = |batch: usize| {
        let loader = Loader::new(
            set(10),
            LoaderConfig {
                batch,
                ..config(AUGMENT)
            },
        )
        .unwrap();
        let images: Vec<f32> = batches(&loader, 1)
            .into_iter()
            .flat_map(|b| b.images)
            .collect();
        let mut found: Vec<(usize, Vec<f32>)> = loader
            .order(1)
            .into_iter()
            .zip(images.chunks_exact(90).map(<[f32]>::to_vec))
            .collect();
        found.sort_by_key(|(index, _)| *index);
        found
    };
    assert_eq!(images_by_sample(3), images_by_sample(10));
}

#[test]
fn every_sample_once_in_another_order_each_epoch() {
    let loader = Loader::new(set(23), config(Augment::default())).unwrap();
    assert_ne!(loader.order(0), loader.order(1));
    let mut order = loader.order(0);
    order.sort_unstable();
    assert_eq!(order, (0..23).collect::<Vec<_>>());
    let sizes: Vec<usize> = batches(&loader, 0).iter().map(|b| b.batch).collect();
    assert_eq!(sizes, [4, 4, 4, 4, 4, 3]);
    let dropped = LoaderConfig {
        drop_last: true,
        ..config(AUGMENT)
    };
    let loader = Loader::new(set(23), dropped).unwrap();
    assert_eq!((loader.batches(), batches(&loader, 0).len()), (5, 5));
    assert_eq!(loader.epoch(0).len(), 5);
}

#[test]
fn normalises_and_transposes() {
    let set = set(2);
    let still = LoaderConfig {
        shuffle: false,
        ..config(Augment::default())
    };
    let loader = Loader::new(set.clone(), still).unwrap();
    let batch = &batches(&loader, 0)[0];
    assert_eq!((batch.batch, batch.height, batch.width), (2, 5, 6));
    assert_eq!(batch.labels, set.labels());
    for (i, c, y, x) in [(0, 0, 0, 0), (1, 2, 4, 5), (1, 1, 2, 3)] {
        let got = batch.images[((i * 3 + c) * 5 + y) * 6 + x];
        let value = f32::from(set.image(i)[(y * 6 + x) * 3 + c]) / 255.0;
        let want = (value - still.mean[c]) / still.std[c];
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
}

#[test]
fn an_epoch_dropped_early_ends() {
    let loader = Loader::new(set(400), config(AUGMENT)).unwrap();
    for taken in 0..4 {
        assert_eq!(loader.epoch(0).take(taken).count(), taken);
    }
    // The loader's own thread holds the set: when all epochs are gone, nobody else does.
    assert_eq!(Arc::strong_count(loader.set()), 1);
}

#[test]
fn works_inside_a_pool_of_one_thread() {
    let loader = Loader::new(set(40), config(AUGMENT)).unwrap();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    assert_eq!(pool.install(|| loader.epoch(0).count()), 10);
}

#[test]
fn settings_that_make_no_sense_are_errors() {
    let bad = |change: &dyn Fn(&mut LoaderConfig)| {
        let mut c = config(AUGMENT);
        change(&mut c);
        Loader::new(set(5), c).unwrap_err().to_string()
    };
    assert!(bad(&|c| c.batch = 0).contains("at least 1"));
    assert!(bad(&|c| (c.batch, c.drop_last) = (6, true)).contains("smaller batch"));
    assert!(bad(&|c| c.augment.pad_crop = 5).contains("padding"));
    assert!(bad(&|c| c.std[1] = f32::NAN).contains("channel 1"));
    let classes = vec!["a".to_owned()];
    assert!(ImageSet::new(classes.clone(), 2, 2, vec![0; 11], vec![0]).is_err());
    assert!(ImageSet::new(classes.clone(), 2, 2, vec![0; 12], vec![1]).is_err());
    assert!(ImageSet::new(classes, 2, 2, vec![], vec![]).is_err());
}
