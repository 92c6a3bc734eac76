//! Comparison of tensors, slices and numbers within a tolerance, naming the worst element.

use candle_core::{DType, Tensor};

/// `|a - b| <= atol + rtol * |b|`, element by element; equal infinities agree, NaN never does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Relative to the second (expected) value.
    pub rtol: f64,
    /// Absolute.
    pub atol: f64,
}

/// Anything that has a shape and numbers.
pub trait Values {
    /// Shape and values in row-major order, as f64; or why they cannot be had.
    fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String>;
}

impl Values for Tensor {
    fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
        let flat = self.flatten_all().and_then(|t| t.to_dtype(DType::F64));
        let values = flat
            .and_then(|t| t.to_vec1::<f64>())
            .map_err(|e| e.to_string())?;
        Ok((self.dims().to_vec(), values))
    }
}

impl<T: Values + ?Sized> Values for &T {
    fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
        (**self).values()
    }
}

macro_rules! number {
    ($($t:ty),*) => {$(
        impl Values for $t {
            fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
                Ok((vec![], vec![f64::from(*self)]))
            }
        }
        impl Values for [$t] {
            fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
                Ok((vec![self.len()], self.iter().map(|&v| f64::from(v)).collect()))
            }
        }
        impl Values for Vec<$t> {
            fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
                self.as_slice().values()
            }
        }
        impl<const N: usize> Values for [$t; N] {
            fn values(&self) -> Result<(Vec<usize>, Vec<f64>), String> {
                self.as_slice().values()
            }
        }
    )*};
}
number!(f32, f64, u32, i32);

/// Distance of `got` from `expected` in the 2-norm, relative to `expected`.
///
/// # Errors
/// Those of candle, for shapes that differ.
pub fn relative_error(got: &Tensor, expected: &Tensor) -> candle_core::Result<f64> {
    let norm = |t: Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
    let (got, expected) = (got.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    Ok(norm((got - &expected)?)? / norm(expected)?)
}

/// Compares `got` with `expected`.
///
/// # Errors
/// A message that names the shapes, or the element that is furthest outside of the tolerance and
/// how many are outside.
pub fn compare(
    got: &(impl Values + ?Sized),
    expected: &(impl Values + ?Sized),
    tolerance: Tolerance,
) -> Result<(), String> {
    let (shape, got) = got.values()?;
    let (expected_shape, expected) = expected.values()?;
    if shape != expected_shape {
        return Err(format!("shape {shape:?}, expected {expected_shape:?}"));
    }
    let Tolerance { rtol, atol } = tolerance;
    let mut outside = 0;
    let mut worst: Option<(usize, f64)> = None;
    for (i, (&a, &b)) in got.iter().zip(&expected).enumerate() {
        // The subtraction of equal infinities is NaN.
        let excess = if a == b {
            f64::NEG_INFINITY
        } else {
            (a - b).abs() - (atol + rtol * b.abs())
        };
        if excess > 0.0 || excess.is_nan() {
            outside += 1;
            let rank = if excess.is_nan() {
                f64::INFINITY
            } else {
                excess
            };
            if worst.is_none_or(|(_, most)| rank > most) {
                worst = Some((i, rank));
            }
        }
    }
    let Some((i, _)) = worst else { return Ok(()) };
    let difference = (got[i] - expected[i]).abs();
    Err(format!(
        "{outside} of {} elements differ by more than atol {atol:e} + rtol {rtol:e}; worst at {:?}: \
         got {:e}, expected {:e}, difference {difference:.3e} (relative {:.3e})",
        got.len(),
        position(i, &shape),
        got[i],
        expected[i],
        difference / expected[i].abs(),
    ))
}

/// Index along each axis of the element with this row-major number.
pub(crate) fn position(mut element: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        at[axis] = element % shape[axis];
        element /= shape[axis];
    }
    at
}

/// Asserts that two tensors, slices or numbers agree: `assert_close!(got, expected, rtol = 1e-5)`.
///
/// `rtol` and `atol` are 0 where they are not given.
#[macro_export]
macro_rules! assert_close {
    ($got:expr, $expected:expr, rtol = $rtol:expr, atol = $atol:expr $(,)?) => {
        if let Err(message) = $crate::compare(
            &$got,
            &$expected,
            $crate::Tolerance {
                rtol: $rtol,
                atol: $atol,
            },
        ) {
            panic!(
                "{} is not close to {}: {message}",
                stringify!($got),
                stringify!($expected)
            );
        }
    };
    ($got:expr, $expected:expr, atol = $atol:expr, rtol = $rtol:expr $(,)?) => {
        $crate::assert_close!($got, $expected, rtol = $rtol, atol = $atol)
    };
    ($got:expr, $expected:expr, rtol = $rtol:expr $(,)?) => {
        $crate::assert_close!($got, $expected, rtol = $rtol, atol = 0.0)
    };
    ($got:expr, $expected:expr, atol = $atol:expr $(,)?) => {
        $crate::assert_close!($got, $expected, rtol = 0.0, atol = $atol)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIGHT: Tolerance = Tolerance {
        rtol: 1e-6,
        atol: 0.0,
    };

    #[test]
    fn agreement_and_infinities() {
        assert_close!(
            [1.0, f64::INFINITY],
            [1.0 + 1e-9, f64::INFINITY],
            rtol = 1e-6
        );
        assert_close!(0.0, 1e-9, atol = 1e-8);
    }

    #[test]
    fn the_message_names_the_worst_element() {
        let message = compare(&vec![1.0, 2.0, 3.5], &vec![1.0, 2.1, 3.0], TIGHT);
        assert!(message.is_err_and(|m| m.contains("worst at [2]") && m.starts_with("2 of 3")));
    }

    #[test]
    fn nan_and_other_shapes_never_agree() {
        assert!(compare(&[f64::NAN], &[f64::NAN], TIGHT).is_err());
        assert!(compare(&[1.0], &[1.0, 1.0], TIGHT).is_err_and(|m| m.contains("shape")));
    }

    #[test]
    fn positions_are_row_major() {
        assert_eq!(position(7, &[2, 3, 2]), [1, 0, 1]);
    }
}
