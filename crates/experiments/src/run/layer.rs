//! Time of one layer, forward and backward, through the autograd as a training step does them.

use super::Tick;
use super::head::{Layer, failed};
use crate::error::{Error, Result};
use crate::record::Measurement;
use crate::spec::LayerSettings;
use candle_core::{DType, Device, Var};
use isqrt_linalg::bench::synthetic_features;
use isqrt_models::RepresentationSpec;
use std::time::Instant;

/// Median and quartiles, in milliseconds an image, of forward + backward, forward, and backward.
pub(super) fn run(
    head: &RepresentationSpec,
    settings: &LayerSettings,
    device: &Device,
    tick: &mut Tick<'_>,
) -> Result<Vec<Measurement>> {
    let layer = Layer::new(head, settings.dim, DType::F32, device)?;
    let features = synthetic_features(settings.batch, settings.dim, settings.positions);
    let features = features.map_err(failed)?.to_device(device);
    let x = Var::from_tensor(&features.map_err(failed)?).map_err(failed)?;
    let wait = || device.synchronize().map_err(failed);
    let repeats = settings.repeats.max(3);
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    // The first round warms caches and workspaces up and is not counted.
    for round in 0..=repeats {
        wait()?;
        let start = Instant::now();
        let y = layer.forward(&x)?;
        wait()?;
        let forward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let gradients = y.backward().map_err(failed)?;
        wait()?;
        let backward = start.elapsed().as_secs_f64();
        drop(gradients);
        if round > 0 {
            for (list, time) in times
                .iter_mut()
                .zip([forward + backward, forward, backward])
            {
                list.push(time * 1e3 / settings.batch as f64);
            }
        }
        let fraction = (round + 1) as f64 / (repeats + 1) as f64;
        if tick(fraction, "timing").is_break() {
            return Err(Error::Stopped);
        }
    }
    let names = ["forward_backward_ms", "forward_ms", "backward_ms"];
    Ok(names
        .into_iter()
        .zip(times)
        .map(|(name, list)| summary(name, list, "ms/image"))
        .collect())
}

/// Median with quartiles.
pub(super) fn summary(metric: &str, mut times: Vec<f64>, unit: &str) -> Measurement {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = share * times.len().saturating_sub(1) as f64;
        let (low, high) = (place.floor() as usize, place.ceil() as usize);
        match (times.get(low), times.get(high)) {
            (Some(a), Some(b)) => a + (b - a) * place.fract(),
            _ => f64::NAN,
        }
    };
    Measurement::with_spread(metric, at(0.5), at(0.25), at(0.75), unit)
}
