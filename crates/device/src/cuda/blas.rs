//! Batched products by cuBLAS.

use super::memory::Real;
use crate::{Error, Precision};
use candle_core::{CudaDevice, DType};
use cudarc::cublas::{result, sys};
use std::ffi::c_void;

/// `C = alpha · op(A) · op(B) + beta · C` of row-major matrices, one for each image of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of C, columns of C, inner size.
    pub shape: (usize, usize, usize),
    /// Address, distance of rows, distance of images, and whether it is transposed.
    pub a: (u64, usize, usize, bool),
    /// The same of B.
    pub b: (u64, usize, usize, bool),
    /// Address, distance of rows, distance of images of C.
    pub c: (u64, usize, usize),
    /// Factor of the product.
    pub alpha: f64,
    /// Factor of C.
    pub beta: f64,
    /// Images.
    pub batch: usize,
}

/// Runs a product on the stream of the device.
///
/// # Safety
/// All operands lie in memory that is alive, of this type, and C overlaps neither A nor B.
///
/// # Errors
/// [`Error::Call`].
pub unsafe fn gemm<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    precision: Precision,
    product: &Gemm,
) -> candle_core::Result<()> {
    let (rows, columns, inner) = product.shape;
    if rows * columns * product.batch == 0 {
        return Ok(());
    }
    let single = (product.alpha as f32, product.beta as f32);
    let double = (product.alpha, product.beta);
    let factor = |of_f32: &f32, of_f64: &f64| -> *const c_void {
        match T::DTYPE {
            DType::F64 => std::ptr::from_ref(of_f64).cast(),
            _ => std::ptr::from_ref(of_f32).cast(),
        }
    };
    let (kind, compute) = match (T::DTYPE, precision) {
        (DType::F64, _) => (
            sys::cudaDataType_t::CUDA_R_64F,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_64F,
        ),
        (DType::BF16, _) => (
            sys::cudaDataType_t::CUDA_R_16BF,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        ),
        (_, Precision::Full) => (
            sys::cudaDataType_t::CUDA_R_32F,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        ),
        (_, Precision::Tf32) => (
            sys::cudaDataType_t::CUDA_R_32F,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        ),
    };
    let transposed = |yes| match yes {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let blas = device.cublas_handle();
    // cuBLAS knows columns: row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ.
    // SAFETY: the caller vouches for the operands; candle's handle is of the same library.
    let done = unsafe {
        result::gemm_strided_batched_ex(
            blas.handle().cast(),
            transposed(product.b.3),
            transposed(product.a.3),
            columns as i32,
            rows as i32,
            inner as i32,
            factor(&single.0, &double.0),
            product.b.0 as *const c_void,
            kind,
            product.b.1 as i32,
            product.b.2 as i64,
            product.a.0 as *const c_void,
            kind,
            product.a.1 as i32,
            product.a.2 as i64,
            factor(&single.1, &double.1),
            product.c.0 as *mut c_void,
            kind,
            product.c.1 as i32,
            product.c.2 as i64,
            product.batch as i32,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(|error| {
        Error::Call {
            op,
            problem: format!("cuBLAS: {:?}", error.0),
        }
        .into()
    })
}
