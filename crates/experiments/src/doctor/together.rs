//! Several devices that share work.

use candle_core::{DType, Device};
use isqrt_train::{Collective, Rank};

use super::{Outcome, distance, home, noise, place, within};

/// Sums of a large and of a small tensor over ranks on these devices, a thread each: right within rounding, and
/// the same bits on all.
pub(super) fn sums(devices: &[Device]) -> Outcome {
    const SHAPES: [&[usize]; 2] = [&[300, 257], &[3]];
    let of = |rank: &Rank, device: &Device| -> isqrt_train::Result<Vec<Vec<f64>>> {
        let mut bucket = vec![];
        for shape in SHAPES {
            let own = (noise(shape, 0.1)? * (rank.rank() + 1) as f64)?;
            bucket.push((format!("{shape:?}"), place(&own, DType::F32, device)?));
        }
        rank.all_reduce(&mut bucket)?;
        let sums = bucket.iter().map(|(_, sum)| home(sum));
        Ok(sums.collect::<candle_core::Result<_>>()?)
    };
    let found = Rank::on_each(devices, of)?;
    let found = found.into_iter().collect::<Result<Vec<_>, _>>()?;
    let times = (devices.len() * (devices.len() + 1) / 2) as f64;
    let mut worst = 0.0_f64;
    for sums in &found {
        for (sum, shape) in sums.iter().zip(SHAPES) {
            worst = worst.max(distance(sum, &home(&(noise(shape, 0.1)? * times)?)?));
        }
    }
    let others = found.iter().skip(1).filter(|sums| *sums != &found[0]);
    let findings = within(worst, 1e-6);
    Ok(findings.figure("devices with other bits", others.count() as f64, 0.0))
}
