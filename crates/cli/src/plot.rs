//! A small plot of letters for the terminal, logarithmic from bottom to top.

/// A curve: its mark, its name, its points `(x, y)`.
pub type Curve = (char, String, Vec<(f64, f64)>);

/// Draws curves, each with its own mark.
pub fn text(series: &[Curve], x_label: &str, y_label: &str) -> String {
    const WIDTH: usize = 60;
    const HEIGHT: usize = 14;
    let points = || series.iter().flat_map(|(_, _, p)| p).filter(|p| p.1 > 0.0);
    let range = |values: Vec<f64>| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if high - low > 1e-12 {
            (low, high)
        } else {
            (low - 0.5, low + 0.5)
        }
    };
    if points().next().is_none() {
        return String::new();
    }
    let (x0, x1) = range(points().map(|p| p.0).collect());
    let (y0, y1) = range(points().map(|p| p.1.log10()).collect());
    let mut grid = vec![vec![' '; WIDTH]; HEIGHT];
    for (mark, _, curve) in series {
        for (x, y) in curve.iter().filter(|p| p.1 > 0.0) {
            let column = ((x - x0) / (x1 - x0) * (WIDTH - 1) as f64).round() as usize;
            let row = ((y1 - y.log10()) / (y1 - y0) * (HEIGHT - 1) as f64).round() as usize;
            if let Some(place) = grid.get_mut(row).and_then(|r| r.get_mut(column)) {
                *place = *mark;
            }
        }
    }
    let mut out = format!("{y_label}\n");
    for (row, cells) in grid.iter().enumerate() {
        let y = 10f64.powf(y1 - (y1 - y0) * row as f64 / (HEIGHT - 1) as f64);
        let label = if row % 3 == 0 {
            format!("{y:8.1e}")
        } else {
            " ".repeat(8)
        };
        let line: String = cells.iter().collect();
        out.push_str(&format!("{label} │{}\n", line.trim_end()));
    }
    out.push_str(&format!("{:8} └{}\n", "", "─".repeat(WIDTH)));
    out.push_str(&format!("{:10}{x0:<10.0}{x_label:^40}{x1:>10.0}\n", ""));
    let legend: Vec<String> = series
        .iter()
        .map(|(m, name, _)| format!("{m} {name}"))
        .collect();
    out.push_str(&format!("{:10}{}", "", legend.join("   ")));
    out
}
