//! Writes what `torch.load` reads: a zip archive with a pickle of names and shapes, and a file for
//! the values of each tensor (`torch/serialization.py` of PyTorch 1.6 and later).

use std::fs::File;
use std::io::{BufWriter, Seek, Write};

use candle_core::{DType, Tensor};
use safetensors::View;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::file::row_major;

/// Name of the folder in the archive, as PyTorch's own files have it for most names.
const ROOT: &str = "archive";
/// PyTorch maps storages into memory at multiples of this.
const ALIGNMENT: u16 = 64;

/// Writes the tensors as an ordered dictionary.
pub(super) fn write(tensors: &[(String, Tensor)], file: &mut File) -> Result<(), String> {
    let mut archive = ZipWriter::new(BufWriter::new(file));
    if let Err(message) = fill(tensors, &mut archive) {
        // Dropped, it would try to end the archive, and print that it cannot.
        std::mem::forget(archive);
        return Err(message);
    }
    let mut out = archive.finish().map_err(|e| e.to_string())?;
    out.flush().map_err(|e| e.to_string())
}

fn fill<W: Write + Seek>(
    tensors: &[(String, Tensor)],
    archive: &mut ZipWriter<W>,
) -> Result<(), String> {
    let mut put = |name: &str, bytes: &[u8]| -> Result<(), String> {
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .with_alignment(ALIGNMENT)
            .large_file(u32::try_from(bytes.len()).is_err());
        archive
            .start_file(format!("{ROOT}/{name}"), options)
            .map_err(|e| e.to_string())?;
        archive.write_all(bytes).map_err(|e| e.to_string())
    };
    put("data.pkl", &pickle(tensors)?)?;
    put("byteorder", b"little")?;
    for (i, (_, tensor)) in tensors.iter().enumerate() {
        put(&format!("data/{i}"), &tensor.data())?;
    }
    put("version", b"3\n")
}

/// `OrderedDict` of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, each on
/// a storage of its own, in protocol 2.
fn pickle(tensors: &[(String, Tensor)]) -> Result<Vec<u8>, String> {
    const DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let mut out = vec![0x80, 2];
    out.extend_from_slice(DICT);
    out.push(b'(');
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let storage = match tensor.dtype() {
            DType::F64 => "DoubleStorage",
            DType::F32 => "FloatStorage",
            DType::F16 => "HalfStorage",
            DType::BF16 => "BFloat16Storage",
            other => return Err(format!("{name:?} has elements of type {other:?}")),
        };
        text(&mut out, name);
        out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend_from_slice(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        number(&mut out, tensor.elem_count());
        out.extend_from_slice(b"tQ");
        number(&mut out, 0);
        for sizes in [tensor.dims(), &row_major(tensor.dims())] {
            out.push(b'(');
            sizes.iter().for_each(|&size| number(&mut out, size));
            out.push(b't');
        }
        out.push(0x89);
        out.extend_from_slice(DICT);
        out.extend_from_slice(b"tR");
    }
    out.extend_from_slice(b"u.");
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn number(out: &mut Vec<u8>, value: usize) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend_from_slice(&value.to_le_bytes());
        }
        Err(_) => {
            out.extend_from_slice(&[0x8A, 8]);
            out.extend_from_slice(&(value as u64).to_le_bytes());
        }
    }
}
