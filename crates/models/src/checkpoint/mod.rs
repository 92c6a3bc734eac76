//! Checkpoints: ours, and those of torchvision, timm and the authors' code.
//!
//! [`load`] takes a network's parameters and buffers from any of them; every name of the file and of
//! the network is accounted for in its [`Report`]. [`save`] writes safetensors with the network's
//! spec, the preprocessing and the training record, which [`model`] and [`record`] find again; [`export`] writes them under the names of another program.

mod file;
mod layout;
mod pickle;
mod report;
mod torch_writer;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

pub use file::{Checkpoint, Element};
pub use layout::{Layout, Triangle};
pub use report::{Misshapen, Report};

use crate::{ModelSpec, Network, Result};
use file::failed;

/// What to do where a file leaves a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// The order of triangles in the file. Needed where the layout has had both; an error where the
    /// layout has but the other one.
    pub triangle: Option<Triangle>,
    /// Take what fits and leave the rest of the network as it is: for another classifier, or for a
    /// backbone alone. Otherwise every parameter must be there, and none too many.
    pub partial: bool,
}

/// What a checkpoint of ours tells beside its values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// How images were made ready for the network.
    pub preprocessing: Option<Preprocessing>,
    /// How it was trained, in the words of whoever trained it.
    pub training: Option<serde_json::Value>,
}

/// From an image to the network's input: the short side brought to `resize` pixels (bilinear, with
/// antialiasing), the centre square of `crop` pixels cut out, values in 0..1, less `mean`, over `std`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Short side in pixels.
    pub resize: usize,
    /// Side of the square in pixels.
    pub crop: usize,
    /// Red, green, blue.
    pub mean: [f32; 3],
    /// Red, green, blue.
    pub std: [f32; 3],
}

impl Preprocessing {
    /// torchvision's and the authors' for ImageNet at evaluation.
    pub const IMAGENET: Self = Self {
        resize: 256,
        crop: 224,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
    };
}

/// Keys of our metadata; `format` is what other readers of safetensors expect of PyTorch's names.
const FORMAT: (&str, &str) = ("format", "pt");
const MODEL: &str = "isqrt.model";
const PREPROCESSING: &str = "isqrt.preprocessing";
const TRAINING: &str = "isqrt.training";
/// The order of triangles in a file under other names.
const TRIANGLE: &str = "isqrt.triangle";

/// The network that a file of ours is of; none of a file of others.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) where the file tells something unreadable.
pub fn model(file: &Checkpoint) -> Result<Option<ModelSpec>> {
    told(file, MODEL)
}

/// What else a file of ours tells; nothing of a file of others.
///
/// # Errors
/// As [`model`].
pub fn record(file: &Checkpoint) -> Result<Record> {
    Ok(Record {
        preprocessing: told(file, PREPROCESSING)?,
        training: told(file, TRAINING)?,
    })
}

fn told<T: for<'de> Deserialize<'de>>(file: &Checkpoint, key: &str) -> Result<Option<T>> {
    let text = file.metadata().get(key);
    text.map(|text| serde_json::from_str(text))
        .transpose()
        .map_err(|e| failed(file.path(), format!("has unreadable metadata {key:?}: {e}")))
}

/// Outputs of the last layer of a classifier in a file, by whatever layout names most of the
/// network's parameters; none where it has no such layer.
///
/// # Errors
/// [`Error::Unknown`](crate::Error::Unknown) for a backbone that is not there.
pub fn classes(file: &Checkpoint, model: &ModelSpec) -> Result<Option<usize>> {
    let names = Names::of(file);
    let found = Layout::all(model)?.into_iter().find_map(|layout| {
        let name = layout.name_of("classifier.weight", model)?;
        match file.shape(names.0.get(&name)?) {
            Some([classes, ..]) => Some(*classes),
            _ => None,
        }
    });
    Ok(found)
}

/// Names of a file without the prefixes that wrappers add (`module.` of DataParallel, `_orig_mod.`
/// of torch.compile), and what they are in the file.
struct Names(BTreeMap<String, String>);

impl Names {
    fn of(file: &Checkpoint) -> Self {
        let clean = |name: &str| {
            let parts = name.split('.');
            let kept: Vec<&str> = parts
                .filter(|part| !["module", "_orig_mod"].contains(part))
                .collect();
            (kept.join("."), name.to_owned())
        };
        Self(file.tensors().map(|(name, ..)| clean(name)).collect())
    }
}

/// Takes parameters and buffers of `network` from a file. On error nothing changes.
///
/// The layout is the one of the backbone's ([`BackboneEntry::layouts`](crate::BackboneEntry)) and
/// ours that names most of them. Kernels of linear layers that a file has as convolutions (timm's
/// VGG) are reshaped. Counters of batches (`num_batches_tracked`) are passed over.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) where the file cannot be read, nothing of it
/// fits, something does not fit (but see [`LoadOptions::partial`]), or the order of triangles is not
/// known.
pub fn load(network: &mut Network, path: &Path, options: &LoadOptions) -> Result<Report> {
    let file = Checkpoint::open(path)?;
    load_from(network, &file, options)
}

/// [`load`] of a file that is open.
///
/// # Errors
/// As there.
pub fn load_from(
    network: &mut Network,
    file: &Checkpoint,
    options: &LoadOptions,
) -> Result<Report> {
    let failed = |message| failed(file.path(), message);
    let names = Names::of(file);
    let model = network.spec();
    let shapes: BTreeMap<&str, Vec<usize>> = network.shapes().collect();
    let matched = |layout: &Layout| {
        let theirs = shapes.keys().filter_map(|ours| layout.name_of(ours, model));
        theirs.filter(|name| names.0.contains_key(name)).count()
    };
    let layouts = Layout::all(model)?;
    // The first of equals.
    let best = layouts.iter().rev().max_by_key(|layout| matched(layout));
    let layout = best.filter(|layout| matched(layout) > 0);
    let Some(layout) = layout.copied() else {
        let some: Vec<&str> = names.0.keys().take(3).map(String::as_str).collect();
        return Err(failed(format!(
            "has no tensor of {}; its first ones are {}",
            model.short_name(),
            some.join(", ")
        )));
    };

    let mut report = Report::new(layout.name, file);
    let mut used = BTreeSet::new();
    let mut values: HashMap<&str, Tensor> = HashMap::new();
    for (&ours, shape) in &shapes {
        let name = layout.name_of(ours, model);
        let Some((clean, name)) = name.as_ref().and_then(|name| names.0.get_key_value(name)) else {
            report.missing.push((ours.to_owned(), name));
            continue;
        };
        used.insert(clean.as_str());
        let found = file.shape(name).unwrap_or_default();
        if !fits(found, shape) {
            report.misshapen.push(Misshapen {
                name: name.clone(),
                found: found.to_vec(),
                expected: shape.clone(),
            });
            continue;
        }
        values.insert(ours, file.read(name)?.reshape(&shape[..])?);
        report.taken += 1;
    }
    for (clean, name) in &names.0 {
        if clean.ends_with("num_batches_tracked") {
            report.counters += 1;
        } else if !used.contains(clean.as_str()) {
            report.unused.push(name.clone());
        }
    }
    report.find_nearest();
    if report.taken == 0 || !(options.partial || report.is_complete()) {
        return Err(failed(report.complaint(&model.short_name())));
    }

    if let (Some(side), Some(weight)) = (network.triangle(), values.get_mut(network.first_linear()))
    {
        let order = match file.metadata().get(TRIANGLE).map(String::as_str) {
            Some("upper") => Some(Triangle::Upper),
            Some("lower") => Some(Triangle::Lower),
            _ => layout.triangle,
        };
        let order = match (order, options.triangle) {
            (Some(known), Some(told)) if known != told => {
                return Err(failed(format!(
                    "has the order {known:?} of triangles, not {told:?}: leave the choice to the file"
                )));
            }
            (Some(order), _) | (None, Some(order)) => order,
            (None, None) => return Err(failed(ASK.to_owned())),
        };
        if order == Triangle::Lower {
            *weight = reorder(weight, layout::from_lower(side))?;
        }
    }
    network.set_values(&values)?;
    Ok(report)
}

const ASK: &str = "does not tell in which order it has the triangle of the covariance: say upper \
                   (the authors' code since commit e68a5ee of 26 December 2018, and the weights \
                   uploaded again in January 2020) or lower (before; MatConvNet); the wrong one \
                   gives the accuracy of chance";

/// Whether a tensor has the shape, or is a kernel over whole maps where a matrix is expected.
fn fits(found: &[usize], expected: &[usize]) -> bool {
    found == expected
        || matches!((found, expected), ([o, c, h, w], [outputs, inputs])
            if o == outputs && c.checked_mul(*h).and_then(|n| n.checked_mul(*w)) == Some(*inputs))
}

/// A weight with its columns in this order.
fn reorder(weight: &Tensor, columns: Vec<u32>) -> Result<Tensor> {
    let columns = Tensor::from_vec(columns.clone(), columns.len(), &Device::Cpu)?;
    Ok(weight.index_select(&columns, 1)?)
}

/// Writes all parameters and buffers as safetensors with the spec and `record`; the file appears
/// whole or not at all.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) with the path where it cannot be written.
pub fn save(network: &Network, path: &Path, record: &Record) -> Result<()> {
    let mut metadata = HashMap::new();
    let mut tell = |key: &str, value: serde_json::Result<String>| -> Result<()> {
        let value = value.map_err(|e| failed(path, format!("cannot be written: {e}")))?;
        metadata.insert(key.to_owned(), value);
        Ok(())
    };
    tell(MODEL, serde_json::to_string(network.spec()))?;
    if let Some(preprocessing) = &record.preprocessing {
        tell(PREPROCESSING, serde_json::to_string(preprocessing))?;
    }
    if let Some(training) = &record.training {
        tell(TRAINING, serde_json::to_string(training))?;
    }
    write(network.values().collect(), metadata, path)
}

/// Writes all parameters and buffers under the names of another program and with triangles in the
/// given order, for `torch.load` where the path ends in `.pth`, otherwise as safetensors (for
/// `safetensors.torch.load_file`). Returns the layout.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) where the backbone has no such layout, a
/// parameter no place in it, the layout another order, or the file cannot be written.
pub fn export(network: &Network, path: &Path, layout: &str, triangle: Triangle) -> Result<Layout> {
    let failed = |message| failed(path, message);
    let model = network.spec();
    let all = Layout::all(model)?;
    let Some(layout) = all.iter().find(|known| known.name == layout) else {
        let known: Vec<&str> = all.iter().map(|layout| layout.name).collect();
        return Err(failed(format!(
            "cannot be written as {layout:?}: {} has the layouts {}",
            model.backbone.name,
            known.join(", ")
        )));
    };
    if layout.triangle.is_some_and(|only| only != triangle) && network.triangle().is_some() {
        return Err(failed(format!(
            "cannot be written: files of layout {} never have the order {triangle:?}",
            layout.name
        )));
    }
    let mut tensors = Vec::new();
    for (ours, mut value) in network.values() {
        let name = layout.name_of(&ours, model).ok_or_else(|| {
            failed(format!(
                "cannot be written: {ours:?} has no name in layout {}",
                layout.name
            ))
        })?;
        if let (Some(side), Triangle::Lower) = (network.triangle(), triangle)
            && ours == network.first_linear()
        {
            value = reorder(&value, layout::to_lower(side))?;
        }
        tensors.push((name, value));
    }
    let mut metadata = HashMap::new();
    if network.triangle().is_some() {
        let order = format!("{triangle:?}").to_lowercase();
        metadata.insert(TRIANGLE.to_owned(), order);
    }
    write(tensors, metadata, path)?;
    Ok(*layout)
}

/// Writes tensors by name, for `torch.load` where the path ends in `.pth` (which has no place for
/// `metadata`), otherwise as safetensors: to a temporary file beside the target, synced, renamed.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) with the path where it cannot be written.
pub fn write(
    tensors: Vec<(String, Tensor)>,
    mut metadata: HashMap<String, String>,
    path: &Path,
) -> Result<()> {
    metadata.insert(FORMAT.0.to_owned(), FORMAT.1.to_owned());
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = Path::new(&partial);
    let written = match path.extension().is_some_and(|e| e == "pth") {
        true => File::create(partial)
            .map_err(|e| e.to_string())
            .and_then(|file| torch_writer::write(&tensors, file)),
        false => safetensors::serialize_to_file(tensors, Some(metadata), partial)
            .map_err(|e| e.to_string())
            .and_then(|()| {
                let synced = File::open(partial).and_then(|file| file.sync_all());
                synced.map_err(|e| e.to_string())
            }),
    };
    written
        .and_then(|()| std::fs::rename(partial, path).map_err(|e| e.to_string()))
        .map_err(|message| {
            // The first error is the one to report.
            let _ = std::fs::remove_file(partial);
            failed(path, format!("cannot be written: {message}"))
        })
}
