//! What a network makes of a set of images.

use candle_core::{DType, Tensor};
use isqrt_datasets::Loader;
use isqrt_models::Network;
use isqrt_nn::Mode;

use crate::collective::Collective;
use crate::feeder::Feeder;
use crate::{Error, Result, Tally};

/// Counts the answers of a network, in evaluation mode, to all images of a loader. Logits of several views
/// of an image are averaged. `each` hears of every batch that is done.
///
/// # Errors
/// Where the images do not fit the network or its features are not finite; [`Error::Output`] where its
/// answers are not.
pub fn evaluate(
    network: &Network,
    loader: &Loader,
    collective: &dyn Collective,
    mut each: impl FnMut(usize),
) -> Result<Tally> {
    let _span = tracing::info_span!("evaluate").entered();
    let mut tally = Tally::new(network.spec().classes);
    let feeder = Feeder::new(loader, network)?;
    for batch in loader.epoch(0)? {
        let batch = batch?;
        if !batch.is_empty() {
            let images = feeder.images(&batch)?;
            let logits = network.forward(&images, Mode::Eval)?;
            let logits = mean_of_views(&logits, batch.views)?;
            let rows = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for (row, &label) in rows.iter().zip(&batch.labels) {
                if !tally.add(row, label) {
                    return Err(Error::Output);
                }
            }
        }
        each(batch.len());
    }
    for sums in tally.sums() {
        collective.all_reduce_sums(sums)?;
    }
    Ok(tally)
}

/// `(images * views, n)` to `(images, n)`.
pub(crate) fn mean_of_views(values: &Tensor, views: usize) -> Result<Tensor> {
    if views == 1 {
        return Ok(values.clone());
    }
    let (rows, n) = values.dims2()?;
    Ok(values.reshape((rows / views, views, n))?.mean(1)?)
}
