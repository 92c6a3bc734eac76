//! Checkpoints: ours, and those of torchvision, timm and the authors' code.
//!
//! [`load`] takes a network's parameters and buffers from any of them; every name of the file and of
//! the network is accounted for in its [`Report`]. [`save`] writes safetensors with the network's
//! spec, the preprocessing and the training record, which [`model`] and [`record`] find again;
//! [`export`] writes them under the names of another program.

mod file;
mod layout;
mod pickle;
mod report;
mod safetensors_writer;
mod torch_writer;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

pub use file::{Checkpoint, Element};
pub use layout::{Layout, Triangle};
pub use report::{Misshapen, Report};

use crate::whole_file::WholeFile;
use crate::{Error, ModelSpec, Network, Result};
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
    /// How images were made ready for the network, where it is as simple.
    pub preprocessing: Option<Preprocessing>,
    /// All steps of it, in the words of whoever made them.
    pub pipeline: Option<serde_json::Value>,
    /// Names of the classes in the order of the classifier's outputs; empty where they are not known.
    pub classes: Vec<String>,
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
const PIPELINE: &str = "isqrt.pipeline";
const CLASSES: &str = "isqrt.classes";
const TRAINING: &str = "isqrt.training";
/// State of the run that a file of ours is of, and the beginning of the names of its tensors.
const RUN: &str = "isqrt.run";
const RUN_TENSORS: &str = "run.";
/// The order of triangles in a file under other names.
const TRIANGLE: &str = "isqrt.triangle";

/// The network that a file of ours is of; none of a file of others.
///
/// # Errors
/// [`Error::Checkpoint`] where the file tells something unreadable.
pub fn model(file: &Checkpoint) -> Result<Option<ModelSpec>> {
    told(file, MODEL)
}

/// What else a file of ours tells; nothing of a file of others.
///
/// # Errors
/// As [`model`].
pub fn record(file: &Checkpoint) -> Result<Record> {
    let preprocessing: Option<Preprocessing> = told(file, PREPROCESSING)?;
    if let Some(Preprocessing { mean, std, .. }) = &preprocessing
        && !(mean.iter().all(|m| m.is_finite()) && std.iter().all(|s| s.is_finite() && *s > 0.0))
    {
        return Err(failed(
            file.path(),
            "tells a mean or a standard deviation that cannot be divided by".to_owned(),
        ));
    }
    let classes: Vec<String> = told(file, CLASSES)?.unwrap_or_default();
    Ok(Record {
        preprocessing,
        pipeline: told(file, PIPELINE)?,
        classes: classes.into_iter().map(printable).collect(),
        training: told(file, TRAINING)?,
    })
}

/// A name of a file for people to read, without what moves the cursor of a terminal.
fn printable(name: String) -> String {
    name.replace(char::is_control, "\u{fffd}")
}

fn told<T: for<'de> Deserialize<'de>>(file: &Checkpoint, key: &str) -> Result<Option<T>> {
    let text = file.metadata().get(key);
    text.map(|text| serde_json::from_str(text))
        .transpose()
        .map_err(|e| failed(file.path(), format!("has unreadable metadata {key:?}: {e}")))
}

/// Outputs of the last layer of a classifier in a file, by the first layout that has its weight there;
/// none where it has no such layer.
///
/// # Errors
/// [`Error::Unknown`] for a backbone that is not there,
/// [`Error::Checkpoint`] for names that become one, see [`load`].
pub fn classes(file: &Checkpoint, model: &ModelSpec) -> Result<Option<usize>> {
    let names = Names::of(file)?;
    let found = Layout::all(model)?.into_iter().find_map(|layout| {
        let name = layout.name_of("classifier.weight", model)?;
        match file.shape(names.0.get(&name)?) {
            Some([classes, rest @ ..]) if !rest.contains(&0) => Some(*classes),
            _ => None,
        }
    });
    Ok(found.filter(|&classes| classes > 0))
}

/// A network for a file, with initial values from seed 0, and no larger than the file, which holds at
/// least a byte for each of its values: numbers in a damaged file ask for no memory. With
/// [`LoadOptions::partial`] it may be 2²⁸ values larger.
///
/// # Errors
/// As [`Network::new`], and [`Error::Checkpoint`] for a network that is larger.
pub fn network(file: &Checkpoint, model: &ModelSpec, options: &LoadOptions) -> Result<Network> {
    let more = if options.partial { 1 << 28 } else { 0 };
    let most = usize::try_from(file.length()).unwrap_or(usize::MAX);
    let most = most.saturating_add(more);
    Network::within(model, 0, (DType::F32, &Device::Cpu), most).map_err(|error| match error {
        Error::Nn(isqrt_nn::Error::Shape { message, .. }) => failed(
            file.path(),
            format!(
                "holds less than {} has: it is of another network, or damaged ({message})",
                model.short_name()
            ),
        ),
        other => other,
    })
}

/// Names of a file without the parts that wrappers add (`module` of DataParallel, of a network or of
/// a part of it; `_orig_mod` of torch.compile; `model` of PyTorch Lightning, where all have it), and
/// what they are in the file.
struct Names(BTreeMap<String, String>);

impl Names {
    fn of(file: &Checkpoint) -> Result<Self> {
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        // The whole network as a part of another object.
        let mut wrappers = ["model.", "net.", "network.", "encoder."].into_iter();
        let wrapped = wrappers.any(|part| file.tensors().all(|(name, ..)| name.starts_with(part)));
        let skipped = usize::from(wrapped);
        for (name, ..) in file.tensors() {
            let parts = name.split('.');
            let kept: Vec<&str> = parts
                .filter(|part| !["module", "_orig_mod"].contains(part))
                .skip(skipped)
                .collect();
            if let Some(other) = names.insert(kept.join("."), name.to_owned()) {
                return Err(failed(
                    file.path(),
                    format!("has both {other:?} and {name:?}: which one is meant cannot be told"),
                ));
            }
        }
        Ok(Self(names))
    }
}

/// Takes parameters and buffers of `network` from a file. On error nothing changes.
///
/// The layout is the one of the backbone's ([`BackboneEntry::layouts`](crate::BackboneEntry)) and
/// ours that names most of them. Kernels of linear layers that a file has as convolutions (timm's
/// VGG) are reshaped. Counters of batches (`num_batches_tracked`) are passed over.
///
/// # Errors
/// [`Error::Checkpoint`] where the file cannot be read, nothing of it
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
    let names = Names::of(file)?;
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
        if let Some(element) = file.element(name).filter(|element| !element.is_float()) {
            return Err(failed(format!(
                "has {name:?} with elements of type {element:?}: quantised weights are not read"
            )));
        }
        let value = file.read(name)?.reshape(&shape[..])?;
        let value = value.to_dtype(network.vars().dtype())?;
        if !is_finite(&value)? {
            return Err(failed(format!(
                "has values in {name:?} that are not finite"
            )));
        }
        values.insert(ours, value);
        report.taken += 1;
    }
    for (clean, name) in &names.0 {
        let of_run = clean.starts_with(RUN_TENSORS) && file.metadata().contains_key(RUN);
        if clean.ends_with("num_batches_tracked") {
            report.counters += 1;
        } else if of_run {
            // For whoever goes on with the run.
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
            Some(other) => {
                return Err(failed(format!(
                    "tells the order {other:?} of triangles, which is none of upper and lower"
                )));
            }
            None => layout.triangle,
        };
        let order = match (order, options.triangle) {
            (Some(known), Some(told)) if known != told => {
                return Err(failed(format!(
                    "has triangles in the {known} order, not the {told} one: leave the choice to the file"
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

fn is_finite(value: &Tensor) -> Result<bool> {
    let value = value.flatten_all()?;
    Ok(match value.dtype() {
        DType::F64 => value.to_vec1::<f64>()?.iter().all(|v| v.is_finite()),
        _ => value
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?
            .iter()
            .all(|v| v.is_finite()),
    })
}

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
/// [`Error::Checkpoint`] with the path where it cannot be written or is not
/// named `.safetensors`.
pub fn save(network: &Network, path: &Path, record: &Record) -> Result<()> {
    if Format::of(path)? != Format::Safetensors {
        return Err(failed(
            path,
            "cannot be written: ours are named .safetensors".to_owned(),
        ));
    }
    export(network, path, Layout::OWN.name, Triangle::Upper, record)?;
    Ok(())
}

/// [`save`] with other values than the network's under some of its names.
///
/// # Errors
/// As [`save`].
pub fn save_averaged(
    network: &Network,
    path: &Path,
    record: &Record,
    averages: Option<&BTreeMap<String, Tensor>>,
) -> Result<()> {
    let mut metadata = tell(path, record)?;
    metadata.insert(MODEL.to_owned(), json(path, network.spec())?);
    let tensors = network.values().map(|(name, value)| {
        let average = averages.and_then(|averages| averages.get(&name));
        let value = average.cloned().unwrap_or(value);
        (name, value)
    });
    write(tensors.collect(), metadata, path)
}

/// [`save`] with the state of a training run beside the weights: tensors, and what else there is to know.
/// Whoever reads the file for its weights passes the state by.
///
/// # Errors
/// As [`save`].
pub fn save_run(
    network: &Network,
    path: &Path,
    record: &Record,
    tensors: Vec<(String, Tensor)>,
    state: &serde_json::Value,
) -> Result<()> {
    let mut metadata = tell(path, record)?;
    metadata.insert(MODEL.to_owned(), json(path, network.spec())?);
    metadata.insert(RUN.to_owned(), json(path, state)?);
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| (format!("{RUN_TENSORS}{name}"), tensor));
    write(network.values().chain(tensors).collect(), metadata, path)
}

/// The state of a run that a file tells, see [`save_run`]; none where it has weights alone.
///
/// # Errors
/// As [`model`].
pub fn run(file: &Checkpoint) -> Result<Option<serde_json::Value>> {
    told(file, RUN)
}

/// The tensors that [`save_run`] was given.
///
/// # Errors
/// [`Error::Checkpoint`] where one cannot be read.
pub fn run_tensors(file: &Checkpoint) -> Result<Vec<(String, Tensor)>> {
    let names = file.tensors().filter_map(|(name, ..)| {
        let own = name.strip_prefix(RUN_TENSORS)?;
        Some((own.to_owned(), name.to_owned()))
    });
    let names: Vec<_> = names.collect();
    names
        .into_iter()
        .map(|(own, name)| Ok((own, file.read(&name)?)))
        .collect()
}

fn tell(path: &Path, record: &Record) -> Result<HashMap<String, String>> {
    let mut metadata = HashMap::new();
    if let Some(preprocessing) = &record.preprocessing {
        metadata.insert(PREPROCESSING.to_owned(), json(path, preprocessing)?);
    }
    if let Some(pipeline) = &record.pipeline {
        metadata.insert(PIPELINE.to_owned(), json(path, pipeline)?);
    }
    if !record.classes.is_empty() {
        metadata.insert(CLASSES.to_owned(), json(path, &record.classes)?);
    }
    if let Some(training) = &record.training {
        metadata.insert(TRAINING.to_owned(), json(path, training)?);
    }
    Ok(metadata)
}

fn json(path: &Path, value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| failed(path, format!("cannot be written: {e}")))
}

/// Writes all parameters and buffers under the names of another program and with triangles in the
/// given order, in the format that the path's ending tells, see [`write()`]. Returns the layout.
///
/// # Errors
/// [`Error::Checkpoint`] where the backbone has no such layout, a
/// parameter no place in it, the layout another order, or the file cannot be written.
pub fn export(
    network: &Network,
    path: &Path,
    layout: &str,
    triangle: Triangle,
    record: &Record,
) -> Result<Layout> {
    let failed = |message| failed(path, message);
    let model = network.spec();
    let all = Layout::all(model)?;
    let called = |name: &str| all.iter().find(|known| known.name == name);
    // torchvision's ResNets have the flat names, which are not theirs alone.
    let alias = (layout == "torchvision").then_some(Layout::FLAT.name);
    let Some(layout) = called(layout).or_else(|| called(alias?)) else {
        let known: Vec<&str> = all.iter().map(|layout| layout.name).collect();
        return Err(failed(format!(
            "cannot be written as {layout:?}: {} has the layouts {}",
            model.backbone.name,
            known.join(", ")
        )));
    };
    if layout.triangle.is_some_and(|only| only != triangle) && network.triangle().is_some() {
        return Err(failed(format!(
            "cannot be written: files of layout {} never have triangles in the {triangle} order",
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
        if layout.hidden_convolutions && ours.starts_with("classifier.hidden") {
            value = as_convolution(value, network.side_of_flat(&ours))?;
        }
        tensors.push((name, value));
    }
    let mut metadata = tell(path, record)?;
    if *layout == Layout::OWN {
        metadata.insert(MODEL.to_owned(), json(path, model)?);
    } else if network.triangle().is_some() {
        metadata.insert(TRIANGLE.to_owned(), triangle.to_string());
    }
    write(tensors, metadata, path)?;
    Ok(*layout)
}

/// A matrix as a kernel over whole maps of this side; biases as they are.
fn as_convolution(value: Tensor, side: usize) -> Result<Tensor> {
    match *value.dims() {
        [outputs, inputs] => {
            let channels = inputs / (side * side);
            Ok(value.reshape((outputs, channels, side, side))?)
        }
        _ => Ok(value),
    }
}

/// What a file is to be, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.safetensors`
    Safetensors,
    /// `.pth`, `.pt`, `.pth.tar`: for `torch.load`.
    Torch,
}

impl Format {
    /// The format of a path.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for any other ending.
    pub fn of(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ends = |end: &str| name.to_lowercase().ends_with(end);
        match () {
            () if ends(".safetensors") => Ok(Self::Safetensors),
            () if [".pth", ".pt", ".pth.tar"].into_iter().any(ends) => Ok(Self::Torch),
            () => Err(failed(
                path,
                "cannot be written: name it .safetensors, or .pth, .pt or .pth.tar for torch.load"
                    .to_owned(),
            )),
        }
    }
}

/// Writes tensors by name in the format that the path's ending tells; only safetensors have a place for
/// `metadata`. The file appears whole or not at all.
///
/// # Errors
/// [`Error::Checkpoint`] with the path where it cannot be written.
pub fn write(
    tensors: Vec<(String, Tensor)>,
    mut metadata: HashMap<String, String>,
    path: &Path,
) -> Result<()> {
    metadata.insert(FORMAT.0.to_owned(), FORMAT.1.to_owned());
    let format = Format::of(path)?;
    let written = || -> std::result::Result<(), String> {
        let mut target = WholeFile::create(path).map_err(|e| e.to_string())?;
        let file = target.file().map_err(|e| e.to_string())?;
        match format {
            Format::Torch => torch_writer::write(&tensors, file)?,
            Format::Safetensors => safetensors_writer::write(&tensors, metadata, file)?,
        }
        target.finish().map_err(|e| e.to_string())
    };
    written().map_err(|message| failed(path, format!("cannot be written: {message}")))
}
