//! Lists in text files: read whole, bounded, with line numbers for errors.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// Largest list that is read: 1.3 million paths of 200 bytes.
const MAX_LIST_BYTES: u64 = 256 << 20;

/// The text of a list, without the byte-order mark that some editors put before it.
///
/// # Errors
/// [`Error::Io`]; [`Error::Layout`] for a list that is too long or not in UTF-8.
pub(crate) fn read_list(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(Error::io(path, "read the list"))?;
    let mut bytes = Vec::new();
    file.take(MAX_LIST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path, "read the list"))?;
    if bytes.len() as u64 > MAX_LIST_BYTES {
        let limit = MAX_LIST_BYTES >> 20;
        let problem = format!("a list of more than {limit} MiB");
        return Err(Error::layout(
            path,
            problem,
            "a text file with a line an image",
        ));
    }
    let text = String::from_utf8(bytes);
    let mut text =
        text.map_err(|_| Error::layout(path, "not a text in UTF-8", "a list in UTF-8"))?;
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

/// Number (from 1) and text of each line that is not blank, without the blanks around it.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = (1..).zip(text.lines().map(str::trim));
    lines.filter(|(_, line)| !line.is_empty())
}

/// An error for a line of a list.
pub(crate) fn bad_line(path: &Path, number: usize, problem: &str, expected: &str) -> Error {
    Error::layout(path, format!("line {number}: {problem}"), expected)
}

/// The start of a line, to be shown in an error.
pub(crate) fn shown(line: &str) -> String {
    format!("{:?}", line.chars().take(100).collect::<String>())
}

/// Exactly `N` finite numbers.
pub(crate) fn numbers<const N: usize>(text: &str) -> Option<[f32; N]> {
    let numbers: Option<Vec<f32>> = text
        .split_whitespace()
        .map(|word| word.parse().ok().filter(|n: &f32| n.is_finite()))
        .collect();
    numbers?.try_into().ok()
}
