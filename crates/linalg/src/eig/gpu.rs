//! Functions of the second moment on a GPU: cuSOLVER decomposes, kernels apply the function and its divided
//! differences, cuBLAS multiplies.
//!
//! One op from moment to function; what is between features and moment, and between the matrix and the
//! output, are candle's ops. Each call waits for the GPU twice: whether the moments are finite, and what the
//! library says of each.

use super::Function;
use crate::config::Output as Form;
use crate::moment::Moment;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, DType, Device, Layout};
use candle_core::{Shape, Tensor};
use isqrt_device::Precision;
use isqrt_device::cuda::kernels::SPECTRAL;
use isqrt_device::cuda::{
    Eigensolver, Gemm, Grid, Output, Real, address, eigen, gemm, input, int, launch, long, pointer,
    read_back, real,
};
use std::sync::OnceLock;

const OP: &str = "second-moment-pooling";

/// [`crate::moment::pool`] of features on a GPU, by a function of eigenvalues.
pub(crate) fn pool(x: &Tensor, moment: Moment, function: Function, form: Form) -> Result<Tensor> {
    let (batch, d, positions) = crate::layer::feature_shape(x)?;
    let x = x.reshape((batch, d, positions))?;
    let mut z = match moment.removed {
        0.0 => x.clone(),
        share => x.broadcast_sub(&(x.mean_keepdim(2)? * share)?)?,
    };
    if moment.ones {
        let ones = Tensor::ones((batch, 1, positions), x.dtype(), x.device())?;
        z = Tensor::cat(&[z, ones], 1)?;
    }
    // Divided before the product, which could overflow.
    let z = (z * (1.0 / (positions as f64).sqrt()))?;
    let moment = z.matmul(&z.t()?.contiguous()?)?;
    let matrix = moment.apply_op1(Spectral {
        function,
        kept: OnceLock::new(),
    })?;
    let n = matrix.dim(2)?;
    match form {
        Form::Full => Ok(matrix),
        Form::Triangle => {
            let places = (0..n).flat_map(|i| (i..n).map(move |j| (i * n + j) as u32));
            let places: Vec<u32> = places.collect();
            let len = places.len();
            let places = Tensor::from_vec(places, len, matrix.device())?;
            Ok(matrix.reshape((batch, n * n))?.index_select(&places, 1)?)
        }
    }
}

struct Spectral {
    function: Function,
    /// Eigenvectors, as rows, and eigenvalues.
    kept: OnceLock<(Tensor, Tensor)>,
}

/// `(matrices, side)` of square matrices.
fn extent(dims: &[usize]) -> candle_core::Result<(usize, usize)> {
    match *dims {
        [batch, n, m] if n == m => Ok((batch, n)),
        ref other => candle_core::bail!("{OP}: {other:?} are no square matrices"),
    }
}

/// `op(A) · op(B)` of square matrices, one for each of a batch.
fn product<T: Real>(
    device: &CudaDevice,
    (batch, n): (usize, usize),
    (a, a_turned): (u64, bool),
    (b, b_turned): (u64, bool),
) -> candle_core::Result<Output<T>> {
    let c = Output::<T>::new(OP, device, &[batch, n, n])?;
    let product = Gemm {
        shape: (n, n, n),
        a: (a, n, n * n, a_turned),
        b: (b, n, n * n, b_turned),
        c: (c.at(), n, n * n),
        alpha: 1.0,
        beta: 0.0,
        batch,
    };
    // SAFETY: the operands live to the end of the caller, and are of these sizes.
    unsafe { gemm::<T>(OP, device, Precision::Full, &product)? };
    Ok(c)
}

impl Spectral {
    fn forward<T: Real>(
        &self,
        device: &CudaDevice,
        a: u64,
        (batch, n): (usize, usize),
    ) -> candle_core::Result<Output<T>> {
        let vectors = Output::<T>::new(OP, device, &[batch, n, n])?;
        let scales = Output::<f64>::new(OP, device, &[batch])?;
        let blocks = Grid::blocks(batch, 256);
        let arguments = [
            pointer(a),
            pointer(vectors.at()),
            pointer(scales.at()),
            int(n),
        ];
        // SAFETY: the arguments of the kernel, in memory that was made for them; so below.
        unsafe { launch::<T>(device, &SPECTRAL, "near_one", blocks, &arguments)? };
        let finite = read_back(OP, &scales)?;
        if let Some(index) = finite.iter().position(|scale| !scale.is_finite()) {
            let what = "a feature, or the covariance (it overflows)";
            return Err(Error::NonFinite { index, what }.into());
        }
        let raw = Output::<T>::new(OP, device, &[batch, n])?;
        let operands = (vectors.at(), raw.at());
        // SAFETY: as above.
        let codes = unsafe { eigen::<T>(device, Eigensolver::Auto, (batch, n), operands)? };
        if let Some(index) = codes.iter().position(|&code| code != 0) {
            let what = "eigendecomposition";
            return Err(Error::Decomposition { index, what }.into());
        }
        let values = Output::<f64>::new(OP, device, &[batch, n])?;
        let epsilon = match T::DTYPE {
            DType::F64 => f64::EPSILON,
            _ => f64::from(f32::EPSILON),
        };
        let arguments = [
            pointer(raw.at()),
            pointer(scales.at()),
            pointer(values.at()),
            int(n),
            real(epsilon),
        ];
        // SAFETY: as above.
        unsafe { launch::<T>(device, &SPECTRAL, "true_values", blocks, &arguments)? };
        let scaled = Output::<T>::new(OP, device, &[batch, n, n])?;
        let count = batch * n * n;
        let arguments = [
            pointer(vectors.at()),
            pointer(values.at()),
            pointer(scaled.at()),
            long(count),
            int(n),
            real(self.function.power),
            real(self.function.epsilon),
        ];
        let grid = Grid::over(count);
        // SAFETY: as above.
        unsafe { launch::<T>(device, &SPECTRAL, "scale_rows", grid, &arguments)? };
        let (left, right) = ((vectors.at(), true), (scaled.at(), false));
        let result = product::<T>(device, (batch, n), left, right)?;
        let kept = (
            vectors.into_tensor((batch, n, n)),
            values.into_tensor((batch, n)),
        );
        // candle runs an op value once.
        let _ = self.kept.set(kept);
        Ok(result)
    }

    fn backward<T: Real>(
        &self,
        device: &CudaDevice,
        g: u64,
        (batch, n): (usize, usize),
    ) -> candle_core::Result<Output<T>> {
        let Some((vectors, values)) = self.kept.get() else {
            candle_core::bail!("{OP}: backward before forward")
        };
        let (v, extent) = (address::<T>(vectors)?, (batch, n));
        let half = product::<T>(device, extent, (v, false), (g, false))?;
        let inside = product::<T>(device, extent, (half.at(), false), (v, true))?;
        let count = batch * n * n;
        let arguments = [
            pointer(inside.at()),
            pointer(address::<f64>(values)?),
            long(count),
            int(n),
            real(self.function.power),
            real(self.function.epsilon),
        ];
        let grid = Grid::over(count);
        // SAFETY: the arguments of the kernel, in memory that was made for them.
        unsafe { launch::<T>(device, &SPECTRAL, "times_differences", grid, &arguments)? };
        let half = product::<T>(device, extent, (v, true), (inside.at(), false))?;
        product::<T>(device, extent, (half.at(), false), (v, false))
    }
}

impl CustomOp1 for Spectral {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (device, extent) = (s.device(), extent(l.dims())?);
        let y = match s.dtype() {
            DType::F64 => {
                let a = input::<f64>(s, l)?.at;
                self.forward::<f64>(device, a, extent)?.into_storage()
            }
            _ => {
                let a = input::<f32>(s, l)?.at;
                self.forward::<f32>(device, a, extent)?.into_storage()
            }
        };
        Ok((y, l.shape().clone()))
    }

    fn bwd(&self, a: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (g, extent) = (g.contiguous()?, extent(a.dims())?);
        let Device::Cuda(device) = a.device() else {
            return Err(Error::Device.into());
        };
        Ok(Some(match a.dtype() {
            DType::F64 => {
                let g = address::<f64>(&g)?;
                let da = self.backward::<f64>(device, g, extent)?;
                da.into_tensor(a.shape())
            }
            _ => {
                let g = address::<f32>(&g)?;
                let da = self.backward::<f32>(device, g, extent)?;
                da.into_tensor(a.shape())
            }
        }))
    }
}
