//! MATLAB level 5 MAT-files (`save -v7` and older), as far as annotations of data sets need them.
//!
//! Source of the format: MathWorks, "MAT-File Format", level 5. Read are numbers of every type, text,
//! cell arrays and structure arrays, nested, of either byte order, compressed or not. Sparse
//! matrices, objects, function handles and character matrices of several rows are passed over and
//! an error once somebody asks for their value. Files of version 4 and 7.3 (HDF5) are refused.
//!
//! Nothing is allocated on the word of a header: every element needs bytes in the file, and what a
//! file inflates to is bounded by [`MAX_INFLATED_BYTES`].

use std::fmt::{self, Display};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Largest file that is read, and most bytes that its variables may have together after inflating (the
/// annotations of Stanford Cars have 3 MiB). Values in memory take at most ten times as much.
pub const MAX_INFLATED_BYTES: usize = 32 << 20;
/// Cells and structures are followed this deep into each other.
const MAX_DEPTH: usize = 16;
const HEADER_BYTES: usize = 128;
const INTACT: &str = "an intact MATLAB 5 file (save -v7): fetch it again";
const CONVERT: &str = "a file of version 5 to 7: in MATLAB load it and save('x.mat', '-v7'), or in Python read it \
     with scipy.io.loadmat (version 4) or h5py (7.3) and write it with scipy.io.savemat";

/// Numbers of the types of elements and of the classes of arrays in a file.
pub(super) mod code {
    pub const INT8: u32 = 1;
    pub const UINT8: u32 = 2;
    pub const INT16: u32 = 3;
    pub const UINT16: u32 = 4;
    pub const INT32: u32 = 5;
    pub const UINT32: u32 = 6;
    pub const SINGLE: u32 = 7;
    pub const DOUBLE: u32 = 9;
    pub const INT64: u32 = 12;
    pub const UINT64: u32 = 13;
    pub const MATRIX: u32 = 14;
    pub const COMPRESSED: u32 = 15;
    pub const UTF8: u32 = 16;
    pub const UTF16: u32 = 17;
    pub const UTF32: u32 = 18;

    pub const CELL_CLASS: u32 = 1;
    pub const STRUCT_CLASS: u32 = 2;
    pub const CHAR_CLASS: u32 = 4;
    pub const DOUBLE_CLASS: u32 = 6;
    pub const UINT64_CLASS: u32 = 15;
}

/// The value of a variable, of a cell or of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Numbers, whatever type they are stored in, column by column. Integers beyond 2^53 are rounded;
    /// of complex numbers the real part.
    Numbers(Vec<f64>),
    /// One line of text.
    Text(String),
    /// A cell array, column by column.
    Cells(Vec<Value>),
    /// A structure array.
    Structs(StructArray),
    /// What this reader passes over, with its name.
    Unsupported(&'static str),
}

/// Rows that have the same fields.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StructArray {
    /// Names of the fields.
    pub fields: Vec<String>,
    /// Row by row, in each a value per field.
    pub values: Vec<Value>,
}

/// The variables of one file.
#[derive(Debug, Clone)]
pub struct MatFile {
    path: PathBuf,
    variables: Vec<(String, Value)>,
}

/// A variable with what its errors must name.
#[derive(Debug, Clone, Copy)]
pub struct Variable<'a> {
    path: &'a Path,
    name: &'a str,
    value: &'a Value,
}

/// One row of a structure array with what its errors must name.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    variable: Variable<'a>,
    /// From 0.
    index: usize,
    fields: &'a [String],
    values: &'a [Value],
}

impl MatFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Layout`] for what is no intact file of this format.
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(Error::io(path, "read the file"))?;
        let mut bytes = Vec::new();
        file.take(MAX_INFLATED_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::io(path, "read the file"))?;
        Self::parse(&bytes, path)
    }

    /// Reads the bytes of a file; `path` is only named in errors.
    ///
    /// # Errors
    /// [`Error::Layout`] for what is no intact file of this format.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        if let Some(version) = other_version(bytes) {
            return Err(Error::layout(path, version, CONVERT));
        }
        let variables = variables(bytes).map_err(|p| Error::layout(path, p, INTACT))?;
        let path = path.to_path_buf();
        Ok(Self { path, variables })
    }

    /// Names of the variables, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.variables.iter().map(|(name, _)| name.as_str())
    }

    /// The variable of that name.
    ///
    /// # Errors
    /// [`Error::Layout`] that lists those that there are.
    pub fn variable<'a>(&'a self, name: &'a str) -> Result<Variable<'a>> {
        let found = self.variables.iter().find(|(n, _)| n == name);
        let Some((_, value)) = found else {
            let names = self.names().take(10).collect::<Vec<_>>().join(", ");
            return Err(Error::layout(
                &self.path,
                format!("there is no variable {name}, only: {names}"),
                format!("a variable {name}: check that this is the right file"),
            ));
        };
        let path = &self.path;
        Ok(Variable { path, name, value })
    }
}

impl<'a> Variable<'a> {
    /// Its value as it is.
    #[must_use]
    pub fn value(&self) -> &'a Value {
        self.value
    }

    /// The rows of a structure array.
    ///
    /// # Errors
    /// [`Error::Layout`] where it is something else.
    pub fn rows(self) -> Result<impl ExactSizeIterator<Item = Row<'a>>> {
        let Value::Structs(array) = self.value else {
            return Err(self.wrong(String::new(), self.value, "a structure array"));
        };
        // An array without fields has no values: no rows then.
        let rows = array.values.chunks_exact(array.fields.len().max(1));
        Ok(rows.enumerate().map(move |(index, values)| Row {
            variable: self,
            index,
            fields: &array.fields,
            values,
        }))
    }

    /// The texts of a cell array of texts.
    ///
    /// # Errors
    /// [`Error::Layout`] where it is something else.
    pub fn texts(self) -> Result<Vec<&'a str>> {
        let Value::Cells(cells) = self.value else {
            return Err(self.wrong(String::new(), self.value, "a cell array of texts"));
        };
        let text = |(i, value): (usize, &'a Value)| {
            as_text(value).ok_or_else(|| self.wrong(format!(", cell {}", i + 1), value, "a text"))
        };
        cells.iter().enumerate().map(text).collect()
    }

    fn wrong(self, place: String, found: impl Display, expected: &str) -> Error {
        let problem = format!("variable {}{place}: {found}", self.name);
        Error::layout(self.path, problem, expected)
    }
}

impl<'a> Row<'a> {
    /// The value of a field as it is.
    ///
    /// # Errors
    /// [`Error::Layout`] where there is no such field, with those that there are.
    pub fn value(&self, field: &str) -> Result<&'a Value> {
        let at = self.fields.iter().position(|name| name == field);
        at.and_then(|at| self.values.get(at)).ok_or_else(|| {
            let names = self.fields.iter().take(20).map(String::as_str);
            let found = format!("there is only: {}", names.collect::<Vec<_>>().join(", "));
            self.wrong(
                field,
                found,
                "this field: check that this is the right file",
            )
        })
    }

    /// A field that holds one number.
    ///
    /// # Errors
    /// [`Error::Layout`] where it holds something else.
    pub fn number(&self, field: &str) -> Result<f64> {
        match self.value(field)? {
            Value::Numbers(numbers) if let [number] = numbers[..] => Ok(number),
            other => Err(self.wrong(field, other, "one number")),
        }
    }

    /// A field that holds one whole number from `range`.
    ///
    /// # Errors
    /// [`Error::Layout`] where it holds something else.
    pub fn integer(&self, field: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32> {
        let number = self.number(field)?;
        let integer = number as u32;
        if f64::from(integer) != number || !range.contains(&integer) {
            let (low, high) = (range.start(), range.end());
            let expected = format!("a whole number from {low} to {high}");
            return Err(self.wrong(field, number, &expected));
        }
        Ok(integer)
    }

    /// A field that holds a text.
    ///
    /// # Errors
    /// [`Error::Layout`] where it holds something else.
    pub fn text(&self, field: &str) -> Result<&'a str> {
        let value = self.value(field)?;
        as_text(value).ok_or_else(|| self.wrong(field, value, "a text"))
    }

    /// An error that names this row and one of its fields.
    pub(crate) fn wrong(&self, field: &str, found: impl Display, expected: &str) -> Error {
        let place = format!(", row {}, field {field}", self.index + 1);
        self.variable.wrong(place, found, expected)
    }
}

/// An empty array of any type is an empty text, as in MATLAB.
fn as_text(value: &Value) -> Option<&str> {
    match value {
        Value::Text(text) => Some(text),
        Value::Numbers(numbers) if numbers.is_empty() => Some(""),
        _ => None,
    }
}

impl Display for Value {
    /// What it is, for an error line.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Numbers(numbers) if let [number] = numbers[..] => {
                write!(f, "the number {number}")
            }
            Self::Numbers(numbers) => write!(f, "{} numbers", numbers.len()),
            Self::Text(text) => {
                write!(
                    f,
                    "the text {:?}",
                    text.chars().take(80).collect::<String>()
                )
            }
            Self::Cells(cells) => write!(f, "a cell array of {}", cells.len()),
            Self::Structs(array) => {
                let rows = array.values.len() / array.fields.len().max(1);
                write!(f, "a structure array of {rows}")
            }
            Self::Unsupported(what) => write!(f, "{what}, which is not supported"),
        }
    }
}

/// A sentence for the versions that are refused.
fn other_version(bytes: &[u8]) -> Option<&'static str> {
    const HDF5: &[u8] = b"\x89HDF\r\n\x1a\n";
    let hdf5 = [0, 512].map(|at| bytes.get(at..at + 8) == Some(HDF5));
    if hdf5.contains(&true) || bytes.starts_with(b"MATLAB 7.3") {
        return Some("a MATLAB 7.3 (HDF5) file");
    }
    // Version 4 has no signature: five integers that make sense in one of the byte orders.
    let words = |read: fn([u8; 4]) -> u32| {
        let word = |i: usize| Some(read(bytes.get(i * 4..i * 4 + 4)?.try_into().ok()?));
        Some([word(0)?, word(1)?, word(2)?, word(3)?, word(4)?])
    };
    let makes_sense = |[kind, rows, columns, imaginary, name]: [u32; 5]| {
        kind <= 4052
            && [rows, columns].iter().all(|n| (1..1 << 31).contains(n))
            && imaginary < 2
            && (1..=64).contains(&name)
    };
    let orders = [words(u32::from_le_bytes), words(u32::from_be_bytes)];
    let is_4 = orders.into_iter().flatten().any(makes_sense);
    is_4.then_some("a MATLAB 4 file")
}

/// All variables of a file, or a sentence.
fn variables(bytes: &[u8]) -> Result<Vec<(String, Value)>, String> {
    if bytes.len() > MAX_INFLATED_BYTES {
        return Err(format!(
            "the file has more than {} MiB",
            MAX_INFLATED_BYTES >> 20
        ));
    }
    let header = bytes.get(..HEADER_BYTES).ok_or("not a MATLAB 5 file")?;
    let big_endian = match header[124..] {
        [0, 1, b'I', b'M'] => false,
        [1, 0, b'M', b'I'] => true,
        _ => return Err("not a MATLAB 5 file".to_owned()),
    };
    let mut budget = MAX_INFLATED_BYTES;
    let mut file = Bytes {
        bytes: &bytes[HEADER_BYTES..],
        big_endian,
    };
    let mut found = Vec::new();
    while !file.bytes.is_empty() {
        let nth = found.len() + 1;
        let array = file.top_element().and_then(|(kind, body)| match kind {
            code::MATRIX => {
                spend(body.bytes.len(), &mut budget)?;
                array(body, 0)
            }
            code::COMPRESSED => {
                let inflated = inflate(body.bytes, &mut budget)?;
                let mut inside = Bytes {
                    bytes: &inflated,
                    big_endian,
                };
                match inside.top_element()? {
                    (code::MATRIX, body) => array(body, 0),
                    (kind, _) => Err(format!("a compressed element of type {kind}")),
                }
            }
            kind => Err(format!("an element of type {kind}")),
        });
        found.push(array.map_err(|problem| format!("variable {nth} of the file: {problem}"))?);
    }
    Ok(found)
}

fn inflate(bytes: &[u8], budget: &mut usize) -> Result<Vec<u8>, String> {
    let mut inflated = Vec::new();
    flate2::read::ZlibDecoder::new(bytes)
        .take(*budget as u64 + 1)
        .read_to_end(&mut inflated)
        .map_err(|e| format!("its compressed data is broken ({e})"))?;
    spend(inflated.len(), budget)?;
    Ok(inflated)
}

fn spend(bytes: usize, budget: &mut usize) -> Result<(), String> {
    *budget = budget.checked_sub(bytes).ok_or_else(|| {
        let limit = MAX_INFLATED_BYTES >> 20;
        format!("the file inflates to more than {limit} MiB")
    })?;
    Ok(())
}

/// Bytes that are still to be read.
#[derive(Clone, Copy)]
struct Bytes<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Bytes<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or_else(|| {
            let there = self.bytes.len();
            format!("it ends too early ({length} bytes expected, {there} there)")
        })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(self.unsigned(bytes) as u32)
    }

    /// An integer of up to 8 bytes.
    fn unsigned(self, bytes: &[u8]) -> u64 {
        let join = |n, &byte| n << 8 | u64::from(byte);
        if self.big_endian {
            bytes.iter().fold(0, join)
        } else {
            bytes.iter().rev().fold(0, join)
        }
    }

    /// Type and content of an element that is not padded and has a full tag.
    fn top_element(&mut self) -> Result<(u32, Self), String> {
        let (kind, length) = (self.word()?, self.word()?);
        let bytes = self.take(length as usize)?;
        Ok((kind, Self { bytes, ..*self }))
    }

    /// Type and content of an element inside an array. It fills whole 8 bytes; up to 4 bytes of
    /// content may stand in the second half of the tag.
    fn element(&mut self) -> Result<(u32, Self), String> {
        let word = self.word()?;
        let (kind, length, room) = match word >> 16 {
            0 => (word, self.word()? as usize, None),
            small => (word & 0xFFFF, small as usize, Some(4)),
        };
        if room.is_some_and(|room| length > room) {
            return Err(format!("a small element of {length} bytes"));
        }
        let mut bytes = self.take(room.unwrap_or(length))?;
        if room.is_some() {
            bytes = &bytes[..length];
        } else {
            // Some writers leave out the padding at the very end.
            let padding = (length.wrapping_neg() % 8).min(self.bytes.len());
            self.take(padding)?;
        }
        Ok((kind, Self { bytes, ..*self }))
    }

    /// The content of an element that must have this type.
    fn expect(&mut self, kind: u32, what: &str) -> Result<Self, String> {
        match self.element()? {
            (found, content) if found == kind => Ok(content),
            (found, _) => Err(format!("{what} of type {found}")),
        }
    }

    /// Name or other ASCII text.
    fn ascii(&mut self, what: &str) -> Result<String, String> {
        let (kind, content) = self.element()?;
        if !matches!(kind, code::INT8 | code::UINT8 | code::UTF8) {
            return Err(format!("{what} of type {kind}"));
        }
        until_zero(content.bytes).ok_or_else(|| format!("{what} that is not UTF-8"))
    }
}

/// Text up to the first zero byte.
fn until_zero(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).ok().map(str::to_owned)
}

/// Name and value of an array, from the content of its element.
fn array(mut bytes: Bytes, depth: usize) -> Result<(String, Value), String> {
    if bytes.bytes.is_empty() {
        return Ok((String::new(), Value::Numbers(Vec::new())));
    }
    if depth > MAX_DEPTH {
        return Err(format!("arrays nested deeper than {MAX_DEPTH}"));
    }
    let mut flags = bytes.expect(code::UINT32, "array flags")?;
    let class = flags.word()? & 0xFF;
    // An opaque object has no dimensions and a layout of its own.
    if class == 17 {
        return Ok((String::new(), Value::Unsupported("an object")));
    }
    let mut dimensions = bytes.expect(code::INT32, "dimensions")?;
    let (mut count, mut rows) = (1u64, None);
    while !dimensions.bytes.is_empty() {
        let length = dimensions.word()?;
        rows.get_or_insert(length);
        count = count.saturating_mul(u64::from(length));
    }
    let name = bytes.ascii("a name")?;
    let value = match class {
        code::CELL_CLASS => Value::Cells(elements(&mut bytes, count, depth)?),
        code::STRUCT_CLASS => Value::Structs(structs(bytes, count, depth)?),
        code::CHAR_CLASS if count > 0 && rows != Some(1) => {
            Value::Unsupported("a character matrix of several rows")
        }
        code::CHAR_CLASS => Value::Text(text(&mut bytes, count)?),
        code::DOUBLE_CLASS..=code::UINT64_CLASS => Value::Numbers(numbers(&mut bytes, count)?),
        3 => Value::Unsupported("an object"),
        5 => Value::Unsupported("a sparse matrix"),
        16 => Value::Unsupported("a function handle"),
        class => return Err(format!("an array of the unknown class {class}")),
    };
    Ok((name, value))
}

/// `count` arrays one after the other.
fn elements(bytes: &mut Bytes, count: u64, depth: usize) -> Result<Vec<Value>, String> {
    // Each needs a tag at least.
    let room = bytes.bytes.len() / 8;
    if count > room as u64 {
        return Err(format!("{count} elements in {} bytes", bytes.bytes.len()));
    }
    let mut values = Vec::with_capacity((count as usize).min(1024));
    for _ in 0..count {
        let content = bytes.expect(code::MATRIX, "an array")?;
        values.push(array(content, depth + 1)?.1);
    }
    Ok(values)
}

fn structs(mut bytes: Bytes, rows: u64, depth: usize) -> Result<StructArray, String> {
    let mut length = bytes.expect(code::INT32, "a length of field names")?;
    let length = length.word()? as usize;
    let names = bytes.expect(code::INT8, "field names")?.bytes;
    if names.is_empty() {
        return Ok(StructArray::default());
    }
    if length == 0 || !names.len().is_multiple_of(length) {
        return Err(format!(
            "{} bytes of field names, {length} bytes each",
            names.len()
        ));
    }
    let fields: Option<Vec<String>> = names.chunks_exact(length).map(until_zero).collect();
    let fields = fields.ok_or("a field name that is not UTF-8")?;
    let count = rows.saturating_mul(fields.len() as u64);
    let values = elements(&mut bytes, count, depth)?;
    Ok(StructArray { fields, values })
}

fn numbers(bytes: &mut Bytes, count: u64) -> Result<Vec<f64>, String> {
    let (kind, content) = bytes.element()?;
    let size = match kind {
        code::INT8 | code::UINT8 => 1,
        code::INT16 | code::UINT16 => 2,
        code::INT32 | code::UINT32 | code::SINGLE => 4,
        code::DOUBLE | code::INT64 | code::UINT64 => 8,
        kind => return Err(format!("numbers of type {kind}")),
    };
    let length = content.bytes.len();
    if count.checked_mul(size) != Some(length as u64) {
        return Err(format!("{count} numbers of {size} bytes in {length} bytes"));
    }
    let number = |bytes: &[u8]| {
        let n = content.unsigned(bytes);
        match kind {
            code::INT8 => f64::from(n as i8),
            code::INT16 => f64::from(n as i16),
            code::INT32 => f64::from(n as i32),
            code::INT64 => n as i64 as f64,
            code::SINGLE => f64::from(f32::from_bits(n as u32)),
            code::DOUBLE => f64::from_bits(n),
            _ => n as f64,
        }
    };
    Ok(content
        .bytes
        .chunks_exact(size as usize)
        .map(number)
        .collect())
}

fn text(bytes: &mut Bytes, count: u64) -> Result<String, String> {
    if bytes.bytes.is_empty() && count == 0 {
        return Ok(String::new());
    }
    let (kind, content) = bytes.element()?;
    let wide = |size| {
        content
            .bytes
            .chunks(size)
            .map(|c| content.unsigned(c) as u32)
    };
    let text = match kind {
        code::UTF8 => String::from_utf8(content.bytes.to_vec()).ok(),
        // Code units that all fit into a byte are stored as bytes.
        code::INT8 | code::UINT8 => Some(content.bytes.iter().copied().map(char::from).collect()),
        code::UINT16 | code::UTF16 => char::decode_utf16(wide(2).map(|unit| unit as u16))
            .collect::<Result<_, _>>()
            .ok(),
        code::UTF32 => wide(4).map(char::from_u32).collect(),
        kind => return Err(format!("text of type {kind}")),
    };
    let text = text.ok_or("a text that is not Unicode")?;
    // Writers disagree on what they count in a text that is not ASCII.
    let counts = [
        text.encode_utf16().count(),
        text.chars().count(),
        text.len(),
    ];
    if !counts.iter().any(|&n| n as u64 == count) {
        return Err(format!(
            "a text of {} characters where {count} should be",
            counts[1]
        ));
    }
    Ok(text)
}
