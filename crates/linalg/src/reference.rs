//! The layer written down plainly: full products, reverse-mode differentiation, and the exact
//! root by eigendecomposition. Slow and simple; tests and `isqrt bench` compare against it.

use crate::config::{PreNormalization, Root};
use crate::count::{Factorisation, count};
use crate::schedule::{Polynomial, degree};
use crate::{Error, Result};
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::matmul::matmul;
use faer::linalg::{evd, svd};
use faer::traits::RealField;
use faer::{Accum, Mat, MatRef, Par};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};
use std::time::Instant;

/// f32 or f64, for the reference.
pub trait Number:
    RealField
    + Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// The nearest number.
    fn nearest(value: f64) -> Self;
    /// Its square root.
    fn root(self) -> Self;
    /// The same number in f64.
    fn widened(self) -> f64;
    /// Distance from 1 to the next number.
    const EPSILON: f64;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            fn nearest(value: f64) -> Self {
                value as $type
            }
            fn root(self) -> Self {
                self.sqrt()
            }
            fn widened(self) -> f64 {
                f64::from(self)
            }
            const EPSILON: f64 = <$type>::EPSILON as f64;
        }
    };
}
number!(f32);
number!(f64);

/// `a . b`, on one thread.
pub fn product<T: Number>(a: &Mat<T>, b: &Mat<T>) -> Mat<T> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    matmul(
        c.as_mut(),
        Accum::Replace,
        a.as_ref(),
        b.as_ref(),
        T::nearest(1.0),
        Par::Seq,
    );
    c
}

pub(crate) fn transposed<T: Number>(a: &Mat<T>) -> Mat<T> {
    a.transpose().to_owned()
}

/// `alpha a + beta b`
pub(crate) fn sum<T: Number>(alpha: T, a: &Mat<T>, beta: T, b: &Mat<T>) -> Mat<T> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| {
        alpha * a[(i, j)] + beta * b[(i, j)]
    })
}

/// `alpha a`
pub(crate) fn scaled<T: Number>(alpha: T, a: &Mat<T>) -> Mat<T> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| alpha * a[(i, j)])
}

fn inner<T: Number>(a: &Mat<T>, b: &Mat<T>) -> T {
    let mut total = T::nearest(0.0);
    for j in 0..a.ncols() {
        for i in 0..a.nrows() {
            total += a[(i, j)] * b[(i, j)];
        }
    }
    total
}

/// `a + value I`
pub(crate) fn add_diagonal<T: Number>(mut a: Mat<T>, value: T) -> Mat<T> {
    for i in 0..a.nrows() {
        a[(i, i)] += value;
    }
    a
}

/// Centred features times `1/√M`, so that `X Xᵀ` is the covariance with divisor `M`.
pub fn centred<T: Number>(x: &Mat<T>) -> Mat<T> {
    shifted(x.as_ref(), 1.0)
}

/// Features less a share of their mean, times `1/√M`. Its own adjoint.
pub(crate) fn shifted<T: Number>(x: MatRef<'_, T>, share: f64) -> Mat<T> {
    let m = T::nearest(x.ncols() as f64);
    let (scale, share) = (T::nearest(1.0) / m.root(), T::nearest(share));
    let mut out = x.to_owned();
    for i in 0..x.nrows() {
        // From the first value on, so that the mean of equal values is exact.
        let mut sum = T::nearest(0.0);
        for j in 0..x.ncols() {
            sum += x[(i, j)] - x[(i, 0)];
        }
        let shift = share * (x[(i, 0)] + sum / m);
        for j in 0..x.ncols() {
            out[(i, j)] = (x[(i, j)] - shift) * scale;
        }
    }
    out
}

/// Gradient of the features from the gradient of the covariance, `(dΣ + dΣᵀ) X` centred.
fn features_gradient<T: Number>(covariance: &Mat<T>, x: &Mat<T>) -> Mat<T> {
    let one = T::nearest(1.0);
    let both = sum(one, covariance, one, &transposed(covariance));
    centred(&product(&both, x))
}

/// Products of [`layer`] forward and backward, and matrices that it keeps in between.
pub fn cost(coefficients: &[Polynomial]) -> (usize, usize) {
    // A power of M beyond the first: one product forward, two backward, a matrix kept.
    let powers: usize = coefficients.iter().map(|c| degree(c).max(1) - 1).sum();
    let steps = coefficients.len();
    (9 * steps + 3 * powers, 4 * steps + powers)
}

/// The layer and its gradient by reverse-mode differentiation, every product in full.
///
/// `x` is `d x M` and `upstream` the gradient of the `d x d` output (a triangle's gradient stands
/// in its upper part). Returns the output and the gradient of `x`.
///
/// # Errors
/// As [`crate::Schedule::coefficients`].
pub fn layer<T: Number>(root: &Root, x: &Mat<T>, upstream: &Mat<T>) -> Result<(Mat<T>, Mat<T>)> {
    run(root, x, upstream, || ())
}

/// Seconds of the forward and of the backward part of [`layer`].
///
/// # Errors
/// As [`layer`].
pub fn timed_layer<T: Number>(root: &Root, x: &Mat<T>, upstream: &Mat<T>) -> Result<(f64, f64)> {
    let start = Instant::now();
    let mut between = start;
    std::hint::black_box(run(root, x, upstream, || between = Instant::now())?);
    Ok((
        (between - start).as_secs_f64(),
        between.elapsed().as_secs_f64(),
    ))
}

/// [`layer`], telling when the forward part is done.
fn run<T: Number>(
    root: &Root,
    x: &Mat<T>,
    upstream: &Mat<T>,
    forward_done: impl FnOnce(),
) -> Result<(Mat<T>, Mat<T>)> {
    let (zero, one) = (T::nearest(0.0), T::nearest(1.0));
    let x = centred(x);
    let covariance = product(&x, &transposed(&x));
    let n = covariance.nrows();

    // Pre-normalisation: s and its gradient.
    let (s, s_gradient) = match root.pre_normalization {
        PreNormalization::None => (one, Mat::zeros(n, n)),
        PreNormalization::Trace => {
            let mut trace = zero;
            for i in 0..n {
                trace += covariance[(i, i)];
            }
            (trace, Mat::identity(n, n))
        }
        PreNormalization::Frobenius => {
            let norm = inner(&covariance, &covariance).root();
            (norm, scaled(one / norm, &covariance))
        }
        PreNormalization::Spectral => {
            let second = product(&covariance, &covariance);
            let fourth = product(&second, &second);
            let eighth = inner(&fourth, &fourth);
            let s = eighth.root().root().root();
            let seventh = product(&product(&fourth, &second), &covariance);
            (s, scaled(s / eighth, &seventh))
        }
    };
    let a = scaled(one / s, &covariance);

    // Forward, keeping everything.
    let coefficients = root.schedule.coefficients()?;
    let mut y = a.clone();
    let mut z = Mat::identity(n, n);
    let mut tape = Vec::new();
    for c in &coefficients {
        let mut powers = vec![product(&z, &y)];
        let mut t = scaled(T::nearest(c[1]), &powers[0]);
        for &c in &c[2..=degree(c).max(1)] {
            let next = product(&powers[powers.len() - 1], &powers[0]);
            t = sum(one, &t, T::nearest(c), &next);
            powers.push(next);
        }
        let t = add_diagonal(t, T::nearest(c[0]));
        let next = (product(&y, &t), product(&t, &z));
        tape.push((y, z, powers, t));
        (y, z) = next;
    }
    let scale = if root.post_compensation {
        s.root()
    } else {
        one
    };
    let output = scaled(scale, &y);

    forward_done();

    // Backward.
    let mut gy = scaled(scale, upstream);
    let mut gz = Mat::zeros(n, n);
    for ((y, z, powers, t), c) in tape.into_iter().zip(&coefficients).rev() {
        let gt = sum(
            one,
            &product(&transposed(&y), &gy),
            one,
            &product(&gz, &transposed(&z)),
        );
        let tt = transposed(&t);
        let (next_y, next_z) = (product(&gy, &tt), product(&tt, &gz));
        let mut gp = scaled(T::nearest(c[1]), &gt);
        // d(Pⁱ) = dPⁱ⁻¹ P + Pⁱ⁻¹ dP, so its adjoint follows from that of Pⁱ⁻¹.
        let pt = transposed(&powers[0]);
        let mut through = gt.clone();
        for i in 2..=degree(c) {
            let first = product(&pt, &through);
            through = sum(one, &first, one, &product(&gt, &transposed(&powers[i - 2])));
            gp = sum(one, &gp, T::nearest(c[i]), &through);
        }
        gy = sum(one, &next_y, one, &product(&transposed(&z), &gp));
        gz = sum(one, &next_z, one, &product(&gp, &transposed(&y)));
    }
    let mut gs = -inner(&gy, &a) / s;
    if root.post_compensation {
        gs += inner(upstream, &output) / (T::nearest(2.0) * s);
    }
    let covariance_gradient = sum(one / s, &gy, gs, &s_gradient);
    Ok((output, features_gradient(&covariance_gradient, &x)))
}

/// The plain covariance and its gradient.
pub fn covariance<T: Number>(x: &Mat<T>, upstream: &Mat<T>) -> (Mat<T>, Mat<T>) {
    let x = centred(x);
    (
        product(&x, &transposed(&x)),
        features_gradient(upstream, &x),
    )
}

/// The exact root `√Σ` of the covariance of `x` and the exact gradient of `x`, by
/// eigendecomposition in f64. In the basis of eigenvectors the gradient of `Σ` is
/// `G_ij / (√λ_i + √λ_j)`; where both eigenvalues vanish the features have no part, and it is 0.
///
/// # Errors
/// [`Error::Decomposition`] if the eigendecomposition does not converge.
pub fn exact(x: &Mat<f64>, upstream: &Mat<f64>) -> Result<(Mat<f64>, Mat<f64>)> {
    let x = centred(x);
    let covariance = product(&x, &transposed(&x));
    let n = covariance.nrows();
    let (values, u) = eigen(&covariance).ok_or(Error::Decomposition {
        index: 0,
        what: "eigendecomposition",
    })?;
    let most = values.iter().fold(0.0_f64, |a, &b| a.max(b));
    let floor = most * n as f64 * f64::EPSILON;
    let roots: Vec<f64> = values
        .iter()
        .map(|&v| if v > floor { v.sqrt() } else { 0.0 })
        .collect();
    let scaled_u = Mat::from_fn(n, n, |i, j| u[(i, j)] * roots[j]);
    let root = product(&scaled_u, &transposed(&u));
    let symmetric = sum(0.5, upstream, 0.5, &transposed(upstream));
    let mut g = product(&product(&transposed(&u), &symmetric), &u);
    for j in 0..n {
        for i in 0..n {
            let both = roots[i] + roots[j];
            g[(i, j)] = if both > 0.0 { g[(i, j)] / both } else { 0.0 };
        }
    }
    let gradient = product(&product(&u, &g), &transposed(&u));
    Ok((root, features_gradient(&gradient, &x)))
}

/// Eigenvalues in rising order and eigenvectors of a symmetric matrix, on one thread; `None` if
/// the iteration does not converge.
pub fn eigen<T: Number>(a: &Mat<T>) -> Option<(Vec<T>, Mat<T>)> {
    count(Factorisation::Eig);
    let n = a.nrows();
    let (mut values, mut vectors) = (Diag::<T>::zeros(n), Mat::zeros(n, n));
    let scratch = evd::self_adjoint_evd_scratch::<T>(
        n,
        evd::ComputeEigenvectors::Yes,
        Par::Seq,
        Default::default(),
    );
    evd::self_adjoint_evd(
        a.as_ref(),
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .ok()?;
    Some((values.column_vector().iter().copied().collect(), vectors))
}

/// Singular values in falling order and both factors of a square matrix, on one thread; `None`
/// if the iteration does not converge.
pub fn singular<T: Number>(a: &Mat<T>) -> Option<(Vec<T>, Mat<T>, Mat<T>)> {
    count(Factorisation::Svd);
    let n = a.nrows();
    let mut values = Diag::<T>::zeros(n);
    let (mut left, mut right) = (Mat::zeros(n, n), Mat::zeros(n, n));
    let all = svd::ComputeSvdVectors::Full;
    let scratch = svd::svd_scratch::<T>(n, n, all, all, Par::Seq, Default::default());
    svd::svd(
        a.as_ref(),
        values.as_mut(),
        Some(left.as_mut()),
        Some(right.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .ok()?;
    Some((
        values.column_vector().iter().copied().collect(),
        left,
        right,
    ))
}

/// The solution `X` of `aX = b` for a positive definite `a`, on one thread; `None` if it is not
/// (to working precision).
pub(crate) fn cholesky_solve<T: Number>(mut a: Mat<T>, mut b: Mat<T>) -> Option<Mat<T>> {
    count(Factorisation::Cholesky);
    let n = a.nrows();
    let scratch = llt::factor::cholesky_in_place_scratch::<T>(n, Par::Seq, Default::default()).or(
        llt::solve::solve_in_place_scratch::<T>(n, b.ncols(), Par::Seq),
    );
    let mut memory = MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(
        a.as_mut(),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .ok()?;
    let stack = MemStack::new(&mut memory);
    llt::solve::solve_in_place(a.as_ref(), b.as_mut(), Par::Seq, stack);
    Some(b)
}

/// The values of a matrix, row by row.
pub fn row_major<T: Number>(a: &Mat<T>) -> Vec<T> {
    let columns = a.ncols();
    (0..a.nrows() * columns)
        .map(|at| a[(at / columns, at % columns)])
        .collect()
}

/// The matrix with these values, row by row.
pub fn from_row_major<T: Number>(rows: usize, columns: usize, values: &[T]) -> Mat<T> {
    MatRef::from_row_major_slice(values, rows, columns).to_owned()
}

/// Reads the upper triangle of a matrix, row by row.
pub fn triangle<T: Number>(a: &Mat<T>) -> Vec<T> {
    let n = a.nrows();
    (0..n)
        .flat_map(|i| (i..n).map(move |j| (i, j)))
        .map(|at| a[at])
        .collect()
}

/// The matrix with these values in its upper triangle and zeros below.
pub fn from_triangle<T: Number>(n: usize, values: &[T]) -> Mat<T> {
    let mut out = Mat::zeros(n, n);
    let places = (0..n).flat_map(|i| (i..n).map(move |j| (i, j)));
    for (at, &value) in places.zip(values) {
        out[at] = value;
    }
    out
}
