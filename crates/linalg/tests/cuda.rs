//! The layer on a GPU beside the CPU: every option, forward and backward. Passed over where there is
//! no GPU; tools/cuda/check.sh runs it without one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_device::{Choice, Error};
use isqrt_linalg::{
    CovPool, GpuKernel, Memory, Output, PreNormalization, Precision, Root, Schedule, Side, Tf32,
};

fn gpu() -> Option<Device> {
    match Choice::Cuda(0).open() {
        Ok(opened) => Some(opened.device),
        Err(Error::NoDriver { .. }) => {
            eprintln!("passed over: no GPU");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Features that look like those after a ReLU, from a sequence without period in sight.
fn features(shape: (usize, usize, usize), dtype: DType) -> Tensor {
    let len = shape.0 * shape.1 * shape.2;
    let value = |i: usize| {
        let x = (i as f64 * 0.754_877_666).fract() + (i as f64 * 0.569_840_291).fract() - 0.9;
        x.max(0.0) * 3.0
    };
    let values: Vec<f64> = (0..len).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

/// Output and gradient for an upstream gradient that depends on the place alone.
fn run(pool: &CovPool, x: &Tensor, device: &Device) -> (Tensor, Tensor) {
    run_by(x, device, |x| pool.forward(x).unwrap())
}

/// The same on a GPU by this kernel.
fn run_as(pool: &CovPool, x: &Tensor, device: &Device, kernel: GpuKernel) -> (Tensor, Tensor) {
    run_by(x, device, |x| pool.forward_on_gpu(x, kernel).unwrap())
}

fn run_by(x: &Tensor, device: &Device, pool: impl Fn(&Tensor) -> Tensor) -> (Tensor, Tensor) {
    let x = Var::from_tensor(&x.to_device(device).unwrap()).unwrap();
    let y = pool(x.as_tensor());
    let weights: Vec<f64> = (0..y.elem_count())
        .map(|i| ((i * 7 % 13) as f64 - 6.0) / 6.0)
        .collect();
    let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu).unwrap();
    let weights = weights
        .to_dtype(y.dtype())
        .unwrap()
        .to_device(device)
        .unwrap();
    let gradients = (&y * &weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let dx = gradients.get(x.as_tensor()).unwrap();
    let home = |t: &Tensor| {
        t.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
    };
    (home(&y), home(dx))
}

/// Largest difference, as a share of the largest value.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (a, b) = (flat(a), flat(b));
    let most = b.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let apart = a.iter().zip(&b).fold(0.0_f64, |m, (a, b)| {
        // NaN must not pass for equal.
        if (a - b).is_nan() {
            f64::INFINITY
        } else {
            m.max((a - b).abs())
        }
    });
    if most == 0.0 { apart } else { apart / most }
}

#[test]
fn every_option_gives_the_same_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let (mut worst64, mut worst32) = (0.0_f64, 0.0_f64);
    for pool in every_pool() {
        for shape in [(2, 6, 9), (1, 17, 5)] {
            for (dtype, most, worst) in [
                (DType::F64, 1e-11, &mut worst64),
                (DType::F32, 2e-4, &mut worst32),
            ] {
                let x = features(shape, dtype);
                let (y, dx) = run(&pool, &x, &Device::Cpu);
                let (on_gpu, dx_on_gpu) = run_as(&pool, &x, &gpu, GpuKernel::Tiles);
                let apart = distance(&on_gpu, &y).max(distance(&dx_on_gpu, &dx));
                assert!(apart < most, "{pool:?} {shape:?} {dtype:?}: {apart:e}");
                *worst = worst.max(apart);
            }
        }
    }
    eprintln!("largest difference: f64 {worst64:.1e}, f32 {worst32:.1e}");
}

#[test]
fn matrices_of_several_tiles() {
    let Some(gpu) = gpu() else { return };
    for (shape, side) in [
        // So few that a block has more threads.
        ((1, 130, 70), Side::Auto),
        ((1, 70, 131), Side::Auto),
        // More than two blocks for each of the stand-in's four multiprocessors.
        ((4, 130, 70), Side::Auto),
        ((4, 70, 131), Side::Auto),
        ((10, 65, 64), Side::Gram),
        ((3, 64, 129), Side::Covariance),
        // Tiles of 72, some at an edge.
        ((3, 146, 140), Side::Gram),
    ] {
        let pool = CovPool::with_root(Root {
            side,
            ..Root::default()
        });
        for (dtype, most) in [(DType::F64, 1e-11), (DType::F32, 2e-4)] {
            let x = features(shape, dtype);
            let (y, dx) = run(&pool, &x, &Device::Cpu);
            let (on_gpu, dx_on_gpu) = run(&pool, &x, &gpu);
            assert!(
                distance(&on_gpu, &y) < most,
                "{shape:?} {dtype:?}: {:e}",
                distance(&on_gpu, &y)
            );
            assert!(
                distance(&dx_on_gpu, &dx) < most,
                "{shape:?} {dtype:?}: {:e}",
                distance(&dx_on_gpu, &dx)
            );
        }
    }
}

/// The options of a layer, in all combinations.
fn every_pool() -> Vec<CovPool> {
    let norms = [
        PreNormalization::Trace,
        PreNormalization::Frobenius,
        PreNormalization::Spectral,
    ];
    let schedules = [
        Schedule::NewtonSchulz { iterations: 1 },
        Schedule::NewtonSchulz { iterations: 3 },
        Schedule::NewtonSchulz { iterations: 5 },
        Schedule::Nonic {
            steps: 2,
            lower: 0.1,
        },
    ];
    let mut pools = vec![CovPool::plain()];
    for schedule in schedules {
        for pre_normalization in norms {
            for side in [Side::Gram, Side::Covariance] {
                for post_compensation in [true, false] {
                    for memory in [Memory::Keep, Memory::Lean] {
                        for output in [Output::Triangle, Output::Full] {
                            let root = Root {
                                schedule: schedule.clone(),
                                pre_normalization,
                                post_compensation,
                                side,
                                memory,
                            };
                            pools.push(CovPool {
                                output,
                                ..CovPool::with_root(root)
                            });
                        }
                    }
                }
            }
        }
    }
    pools
}

#[test]
fn one_launch_gives_the_same_as_one_a_product() {
    let Some(gpu) = gpu() else { return };
    let mut worst = (0.0_f64, 0.0_f64);
    let check = |pool: &CovPool, shape, (most64, most32)| {
        let mut found = [0.0; 2];
        for (dtype, most, to) in [(DType::F64, most64, 0), (DType::F32, most32, 1)] {
            let x = features(shape, dtype);
            let known = run(pool, &x, &Device::Cpu);
            let fused = run_as(pool, &x, &gpu, GpuKernel::Fused);
            let apart = distance(&fused.0, &known.0).max(distance(&fused.1, &known.1));
            assert!(apart < most, "{pool:?} {shape:?} {dtype:?}: {apart:e}");
            found[to] = apart;
        }
        found
    };
    let pools = every_pool();
    let rooted = pools.iter().filter(|pool| pool.root.is_some());
    for (at, pool) in rooted.enumerate() {
        // One of two shapes each, for time.
        let shape = [(2, 6, 9), (1, 17, 5)][at.count_ones() as usize % 2];
        let apart = check(pool, shape, (1e-11, 2e-3));
        worst = (worst.0.max(apart[0]), worst.1.max(apart[1]));
    }
    eprintln!(
        "largest difference: f64 {:.1e}, f32 {:.1e}",
        worst.0, worst.1
    );
    // The largest side of each type; no multiple of a thread's tile.
    for (dtype, shape, side) in [
        (DType::F32, (2, 70, 64), Side::Gram),
        (DType::F32, (1, 63, 70), Side::Covariance),
        (DType::F64, (1, 43, 45), Side::Covariance),
    ] {
        for iterations in [5, 13] {
            let pool = CovPool::with_root(Root {
                schedule: Schedule::NewtonSchulz { iterations },
                side,
                ..Root::default()
            });
            let x = features(shape, dtype);
            let known = run(&pool, &x.to_dtype(DType::F64).unwrap(), &Device::Cpu);
            let fused = run_as(&pool, &x, &gpu, GpuKernel::Fused);
            let tiles = run_as(&pool, &x, &gpu, GpuKernel::Tiles);
            let cpu = run(&pool, &x, &Device::Cpu);
            let apart =
                |(y, dx): &(Tensor, Tensor)| (distance(y, &known.0), distance(dx, &known.1));
            let (fused, tiles, cpu) = (apart(&fused), apart(&tiles), apart(&cpu));
            for (name, (root, gradient)) in [("fused", fused), ("tiles", tiles), ("CPU", cpu)] {
                eprintln!("{shape:?} {dtype:?} N={iterations} {name}: {root:.1e} {gradient:.1e}");
            }
            assert!(fused.0 < 5.0 * tiles.0.max(cpu.0).max(1e-7), "{shape:?}");
            assert!(fused.1 < 5.0 * tiles.1.max(cpu.1).max(1e-7), "{shape:?}");
        }
    }
    // What does not fit is an error where it was asked for, and else done by tiles.
    let x = features((1, 65, 66), DType::F32).to_device(&gpu).unwrap();
    let pool = CovPool::isqrt(5);
    let error = pool.forward_on_gpu(&x, GpuKernel::Fused).unwrap_err();
    assert!(error.to_string().contains("99 KiB"), "{error}");
    assert!(pool.forward(&x).is_ok());
}

#[test]
fn a_cluster_of_blocks_gives_the_same() {
    let Some(gpu) = gpu() else { return };
    let kernel = GpuKernel::Cluster;
    if isqrt_device::found().gpus[0].capability < (9, 0) {
        let x = features((2, 6, 9), DType::F32).to_device(&gpu).unwrap();
        let error = CovPool::isqrt(5).forward_on_gpu(&x, kernel).unwrap_err();
        assert!(error.to_string().contains("capability 9.0"), "{error}");
        return;
    }
    let mut worst = 0.0_f64;
    let pools = every_pool();
    let rooted = pools.iter().filter(|pool| pool.root.is_some());
    // A fifth of them: each option is in several.
    for pool in rooted.step_by(5) {
        let x = features((2, 6, 9), DType::F32);
        let known = run(pool, &x, &Device::Cpu);
        let found = run_as(pool, &x, &gpu, kernel);
        let apart = distance(&found.0, &known.0).max(distance(&found.1, &known.1));
        assert!(apart < 2e-3, "{pool:?}: {apart:e}");
        worst = worst.max(apart);
    }
    eprintln!("largest difference: {worst:.1e}");
    // Sides that are no multiple of anything, with blocks that have fewer rows or none.
    for (shape, side) in [
        ((2, 73, 61), Side::Gram),
        ((1, 50, 77), Side::Covariance),
        ((1, 256, 260), Side::Covariance),
    ] {
        let pool = CovPool::with_root(Root {
            side,
            ..Root::default()
        });
        let x = features(shape, DType::F32);
        let known = run(&pool, &x.to_dtype(DType::F64).unwrap(), &Device::Cpu);
        let found = run_as(&pool, &x, &gpu, kernel);
        let apart = (distance(&found.0, &known.0), distance(&found.1, &known.1));
        eprintln!("{shape:?}: {:.1e} {:.1e}", apart.0, apart.1);
        assert!(apart.0.max(apart.1) < 1e-4, "{shape:?}: {apart:?}");
    }
    for (dtype, d) in [(DType::F64, 40), (DType::F32, 300)] {
        let x = features((1, d, d + 1), dtype).to_device(&gpu).unwrap();
        let error = CovPool::isqrt(5).forward_on_gpu(&x, kernel).unwrap_err();
        assert!(error.to_string().contains("capability 9.0"), "{error}");
    }
}

#[test]
fn launches_are_recorded_and_replayed() {
    use isqrt_linalg::Replayed;
    let Some(gpu) = gpu() else { return };
    let shape = (2, 6, 9);
    for (kernel, pool) in [
        (GpuKernel::Auto, CovPool::isqrt(5)),
        (GpuKernel::Tiles, CovPool::isqrt(4)),
        (GpuKernel::Tiles, CovPool::plain()),
        (
            GpuKernel::Tiles,
            CovPool::with_root(Root {
                pre_normalization: PreNormalization::Spectral,
                side: Side::Covariance,
                memory: Memory::Lean,
                ..Root::default()
            }),
        ),
    ] {
        let replayed = Replayed::new(&pool, shape, kernel, &gpu).unwrap();
        // Twice, with other features: nothing of the first pass is left.
        for factor in [1.0, -3.0] {
            let x = (features(shape, DType::F32) * factor).unwrap();
            let known = run_as(&pool, &x, &gpu, kernel);
            let found = run_by(&x, &gpu, |x| replayed.forward(x).unwrap());
            assert_eq!(distance(&found.0, &known.0), 0.0, "{pool:?}");
            assert_eq!(distance(&found.1, &known.1), 0.0, "{pool:?}");
        }
    }
    let pool = CovPool::isqrt(5);
    let replayed = Replayed::new(&pool, shape, GpuKernel::Auto, &gpu).unwrap();
    // One launch a pass.
    let launches = |pool: &dyn Fn(&Tensor) -> Tensor| {
        let before = isqrt_device::cuda::launches();
        run_by(&features(shape, DType::F32), &gpu, pool);
        isqrt_device::cuda::launches() - before
    };
    assert_eq!(launches(&|x| replayed.forward(x).unwrap()), 2);
    for (kernel, most) in [(GpuKernel::Fused, 18), (GpuKernel::Tiles, 37)] {
        let counted = launches(&|x| pool.forward_on_gpu(x, kernel).unwrap());
        eprintln!("{kernel:?}: {counted} launches");
        assert!((3..=most).contains(&counted), "{kernel:?}: {counted}");
    }
    let x = Var::from_tensor(&features(shape, DType::F32).to_device(&gpu).unwrap()).unwrap();
    let first = replayed.forward(x.as_tensor()).unwrap();
    let second = replayed.forward(x.as_tensor()).unwrap();
    assert!(second.backward().is_ok());
    let error = first.backward().unwrap_err().to_string();
    assert!(error.contains("forward again"), "{error}");
    let other = features((2, 6, 8), DType::F32).to_device(&gpu).unwrap();
    assert!(replayed.forward(&other).is_err());
    assert!(replayed.forward(&features(shape, DType::F32)).is_err());
    let cublas = GpuKernel::Cublas(Precision::Full);
    assert!(Replayed::new(&pool, shape, cublas, &gpu).is_err());
    assert!(Replayed::new(&pool, shape, GpuKernel::Auto, &Device::Cpu).is_err());
}

#[test]
fn our_algebra_by_cublas_has_every_option() {
    let Some(gpu) = gpu() else { return };
    let kernel = GpuKernel::Cublas(Precision::Full);
    let mut worst = (0.0_f64, 0.0_f64);
    for (at, pool) in every_pool().into_iter().enumerate() {
        // One of two shapes each, for time.
        let shape = [(2, 6, 9), (1, 9, 5)][at.count_ones() as usize % 2];
        let x = features(shape, DType::F64);
        let known = run(&pool, &x, &Device::Cpu);
        let found = run_as(&pool, &x, &gpu, kernel);
        let apart = distance(&found.0, &known.0).max(distance(&found.1, &known.1));
        assert!(apart < 1e-11, "{pool:?} {shape:?}: {apart:e}");
        worst.0 = worst.0.max(apart);
        let x = x.to_dtype(DType::F32).unwrap();
        let known = run(&pool, &x, &Device::Cpu);
        let found = run_as(&pool, &x, &gpu, kernel);
        let apart = distance(&found.0, &known.0).max(distance(&found.1, &known.1));
        assert!(apart < 2e-3, "{pool:?} {shape:?}: {apart:e}");
        worst.1 = worst.1.max(apart);
    }
    eprintln!(
        "largest difference: f64 {:.1e}, f32 {:.1e}",
        worst.0, worst.1
    );
}

#[test]
fn the_algorithm_of_the_authors_gives_the_same() {
    let Some(gpu) = gpu() else { return };
    let kernel = GpuKernel::Reference(Precision::Full);
    for iterations in [1, 2, 3, 5] {
        for output in [Output::Triangle, Output::Full] {
            for shape in [(2, 6, 9), (1, 9, 5)] {
                let pool = CovPool {
                    output,
                    ..CovPool::isqrt(iterations)
                };
                let x = features(shape, DType::F64);
                let known = run(&pool, &x, &Device::Cpu);
                let found = run_as(&pool, &x, &gpu, kernel);
                let apart = distance(&found.0, &known.0).max(distance(&found.1, &known.1));
                assert!(apart < 1e-11, "{pool:?} {shape:?}: {apart:e}");
            }
        }
    }
    let plain = CovPool::plain();
    let x = features((2, 6, 9), DType::F64);
    let known = run(&plain, &x, &Device::Cpu);
    let found = run_as(&plain, &x, &gpu, kernel);
    assert!(distance(&found.0, &known.0).max(distance(&found.1, &known.1)) < 1e-12);
    let other = CovPool::with_root(Root {
        pre_normalization: PreNormalization::Frobenius,
        ..Root::default()
    });
    let on_gpu = x.to_device(&gpu).unwrap();
    let error = other.forward_on_gpu(&on_gpu, kernel).unwrap_err();
    assert!(error.to_string().contains("takes Newton-Schulz"), "{error}");
    assert!(plain.forward_on_gpu(&x, kernel).is_err());
}

#[test]
fn tf32_costs_three_digits() {
    let Some(gpu) = gpu() else { return };
    let pool = CovPool::with_root(Root {
        side: Side::Covariance,
        ..Root::default()
    });
    let x = features((1, 64, 96), DType::F64);
    let known = run(&pool, &x, &Device::Cpu);
    let x = x.to_dtype(DType::F32).unwrap();
    let apart = |kernel| {
        let found = run_as(&pool, &x, &gpu, kernel);
        (distance(&found.0, &known.0), distance(&found.1, &known.1))
    };
    let ours = apart(GpuKernel::Tiles);
    for (name, by) in [
        ("ours", GpuKernel::Cublas as fn(Precision) -> GpuKernel),
        ("reference", GpuKernel::Reference),
    ] {
        let (full, fast) = (apart(by(Precision::Full)), apart(by(Precision::Tf32)));
        eprintln!(
            "{name} by cuBLAS: f32 {:.1e} {:.1e}, TF32 {:.1e} {:.1e}; our kernel {:.1e} {:.1e}",
            full.0, full.1, fast.0, fast.1, ours.0, ours.1
        );
        assert!(full.0 < 1e-4 && full.1 < 1e-3, "{name} {full:?}");
        assert!(fast.0 < 1e-2 && fast.1 < 1e-2, "{name} {fast:?}");
        assert!(fast.0 > 100.0 * full.0 && fast.1 > 100.0 * full.1, "{name}");
    }
}

#[test]
fn tensor_cores_lose_nothing_in_three_products() {
    let Some(gpu) = gpu() else { return };
    let (mut worst, mut worst_once, mut plain) = (0.0_f64, f64::INFINITY, 0.0_f64);
    for side in [Side::Gram, Side::Covariance] {
        let pool = CovPool::with_root(Root {
            side,
            ..Root::default()
        });
        // Tiles of the edge, several tiles, several images, and sums over many positions.
        let long = [(1, 70, 784)]
            .into_iter()
            .filter(|_| side == Side::Covariance);
        for shape in [(2, 6, 9), (1, 100, 70), (2, 65, 130)]
            .into_iter()
            .chain(long)
        {
            let x = features(shape, DType::F64);
            let known = run(&pool, &x, &Device::Cpu);
            let x = x.to_dtype(DType::F32).unwrap();
            let apart = |kernel| {
                let found = run_as(&pool, &x, &gpu, kernel);
                distance(&found.0, &known.0).max(distance(&found.1, &known.1))
            };
            worst = worst.max(apart(GpuKernel::TensorCores(Tf32::Thrice)));
            worst_once = worst_once.min(apart(GpuKernel::TensorCores(Tf32::Once)));
            plain = plain.max(apart(GpuKernel::Tiles));
        }
    }
    eprintln!("three products {worst:.1e}, one at least {worst_once:.1e}, f32 {plain:.1e}");
    assert!(worst < 4.0 * plain, "{worst:e}, f32 {plain:e}");
    assert!(
        worst_once > 10.0 * worst,
        "{worst_once:e} rounds no operand"
    );
}

#[test]
fn bf16_features_are_computed_with_in_f32() {
    let Some(gpu) = gpu() else { return };
    let sides = [Side::Gram, Side::Covariance];
    let mut pools: Vec<CovPool> = sides
        .map(|side| {
            CovPool::with_root(Root {
                side,
                ..Root::default()
            })
        })
        .into();
    pools.push(CovPool::plain());
    for pool in pools {
        // Few blocks, and more than two for each of the stand-in's multiprocessors.
        for shape in [(2, 70, 9), (2, 6, 70), (9, 60, 9), (9, 70, 9)] {
            let x = features(shape, DType::BF16);
            let rounded = x.to_dtype(DType::F32).unwrap();
            let (y, dx) = run(&pool, &x, &gpu);
            let (known, dx_known) = run(&pool, &rounded, &gpu);
            assert_eq!(distance(&y, &known), 0.0, "{pool:?}");
            // The same numbers, rounded to 8 bits.
            let dx_rounded = dx_known
                .to_dtype(DType::F32)
                .unwrap()
                .to_dtype(DType::BF16)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap();
            assert_eq!(distance(&dx, &dx_rounded), 0.0, "{pool:?}");
            // The baseline writes bf16 by a pass of its own.
            let (y, dx) = run_as(&pool, &x, &gpu, GpuKernel::Cublas(Precision::Full));
            assert!(distance(&y, &known) < 1e-4, "{pool:?}");
            assert!(distance(&dx, &dx_known) < 5e-3, "{pool:?}");
        }
    }
    let x = Var::from_tensor(&features((1, 4, 6), DType::BF16).to_device(&gpu).unwrap()).unwrap();
    let y = CovPool::isqrt(5).forward(x.as_tensor()).unwrap();
    assert_eq!(y.dtype(), DType::F32);
    let dx = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(dx.get(x.as_tensor()).unwrap().dtype(), DType::BF16);
    // The CPU has no bf16.
    let refused = CovPool::isqrt(5).forward(&features((1, 4, 6), DType::BF16));
    assert!(refused.unwrap_err().to_string().contains("f32 or f64"));
}

#[test]
fn constant_features_in_f64_have_a_mean_without_rounding() {
    let Some(gpu) = gpu() else { return };
    let x = Tensor::full(0.1_f64, (1, 5, 7), &Device::Cpu).unwrap();
    let (y, dx) = run(&CovPool::isqrt(5), &x, &gpu);
    let none = y.zeros_like().unwrap();
    assert_eq!(distance(&y, &none), 0.0);
    assert_eq!(distance(&dx, &dx.zeros_like().unwrap()), 0.0);
}

#[test]
fn extremes() {
    let Some(gpu) = gpu() else { return };
    let pool = CovPool::isqrt(5);
    // Constant features: zeros, and zero gradients. A single position is constant, too.
    for x in [
        Tensor::full(3.0_f32, (2, 5, 4), &Device::Cpu).unwrap(),
        features((2, 5, 1), DType::F32),
    ] {
        let (y, dx) = run(&pool, &x, &gpu);
        for t in [y, dx] {
            let most = t
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap();
            assert_eq!(most, 0.0);
        }
    }
    // Far from 1, where squares leave the range of f32.
    for scale in [1e-25, 1e25] {
        let x = (features((2, 6, 9), DType::F32) * scale).unwrap();
        let (y, dx) = run(&pool, &x, &Device::Cpu);
        let (on_gpu, dx_on_gpu) = run(&pool, &x, &gpu);
        assert!(distance(&on_gpu, &y) < 2e-4, "{scale}");
        assert!(distance(&dx_on_gpu, &dx) < 2e-4, "{scale}");
    }
    // Not a number: only the image that has it.
    let mut values = vec![0.5_f32; 2 * 4 * 6];
    for (i, v) in values.iter_mut().enumerate() {
        *v = (i * 5 % 11) as f32;
    }
    values[3] = f32::NAN;
    let x = Tensor::from_vec(values, (2, 4, 6), &gpu).unwrap();
    for kernel in [
        GpuKernel::Auto,
        GpuKernel::Tiles,
        GpuKernel::TensorCores(Tf32::Thrice),
        GpuKernel::TensorCores(Tf32::Once),
    ] {
        let y = pool.forward_on_gpu(&x, kernel).unwrap();
        let y = y.to_vec2::<f32>().unwrap();
        assert!(y[0].iter().any(|v| v.is_nan()), "{kernel}");
        assert!(y[1].iter().all(|v| v.is_finite()), "{kernel}");
    }
}

/// Output and gradient of a pooling of features in f64 and f32 on the CPU and the GPU, and how far they
/// are apart.
fn beside_the_cpu(
    name: &str,
    gpu: &Device,
    shape: (usize, usize, usize),
    (most64, most32): (f64, f64),
    pool: &dyn Fn(&Tensor) -> isqrt_linalg::Result<Tensor>,
) {
    let run = |dtype: DType, device: &Device| {
        let x = features(shape, dtype).to_device(device).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = pool(x.as_tensor()).unwrap();
        assert_eq!(y.dtype(), dtype);
        let weights: Vec<f64> = (0..y.elem_count())
            .map(|i| ((i * 7 % 13) as f64 - 6.0) / 6.0)
            .collect();
        let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu).unwrap();
        let weights = weights.to_dtype(dtype).unwrap().to_device(device).unwrap();
        let loss = (&y * &weights).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let home = |t: &Tensor| {
            let t = t.to_device(&Device::Cpu).unwrap();
            t.to_dtype(DType::F64).unwrap()
        };
        (home(&y), home(gradients.get(x.as_tensor()).unwrap()))
    };
    let known = run(DType::F64, &Device::Cpu);
    for (dtype, most) in [(DType::F64, most64), (DType::F32, most32)] {
        let found = run(dtype, gpu);
        let apart = (distance(&found.0, &known.0), distance(&found.1, &known.1));
        eprintln!(
            "{name} {shape:?} {dtype:?}: {:.1e} {:.1e}",
            apart.0, apart.1
        );
        assert!(
            apart.0.max(apart.1) < most,
            "{name} {shape:?} {dtype:?}: {apart:?}"
        );
    }
}

#[test]
fn functions_of_eigenvalues_are_computed_on_the_gpu() {
    use isqrt_linalg::Factorisations;
    use isqrt_linalg::bilinear::{ImprovedBilinear, NewtonOrSvd};
    use isqrt_linalg::eig::{DeepO2P, GaussianEmbedding, MpnCov, SvdPade};
    let Some(gpu) = gpu() else { return };
    // Of full rank, and with fewer positions than channels, where eigenvalues are zero.
    for shape in [(3, 6, 19), (2, 37, 40), (1, 9, 5)] {
        for output in [Output::Triangle, Output::Full] {
            for power in [0.5, 0.3, 1.0] {
                let pool = MpnCov { power, output };
                let name = format!("MPN-COV {power}");
                beside_the_cpu(&name, &gpu, shape, (1e-11, 1e-3), &|x| pool.forward(x));
            }
            let pool = DeepO2P {
                output,
                ..DeepO2P::default()
            };
            beside_the_cpu("DeepO2P", &gpu, shape, (1e-11, 1e-3), &|x| pool.forward(x));
            for beta in [1.0, 0.5, 0.0] {
                let pool = GaussianEmbedding {
                    beta,
                    output,
                    ..GaussianEmbedding::default()
                };
                let name = format!("Gaussian {beta}");
                beside_the_cpu(&name, &gpu, shape, (1e-11, 1e-3), &|x| pool.forward(x));
            }
            let pool = SvdPade { output };
            beside_the_cpu("SVD-Pade", &gpu, shape, (1e-11, 1e-5), &|x| pool.forward(x));
        }
        let pool = ImprovedBilinear {
            root: NewtonOrSvd::Svd,
            ..ImprovedBilinear::default()
        };
        beside_the_cpu("Improved", &gpu, shape, (1e-8, 5e-2), &|x| pool.forward(x));
    }
    let before = Factorisations::so_far().eig;
    let x = features((4, 3, 7), DType::F32).to_device(&gpu).unwrap();
    MpnCov::default().forward(&x).unwrap();
    assert!(Factorisations::so_far().eig >= before + 4);
    // Constant features: zeros, and zero gradients.
    let x = Tensor::full(3.0_f32, (2, 5, 4), &gpu).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let y = MpnCov::default().forward(x.as_tensor()).unwrap();
    let dx = y.sum_all().unwrap().backward().unwrap();
    for t in [&y, dx.get(x.as_tensor()).unwrap()] {
        let t = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(t.iter().all(|&v| v == 0.0));
    }
    // The image that is not finite is named.
    let mut values = vec![0.5_f32; 3 * 4 * 6];
    values[2 * 24 + 3] = f32::NAN;
    let x = Tensor::from_vec(values, (3, 4, 6), &gpu).unwrap();
    let error = MpnCov::default().forward(&x).unwrap_err().to_string();
    assert!(error.contains("batch element 2 is not finite"), "{error}");
}

#[test]
fn bare_decompositions_for_benchmarks() {
    use isqrt_linalg::bench::{DeviceDecomposition, decompose_on_device};
    let Some(gpu) = gpu() else { return };
    for (batch, n) in [(1, 5), (3, 20), (2, 40)] {
        let x = features((batch, n, n + 3), DType::F64);
        let a = x.matmul(&x.transpose(1, 2).unwrap().contiguous().unwrap());
        let a = a.unwrap();
        let known: Vec<f64> = (0..batch)
            .flat_map(|i| {
                let rows: Vec<f64> = a.get(i).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let matrix = isqrt_linalg::reference::from_row_major(n, n, &rows);
                isqrt_linalg::reference::eigen(&matrix).unwrap().0
            })
            .collect();
        let known = Tensor::from_vec(known, (batch, n), &Device::Cpu).unwrap();
        for how in DeviceDecomposition::ALL {
            for (dtype, most) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                let on_gpu = a.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
                let found = decompose_on_device(&on_gpu, how).unwrap();
                let found = found.to_device(&Device::Cpu).unwrap();
                let mut found = found.to_dtype(DType::F64).unwrap();
                if matches!(how, DeviceDecomposition::Singular(_)) {
                    found = found.flip(&[1]).unwrap();
                }
                let apart = distance(&found, &known);
                assert!(apart < most, "{how:?} {batch} {n} {dtype:?}: {apart:e}");
            }
        }
    }
    let square = Tensor::zeros((1, 2, 3), DType::F32, &gpu).unwrap();
    let how = DeviceDecomposition::ALL[0];
    assert!(decompose_on_device(&square, how).is_err());
}

#[test]
fn benchmarks_run_every_implementation() {
    use isqrt_linalg::bench::{LayerCase, device_decompositions, layer_on_device};
    use std::time::Duration;
    let Some(gpu) = gpu() else { return };
    let case = LayerCase {
        pool: CovPool::isqrt(2),
        batch: 1,
        d: 5,
        positions: 7,
    };
    let rows = layer_on_device(&case, &gpu, Duration::ZERO).unwrap();
    let clusters = isqrt_device::found().gpus[0].capability >= (9, 0);
    assert_eq!(rows.len(), 11 + usize::from(clusters));
    for row in rows {
        let shares = [row.gflops, row.peak_share, row.bandwidth_share];
        let positive = |v: f64| v.is_finite() && v > 0.0;
        assert!(shares.into_iter().all(positive), "{row:?}");
        assert!(
            positive(row.forward_ms) && positive(row.backward_ms),
            "{row:?}"
        );
    }
    assert!(layer_on_device(&case, &Device::Cpu, Duration::ZERO).is_err());
    let rows = device_decompositions(&gpu, 6, &[1, 2], Duration::ZERO).unwrap();
    assert_eq!(rows.len(), 12);
    assert!(rows.iter().all(|row| row.ms > 0.0));
}

#[test]
fn what_the_cpu_pools_goes_there_and_back() {
    let Some(gpu) = gpu() else { return };
    let x = features((2, 6, 9), DType::F64);
    let on_gpu = Var::from_tensor(&x.to_device(&gpu).unwrap()).unwrap();
    let on_cpu = Var::from_tensor(&x).unwrap();
    let pool = |x: &Var| {
        let y = isqrt_linalg::bilinear::ImprovedBilinear::default()
            .forward(x.as_tensor())
            .unwrap();
        let dx = y.sum_all().unwrap().backward().unwrap();
        let home = |t: &Tensor| t.to_device(&Device::Cpu).unwrap();
        (home(&y), home(dx.get(x.as_tensor()).unwrap()))
    };
    let ((y, dx), (there, dx_there)) = (pool(&on_cpu), pool(&on_gpu));
    assert_eq!(distance(&y, &there), 0.0);
    assert_eq!(distance(&dx, &dx_there), 0.0);
}

/// Measured at the first pass of a shape, and the same from then on.
#[test]
fn the_fastest_kernel_is_found_once() {
    let Some(gpu) = gpu() else { return };
    let fastest = GpuKernel::Fastest;
    for (dtype, limit) in [(DType::F64, 1e-11), (DType::F32, 1e-4)] {
        let (pool, x) = (CovPool::isqrt(3), features((2, 11, 7), dtype));
        let counted = |kernel| {
            let before = isqrt_device::cuda::launches();
            let found = run_as(&pool, &x, &gpu, kernel);
            (found, isqrt_device::cuda::launches() - before)
        };
        let (first, measuring) = counted(fastest);
        let (second, after) = counted(fastest);
        assert!(
            measuring > 5 * after && after > 0,
            "{measuring} launches, then {after}"
        );
        let known = run(&pool, &x, &Device::Cpu);
        for found in [&first, &second] {
            assert!(distance(&found.0, &known.0) < limit);
            assert!(distance(&found.1, &known.1) < limit);
        }
        // No gradient to come: another case.
        let still = x.to_device(&gpu).unwrap();
        let y = pool.forward_on_gpu(&still, fastest).unwrap();
        let y = y.to_device(&Device::Cpu).unwrap();
        assert!(distance(&y.to_dtype(DType::F64).unwrap(), &known.0) < limit);
    }
    let none = features((2, 0, 7), DType::F32).to_device(&gpu).unwrap();
    assert!(CovPool::isqrt(3).forward_on_gpu(&none, fastest).is_err());
}
