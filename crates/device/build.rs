//! Compiles the kernels to PTX with `nvcc`, where the feature `cuda` is on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest GPUs that the kernels run on (Ampere); the driver compiles them for the GPU at hand.
const ARCHITECTURE: &str = "compute_80";

/// Kernels for later GPUs alone, which are loaded there alone.
const LATER: [(&str, &str); 1] = [("cluster", "compute_90")];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    let mut sources: Vec<PathBuf> = std::fs::read_dir("kernels")
        .expect("the folder kernels is part of this crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let mut running: Vec<_> = sources
        .iter()
        .map(|source| (source, compile(&nvcc, source, &out)))
        .collect();
    for (source, child) in &mut running {
        let status = child.wait().expect("nvcc was started");
        assert!(status.success(), "nvcc failed on {}", source.display());
    }
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> std::process::Child {
    let later = LATER
        .iter()
        .find(|(name, _)| source.file_stem().is_some_and(|stem| stem == *name));
    let architecture = later.map_or(ARCHITECTURE, |(_, architecture)| *architecture);
    let ptx = out.join(source.with_extension("ptx").file_name().expect("a file"));
    Command::new(nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "--expt-relaxed-constexpr"])
        .arg(format!("-arch={architecture}"))
        .arg("-o")
        .arg(ptx)
        .arg(source)
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "the feature cuda needs NVIDIA's compiler: {} does not start ({error}). Install the \
                 CUDA toolkit or run tools/cuda/toolkit.sh, and set CUDA_HOME",
                nvcc.display()
            )
        })
}

/// `$NVCC`, or that of `$CUDA_HOME` or `$CUDA_PATH`, or the one of the search path.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return PathBuf::from(nvcc);
    }
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists())
        .unwrap_or_else(|| PathBuf::from("nvcc"))
}
