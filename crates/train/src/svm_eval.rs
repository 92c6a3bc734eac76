//! The paper's last classifier on a trained network: linear SVMs, one against all, on normalised
//! representations.

use candle_core::{DType, Device};
use isqrt_models::Network;
use isqrt_nn::Mode;

use crate::collective::Single;
use crate::data::RunData;
use crate::evaluate::mean_of_views;
use crate::feeder::Feeder;
use crate::run::{SvmOutcome, job};
use crate::svm::{Svm, SvmConfig, l2_normalise};
use crate::{Error, Feed, Result, SpecFile};

/// Values that the representations of all training images may have together: 16 GiB.
const MOST_VALUES: usize = 1 << 32;

/// Fits SVMs on the training images, seen as in evaluation, and counts their answers to those of `feed`.
///
/// # Errors
/// Those of the images and the network; [`Error::Config`] where the representations do not fit into memory.
pub fn svm(
    network: &Network,
    file: &SpecFile,
    data: &RunData,
    feed: &Feed,
    c: f64,
) -> Result<SvmOutcome> {
    let dim = network.out_dim();
    let total = data.train_as_eval.images.len();
    if total.checked_mul(dim).is_none_or(|n| n > MOST_VALUES) {
        return Err(Error::Config {
            what: "evaluation.svm",
            value: c.to_string(),
            expected: format!(
                "a smaller set: {total} representations of {dim} values do not fit into memory"
            ),
        });
    }
    let mut rows = Vec::with_capacity(total * dim);
    let mut labels = Vec::with_capacity(total);
    represent(network, file, data, &data.train_as_eval, |values, of| {
        rows.extend(values);
        labels.extend(of);
        Ok(())
    })?;
    let config = SvmConfig {
        c,
        ..SvmConfig::default()
    };
    let svm = Svm::fit(&rows, dim, &labels, data.classes.len(), &config)?;
    drop(rows);
    let (mut correct, mut seen) = (0, 0);
    represent(network, file, data, feed, |values, of| {
        for (row, &label) in values.chunks_exact(dim).zip(of) {
            seen += 1;
            correct += u64::from(svm.predict(row)? == label);
        }
        Ok(())
    })?;
    let unconverged = svm.unconverged().count();
    let note = match unconverged {
        0 => String::new(),
        n => format!("{n} of {} did not converge", data.classes.len()),
    };
    Ok(SvmOutcome {
        c,
        error: 100.0 * (seen - correct) as f64 / seen.max(1) as f64,
        correct,
        total: seen,
        note,
    })
}

/// Hands over normalised representations, the mean over the views of an image, batch by batch.
fn represent(
    network: &Network,
    file: &SpecFile,
    data: &RunData,
    feed: &Feed,
    mut each: impl FnMut(Vec<f32>, &[u32]) -> Result<()>,
) -> Result<()> {
    let config = file.spec.config(data.info.classes);
    let loader = job(file, data, &config, (&Device::Cpu, &Single)).eval_loader(feed)?;
    let feeder = Feeder::new(&loader, network)?;
    for batch in loader.epoch(0)? {
        let batch = batch?;
        if batch.is_empty() {
            continue;
        }
        let images = feeder.images(&batch)?;
        let values = network.represent(&images, Mode::Eval)?.flatten_from(1)?;
        let values = mean_of_views(&values, batch.views)?.to_dtype(DType::F32)?;
        let mut values = values.flatten_all()?.to_vec1::<f32>()?;
        l2_normalise(&mut values, network.out_dim());
        each(values, &batch.labels)?;
    }
    Ok(())
}
