//! The layer on a GPU beside the CPU: every option, forward and backward. Passed over where there is
//! no GPU; tools/cuda/check.sh runs it without one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_device::{Choice, Error};
use isqrt_linalg::{CovPool, Memory, Output, PreNormalization, Root, Schedule, Side};

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
    let x = Var::from_tensor(&x.to_device(device).unwrap()).unwrap();
    let y = pool.forward(x.as_tensor()).unwrap();
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
    let schedules = [
        Schedule::NewtonSchulz { iterations: 1 },
        Schedule::NewtonSchulz { iterations: 3 },
        Schedule::NewtonSchulz { iterations: 5 },
    ];
    let norms = [
        PreNormalization::Trace,
        PreNormalization::Frobenius,
        PreNormalization::Spectral,
    ];
    let mut pools = vec![CovPool::plain()];
    for schedule in schedules {
        for pre_normalization in norms {
            for side in [Side::Gram, Side::Covariance] {
                for post_compensation in [true, false] {
                    for memory in [Memory::Keep, Memory::Lean] {
                        pools.push(CovPool::with_root(Root {
                            schedule: schedule.clone(),
                            pre_normalization,
                            post_compensation,
                            side,
                            memory,
                        }));
                    }
                }
            }
        }
    }
    let (mut worst64, mut worst32) = (0.0_f64, 0.0_f64);
    for pool in pools {
        for output in [Output::Triangle, Output::Full] {
            let pool = CovPool {
                output,
                ..pool.clone()
            };
            for shape in [(2, 6, 9), (1, 17, 5)] {
                for (dtype, most, worst) in [
                    (DType::F64, 1e-11, &mut worst64),
                    (DType::F32, 2e-4, &mut worst32),
                ] {
                    let x = features(shape, dtype);
                    let (y, dx) = run(&pool, &x, &Device::Cpu);
                    let (on_gpu, dx_on_gpu) = run(&pool, &x, &gpu);
                    let apart = distance(&on_gpu, &y).max(distance(&dx_on_gpu, &dx));
                    assert!(apart < most, "{pool:?} {shape:?} {dtype:?}: {apart:e}");
                    *worst = worst.max(apart);
                }
            }
        }
    }
    eprintln!("largest difference: f64 {worst64:.1e}, f32 {worst32:.1e}");
}

#[test]
fn matrices_of_several_tiles() {
    let Some(gpu) = gpu() else { return };
    for (shape, side) in [
        ((2, 130, 70), Side::Auto),
        ((1, 70, 131), Side::Auto),
        ((1, 65, 64), Side::Gram),
        ((1, 64, 129), Side::Covariance),
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
    let y = pool.forward(&x).unwrap().to_vec2::<f32>().unwrap();
    assert!(y[0].iter().any(|v| v.is_nan()));
    assert!(y[1].iter().all(|v| v.is_finite()));
}

#[test]
fn what_the_cpu_pools_goes_there_and_back() {
    let Some(gpu) = gpu() else { return };
    let x = features((2, 6, 9), DType::F64);
    let on_gpu = Var::from_tensor(&x.to_device(&gpu).unwrap()).unwrap();
    let on_cpu = Var::from_tensor(&x).unwrap();
    let pool = |x: &Var| {
        let y = isqrt_linalg::eig::MpnCov::default()
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
