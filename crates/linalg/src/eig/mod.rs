//! MPN-COV: a power of the covariance by eigendecomposition, with its own backward.
//!
//! Li, Xie, Wang, Zuo, *Is Second-order Information Helpful for Large-scale Visual Recognition?*
//! (ICCV 2017): `C = U diag(λ^α) Uᵀ` of the covariance `Σ = U diag(λ) Uᵀ`, `α = 1/2` by default,
//! without pre-normalisation. This is the baseline that iSQRT-COV replaces.

use crate::config::Output;
use crate::reference::{Number, centred, eigen, from_triangle, product, triangle};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor};
use faer::{Mat, MatRef};
use rayon::prelude::*;
use std::sync::OnceLock;

/// Matrix power normalised covariance pooling by eigendecomposition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MpnCov {
    /// The exponent `α`, in `(0, 1]`.
    pub power: f64,
    /// Form of the output.
    pub output: Output,
}

impl Default for MpnCov {
    fn default() -> Self {
        Self {
            power: 0.5,
            output: Output::Triangle,
        }
    }
}

impl MpnCov {
    /// Pools feature maps, differentiably; one eigendecomposition an image, images in parallel.
    ///
    /// # Shapes
    /// As [`CovPool::forward`](crate::CovPool::forward).
    ///
    /// # Errors
    /// As there, and [`Error::Decomposition`].
    ///
    /// # Numerics
    /// The gradient is that of the matrix function (Daleckii–Krein): divided differences of
    /// `λ^α`, the derivative where eigenvalues coincide. Eigenvalues below `d ε λ_max` count as
    /// zero; pairs of zeros, where features have no part and the derivative is infinite, as 0.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !(self.power > 0.0 && self.power <= 1.0) {
            return Err(crate::config::out_of_range(
                "power",
                self.power,
                "a number in (0, 1]",
            ));
        }
        let (batch, d, positions) = crate::layer::feature_shape(x)?;
        match x.dtype() {
            DType::F32 => Ok(x
                .contiguous()?
                .apply_op1(Op::<f32>::new(*self, batch, d, positions))?),
            DType::F64 => Ok(x
                .contiguous()?
                .apply_op1(Op::<f64>::new(*self, batch, d, positions))?),
            other => Err(Error::Dtype {
                dtype: other.as_str(),
            }),
        }
    }
}

/// Eigenvectors and clamped eigenvalues of an image.
struct Spectrum<T> {
    vectors: Mat<T>,
    values: Vec<f64>,
}

struct Op<T> {
    pool: MpnCov,
    batch: usize,
    d: usize,
    positions: usize,
    spectra: OnceLock<Vec<Spectrum<T>>>,
}

/// Eigendecomposition of a symmetric matrix, on one thread; eigenvalues that are zero up to
/// rounding are set to it.
fn spectrum<T: Number>(covariance: &Mat<T>, epsilon: f64, index: usize) -> Result<Spectrum<T>> {
    let (raw, vectors) = eigen(covariance).ok_or(Error::Decomposition {
        index,
        what: "eigendecomposition",
    })?;
    let raw: Vec<f64> = raw.into_iter().map(T::widened).collect();
    let most = raw.iter().fold(0.0_f64, |a, &b| a.max(b));
    let floor = most * raw.len() as f64 * epsilon;
    Ok(Spectrum {
        vectors,
        values: raw
            .into_iter()
            .map(|v| if v > floor { v } else { 0.0 })
            .collect(),
    })
}

/// `(f(a) - f(b)) / (a - b)` for `f(λ) = λ^power`, continued where `a = b`; 0 for `a = b = 0`.
fn divided_difference(a: f64, b: f64, power: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if high == 0.0 {
        return 0.0;
    }
    if power == 0.5 {
        return 1.0 / (low.sqrt() + high.sqrt());
    }
    let r = low / high;
    // With r = 1 - δ: (1 - r^p) / (1 - r), by ln_1p and exp_m1 without cancellation.
    let ratio = if r == 0.0 {
        1.0
    } else if r == 1.0 {
        power
    } else {
        let delta = (high - low) / high;
        -(power * (-delta).ln_1p()).exp_m1() / delta
    };
    high.powf(power - 1.0) * ratio
}

impl<T: Number + crate::layer::Layered> Op<T> {
    fn new(pool: MpnCov, batch: usize, d: usize, positions: usize) -> Self {
        Self {
            pool,
            batch,
            d,
            positions,
            spectra: OnceLock::new(),
        }
    }

    fn image(&self, features: &[T]) -> Mat<T> {
        MatRef::from_row_major_slice(features, self.d, self.positions).to_owned()
    }

    fn forward_image(&self, index: usize, features: &[T]) -> Result<(Vec<T>, Spectrum<T>)> {
        if features.iter().any(|x| !x.widened().is_finite()) {
            return Err(Error::NonFinite {
                index,
                what: "a feature",
            });
        }
        let x = centred(&self.image(features));
        let covariance = product(&x, &x.transpose().to_owned());
        let diagonal = (0..self.d).map(|i| covariance[(i, i)].widened());
        if !diagonal.sum::<f64>().is_finite() {
            return Err(Error::NonFinite {
                index,
                what: "the covariance (it overflows)",
            });
        }
        let spectrum = spectrum(&covariance, T::EPSILON, index)?;
        let u = &spectrum.vectors;
        let powered = Mat::from_fn(self.d, self.d, |i, j| {
            u[(i, j)] * T::nearest(powered(spectrum.values[j], self.pool.power))
        });
        let root = product(&powered, &u.transpose().to_owned());
        Ok((self.flat(&root), spectrum))
    }

    fn flat(&self, matrix: &Mat<T>) -> Vec<T> {
        match self.pool.output {
            Output::Triangle => triangle(matrix),
            Output::Full => row_major(matrix),
        }
    }

    fn backward_image(&self, features: &[T], spectrum: &Spectrum<T>, gradient: &[T]) -> Vec<T> {
        let d = self.d;
        let upstream = match self.pool.output {
            Output::Triangle => from_triangle(d, gradient),
            Output::Full => MatRef::from_row_major_slice(gradient, d, d).to_owned(),
        };
        // dΣ + dΣᵀ needs twice the symmetric part.
        let both = Mat::from_fn(d, d, |i, j| upstream[(i, j)] + upstream[(j, i)]);
        let u = &spectrum.vectors;
        let ut = u.transpose().to_owned();
        let mut inside = product(&product(&ut, &both), u);
        for j in 0..d {
            for i in 0..d {
                let (a, b) = (spectrum.values[i], spectrum.values[j]);
                inside[(i, j)] *= T::nearest(divided_difference(a, b, self.pool.power));
            }
        }
        let covariance = product(&product(u, &inside), &ut);
        let x = centred(&self.image(features));
        row_major(&centred(&product(&covariance, &x)))
    }
}

fn powered(value: f64, power: f64) -> f64 {
    match power {
        0.5 => value.sqrt(),
        _ if value == 0.0 => 0.0,
        _ => value.powf(power),
    }
}

fn row_major<T: Number>(a: &Mat<T>) -> Vec<T> {
    let columns = a.ncols();
    (0..a.nrows() * columns)
        .map(|at| a[(at / columns, at % columns)])
        .collect()
}

impl<T: Number + crate::layer::Layered> CustomOp1 for Op<T> {
    fn name(&self) -> &'static str {
        "mpn-cov"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let features = crate::layer::values::<T>(storage, layout)?;
        let images: Vec<Result<(Vec<T>, Spectrum<T>)>> = features
            .par_chunks_exact(self.d * self.positions)
            .enumerate()
            .map(|(index, image)| self.forward_image(index, image))
            .collect();
        // In order, so that the first bad image of the batch is the one that is named.
        let images: Vec<_> = images.into_iter().collect::<Result<_>>()?;
        let (out, spectra): (Vec<Vec<T>>, Vec<_>) = images.into_iter().unzip();
        let _ = self.spectra.set(spectra);
        let shape = crate::layer::out_shape(self.pool.output, self.batch, self.d);
        Ok((T::storage(out.concat()), shape))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let (arg, grad_res) = (arg.contiguous()?, grad_res.contiguous()?);
        let (x, x_layout) = arg.storage_and_layout();
        let (g, g_layout) = grad_res.storage_and_layout();
        let (Storage::Cpu(x), Storage::Cpu(g)) = (&*x, &*g) else {
            return Err(Error::Device.into());
        };
        let x = crate::layer::values::<T>(x, x_layout)?;
        let g = crate::layer::values::<T>(g, g_layout)?;
        let spectra = self.spectra.get().map_or(&[][..], Vec::as_slice);
        let out: Vec<Vec<T>> = x
            .par_chunks_exact(self.d * self.positions)
            .zip(spectra.par_iter())
            .zip(g.par_chunks_exact(self.pool.output.len(self.d)))
            .map(|((image, spectrum), gradient)| self.backward_image(image, spectrum, gradient))
            .collect();
        Ok(Some(Tensor::from_vec(
            out.concat(),
            arg.shape(),
            arg.device(),
        )?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_differences_are_finite_and_right() {
        for power in [0.3, 0.5, 1.0] {
            for (a, b) in [
                (2.0, 1.0),
                (1.0, 1.0),
                (1.0, 1.0 + 1e-13),
                (3.0, 0.0),
                (1e-9, 5.0),
            ] {
                let found = divided_difference(a, b, power);
                let known = if (a - b).abs() > 1e-6 {
                    (f64::powf(a, power) - f64::powf(b, power)) / (a - b)
                } else {
                    power * f64::powf(a, power - 1.0)
                };
                assert!(
                    (found / known - 1.0).abs() < 1e-9,
                    "{a} {b} {power}: {found} {known}"
                );
                assert_eq!(found, divided_difference(b, a, power));
            }
        }
        assert_eq!(divided_difference(0.0, 0.0, 0.5), 0.0);
    }
}
