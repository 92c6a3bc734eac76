//! Writes MATLAB level 5 MAT-files: numbers, text, cells and structure arrays, compressed or not.
//!
//! For the miniature sets and for tests; [`matlab`](super::matlab) reads them, and so do MATLAB and SciPy.

use std::io::Write;

use super::matlab::Value;
use super::matlab::code;
use crate::{Error, Result};

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Each variable as a zlib stream, as `save -v7` does.
    pub compressed: bool,
    /// The order of bytes of old workstations.
    pub big_endian: bool,
}

impl Default for Options {
    /// As MATLAB writes on a PC.
    fn default() -> Self {
        Self {
            compressed: true,
            big_endian: false,
        }
    }
}

/// The bytes of a file with these variables. Arrays have one row, numbers the class `double`, whole
/// numbers up to 65535 are stored in 1 or 2 bytes as MATLAB does.
///
/// # Errors
/// [`Error::Config`] for [`Value::Unsupported`], for a structure array whose values do not fill its
/// rows, and for what 32 bits cannot count.
pub fn write(variables: &[(&str, &Value)], options: Options) -> Result<Vec<u8>> {
    let cannot = |problem: &str| Error::Config(format!("cannot write a MATLAB file: {problem}"));
    let mut header = b"MATLAB 5.0 MAT-file".to_vec();
    header.resize(124, b' ');
    header[116..].fill(0);
    let mut file = Writer {
        bytes: header,
        big_endian: options.big_endian,
    };
    file.integer(0x0100, 2);
    file.integer(u64::from(u16::from_be_bytes(*b"MI")), 2);
    for (name, value) in variables {
        let mut array = Writer {
            bytes: Vec::new(),
            ..file
        };
        array.array(name, value).map_err(cannot)?;
        if options.compressed {
            let mut encoder =
                flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            let compressed = encoder
                .write_all(&array.bytes)
                .and_then(|()| encoder.finish());
            let compressed = compressed.map_err(|e| cannot(&e.to_string()))?;
            file.integer(u64::from(code::COMPRESSED), 4);
            file.length(compressed.len()).map_err(cannot)?;
            file.bytes.extend(compressed);
        } else {
            file.bytes.extend(array.bytes);
        }
    }
    Ok(file.bytes)
}

struct Writer {
    bytes: Vec<u8>,
    big_endian: bool,
}

impl Writer {
    /// The low `size` bytes of an integer.
    fn integer(&mut self, n: u64, size: usize) {
        if self.big_endian {
            self.bytes.extend(&n.to_be_bytes()[8 - size..]);
        } else {
            self.bytes.extend(&n.to_le_bytes()[..size]);
        }
    }

    fn length(&mut self, length: usize) -> Result<(), &'static str> {
        let length = u32::try_from(length).map_err(|_| "more than 4 GiB")?;
        self.integer(u64::from(length), 4);
        Ok(())
    }

    /// An element of integers of `size` bytes, in the short form where that is possible.
    fn element(&mut self, kind: u32, size: usize, items: &[u64]) -> Result<(), &'static str> {
        let length = size * items.len();
        if (1..=4).contains(&length) {
            self.integer((length as u64) << 16 | u64::from(kind), 4);
        } else {
            self.integer(u64::from(kind), 4);
            self.length(length)?;
        }
        for &item in items {
            self.integer(item, size);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        Ok(())
    }

    fn ascii(&mut self, text: &[u8]) -> Result<(), &'static str> {
        let items: Vec<u64> = text.iter().map(|&b| u64::from(b)).collect();
        self.element(code::INT8, 1, &items)
    }

    fn array(&mut self, name: &str, value: &Value) -> Result<(), &'static str> {
        let (class, columns) = match value {
            Value::Numbers(numbers) => (code::DOUBLE_CLASS, numbers.len()),
            Value::Text(text) => (code::CHAR_CLASS, text.encode_utf16().count()),
            Value::Cells(cells) => (code::CELL_CLASS, cells.len()),
            Value::Structs(array) => {
                let fields = array.fields.len().max(1);
                if !array.values.len().is_multiple_of(fields) {
                    return Err("a structure array with a row that lacks values");
                }
                (code::STRUCT_CLASS, array.values.len() / fields)
            }
            Value::Unsupported(what) => return Err(what),
        };
        // Tag now, its length when it is known.
        let start = self.bytes.len();
        self.bytes.resize(start + 8, 0);
        self.element(code::UINT32, 4, &[u64::from(class), 0])?;
        let columns = i32::try_from(columns).map_err(|_| "more than 2^31 elements")?;
        self.element(code::INT32, 4, &[1, columns as u64])?;
        self.ascii(name.as_bytes())?;
        match value {
            Value::Numbers(numbers) => self.numbers(numbers)?,
            Value::Text(text) => {
                let units: Vec<u64> = text.encode_utf16().map(u64::from).collect();
                self.element(code::UINT16, 2, &units)?;
            }
            Value::Cells(cells) => {
                for cell in cells {
                    self.array("", cell)?;
                }
            }
            Value::Structs(array) => {
                let longest = array.fields.iter().map(String::len).max().unwrap_or(0);
                let room = longest + 1;
                self.element(code::INT32, 4, &[room as u64])?;
                let mut names = Vec::new();
                for (i, field) in array.fields.iter().enumerate() {
                    names.extend(field.as_bytes());
                    names.resize((i + 1) * room, 0);
                }
                self.ascii(&names)?;
                for value in &array.values {
                    self.array("", value)?;
                }
            }
            Value::Unsupported(what) => return Err(what),
        }
        let length = self.bytes.len() - start - 8;
        let rest = self.bytes.split_off(start);
        self.integer(u64::from(code::MATRIX), 4);
        self.length(length)?;
        self.bytes.extend(&rest[8..]);
        Ok(())
    }

    fn numbers(&mut self, numbers: &[f64]) -> Result<(), &'static str> {
        let fits = |limit: f64| {
            let fits = |n: &f64| n.fract() == 0.0 && (0.0..=limit).contains(n);
            numbers.iter().all(fits)
        };
        let (kind, size) = match () {
            () if fits(255.0) => (code::UINT8, 1),
            () if fits(65535.0) => (code::UINT16, 2),
            () => (code::DOUBLE, 8),
        };
        let item = |n: &f64| if size == 8 { n.to_bits() } else { *n as u64 };
        let items: Vec<u64> = numbers.iter().map(item).collect();
        self.element(kind, size, &items)
    }
}
