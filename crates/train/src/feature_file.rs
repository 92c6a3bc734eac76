//! A safetensors file of representations and logits, written row by row.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use isqrt_models::WholeFile;

use crate::predict::Prediction;
use crate::{Error, Result};

/// A file in the making; it appears under its name when it is finished, and leaves nothing otherwise.
#[derive(Debug)]
pub struct FeatureFile {
    path: PathBuf,
    file: WholeFile,
    /// Rows, values a row of the representation, values a row of the logits.
    sizes: (usize, usize, usize),
    /// First byte of the two matrices.
    starts: (u64, u64),
    /// Rows that are written.
    written: usize,
}

impl FeatureFile {
    /// A file for so many images with rows of `(representation, logits)` values: f32 matrices of
    /// these names, and `images`, the paths one a line in UTF-8, as bytes.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be written, or paths cannot be lines of text.
    pub fn create(path: &Path, images: &[PathBuf], sizes: (usize, usize)) -> Result<Self> {
        let names: Option<Vec<&str>> = images
            .iter()
            .map(|image| image.to_str().filter(|name| !name.contains('\n')))
            .collect();
        let Some(names) = names else {
            let message = "paths of images must be UTF-8 without line breaks";
            return Err(failed(path, message.to_owned()));
        };
        let names = names.join("\n").into_bytes();
        let sizes = (images.len(), sizes.0, sizes.1);
        let bytes = |columns: usize| sizes.0.checked_mul(columns).and_then(|n| n.checked_mul(4));
        let (Some(first), Some(second)) = (bytes(sizes.1), bytes(sizes.2)) else {
            return Err(failed(path, "more values than a file can hold".to_owned()));
        };
        let ends = (first, first + second);
        let matrix = |columns: usize, from: usize, to: usize| {
            format!(
                r#"{{"dtype":"F32","shape":[{},{columns}],"data_offsets":[{from},{to}]}}"#,
                sizes.0
            )
        };
        let mut header = format!(
            r#"{{"representation":{},"logits":{},"images":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}}}}"#,
            matrix(sizes.1, 0, ends.0),
            matrix(sizes.2, ends.0, ends.1),
            names.len(),
            ends.1,
            ends.1 + names.len()
        );
        // The values start at a multiple of eight.
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let start = 8 + header.len() as u64;
        let mut this = Self {
            path: path.to_owned(),
            file: WholeFile::create(path).map_err(|e| failed(path, e.to_string()))?,
            sizes,
            starts: (start, start + first as u64),
            written: 0,
        };
        this.at(0, &(header.len() as u64).to_le_bytes())?;
        this.at(8, header.as_bytes())?;
        this.at(start + ends.1 as u64, &names)?;
        Ok(this)
    }

    /// Writes the rows of a batch, which begins where the one before ended.
    ///
    /// # Errors
    /// [`Error::File`] where the disk is full, for one, or an image was left out.
    pub fn write(&mut self, batch: &Prediction) -> Result<()> {
        let (rows, first, second) = self.sizes;
        let count = batch.logits.dims()[0];
        let place = self.written;
        let expected = (place..).zip(&batch.indices);
        if batch.indices.len() != count || expected.into_iter().any(|(row, &i)| i as usize != row) {
            return Err(failed(
                &self.path,
                "images must come in order and none be left out".to_owned(),
            ));
        }
        if place + count > rows {
            return Err(failed(
                &self.path,
                format!("is for {rows} images, not more"),
            ));
        }
        for (values, columns, start) in [
            (&batch.representation, first, self.starts.0),
            (&batch.logits, second, self.starts.1),
        ] {
            let bytes = little_endian(values)?;
            if bytes.len() != count * columns * 4 {
                return Err(failed(
                    &self.path,
                    format!("is for rows of {columns} values"),
                ));
            }
            self.at(start + (place * columns * 4) as u64, &bytes)?;
        }
        self.written += count;
        Ok(())
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be completed.
    pub fn finish(self) -> Result<()> {
        let Self { path, file, .. } = self;
        file.finish().map_err(|e| failed(&path, e.to_string()))
    }

    fn at(&mut self, place: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.file().and_then(|file| {
            file.seek(SeekFrom::Start(place))?;
            file.write_all(bytes)
        });
        written.map_err(|e| failed(&self.path, e.to_string()))
    }
}

fn little_endian(values: &Tensor) -> Result<Vec<u8>> {
    let values = values.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

fn failed(path: &Path, message: String) -> Error {
    Error::File {
        path: path.to_owned(),
        message,
    }
}
