//! Finite differences over every option, properties of the mathematics, and extremes.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use faer::Mat;
use isqrt_linalg::eig::MpnCov;
use isqrt_linalg::{
    CovPool, Error, Kernel, Memory, Output, PreNormalization, Root, Schedule, Side, reference,
};
use isqrt_testkit::{Gradcheck, assert_close, gradcheck, randn};
use proptest::prelude::*;

/// Features with a decaying spectrum and means that are not zero.
fn features(shape: (usize, usize, usize), seed: u64, dtype: DType) -> Tensor {
    let x = randn(shape, seed, DType::F64).unwrap();
    let decay = (0..shape.1)
        .map(|i| 1.0 / (1.0 + 0.3 * i as f64))
        .collect::<Vec<_>>();
    let decay = Tensor::from_vec(decay, (1, shape.1, 1), &Device::Cpu).unwrap();
    let x = (x.broadcast_mul(&decay).unwrap() + 0.4).unwrap();
    x.to_dtype(dtype).unwrap()
}

fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn distance(found: &[f64], known: &[f64]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(known).map(|(a, b)| a - b));
    difference / norm(&mut known.iter().copied()).max(1e-300)
}

fn gradient(pool: &CovPool, x: &Tensor) -> Vec<f64> {
    let x = Var::from_tensor(x).unwrap();
    let y = pool.forward(&x).unwrap();
    let g = randn(y.shape(), 77, DType::F64)
        .unwrap()
        .to_dtype(y.dtype())
        .unwrap();
    let loss = (y * g).unwrap().sum_all().unwrap();
    flat(&loss.backward().unwrap().remove(&x).unwrap())
}

#[test]
fn finite_differences_confirm_every_option() {
    let schedules = [
        Schedule::NewtonSchulz { iterations: 1 },
        Schedule::NewtonSchulz { iterations: 2 },
        Schedule::NewtonSchulz { iterations: 3 },
        Schedule::NewtonSchulz { iterations: 5 },
        Schedule::Cubic {
            steps: 3,
            lower: 0.1,
        },
        Schedule::Quintic {
            steps: 2,
            lower: 0.1,
        },
        Schedule::Nonic {
            steps: 1,
            lower: 0.1,
        },
        Schedule::Nonic {
            steps: 2,
            lower: 0.1,
        },
    ];
    let norms = [
        PreNormalization::Trace,
        PreNormalization::Frobenius,
        PreNormalization::Spectral,
        PreNormalization::None,
    ];
    for (d, m) in [(4, 6), (6, 4)] {
        // Small enough for PreNormalization::None.
        let x = (features((2, d, m), 5, DType::F64) * 0.3).unwrap();
        for schedule in &schedules {
            for pre_normalization in norms {
                for post_compensation in [true, false] {
                    for side in [Side::Covariance, Side::Gram] {
                        for memory in [Memory::Keep, Memory::Lean] {
                            for output in [Output::Triangle, Output::Full] {
                                let schedule = schedule.clone();
                                let root = Root {
                                    schedule,
                                    pre_normalization,
                                    post_compensation,
                                    side,
                                    memory,
                                };
                                let pool = CovPool {
                                    output,
                                    ..CovPool::with_root(root)
                                };
                                gradcheck(
                                    |x| Ok(pool.forward(&x[0])?),
                                    std::slice::from_ref(&x),
                                    Gradcheck::default(),
                                )
                                .unwrap_or_else(|error| panic!("{pool:?}: {error}"));
                            }
                        }
                    }
                }
            }
        }
        for output in [Output::Triangle, Output::Full] {
            let x = std::slice::from_ref(&x);
            let plain = CovPool {
                output,
                ..CovPool::plain()
            };
            gradcheck(|x| Ok(plain.forward(&x[0])?), x, Gradcheck::default()).unwrap();
        }
    }
    // MPN-COV where the covariance has full rank: the root is not differentiable at 0.
    for power in [0.3, 0.5, 1.0] {
        for output in [Output::Triangle, Output::Full] {
            let pool = MpnCov { power, output };
            let x = [features((2, 4, 9), 6, DType::F64)];
            gradcheck(|x| Ok(pool.forward(&x[0])?), &x, Gradcheck::default()).unwrap();
        }
    }
}

#[test]
fn enough_steps_give_the_exact_root_and_gradient() {
    let (d, m) = (6, 20);
    let x = features((1, d, m), 8, DType::F64);
    let matrix = Mat::from_fn(d, m, |i, j| flat(&x)[i * m + j]);
    let g = flat(&randn((1, d * (d + 1) / 2), 77, DType::F64).unwrap());
    let upstream = reference::from_triangle(d, &g);
    let (root, dx) = reference::exact(&matrix, &upstream).unwrap();
    let dx: Vec<f64> = (0..d * m).map(|at| dx[(at / m, at % m)]).collect();
    for schedule in [
        Schedule::NewtonSchulz { iterations: 25 },
        Schedule::Cubic {
            steps: 12,
            lower: 0.05,
        },
        Schedule::Quintic {
            steps: 8,
            lower: 0.05,
        },
        Schedule::Nonic {
            steps: 5,
            lower: 0.05,
        },
    ] {
        let pool = CovPool::with_schedule(schedule);
        let y = flat(&pool.forward(&x).unwrap());
        assert!(
            distance(&y, &reference::triangle(&root)) < 1e-11,
            "{pool:?}"
        );
        assert!(distance(&gradient(&pool, &x), &dx) < 1e-9, "{pool:?}");
    }
    let y = flat(&MpnCov::default().forward(&x).unwrap());
    assert!(distance(&y, &reference::triangle(&root)) < 1e-12);
}

#[test]
fn f32_bears_the_most_steps_that_it_takes_and_refuses_more() {
    // More channels than positions, so most eigenvalues are zero and rounding grows in their place.
    let x = isqrt_linalg::bench::synthetic_features(2, 256, 49).unwrap();
    let x = x.to_dtype(DType::F32).unwrap();
    let double = x.to_dtype(DType::F64).unwrap();
    for (pre_normalization, most) in [
        (PreNormalization::Trace, 13),
        (PreNormalization::Frobenius, 12),
        (PreNormalization::Spectral, 11),
    ] {
        for side in [Side::Covariance, Side::Gram] {
            let pool = |iterations| {
                CovPool::with_root(Root {
                    schedule: Schedule::NewtonSchulz { iterations },
                    pre_normalization,
                    side,
                    ..Root::default()
                })
            };
            let single = flat(&pool(most).forward(&x).unwrap());
            let known = flat(&pool(most).forward(&double).unwrap());
            assert!(distance(&single, &known) < 1e-3, "{pre_normalization:?}");
            pool(most + 1).forward(&double).unwrap();
            let error = pool(most + 1).forward(&x).unwrap_err().to_string();
            let value = format!("iterations = {} is out of range", most + 1);
            assert!(error.contains(&value), "{error}");
            assert!(error.contains("f64 features"), "{error}");
        }
    }
}

#[test]
fn minimax_is_closer_than_newton_schulz_at_equal_products() {
    let x = isqrt_linalg::bench::synthetic_features(2, 64, 49).unwrap();
    let schedules = [
        Schedule::NewtonSchulz { iterations: 5 },
        Schedule::Cubic {
            steps: 3,
            lower: 0.1,
        },
    ];
    let rows = isqrt_linalg::bench::iterations(&x, &schedules, std::time::Duration::ZERO).unwrap();
    assert!(rows[1].products < rows[0].products);
    assert!(rows[1].root_error < rows[0].root_error, "{rows:?}");
    assert!(
        rows[2].root_error < 1e-3,
        "MPN-COV is the exact root: {rows:?}"
    );
}

#[test]
fn constant_features_give_zeros_and_zero_gradients() {
    for dtype in [DType::F32, DType::F64] {
        for value in [0.0, 0.1, -3.7e12] {
            for (d, m) in [(5, 9), (9, 5), (3, 1), (1, 1)] {
                let x = (Tensor::ones((2, d, m), dtype, &Device::Cpu).unwrap() * value).unwrap();
                for pool in [CovPool::isqrt(1), CovPool::isqrt(5), CovPool::plain()] {
                    assert!(flat(&pool.forward(&x).unwrap()).iter().all(|&y| y == 0.0));
                    assert!(
                        gradient(&pool, &x).iter().all(|&g| g == 0.0),
                        "{value} {d}x{m}"
                    );
                }
                assert!(
                    flat(&MpnCov::default().forward(&x).unwrap())
                        .iter()
                        .all(|&y| y == 0.0)
                );
            }
        }
    }
}

#[test]
fn one_position_has_no_covariance() {
    let x = features((2, 5, 1), 3, DType::F32);
    assert!(
        flat(&CovPool::isqrt(5).forward(&x).unwrap())
            .iter()
            .all(|&y| y == 0.0)
    );
    assert!(gradient(&CovPool::isqrt(5), &x).iter().all(|&g| g == 0.0));
}

#[test]
fn scale_passes_through_from_1e_20_to_1e_20() {
    for (d, m) in [(20, 9), (9, 20)] {
        let x = features((1, d, m), 4, DType::F32);
        let unit = flat(&CovPool::isqrt(5).forward(&x).unwrap());
        let unit_gradient = gradient(&CovPool::isqrt(5), &x);
        for scale in [1e-20, 1e-10, 1e10, 1e20] {
            let y = CovPool::isqrt(5).forward(&(&x * scale).unwrap()).unwrap();
            let y: Vec<f64> = flat(&y).iter().map(|y| y / scale).collect();
            assert!(distance(&y, &unit) < 1e-5, "{scale}");
            let found = gradient(&CovPool::isqrt(5), &(&x * scale).unwrap());
            assert!(distance(&found, &unit_gradient) < 1e-5, "{scale}");
        }
    }
}

#[test]
fn repeated_eigenvalues_are_no_trouble() {
    // Orthogonal rows of equal norm: the covariance is a multiple of I.
    let (d, m) = (4, 8);
    let hadamard = |i: usize, j: usize| {
        if (i & j).count_ones().is_multiple_of(2) {
            1.0
        } else {
            -1.0
        }
    };
    let values: Vec<f64> = (0..d * m).map(|at| hadamard(at / m + 1, at % m)).collect();
    let x = Tensor::from_vec(values, (1, d, m), &Device::Cpu).unwrap();
    for pool in [
        CovPool::isqrt(9),
        CovPool::with_schedule(Schedule::Cubic {
            steps: 6,
            lower: 0.3,
        }),
    ] {
        let y = flat(&pool.forward(&x).unwrap());
        let identity: Vec<f64> = (0..d)
            .flat_map(|i| (i..d).map(move |j| f64::from(u8::from(i == j))))
            .collect();
        assert!(distance(&y, &identity) < 1e-9);
        assert!(gradient(&pool, &x).iter().all(|g| g.is_finite()));
    }
    gradcheck(
        |x| Ok(MpnCov::default().forward(&x[0])?),
        &[x],
        Gradcheck::default(),
    )
    .unwrap();
}

#[test]
fn bad_input_is_named() {
    let mut values = flat(&features((3, 4, 5), 1, DType::F64));
    values[2 * 20 + 7] = f64::NAN;
    let message = |x: &Tensor, pool: &CovPool| pool.forward(x).unwrap_err().to_string();
    let x = Tensor::from_vec(values, (3, 4, 5), &Device::Cpu).unwrap();
    for x in [&x, &x.to_dtype(DType::F32).unwrap()] {
        for pool in [CovPool::isqrt(5), CovPool::plain()] {
            assert!(
                message(x, &pool).contains("batch element 2"),
                "{}",
                message(x, &pool)
            );
        }
        assert!(
            MpnCov::default()
                .forward(x)
                .unwrap_err()
                .to_string()
                .contains("element 2")
        );
    }
    let x = features((2, 4, 5), 1, DType::F32);
    assert!(matches!(
        CovPool::isqrt(0).forward(&x),
        Err(Error::Option { .. })
    ));
    let rank2 = x.flatten_from(1).unwrap();
    assert!(matches!(
        CovPool::isqrt(5).forward(&rank2),
        Err(Error::Shape { .. })
    ));
    let empty = Tensor::zeros((2, 0, 5), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(
        CovPool::isqrt(5).forward(&empty),
        Err(Error::Empty { .. })
    ));
    let half = x.to_dtype(DType::F16).unwrap();
    assert!(matches!(
        CovPool::isqrt(5).forward(&half),
        Err(Error::Dtype { .. })
    ));
    // Without pre-normalisation a large spectrum makes the iteration diverge.
    let root = Root {
        pre_normalization: PreNormalization::None,
        schedule: Schedule::NewtonSchulz { iterations: 9 },
        ..Root::default()
    };
    let wild = (x * 1e6).unwrap();
    assert!(message(&wild, &CovPool::with_root(root)).contains("square root of batch element 0"));
    // With several bad elements the first is named, whichever thread is done first.
    let several = Tensor::full(f32::NAN, (64, 4, 5), &Device::Cpu).unwrap();
    for _ in 0..20 {
        assert!(message(&several, &CovPool::isqrt(5)).contains("batch element 0"));
        let message = MpnCov::default().forward(&several).unwrap_err().to_string();
        assert!(message.contains("batch element 0"), "{message}");
    }
    let huge = (features((2, 4, 5), 1, DType::F32) * 1e25).unwrap();
    assert!(message(&huge, &CovPool::plain()).contains("batch element 0"));
}

#[test]
fn an_empty_batch_gives_an_empty_result() {
    let x = Tensor::zeros((0, 4, 5), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(CovPool::isqrt(5).forward(&x).unwrap().dims(), [0, 10]);
}

#[test]
fn views_and_four_dimensions_are_accepted() {
    let x = randn((2, 9, 3, 4), 3, DType::F32).unwrap();
    let direct = CovPool::isqrt(3).forward(&x).unwrap();
    assert_eq!(direct.dims(), [2, 45]);
    let flattened = CovPool::isqrt(3)
        .forward(&x.flatten_from(2).unwrap())
        .unwrap();
    assert_close!(direct, flattened, rtol = 0.0, atol = 0.0);
    let nhwc = x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    let view = nhwc.permute((0, 3, 1, 2)).unwrap();
    let seen = CovPool::isqrt(3).forward(&view).unwrap();
    assert_close!(direct, seen, rtol = 0.0, atol = 0.0);
}

#[test]
fn a_second_backward_gives_the_same_gradient() {
    let x = Var::from_tensor(&features((3, 8, 5), 2, DType::F32)).unwrap();
    let y = CovPool::isqrt(5).forward(&x).unwrap();
    let first = flat(&y.backward().unwrap().remove(&x).unwrap());
    let second = flat(&y.backward().unwrap().remove(&x).unwrap());
    assert_eq!(first, second);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = features((5, 40, 30), 2, DType::F32);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let pooled = CovPool::isqrt(5);
            (flat(&pooled.forward(&x).unwrap()), gradient(&pooled, &x))
        })
    };
    let alone = run(1);
    for threads in [2, 3, 4] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any shape, any kernel: a batch is a loop over its images, and both sides agree.
    #[test]
    fn batch_is_a_loop_and_sides_agree(
        batch in 1usize..5, d in 1usize..40, m in 2usize..40, steps in 1usize..8, seed in 0u64..1000,
    ) {
        let x = features((batch, d, m), seed, DType::F64);
        let side = |side| CovPool::with_root(Root {
            schedule: Schedule::NewtonSchulz { iterations: steps }, side, ..Root::default()
        });
        let (gram, covariance) = (side(Side::Gram), side(Side::Covariance));
        let known = flat(&covariance.forward(&x).unwrap());
        prop_assert!(distance(&flat(&gram.forward(&x).unwrap()), &known) < 1e-11);
        let single: Vec<f64> = (0..batch)
            .flat_map(|i| flat(&covariance.forward(&x.narrow(0, i, 1).unwrap()).unwrap()))
            .collect();
        prop_assert!(distance(&single, &known) < 1e-14);
        let known = gradient(&covariance, &x);
        if d > 1 {
            prop_assert!(distance(&gradient(&gram, &x), &known) < 1e-9);
        }
        for kernel in [Kernel::Portable, Kernel::Avx2, Kernel::Avx512] {
            if kernel.resolve().is_ok() {
                let pool = CovPool { kernel, ..gram.clone() };
                let y = flat(&pool.forward(&x.to_dtype(DType::F32).unwrap()).unwrap());
                prop_assert!(distance(&y, &flat(&gram.forward(&x).unwrap())) < 1e-4);
            }
        }
    }

    /// `f(Q A Qᵀ) = Q f(A) Qᵀ` for a permutation `Q` with signs, and `f(cA) = √c f(A)`.
    #[test]
    fn equivariance(d in 2usize..20, m in 2usize..20, seed in 0u64..1000, scale in 0.01f64..100.0) {
        let x = features((1, d, m), seed, DType::F64);
        let pool = CovPool { output: Output::Full, ..CovPool::isqrt(5) };
        let y = flat(&pool.forward(&x).unwrap());
        let to = |i: usize| (i * 7 + 3) % d;
        let sign = |i: usize| if i.is_multiple_of(3) { -1.0 } else { 1.0 };
        prop_assume!(d % 7 != 0);
        let raw = flat(&x);
        let mut moved = vec![0.0; d * m];
        for i in 0..d {
            for j in 0..m {
                moved[to(i) * m + j] = sign(i) * raw[i * m + j];
            }
        }
        let moved = Tensor::from_vec(moved, (1, d, m), &Device::Cpu).unwrap();
        let moved = flat(&pool.forward(&moved).unwrap());
        let back: Vec<f64> = (0..d * d)
            .map(|at| (at / d, at % d))
            .map(|(i, j)| sign(i) * sign(j) * moved[to(i) * d + to(j)])
            .collect();
        prop_assert!(distance(&back, &y) < 1e-11);
        let scaled = flat(&pool.forward(&(x * scale).unwrap()).unwrap());
        let scaled: Vec<f64> = scaled.iter().map(|y| y / scale).collect();
        prop_assert!(distance(&scaled, &y) < 1e-11);
    }
}
