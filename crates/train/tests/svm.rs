//! Linear support vector machines: against scikit-learn's, and by what makes a solution one.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use isqrt_testkit::{Golden, assert_close};
use isqrt_train::{Svm, SvmConfig, SvmLoss, l2_normalise};
use proptest::prelude::*;

/// `½‖w‖² + C Σ ξ` of one class, the bias included, straight from the formula.
fn objective(
    (rows, dim): (&[f32], usize),
    labels: &[u32],
    class: u32,
    (w, b): (&[f64], f64),
    config: &SvmConfig,
) -> f64 {
    let norm = w.iter().map(|v| v * v).sum::<f64>() + b * b;
    let losses = rows.chunks(dim).zip(labels).map(|(x, &label)| {
        let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum();
        let y = if label == class { 1.0 } else { -1.0 };
        let short = (1.0 - y * (sum + b)).max(0.0);
        match config.loss {
            SvmLoss::Hinge => short,
            SvmLoss::SquaredHinge => short * short,
        }
    });
    0.5 * norm + config.c * losses.sum::<f64>()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn doubles(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

#[test]
fn solutions_are_those_of_scikit_learn() {
    let golden = Golden::load("tests/golden/svm").unwrap();
    let (_, dim) = golden["features"].dims2().unwrap();
    let rows: Vec<f32> = golden["features"].flatten_all().unwrap().to_vec1().unwrap();
    let labels: Vec<u32> = golden["labels"]
        .to_dtype(DType::U32)
        .unwrap()
        .to_vec1()
        .unwrap();
    for (loss, name) in [
        (SvmLoss::Hinge, "hinge"),
        (SvmLoss::SquaredHinge, "squared_hinge"),
    ] {
        for c in [1.0, 0.1] {
            let config = SvmConfig {
                c,
                loss,
                tolerance: 1e-11,
                max_epochs: 1_000_000,
                seed: 3,
            };
            let svm = Svm::fit(&rows, dim, &labels, 4, &config).unwrap();
            let known = |what| doubles(&golden[&format!("{name}.{c}.{what}")]);
            let (weights, intercepts) = (known("weights"), known("intercepts"));
            assert_eq!(svm.unconverged().count(), 0);
            // Rounding to f32 is what is left.
            assert_close!(wide(svm.weights()), weights, rtol = 1e-6, atol = 1e-6);
            assert_close!(wide(svm.bias()), intercepts, rtol = 1e-6, atol = 1e-6);
            let decisions: Vec<f32> = rows
                .chunks(dim)
                .flat_map(|row| svm.decision(row).unwrap())
                .collect();
            assert_close!(wide(&decisions), known("decisions"), atol = 2e-6);
            for (class, fit) in svm.fits().iter().enumerate() {
                let of = |w: &[f64], b: f64| {
                    objective((&rows, dim), &labels, class as u32, (w, b), &config)
                };
                let known = of(&weights[class * dim..][..dim], intercepts[class]);
                assert!(
                    fit.objective <= known * (1.0 + 1e-9),
                    "{} {known}",
                    fit.objective
                );
                assert!(fit.gap.abs() <= 1e-9 * known, "{fit:?}");
                let own = wide(&svm.weights()[class * dim..][..dim]);
                let own = of(&own, f64::from(svm.bias()[class]));
                assert_close!(own, fit.objective, rtol = 1e-6);
            }
        }
    }
}

/// Rows, their length and their labels, of three classes.
fn problem() -> impl Strategy<Value = (Vec<f32>, usize, Vec<u32>)> {
    (1_usize..12, 1_usize..30).prop_flat_map(|(dim, rows)| {
        let values = prop::collection::vec(-2.0_f32..2.0, dim * rows);
        (values, Just(dim), prop::collection::vec(0_u32..3, rows))
    })
}

proptest! {
    /// Whatever the data: the gap to the dual is small and not negative, and no step from the solution
    /// finds a smaller objective, for the objective is convex.
    #[test]
    fn solutions_are_optimal(
        (mut rows, dim, labels) in problem(),
        c in prop::sample::select(vec![0.01, 1.0, 10.0]),
        squared in any::<bool>(),
        normalised in any::<bool>(),
        direction in prop::collection::vec(-1.0_f64..1.0, 13),
    ) {
        if normalised {
            l2_normalise(&mut rows, dim);
        }
        let loss = if squared { SvmLoss::SquaredHinge } else { SvmLoss::Hinge };
        let config = SvmConfig { c, loss, tolerance: 1e-8, max_epochs: 200_000, seed: 1 };
        let svm = Svm::fit(&rows, dim, &labels, 3, &config).unwrap();
        for (class, fit) in svm.fits().iter().enumerate() {
            prop_assert!(fit.converged);
            let scale = 1.0 + fit.objective;
            prop_assert!(fit.gap >= -1e-12 * scale && fit.gap <= 1e-5 * scale, "{fit:?}");
            let w = wide(&svm.weights()[class * dim..][..dim]);
            let b = f64::from(svm.bias()[class]);
            for length in [1e-3, 0.1, 1.0] {
                let moved: Vec<f64> = w.iter().zip(&direction).map(|(w, d)| w + length * d).collect();
                let moved = (&moved[..], b + length * direction[12]);
                let there = objective((&rows, dim), &labels, class as u32, moved, &config);
                prop_assert!(there >= fit.objective - 1e-5 * scale);
            }
        }
    }

    /// Also of rows that are zero, tiny or huge.
    #[test]
    fn normalised_rows_have_length_one(
        mut rows in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::ZERO, 12),
        dim in prop::sample::select(vec![1_usize, 3, 4]),
    ) {
        let before = rows.clone();
        l2_normalise(&mut rows, dim);
        for (row, before) in rows.chunks(dim).zip(before.chunks(dim)) {
            let norm = wide(row).iter().map(|v| v * v).sum::<f64>().sqrt();
            match before.iter().all(|&v| v == 0.0) {
                true => prop_assert_eq!(norm, 0.0),
                false => prop_assert!((norm - 1.0).abs() < 1e-6, "{}", norm),
            }
        }
    }
}

/// Three clusters of rows, some of them on the wrong side.
fn clusters(rows: usize) -> (Vec<f32>, Vec<u32>) {
    let noise = isqrt_testkit::randn((rows, 20), 5, DType::F32).unwrap();
    let mut values: Vec<f32> = noise.flatten_all().unwrap().to_vec1().unwrap();
    let labels: Vec<u32> = (0..rows as u32).map(|i| i % 3).collect();
    for (row, &label) in values.chunks_mut(20).zip(&labels) {
        row[label as usize] += 3.0;
    }
    l2_normalise(&mut values, 20);
    (values, labels)
}

#[test]
fn clusters_are_told_apart() {
    let (rows, labels) = clusters(300);
    for loss in [SvmLoss::Hinge, SvmLoss::SquaredHinge] {
        let config = SvmConfig {
            loss,
            ..SvmConfig::default()
        };
        // A class more, which no row has: nobody is taken for it.
        let svm = Svm::fit(&rows, 20, &labels, 4, &config).unwrap();
        let right = rows.chunks(20).zip(&labels);
        let right = right.filter(|(row, label)| svm.predict(row).unwrap() == **label);
        assert!(right.count() > 270);
        assert_eq!((svm.weights().len(), svm.bias().len()), (80, 4));
        assert!(svm.bias()[3] < -0.9 && svm.fits()[3].gap < 1e-3);
    }
}

#[test]
fn threads_do_not_change_a_bit_and_the_seed_fixes_the_order() {
    let (rows, labels) = clusters(90);
    let fit = |threads, seed| {
        let config = SvmConfig {
            seed,
            max_epochs: 5,
            ..SvmConfig::default()
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap()
            .install(|| Svm::fit(&rows, 20, &labels, 3, &config).unwrap())
    };
    let one = fit(1, 7);
    for threads in [2, 3, 5] {
        assert_eq!(fit(threads, 7), one);
    }
    assert_ne!(fit(1, 8).weights(), one.weights());
}

#[test]
fn classes_that_did_not_converge_are_told_with_their_gap() {
    let (rows, labels) = clusters(300);
    let fit = |max_epochs| {
        let config = SvmConfig {
            max_epochs,
            tolerance: 1e-9,
            ..SvmConfig::default()
        };
        Svm::fit(&rows, 20, &labels, 3, &config).unwrap()
    };
    let (short, long) = (fit(1), fit(100_000));
    let unfinished: Vec<usize> = short.unconverged().map(|(class, _)| class).collect();
    assert_eq!(unfinished, [0, 1, 2]);
    for ((_, short), long) in short.unconverged().zip(long.fits()) {
        assert_eq!(short.epochs, 1);
        // The gap bounds what is missing.
        assert!(short.objective - short.gap <= long.objective);
        assert!(short.objective > long.objective && short.gap > 1e-3);
        assert!(long.converged && long.gap < 1e-6);
    }
}

#[test]
fn mistakes_are_named() {
    let config = SvmConfig::default();
    let rows = [1.0, 2.0, 3.0, 4.0];
    let told = |result: isqrt_train::Result<Svm>| result.unwrap_err().to_string();
    let cases = [
        (told(Svm::fit(&rows, 3, &[0, 1], 2, &config)), "2 rows of 3"),
        (told(Svm::fit(&[], 0, &[], 2, &config)), "at least one"),
        (told(Svm::fit(&[], 2, &[], 2, &config)), "at least one"),
        (
            told(Svm::fit(&rows, usize::MAX, &[0, 1], 2, &config)),
            "rows of",
        ),
        (
            told(Svm::fit(&rows, 2, &[0, 2], 2, &config)),
            "label = 2: below 2",
        ),
        (told(Svm::fit(&rows, 2, &[0, 0], 0, &config)), "classes = 0"),
        (
            told(Svm::fit(&[1.0, 2.0, f32::NAN, 4.0], 2, &[0, 1], 2, &config)),
            "row 1, column 0",
        ),
        (
            told(Svm::fit(
                &rows,
                2,
                &[0, 1],
                2,
                &SvmConfig { c: 0.0, ..config },
            )),
            "c = 0",
        ),
        (
            told(Svm::fit(
                &rows,
                2,
                &[0, 1],
                2,
                &SvmConfig {
                    tolerance: f64::NAN,
                    ..config
                },
            )),
            "tolerance = NaN",
        ),
        (
            told(Svm::fit(
                &rows,
                2,
                &[0, 1],
                2,
                &SvmConfig {
                    max_epochs: 0,
                    ..config
                },
            )),
            "max_epochs = 0",
        ),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let svm = Svm::fit(&rows, 2, &[0, 1], 2, &config).unwrap();
    let message = svm.predict(&[1.0]).unwrap_err().to_string();
    assert!(message.contains("length of a row = 1: 2"), "{message}");
    assert!(svm.decision(&[1.0, f32::INFINITY]).is_err());
    l2_normalise(&mut [], 0);
}

/// As many rows, columns and classes as CUB-200-2011 has behind a covariance of 256 channels, class means
/// in noise. Two and a half minutes on two cores, and 2.5 GB.
#[test]
#[ignore = "minutes"]
fn birds_are_fitted() {
    let (classes, dim, rows) = (200, 32_896, 5994);
    let mut random = 1_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let means: Vec<f32> = (0..classes * dim).map(|_| next()).collect();
    let labels: Vec<u32> = (0..rows).map(|row| (row % classes) as u32).collect();
    let mut values: Vec<f32> = Vec::with_capacity(rows * dim);
    for &label in &labels {
        let mean = &means[label as usize * dim..][..dim];
        values.extend(mean.iter().map(|m| 0.2 * m + next()));
    }
    l2_normalise(&mut values, dim);
    let svm = Svm::fit(&values, dim, &labels, classes, &SvmConfig::default()).unwrap();
    assert_eq!(svm.unconverged().count(), 0);
    let right = (0..rows).filter(|&row| {
        let values = &values[row * dim..][..dim];
        svm.predict(values).unwrap() == labels[row]
    });
    assert_eq!(right.count(), rows);
}
