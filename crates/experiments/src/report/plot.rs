//! Line and bar plots as inline SVG.
//!
//! Colours are CSS classes (`s0`, `s1`, ...) that the page defines for light and dark. The drawing
//! is small (460 units wide) so that its letters stay readable on a phone.

use crate::stats::show;
use std::fmt::Write as _;

const WIDTH: f64 = 460.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const PLOT_HEIGHT: f64 = 240.0;

/// A point with an optional error bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Place on the x axis.
    pub x: f64,
    /// Place on the y axis.
    pub y: f64,
    /// Ends of the error bar.
    pub bar: Option<(f64, f64)>,
}

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// As in the legend.
    pub label: String,
    /// Left to right.
    pub points: Vec<Point>,
    /// A dashed line over the whole width at the first point's y.
    pub level: bool,
    /// Dots on the points.
    pub dots: bool,
}

/// A plot of curves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinePlot {
    /// For screen readers.
    pub title: String,
    /// Text of the x axis.
    pub x_label: String,
    /// Text of the y axis.
    pub y_label: String,
    /// Logarithmic y axis.
    pub log: bool,
    /// Logarithmic x axis.
    pub log_x: bool,
    /// The curves.
    pub series: Vec<Series>,
}

/// A plot of horizontal bars, grouped.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarPlot {
    /// For screen readers.
    pub title: String,
    /// Text of the value axis.
    pub x_label: String,
    /// Names of the bars in a group.
    pub series: Vec<String>,
    /// Group label, and a value with its error bar for each series.
    pub groups: Vec<(String, Vec<Option<Point>>)>,
}

/// An axis: a range, its ticks, linear or logarithmic.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, log: bool, from_zero: bool) -> Self {
        let usable = |v: &f64| v.is_finite() && (!log || *v > 0.0);
        let (mut low, mut high) = values
            .filter(usable)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        if low > high {
            (low, high) = if log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        if log {
            // A little room, and at least a factor of three.
            let (a, b) = (low.log10(), high.log10());
            let room = (0.08 * (b - a)).max((0.48 - (b - a)).max(0.0) / 2.0);
            return Self {
                low: 10f64.powf(a - room),
                high: 10f64.powf(b + room),
                log,
            };
        }
        if from_zero {
            low = low.min(0.0);
        }
        if high - low < 1e-12 {
            high = low + low.abs().max(1.0);
        }
        let step = nice_step(high - low);
        Self {
            low: (low / step).floor() * step,
            high: (high / step).ceil() * step,
            log,
        }
    }

    /// 0 at the low end, 1 at the high end.
    fn place(&self, value: f64) -> f64 {
        let (v, l, h) = if self.log {
            (
                value.max(1e-300).log10(),
                self.low.log10(),
                self.high.log10(),
            )
        } else {
            (value, self.low, self.high)
        };
        ((v - l) / (h - l)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if !self.log {
            let step = nice_step(self.high - self.low);
            let first = (self.low / step).round() as i64;
            let last = (self.high / step).round() as i64;
            return (first..=last).map(|i| i as f64 * step).collect();
        }
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let wide = self.high / self.low > 1e3;
        let very_wide = self.high / self.low > 1e7;
        let marks: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
        decades
            .filter(|d| !very_wide || d % 2 == 0)
            .flat_map(|d| marks.iter().map(move |m| m * 10f64.powi(d)))
            .filter(|t| *t >= self.low * 0.999 && *t <= self.high * 1.001)
            .collect()
    }
}

fn nice_step(range: f64) -> f64 {
    let rough = range / 5.0;
    let decade = 10f64.powf(rough.log10().floor());
    let factor = rough / decade;
    let nice = match factor {
        f if f <= 1.0 => 1.0,
        f if f <= 2.0 => 2.0,
        f if f <= 5.0 => 5.0,
        _ => 10.0,
    };
    nice * decade
}

fn tick_text(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e5).contains(&value.abs()) {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}e{power}");
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text for SVG and HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

impl LinePlot {
    /// The plot as an `<svg>` element. Text is escaped.
    pub fn svg(&self) -> String {
        let all = || self.series.iter().flat_map(|s| &s.points);
        let ys = all().flat_map(|p| {
            let (a, b) = p.bar.unwrap_or((p.y, p.y));
            [p.y, a, b]
        });
        let y = Axis::new(ys, self.log, !self.log);
        let curve = || self.series.iter().filter(|s| !s.level);
        let xs: Vec<f64> = curve().flat_map(|s| s.points.iter().map(|p| p.x)).collect();
        let few: std::collections::BTreeSet<i64> = xs.iter().map(|x| x.round() as i64).collect();
        let (x_low, x_high) = xs
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| {
                (l.min(*x), h.max(*x))
            });
        let (x_low, x_high) = match (x_low.is_finite(), x_high - x_low) {
            (false, _) => (0.0, 1.0),
            (true, w) if w < 1e-9 => (x_low - 0.5, x_high + 0.5),
            (true, w) => (x_low - 0.04 * w, x_high + 0.04 * w),
        };
        let x = match self.log_x {
            true => Axis::new(xs.iter().copied(), true, false),
            false => Axis {
                low: x_low,
                high: x_high,
                log: false,
            },
        };
        let span = WIDTH - LEFT - RIGHT;
        let px = |v: f64| LEFT + span * x.place(v);
        let py = |v: f64| TOP + PLOT_HEIGHT * (1.0 - y.place(v));
        let legend = Legend::new(self.series.iter().map(|s| s.label.as_str()));
        let height = TOP + PLOT_HEIGHT + 44.0 + legend.height();
        let mut svg = open(height, &self.title);
        for tick in y.ticks() {
            let at = py(tick);
            line(&mut svg, "grid", LEFT, at, WIDTH - RIGHT, at);
            text(&mut svg, LEFT - 6.0, at + 4.0, "end", &tick_text(tick));
        }
        let whole = xs.iter().all(|x| x.fract() == 0.0);
        let x_ticks: Vec<f64> = if few.len() <= 8 && whole && !self.log_x {
            few.iter().map(|x| *x as f64).collect()
        } else {
            x.ticks()
        };
        let within = |tick: &f64| (x.low..=x.high).contains(tick);
        for tick in x_ticks.into_iter().filter(within) {
            let base = TOP + PLOT_HEIGHT;
            line(&mut svg, "axis", px(tick), base, px(tick), base + 4.0);
            text(&mut svg, px(tick), base + 17.0, "middle", &tick_text(tick));
        }
        let base = TOP + PLOT_HEIGHT;
        line(&mut svg, "axis", LEFT, base, WIDTH - RIGHT, base);
        line(&mut svg, "axis", LEFT, TOP, LEFT, base);
        text(
            &mut svg,
            LEFT + span / 2.0,
            base + 35.0,
            "middle",
            &self.x_label,
        );
        let middle = TOP + PLOT_HEIGHT / 2.0;
        let _ = write!(
            svg,
            r#"<text x="14" y="{middle:.1}" text-anchor="middle" transform="rotate(-90 14 {middle:.1})">{}</text>"#,
            escape(&self.y_label)
        );
        for (i, series) in self.series.iter().enumerate() {
            draw_series(&mut svg, i, series, &px, &py);
        }
        legend.draw(&mut svg, base + 50.0, |i| {
            self.series.get(i).is_some_and(|s| s.level)
        });
        svg.push_str("</svg>");
        svg
    }
}

fn draw_series(
    svg: &mut String,
    i: usize,
    series: &Series,
    px: &impl Fn(f64) -> f64,
    py: &impl Fn(f64) -> f64,
) {
    let class = colour(i);
    let points: Vec<&Point> = series.points.iter().filter(|p| p.y.is_finite()).collect();
    if series.level {
        if let Some(p) = points.first() {
            line(
                svg,
                &format!("{class} level"),
                LEFT,
                py(p.y),
                WIDTH - RIGHT,
                py(p.y),
            );
        }
        return;
    }
    let path: Vec<String> = points
        .iter()
        .map(|p| format!("{:.1},{:.1}", px(p.x), py(p.y)))
        .collect();
    let _ = write!(
        svg,
        r#"<polyline class="{class}" points="{}"/>"#,
        path.join(" ")
    );
    for p in points {
        if let Some((low, high)) = p.bar {
            let (x, a, b) = (px(p.x), py(low), py(high));
            line(svg, &class, x, a, x, b);
            line(svg, &class, x - 4.0, a, x + 4.0, a);
            line(svg, &class, x - 4.0, b, x + 4.0, b);
        }
        if series.dots {
            let _ = write!(
                svg,
                r#"<circle class="{class} dot" cx="{:.1}" cy="{:.1}" r="3.5"><title>{}</title></circle>"#,
                px(p.x),
                py(p.y),
                escape(&format!("{}: {}", series.label, show(p.y, None)))
            );
        }
    }
}

impl BarPlot {
    /// The plot as an `<svg>` element. Text is escaped.
    pub fn svg(&self) -> String {
        let values = self
            .groups
            .iter()
            .flat_map(|(_, bars)| bars.iter().flatten())
            .flat_map(|p| [p.y, p.bar.map_or(p.y, |b| b.1)]);
        let axis = Axis::new(values, false, true);
        let bars = self.series.len().max(1) as f64;
        let group = 18.0 + bars * 13.0 + 6.0;
        let plot_height = group * self.groups.len() as f64;
        let legend = Legend::new(self.series.iter().map(String::as_str));
        let height = TOP + plot_height + 44.0 + legend.height();
        let left = 14.0;
        let span = WIDTH - left - 64.0;
        let px = |v: f64| left + span * axis.place(v);
        let mut svg = open(height, &self.title);
        let base = TOP + plot_height;
        for tick in axis.ticks() {
            line(&mut svg, "grid", px(tick), TOP, px(tick), base);
            text(&mut svg, px(tick), base + 16.0, "middle", &tick_text(tick));
        }
        line(&mut svg, "axis", left, TOP, left, base);
        text(
            &mut svg,
            left + span / 2.0,
            base + 34.0,
            "middle",
            &self.x_label,
        );
        for (g, (label, points)) in self.groups.iter().enumerate() {
            let top = TOP + g as f64 * group;
            text(&mut svg, left + 4.0, top + 13.0, "start", label);
            for (i, point) in points.iter().enumerate() {
                let y = top + 18.0 + i as f64 * 13.0;
                match point {
                    Some(p) if p.y.is_finite() => {
                        let _ = write!(
                            svg,
                            r#"<rect class="s{} bar" x="{left}" y="{y:.1}" width="{:.1}" height="10" rx="1.5"/>"#,
                            i % COLOURS,
                            (px(p.y) - left).max(0.5)
                        );
                        let mut end = px(p.y);
                        if let Some((low, high)) = p.bar.filter(|(a, b)| a < b) {
                            let (a, b) = (px(low), px(high));
                            line(&mut svg, "whisker", a, y + 5.0, b, y + 5.0);
                            line(&mut svg, "whisker", a, y + 2.0, a, y + 8.0);
                            line(&mut svg, "whisker", b, y + 2.0, b, y + 8.0);
                            end = end.max(b);
                        }
                        text(&mut svg, end + 5.0, y + 9.5, "start", &show(p.y, None));
                    }
                    _ => text(&mut svg, left + 4.0, y + 9.5, "start", "not run"),
                }
            }
        }
        legend.draw(&mut svg, base + 50.0, |_| false);
        svg.push_str("</svg>");
        svg
    }
}

/// Colours that the page defines; later series start over, dotted.
const COLOURS: usize = 7;

fn colour(series: usize) -> String {
    let dotted = if series < COLOURS { "" } else { " again" };
    format!("s{}{dotted}", series % COLOURS)
}

/// Labels in rows below the plot.
struct Legend<'a> {
    rows: Vec<Vec<(usize, &'a str, f64)>>,
}

impl<'a> Legend<'a> {
    fn new(labels: impl Iterator<Item = &'a str>) -> Self {
        let mut rows: Vec<Vec<(usize, &str, f64)>> = vec![Vec::new()];
        let mut x = 0.0;
        for (i, label) in labels.enumerate() {
            // About the width of a 12 unit sans serif letter.
            let width = 34.0 + 6.6 * label.chars().count() as f64;
            if x + width > WIDTH - 20.0 && x > 0.0 {
                rows.push(Vec::new());
                x = 0.0;
            }
            if let Some(row) = rows.last_mut() {
                row.push((i, label, x));
            }
            x += width;
        }
        Self { rows }
    }

    fn height(&self) -> f64 {
        10.0 + 18.0 * self.rows.len() as f64
    }

    fn draw(&self, svg: &mut String, top: f64, dashed: impl Fn(usize) -> bool) {
        for (r, row) in self.rows.iter().enumerate() {
            let y = top + 8.0 + 18.0 * r as f64;
            for (i, label, x) in row {
                let class = format!("{}{}", colour(*i), if dashed(*i) { " level" } else { "" });
                let x = x + 14.0;
                line(svg, &class, x, y - 4.0, x + 18.0, y - 4.0);
                text(svg, x + 23.0, y, "start", label);
            }
        }
    }
}

fn open(height: f64, title: &str) -> String {
    let title = escape(title);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{title}"><title>{title}</title>"#
    )
}

fn line(svg: &mut String, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
    let _ = write!(
        svg,
        r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let _ = write!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escape(content)
    );
}

/// Style of a plot that stands alone in a file, light and dark.
pub const STYLE: &str = include_str!("plot.css");

/// A plot with its style, for a file of its own.
pub fn standalone(svg: &str) -> String {
    match svg.find('>') {
        Some(end) => format!(
            "{}<style>{STYLE}</style>{}\n",
            &svg[..=end],
            &svg[end + 1..]
        ),
        None => svg.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(x: f64, y: f64) -> Point {
        Point {
            x,
            y,
            bar: Some((y * 0.9, y * 1.1)),
        }
    }

    fn plot(log: bool) -> LinePlot {
        LinePlot {
            title: "a < b & c".into(),
            x_label: "N".into(),
            y_label: "error (%)".into(),
            log,
            log_x: false,
            series: vec![
                Series {
                    label: "ours".into(),
                    points: vec![point(1.0, 2.0), point(3.0, 200.0)],
                    level: false,
                    dots: true,
                },
                Series {
                    label: "level".into(),
                    points: vec![point(0.0, 50.0)],
                    level: true,
                    dots: false,
                },
            ],
        }
    }

    #[test]
    fn a_plot_has_axes_labels_legend_and_error_bars() {
        for log in [false, true] {
            let svg = plot(log).svg();
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
            for part in [
                "error (%)",
                ">N<",
                ">ours<",
                ">level<",
                "level\"",
                "<circle",
                "a &lt; b &amp; c",
            ] {
                assert!(svg.contains(part), "{part} in {svg}");
            }
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn bars_have_whiskers_where_there_is_a_spread() {
        let bars = |bar| BarPlot {
            title: "t".into(),
            x_label: "ms".into(),
            series: vec!["ours".into()],
            groups: vec![(
                "row".into(),
                vec![Some(Point {
                    x: 0.0,
                    y: 2.0,
                    bar,
                })],
            )],
        };
        assert_eq!(bars(Some((1.5, 2.5))).svg().matches("whisker").count(), 3);
        assert_eq!(bars(Some((2.0, 2.0))).svg().matches("whisker").count(), 0);
        assert_eq!(bars(None).svg().matches("whisker").count(), 0);
    }

    #[test]
    fn odd_numbers_do_not_break_a_plot() {
        let mut p = plot(true);
        p.series[0].points = vec![point(1.0, f64::NAN), point(1.0, 0.0), point(1.0, -5.0)];
        let svg = p.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(!LinePlot::default().svg().contains("NaN"));
        assert!(!BarPlot::default().svg().contains("NaN"));
    }

    #[test]
    fn both_axes_can_be_logarithmic() {
        let mut p = plot(true);
        p.log_x = true;
        p.series[0].points = [1.0, 10.0, 100.0, 0.0].map(|x| point(x, 1.0 / x)).to_vec();
        let svg = p.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        // Points a decade apart are as far from each other.
        let at: Vec<f64> = svg
            .split("cx=\"")
            .skip(1)
            .filter_map(|rest| rest.split('"').next()?.parse().ok())
            .collect();
        assert!((at[2] - 2.0 * at[1] + at[0]).abs() < 0.2, "{at:?}");
        for tick in [">1<", ">10<", ">100<"] {
            assert!(svg.contains(tick), "{tick} in {svg}");
        }
    }

    #[test]
    fn small_and_fractional_places_have_ticks() {
        let mut p = plot(false);
        p.series[0].points = (0..4).map(|i| point(0.01 * f64::from(i), 1.0)).collect();
        let svg = p.svg();
        assert!(svg.contains(">0.01<") && svg.contains(">0.03<"), "{svg}");
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(tick_text(120_000.0), "1.2e5");
        assert_eq!(tick_text(3.0 * 0.000_02), "6e-5");

        let axis = Axis::new([0.3, 9.2].into_iter(), false, true);
        assert_eq!(axis.ticks(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        let axis = Axis::new([0.01, 100.0].into_iter(), true, false);
        assert_eq!(axis.ticks(), [0.01, 0.1, 1.0, 10.0, 100.0]);
    }
}
