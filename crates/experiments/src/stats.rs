//! Means and spreads of a few numbers.

/// Mean; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Sample standard deviation (divisor n - 1); 0 for one value.
pub fn sd(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let m = mean(values);
    let squares: f64 = values.iter().map(|v| (v - m).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// Two-sided p value of Student's t test that the mean of these differences is zero; 1 for fewer than two, and for
/// differences that are all equal.
pub fn paired_test(differences: &[f64]) -> f64 {
    let n = differences.len();
    if n < 2 {
        return 1.0;
    }
    let (m, s) = (mean(differences), sd(differences));
    let largest = differences.iter().fold(1.0_f64, |a, d| a.max(d.abs()));
    if s <= 1e-9 * largest {
        // Errors come in steps: differences that happen to be equal are not without spread.
        return 1.0;
    }
    outside(m / s * (n as f64).sqrt(), n - 1)
}

/// Probability that Student's t of so many degrees of freedom is farther from zero than `t`
/// (Abramowitz and Stegun, 26.7.3 and 26.7.4).
fn outside(t: f64, freedom: usize) -> f64 {
    let angle = (t.abs() / (freedom as f64).sqrt()).atan();
    let (sin, cos) = angle.sin_cos();
    let first = if freedom % 2 == 1 { cos } else { 1.0 };
    let (mut term, mut sum) = (first, 0.0);
    let mut k = 2 + freedom % 2;
    while k <= freedom {
        sum += term;
        term *= cos * cos * (k - 1) as f64 / k as f64;
        k += 2;
    }
    let inside = match freedom % 2 {
        1 => (angle + sin * sum) * std::f64::consts::FRAC_2_PI,
        _ => sin * sum,
    };
    (1.0 - inside).clamp(0.0, 1.0)
}

/// A number for people: three significant digits, or as many decimals as asked for.
pub fn show(value: f64, digits: Option<usize>) -> String {
    if !value.is_finite() {
        return "diverged".to_owned();
    }
    if let Some(digits) = digits {
        return format!("{value:.digits$}");
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor();
    if !(-3.0..6.0).contains(&magnitude) {
        return format!("{value:.1e}");
    }
    let decimals = (2.0 - magnitude).max(0.0) as usize;
    format!("{value:.decimals$}")
}

/// Seconds for people: `40 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_known_numbers() {
        assert_eq!(mean(&[1.0, 2.0, 3.0]), 2.0);
        assert_eq!(sd(&[1.0, 2.0, 3.0]), 1.0);
        assert_eq!(sd(&[5.0]), 0.0);
    }

    /// Quantiles of tables: t(0.975) and t(0.995).
    #[test]
    fn probabilities_of_student() {
        for (t, freedom, p) in [
            (12.706, 1, 0.05),
            (4.303, 2, 0.05),
            (3.182, 3, 0.05),
            (2.776, 4, 0.05),
            (2.571, 5, 0.05),
            (2.306, 8, 0.05),
            (2.145, 14, 0.05),
            (9.925, 2, 0.01),
            (3.355, 8, 0.01),
            (0.0, 7, 1.0),
        ] {
            let found = outside(t, freedom);
            assert!((found - p).abs() < 2e-4, "{t} {freedom}: {found}");
            assert_eq!(found, outside(-t, freedom));
        }
        assert_eq!(paired_test(&[1.0]), 1.0);
        assert_eq!(paired_test(&[1.0, 1.0]), 1.0);
        assert_eq!(paired_test(&[0.0, 0.0]), 1.0);
        // Equal but for rounding.
        let step = |k: f64| 100.0 * (k + 1.0) / 1500.0 - 100.0 * k / 1500.0;
        assert_eq!(paired_test(&[step(7.0), step(160.0), step(931.0)]), 1.0);
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(show(0.41, None), "0.410");
        assert_eq!(show(1234.5, None), "1234");
        assert_eq!(show(1.5e-7, None), "1.5e-7");
        assert_eq!(show(2.345, Some(1)), "2.3");
        assert_eq!(duration(200.0), "3 min 20 s");
    }
}
