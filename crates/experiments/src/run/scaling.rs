//! Time and memory of the layer at growing sizes, and the powers that they follow.

use super::Tick;
use super::head::failed;
use super::layer;
use crate::error::Result;
use crate::record::Measurement;
use crate::spec::{LayerSettings, ScalingSettings};
use candle_core::Device;
use isqrt_models::RepresentationSpec;
use isqrt_models::representations::isqrt;

/// For each series: milliseconds of forward and backward of the whole batch (`ms:d=64`), megabytes that
/// wait for the backward pass (`memory:d=64`), and the exponents of fitted powers.
pub(super) fn run(
    head: &RepresentationSpec,
    settings: &ScalingSettings,
    device: &Device,
    tick: &mut Tick<'_>,
) -> Result<Vec<Measurement>> {
    let mut measurements = Vec::new();
    for (name, place, values) in settings.series() {
        let (mut times, mut kept) = (Vec::new(), Vec::new());
        for &value in values {
            let mut size = ScalingSettings::MIDDLE;
            size[place] = value;
            let [batch, dim, positions, iterations] = size;
            let head = head.clone().with("iterations", iterations);
            let shape = LayerSettings {
                batch,
                dim,
                positions,
                repeats: settings.repeats,
            };
            // The first is that of both passes, an image.
            let timing = layer::run(&head, &shape, device, tick)?.swap_remove(0);
            let whole = |ms: Option<f64>| ms.map(|ms| ms * batch as f64);
            let metric = format!("ms:{name}={value}");
            measurements.push(Measurement {
                metric,
                value: timing.value * batch as f64,
                unit: "ms".to_owned(),
                low: whole(timing.low),
                high: whole(timing.high),
                ..Measurement::default()
            });
            times.push((value as f64, timing.value * batch as f64));
            let described = isqrt::layer(&head.options)
                .map_err(failed)?
                .describe(dim, positions);
            let bytes = described.map_err(failed)?.kept_bytes * batch;
            let megabytes = bytes as f64 / 1e6;
            measurements.push(Measurement::new(
                &format!("memory:{name}={value}"),
                megabytes,
                "MB",
            ));
            kept.push((value as f64, megabytes));
        }
        for (what, points) in [("exponent", &times), ("memory_exponent", &kept)] {
            let metric = format!("{what}:{name}");
            measurements.push(match points.iter().all(|p| p.1 == 0.0) {
                true => Measurement::in_words(&metric, "nothing kept"),
                false => Measurement::new(&metric, exponent(points), "power"),
            });
        }
    }
    Ok(measurements)
}

/// Slope of the line through the logarithms that is nearest by squares.
fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs = || {
        points
            .iter()
            .filter(|p| p.1 > 0.0)
            .map(|p| (p.0.ln(), p.1.ln()))
    };
    let n = logs().count() as f64;
    let (x, y) = logs().fold((0.0, 0.0), |(x, y), (a, b)| (x + a / n, y + b / n));
    let (xy, xx) = logs().fold((0.0, 0.0), |(xy, xx), (a, b)| {
        (xy + (a - x) * (b - y), xx + (a - x).powi(2))
    });
    xy / xx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_found() {
        let points: Vec<(f64, f64)> = [1.0, 2.0, 5.0].map(|x| (x, 3.0 * f64::powf(x, 2.5))).into();
        assert!((exponent(&points) - 2.5).abs() < 1e-12);
    }
}
