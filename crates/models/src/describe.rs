//! A network as a table: stages with their output, parameters, multiply-adds and activations.

use candle_core::Tensor;
use isqrt_nn::{LayerRecord, Mode, record};

use crate::{Error, Network, Result};

/// Largest side of an image that is described: a pass keeps its maps, some GiB at this size.
const LARGEST: usize = 2048;

/// A part of a network, of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The first components of its layers' names: `backbone.layer1`, `backbone.features.3`,
    /// `representation`, `classifier`.
    pub name: String,
    /// Shape of its output: `(channels, height, width)` or `(values)`.
    pub shape: Vec<usize>,
    /// Learnt values.
    pub parameters: usize,
    /// Products of its convolutions, linear layers and matrices, forward; none of a head whose
    /// number is not known.
    pub multiply_adds: Option<u64>,
    /// Bytes in f32 of what a training step keeps at least, see [`LayerRecord::elements`].
    pub activation_bytes: u64,
}

/// What [`Network::describe`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// In the order in which they run.
    pub stages: Vec<Stage>,
}

impl Description {
    /// All stages together, under the name `total` and with the shape of the last one; multiply-adds
    /// without those that are not known.
    #[must_use]
    pub fn total(&self) -> Stage {
        Stage {
            name: "total".to_owned(),
            shape: self.stages.last().map_or(vec![], |s| s.shape.clone()),
            parameters: self.stages.iter().map(|s| s.parameters).sum(),
            multiply_adds: Some(self.stages.iter().filter_map(|s| s.multiply_adds).sum()),
            activation_bytes: self.stages.iter().map(|s| s.activation_bytes).sum(),
        }
    }
}

impl Network {
    /// Stages of the network for one image of `size` x `size` pixels. Runs one forward pass of a
    /// black image in evaluation; nothing changes.
    ///
    /// # Errors
    /// [`Error::ImageSize`] for a size of 0 or above 2048, and as [`forward`](Self::forward) where the
    /// image is too small for the backbone.
    pub fn describe(&self, size: usize) -> Result<Description> {
        if !(1..=LARGEST).contains(&size) {
            return Err(Error::ImageSize {
                size,
                largest: LARGEST,
            });
        }
        let vars = self.vars();
        let image = Tensor::zeros((1, 3, size, size), vars.dtype(), vars.device())?;
        let (features, records) = record(|| self.features(&image, Mode::Eval));
        let mut stages = stages(&records);

        let features = features?;
        let positions = features.dims().iter().skip(2).product();
        let (values, records) = record(|| self.pool(&features, Mode::Eval));
        let values = values?;
        let elements = match &records[..] {
            // Heads that are one op of covariances keep their output at least.
            [] => values.elem_count(),
            records => records.iter().map(|r| r.elements).sum(),
        };
        let mut head = Stage::new("representation", values.dims(), elements);
        head.multiply_adds = self.pool_multiply_adds(positions);
        // Heads may hold parameters without a layer.
        let own = vars.parameters();
        let own = own.filter(|(name, _)| name.starts_with("representation."));
        head.parameters = own.map(|(_, var)| var.elem_count()).sum();
        stages.push(head);

        let (logits, records) = record(|| self.classify(&values, Mode::Eval));
        logits?;
        stages.extend(self::stages(&records));
        Ok(Description { stages })
    }
}

impl Stage {
    /// Without layers; `dims` begin with the batch.
    fn new(name: &str, dims: &[usize], elements: usize) -> Self {
        Self {
            name: name.to_owned(),
            shape: dims.iter().skip(1).copied().collect(),
            parameters: 0,
            multiply_adds: Some(0),
            activation_bytes: 4 * elements as u64,
        }
    }
}

/// Neighbours of one name together. A norm beside its convolution (`bn1` after `conv1`) belongs to
/// the stage before it.
fn stages(records: &[LayerRecord]) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    for (i, record) in records.iter().enumerate() {
        // An op before the first layer (dropout) has no name and belongs to what follows.
        let mut named = records[i..].iter().filter(|r| !r.path.is_empty());
        let name = named.next().map_or("", |r| stage_of(&r.path));
        let joins = is_norm(records, name);
        let here = Stage::new(name, &record.shape, record.elements);
        let stage = match stages.last_mut() {
            Some(stage) if joins || stage.name == name => {
                stage.shape = here.shape;
                stage.activation_bytes += here.activation_bytes;
                stage
            }
            _ => {
                stages.push(here);
                let last = stages.len() - 1;
                &mut stages[last]
            }
        };
        stage.parameters += record.parameters;
        stage.multiply_adds = stage.multiply_adds.map(|n| n + record.multiply_adds);
    }
    stages
}

/// Whether this is the name of a norm itself, not of a part that has one. An op without a name of its
/// own (pooling after `bn1`) has that of the norm.
fn is_norm(records: &[LayerRecord], name: &str) -> bool {
    let mut own = records.iter().filter(|r| &*r.path == name);
    own.next().is_some_and(|r| r.op == "batch_norm")
}

/// The first two components of a layer's name, three in a list of modules called `features`; of
/// parameters too: `backbone.layer1` of `backbone.layer1.0.conv1.weight`.
#[must_use]
pub fn stage_of(path: &str) -> &str {
    let mut dots = path.match_indices('.').map(|(at, _)| at);
    let second = dots.next().map_or(path.len(), |at| at + 1);
    let end = dots.next();
    let end = match &path[second..end.unwrap_or(path.len())] {
        "features" => dots.next(),
        _ => end,
    };
    &path[..end.unwrap_or(path.len())]
}
