//! Functions of the second moment on a GPU: the decomposition by cuSOLVER, all else by our kernels.
//!
//! The adjoint is that of [the module](super). Decompositions wait for the GPU, so features that are
//! not finite are an error here, as they are on the CPU; upstream gradients are not looked at.

use crate::config::Output as Form;
use crate::count::{Factorisation, count};
use crate::gpu::{Images, Matrices, Target, pair};
use crate::layer::{Layered, out_shape};
use crate::moment::Moment;
use crate::reference::Number;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};
use isqrt_device::cuda::kernels::{POOLING, SPECTRAL};
use isqrt_device::cuda::{
    Argument, Eigensolver, Grid, Input, Output, Squares, eigen, input, int, pointer, read_back,
    real,
};
use std::sync::{Arc, OnceLock};

const OP: &str = "eigendecomposition";

/// A function of eigenvalues that the kernels know.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Function {
    /// `(λ + ε)^p`
    Power { power: f64, epsilon: f64 },
    /// `log(λ + ε)`
    Log { epsilon: f64 },
    /// `√max(λ, ε)`
    FlooredRoot { floor: f64 },
}

impl Function {
    /// As `spectral.cu` takes it.
    fn arguments(self) -> [Argument; 3] {
        match self {
            Self::Power { power, epsilon } => [int(0), real(power), real(epsilon)],
            Self::Log { epsilon } => [int(1), real(0.0), real(epsilon)],
            Self::FlooredRoot { floor } => [int(2), real(0.5), real(floor)],
        }
    }
}

/// Pools features `(batch, d, M)` of type `T` that lie on a GPU, differentiably.
pub(crate) fn pool<T: Number + Layered>(
    x: &Tensor,
    (batch, d, positions): (usize, usize, usize),
    moment: Moment,
    (function, output): (Function, Form),
) -> Result<Tensor> {
    let op = Op::<T> {
        moment,
        function,
        output,
        batch,
        d,
        positions,
        tracked: x.track_op(),
        kept: OnceLock::new(),
    };
    Ok(x.contiguous()?.apply_op1(op)?)
}

/// What waits for the backward pass.
struct Kept<T> {
    means: Option<Arc<Output<T>>>,
    /// Eigenvectors, one a row.
    vectors: Matrices<T>,
    values: Arc<Output<f64>>,
}

struct Op<T: 'static> {
    moment: Moment,
    function: Function,
    output: Form,
    batch: usize,
    d: usize,
    positions: usize,
    tracked: bool,
    kept: OnceLock<Kept<T>>,
}

impl<T: Number + Layered> Op<T> {
    fn size(&self) -> usize {
        self.moment.size(self.d)
    }

    /// Means of the rows of contiguous `(batch, d, M)` values.
    fn means(&self, images: &Images<'_>, rows: u64) -> Result<Arc<Output<T>>> {
        let means = images.allocate(&[self.batch, self.d])?;
        let distances = images.allocate::<f64>(&[self.batch, self.d])?;
        let grid = Grid::blocks(self.batch * self.d, 128);
        let arguments = [
            pointer(rows),
            pointer(means.at()),
            pointer(distances.at()),
            int(self.positions),
        ];
        images.launch::<T>(&POOLING, "row_statistics", grid, &arguments)?;
        Ok(means)
    }

    /// Values less a share of their means, over `√M`, to `(plain, its rows' distance)`, transposed, or
    /// both.
    fn shifted(
        &self,
        images: &Images<'_>,
        values: u64,
        means: Option<&Output<T>>,
        size: usize,
        (plain, plain_row): (u64, usize),
        (turned, turned_row): (u64, usize),
    ) -> Result<()> {
        let tiles = size.div_ceil(32) * self.positions.div_ceil(32);
        let arguments = [
            pointer(values),
            pointer(means.map_or(0, Output::at)),
            pointer(plain),
            pointer(turned),
            int(self.d),
            int(self.positions),
            int(size),
            int(plain_row),
            int(turned_row),
            real(self.moment.removed),
            real(self.factor()),
        ];
        let grid = Grid::blocks(tiles * self.batch, 256);
        images.launch::<T>(&SPECTRAL, "shifted", grid, &arguments)
    }

    fn factor(&self) -> f64 {
        1.0 / (self.positions as f64).sqrt()
    }

    /// A kernel over all values of a matrix, which ends in the function.
    fn by_function(
        &self,
        images: &Images<'_>,
        name: &'static str,
        matrix: &Matrices<T>,
        pointers: &[u64],
    ) -> Result<()> {
        let mut arguments: Vec<Argument> = pointers.iter().map(|&at| pointer(at)).collect();
        arguments.extend([int(self.size()), int(matrix.row)]);
        arguments.extend(self.function.arguments());
        images.over(&SPECTRAL, name, matrix, &arguments)
    }

    /// The eigenvectors, one a row, and the eigenvalues.
    fn decompose(
        &self,
        images: &Images<'_>,
        moment: Matrices<T>,
    ) -> Result<(Matrices<T>, Arc<Output<f64>>)> {
        let n = self.size();
        let batch = self.batch;
        let scales = images.allocate::<f64>(&[batch])?;
        let flags = images.allocate::<f64>(&[batch])?;
        let arguments = [
            pointer(moment.at()),
            pointer(scales.at()),
            pointer(flags.at()),
            int(n),
            int(moment.row),
        ];
        images.launch::<T>(&SPECTRAL, "near_one", Grid::blocks(batch, 256), &arguments)?;
        let raw = images.allocate::<T>(&[batch, n])?;
        let squares = Squares {
            at: moment.at(),
            n,
            row: moment.row,
            batch,
        };
        let solver = Eigensolver::Auto;
        // SAFETY: moment and eigenvalues are of this call.
        let info = unsafe { eigen::<T>(OP, images.device, solver, squares, raw.at()) }
            .map_err(candle_core::Error::from)?;
        (0..batch).for_each(|_| count(Factorisation::Eig));
        let flags = read_back(OP, &flags).map_err(candle_core::Error::from)?;
        for (index, (&flag, &info)) in flags.iter().zip(&info).enumerate() {
            if flag != 0.0 {
                let what = "a feature or the covariance";
                return Err(Error::NonFinite { index, what });
            }
            if info != 0 {
                let what = OP;
                return Err(Error::Decomposition { index, what });
            }
        }
        let values = images.allocate::<f64>(&[batch, n])?;
        let arguments = [
            pointer(raw.at()),
            pointer(scales.at()),
            pointer(values.at()),
            int(n),
            real(<T as Number>::EPSILON),
        ];
        images.launch::<T>(&SPECTRAL, "spectrum", Grid::blocks(batch, 128), &arguments)?;
        Ok((moment, values))
    }

    fn forward(&self, images: &Images<'_>, features: Input) -> Result<(Output<T>, Kept<T>)> {
        let n = self.size();
        let out = images.output(&[self.batch, self.output.len(n)])?;
        let means = match self.moment.removed == 0.0 {
            true => None,
            false => Some(self.means(images, features.at)?),
        };
        let turned = images.matrices::<T>(self.positions, n)?;
        let to = (turned.at(), turned.row);
        self.shifted(images, features.at, means.as_deref(), n, (0, 0), to)?;
        let moment = images.matrices::<T>(n, n)?;
        let target = Target::new(1.0).both(&moment);
        images.product::<T>((n, n), true, &[pair(&turned, &turned)], &[target])?;
        drop(turned);
        let (vectors, values) = self.decompose(images, moment)?;
        let weighted = images.matrices::<T>(n, n)?;
        let pointers = [vectors.at(), values.at(), weighted.at()];
        self.by_function(images, "weighted", &weighted, &pointers)?;
        let target = Target::new(1.0).output(out.at(), n, self.output == Form::Triangle);
        images.product::<T>((n, n), true, &[pair(&vectors, &weighted)], &[target])?;
        let kept = Kept {
            means,
            vectors,
            values,
        };
        Ok((out, kept))
    }

    fn backward(
        &self,
        images: &Images<'_>,
        kept: &Kept<T>,
        features: Input,
        gradient: Input,
    ) -> Result<Output<T>> {
        let (n, d, m) = (self.size(), self.d, self.positions);
        let square = || images.matrices::<T>(n, n);
        let rows = &kept.vectors;
        let columns = square()?;
        let side = n.div_ceil(32);
        let arguments = [
            pointer(rows.at()),
            pointer(columns.at()),
            int(n),
            int(rows.row),
        ];
        let grid = Grid::blocks(side * side * self.batch, 256);
        images.launch::<T>(&SPECTRAL, "turned", grid, &arguments)?;

        let upstream = square()?;
        let arguments = [
            pointer(gradient.at),
            pointer(0),
            pointer(upstream.at()),
            int(n),
            int(upstream.row),
            int(usize::from(self.output == Form::Triangle)),
        ];
        images.over(&POOLING, "upstream", &upstream, &arguments)?;

        let direct = |to: &Matrices<T>| Target::new(1.0).direct(to);
        let (half, inside) = (square()?, square()?);
        let pairs = [pair(&upstream, &columns)];
        images.product::<T>((n, n), false, &pairs, &[direct(&half)])?;
        drop(upstream);
        let pairs = [pair(&columns, &half)];
        images.product::<T>((n, n), true, &pairs, &[Target::new(1.0).both(&inside)])?;
        self.by_function(images, "divided", &inside, &[inside.at(), kept.values.at()])?;
        images.product::<T>((n, n), false, &[pair(&inside, rows)], &[direct(&half)])?;
        // What was inside has been read: the gradient of the moment takes its memory.
        let moment = inside;
        let pairs = [pair(rows, &half)];
        images.product::<T>((n, n), true, &pairs, &[Target::new(1.0).both(&moment)])?;

        let plain = images.matrices::<T>(n, m)?;
        let to = (plain.at(), plain.row);
        self.shifted(images, features.at, kept.means.as_deref(), n, to, (0, 0))?;
        let out = images.output::<T>(&[self.batch, d, m])?;
        let product = |to: &Output<T>, alpha: f64| {
            let mut target = Target::new(alpha);
            (target.direct, target.direct_image) = (to.at(), (d * m) as i64);
            (target.direct_row, target.direct_width) = (m as i32, m as i32);
            images.product::<T>((d, m), false, &[pair(&moment, &plain)], &[target])
        };
        // Rows of centred features stay centred.
        if self.moment.removed == 0.0 || self.moment == Moment::COVARIANCE {
            product(&out, 2.0 * self.factor())?;
            return Ok(out);
        }
        let between = images.allocate::<T>(&[self.batch, d, m])?;
        product(&between, 2.0)?;
        let means = self.means(images, between.at())?;
        self.shifted(images, between.at(), Some(&means), d, (out.at(), m), (0, 0))?;
        Ok(out)
    }

    fn images<'a>(&self, device: &'a candle_core::CudaDevice) -> Images<'a> {
        Images {
            op: OP,
            device,
            batch: self.batch,
            arena: None,
        }
    }
}

impl<T: Number + Layered> CustomOp1 for Op<T> {
    fn name(&self) -> &'static str {
        "second-moment-pooling"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let images = self.images(storage.device());
        let (out, kept) = self.forward(&images, input::<T>(storage, layout)?)?;
        if self.tracked {
            let _ = self.kept.set(kept);
        }
        let shape = out_shape(self.output, self.batch, self.size());
        Ok((out.into_storage(), shape))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let (arg, grad_res) = (arg.contiguous()?, grad_res.contiguous()?);
        let gradient = arg.apply_op2_no_bwd(&grad_res, &Gradient(self))?;
        Ok(Some(gradient))
    }
}

/// The backward pass, as an op of features and gradient.
struct Gradient<'a, T: 'static>(&'a Op<T>);

impl<T: Number + Layered> CustomOp2 for Gradient<'_, T> {
    fn name(&self) -> &'static str {
        "second-moment-pooling-gradient"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(Error::Device.into())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        g: &CudaStorage,
        g_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some(kept) = self.0.kept.get() else {
            candle_core::bail!("{OP}: backward before forward")
        };
        let images = self.0.images(x.device());
        let (features, gradient) = (input::<T>(x, x_layout)?, input::<T>(g, g_layout)?);
        let out = self.0.backward(&images, kept, features, gradient)?;
        Ok((out.into_storage(), x_layout.shape().clone()))
    }
}
