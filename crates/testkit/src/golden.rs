//! Golden files: tensors made by another program (`tools/golden/`), kept as safetensors.

use std::collections::{BTreeMap, HashMap};
use std::ops::Index;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

/// The tensors of one golden file, by name: `golden["x"]`.
#[derive(Debug)]
pub struct Golden {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    /// Reads a safetensors file; `.safetensors` is added where the path has no extension.
    ///
    /// A relative path is relative to the crate under test, where cargo runs its tests.
    ///
    /// # Errors
    /// A message with the path: unreadable, or not a safetensors file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, String> {
        let mut path = path.as_ref().to_path_buf();
        if path.extension().is_none() {
            path.set_extension("safetensors");
        }
        let told =
            |error: &dyn std::fmt::Display| format!("golden file {}: {error}", path.display());
        let bytes = std::fs::read(&path).map_err(|e| told(&e))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| told(&e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| told(&e))?;
        Ok(Self {
            path,
            tensors: tensors.into_iter().collect(),
            metadata,
        })
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A line of the file's metadata, such as its generator or a parameter.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }
}

impl Index<&str> for Golden {
    type Output = Tensor;

    /// # Panics
    /// Where the file has no such tensor, naming those that it has.
    fn index(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| {
            let known: Vec<&str> = self.names().collect();
            panic!(
                "no tensor {name:?} in {}, which has {known:?}",
                self.path.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn round_trip() {
        let path = std::env::temp_dir().join(format!("golden-{}.safetensors", std::process::id()));
        let x = crate::randn((2, 3), 5, candle_core::DType::F64).unwrap();
        candle_core::safetensors::save(&HashMap::from([("x", x.clone())]), &path).unwrap();
        let golden = Golden::load(path.with_extension("")).unwrap();
        std::fs::remove_file(&path).unwrap();
        crate::assert_close!(golden["x"], x, atol = 0.0);
        assert_eq!(golden.names().collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn a_missing_file_is_named() {
        assert!(Golden::load("no/such").is_err_and(|m| m.contains("no/such.safetensors")));
    }
}
