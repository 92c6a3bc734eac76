//! How a GPU computes the layer.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use isqrt_device::Precision;

/// How operands of f32 come to tensor cores, which take 10 bits of their mantissas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tf32 {
    /// Rounded.
    Once,
    /// In two parts, of which three products are added: as exact as f32 up to its last bits.
    Thrice,
}

/// How a GPU computes the layer. All give the same up to rounding. The CPU does not look at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GpuKernel {
    /// [`Fused`](Self::Fused) where the matrices are that small, else [`Tiles`](Self::Tiles).
    #[default]
    Auto,
    /// The fastest of those that [compute our algebra in f32](Self::is_ours_in_f32), by a measurement at the first
    /// batch of a shape on each GPU, which takes some twenty passes a kernel while other threads wait for their
    /// own, and memory for one more pass of the layer. Another run, or another GPU of the same run, may find
    /// another one, and so round differently. [`measured_kernels`](crate::measured_kernels) tells what was found.
    Fastest,
    /// Our products, a launch each: half of a symmetric result is computed, with its linear part in the same
    /// launch.
    Tiles,
    /// The same in f32 on tensor cores, which round operands to TF32. f64 is computed by
    /// [`Tiles`](Self::Tiles).
    TensorCores(Tf32),
    /// All products of the iteration in one launch, iterates in shared memory, a block an image: for sides up to
    /// 64, fewer in f64 or for programs with many registers.
    Fused,
    /// The same by a cluster of eight blocks an image, each with its rows of all matrices: for sides up to
    /// 256 in f32, on compute capability 9.0 and later. It computes whole products.
    Cluster,
    /// Our algebra with whole products by cuBLAS.
    Cublas(Precision),
    /// The algorithm of the authors' code with whole products by cuBLAS: a coupled iteration on the
    /// covariance that keeps `Y` and `Z` of every step, and reverse-mode differentiation. Newton–Schulz,
    /// trace and compensation only.
    Reference(Precision),
}

impl GpuKernel {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Auto,
        Self::Fastest,
        Self::Tiles,
        Self::TensorCores(Tf32::Thrice),
        Self::TensorCores(Tf32::Once),
        Self::Fused,
        Self::Cluster,
        Self::Cublas(Precision::Full),
        Self::Cublas(Precision::Tf32),
        Self::Reference(Precision::Full),
        Self::Reference(Precision::Tf32),
    ];

    /// Whether it is a way of computing our algebra whose results are as exact as those of f32.
    #[must_use]
    pub fn is_ours_in_f32(self) -> bool {
        use GpuKernel::{Cluster, Cublas, Fused, TensorCores, Tiles};
        matches!(
            self,
            Tiles | Fused | Cluster | TensorCores(Tf32::Thrice) | Cublas(Precision::Full)
        )
    }

    /// Its name in specs and on command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fastest => "fastest",
            Self::Tiles => "tiles",
            Self::TensorCores(Tf32::Thrice) => "tensor-cores",
            Self::TensorCores(Tf32::Once) => "tensor-cores-tf32",
            Self::Fused => "fused",
            Self::Cluster => "cluster",
            Self::Cublas(Precision::Full) => "cublas",
            Self::Cublas(Precision::Tf32) => "cublas-tf32",
            Self::Reference(Precision::Full) => "reference",
            Self::Reference(Precision::Tf32) => "reference-tf32",
        }
    }
}

impl fmt::Display for GpuKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for GpuKernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("there is no kernel `{name}` of the layer; there are {names}")
        })
    }
}

/// A place in [`GpuKernel::ALL`].
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// How the layers of the whole program compute on a GPU from now on; [`GpuKernel::Auto`] at first. Training sets
/// it as its recipe says.
pub fn set_gpu_kernel(kernel: GpuKernel) {
    let at = GpuKernel::ALL.iter().position(|&known| known == kernel);
    CHOSEN.store(at.unwrap_or(0), Ordering::Relaxed);
}

/// What [`set_gpu_kernel`] said last.
#[must_use]
pub fn gpu_kernel() -> GpuKernel {
    GpuKernel::ALL[CHOSEN.load(Ordering::Relaxed)]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_name_of_its_own() {
        for kernel in GpuKernel::ALL {
            assert_eq!(kernel.name().parse(), Ok(kernel));
        }
        let said = "tile".parse::<GpuKernel>().unwrap_err();
        assert!(said.starts_with(
            "there is no kernel `tile` of the layer; there are auto, fastest, tiles,"
        ));
    }
}
