//! The linear layer: products by cuBLAS.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Tensor};
use isqrt_device::cuda::kernels::LINEAR;
use isqrt_device::cuda::{Gemm, Grid, Real, gemm, input, int, long, pointer};
use isqrt_device::precision;

use super::{OnGpu, Operand, allocate, on_gpu, run};

/// Address and distance of rows of a matrix, and whether its transpose is meant.
type Place = (u64, usize, bool);

/// `C = A B`, or `C += A B`.
fn product<T: Real>(
    device: &CudaDevice,
    shape: (usize, usize, usize),
    (a, b): (Place, Place),
    c: u64,
    add: bool,
) -> Result<()> {
    let product = Gemm {
        shape,
        a: (a.0, a.1, 0, a.2),
        b: (b.0, b.1, 0, b.2),
        c: (c, shape.1, 0),
        alpha: 1.0,
        beta: f64::from(u8::from(add)),
        batch: 1,
    };
    // SAFETY: the operands are borrowed for the call and of the sizes that the op has checked.
    unsafe { gemm::<T>("linear", device, precision(), &product) }
}

/// `x Wᵀ + b` for `(batch, inputs)` and `(out, inputs)`.
pub(crate) fn forward(
    [(x, lx), (w, lw), (b, lb)]: [Operand<'_>; 3],
    (batch, inputs, out): (usize, usize, usize),
) -> Result<(CudaStorage, Shape)> {
    on_gpu!("linear", x, T => {
        let (xs, ws, bs) = (input::<T>(x, lx)?, input::<T>(w, lw)?, input::<T>(b, lb)?);
        let device = x.device();
        let y = allocate::<T>("linear", device, &[batch, out])?;
        let arguments = [pointer(bs.at), pointer(y.at()), long(batch * out), int(out)];
        run::<T>(device, &LINEAR, "spread", Grid::over(batch * out), &arguments)?;
        let operands = ((xs.at, inputs, false), (ws.at, inputs, true));
        product::<T>(device, (batch, out, inputs), operands, y.at(), true)?;
        Ok((y.into_storage(), Shape::from((batch, out))))
    })
}

/// Gradients of input (where it is wanted), weight and bias.
pub(crate) fn backward(
    (x, weight, dy): (&Tensor, &Tensor, &Tensor),
    (batch, inputs, out): (usize, usize, usize),
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let dx = |[(w, lw), (g, lg)]: [Operand<'_>; 2]| {
        on_gpu!("linear", w, T => {
            let (w_at, g) = (input::<T>(w, lw)?, input::<T>(g, lg)?);
            let dx = allocate::<T>("linear", w.device(), &[batch, inputs])?;
            let operands = ((g.at, out, false), (w_at.at, inputs, false));
            product::<T>(w.device(), (batch, inputs, out), operands, dx.at(), false)?;
            Ok((dx.into_storage(), Shape::from((batch, inputs))))
        })
    };
    let dw = |[(x, lx), (g, lg)]: [Operand<'_>; 2]| {
        on_gpu!("linear", x, T => {
            let (x_at, g) = (input::<T>(x, lx)?, input::<T>(g, lg)?);
            let dw = allocate::<T>("linear", x.device(), &[out, inputs])?;
            let operands = ((g.at, out, true), (x_at.at, inputs, false));
            product::<T>(x.device(), (out, inputs, batch), operands, dw.at(), false)?;
            Ok((dw.into_storage(), Shape::from((out, inputs))))
        })
    };
    let db = |[(g, lg)]: [Operand<'_>; 1]| {
        on_gpu!("linear", g, T => {
            let from = input::<T>(g, lg)?;
            let db = allocate::<T>("linear", g.device(), &[out])?;
            let arguments = [pointer(from.at), pointer(db.at()), int(batch), int(out)];
            run::<T>(g.device(), &LINEAR, "column_sums", Grid::over(out), &arguments)?;
            Ok((db.into_storage(), Shape::from(out)))
        })
    };
    let wanted = x.track_op();
    Ok((
        wanted
            .then(|| weight.apply_op2_no_bwd(dy, &OnGpu("linear-gradient", dx)))
            .transpose()?,
        x.apply_op2_no_bwd(dy, &OnGpu("linear-gradient", dw))?,
        dy.apply_op1_no_bwd(&OnGpu("linear-gradient", db))?,
    ))
}
