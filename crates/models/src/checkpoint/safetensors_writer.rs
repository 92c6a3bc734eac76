//! Writes safetensors: a header in JSON with names, shapes and places, then the values.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};

use candle_core::Tensor;
use safetensors::View;
use safetensors::tensor::{Metadata, TensorInfo};

/// Writes the tensors, those of wider elements first, so that all are aligned.
pub(super) fn write(
    tensors: &[(String, Tensor)],
    metadata: HashMap<String, String>,
    file: &mut File,
) -> Result<(), String> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.dtype().size_in_bytes()), name));
    let mut end = 0;
    let infos = sorted.iter().map(|(name, tensor)| {
        let start = end;
        end += View::data_len(tensor);
        let info = TensorInfo {
            dtype: View::dtype(tensor),
            shape: tensor.dims().to_vec(),
            data_offsets: (start, end),
        };
        (name.clone(), info)
    });
    let header = Metadata::new(Some(metadata), infos.collect()).map_err(|e| e.to_string())?;
    // As a value its keys are in order, so that the same weights are the same bytes.
    let header = serde_json::to_value(&header).map_err(|e| e.to_string())?;
    let mut header = serde_json::to_vec(&header).map_err(|e| e.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut put = || -> std::io::Result<()> {
        let mut out = BufWriter::new(&mut *file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, tensor) in &sorted {
            out.write_all(&View::data(tensor))?;
        }
        out.flush()
    };
    put().map_err(|e| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_same_weights_are_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |name: &str| {
            let tensors = [("b", 2.0_f32), ("a", 1.0)];
            let tensors = tensors.map(|(name, value)| {
                let tensor = Tensor::new(&[value], &Device::Cpu).unwrap();
                (name.to_owned(), tensor)
            });
            // A map of its own order each time.
            let metadata = (0..9).map(|i| (format!("key{i}"), i.to_string())).collect();
            let path = folder.path().join(name);
            write(&tensors, metadata, &mut File::create(&path).unwrap()).unwrap();
            let read = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
            assert_eq!(read["a"].to_vec1::<f32>().unwrap(), [1.0]);
            std::fs::read(&path).unwrap()
        };
        assert_eq!(bytes("first"), bytes("second"));
    }
}
