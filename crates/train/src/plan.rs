//! What a run is going to do, without doing it.

use candle_core::Device;
use isqrt_models::{Description, Network};
use serde::Serialize;

use crate::data::{DataInfo, RunData};
use crate::{Error, Precision, Result, SpecFile};

/// A run before its first step.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The images.
    pub data: DataInfo,
    /// Backbone and head with their options.
    pub model: String,
    /// Rows and columns of the input in training, where they differ from those of evaluation.
    pub train_input: Option<(usize, usize)>,
    /// Stages with shapes, parameters and activations, of one image.
    pub description: Description,
    /// Length of the representation.
    pub representation: usize,
    /// Updates an epoch.
    pub updates_per_epoch: usize,
    /// Epochs.
    pub epochs: usize,
    /// Images an update.
    pub batch: usize,
    /// Images a pass.
    pub pass: usize,
    /// Memory that training needs at least.
    pub memory: MemoryEstimate,
    /// Hash of the spec.
    pub spec_hash: String,
}

/// Bytes, estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// Weights, their gradients, what the optimiser keeps, averages.
    pub parameters: u64,
    /// What a pass keeps for its backward pass.
    pub activations: u64,
}

impl MemoryEstimate {
    /// Both.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.parameters + self.activations
    }
}

impl Plan {
    /// Builds the network, runs one black image through it on the device, counts the rest. The
    /// program computes as the spec says from then on, see [`TrainConfig::begin`](crate::TrainConfig::begin).
    ///
    /// # Errors
    /// What the run would end with: a network that cannot be, a batch that the images do not fill, a
    /// pattern that no parameter has.
    pub fn new(file: &SpecFile, data: &RunData, device: &Device) -> Result<Self> {
        let spec = &file.spec;
        let config = spec.config(data.info.classes);
        config.check().map_err(|error| file.place(error))?;
        let mut network =
            Network::new(&config.model, config.seed, config.precision.dtype(), device)
                .map_err(|error| file.place(error.into()))?;
        drop(
            config
                .optimiser(network.vars())
                .map_err(|error| file.place(error))?,
        );
        let updates_per_epoch = data.info.train / config.batch;
        if updates_per_epoch == 0 {
            return Err(file.problem(
                "batch",
                &format!(
                    "is {}, more than the {} training images",
                    config.batch, data.info.train
                ),
            ));
        }
        let (height, width) = data.info.input;
        if height != width {
            return Err(file.problem(
                "data.eval_transforms",
                &format!("gives inputs of {height} x {width}, which are no squares"),
            ));
        }
        // A GPU's kernels have limits of their own (`gpu.layer`).
        config.begin(&mut network)?;
        let described = |key: &str, side: usize| {
            network.describe(side).map_err(|error| match error {
                isqrt_models::Error::Nn(error @ isqrt_nn::Error::Shape { .. }) => file.problem(
                    key,
                    &format!("does not go with images of {side} pixels: {error}"),
                ),
                error @ isqrt_models::Error::ImageSize { .. } => {
                    let is_training = key == "data.train_transforms";
                    let key = if is_training {
                        key
                    } else {
                        "data.eval_transforms"
                    };
                    file.problem(key, &error.to_string())
                }
                error => file.place(Error::from(error)),
            })
        };
        let description = described("model.backbone", height)?;
        let train_input = spec.data.train_transforms.pipeline()?.output_size();
        let train_input = train_input.filter(|&input| input != data.info.input);
        // Of inputs that are no squares the smaller side tells whether the backbone takes them.
        let smaller = train_input.map(|(rows, columns)| rows.min(columns));
        let in_training = smaller.map(|side| described("data.train_transforms", side));
        let in_training = in_training.transpose()?;
        let pass = config.batch / config.accumulate;
        let bytes = match config.precision {
            Precision::F64 => 2,
            Precision::F32 | Precision::Tf32 | Precision::Bf16 => 1,
        };
        // Of activations, beside f32.
        let halves = match config.precision {
            Precision::Bf16 => 1,
            _ => 2 * bytes,
        };
        let total = description.total();
        let kept = in_training.map_or(total.activation_bytes, |d| d.total().activation_bytes);
        let copies = 2 + config.optimiser.slots() + usize::from(config.ema.is_some());
        Ok(Self {
            data: data.info.clone(),
            train_input,
            model: config.model.to_string(),
            representation: network.out_dim(),
            updates_per_epoch,
            epochs: config.epochs,
            batch: config.batch,
            pass,
            memory: MemoryEstimate {
                parameters: (4 * bytes * copies * total.parameters) as u64,
                activations: halves as u64 * kept * pass as u64 / 2,
            },
            description,
            spec_hash: spec.hash()?,
        })
    }
}
