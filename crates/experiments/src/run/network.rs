//! Time of whole networks with a head: an image's pass forward and backward, and images a second.

use super::Tick;
use super::head::failed;
use super::layer::summary;
use crate::error::{Error, Result};
use crate::record::Measurement;
use crate::spec::NetworkSettings;
use candle_core::{DType, Device, Tensor};
use isqrt_models::{ModelSpec, Network, RepresentationSpec};
use isqrt_nn::Mode;
use isqrt_nn::ops::cross_entropy;
use std::time::Instant;

/// Milliseconds an image of a training step's two passes together, and of the first.
pub(super) fn time(
    head: &RepresentationSpec,
    settings: &NetworkSettings,
    device: &Device,
    tick: &mut Tick<'_>,
) -> Result<Vec<Measurement>> {
    let network = build(head, settings, device)?;
    let times = passes(&network, settings, settings.batch, tick)?;
    let [forward, both] = times.map(|list| {
        let an_image = list.into_iter().map(|s| s * 1e3 / settings.batch as f64);
        an_image.collect::<Vec<f64>>()
    });
    Ok(vec![
        summary("network_ms", both, "ms/image"),
        summary("network_forward_ms", forward, "ms/image"),
        Measurement::new(
            "parameters",
            network.vars().parameter_count() as f64,
            "values",
        ),
    ])
}

/// Images a second of both passes, for each batch, on one thread and on all.
pub(super) fn throughput(
    head: &RepresentationSpec,
    settings: &NetworkSettings,
    device: &Device,
    tick: &mut Tick<'_>,
) -> Result<Vec<Measurement>> {
    let network = build(head, settings, device)?;
    let mut measurements = Vec::new();
    for (name, threads) in [("all", rayon::current_num_threads()), ("1", 1)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(failed)?;
        for &batch in &settings.batches {
            let mut seconds = Vec::new();
            // Only the passes are in the pool: the tick need not be.
            for round in 0..=settings.repeats.max(1) {
                let [_, both] = pool.install(|| pass(&network, settings, batch))?;
                if round > 0 {
                    seconds.push(batch as f64 / both);
                }
                if tick(0.0, "timing").is_break() {
                    return Err(Error::Stopped);
                }
            }
            let metric = format!("images_per_s:{batch}:{name}");
            measurements.push(summary(&metric, seconds, "images/s"));
        }
    }
    Ok(measurements)
}

/// Seconds of a training step's passes of a network, measured after one that is not counted.
pub(super) fn step_seconds(
    model: &ModelSpec,
    side: usize,
    batch: usize,
    device: &Device,
) -> Result<f64> {
    let network = Network::new(model, 1, DType::F32, device).map_err(failed)?;
    let settings = NetworkSettings {
        side,
        classes: model.classes,
        ..NetworkSettings::default()
    };
    pass(&network, &settings, batch)?;
    Ok(pass(&network, &settings, batch)?[1])
}

/// The backbone with the head as it was published with it.
fn build(
    head: &RepresentationSpec,
    settings: &NetworkSettings,
    device: &Device,
) -> Result<Network> {
    let name = format!("{}+{}", settings.backbone.name, head.name);
    let mut spec = ModelSpec::named(&name, settings.classes).map_err(failed)?;
    spec.representation = head.clone();
    if !settings.backbone.options.is_empty() {
        spec.backbone = settings.backbone.clone();
    }
    Network::new(&spec, 1, DType::F32, device).map_err(failed)
}

/// Seconds of repeats: forward, and forward with backward. The first pass is not counted.
fn passes(
    network: &Network,
    settings: &NetworkSettings,
    batch: usize,
    tick: &mut Tick<'_>,
) -> Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    let repeats = settings.repeats.max(1);
    for round in 0..=repeats {
        let pass = pass(network, settings, batch)?;
        if round > 0 {
            for (list, time) in times.iter_mut().zip(pass) {
                list.push(time);
            }
        }
        if tick((round + 1) as f64 / (repeats + 1) as f64, "timing").is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(times)
}

/// Seconds of one pass forward, and of that with the backward pass.
fn pass(network: &Network, settings: &NetworkSettings, batch: usize) -> Result<[f64; 2]> {
    let shape = (batch, 3, settings.side, settings.side);
    let device = network.vars().device();
    let images = Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).map_err(failed)?;
    let images = images.to_device(device).map_err(failed)?;
    let wait = || device.synchronize().map_err(failed);
    let labels: Vec<u32> = (0..batch).map(|i| (i % settings.classes) as u32).collect();
    // Masks of dropout follow the step.
    network.vars().set_step(0);
    wait()?;
    let start = Instant::now();
    let logits = network.forward(&images, Mode::Train).map_err(failed)?;
    let loss = cross_entropy(&logits, &labels, 0.0).map_err(failed)?;
    wait()?;
    let forward = start.elapsed().as_secs_f64();
    let gradients = network.vars().backward(&loss).map_err(failed)?;
    wait()?;
    let both = start.elapsed().as_secs_f64();
    drop(gradients);
    Ok([forward, both])
}
