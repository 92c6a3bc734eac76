//! Tensors in a file by name, whatever wrote it: `torch.save` (zip archives since PyTorch 1.6, the
//! older format before) or safetensors. Opening reads names and shapes alone; values are read one
//! tensor at a time, and nothing is allocated that the file does not hold.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use zip::ZipArchive;

use super::pickle::{self, Pickle, Value};
use crate::{Error, Result};

/// Largest pickle; those of checkpoints with optimisers have a few MB.
const MAX_PICKLE: u64 = 32 << 20;
/// Largest header of a safetensors file, as the format says.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes of a tensor's name.
const MAX_NAME: usize = 1024;
/// Dictionaries of a file that are looked through for tensors.
const MAX_GROUPS: usize = 64;

/// Type of the elements of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    /// Bytes of one.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether parameters may have it.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// The type of a tensor read from it; none for those that no parameter has.
    fn dtype(self) -> Option<DType> {
        match self {
            Self::F64 => Some(DType::F64),
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            Self::I64 => Some(DType::I64),
            Self::U8 => Some(DType::U8),
            Self::I32 | Self::I16 | Self::I8 | Self::Bool => None,
        }
    }
}

/// Where the elements of a tensor lie in a storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct View {
    pub(super) storage: Arc<str>,
    pub(super) element: Element,
    /// Values of the whole storage.
    pub(super) count: u64,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

impl View {
    /// That every element lies within the storage, and that there are no more of them.
    fn check(&self) -> std::result::Result<(), String> {
        let count = self.count;
        let elements = self
            .shape
            .iter()
            .try_fold(1_usize, |n, &d| n.checked_mul(d));
        let steps = self.shape.iter().zip(&self.strides);
        let last = steps.clone().try_fold(self.offset, |at, (&size, &stride)| {
            at.checked_add(size.saturating_sub(1).checked_mul(stride)?)
        });
        match (elements, last) {
            _ if self.shape.len() != self.strides.len() => {
                Err("has as many strides as it has no dimensions".to_owned())
            }
            (Some(0), _) => Ok(()),
            (Some(elements), Some(last)) if (last as u64) < count && elements as u64 <= count => {
                Ok(())
            }
            _ => Err(format!(
                "has the shape {:?}, more than its storage of {count} values holds (an expanded tensor?)",
                self.shape
            )),
        }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1_usize;
        self.shape
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(&size, &stride)| {
                let fits = size == 1 || stride == expected;
                expected = expected.saturating_mul(size);
                fits
            })
    }

    /// The elements in order, of a storage from its beginning.
    fn gather(&self, storage: &[u8]) -> Vec<u8> {
        let width = self.element.size();
        let mut out = Vec::with_capacity(self.elements() * width);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..self.elements() {
            let at: usize = index
                .iter()
                .zip(&self.strides)
                .map(|(i, stride)| i * stride)
                .sum();
            let at = (self.offset + at) * width;
            out.extend_from_slice(&storage[at..at + width]);
            for (i, &size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < size {
                    break;
                }
                *i = 0;
            }
        }
        out
    }
}

/// Strides of a tensor whose elements lie one after the other.
pub(super) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for i in (1..shape.len()).rev() {
        // A shape that overflows has a 0 in it and no elements.
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

/// Where the storages are.
#[derive(Debug)]
enum Source {
    /// In the file itself: first byte and length of each.
    Plain(Mutex<File>, HashMap<String, (u64, u64)>),
    /// In an archive, each a file of this name.
    Zip(Mutex<ZipArchive<BufReader<File>>>, HashMap<String, String>),
}

/// The tensors of a file by name, not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    length: u64,
    tensors: BTreeMap<String, View>,
    metadata: BTreeMap<String, String>,
    group: Option<String>,
    others: Vec<String>,
    source: Source,
}

impl Checkpoint {
    /// Reads names, shapes and metadata of a file.
    ///
    /// A dictionary of tensors may lie within another one, under `state_dict`, `model` or any other
    /// key: the one with the most tensors is taken, see [`group`](Self::group).
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file cannot be read, is none of the known formats, is
    /// damaged, names a Python type that tensors do not need, or holds no tensor.
    pub fn open(path: &Path) -> Result<Self> {
        open(path).map_err(|message| failed(path, message))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names in the file, sorted, with shapes and element types.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], Element)> {
        self.tensors
            .iter()
            .map(|(name, view)| (name.as_str(), &view.shape[..], view.element))
    }

    /// Element type of a tensor, if it is there.
    #[must_use]
    pub fn element(&self, name: &str) -> Option<Element> {
        self.tensors.get(name).map(|view| view.element)
    }

    /// Shape of a tensor, if it is there.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|view| &view.shape[..])
    }

    /// The dictionary that was taken where there are several, `state_dict` for example.
    #[must_use]
    pub fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }

    /// The keys beside [`group`](Self::group), `optimizer` for example.
    #[must_use]
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// Text that a safetensors file carries beside its tensors.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The values of a tensor, on the CPU.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it is not there, has an element type that parameters do not
    /// have, or cannot be read.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let found = self
            .tensors
            .get(name)
            .ok_or_else(|| "is not there".to_owned());
        found
            .and_then(|view| self.values(view))
            .map_err(|message| failed(&self.path, format!("{name:?} {message}")))
    }

    fn values(&self, view: &View) -> std::result::Result<Tensor, String> {
        let dtype = view
            .element
            .dtype()
            .ok_or_else(|| format!("has elements of type {:?}", view.element))?;
        view.check()?;
        let tensor = |bytes: &[u8]| {
            Tensor::from_raw_buffer(bytes, dtype, &view.shape, &Device::Cpu)
                .map_err(|e| e.to_string())
        };
        if view.elements() == 0 {
            return tensor(&[]);
        }
        let (width, contiguous) = (view.element.size(), view.is_contiguous());
        let key = &*view.storage;
        let absent = || format!("needs storage {key:?}, which is not there");
        let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
        let bytes = match &self.source {
            Source::Plain(file, places) => {
                let &(start, length) = places.get(key).ok_or_else(absent)?;
                let (skip, length) = match contiguous {
                    true => (view.offset * width, view.elements() * width),
                    false => (0, length as usize),
                };
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let mut bytes = vec![0; length];
                file.seek(SeekFrom::Start(start + skip as u64))
                    .map_err(unreadable)?;
                file.read_exact(&mut bytes).map_err(unreadable)?;
                bytes
            }
            Source::Zip(archive, names) => {
                let name = names.get(key).ok_or_else(absent)?;
                let mut archive = archive.lock().unwrap_or_else(PoisonError::into_inner);
                let mut entry = archive
                    .by_name(name)
                    .map_err(|e| format!("cannot be read: {e}"))?;
                // The size was checked against that of the file.
                let mut bytes = Vec::with_capacity(entry.size() as usize);
                // To its end, where the archive's checksum is compared.
                entry.read_to_end(&mut bytes).map_err(unreadable)?;
                if contiguous {
                    let start = view.offset * width;
                    bytes.truncate(start + view.elements() * width);
                    bytes.drain(..start);
                }
                bytes
            }
        };
        let bytes = match contiguous {
            true => bytes,
            false => view.gather(&bytes),
        };
        tensor(&bytes)
    }
}

pub(super) fn failed(path: &Path, message: String) -> Error {
    Error::Checkpoint {
        path: path.to_owned(),
        message,
    }
}

type Opened = std::result::Result<Checkpoint, String>;

fn open(path: &Path) -> Opened {
    let unreadable = |error: std::io::Error| format!("cannot be read: {error}");
    let mut file = File::open(path).map_err(unreadable)?;
    let info = file.metadata().map_err(unreadable)?;
    if !info.is_file() {
        return Err("is not a file".to_owned());
    }
    let length = info.len();
    let mut start = Vec::new();
    file.by_ref()
        .take(512)
        .read_to_end(&mut start)
        .map_err(unreadable)?;
    file.rewind().map_err(unreadable)?;
    match &start[..] {
        // First, since its first bytes may be any.
        [_, _, _, _, _, _, _, _, b'{', ..] => safetensors(path, file, length),
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => zipped(path, file, length),
        [0x80, ..] if start.get(2..14) == Some(LEGACY_MAGIC) => legacy(path, file, length),
        [0x80, ..] => Err("is a pickle, but not one that torch.save wrote".to_owned()),
        [b'<', ..] => Err("is a web page and not a checkpoint: download it again".to_owned()),
        text if text.starts_with(b"version https://git-lfs") => {
            Err("is a Git LFS pointer and not the file itself: run `git lfs pull`".to_owned())
        }
        text if text.starts_with(b"MATLAB 5.0") => Err(
            "is a MATLAB file; MatConvNet's networks are not read, those of the PyTorch code are"
                .to_owned(),
        ),
        text if text.get(257..262) == Some(b"ustar") => {
            Err("is a tar archive (torch.save before PyTorch 0.2), which is not read".to_owned())
        }
        [] => Err("is empty".to_owned()),
        _ => Err("is neither a file of torch.save nor safetensors".to_owned()),
    }
}

/// The first number in a file of `torch.save` before PyTorch 1.6, as a pickle has it.
const LEGACY_MAGIC: &[u8] = &[
    0x8A, 0x0A, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19,
];

/// A header with names, shapes and places in JSON, then the values.
fn safetensors(path: &Path, mut file: File, length: u64) -> Opened {
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|e| e.to_string())?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER || size + 8 > length {
        return Err("is damaged: its header is longer than the file".to_owned());
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(|e| e.to_string())?;
    // Checks that the values follow each other without gaps and that shapes give their lengths.
    let header: safetensors::tensor::Metadata =
        serde_json::from_slice(&header).map_err(|e| format!("is damaged: {e}"))?;
    if size + 8 + header.data_len() as u64 != length {
        return Err(format!(
            "is damaged: {} bytes of values where the header tells of {}",
            length - size - 8,
            header.data_len()
        ));
    }
    let (mut tensors, mut places) = (BTreeMap::new(), HashMap::new());
    for (name, info) in header.tensors() {
        use safetensors::Dtype;
        let element = match info.dtype {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::BF16,
            Dtype::I64 => Element::I64,
            Dtype::I32 => Element::I32,
            Dtype::I16 => Element::I16,
            Dtype::I8 => Element::I8,
            Dtype::U8 => Element::U8,
            Dtype::BOOL => Element::Bool,
            other => return Err(format!("{name:?} has elements of type {other:?}")),
        };
        let view = View {
            storage: name.as_str().into(),
            element,
            count: info.shape.iter().product::<usize>() as u64,
            offset: 0,
            shape: info.shape.clone(),
            strides: row_major(&info.shape),
        };
        let (from, to) = info.data_offsets;
        places.insert(name.clone(), (size + 8 + from as u64, (to - from) as u64));
        tensors.insert(name, view);
    }
    let metadata = header.metadata().clone().unwrap_or_default();
    checkpoint(
        (path, length),
        (None, tensors, Vec::new()),
        Source::Plain(Mutex::new(file), places),
    )
    .map(|checkpoint| Checkpoint {
        metadata: metadata.into_iter().collect(),
        ..checkpoint
    })
}

/// `NAME/data.pkl` and a file `NAME/data/KEY` for each storage.
fn zipped(path: &Path, file: File, length: u64) -> Opened {
    let damaged = |error: zip::result::ZipError| format!("is a damaged archive: {error}");
    // At its place and nowhere else: looking for archives within other files, the reader mistakes
    // those of some lengths of name.
    let config = zip::read::Config {
        archive_offset: zip::read::ArchiveOffset::Known(0),
    };
    let mut archive = ZipArchive::with_config(config, BufReader::new(file)).map_err(damaged)?;
    if archive.has_overlapping_entries().map_err(damaged)? {
        return Err("is a damaged archive: its files overlap".to_owned());
    }
    let mut sizes = HashMap::new();
    let mut root = None;
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        if name.contains("/code/") {
            return Err("is a TorchScript program: save the state_dict of the network".to_owned());
        }
        if entry.compression() != zip::CompressionMethod::Stored {
            return Err(format!(
                "{name:?} is compressed, which torch.save never does"
            ));
        }
        if entry.size() != entry.compressed_size() || entry.size() > length {
            return Err(format!(
                "is a damaged archive: {name:?} is larger than the file"
            ));
        }
        if let Some(found) = name.strip_suffix("/data.pkl") {
            root = Some(found.to_owned());
        }
        sizes.insert(name, entry.size());
    }
    let root = root.ok_or("is an archive without data.pkl: not a file of torch.save")?;
    let mut small = |name: &str| -> std::result::Result<Vec<u8>, String> {
        let name = format!("{root}/{name}");
        let mut entry = archive.by_name(&name).map_err(damaged)?;
        if entry.size() > MAX_PICKLE {
            return Err(format!("{name:?} is too large ({} bytes)", entry.size()));
        }
        let mut bytes = Vec::new();
        entry
            .read_to_end(&mut bytes)
            .map_err(|e| format!("{name:?} is damaged: {e}"))?;
        Ok(bytes)
    };
    if sizes.contains_key(&format!("{root}/byteorder")) && small("byteorder")? != b"little" {
        return Err("was written on a big-endian machine, which is not read".to_owned());
    }
    let pickle = pickle::read(&small("data.pkl")?)?;
    let mut names = HashMap::new();
    for (key, storage) in &pickle.storages {
        let name = format!("{root}/data/{key}");
        let needed = storage.count.checked_mul(storage.element.size() as u64);
        if sizes.get(&name).copied() != needed {
            return Err(format!(
                "is damaged: {name:?} is not there or has another length"
            ));
        }
        names.insert(key.to_string(), name);
    }
    checkpoint(
        (path, length),
        groups(&pickle),
        Source::Zip(Mutex::new(archive), names),
    )
}

/// Pickles one after the other (a magic number, a version, the machine, the object, the keys of its
/// storages), then each storage: its count in eight bytes, then its values.
fn legacy(path: &Path, mut file: File, length: u64) -> Opened {
    let mut bytes = Vec::new();
    file.by_ref()
        .take(MAX_PICKLE)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    let mut at = 0;
    let mut next = || -> std::result::Result<Pickle, String> {
        let pickle = pickle::read(&bytes[at..])?;
        at += pickle.length;
        Ok(pickle)
    };
    next()?;
    next()?;
    let machine = next()?;
    if let Some(Value::Bool(false)) = machine.entry(machine.root(), "little_endian") {
        return Err("was written on a big-endian machine, which is not read".to_owned());
    }
    let object = next()?;
    let keys = next()?;
    let Value::List(order) = keys.root() else {
        return Err("is damaged: no list of storages".to_owned());
    };
    let mut start = at as u64;
    let mut places = HashMap::new();
    for &key in order {
        let Value::Text(key) = keys.get(key) else {
            return Err("is damaged: a storage whose key is no text".to_owned());
        };
        let Some(storage) = object.storages.get(key.as_str()) else {
            return Err(format!("is damaged: storage {key:?} belongs to nothing"));
        };
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(start))
            .map_err(|e| e.to_string())?;
        file.read_exact(&mut count)
            .map_err(|_| TRUNCATED.to_owned())?;
        let bytes = storage.count.checked_mul(storage.element.size() as u64);
        let end = bytes
            .and_then(|n| n.checked_add(start + 8))
            .filter(|&end| end <= length);
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(TRUNCATED.to_owned());
        };
        if u64::from_le_bytes(count) != storage.count {
            return Err(format!("is damaged: storage {key:?} has another length"));
        }
        places.insert(key.clone(), (start + 8, bytes));
        start = end;
    }
    if places.len() < object.storages.len() {
        return Err("is damaged: storages are missing".to_owned());
    }
    checkpoint(
        (path, length),
        groups(&object),
        Source::Plain(Mutex::new(file), places),
    )
}

const TRUNCATED: &str = "is damaged: it ends before its last tensor";

/// Name of the dictionary taken, its tensors, and the keys beside it.
type Groups = (Option<String>, BTreeMap<String, View>, Vec<String>);

/// The dictionary with the most tensors: the object itself or one in it. Names longer than any
/// program writes are passed over.
fn groups(pickle: &Pickle) -> Groups {
    let tensors = |dict| -> BTreeMap<&str, &View> {
        let mut named = BTreeMap::new();
        for (name, value) in pickle.entries(dict) {
            if let (Value::Tensor(view), true) = (value, name.len() <= MAX_NAME) {
                named.insert(name, &**view);
            }
        }
        named
    };
    let root = pickle.root();
    let inner = pickle
        .entries(root)
        .filter(|(name, value)| matches!(value, Value::Dict(_)) && name.len() <= MAX_NAME)
        .take(MAX_GROUPS)
        .map(|(name, value)| (Some(name), tensors(value)));
    let mut best = (None, tensors(root));
    for group in inner {
        // The first of equals: networks come before their moving averages.
        if group.1.len() > best.1.len() {
            best = group;
        }
    }
    let (group, tensors) = best;
    let mut others = Vec::new();
    if group.is_some() {
        let names = pickle.entries(root).map(|(name, _)| name);
        let names = names.filter(|name| group != Some(name) && name.len() <= MAX_NAME);
        others.extend(names.take(MAX_GROUPS).map(str::to_owned));
    }
    let owned = |(name, view): (&str, &View)| (name.to_owned(), view.clone());
    let tensors = tensors.into_iter().map(owned).collect();
    (group.map(str::to_owned), tensors, others)
}

fn checkpoint(
    (path, length): (&Path, u64),
    (group, tensors, others): Groups,
    source: Source,
) -> Opened {
    if tensors.is_empty() {
        return Err("holds no tensors by name".to_owned());
    }
    Ok(Checkpoint {
        path: path.to_owned(),
        length,
        tensors,
        metadata: BTreeMap::new(),
        group,
        others,
        source,
    })
}
