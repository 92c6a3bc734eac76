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

/// Standard deviation of two samples taken together about their own means.
pub fn pooled_sd(a: &[f64], b: &[f64]) -> f64 {
    let freedom = (a.len() + b.len()).saturating_sub(2);
    if freedom == 0 {
        return 0.0;
    }
    let sum = sd(a).powi(2) * a.len().saturating_sub(1) as f64
        + sd(b).powi(2) * b.len().saturating_sub(1) as f64;
    (sum / freedom as f64).sqrt()
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
        assert_eq!(pooled_sd(&[1.0, 2.0, 3.0], &[7.0, 8.0, 9.0]), 1.0);
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
