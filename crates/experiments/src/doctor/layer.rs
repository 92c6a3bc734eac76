//! The covariance layer.

use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::{
    CovPool, GpuKernel, Memory, Output, PreNormalization, Precision, Root, Schedule, Side, Tf32,
};
use isqrt_testkit::{Gradcheck, gradcheck};
use isqrt_train::counted;

use super::{Checks, Error, Findings, Outcome, distance, features, home, noise, place, within};

pub(super) fn check(checks: &mut Checks<'_, '_>) {
    let device = checks.device;
    for (dtype, limit) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
        for side in [Side::Gram, Side::Covariance] {
            let check = format!(
                "layer, {} side, {}, beside the CPU in f64",
                side_name(side),
                dtype.as_str()
            );
            checks.add(check, || beside_the_cpu(device, dtype, side, limit));
        }
    }
    for side in [Side::Gram, Side::Covariance] {
        let check = format!(
            "layer, {} side, gradient beside differences",
            side_name(side)
        );
        checks.add(check, || differences(device, side));
    }
    checks.add("layer, root of a multiple, f64", || multiples(device));
    checks.add("layer, squares to the covariance, f64", || squares(device));
    checks.add("layer, symmetric, and no negative form, f64", || {
        definite(device)
    });
    checks.add("layer, positions in another order, f64", || {
        permuted(device)
    });
    checks.add("layer, an image alone and in a batch, f64", || {
        alone(device)
    });
    checks.add("layer, one side and the other, f64", || sides(device));
    checks.add("layer, constant features", || constant(device));
    checks.add("layer, features of 1e-25 and 1e25, f32", || far(device));
    checks.add("layer, few positions, channels and outliers, f32", || {
        odd(device)
    });
    if device.is_cuda() {
        checks.add("layer, features in bf16", || in_bf16(device));
        for kernel in GpuKernel::ALL {
            if runs(kernel, device) {
                let check = format!("layer by {kernel}, beside the CPU in f64");
                checks.add(check, || by_kernel(device, kernel));
            }
        }
    }
}

/// Whether this GPU has the kernel.
fn runs(kernel: GpuKernel, device: &Device) -> bool {
    let capable = |gpu: isqrt_device::Gpu| gpu.capability >= (9, 0);
    kernel != GpuKernel::Cluster || isqrt_device::gpu_of(device).is_some_and(capable)
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Gram => "Gram",
        Side::Covariance => "covariance",
        Side::Auto => "either",
    }
}

/// An upstream gradient that differs from place to place, and from an image to the next but not to the one after.
fn upstream(shape: &[usize]) -> candle_core::Result<Tensor> {
    let len: usize = shape.iter().product();
    let image = shape.iter().skip(1).product::<usize>().max(1);
    let of = |i: usize| (i % image * 7 + i / image % 2 * 5) % 13;
    let weights = (0..len).map(|i| (of(i) as f64 - 6.0) / 6.0);
    Tensor::from_vec(weights.collect::<Vec<f64>>(), shape, &Device::Cpu)
}

/// Output and gradient.
type Both = (Vec<f64>, Vec<f64>);

fn run(pool: &CovPool, x: &Tensor, dtype: DType, device: &Device) -> Result<Both, Error> {
    run_by(x, dtype, device, |x| pool.forward(x))
}

fn run_by(
    x: &Tensor,
    dtype: DType,
    device: &Device,
    forward: impl Fn(&Tensor) -> isqrt_linalg::Result<Tensor>,
) -> Result<Both, Error> {
    let x = Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?)?;
    let y = forward(x.as_tensor())?;
    let loss = (&y * place(&upstream(y.dims())?, dtype, device)?)?.sum_all()?;
    let gradients = loss.backward()?;
    let dx = gradients.get(x.as_tensor()).ok_or("no gradient came out")?;
    Ok((home(&y)?, home(dx)?))
}

fn pool_of(
    iterations: usize,
    pre_normalization: PreNormalization,
    side: Side,
    (output, memory): (Output, Memory),
) -> CovPool {
    CovPool {
        output,
        ..CovPool::with_root(Root {
            schedule: Schedule::NewtonSchulz { iterations },
            pre_normalization,
            side,
            memory,
            ..Root::default()
        })
    }
}

fn beside_the_cpu(device: &Device, dtype: DType, side: Side, limit: f64) -> Outcome {
    let mut worst = 0.0_f64;
    for shape in [(3, 24, 10), (1, 70, 67)] {
        let x = features(shape)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
        for iterations in [1, 3, 5] {
            for pre_normalization in [
                PreNormalization::Trace,
                PreNormalization::Frobenius,
                PreNormalization::Spectral,
            ] {
                for (output, memory) in [
                    (Output::Triangle, Memory::Keep),
                    (Output::Full, Memory::Lean),
                ] {
                    let pool = pool_of(iterations, pre_normalization, side, (output, memory));
                    let (y, dx) = run(&pool, &x, DType::F64, &Device::Cpu)?;
                    let (ours, our_dx) = run(&pool, &x, dtype, device)?;
                    worst = worst.max(distance(&ours, &y)).max(distance(&our_dx, &dx));
                }
            }
        }
    }
    Ok(within(worst, limit))
}

/// A kernel with what it takes: the paper's layer, and one that is as far from it as the kernel has. Small matrices, such
/// as take several tiles, and so many of these that `tiles` has other kernels for them. Each twice, which must give
/// the same bits.
fn by_kernel(device: &Device, kernel: GpuKernel) -> Outcome {
    use GpuKernel::{Cluster, Cublas, Fastest, Fused, Reference, TensorCores};
    let dtypes: &[DType] = match kernel {
        Cluster | TensorCores(_) => &[DType::F32],
        // The large cases below are for f32 alone.
        _ => &[DType::F64, DType::F32],
    };
    let limit = match kernel {
        Cublas(Precision::Tf32) | Reference(Precision::Tf32) | TensorCores(Tf32::Once) => 2e-2,
        _ => 2e-4,
    };
    let keep = (Output::Triangle, Memory::Keep);
    let papers = pool_of(5, PreNormalization::Trace, Side::Covariance, keep);
    let lean = (Output::Full, Memory::Lean);
    let other = match kernel {
        Reference(_) => pool_of(3, PreNormalization::Trace, Side::Covariance, lean),
        _ => pool_of(3, PreNormalization::Spectral, Side::Gram, lean),
    };
    let short = pool_of(2, PreNormalization::Trace, Side::Covariance, keep);
    // `fused` takes no large ones, `fastest` is one of the others.
    let large = !matches!(kernel, Fused | Fastest);
    let many = busy(device).div_ceil(3);
    let mut cases = vec![((4, 24, 10), &papers), ((1, 70, 50), &other)];
    if large {
        cases.push(((1, 140, 8), &short));
    }
    let mut findings = Findings::default();
    for &dtype in dtypes {
        if dtype == DType::F32 && large {
            // Of 3 x 3 tiles of either size, and of 2 x 2 of the wider one.
            cases.extend([((many, 146, 8), &short), ((many, 130, 8), &short)]);
        }
        let mut worst = 0.0_f64;
        for &(shape, pool) in &cases {
            let (two, x) = repeated(shape, DType::F32)?;
            let (y, dx) = run(pool, &two, DType::F64, &Device::Cpu)?;
            let of = |x: &Tensor| pool.forward_on_gpu(x, kernel);
            let ours = run_by(&x, dtype, device, of)?;
            let again = run_by(&x, dtype, device, of)?;
            let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            if bits(&again.0) != bits(&ours.0) || bits(&again.1) != bits(&ours.1) {
                return Err(format!("features {:?} give other bits again", x.dims()).into());
            }
            worst = worst.max(farthest(&ours.0, &y)).max(farthest(&ours.1, &dx));
        }
        let limit = if dtype == DType::F64 { 1e-10 } else { limit };
        findings = findings.figure(dtype.as_str(), worst, limit);
    }
    Ok(findings)
}

/// Blocks that are more than two a multiprocessor.
fn busy(device: &Device) -> usize {
    isqrt_device::gpu_of(device).map_or(1, |gpu| 2 * gpu.multiprocessors as usize + 1)
}

/// Two images (or one), which the CPU computes with, and as many as there shall be, which are these again and again.
fn repeated(
    (batch, d, positions): (usize, usize, usize),
    dtype: DType,
) -> candle_core::Result<(Tensor, Tensor)> {
    let two = features((batch.min(2), d, positions))?.to_dtype(dtype)?;
    let all = two.repeat((batch.div_ceil(2), 1, 1))?;
    Ok((two, all))
}

/// The largest distance of one of the repeated images from what is known of two.
fn farthest(ours: &[f64], known: &[f64]) -> f64 {
    let images = ours.chunks(known.len());
    images.map(|ours| distance(ours, known)).fold(0.0, f64::max)
}

/// All partial derivatives, of several options.
fn differences(device: &Device, side: Side) -> Outcome {
    let mut count = 0;
    let x = noise(&[2, 4, 3], 0.2)?.to_device(device)?;
    for iterations in [1, 3, 5] {
        for (pre_normalization, output, memory) in [
            (PreNormalization::Trace, Output::Triangle, Memory::Keep),
            (PreNormalization::Frobenius, Output::Full, Memory::Lean),
            (PreNormalization::Spectral, Output::Triangle, Memory::Lean),
        ] {
            let pool = pool_of(iterations, pre_normalization, side, (output, memory));
            let of = |t: &[Tensor]| pool.forward(&t[0]).map_err(candle_core::Error::from);
            gradcheck(of, std::slice::from_ref(&x), Gradcheck::default())
                .map_err(|said| format!("N = {iterations}, {pre_normalization:?}: {said}"))?;
            count += 1;
        }
    }
    Ok(Findings::told(format!(
        "{} within 1e-7 of the largest value",
        counted(count, "gradient")
    )))
}

fn full(pool: CovPool) -> CovPool {
    CovPool {
        output: Output::Full,
        ..pool
    }
}

/// `C = Cᵀ` and `vᵀCv ≥ 0`.
fn definite(device: &Device) -> Outcome {
    let (n, pool) = (12, full(CovPool::isqrt(5)));
    let (root, _) = run(&pool, &features((1, n, 7))?, DType::F64, device)?;
    let most = root.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let mut worst = 0.0_f64;
    for (i, row) in root.chunks(n).enumerate() {
        for (j, value) in row.iter().enumerate() {
            worst = worst.max((value - root[j * n + i]).abs() / most);
        }
    }
    for k in 0..40 {
        let v = home(&noise(&[n], 0.173 * k as f64)?)?;
        let rows = root.chunks(n).zip(&v);
        let form: f64 = rows
            .map(|(row, a)| a * row.iter().zip(&v).map(|(c, b)| c * b).sum::<f64>())
            .sum();
        worst = worst.max(-form / most);
    }
    Ok(within(worst, 1e-12))
}

fn permuted(device: &Device) -> Outcome {
    let (x, positions) = (features((2, 9, 14))?, 14_u32);
    let order: Vec<u32> = (0..positions).map(|i| i * 5 % positions).collect();
    let order = Tensor::from_vec(order, positions as usize, &Device::Cpu)?;
    let pool = CovPool::isqrt(5);
    let (y, _) = run(&pool, &x, DType::F64, device)?;
    let (other, _) = run(&pool, &x.index_select(&order, 2)?, DType::F64, device)?;
    Ok(within(distance(&other, &y), 1e-12))
}

fn alone(device: &Device) -> Outcome {
    let (x, pool) = (features((5, 9, 14))?, CovPool::isqrt(5));
    let (all, _) = run(&pool, &x, DType::F64, device)?;
    let mut one_by_one = vec![];
    for image in 0..5 {
        one_by_one.extend(run(&pool, &x.narrow(0, image, 1)?, DType::F64, device)?.0);
    }
    Ok(within(distance(&all, &one_by_one), 1e-13))
}

fn sides(device: &Device) -> Outcome {
    let x = features((2, 9, 6))?;
    let of = |side| {
        let root = Root {
            side,
            ..Root::default()
        };
        run(&CovPool::with_root(root), &x, DType::F64, device)
    };
    let ((y, dx), (other, other_dx)) = (of(Side::Gram)?, of(Side::Covariance)?);
    Ok(within(
        distance(&y, &other).max(distance(&dx, &other_dx)),
        1e-11,
    ))
}

/// One position, one channel, fewer positions than channels, a value that dwarfs the others.
fn odd(device: &Device) -> Outcome {
    let mut outlier = home(&features((1, 6, 8))?)?;
    outlier[11] = 1e6;
    let outlier = Tensor::from_vec(outlier, (1, 6, 8), &Device::Cpu)?;
    let mut worst = 0.0_f64;
    for x in [
        features((2, 5, 1))?,
        features((3, 1, 9))?,
        features((1, 1, 1))?,
        features((1, 40, 2))?,
        outlier,
    ] {
        let x = x.to_dtype(DType::F32)?;
        let (y, dx) = run(&CovPool::isqrt(5), &x, DType::F64, &Device::Cpu)?;
        let (ours, our_dx) = run(&CovPool::isqrt(5), &x, DType::F32, device)?;
        worst = worst.max(distance(&ours, &y)).max(distance(&our_dx, &dx));
    }
    Ok(within(worst, 5e-4))
}

/// Computed with in f32; the gradient is rounded to bf16.
fn in_bf16(device: &Device) -> Outcome {
    let keep = (Output::Triangle, Memory::Keep);
    let pool = pool_of(3, PreNormalization::Trace, Side::Covariance, keep);
    let (mut output, mut gradient) = (0.0_f64, 0.0_f64);
    let many = busy(device);
    for shape in [(2, 24, 10), (1, 70, 10), (many, 60, 10), (many, 70, 10)] {
        let (two, x) = repeated(shape, DType::BF16)?;
        let two = two.to_dtype(DType::F64)?;
        let (y, dx) = run(&pool, &two, DType::F64, &Device::Cpu)?;
        let leaf = Var::from_tensor(&x.to_device(device)?)?;
        // Not the kernel for small matrices.
        let found = pool.forward_on_gpu(leaf.as_tensor(), GpuKernel::Tiles)?;
        let weights = place(&upstream(found.dims())?, DType::F32, device)?;
        let gradients = (&found * weights)?.sum_all()?.backward()?;
        let dx_found = gradients.get(&leaf).ok_or("no gradient came out")?;
        output = output.max(farthest(&home(&found)?, &y));
        gradient = gradient.max(farthest(&home(dx_found)?, &dx));
    }
    let findings = Findings::default().figure("output", output, 2e-4);
    Ok(findings.figure("gradient", gradient, 5e-3))
}

/// `C(4 X) = 4 C(X)` with post-compensation.
fn multiples(device: &Device) -> Outcome {
    let (pool, x) = (CovPool::isqrt(5), features((2, 9, 14))?);
    let (y, _) = run(&pool, &x, DType::F64, device)?;
    let (four, _) = run(&pool, &(&x * 4.0)?, DType::F64, device)?;
    let y: Vec<f64> = y.iter().map(|y| 4.0 * y).collect();
    Ok(within(distance(&four, &y), 1e-13))
}

/// After many steps `C² = Σ`, for a covariance of full rank.
fn squares(device: &Device) -> Outcome {
    let x = features((1, 5, 40))?;
    let (root, _) = run(&full(CovPool::isqrt(14)), &x, DType::F64, device)?;
    let (covariance, _) = run(&full(CovPool::plain()), &x, DType::F64, device)?;
    let root = Tensor::from_vec(root, (5, 5), &Device::Cpu)?;
    Ok(within(
        distance(&home(&root.matmul(&root)?)?, &covariance),
        1e-10,
    ))
}

fn constant(device: &Device) -> Outcome {
    let x = Tensor::full(3.0_f64, (2, 5, 7), &Device::Cpu)?;
    let (y, dx) = run(&CovPool::isqrt(5), &x, DType::F32, device)?;
    let most = |values: &[f64]| distance(values, &vec![0.0; values.len()]);
    let findings = Findings::default().figure("largest value", most(&y), 0.0);
    Ok(findings.figure("of the gradient", most(&dx), 0.0))
}

fn far(device: &Device) -> Outcome {
    let mut worst = 0.0_f64;
    for scale in [1e-25, 1e25] {
        let x = (features((2, 8, 12))? * scale)?.to_dtype(DType::F32)?;
        let (y, dx) = run(&CovPool::isqrt(5), &x, DType::F64, &Device::Cpu)?;
        let (ours, our_dx) = run(&CovPool::isqrt(5), &x, DType::F32, device)?;
        worst = worst.max(distance(&ours, &y)).max(distance(&our_dx, &dx));
    }
    Ok(within(worst, 2e-4))
}
