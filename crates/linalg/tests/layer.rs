//! The layer against the plain reverse-mode reference, against finite differences and against
//! the properties of the mathematics.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor, Var};
use faer::Mat;
use isqrt_linalg::{
    CovPool, Kernel, Memory, Output, PreNormalization, Root, Schedule, Side, reference,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
}

fn values(seed: u64, count: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| uniform(&mut rng)).collect()
}

/// Features with a decaying spectrum and a mean, `(d, m)` row by row.
fn features(seed: u64, d: usize, m: usize) -> Vec<f64> {
    let raw = values(seed, d * m);
    (0..d * m)
        .map(|at| raw[at] / (1.0 + (at / m) as f64 * 0.2) + 0.3)
        .collect()
}

fn matrix(rows: usize, columns: usize, values: &[f64]) -> Mat<f64> {
    Mat::from_fn(rows, columns, |i, j| values[i * columns + j])
}

fn flat(a: &Mat<f64>) -> Vec<f64> {
    (0..a.nrows())
        .flat_map(|i| (0..a.ncols()).map(move |j| (i, j)))
        .map(|at| a[at])
        .collect()
}

/// Output and gradient of the layer, in f64 whatever it computes in.
fn run(
    pool: &CovPool,
    dtype: candle_core::DType,
    shape: &[usize],
    x: &[f64],
    upstream: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let x = Tensor::from_slice(x, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let y = pool.forward(&x).unwrap();
    let g = Tensor::from_slice(upstream, y.shape(), &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap();
    let loss = (&y * g).unwrap().sum_all().unwrap();
    let gradient = loss.backward().unwrap().remove(&x).unwrap();
    let read = |t: &Tensor| {
        let t = t.to_dtype(candle_core::DType::F64).unwrap();
        t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    (read(&y), read(&gradient))
}

fn relative(found: &[f64], known: &[f64]) -> f64 {
    assert_eq!(found.len(), known.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(known).map(|(a, b)| a - b));
    // Where the exact answer is zero, rounding is measured against 1e-2.
    difference / norm(&mut known.iter().copied()).max(1e-2)
}

fn kernels() -> Vec<Kernel> {
    let all = [Kernel::Portable, Kernel::Avx2, Kernel::Avx512];
    all.into_iter().filter(|k| k.resolve().is_ok()).collect()
}

fn roots() -> Vec<Root> {
    let mut roots = Vec::new();
    for n in [1, 2, 3, 4, 5, 7] {
        roots.push(Root {
            schedule: Schedule::NewtonSchulz { iterations: n },
            ..Root::default()
        });
    }
    roots.push(Root {
        schedule: Schedule::Cubic {
            steps: 3,
            lower: 0.1,
        },
        ..Root::default()
    });
    roots.push(Root {
        schedule: Schedule::Quintic {
            steps: 2,
            lower: 0.1,
        },
        ..Root::default()
    });
    for steps in [1, 2] {
        roots.push(Root {
            schedule: Schedule::Nonic { steps, lower: 0.1 },
            ..Root::default()
        });
    }
    let mixed = vec![
        [1.5, -0.5, 0.0],
        [1.875, -1.25, 0.375],
        [1.5, -0.5, 0.0],
        [1.4, -0.4, 0.0],
    ];
    roots.push(Root {
        schedule: Schedule::Given(mixed),
        ..Root::default()
    });
    for pre_normalization in [
        PreNormalization::Frobenius,
        PreNormalization::Spectral,
        PreNormalization::None,
    ] {
        for post_compensation in [true, false] {
            roots.push(Root {
                pre_normalization,
                post_compensation,
                ..Root::default()
            });
        }
    }
    roots.push(Root {
        post_compensation: false,
        ..Root::default()
    });
    roots
}

/// A divisor of 1 needs a small spectrum.
fn shrink(root: &Root, x: &mut [f64]) {
    if root.pre_normalization == PreNormalization::None {
        x.iter_mut().for_each(|x| *x *= 0.3);
    }
}

#[test]
fn equals_the_reverse_mode_reference() {
    for (d, m) in [
        (5, 9),
        (9, 5),
        (16, 16),
        (33, 21),
        (21, 33),
        (40, 7),
        (1, 4),
        (3, 700),
    ] {
        for root in roots() {
            for side in [Side::Covariance, Side::Gram] {
                if m > 100 && side == Side::Gram {
                    continue;
                }
                for memory in [Memory::Keep, Memory::Lean] {
                    let root = Root {
                        side,
                        memory,
                        ..root.clone()
                    };
                    let mut x = features(1, d, m);
                    shrink(&root, &mut x);
                    for output in [Output::Triangle, Output::Full] {
                        let g = values(2, output.len(d));
                        let upstream = match output {
                            Output::Triangle => reference::from_triangle(d, &g),
                            Output::Full => matrix(d, d, &g),
                        };
                        let (y, dx) =
                            reference::layer(&root, &matrix(d, m, &x), &upstream).unwrap();
                        let y = match output {
                            Output::Triangle => reference::triangle(&y),
                            Output::Full => flat(&y),
                        };
                        for kernel in kernels() {
                            let pool = CovPool {
                                root: Some(root.clone()),
                                output,
                                kernel,
                            };
                            let found = run(&pool, candle_core::DType::F64, &[1, d, m], &x, &g);
                            let errors = (relative(&found.0, &y), relative(&found.1, &flat(&dx)));
                            assert!(
                                errors.0 < 1e-12 && errors.1 < 1e-12,
                                "{d}x{m} {pool:?}: {errors:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn single_precision_stays_within_1e_5_on_every_kernel() {
    for (d, m) in [(64, 49), (49, 64), (256, 196), (100, 30)] {
        let x = features(3, d, m);
        let newton = [1, 3, 5, 7].map(|iterations| Schedule::NewtonSchulz { iterations });
        let lower = 0.1;
        let minimax = [
            Schedule::Cubic { steps: 3, lower },
            Schedule::Quintic { steps: 2, lower },
            Schedule::Nonic { steps: 1, lower },
        ];
        for schedule in newton.into_iter().chain(minimax) {
            let root = Root {
                schedule: schedule.clone(),
                ..Root::default()
            };
            let g = values(4, d * (d + 1) / 2);
            let upstream = reference::from_triangle(d, &g);
            let (y, dx) = reference::layer(&root, &matrix(d, m, &x), &upstream).unwrap();
            for kernel in kernels() {
                for side in [Side::Covariance, Side::Gram] {
                    let root = Root {
                        side,
                        ..root.clone()
                    };
                    let pool = CovPool {
                        kernel,
                        ..CovPool::with_root(root)
                    };
                    let found = run(&pool, candle_core::DType::F32, &[1, d, m], &x, &g);
                    let errors = (
                        relative(&found.0, &reference::triangle(&y)),
                        relative(&found.1, &flat(&dx)),
                    );
                    assert!(
                        errors.0 < 1e-5 && errors.1 < 1e-5,
                        "{d}x{m} {schedule:?} {kernel:?} {side:?}: {errors:?}"
                    );
                }
            }
        }
    }
}

/// More images than threads, rows and columns that fill no tile.
#[test]
fn a_batch_of_odd_maps_in_single_precision_equals_the_reference() {
    let (batch, d, m) = (7, 37, 29);
    for output in [Output::Triangle, Output::Full] {
        for side in [Side::Covariance, Side::Gram] {
            let root = Root {
                side,
                ..Root::default()
            };
            let (mut x, mut g, mut y, mut dx) = (vec![], vec![], vec![], vec![]);
            for image in 0..batch {
                let one = features(10 + image, d, m);
                let upstream = values(20 + image, output.len(d));
                let known = match output {
                    Output::Triangle => reference::from_triangle(d, &upstream),
                    Output::Full => matrix(d, d, &upstream),
                };
                let known = reference::layer(&root, &matrix(d, m, &one), &known).unwrap();
                y.extend(match output {
                    Output::Triangle => reference::triangle(&known.0),
                    Output::Full => flat(&known.0),
                });
                dx.extend(flat(&known.1));
                x.extend(one);
                g.extend(upstream);
            }
            for kernel in kernels() {
                let pool = CovPool {
                    root: Some(root.clone()),
                    output,
                    kernel,
                };
                let shape = [batch as usize, d, m];
                let three = rayon::ThreadPoolBuilder::new().num_threads(3).build();
                let found = three
                    .unwrap()
                    .install(|| run(&pool, candle_core::DType::F32, &shape, &x, &g));
                let errors = (relative(&found.0, &y), relative(&found.1, &dx));
                assert!(errors.0 < 1e-5 && errors.1 < 1e-5, "{pool:?}: {errors:?}");
            }
        }
    }
}

#[test]
fn plain_covariance_equals_the_reference_in_chunks_of_positions() {
    for (d, m) in [(5, 9), (20, 513), (33, 1100), (16, 1024)] {
        let x = features(5, d, m);
        for output in [Output::Triangle, Output::Full] {
            let g = values(6, output.len(d));
            let upstream = match output {
                Output::Triangle => reference::from_triangle(d, &g),
                Output::Full => matrix(d, d, &g),
            };
            let (y, dx) = reference::covariance(&matrix(d, m, &x), &upstream);
            let y = match output {
                Output::Triangle => reference::triangle(&y),
                Output::Full => flat(&y),
            };
            for kernel in kernels() {
                let pool = CovPool {
                    output,
                    kernel,
                    ..CovPool::plain()
                };
                let found = run(&pool, candle_core::DType::F64, &[1, d, m], &x, &g);
                let errors = (relative(&found.0, &y), relative(&found.1, &flat(&dx)));
                assert!(
                    errors.0 < 1e-12 && errors.1 < 1e-12,
                    "{d}x{m} {pool:?}: {errors:?}"
                );
            }
        }
    }
}
