//! A linear layer, `y = x·Wᵀ + b`, in one node.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp3, Layout, Shape, Tensor, WithDType, backend::BackendStorage,
};

use crate::Result;
use crate::checkpoint::{Aside, past_the_tape};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::{Element, Matrix, dispatch, parallel_product, read, transpose, values};
use crate::error::shape_error;
use crate::tape;

/// Linear map of each row of `x`.
///
/// # Shapes
/// - `x`: `(batch, in)`; `weight`: `(out, in)`; `bias`: `(out)`
/// - returns `(batch, out)`
///
/// # Errors
/// [`crate::Error::Shape`] where these do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    linear_of(x, weight, bias, None)
}

/// [`linear`] of a layer whose gradients may go past the tape.
pub(crate) fn linear_of(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    aside: Option<&Aside>,
) -> Result<Tensor> {
    match (x.dims(), weight.dims(), bias.dims()) {
        (&[batch, inputs], &[out, columns], &[biases]) if inputs == columns && out == biases => {
            let op = Linear {
                batch,
                inputs,
                out,
                aside: aside.cloned(),
            };
            let parameters = [&weight.contiguous()?, &bias.contiguous()?];
            Ok(tape::apply3(&x.contiguous()?, parameters, op)?)
        }
        (x, weight, bias) => shape_error(
            "linear",
            format!("input {x:?}, weight {weight:?} and bias {bias:?} do not fit together"),
        ),
    }
}

struct Linear {
    batch: usize,
    inputs: usize,
    out: usize,
    aside: Option<Aside>,
}

impl Linear {
    fn forward<T: Element>(&self, x: &[T], weight: &[T], bias: &[T]) -> Vec<T> {
        let x = Matrix::new(x, self.batch, self.inputs);
        let weight = Matrix::new(weight, self.out, self.inputs);
        // Transposed, so that rows of the (large) weight are what is shared out among threads.
        let y = parallel_product(weight, x.transposed());
        let mut y = transpose(&y, self.out, self.batch);
        for row in y.chunks_exact_mut(self.out.max(1)) {
            row.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
        }
        y
    }

    fn backward<T: Element>(
        &self,
        x: &[T],
        weight: &[T],
        dy: &[T],
        wants_dx: bool,
    ) -> (Option<Vec<T>>, Vec<T>, Vec<T>) {
        let dy_matrix = Matrix::new(dy, self.batch, self.out);
        let dw = parallel_product(
            dy_matrix.transposed(),
            Matrix::new(x, self.batch, self.inputs),
        );
        let dx = wants_dx.then(|| {
            let weight = Matrix::new(weight, self.out, self.inputs);
            let dx = parallel_product(weight.transposed(), dy_matrix.transposed());
            transpose(&dx, self.inputs, self.batch)
        });
        let mut db = vec![T::ZERO; self.out];
        for row in dy.chunks_exact(self.out.max(1)) {
            db.iter_mut().zip(row).for_each(|(sum, &d)| *sum += d);
        }
        (dx, dw, db)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = dispatch!("linear", s1.dtype(), T => {
            let y = self.forward::<T>(values(s1, l1)?, values(s2, l2)?, values(s3, l3)?);
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from((self.batch, self.out))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let operands = [(s1, l1), (s2, l2), (s3, l3)];
        cuda::linear::forward(operands, (self.batch, self.inputs, self.out))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let sizes = (self.batch, self.inputs, self.out);
            let (dx, dw, db) = cuda::linear::backward((x, weight, &dy), sizes)?;
            return Ok((
                dx,
                past_the_tape(self.aside.as_ref(), weight, dw)?,
                Some(db),
            ));
        }
        let (xs, ws, dys) = (read(x), read(weight), read(&dy));
        let device = x.device();
        dispatch!("linear", x.dtype(), T => {
            let (dx, dw, db) = self.backward::<T>(
                xs.values()?, ws.values()?, dys.values()?, x.track_op());
            let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), device)).transpose()?;
            let dw = Tensor::from_vec(dw, weight.shape(), device)?;
            Ok((
                dx,
                past_the_tape(self.aside.as_ref(), weight, dw)?,
                Some(Tensor::from_vec(db, self.out, device)?),
            ))
        })
    }
}
