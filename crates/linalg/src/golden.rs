//! What PyTorch computed (`tools/golden/layer.py`, `heads.py`), and what here stands for it: for the tests and
//! for `isqrt doctor`, which runs the same on any device.

use candle_core::Tensor;

use crate::approximant::Approximant;
use crate::bilinear::{Bilinear, CompactBilinear, ImprovedBilinear, NewtonOrSvd, Projection};
use crate::eig::{DeepO2P, GaussianEmbedding, MpnCov, SvdPade};
use crate::{CovPool, Memory, PreNormalization, Result, Root, Schedule, Side};

/// Features to a representation.
pub type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// A safetensors file: of each case `x`, `y`, the upstream gradient `g` and `dx`, in f64.
pub const LAYER: &[u8] = include_bytes!("../tests/golden/layer.safetensors");

/// The same for the other methods that pool a second moment.
pub const HEADS: &[u8] = include_bytes!("../tests/golden/heads.safetensors");

fn layer(f: impl Fn(&Tensor) -> Result<Tensor> + 'static) -> Layer {
    Box::new(f)
}

/// Every way in which we compute what a case of [`LAYER`] stands for; none for another name.
#[must_use]
pub fn layers(name: &str) -> Option<Vec<Layer>> {
    let mut parts = name.split('.').skip(1);
    let (kind, number) = (parts.next()?, parts.next());
    if let Some(power) = kind.strip_prefix("mpn-") {
        let pool = MpnCov {
            power: format!("{power}.{}", number?).parse().ok()?,
            ..MpnCov::default()
        };
        return Some(vec![layer(move |x| pool.forward(x))]);
    }
    if kind == "plain" {
        return Some(vec![layer(|x| CovPool::plain().forward(x))]);
    }
    let iterations = number?.parse().ok()?;
    let mut all = Vec::new();
    for side in [Side::Auto, Side::Covariance, Side::Gram] {
        for memory in [Memory::Keep, Memory::Lean] {
            let pool = CovPool::with_root(Root {
                schedule: Schedule::NewtonSchulz { iterations },
                pre_normalization: match kind {
                    "frobenius" => PreNormalization::Frobenius,
                    _ => PreNormalization::Trace,
                },
                post_compensation: kind != "trace-alone",
                side,
                memory,
            });
            all.push(layer(move |x| pool.forward(x)));
        }
    }
    Some(all)
}

/// What a case `shape.head-option-...` of [`HEADS`] stands for, whose further tensors `tensor` gives.
#[must_use]
pub fn head(name: &str, tensor: impl Fn(&str) -> Option<Tensor>) -> Option<Layer> {
    let mut words = name.split_once('.')?.1.split('-');
    let head = words.next()?;
    let options: Vec<&str> = words.collect();
    let number = |at: usize| options.get(at)?.parse::<f64>().ok();
    let pair = |a: &str, b: &str| Some([tensor(a)?, tensor(b)?]);
    Some(match head {
        "deepo2p" => layer(|x| DeepO2P::default().forward(x)),
        "g2denet" => {
            let pool = GaussianEmbedding {
                beta: number(0)?,
                epsilon: number(1)?,
                ..GaussianEmbedding::default()
            };
            layer(move |x| pool.forward(x))
        }
        "bcnn" => layer(|x| Bilinear.forward(x)),
        "impbcnn" => {
            let root = match *options.first()? {
                "svd" => NewtonOrSvd::Svd,
                n => NewtonOrSvd::Newton {
                    iterations: n.parse().ok()?,
                },
            };
            let pool = ImprovedBilinear {
                root,
                ..ImprovedBilinear::default()
            };
            layer(move |x| pool.forward(x))
        }
        "mtp" | "mpa" => {
            let degree = options.first()?.parse().ok()?;
            let pool = match head {
                "mtp" => Approximant::taylor(),
                _ => Approximant::pade(),
            };
            layer(move |x| Approximant { degree, ..pool }.forward(x))
        }
        "svd_pade" => layer(|x| SvdPade::default().forward(x)),
        "cbp" => {
            let signs = pair("s1", "s2")?;
            let projection = match *options.first()? {
                "sketch" => Projection::TensorSketch {
                    hashes: pair("h1", "h2")?,
                    signs,
                    dim: 32,
                },
                _ => Projection::RandomMaclaurin { signs },
            };
            let pool = CompactBilinear { projection };
            layer(move |x| pool.forward(x))
        }
        _ => return None,
    })
}
