//! What the field looks at while a network trains: the spectrum of the covariance that enters the head, how
//! far the head's output is from the exact root, and the norms of gradients by stage. See
//! [`Diagnostics`](crate::Diagnostics).

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use isqrt_linalg::eig::MpnCov;
use isqrt_linalg::reference::{centred, eigen, from_row_major, product};
use isqrt_models::{Network, stage_of};
use isqrt_nn::{Mode, Vars, grad_squares};
use rayon::prelude::*;

use crate::{Error, Result};

/// Eigenvalues of the covariance of each image over its trace, in falling order: the mean over the batch.
/// A flat spectrum is `1/channels` throughout; one that falls to zero early has lost rank.
///
/// `features` are `(batch, channels, height, width)` of any float type and are computed with in f64.
/// The covariance is about the mean over the `M` positions; an image whose covariance vanishes counts as
/// zeros.
///
/// # Errors
/// [`Error::Config`] for another shape or an empty one; [`Error::Model`] with the first image whose
/// features are not finite, or whose eigendecomposition does not converge.
pub fn spectrum(features: &Tensor) -> Result<Vec<f64>> {
    let Features {
        images, channels, ..
    } = Features::new(features)?;
    let spectra = images
        .par_iter()
        .enumerate()
        .map(|(index, image)| Ok(Eigenvalues::new(image, channels, index)?.over_trace()));
    let spectra: Vec<Vec<f64>> = spectra.collect::<Result<_>>()?;
    let share = 1.0 / spectra.len() as f64;
    let mean = |k: usize| spectra.iter().map(|s| s[k]).sum::<f64>() * share;
    Ok((0..channels).map(mean).collect())
}

/// `‖C - √Σ‖ / ‖√Σ‖` in the Frobenius norm: the mean over the images. `C` is the head's output in evaluation,
/// the whole matrix (of a triangle, entries off the diagonal count twice), `√Σ` the exact root in f64 of the
/// covariance of the same features.
///
/// Of heads whose output [approximates the root](isqrt_models::Representation::approximates_root):
/// `isqrt` (with any schedule, normalisation and form of output, but not without post-compensation: its output is
/// the root of `Σ/s` then), `mpn` of power 1/2, `mtp`, `mpa`, `svd_pade`. None for all others: without
/// a root (`gap`, `flat`, `cov`, `dropcov`), with another function (`deepo2p`), of another matrix (`g2denet`),
/// or normalised afterwards (`bcnn`, `impbcnn`, `cbp`). Images whose covariance vanishes have no such distance
/// and are left out; none where all do.
///
/// `features` are `(batch, channels, height, width)` as [`Network::features`] gives them.
///
/// # Errors
/// As [`spectrum`], and [`Error::Model`] with the first image whose output is not finite.
pub fn root_distance(network: &Network, features: &Tensor) -> Result<Option<f64>> {
    if !network.approximates_root() {
        return Ok(None);
    }
    let Features { channels, .. } = Features::new(features)?;
    let plain = features.detach();
    let found = network.pool(&plain, Mode::Eval)?.detach();
    let found = found.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let exact = MpnCov::default()
        // On the CPU: a GPU would need cuSOLVER for this alone.
        .forward(&plain.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
        .map_err(isqrt_models::Error::from)?;
    let exact = exact.to_vec2::<f64>()?;
    let is_triangle = network.triangle().is_some();
    let mut distances = Vec::with_capacity(exact.len());
    for (index, (found, exact)) in found.iter().zip(&exact).enumerate() {
        if found.iter().any(|x| !x.is_finite()) {
            return Err(not_finite(index, "the representation"));
        }
        let (mut difference, mut norm) = (0.0, 0.0);
        let places = (0..channels).flat_map(|i| (i..channels).map(move |j| (i, j)));
        for ((i, j), root) in places.zip(exact) {
            let weight = if i == j { 1.0 } else { 2.0 };
            norm += weight * root * root;
            // The whole matrix has both halves, which may differ by rounding.
            let both = match is_triangle {
                true => [triangle_place(channels, i, j); 2],
                false => [i * channels + j, j * channels + i],
            };
            for place in both {
                difference += 0.5 * weight * (found[place] - root).powi(2);
            }
        }
        if norm > 0.0 {
            distances.push((difference / norm).sqrt());
        }
    }
    let count = distances.len() as f64;
    Ok((count > 0.0).then(|| distances.iter().sum::<f64>() / count))
}

/// Place of entry `(i, j)`, `i <= j`, in the upper triangle row by row.
fn triangle_place(side: usize, i: usize, j: usize) -> usize {
    i * side - i * (i + 1) / 2 + j
}

/// Norms of gradients by stage of the network: `backbone.layer1`, `backbone.features.3`, `representation`,
/// `classifier` (with its hidden layers). Sums in f64, the same for any number of threads; parameters
/// without a gradient count as nothing.
///
/// The norm of all together, without clipping, is [`isqrt_nn::grad_norm`].
///
/// # Errors
/// [`isqrt_nn::Error::NonFinite`] with the first parameter whose gradient is not finite.
pub fn stage_norms(vars: &Vars, gradients: &GradStore) -> Result<BTreeMap<String, f64>> {
    let mut norms = BTreeMap::new();
    for (name, squares) in grad_squares(vars, gradients)? {
        let stage = match name.split('.').next() {
            Some(alone @ ("classifier" | "representation")) => alone,
            _ => stage_of(name),
        };
        *norms.entry(stage.to_owned()).or_insert(0.0) += squares;
    }
    norms.values_mut().for_each(|norm| *norm = norm.sqrt());
    Ok(norms)
}

/// Feature maps in f64, image by image.
pub(crate) struct Features {
    pub(crate) images: Vec<Vec<f64>>,
    pub(crate) channels: usize,
}

impl Features {
    pub(crate) fn new(features: &Tensor) -> Result<Self> {
        let channels = match *features.dims() {
            [batch, channels, height, width] if batch * channels * height * width > 0 => channels,
            ref other => {
                return Err(Error::Config {
                    what: "shape of the features",
                    value: format!("{other:?}"),
                    expected: "(batch, channels, height, width), each at least 1".to_owned(),
                });
            }
        };
        let flat = features.detach().to_device(&Device::Cpu)?;
        let images = flat.to_dtype(DType::F64)?.flatten_from(1)?.to_vec2()?;
        Ok(Self { images, channels })
    }
}

/// Eigenvalues of one image's covariance.
pub(crate) struct Eigenvalues {
    /// In falling order, none below 0, as many as channels; of features whose largest is 1.
    values: Vec<f64>,
    /// What they have to be multiplied with.
    scale: f64,
}

impl Eigenvalues {
    /// Of features row by row, a channel a row; `index` is the place in the batch, for errors.
    pub(crate) fn new(features: &[f64], channels: usize, index: usize) -> Result<Self> {
        if features.iter().any(|x| !x.is_finite()) {
            return Err(not_finite(index, "a feature"));
        }
        let largest = features.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        if largest == 0.0 {
            return Ok(Self {
                values: vec![0.0; channels],
                scale: 0.0,
            });
        }
        // Squares of what is far from 1 leave the numbers at either end.
        let near_one: Vec<f64> = features.iter().map(|x| x / largest).collect();
        let positions = features.len() / channels.max(1);
        let z = centred(&from_row_major(channels, positions, &near_one));
        let transposed = z.transpose().to_owned();
        // Both products have the same eigenvalues above 0.
        let smaller = match channels <= positions {
            true => product(&z, &transposed),
            false => product(&transposed, &z),
        };
        let (mut values, _) = eigen(&smaller).ok_or_else(|| {
            Error::Model(isqrt_models::Error::Linalg(
                isqrt_linalg::Error::Decomposition {
                    index,
                    what: "eigendecomposition",
                },
            ))
        })?;
        values.reverse();
        values.resize(channels, 0.0);
        values.iter_mut().for_each(|v| *v = v.max(0.0));
        Ok(Self {
            values,
            scale: largest * largest,
        })
    }

    /// With the scale of the features.
    pub(crate) fn values(&self) -> impl Iterator<Item = f64> {
        self.values.iter().map(|v| v * self.scale)
    }

    /// Over their sum; zeros where it is 0.
    fn over_trace(self) -> Vec<f64> {
        let trace: f64 = self.values.iter().sum();
        match trace > 0.0 {
            true => self.values.iter().map(|v| v / trace).collect(),
            false => self.values,
        }
    }
}

fn not_finite(index: usize, what: &'static str) -> Error {
    Error::Model(isqrt_models::Error::Linalg(
        isqrt_linalg::Error::NonFinite { index, what },
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Var;
    use isqrt_linalg::reference::{exact, layer, row_major};
    use isqrt_models::{ModelSpec, REPRESENTATIONS, RepresentationSpec};
    use isqrt_nn::{Init, grad_norm};

    use super::*;

    /// Two channels at right angles, variances 4 and 1, means 10 and -5.
    fn diagonal(dtype: DType) -> Tensor {
        let values = [12.0, 8.0, 12.0, 8.0, -4.0, -4.0, -6.0, -6.0];
        let x = Tensor::from_slice(&values, (1, 2, 2, 2), &Device::Cpu).unwrap();
        x.to_dtype(dtype).unwrap()
    }

    fn random(shape: (usize, usize, usize, usize), seed: u64) -> Tensor {
        isqrt_testkit::randn(shape, seed, DType::F64).unwrap()
    }

    /// e10net makes 32 channels.
    fn network(head: RepresentationSpec, dtype: DType) -> Network {
        let spec = ModelSpec::new("e10net", head, 3);
        Network::new(&spec, 1, dtype, &Device::Cpu).unwrap()
    }

    fn head(name: &str) -> RepresentationSpec {
        RepresentationSpec::new(name)
    }

    #[test]
    fn spectrum_of_a_known_covariance_in_any_type_and_scale() {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            isqrt_testkit::assert_close!(
                spectrum(&diagonal(dtype)).unwrap(),
                [0.8, 0.2],
                atol = 1e-14
            );
        }
        for scale in [1e-200, 1e200] {
            let scaled = (diagonal(DType::F64) * scale).unwrap();
            isqrt_testkit::assert_close!(spectrum(&scaled).unwrap(), [0.8, 0.2], atol = 1e-13);
        }
        // The mean with an image that has no covariance.
        let constant = Tensor::full(3.0, (1, 2, 2, 2), &Device::Cpu).unwrap();
        let both = Tensor::cat(&[diagonal(DType::F64), constant], 0).unwrap();
        isqrt_testkit::assert_close!(spectrum(&both).unwrap(), [0.4, 0.1], atol = 1e-14);
    }

    #[test]
    fn fewer_positions_than_channels_leave_zeros() {
        let found = spectrum(&random((3, 9, 2, 2), 1)).unwrap();
        assert_eq!(found.len(), 9);
        assert!(found.is_sorted_by(|a, b| a >= b));
        assert!(found[2] > 1e-3 && found[3] < 1e-15, "{found:?}");
        isqrt_testkit::assert_close!(found.iter().sum::<f64>(), 1.0, rtol = 1e-14);
    }

    #[test]
    fn features_that_are_not_finite_are_named() {
        let mut values = vec![1.0_f32; 3 * 2 * 4];
        values[2 * 8 + 5] = f32::NAN;
        let x = Tensor::from_vec(values, (3, 2, 2, 2), &Device::Cpu).unwrap();
        let error = spectrum(&x).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a feature of batch element 2 is not finite"
        );
        assert!(error.is_divergence());
        let x = Tensor::zeros((2, 3, 0, 4), DType::F32, &Device::Cpu).unwrap();
        let message = spectrum(&x).unwrap_err().to_string();
        assert!(message.contains("[2, 3, 0, 4]"), "{message}");
    }

    #[test]
    fn exact_roots_are_at_distance_zero() {
        let x = random((2, 32, 7, 7), 1);
        for name in ["mpn", "svd_pade"] {
            let distance = root_distance(&network(head(name), DType::F64), &x).unwrap();
            assert!(distance.unwrap() < 1e-12, "{name}: {distance:?}");
        }
        let x = x.to_dtype(DType::F32).unwrap();
        let distance = root_distance(&network(head("mpn"), DType::F32), &x).unwrap();
        let distance = distance.unwrap();
        assert!(distance > 0.0 && distance < 1e-5, "{distance}");
    }

    #[test]
    fn distance_of_the_iteration_is_that_of_its_reference() {
        let x = random((3, 32, 5, 5), 2);
        let mut expected = 0.0;
        for image in x.flatten_from(1).unwrap().to_vec2::<f64>().unwrap() {
            let x = from_row_major(32, 25, &image);
            let upstream = from_row_major(32, 32, &[0.0; 32 * 32]);
            let (found, _) = layer(&isqrt_linalg::Root::default(), &x, &upstream).unwrap();
            let (root, _) = exact(&x, &upstream).unwrap();
            let (found, root) = (row_major(&found), row_major(&root));
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
            let difference = norm(&mut found.iter().zip(&root).map(|(a, b)| a - b));
            expected += difference / norm(&mut root.iter().copied()) / 3.0;
        }
        assert!(expected > 0.05, "{expected}");
        for output in ["triangle", "full"] {
            let network = network(head("isqrt").with("output", output), DType::F64);
            let found = root_distance(&network, &x).unwrap().unwrap();
            isqrt_testkit::assert_close!(found, expected, rtol = 1e-9);
        }
    }

    #[test]
    fn more_steps_come_closer() {
        let x = random((2, 32, 9, 9), 3);
        let distance = |head| {
            let network = network(head, DType::F64);
            root_distance(&network, &x).unwrap().unwrap()
        };
        let steps = [3, 5, 8, 12].map(|n| distance(head("isqrt").with("iterations", n)));
        assert!(steps.is_sorted_by(|a, b| a > b), "{steps:?}");
        assert!(steps[3] < 1e-6, "{steps:?}");
        // Others approximate the same root.
        for name in ["mtp", "mpa"] {
            assert!(distance(head(name)) < 0.2, "{name}");
        }
        for norm in ["frobenius", "spectral"] {
            let head = head("isqrt").with("pre_normalization", norm);
            assert!(distance(head.with("iterations", 12)) < 1e-6, "{norm}");
        }
    }

    #[test]
    fn only_roots_have_a_distance() {
        let features = random((2, 32, 4, 4), 4).to_dtype(DType::F32).unwrap();
        let mut roots = vec![];
        for entry in REPRESENTATIONS {
            let network = network(head(entry.name()), DType::F32);
            if let Some(distance) = root_distance(&network, &features).unwrap() {
                assert!(
                    (0.0..1.0).contains(&distance),
                    "{}: {distance}",
                    entry.name()
                );
                roots.push(entry.name());
            }
        }
        assert_eq!(roots, ["isqrt", "mpn", "mtp", "mpa", "svd_pade"]);
        for other in [
            head("mpn").with("power", 0.25),
            head("isqrt").with("post_compensation", false),
        ] {
            let network = network(other, DType::F32);
            assert_eq!(root_distance(&network, &features).unwrap(), None);
        }
        // Nothing to hold anything against.
        let constant = Tensor::full(2.0_f32, (2, 32, 4, 4), &Device::Cpu).unwrap();
        let network = network(head("isqrt"), DType::F32);
        assert_eq!(root_distance(&network, &constant).unwrap(), None);
    }

    #[test]
    fn stages_share_out_the_whole_norm() {
        let mut vars = Vars::new(1, DType::F32, &Device::Cpu);
        let names = [
            "backbone.layer1.0.conv1.weight",
            "backbone.layer1.1.bn1.bias",
            "backbone.features.3.weight",
            "backbone.conv1.weight",
            "representation.attention.weight",
            "classifier.hidden0.weight",
            "classifier.weight",
        ];
        let mut gradients = None;
        for name in names {
            let mut root = vars.root();
            root.parameter(name, &[2], Init::Constant(0.0)).unwrap();
        }
        for (k, (name, var)) in vars.parameters().enumerate() {
            assert!(names.contains(&name));
            let store = gradients.get_or_insert_with(|| seed(var));
            let gradient = Tensor::new(&[3.0 * (k + 1) as f32, 4.0 * (k + 1) as f32], &Device::Cpu);
            store.insert(var.as_tensor(), gradient.unwrap());
        }
        let mut gradients = gradients.unwrap();
        let norms = stage_norms(&vars, &gradients).unwrap();
        // Sorted by name: conv1, features.3, layer1 twice, classifier twice, representation.
        let expected = [
            ("backbone.conv1", 5.0_f64),
            ("backbone.features.3", 10.0),
            ("backbone.layer1", 15.0_f64.hypot(20.0)),
            ("classifier", 25.0_f64.hypot(30.0)),
            ("representation", 35.0),
        ];
        assert_eq!(norms.len(), expected.len());
        for (stage, norm) in expected {
            isqrt_testkit::assert_close!(norms[stage], norm, rtol = 1e-14);
        }
        let whole: f64 = norms.values().map(|n| n * n).sum();
        let norm = grad_norm(&vars, &gradients).unwrap();
        isqrt_testkit::assert_close!(whole.sqrt(), norm, rtol = 1e-14);

        let (name, var) = vars.parameters().nth(2).unwrap();
        let bad = Tensor::new(&[f32::NAN, 0.0], &Device::Cpu).unwrap();
        gradients.insert(var.as_tensor(), bad);
        let message = stage_norms(&vars, &gradients).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }

    /// A store of gradients with one in it; candle makes none without.
    fn seed(var: &Var) -> GradStore {
        var.as_tensor().sum_all().unwrap().backward().unwrap()
    }
}
