//! From the bytes of a batch to the input of a network.

#[cfg(feature = "cuda")]
use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};
use isqrt_datasets::{Batch, Loader};
use isqrt_models::Network;

use crate::Result;

/// Makes inputs of batches, where the network is: on a GPU bytes are copied while it works on the batch
/// before, and normalised there.
#[derive(Debug)]
pub struct Feeder {
    levels: [[f32; 256]; 3],
    dtype: DType,
    device: Device,
    #[cfg(feature = "cuda")]
    uploads: Option<RefCell<isqrt_device::cuda::Uploads>>,
}

impl Feeder {
    /// For the batches of a loader.
    ///
    /// # Errors
    /// Where the GPU has no memory left.
    pub fn new(loader: &Loader, network: &Network) -> Result<Self> {
        let device = network.vars().device().clone();
        let levels = *loader.levels();
        #[cfg(feature = "cuda")]
        let uploads = match &device {
            Device::Cuda(gpu) => Some(isqrt_device::cuda::Uploads::new(gpu, &levels)?),
            _ => None,
        };
        Ok(Self {
            levels,
            dtype: network.vars().dtype(),
            device,
            #[cfg(feature = "cuda")]
            uploads: uploads.map(RefCell::new),
        })
    }

    /// `(images * views, 3, height, width)`, normalised.
    ///
    /// # Errors
    /// Where the GPU has no memory left.
    pub fn images(&self, batch: &Batch) -> Result<Tensor> {
        let shape = (batch.len() * batch.views, 3, batch.height, batch.width);
        #[cfg(feature = "cuda")]
        if let Some(uploads) = &self.uploads {
            let bytes = batch.images.iter().map(Vec::as_slice);
            let shape = (shape.0, batch.height, batch.width);
            return Ok(uploads.borrow_mut().images(bytes, shape, self.dtype)?);
        }
        let images = Tensor::from_vec(batch.normalised(&self.levels), shape, &self.device)?;
        Ok(images.to_dtype(self.dtype)?)
    }
}
