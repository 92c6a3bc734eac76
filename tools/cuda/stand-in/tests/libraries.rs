//! cuBLAS, cuDNN and cuSOLVER against plain sums.

use cuda_stand_in::{blas, dnn, memory, solver};
use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(747796405).wrapping_add(1);
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Values in device memory; tests leave them allocated.
fn device<T: Copy>(values: &[T]) -> u64 {
    let address = memory::allocate(size_of_val(values).max(1), memory::Kind::Plain).unwrap();
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), address as *mut T, values.len()) };
    address
}

fn host<T: Copy>(address: u64, n: usize) -> Vec<T> {
    unsafe { std::slice::from_raw_parts(address as *const T, n) }.to_vec()
}

fn near(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((*g as f64 - e).abs() <= tolerance, "{i}: {g}, not {e}");
    }
}

fn scalar(v: &f32) -> *const c_void {
    v as *const f32 as *const c_void
}

fn blas_handle() -> *mut blas::Handle {
    let mut h = null_mut();
    assert_eq!(unsafe { blas::cublasCreate_v2(&mut h) }, 0);
    h
}

#[test]
fn gemm_in_all_four_forms() {
    let (m, n, k) = (7, 5, 9);
    let (alpha, beta) = (1.5f32, -0.5f32);
    let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
    let h = blas_handle();
    for (ta, tb) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (lda, ldb) = (if ta == 0 { m } else { k }, if tb == 0 { k } else { n });
        let at = |i: usize, d: usize| a[if ta == 0 { d * lda + i } else { i * lda + d }] as f64;
        let bt = |d: usize, j: usize| b[if tb == 0 { j * ldb + d } else { d * ldb + j }] as f64;
        let expected: Vec<f64> = (0..m * n)
            .map(|at_c| {
                let (i, j) = (at_c % m, at_c / m);
                let sum: f64 = (0..k).map(|d| at(i, d) * bt(d, j)).sum();
                alpha as f64 * sum + beta as f64 * c[at_c] as f64
            })
            .collect();
        let (da, db, dc) = (device(&a), device(&b), device(&c));
        let size = |v: usize| v as c_int;
        let e = unsafe {
            blas::cublasSgemm_v2(
                h,
                ta,
                tb,
                size(m),
                size(n),
                size(k),
                &alpha,
                da,
                size(lda),
                db,
                size(ldb),
                &beta,
                dc,
                size(m),
            )
        };
        assert_eq!(e, 0);
        near(&host(dc, m * n), &expected, 1e-5);
    }
}

#[test]
fn tf32_gemm_is_less_exact_and_reads_no_nan_with_beta_0() {
    let n = 32usize;
    let (a, b) = (numbers(n * n, 4), numbers(n * n, 5));
    let (da, db) = (device(&a), device(&b));
    let h = blas_handle();
    let (one, zero) = (1f32, 0f32);
    let run = |kind: c_int| {
        let dc = device(&vec![f32::NAN; n * n]);
        let s = n as c_int;
        let e = unsafe {
            blas::cublasGemmEx(
                h,
                0,
                0,
                s,
                s,
                s,
                scalar(&one),
                da,
                0,
                s,
                db,
                0,
                s,
                scalar(&zero),
                dc,
                0,
                s,
                kind,
                -1,
            )
        };
        assert_eq!(e, 0);
        host::<f32>(dc, n * n)
    };
    let (whole, cut) = (run(68), run(77));
    let worst = whole
        .iter()
        .zip(&cut)
        .map(|(x, y)| (x - y).abs())
        .fold(0f32, f32::max);
    assert!(worst > 1e-5 && worst < 1e-2, "{worst}");
}

#[test]
fn syrk_touches_one_triangle() {
    let (n, k) = (6, 4);
    let a = numbers(n * k, 6);
    let (da, dc) = (device(&a), device(&vec![7f32; n * n]));
    let (one, zero) = (1f32, 0f32);
    let (sn, sk) = (n as c_int, k as c_int);
    let e =
        unsafe { blas::cublasSsyrk_v2(blas_handle(), 1, 0, sn, sk, &one, da, sn, &zero, dc, sn) };
    assert_eq!(e, 0);
    for (at, v) in host::<f32>(dc, n * n).into_iter().enumerate() {
        let (i, j) = (at % n, at / n);
        let sum: f32 = (0..k).map(|d| a[d * n + i] * a[d * n + j]).sum();
        let expected = if i <= j { sum } else { 7.0 };
        assert!(
            (v - expected).abs() < 1e-5,
            "({i}, {j}): {v}, not {expected}"
        );
    }
}

#[test]
fn a_triangular_system_is_solved() {
    let (m, n) = (5usize, 3usize);
    let h = blas_handle();
    for side in [0, 1] {
        for uplo in [0, 1] {
            for trans in [0, 1] {
                let size = if side == 0 { m } else { n };
                let mut a = numbers(size * size, 7);
                (0..size).for_each(|i| a[i * size + i] += 3.0);
                let b = numbers(m * n, 8);
                let (da, db) = (device(&a), device(&b));
                let one = 1f32;
                let e = unsafe {
                    blas::cublasStrsm_v2(
                        h,
                        side,
                        uplo,
                        trans,
                        0,
                        m as c_int,
                        n as c_int,
                        &one,
                        da,
                        size as c_int,
                        db,
                        m as c_int,
                    )
                };
                assert_eq!(e, 0);
                let x = host::<f32>(db, m * n);
                let entry = |i: usize, j: usize| {
                    let (i, j) = if trans == 1 { (j, i) } else { (i, j) };
                    let kept = if uplo == 0 { i >= j } else { i <= j };
                    if kept { a[j * size + i] } else { 0.0 }
                };
                for i in 0..m {
                    for j in 0..n {
                        let sum: f32 = if side == 0 {
                            (0..m).map(|d| entry(i, d) * x[j * m + d]).sum()
                        } else {
                            (0..n).map(|d| x[d * m + i] * entry(d, j)).sum()
                        };
                        assert!((sum - b[j * m + i]).abs() < 1e-4);
                    }
                }
            }
        }
    }
}

struct Dnn(*mut dnn::Handle);

impl Dnn {
    fn new() -> Dnn {
        let mut h = null_mut();
        assert_eq!(unsafe { dnn::cudnnCreate(&mut h) }, 0);
        Dnn(h)
    }
}

fn tensor(format: c_int, [n, c, h, w]: [c_int; 4]) -> dnn::Tensor {
    let mut t = dnn::Tensor::default();
    assert_eq!(
        unsafe { dnn::cudnnSetTensor4dDescriptor(&mut t, format, 0, n, c, h, w) },
        0
    );
    t
}

fn filter(format: c_int, [k, c, h, w]: [c_int; 4]) -> dnn::Tensor {
    let mut t = dnn::Tensor::default();
    assert_eq!(
        unsafe { dnn::cudnnSetFilter4dDescriptor(&mut t, 0, format, k, c, h, w) },
        0
    );
    t
}

/// NCHW values in NHWC order.
fn last(v: &[f32], [n, c, h, w]: [usize; 4]) -> Vec<f32> {
    let at = |i: usize| {
        let (i, ch) = (i / c, i % c);
        let (i, x) = (i / w, i % w);
        let (b, y) = (i / h, i % h);
        v[((b * c + ch) * h + y) * w + x]
    };
    (0..n * c * h * w).map(at).collect()
}

#[test]
fn convolutions_forwards_and_backwards() {
    let (x_dims, w_dims) = ([2, 4, 7, 6], [6, 2, 3, 3]);
    let (pad, stride, dilation, groups) = (1usize, 2usize, 1usize, 2usize);
    let mut conv = dnn::Convolution::default();
    let (p, s, d) = (pad as c_int, stride as c_int, dilation as c_int);
    unsafe {
        dnn::cudnnSetConvolution2dDescriptor(&mut conv, p, p, s, s, d, d, 1, 0);
        dnn::cudnnSetConvolutionGroupCount(&mut conv, groups as c_int);
        // Without TF32, so that sums agree closely.
        dnn::cudnnSetConvolutionMathType(&mut conv, 3);
    }
    let (x, w) = (numbers(2 * 4 * 7 * 6, 1), numbers(6 * 2 * 9, 2));
    let y_dims = [2, 6, 4, 3];
    let mut expected = vec![0f64; 2 * 6 * 4 * 3];
    let dy = numbers(expected.len(), 3);
    let (mut dx, mut dw) = (vec![0f64; x.len()], vec![0f64; w.len()]);
    for n in 0..2 {
        for o in 0..6 {
            for (i, j) in (0..4).flat_map(|i| (0..3).map(move |j| (i, j))) {
                let at_y = ((n * 6 + o) * 4 + i) * 3 + j;
                for (c, t) in (0..2).flat_map(|c| (0..9).map(move |t| (c, t))) {
                    let (a, b) = (i * stride + t / 3, j * stride + t % 3);
                    if a < pad || b < pad || a - pad >= 7 || b - pad >= 6 {
                        continue;
                    }
                    let channel = o / 3 * 2 + c;
                    let at_x = ((n * 4 + channel) * 7 + a - pad) * 6 + b - pad;
                    let at_w = (o * 2 + c) * 9 + t;
                    expected[at_y] += x[at_x] as f64 * w[at_w] as f64;
                    dx[at_x] += dy[at_y] as f64 * w[at_w] as f64;
                    dw[at_w] += dy[at_y] as f64 * x[at_x] as f64;
                }
            }
        }
    }
    let h = Dnn::new().0;
    let size = 1024;
    let space = device(&vec![0u8; size]);
    let (one, zero) = (1f32, 0f32);
    let (one, zero) = (scalar(&one), scalar(&zero));
    for format in [0, 1] {
        let order = |v: &[f32], dims: [c_int; 4]| {
            if format == 0 {
                v.to_vec()
            } else {
                last(v, dims.map(|d| d as usize))
            }
        };
        let (xt, wt, yt) = (
            tensor(format, x_dims),
            filter(format, w_dims),
            tensor(format, y_dims),
        );
        let (xp, wp, dyp) = (
            device(&order(&x, x_dims)),
            device(&order(&w, w_dims)),
            device(&order(&dy, y_dims)),
        );
        let (yp, dxp, dwp) = (
            device(&vec![f32::NAN; dy.len()]),
            device(&vec![f32::NAN; x.len()]),
            device(&vec![f32::NAN; w.len()]),
        );
        let same = |got: u64, expected: &[f64], dims: [c_int; 4]| {
            let narrow: Vec<f32> = expected.iter().map(|&v| v as f32).collect();
            let ordered: Vec<f64> = order(&narrow, dims).into_iter().map(|v| v as f64).collect();
            near(&host(got, expected.len()), &ordered, 1e-4);
        };
        unsafe {
            let e = dnn::cudnnConvolutionForward(
                h, one, &xt, xp, &wt, wp, &conv, 1, space, size, zero, &yt, yp,
            );
            assert_eq!(e, 0);
            same(yp, &expected, y_dims);
            let e = dnn::cudnnConvolutionBackwardData(
                h, one, &wt, wp, &yt, dyp, &conv, 1, space, size, zero, &xt, dxp,
            );
            assert_eq!(e, 0);
            same(dxp, &dx, x_dims);
            let e = dnn::cudnnConvolutionBackwardFilter(
                h, one, &xt, xp, &yt, dyp, &conv, 1, space, size, zero, &wt, dwp,
            );
            assert_eq!(e, 0);
            same(dwp, &dw, w_dims);
        }
    }
}

#[test]
fn batch_normalisation_and_its_gradient() {
    let (n, c, s) = (3usize, 4usize, 6usize);
    let x = numbers(n * c * s, 1);
    let (weight, bias) = (numbers(c, 2), numbers(c, 3));
    let dy = numbers(n * c * s, 4);
    let at = |i: usize, ch: usize, p: usize| (i * c + ch) * s + p;
    let members = |ch: usize| {
        (0..n)
            .flat_map(move |i| (0..s).map(move |p| at(i, ch, p)))
            .collect::<Vec<_>>()
    };
    let eps = 1e-5;
    // The loss is the sum of y * dy, so that its slope is what the backward pass gives.
    let forward = |x: &[f64]| {
        let mut y = vec![0f64; x.len()];
        for ch in 0..c {
            let all = members(ch);
            let m = all.len() as f64;
            let mean = all.iter().map(|&i| x[i]).sum::<f64>() / m;
            let variance = all.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / m;
            for &i in &all {
                y[i] =
                    weight[ch] as f64 * (x[i] - mean) / (variance + eps).sqrt() + bias[ch] as f64;
            }
        }
        y
    };
    let exact: Vec<f64> = x.iter().map(|&v| v as f64).collect();
    let dims = [n, c, 2, 3].map(|d| d as c_int);
    let t = tensor(0, dims);
    let mut params = dnn::Tensor::default();
    unsafe { dnn::cudnnDeriveBNTensorDescriptor(&mut params, &t, 1) };
    let h = Dnn::new().0;
    let (one, zero) = (1f32, 0f32);
    let (one, zero) = (scalar(&one), scalar(&zero));
    let (xp, yp, dyp) = (device(&x), device(&vec![f32::NAN; x.len()]), device(&dy));
    let (wp, bp) = (device(&weight), device(&bias));
    let (mean, variance) = (device(&vec![0f32; c]), device(&vec![1f32; c]));
    let blank = || device(&vec![f32::NAN; c]);
    let (saved_mean, saved_inverse, dwp, dbp) = (blank(), blank(), blank(), blank());
    let dxp = device(&vec![f32::NAN; x.len()]);
    unsafe {
        let e = dnn::cudnnBatchNormalizationForwardTraining(
            h,
            1,
            one,
            zero,
            &t,
            xp,
            &t,
            yp,
            &params,
            wp,
            bp,
            0.1,
            mean,
            variance,
            eps,
            saved_mean,
            saved_inverse,
        );
        assert_eq!(e, 0);
        let e = dnn::cudnnBatchNormalizationBackward(
            h,
            1,
            one,
            zero,
            one,
            zero,
            &t,
            xp,
            &t,
            dyp,
            &t,
            dxp,
            &params,
            wp,
            dwp,
            dbp,
            eps,
            saved_mean,
            saved_inverse,
        );
        assert_eq!(e, 0);
    }
    near(&host(yp, x.len()), &forward(&exact), 1e-5);
    let m = (n * s) as f64;
    for ch in 0..c {
        let all = members(ch);
        let average = all.iter().map(|&i| exact[i]).sum::<f64>() / m;
        let unbiased = all
            .iter()
            .map(|&i| (exact[i] - average).powi(2))
            .sum::<f64>()
            / (m - 1.0);
        near(&host::<f32>(mean, c)[ch..=ch], &[0.1 * average], 1e-6);
        near(
            &host::<f32>(variance, c)[ch..=ch],
            &[0.9 + 0.1 * unbiased],
            1e-6,
        );
        let sum = all.iter().map(|&i| dy[i] as f64).sum();
        near(&host::<f32>(dbp, c)[ch..=ch], &[sum], 1e-5);
    }
    let loss = |x: &[f64]| {
        forward(x)
            .iter()
            .zip(&dy)
            .map(|(y, &d)| y * d as f64)
            .sum::<f64>()
    };
    let slopes: Vec<f64> = (0..x.len())
        .map(|i| {
            let (mut up, mut down) = (exact.clone(), exact.clone());
            up[i] += 1e-5;
            down[i] -= 1e-5;
            (loss(&up) - loss(&down)) / 2e-5
        })
        .collect();
    near(&host(dxp, x.len()), &slopes, 1e-4);
}

#[test]
fn fused_batch_normalisation_keeps_the_mask() {
    let dims = [2, 3, 2, 2];
    let n = 24;
    let (x, z, dy) = (numbers(n, 1), numbers(n, 2), numbers(n, 3));
    let t = tensor(1, dims);
    let mut params = dnn::Tensor::default();
    let mut relu = dnn::Activation::default();
    let h = Dnn::new().0;
    let (one, zero) = (1f32, 0f32);
    let (one, zero) = (scalar(&one), scalar(&zero));
    let mut reserve_size = 0;
    let blank = |n: usize| device(&vec![f32::NAN; n]);
    let (yp, dxp, dzp) = (blank(n), blank(n), blank(n));
    let (mean, inverse, dw, db) = (blank(3), blank(3), blank(3), blank(3));
    let (wp, bp) = (device(&[1f32; 3]), device(&[0.1f32; 3]));
    let (xp, zp, dyp) = (device(&x), device(&z), device(&dy));
    unsafe {
        dnn::cudnnDeriveBNTensorDescriptor(&mut params, &t, 2);
        dnn::cudnnSetActivationDescriptor(&mut relu, 1, 0, 0.0);
        dnn::cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
            h,
            2,
            2,
            &relu,
            &t,
            &mut reserve_size,
        );
        let reserve = device(&vec![0u8; reserve_size]);
        let e = dnn::cudnnBatchNormalizationForwardTrainingEx(
            h,
            2,
            2,
            one,
            zero,
            &t,
            xp,
            &t,
            zp,
            &t,
            yp,
            &params,
            wp,
            bp,
            1.0,
            0,
            0,
            1e-5,
            mean,
            inverse,
            &relu,
            0,
            0,
            reserve,
            reserve_size,
        );
        assert_eq!(e, 0);
        let e = dnn::cudnnBatchNormalizationBackwardEx(
            h,
            2,
            2,
            one,
            zero,
            one,
            zero,
            &t,
            xp,
            &t,
            yp,
            &t,
            dyp,
            &t,
            dzp,
            &t,
            dxp,
            &params,
            wp,
            bp,
            dw,
            db,
            1e-5,
            mean,
            inverse,
            &relu,
            0,
            0,
            reserve,
            reserve_size,
        );
        assert_eq!(e, 0);
    }
    let (mean, inverse) = (host::<f32>(mean, 3), host::<f32>(inverse, 3));
    let (y, dz) = (host::<f32>(yp, n), host::<f32>(dzp, n));
    for i in 0..n {
        let v = (x[i] - mean[i % 3]) * inverse[i % 3] + 0.1 + z[i];
        assert!((y[i] - v.max(0.0)).abs() < 1e-5);
        assert_eq!(dz[i], if v > 0.0 { dy[i] } else { 0.0 });
    }
    // In NCHW it does not exist.
    let mut size = 0;
    let t = tensor(0, dims);
    let e = unsafe {
        dnn::cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
            h,
            2,
            1,
            &t,
            null(),
            &t,
            &params,
            &relu,
            &mut size,
        )
    };
    assert_eq!(e, 3000);
}

#[test]
fn pooling_forwards_and_backwards() {
    let x = numbers(2 * 3 * 5 * 5, 1);
    let h = Dnn::new().0;
    let (one, zero) = (1f32, 0f32);
    let (one, zero) = (scalar(&one), scalar(&zero));
    for mode in [0, 1, 2, 3] {
        let mut p = dnn::Pooling::default();
        unsafe { dnn::cudnnSetPooling2dDescriptor(&mut p, mode, 0, 3, 3, 1, 1, 2, 2) };
        let (xt, yt) = (tensor(0, [2, 3, 5, 5]), tensor(0, [2, 3, 3, 3]));
        let dy = numbers(2 * 3 * 9, 2);
        let (xp, yp) = (device(&x), device(&vec![f32::NAN; dy.len()]));
        let (dyp, dxp) = (device(&dy), device(&vec![f32::NAN; x.len()]));
        unsafe {
            assert_eq!(
                dnn::cudnnPoolingForward(h, &p, one, &xt, xp, zero, &yt, yp),
                0
            );
            let e =
                dnn::cudnnPoolingBackward(h, &p, one, &yt, yp, &yt, dyp, &xt, xp, zero, &xt, dxp);
            assert_eq!(e, 0);
        }
        let (mut y, mut dx) = (Vec::new(), vec![0f64; x.len()]);
        for (at, d) in dy.iter().enumerate() {
            let (image, i, j) = (at / 9, at / 3 % 3, at % 3);
            let under: Vec<usize> = (0..9)
                .map(|t| (i * 2 + t / 3, j * 2 + t % 3))
                .filter(|&(a, b)| a > 0 && b > 0 && a <= 5 && b <= 5)
                .map(|(a, b)| image * 25 + (a - 1) * 5 + b - 1)
                .collect();
            if mode == 0 || mode == 3 {
                let best = under
                    .iter()
                    .copied()
                    .max_by(|&a, &b| x[a].total_cmp(&x[b]))
                    .unwrap();
                y.push(x[best] as f64);
                dx[best] += *d as f64;
            } else {
                let count = if mode == 1 { 9.0 } else { under.len() as f64 };
                y.push(under.iter().map(|&u| x[u] as f64).sum::<f64>() / count);
                under.iter().for_each(|&u| dx[u] += *d as f64 / count);
            }
        }
        near(&host(yp, y.len()), &y, 1e-6);
        near(&host(dxp, dx.len()), &dx, 1e-6);
    }
}

fn solver_handle() -> *mut solver::Handle {
    let mut h = null_mut();
    assert_eq!(unsafe { solver::cusolverDnCreate(&mut h) }, 0);
    h
}

#[test]
fn eigenvectors_of_a_batch() {
    let (n, count) = (6usize, 3usize);
    let mut a = numbers(n * n * count, 1);
    for m in a.chunks_mut(n * n) {
        for j in 0..n {
            for i in j + 1..n {
                // Only the lower triangle may be read.
                m[i * n + j] = f32::NAN;
            }
        }
    }
    let lower = |m: &[f32], i: usize, j: usize| m[if i >= j { j * n + i } else { i * n + j }];
    let (ap, wp) = (device(&a), device(&vec![f32::NAN; n * count]));
    let info = device(&vec![-1i32; count]);
    let mut params = null_mut();
    let h = solver_handle();
    let (mut size, mut host_size) = (0, 0);
    let s = n as i64;
    unsafe {
        solver::cusolverDnCreateParams(&mut params);
        solver::cusolverDnXsyevBatched_bufferSize(
            h,
            params,
            1,
            0,
            s,
            0,
            ap,
            s,
            0,
            wp,
            0,
            &mut size,
            &mut host_size,
            count as i64,
        );
        let work = device(&vec![0u8; size]);
        let e = solver::cusolverDnXsyevBatched(
            h,
            params,
            1,
            0,
            s,
            0,
            ap,
            s,
            0,
            wp,
            0,
            work,
            size,
            0,
            host_size,
            info,
            count as i64,
        );
        assert_eq!(e, 0);
    }
    assert_eq!(host::<i32>(info, count), vec![0; count]);
    let (vectors, values) = (host::<f32>(ap, a.len()), host::<f32>(wp, n * count));
    for b in 0..count {
        let (m, v) = (&a[b * n * n..][..n * n], &vectors[b * n * n..][..n * n]);
        assert!(values[b * n..][..n].is_sorted());
        for k in 0..n {
            for i in 0..n {
                let product: f32 = (0..n).map(|j| lower(m, i, j) * v[k * n + j]).sum();
                assert!((product - values[b * n + k] * v[k * n + i]).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn singular_values_put_the_matrix_together_again() {
    let (m, n) = (7usize, 4usize);
    let a = numbers(m * n, 2);
    let h = solver_handle();
    let blank = |n: usize| device(&vec![f32::NAN; n]);
    let (ap, sp, up, vp) = (device(&a), blank(n), blank(m * n), blank(n * n));
    let info = device(&[-1i32]);
    let mut params = null_mut();
    let mut size = 0;
    let (sm, sn) = (m as c_int, n as c_int);
    unsafe {
        solver::cusolverDnCreateGesvdjInfo(&mut params);
        solver::cusolverDnSgesvdj_bufferSize(
            h, 1, 1, sm, sn, ap, sm, sp, up, sm, vp, sn, &mut size, params,
        );
        let work = device(&vec![0f32; size as usize]);
        let e = solver::cusolverDnSgesvdj(
            h, 1, 1, sm, sn, ap, sm, sp, up, sm, vp, sn, work, size, info, params,
        );
        assert_eq!(e, 0);
    }
    let (s, u, v) = (
        host::<f32>(sp, n),
        host::<f32>(up, m * n),
        host::<f32>(vp, n * n),
    );
    assert!(s.is_sorted_by(|x, y| x >= y));
    for i in 0..m {
        for j in 0..n {
            let sum: f32 = (0..n).map(|k| u[k * m + i] * s[k] * v[k * n + j]).sum();
            assert!((sum - a[j * m + i]).abs() < 1e-5);
        }
    }
}
