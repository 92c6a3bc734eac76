//! What PyTorch's ops computed (`tools/golden/nn.py`), and what here stands for it: for the tests and for
//! `isqrt doctor`, which runs the same on any device.

use candle_core::Tensor;

use crate::Result;
use crate::ops::{
    Activation, Conv, LocalResponseNorm, Pool, adaptive_avg_pool2d, avg_pool2d, channel_shuffle,
    cross_entropy, local_response_norm, max_pool2d, relu6,
};

/// An op of one tensor.
pub type Op = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// A safetensors file: of each case of an op of one tensor, `input.OP` and the case's `y`, upstream gradient `g`
/// and `dx`; of each convolution also `x`, `w`, `dw` and, with a bias, `b`, `db`; in f64.
pub const OPS: &[u8] = include_bytes!("../tests/golden/nn.safetensors");

/// What a case `OP.number-number-...` stands for; none for another name.
#[must_use]
pub fn op(name: &str) -> Option<Op> {
    let (op, options) = name.split_once('.')?;
    let options = options.split('-').map(|v| v.parse().ok());
    let options: Vec<f64> = options.collect::<Option<_>>()?;
    let number = |at: usize| options.get(at).copied();
    let whole = |at: usize| number(at).map(|v| v as usize);
    let pool = || {
        Some(Pool {
            kernel: (whole(0)?, whole(1)?),
            stride: (whole(2)?, whole(3)?),
            padding: (whole(4)?, whole(5)?),
            ceil_mode: whole(6)? == 1,
            count_include_pad: whole(7) != Some(0),
        })
    };
    Some(match op {
        "relu6" => Box::new(relu6),
        "channel_shuffle" => Box::new(|x| {
            let halves = x.chunk(2, 1)?;
            channel_shuffle(&halves[0], &halves[1])
        }),
        "max_pool2d" => {
            let pool = pool()?;
            Box::new(move |x| max_pool2d(x, pool))
        }
        "avg_pool2d" => {
            let pool = pool()?;
            Box::new(move |x| avg_pool2d(x, pool))
        }
        "adaptive_avg_pool2d" => {
            let size = (whole(0)?, whole(1)?);
            Box::new(move |x| adaptive_avg_pool2d(x, size))
        }
        "local_response_norm" => {
            let norm = LocalResponseNorm {
                size: whole(0)?,
                alpha: number(1)?,
                beta: number(2)?,
                k: number(3)?,
            };
            Box::new(move |x| local_response_norm(x, norm))
        }
        "cross_entropy" => {
            let smoothing = number(0)?;
            Box::new(move |x| cross_entropy(x, &[0, 4, 2, 2, 1, 3], smoothing))
        }
        _ => return None,
    })
}

/// The options of a case `conv2d.number-number-...`.
#[must_use]
pub fn convolution(name: &str) -> Option<Conv> {
    let options = name.strip_prefix("conv2d.")?.split('-');
    let options = options.map(|v| v.parse().ok());
    let o: Vec<usize> = options.collect::<Option<_>>()?;
    let pair = |at: usize| Some((*o.get(at)?, *o.get(at + 1)?));
    Some(Conv {
        stride: pair(8)?,
        padding: pair(10)?,
        dilation: pair(12)?,
        groups: *o.get(14)?,
        activation: Activation::None,
    })
}
