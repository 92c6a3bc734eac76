//! The embedded set: the same bytes everywhere, and the property it is made for.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::path::Path;

use isqrt_datasets::e10::{self, CLASSES, IMAGE_SIDE, MATCHINGS, Outcome, Part, Sizes};
use isqrt_datasets::{DataSet, ImageSet, Pipeline};
use sha2::{Digest, Sha256};

const SMALL: Sizes = Sizes {
    train: 3,
    val: 1,
    test: 2,
};

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    found
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn the_same_bytes_on_every_machine() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("e10");
    assert_eq!(e10::generate(&dir, 2018, SMALL).unwrap(), Outcome::Written);
    let files = files(&dir);
    assert_eq!(files.len(), 61);
    let mut hash = Sha256::new();
    for (name, bytes) in &files {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    // A change here makes other images of the same seed: count up e10::VERSION with it.
    assert_eq!(
        hex(hash),
        "34bf74ff4b0719a83b7a54abc06266a83731dbe50b592edb07f372873bc65a4d"
    );
    let set = DataSet::open(&dir, &Pipeline::identity(), 0).unwrap();
    assert_eq!(
        (set.train.len(), set.val.len(), set.test.len()),
        (30, 10, 20)
    );
    assert_eq!(
        set.fingerprint(),
        "c715a2a965d8bc3680e8025fd6c61e77eb6d26721118dab8779a5d6f8f8fff3d"
    );
}

#[test]
fn the_same_for_any_number_of_threads_and_files_hold_the_pixels() {
    let home = tempfile::tempdir().unwrap();
    let trees: Vec<_> = [1, 2]
        .into_iter()
        .map(|threads| {
            let dir = home.path().join(threads.to_string());
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| e10::generate(&dir, 5, SMALL)).unwrap();
            files(&dir)
        })
        .collect();
    assert_eq!(trees[0], trees[1]);
    let set = DataSet::open(&home.path().join("1"), &Pipeline::identity(), 0).unwrap();
    let memory = e10::image_set(5, Part::Test, SMALL.test).unwrap();
    assert_eq!(set.test.labels(), memory.labels());
    for i in 0..memory.len() {
        assert_eq!(set.test.image(i), memory.image(i));
    }
    assert_ne!(
        e10::image(5, Part::Train, 0, 0),
        e10::image(6, Part::Train, 0, 0)
    );
    assert_ne!(
        e10::image(5, Part::Train, 0, 0),
        e10::image(5, Part::Test, 0, 0)
    );
}

/// What each image looks like through filters that know the recipe.
struct Seen {
    label: usize,
    /// Mean colour, then mean energy of each of the six components.
    means: Vec<f64>,
    /// Correlation over positions between the log energies of components i and j.
    correlation: [[f64; 6]; 6],
}

const POSITIONS: std::ops::Range<usize> = 4..IMAGE_SIDE - 4;

/// Energy map of component `j`: a Gabor pair of its orientation and mean frequency on its colour.
fn energy(image: &[u8], j: usize) -> Vec<f64> {
    let plane: Vec<f64> = image
        .chunks_exact(3)
        .map(|p| {
            let [r, g, b] = [p[0], p[1], p[2]].map(f64::from);
            if j.is_multiple_of(2) {
                r + g + b
            } else {
                r - g
            }
        })
        .collect();
    let angle = (j / 2) as f64 * std::f64::consts::PI / 3.0;
    let mut kernel = Vec::new();
    for dy in -4i32..=4 {
        for dx in -4i32..=4 {
            let (x, y) = (f64::from(dx), f64::from(dy));
            let phase = std::f64::consts::TAU * 0.24 * (x * angle.cos() + y * angle.sin());
            let window = (-(x * x + y * y) / (2.0 * 2.5 * 2.5)).exp();
            kernel.push((dx, dy, window * phase.cos(), window * phase.sin()));
        }
    }
    // Without this the window's constant part would let brightness through.
    let weight: f64 = kernel.iter().map(|k| k.2).sum::<f64>() / kernel.len() as f64;
    let mut map = Vec::new();
    for y in POSITIONS.step_by(2) {
        for x in POSITIONS.step_by(2) {
            let (mut even, mut odd) = (0.0, 0.0);
            for &(dx, dy, c, s) in &kernel {
                let at = (y as i32 + dy) as usize * IMAGE_SIDE + (x as i32 + dx) as usize;
                even += (c - weight) * plane[at];
                odd += s * plane[at];
            }
            map.push((even * even + odd * odd).ln());
        }
    }
    map
}

fn look(set: &ImageSet) -> Vec<Seen> {
    (0..set.len())
        .map(|i| {
            let image = set.image(i);
            let maps: Vec<Vec<f64>> = (0..6).map(|j| energy(image, j)).collect();
            let n = maps[0].len() as f64;
            let mean = |map: &[f64]| map.iter().sum::<f64>() / n;
            let centred: Vec<Vec<f64>> = maps
                .iter()
                .map(|map| map.iter().map(|v| v - mean(map)).collect())
                .collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            let correlation = std::array::from_fn(|a| {
                std::array::from_fn(|b| {
                    dot(&centred[a], &centred[b])
                        / (dot(&centred[a], &centred[a]) * dot(&centred[b], &centred[b])).sqrt()
                })
            });
            let mut means: Vec<f64> = (0..3)
                .map(|c| {
                    image
                        .iter()
                        .skip(c)
                        .step_by(3)
                        .map(|&v| f64::from(v))
                        .sum::<f64>()
                })
                .collect();
            means.extend(maps.iter().map(|map| mean(map)));
            Seen {
                label: set.labels()[i] as usize,
                means,
                correlation,
            }
        })
        .collect()
}

#[test]
fn classes_differ_in_what_varies_together_and_in_nothing_else() {
    let train = look(&e10::image_set(11, Part::Train, 60).unwrap());
    let test = look(&e10::image_set(11, Part::Test, 30).unwrap());

    // Nearest class mean of colours and energies, each scaled to variance 1 over the images.
    let width = train[0].means.len();
    let scale: Vec<f64> = (0..width)
        .map(|f| {
            let n = train.len() as f64;
            let mean = train.iter().map(|s| s.means[f]).sum::<f64>() / n;
            (train
                .iter()
                .map(|s| (s.means[f] - mean).powi(2))
                .sum::<f64>()
                / n)
                .sqrt()
        })
        .collect();
    let class_mean = |class: usize, f: usize| {
        let values: Vec<f64> = train
            .iter()
            .filter(|s| s.label == class)
            .map(|s| s.means[f])
            .collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    let centres: Vec<Vec<f64>> = (0..CLASSES)
        .map(|class| (0..width).map(|f| class_mean(class, f)).collect())
        .collect();
    let best = |score: &dyn Fn(usize) -> f64| {
        (0..CLASSES)
            .max_by(|&a, &b| score(a).total_cmp(&score(b)))
            .unwrap()
    };
    let error_by = |classify: &dyn Fn(&Seen) -> usize| {
        test.iter().filter(|s| classify(s) != s.label).count() as f64 / test.len() as f64
    };
    let by_means = error_by(&|seen| {
        best(&|class| {
            -(0..width)
                .map(|f| ((seen.means[f] - centres[class][f]) / scale[f]).powi(2))
                .sum::<f64>()
        })
    });
    // The matching whose pairs correlate most; nothing is fitted.
    let by_pairs = error_by(&|seen| {
        best(&|class| {
            MATCHINGS[class]
                .iter()
                .map(|&[a, b]| seen.correlation[a][b])
                .sum()
        })
    });
    eprintln!("error by means {by_means:.3}, by co-variation {by_pairs:.3}, chance 0.9");
    assert!(by_means > 0.8, "means tell the class: {by_means}");
    assert!(
        by_pairs < 0.35,
        "co-variation does not tell the class: {by_pairs}"
    );
}
