//! The pooling methods beside the covariance layer: golden values made by PyTorch
//! (`tools/golden/heads.py`), finite differences, degenerate spectra, bad input.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::approximant::Approximant;
use isqrt_linalg::bilinear::{
    Bilinear, CompactBilinear, ImprovedBilinear, NewtonOrSvd, Projection, normalize,
};
use isqrt_linalg::eig::{DeepO2P, GaussianEmbedding, MpnCov, SvdPade};
use isqrt_linalg::golden::{self, Layer};
use isqrt_linalg::{Error, Output, Result};
use isqrt_testkit::{Golden, Gradcheck, assert_close, gradcheck, randn, uniform};

fn layer(f: impl Fn(&Tensor) -> Result<Tensor> + 'static) -> Layer {
    Box::new(f)
}

fn improved(root: NewtonOrSvd) -> ImprovedBilinear {
    ImprovedBilinear {
        root,
        ..ImprovedBilinear::default()
    }
}

fn gaussian(beta: f64, epsilon: f64) -> GaussianEmbedding {
    GaussianEmbedding {
        beta,
        epsilon,
        ..GaussianEmbedding::default()
    }
}

/// Output and gradient for this upstream gradient.
fn run(layer: &Layer, x: &Tensor, g: &Tensor) -> (Tensor, Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let y = layer(&x).unwrap();
    let loss = (&y * g).unwrap().sum_all().unwrap();
    let dx = loss.backward().unwrap().remove(&x).unwrap();
    (y, dx)
}

fn distance(found: &Tensor, known: &Tensor) -> f64 {
    let flat = |x: &Tensor| {
        let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        x.to_vec1::<f64>().unwrap()
    };
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (found, known) = (flat(found), flat(known));
    let difference: Vec<f64> = found.iter().zip(&known).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(&known)
}

#[test]
fn agrees_with_pytorch_in_both_precisions() {
    let golden = Golden::load("tests/golden/heads.safetensors").unwrap();
    let names: Vec<&str> = golden
        .names()
        .filter_map(|name| name.strip_suffix(".dx"))
        .collect();
    assert_eq!(names.len(), 29);
    for name in names {
        let tensor = |key: &str| golden[format!("{name}.{key}").as_str()].clone();
        let layer = golden::head(name, |key| Some(tensor(key))).unwrap();
        let (y, dx) = run(&layer, &tensor("x"), &tensor("g"));
        assert_eq!(y.dims(), tensor("y").dims(), "{name}");
        let errors = (distance(&y, &tensor("y")), distance(&dx, &tensor("dx")));
        assert!(errors.0 < 1e-12 && errors.1 < 1e-11, "{name}: {errors:?}");

        let single = |key: &str| tensor(key).to_dtype(DType::F32).unwrap();
        let (y, dx) = run(&layer, &single("x"), &single("g"));
        let errors = (distance(&y, &tensor("y")), distance(&dx, &tensor("dx")));
        assert!(errors.0 < 1e-5 && errors.1 < 1e-3, "{name}: {errors:?}");
    }
}

/// Those whose gradient is that of their output.
fn exact_layers() -> Vec<(&'static str, Layer)> {
    let full = Output::Full;
    let mpn = move |power| {
        let output = full;
        layer(move |x| MpnCov { power, output }.forward(x))
    };
    let o2p = DeepO2P {
        output: full,
        ..DeepO2P::default()
    };
    vec![
        ("mpn 0.5", mpn(0.5)),
        ("mpn 0.3", mpn(0.3)),
        ("o2p", layer(move |x| o2p.forward(x))),
        ("o2p triangle", layer(|x| DeepO2P::default().forward(x))),
        (
            "svd_pade",
            layer(|x| {
                SvdPade {
                    output: Output::Full,
                }
                .forward(x)
            }),
        ),
        ("g2denet", layer(|x| gaussian(1.0, 1e-3).forward(x))),
        ("g2denet 0.3", layer(|x| gaussian(0.3, 0.0).forward(x))),
        ("impbcnn", layer(|x| improved(NewtonOrSvd::Svd).forward(x))),
        ("bcnn", layer(|x| Bilinear.forward(x))),
    ]
}

fn check(name: &str, layer: &Layer, x: &Tensor) {
    let default = Gradcheck::default();
    // The signed root bends sharply near zero.
    let options = match name {
        "bcnn" | "impbcnn" | "newton" => Gradcheck {
            step: 1e-6,
            rtol: 1e-6,
            ..default
        },
        _ => default,
    };
    gradcheck(|x| Ok(layer(&x[0])?), std::slice::from_ref(x), options)
        .unwrap_or_else(|error| panic!("{name}, {:?}: {error}", x.dims()));
}

#[test]
fn finite_differences_confirm_the_exact_adjoints() {
    for shape in [(2, 3, 7), (1, 6, 4)] {
        let x = (randn(shape, 3, DType::F64).unwrap() + 0.3).unwrap();
        for (name, layer) in exact_layers() {
            check(name, &layer, &x);
        }
    }
    // The iterations and approximants where they have converged: a good condition and many steps.
    let noise = (randn((1, 4, 8), 4, DType::F64).unwrap() * 0.05).unwrap();
    let x = (hadamard(4, 8) + noise).unwrap();
    let newton = improved(NewtonOrSvd::Newton { iterations: 20 });
    // The signed root of the small entries is not smooth within a step; that of the large ones is.
    let shifted = (&x + 2.0).unwrap();
    check("newton", &layer(move |x| newton.forward(x)), &shifted);
    let (taylor, pade) = (Approximant::taylor(), Approximant::pade());
    for (pool, degree) in [(taylor, 30), (pade, 8)] {
        let pool = Approximant {
            degree,
            iterations: 20,
            ..pool
        };
        check("approximant", &layer(move |x| pool.forward(x)), &x);
    }
}

/// `d` orthogonal rows of signs with mean zero: all eigenvalues of the covariance are 1.
fn hadamard(d: usize, m: usize) -> Tensor {
    let sign = |i: usize, j: usize| {
        if (i & j).count_ones().is_multiple_of(2) {
            1.0
        } else {
            -1.0
        }
    };
    let values: Vec<f64> = (0..d * m).map(|at| sign(at / m + 1, at % m)).collect();
    Tensor::from_vec(values, (1, d, m), &Device::Cpu).unwrap()
}

/// All eigenvalues equal, equal up to the last bits, and some of them zero.
#[test]
fn repeated_eigenvalues_have_right_gradients() {
    let equal = hadamard(4, 8);
    let noise = randn((1, 4, 8), 6, DType::F64).unwrap();
    let nearly = (&equal + (noise * 1e-9).unwrap()).unwrap();
    // Each row twice: as many zero eigenvalues, and the others equal.
    let twice = Tensor::cat(&[&equal, &equal], 1).unwrap();
    for (name, layer) in exact_layers() {
        if name == "bcnn" || name == "impbcnn" {
            // Zeros off the diagonal: the signed root has no derivative there.
            continue;
        }
        check(name, &layer, &equal);
        check(name, &layer, &nearly);
    }
    // A zero eigenvalue becomes positive under a step, and the root has no derivative there; the
    // logarithm, and the root of a shifted one, have.
    for (name, layer) in exact_layers() {
        if name.starts_with("o2p") || name == "g2denet" {
            check(name, &layer, &twice);
        }
        let (y, dx) = run(&layer, &twice, &layer_gradient(&layer, &twice));
        for tensor in [y, dx] {
            let size = tensor.sqr().unwrap().sum_all().unwrap();
            let size = size.to_scalar::<f64>().unwrap();
            assert!(size.is_finite() && size < 1e9, "{name}: {size}");
        }
    }
}

fn layer_gradient(layer: &Layer, x: &Tensor) -> Tensor {
    randn(layer(x).unwrap().shape(), 8, DType::F64).unwrap()
}

fn all_layers(d: usize) -> Vec<(&'static str, Layer)> {
    let newton = ImprovedBilinear {
        epsilon: 0.0,
        ..ImprovedBilinear::default()
    };
    let signs = |shape: &[usize], seed| {
        let x = randn(shape, seed, DType::F64).unwrap();
        x.sign().unwrap()
    };
    let hashes = Tensor::from_vec((0..d).map(|i| i as f64).collect(), d, &Device::Cpu).unwrap();
    let sketch = CompactBilinear {
        projection: Projection::TensorSketch {
            hashes: [hashes.clone(), hashes],
            signs: [signs(&[d], 1), signs(&[d], 2)],
            dim: 11,
        },
    };
    let maclaurin = CompactBilinear {
        projection: Projection::RandomMaclaurin {
            signs: [signs(&[11, d], 3), signs(&[11, d], 4)],
        },
    };
    let mut all = exact_layers();
    all.extend([
        ("newton", layer(move |x| newton.forward(x))),
        ("mtp", layer(|x| Approximant::taylor().forward(x))),
        ("mpa", layer(|x| Approximant::pade().forward(x))),
        ("sketch", layer(move |x| sketch.forward(x))),
        ("maclaurin", layer(move |x| maclaurin.forward(x))),
    ]);
    all
}

#[test]
fn constant_and_zero_features_give_finite_values_and_gradients() {
    for dtype in [DType::F32, DType::F64] {
        for (value, positions) in [(0.0, 4), (0.7, 4), (0.7, 1), (1e-30, 3)] {
            let x = Tensor::full(value, (2, 5, positions), &Device::Cpu).unwrap();
            let x = x.to_dtype(dtype).unwrap();
            for (name, layer) in all_layers(5) {
                let g = layer_gradient(&layer, &x).to_dtype(dtype).unwrap();
                let (y, dx) = run(&layer, &x, &g);
                for (what, tensor) in [("output", &y), ("gradient", &dx)] {
                    let size = tensor.abs().unwrap().max_all().unwrap();
                    let size = size
                        .to_dtype(DType::F64)
                        .unwrap()
                        .to_scalar::<f64>()
                        .unwrap();
                    let told = format!("{name} {dtype:?} {value} {positions}: {what} {size}");
                    assert!(size.is_finite(), "{told}");
                    // The covariance does not see them.
                    if ["mpn", "mtp", "mpa"]
                        .iter()
                        .any(|head| name.starts_with(head))
                    {
                        assert_eq!(size, 0.0, "{told}");
                    }
                }
            }
        }
    }
}

/// Squares of features near both ends of f32, and squares that vanish in it.
#[test]
fn features_of_any_size_give_finite_values_and_gradients() {
    let x = randn((2, 5, 4), 11, DType::F32).unwrap();
    for scale in [1e-24, 1e-22, 1e-20, 1e-19, 1e-10, 1e10, 1e17] {
        let x = (&x * scale).unwrap();
        for (name, layer) in all_layers(5) {
            let g = layer_gradient(&layer, &x).to_dtype(DType::F32).unwrap();
            let (y, dx) = run(&layer, &x, &g);
            for (what, tensor) in [("output", y), ("gradient", dx)] {
                let size = tensor.abs().unwrap().max_all().unwrap();
                let size = size.to_scalar::<f32>().unwrap();
                assert!(size.is_finite(), "{name} {scale}: {what} {size}");
            }
        }
    }
}

#[test]
fn features_that_are_not_finite_are_named_by_their_batch_element() {
    for (name, layer) in all_layers(3) {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut values = vec![0.5; 4 * 3 * 2];
            values[2 * 6 + 1] = bad;
            values[3 * 6] = bad;
            let x = Tensor::from_vec(values, (4, 3, 2, 1), &Device::Cpu).unwrap();
            let message = layer(&x).unwrap_err().to_string();
            assert!(message.contains("batch element 2"), "{name}: {message}");
        }
        let x = Tensor::full(1e30f32, (1, 3, 2), &Device::Cpu).unwrap();
        let x = Tensor::cat(&[&x, &x.neg().unwrap()], 2).unwrap();
        // In double precision it fits.
        if name != "svd_pade" {
            let message = layer(&x).unwrap_err().to_string();
            assert!(message.contains("overflows"), "{name}: {message}");
        }
        let x = Var::from_tensor(&randn((2, 3, 4), 13, DType::F64).unwrap()).unwrap();
        let loss = (layer(&x).unwrap() * f64::NAN).unwrap().sum_all().unwrap();
        let message = loss.backward().unwrap_err().to_string();
        assert!(
            message.contains("the upstream gradient of batch element 0"),
            "{name}: {message}"
        );
        let shape = layer(&Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap());
        assert!(matches!(shape, Err(Error::Shape { .. })), "{name}");
        let dtype = layer(&Tensor::zeros((1, 3, 4), DType::F16, &Device::Cpu).unwrap());
        assert!(matches!(dtype, Err(Error::Dtype { .. })), "{name}");
    }
}

#[test]
fn options_out_of_range_are_named() {
    let x = Tensor::zeros((1, 3, 4), DType::F64, &Device::Cpu).unwrap();
    let o2p = |epsilon| {
        let pool = DeepO2P {
            epsilon,
            ..DeepO2P::default()
        };
        pool.forward(&x)
    };
    let newton = |iterations| improved(NewtonOrSvd::Newton { iterations }).forward(&x);
    let degree = |degree| {
        let pool = Approximant::taylor();
        Approximant { degree, ..pool }.forward(&x)
    };
    let hashes = |hash: f64| {
        let hashes = Tensor::full(hash, 3, &Device::Cpu).unwrap();
        let signs = Tensor::ones(3, DType::F64, &Device::Cpu).unwrap();
        let projection = Projection::TensorSketch {
            hashes: [hashes.clone(), hashes],
            signs: [signs.clone(), signs],
            dim: 8,
        };
        CompactBilinear { projection }.forward(&x)
    };
    let signs = Tensor::ones((8, 2), DType::F64, &Device::Cpu).unwrap();
    let projection = Projection::RandomMaclaurin {
        signs: [signs.clone(), signs],
    };
    for (result, part) in [
        (o2p(0.0), "epsilon = 0"),
        (o2p(f64::NAN), "epsilon = NaN"),
        (gaussian(-0.5, 0.0).forward(&x), "beta = -0.5"),
        (gaussian(1.0, f64::INFINITY).forward(&x), "epsilon = inf"),
        (newton(0), "iterations = 0"),
        (newton(21), "iterations = 21"),
        (degree(0), "degree = 0"),
        (degree(usize::MAX), "degree = 1844"),
        (hashes(8.0), "hashes = 8"),
        (hashes(-1.0), "hashes = -1"),
        (hashes(f64::NAN), "hashes = NaN"),
        (CompactBilinear { projection }.forward(&x), "signs = [8, 2]"),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
    }
    // Off by less than a half: the average of a network with itself.
    assert!(hashes(6.999_999).is_ok());
}

#[test]
fn normalization_is_that_of_pytorch_at_zero_and_right_elsewhere() {
    let x = Tensor::new(
        &[[0.0, 4.0, -9.0], [0.0, 0.0, 0.0], [1.0, -1e-9, 2.0]],
        &Device::Cpu,
    );
    let x = Var::from_tensor(&x.unwrap()).unwrap();
    let y = normalize(&x).unwrap();
    let values = y.to_vec2::<f64>().unwrap();
    assert_close!(
        values[0][1..].to_vec(),
        [2.0, -3.0]
            .iter()
            .map(|v| v / 13f64.sqrt())
            .collect::<Vec<_>>(),
        rtol = 1e-8
    );
    assert_eq!((values[0][0], &values[1]), (0.0, &vec![0.0; 3]));
    let dx = y.sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
    let dx = dx.to_vec2::<f64>().unwrap();
    assert_eq!((dx[0][0], &dx[1]), (0.0, &vec![0.0; 3]));
    assert!(dx[2].iter().all(|g| g.is_finite() && *g != 0.0));
    let x = (randn((3, 7), 9, DType::F64).unwrap().affine(1.0, 0.05)).unwrap();
    check("normalize", &layer(normalize), &x);
}

/// Where no two pairs of channels meet, a sketch is the outer product with its entries moved and
/// their signs changed, so inner products are kept.
#[test]
fn a_sketch_without_collisions_keeps_inner_products() {
    let (d, dim) = (6, 4096);
    let x = randn((2, d, 3), 10, DType::F64).unwrap();
    let hash = |seed| {
        uniform(d, 0.0, dim as f64, seed, DType::F64)
            .unwrap()
            .floor()
            .unwrap()
    };
    let sign = |seed| randn(d, seed, DType::F64).unwrap().sign().unwrap();
    let sketch = |signs: [Tensor; 2]| {
        let projection = Projection::TensorSketch {
            hashes: [hash(1), hash(2)],
            signs,
            dim,
        };
        CompactBilinear { projection }.forward(&x).unwrap()
    };
    // Of the first image by one map and the second by another.
    let product = |first: &Tensor, second: &Tensor| {
        let pair = first.narrow(0, 0, 1).unwrap() * second.narrow(0, 1, 1).unwrap();
        let sum = pair.unwrap().sum_all().unwrap();
        sum.to_scalar::<f64>().unwrap()
    };
    let exact = Bilinear.forward(&x).unwrap();
    let exact = product(&exact, &exact);
    let (one, other) = (sketch([sign(3), sign(4)]), sketch([sign(3), sign(5)]));
    // The outer product is a mean and the sketch a sum, beside which the 1e-8 under the root differs.
    assert!((product(&one, &one) - exact).abs() < 1e-6);
    assert!((product(&one, &other) - exact).abs() > 1e-2);
}

#[test]
fn views_four_dimensions_and_empty_batches_are_accepted() {
    let x = randn((2, 6, 5), 12, DType::F64).unwrap();
    for (name, layer) in all_layers(5) {
        let view = Var::from_tensor(&x).unwrap();
        let y = layer(&view.transpose(1, 2).unwrap()).unwrap();
        let g = layer_gradient(&layer, &x.transpose(1, 2).unwrap());
        let loss = (&y * &g).unwrap().sum_all().unwrap();
        let dx = loss.backward().unwrap().remove(&view).unwrap();
        let maps = x.transpose(1, 2).unwrap().contiguous().unwrap();
        let maps = maps.reshape((2, 5, 3, 2)).unwrap();
        let (known, known_dx) = run(&layer, &maps, &g);
        assert_close!(y, known, atol = 0.0);
        let known_dx = known_dx.flatten_from(2).unwrap().transpose(1, 2).unwrap();
        assert_close!(dx, known_dx, atol = 0.0);

        let none = layer(&maps.narrow(0, 0, 0).unwrap()).unwrap();
        assert_eq!((none.dims()[0], none.elem_count()), (0, 0), "{name}");
    }
}
