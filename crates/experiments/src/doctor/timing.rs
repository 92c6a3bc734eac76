//! What `isqrt doctor --bench` times.

use candle_core::Device;
use isqrt_linalg::CovPool;
use isqrt_linalg::bench::{DecompositionRow, LayerCase, LayerTiming, decompositions};
use isqrt_models::ModelSpec;
use isqrt_models::bench::{NetworkCase, NetworkTiming};
use isqrt_train::Precision;
use std::time::Duration;

use super::Error;

/// What [`bench()`] timed.
#[derive(Clone, Debug, PartialEq)]
pub enum Timing {
    /// The paper's layer: batch, steps, and a row an implementation.
    Layer(usize, usize, Vec<LayerTiming>),
    /// Decompositions beside it.
    Decomposition(Vec<DecompositionRow>),
    /// A training step of a network: name, batch, precision.
    Network(String, usize, Precision, NetworkTiming),
}

/// Times the paper's layer (d = 256, 14x14, N = 1, 3, 5, 7), decompositions of its covariance, and a
/// training step of ResNet-50 with it at 224x224 in each precision that the device has. A part that fails
/// does not keep the others from running: `each` hears of all.
pub fn bench(device: &Device, batch: usize, mut each: impl FnMut(Result<Timing, String>)) {
    const LAYER: Duration = Duration::from_secs(2);
    const NETWORK: Duration = Duration::from_secs(10);
    for iterations in [1, 3, 5, 7] {
        let case = LayerCase {
            pool: CovPool::isqrt(iterations),
            batch,
            d: 256,
            positions: 196,
        };
        let rows = isqrt_linalg::bench::layer(&case, device, LAYER);
        let rows = rows.map(|rows| Timing::Layer(batch, iterations, rows));
        each(rows.map_err(|error| error.to_string()));
    }
    let rows = decompositions(256, &[1, batch.min(32)], device, LAYER);
    each(rows.map(Timing::Decomposition).map_err(|e| e.to_string()));
    let precisions: &[Precision] = match device.is_cpu() {
        true => &[Precision::F32],
        false => &[Precision::F32, Precision::Tf32, Precision::Bf16],
    };
    for head in ["gap", "isqrt"] {
        for &precision in precisions {
            let name = format!("resnet50+{head}");
            each(network_step(&name, device, batch, (precision, NETWORK)));
        }
    }
    isqrt_device::set_precision(isqrt_device::Precision::Full);
}

fn network_step(
    name: &str,
    device: &Device,
    batch: usize,
    (precision, budget): (Precision, Duration),
) -> Result<Timing, String> {
    let time = || -> Result<Timing, Error> {
        precision.begin(device)?;
        let case = NetworkCase {
            model: ModelSpec::named(name, 1000)?,
            batch,
            side: 224,
            maps: precision.maps(),
        };
        let timing = isqrt_models::bench::network(&case, device, budget)?;
        Ok(Timing::Network(name.to_owned(), batch, precision, timing))
    };
    time().map_err(|error| isqrt_train::without_backtrace(&error.to_string()))
}
