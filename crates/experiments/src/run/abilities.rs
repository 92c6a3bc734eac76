//! What a layer is and does, found out by running it: by which factorisations of matrices it works
//! forward and backward, whether its gradient is that of its output, and what more threads gain.

use super::head::{Layer, failed};
use super::probe::{features, probe, weigh};
use crate::error::Result;
use crate::record::Measurement;
use crate::spec::LayerSettings;
use candle_core::{DType, Device, Tensor, Var};
use isqrt_linalg::Factorisations;
use isqrt_models::RepresentationSpec;
use std::time::Instant;

/// Sizes of the gradient's check: double precision, few enough that all is quick.
const SMALL: [usize; 3] = [2, 16, 24];
/// Step of the central difference, relative to the features' size of about one.
const STEP: f64 = 1e-7;
/// Passes of which the fastest counts.
const PASSES: usize = 3;

pub(super) fn run(head: &RepresentationSpec, settings: &LayerSettings) -> Result<Vec<Measurement>> {
    let x = features([1, settings.dim, settings.positions])?;
    let [forward, backward] = factorisations(head, &x)?;
    let threads = rayon::current_num_threads();
    let mut measurements = vec![
        Measurement::in_words("forward_by", forward),
        Measurement::in_words("backward_by", backward),
        Measurement::new("gradient_check", gradient_check(head)?, "relative"),
    ];
    if threads == 1 {
        let words = "not asked: one thread";
        measurements.push(Measurement::in_words("thread_gain", words.to_owned()));
    } else {
        let x = features([settings.batch, settings.dim, settings.positions])?;
        let x = x.to_dtype(DType::F32).map_err(failed)?;
        let seconds = [1, threads].map(|threads| on_threads(head, &x, threads));
        let [one, all] = seconds;
        measurements.push(Measurement::new("thread_gain", one? / all?, "times"));
    }
    Ok(measurements)
}

/// In words, what an image takes beside products of matrices, in each pass.
fn factorisations(head: &RepresentationSpec, x: &Tensor) -> Result<[String; 2]> {
    let layer = Layer::new(head, x.dim(1).map_err(failed)?, DType::F32, &Device::Cpu)?;
    let x = x.to_dtype(DType::F32).and_then(|x| Var::from_tensor(&x));
    let x = x.map_err(failed)?;
    let before = Factorisations::so_far();
    let y = layer.forward(&x)?;
    let between = Factorisations::so_far();
    weigh(&y)?.backward().map_err(failed)?;
    let after = Factorisations::so_far();
    Ok([(before, between), (between, after)].map(|(from, to)| {
        let counts = [
            ("EIG", to.eig - from.eig),
            ("SVD", to.svd - from.svd),
            ("linear systems", to.cholesky - from.cholesky),
        ];
        let used: Vec<String> = counts
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| match count {
                1 => name.to_owned(),
                n => format!("{n} {name}"),
            })
            .collect();
        match used.is_empty() {
            true => "products only".to_owned(),
            false => used.join(" and "),
        }
    }))
}

/// Relative difference of the derivative along a direction and a central difference.
fn gradient_check(head: &RepresentationSpec) -> Result<f64> {
    let x = features(SMALL)?;
    let direction: Vec<f64> = (0..x.elem_count())
        .map(|i| ((i * 13 + i / 5 * 7) % 19) as f64 / 9.0 - 1.0)
        .collect();
    let direction = Tensor::from_vec(direction, x.shape(), x.device()).map_err(failed)?;
    let found = probe(head, &x, DType::F64)?;
    let slope = (found.gradient.mul(&direction))
        .and_then(|x| x.sum_all()?.to_scalar::<f64>())
        .map_err(failed)?;
    let layer = Layer::new(head, SMALL[1], DType::F64, &Device::Cpu)?;
    let at = |step: f64| -> Result<f64> {
        let moved = (direction.affine(step, 0.0))
            .and_then(|d| x.add(&d))
            .map_err(failed)?;
        let value = weigh(&layer.forward(&moved)?)?;
        value.to_scalar::<f64>().map_err(failed)
    };
    let difference = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
    Ok((slope - difference).abs() / difference.abs().max(1e-300))
}

/// Seconds of both passes with so many threads.
fn on_threads(head: &RepresentationSpec, x: &Tensor, threads: usize) -> Result<f64> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let layer = Layer::new(head, x.dim(1).map_err(failed)?, DType::F32, &Device::Cpu)?;
    let x = Var::from_tensor(x).map_err(failed)?;
    pool.map_err(failed)?.install(|| {
        let mut best = f64::INFINITY;
        for _ in 0..=PASSES {
            let start = Instant::now();
            let gradients = layer.forward(&x)?.sum_all().and_then(|y| y.backward());
            drop(gradients.map_err(failed)?);
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    })
}
