//! cuDNN: convolutions, batch normalisation, pooling and the small operations around them.
//!
//! Tensors are read into contiguous arrays in the order of their dimensions (N, C, then
//! the spatial ones) whatever their strides are, and results are written back likewise.

use crate::blas::{Real, product};
use crate::driver::export;
use crate::ptx::{tf32_even, to_odd};
use crate::{device, memory, stream};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

const SUCCESS: c_int = 0;
const BAD_PARAM: c_int = 2000;
const EXECUTION_FAILED: c_int = 5000;
const NOT_SUPPORTED: c_int = 3000;

/// What every call asks for, so that a caller's allocation of it is exercised.
const WORKSPACE: usize = 1024;

pub struct Handle {
    stream: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Type {
    #[default]
    F32,
    F64,
    F16,
    Bf16,
}

impl Type {
    fn of(number: c_int) -> Option<Type> {
        Some(match number {
            0 => Type::F32,
            1 => Type::F64,
            2 => Type::F16,
            9 => Type::Bf16,
            _ => return None,
        })
    }

    fn number(self) -> c_int {
        [0, 1, 2, 9][self as usize]
    }

    fn size(self) -> usize {
        [4, 8, 2, 2][self as usize]
    }

    unsafe fn read(self, base: u64, at: usize) -> f64 {
        unsafe {
            match self {
                Type::F32 => *(base as *const f32).add(at) as f64,
                Type::F64 => *(base as *const f64).add(at),
                Type::F16 => (*(base as *const f16).add(at)).to_f64(),
                Type::Bf16 => (*(base as *const bf16).add(at)).to_f64(),
            }
        }
    }

    unsafe fn write(self, base: u64, at: usize, v: f64) {
        unsafe {
            match self {
                Type::F32 => *(base as *mut f32).add(at) = v as f32,
                Type::F64 => *(base as *mut f64).add(at) = v,
                Type::F16 => *(base as *mut f16).add(at) = f16::from_f32(to_odd(v)),
                Type::Bf16 => *(base as *mut bf16).add(at) = bf16::from_f32(to_odd(v)),
            }
        }
    }
}

/// A tensor's or filter's descriptor.
#[derive(Clone, Debug, Default)]
pub struct Tensor {
    ty: Type,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

fn packed(dims: &[usize], channels_last: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..dims.len()).rev().collect();
    if channels_last {
        // The channels vary fastest, then the spatial dimensions from the last.
        order.retain(|&d| d != 1);
        order.insert(0, 1);
    }
    let mut strides = vec![1; dims.len()];
    let mut step = 1;
    for d in order {
        strides[d] = step;
        step *= dims[d];
    }
    strides
}

impl Tensor {
    fn count(&self) -> usize {
        self.dims.iter().product()
    }

    fn bytes(&self) -> u64 {
        let last: usize = self
            .dims
            .iter()
            .zip(&self.strides)
            .map(|(&d, &s)| (d.max(1) - 1) * s)
            .sum();
        if self.count() == 0 {
            0
        } else {
            ((last + 1) * self.ty.size()) as u64
        }
    }

    fn check(&self, what: &str, base: u64) -> bool {
        memory::check(what, base, self.bytes())
    }

    /// Calls a function with the places of all elements, in order of the dimensions.
    fn visit(&self, f: &mut impl FnMut(usize)) {
        fn walk(dims: &[usize], strides: &[usize], at: usize, f: &mut impl FnMut(usize)) {
            match (dims, strides) {
                ([d], [s]) => (0..*d).for_each(|i| f(at + i * s)),
                ([d, dims @ ..], [s, strides @ ..]) => {
                    (0..*d).for_each(|i| walk(dims, strides, at + i * s, f));
                }
                _ => f(at),
            }
        }
        walk(&self.dims, &self.strides, 0, f);
    }

    fn read(&self, base: u64) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.count());
        self.visit(&mut |p| out.push(unsafe { self.ty.read(base, p) }));
        out
    }

    /// Writes alpha * values + beta * old; with beta 0 the old values are not looked at.
    fn write(&self, base: u64, values: &[f64], (alpha, beta): (f64, f64)) {
        let mut values = values.iter();
        self.visit(&mut |p| {
            let v = values.next().copied().unwrap_or(f64::NAN);
            unsafe {
                let old = if beta == 0.0 {
                    0.0
                } else {
                    beta * self.ty.read(base, p)
                };
                self.ty.write(base, p, alpha * v + old);
            }
        });
    }

    fn channels_last(&self) -> bool {
        self.strides.get(1) == Some(&1) && self.strides == packed(&self.dims, true)
    }

    /// Elements of one channel of one sample.
    fn spatial(&self) -> usize {
        self.dims[2..].iter().product()
    }
}

#[derive(Clone, Debug, Default)]
pub struct Convolution {
    pad: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    flipped: bool,
    double: bool,
    groups: usize,
    math: c_int,
}

#[derive(Clone, Debug, Default)]
pub struct Pooling {
    mode: c_int,
    window: Vec<usize>,
    pad: Vec<usize>,
    stride: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Activation {
    mode: c_int,
    coefficient: f64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Reduction {
    op: c_int,
}

/// alpha and beta are f32 unless the data are f64.
unsafe fn scalars(ty: Type, alpha: *const c_void, beta: *const c_void) -> (f64, f64) {
    let get = |p: *const c_void| unsafe {
        match (p.is_null(), ty) {
            (true, _) => 0.0,
            (_, Type::F64) => *(p as *const f64),
            _ => *(p as *const f32) as f64,
        }
    };
    (get(alpha), get(beta))
}

unsafe fn submit(handle: *const Handle, work: impl Fn() -> bool + Send + Sync + 'static) -> c_int {
    let on = unsafe { (*handle).stream };
    let e = stream::submit(on, move || {
        if work() {
            device::SUCCESS
        } else {
            device::ILLEGAL_ADDRESS
        }
    });
    if e == device::SUCCESS {
        SUCCESS
    } else {
        EXECUTION_FAILED
    }
}

macro_rules! descriptors {
    ($($create:ident, $destroy:ident: $t:ty;)*) => {$(export! {
        fn $create(descriptor: *mut *mut $t) {
            *descriptor = Box::into_raw(Box::default());
            SUCCESS
        }

        fn $destroy(descriptor: *mut $t) {
            if !descriptor.is_null() {
                drop(Box::from_raw(descriptor));
            }
            SUCCESS
        }
    })*};
}

descriptors! {
    cudnnCreateTensorDescriptor, cudnnDestroyTensorDescriptor: Tensor;
    cudnnCreateFilterDescriptor, cudnnDestroyFilterDescriptor: Tensor;
    cudnnCreateConvolutionDescriptor, cudnnDestroyConvolutionDescriptor: Convolution;
    cudnnCreatePoolingDescriptor, cudnnDestroyPoolingDescriptor: Pooling;
    cudnnCreateActivationDescriptor, cudnnDestroyActivationDescriptor: Activation;
    cudnnCreateReduceTensorDescriptor, cudnnDestroyReduceTensorDescriptor: Reduction;
}

unsafe fn list(from: *const c_int, n: c_int) -> Vec<usize> {
    (0..n as usize)
        .map(|i| unsafe { *from.add(i) } as usize)
        .collect()
}

fn set(t: &mut Tensor, ty: c_int, dims: Vec<usize>, strides: Vec<usize>) -> c_int {
    let Some(ty) = Type::of(ty) else {
        return NOT_SUPPORTED;
    };
    if dims.iter().any(|&d| d == 0 || d > i32::MAX as usize) {
        return BAD_PARAM;
    }
    *t = Tensor { ty, dims, strides };
    SUCCESS
}

fn set_packed(t: &mut Tensor, ty: c_int, format: c_int, dims: Vec<usize>) -> c_int {
    if format > 1 {
        return NOT_SUPPORTED;
    }
    let strides = packed(&dims, format == 1);
    set(t, ty, dims, strides)
}

export! {
    fn cudnnCreate(handle: *mut *mut Handle) {
        *handle = Box::into_raw(Box::new(Handle { stream: 0 }));
        SUCCESS
    }

    fn cudnnDestroy(handle: *mut Handle) {
        drop(Box::from_raw(handle));
        SUCCESS
    }

    fn cudnnSetStream(handle: *mut Handle, stream: usize) {
        (*handle).stream = stream;
        SUCCESS
    }

    fn cudnnGetStream(handle: *mut Handle, stream: *mut usize) {
        *stream = (*handle).stream;
        SUCCESS
    }

    fn cudnnOpsVersionCheck() { SUCCESS }
    fn cudnnCnnVersionCheck() { SUCCESS }
    fn cudnnAdvVersionCheck() { SUCCESS }
    fn cudnnGraphVersionCheck() { SUCCESS }

    fn cudnnSetTensor4dDescriptor(
        t: &mut Tensor, format: c_int, ty: c_int, n: c_int, c: c_int, h: c_int, w: c_int
    ) {
        set_packed(t, ty, format, [n, c, h, w].map(|d| d as usize).to_vec())
    }

    fn cudnnSetTensor4dDescriptorEx(
        t: &mut Tensor, ty: c_int, n: c_int, c: c_int, h: c_int, w: c_int, ns: c_int, cs: c_int,
        hs: c_int, ws: c_int
    ) {
        let strides = [ns, cs, hs, ws].map(|s| s as usize).to_vec();
        set(t, ty, [n, c, h, w].map(|d| d as usize).to_vec(), strides)
    }

    fn cudnnSetTensorNdDescriptor(
        t: &mut Tensor, ty: c_int, n: c_int, dims: *const c_int, strides: *const c_int
    ) {
        set(t, ty, list(dims, n), list(strides, n))
    }

    fn cudnnSetTensorNdDescriptorEx(
        t: &mut Tensor, format: c_int, ty: c_int, n: c_int, dims: *const c_int
    ) {
        set_packed(t, ty, format, list(dims, n))
    }

    fn cudnnGetTensor4dDescriptor(
        t: &Tensor, ty: *mut c_int, n: *mut c_int, c: *mut c_int, h: *mut c_int, w: *mut c_int,
        ns: *mut c_int, cs: *mut c_int, hs: *mut c_int, ws: *mut c_int
    ) {
        if t.dims.len() != 4 {
            return BAD_PARAM;
        }
        *ty = t.ty.number();
        for (i, (d, s)) in [(n, ns), (c, cs), (h, hs), (w, ws)].into_iter().enumerate() {
            *d = t.dims[i] as c_int;
            *s = t.strides[i] as c_int;
        }
        SUCCESS
    }

    fn cudnnGetTensorSizeInBytes(t: &Tensor, size: *mut usize) {
        *size = t.bytes() as usize;
        SUCCESS
    }

    fn cudnnSetFilter4dDescriptor(
        t: &mut Tensor, ty: c_int, format: c_int, k: c_int, c: c_int, h: c_int, w: c_int
    ) {
        set_packed(t, ty, format, [k, c, h, w].map(|d| d as usize).to_vec())
    }

    fn cudnnSetFilterNdDescriptor(
        t: &mut Tensor, ty: c_int, format: c_int, n: c_int, dims: *const c_int
    ) {
        set_packed(t, ty, format, list(dims, n))
    }

    fn cudnnSetConvolution2dDescriptor(
        conv: &mut Convolution, pad_h: c_int, pad_w: c_int, stride_h: c_int, stride_w: c_int,
        dilation_h: c_int, dilation_w: c_int, mode: c_int, ty: c_int
    ) {
        let pair = |a: c_int, b: c_int| vec![a as usize, b as usize];
        *conv = Convolution {
            pad: pair(pad_h, pad_w),
            stride: pair(stride_h, stride_w),
            dilation: pair(dilation_h, dilation_w),
            flipped: mode == 0,
            double: ty == 1,
            groups: 1,
            math: 0,
        };
        SUCCESS
    }

    fn cudnnSetConvolutionNdDescriptor(
        conv: &mut Convolution, n: c_int, pad: *const c_int, stride: *const c_int,
        dilation: *const c_int, mode: c_int, ty: c_int
    ) {
        *conv = Convolution {
            pad: list(pad, n),
            stride: list(stride, n),
            dilation: list(dilation, n),
            flipped: mode == 0,
            double: ty == 1,
            groups: 1,
            math: 0,
        };
        SUCCESS
    }

    fn cudnnSetConvolutionGroupCount(conv: &mut Convolution, groups: c_int) {
        conv.groups = groups as usize;
        SUCCESS
    }

    fn cudnnGetConvolutionGroupCount(conv: &Convolution, groups: *mut c_int) {
        *groups = conv.groups as c_int;
        SUCCESS
    }

    fn cudnnSetConvolutionMathType(conv: &mut Convolution, math: c_int) {
        conv.math = math;
        SUCCESS
    }

    fn cudnnGetConvolutionMathType(conv: &Convolution, math: *mut c_int) {
        *math = conv.math;
        SUCCESS
    }

    fn cudnnGetConvolution2dForwardOutputDim(
        conv: &Convolution, x: &Tensor, w: &Tensor, n: *mut c_int, c: *mut c_int, h: *mut c_int,
        width: *mut c_int
    ) {
        let Some(dims) = output(conv, x, w) else { return BAD_PARAM };
        for (to, d) in [n, c, h, width].into_iter().zip(dims) {
            *to = d as c_int;
        }
        SUCCESS
    }

    fn cudnnGetConvolutionNdForwardOutputDim(
        conv: &Convolution, x: &Tensor, w: &Tensor, count: c_int, out: *mut c_int
    ) {
        let Some(dims) = output(conv, x, w) else { return BAD_PARAM };
        for (i, d) in dims.into_iter().take(count as usize).enumerate() {
            *out.add(i) = d as c_int;
        }
        SUCCESS
    }
}

fn output(conv: &Convolution, x: &Tensor, w: &Tensor) -> Option<Vec<usize>> {
    let mut dims = vec![x.dims[0], w.dims[0]];
    for i in 0..conv.pad.len() {
        let reach = (w.dims[2 + i] - 1) * conv.dilation[i] + 1;
        let room = (x.dims[2 + i] + 2 * conv.pad[i]).checked_sub(reach)?;
        dims.push(room / conv.stride[i] + 1);
    }
    Some(dims)
}

/// `cudnnConvolution...AlgoPerf_t`.
#[repr(C)]
pub struct Performance {
    algorithm: c_int,
    status: c_int,
    time: f32,
    memory: usize,
    deterministic: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

unsafe fn algorithms(
    which: [c_int; 2],
    conv: &Convolution,
    wanted: c_int,
    given: *mut c_int,
    out: *mut Performance,
) -> c_int {
    let n = wanted.clamp(0, 2) as usize;
    for (i, &algorithm) in which.iter().enumerate().take(n) {
        let p = Performance {
            algorithm,
            status: SUCCESS,
            time: 1.0 + i as f32,
            memory: WORKSPACE,
            deterministic: 1,
            math: conv.math,
            reserved: [0; 3],
        };
        unsafe { out.add(i).write(p) };
    }
    unsafe { *given = n as c_int };
    SUCCESS
}

export! {
    fn cudnnGetConvolutionForwardAlgorithm_v7(
        _h: *const Handle, x: &Tensor, w: &Tensor, conv: &Convolution, y: &Tensor, wanted: c_int,
        given: *mut c_int, out: *mut Performance
    ) {
        match shape(conv, x, w, y) {
            Some(_) => algorithms([FIRST, 0], conv, wanted, given, out),
            None => BAD_PARAM,
        }
    }

    fn cudnnGetConvolutionBackwardDataAlgorithm_v7(
        _h: *const Handle, w: &Tensor, dy: &Tensor, conv: &Convolution, dx: &Tensor,
        wanted: c_int, given: *mut c_int, out: *mut Performance
    ) {
        match shape(conv, dx, w, dy) {
            Some(_) => algorithms([FIRST, 0], conv, wanted, given, out),
            None => BAD_PARAM,
        }
    }

    fn cudnnGetConvolutionBackwardFilterAlgorithm_v7(
        _h: *const Handle, x: &Tensor, dy: &Tensor, conv: &Convolution, dw: &Tensor,
        wanted: c_int, given: *mut c_int, out: *mut Performance
    ) {
        match shape(conv, x, dw, dy) {
            Some(_) => algorithms([FIRST, 3], conv, wanted, given, out),
            None => BAD_PARAM,
        }
    }

    fn cudnnFindConvolutionForwardAlgorithm(
        h: *const Handle, x: &Tensor, w: &Tensor, conv: &Convolution, y: &Tensor, wanted: c_int,
        given: *mut c_int, out: *mut Performance
    ) {
        cudnnGetConvolutionForwardAlgorithm_v7(h, x, w, conv, y, wanted, given, out)
    }

    fn cudnnFindConvolutionBackwardDataAlgorithm(
        h: *const Handle, w: &Tensor, dy: &Tensor, conv: &Convolution, dx: &Tensor, wanted: c_int,
        given: *mut c_int, out: *mut Performance
    ) {
        cudnnGetConvolutionBackwardDataAlgorithm_v7(h, w, dy, conv, dx, wanted, given, out)
    }

    fn cudnnFindConvolutionBackwardFilterAlgorithm(
        h: *const Handle, x: &Tensor, dy: &Tensor, conv: &Convolution, dw: &Tensor, wanted: c_int,
        given: *mut c_int, out: *mut Performance
    ) {
        cudnnGetConvolutionBackwardFilterAlgorithm_v7(h, x, dy, conv, dw, wanted, given, out)
    }

    fn cudnnFindConvolutionForwardAlgorithmEx(
        h: *const Handle, x: &Tensor, _xp: u64, w: &Tensor, _wp: u64, conv: &Convolution,
        y: &Tensor, _yp: u64, wanted: c_int, given: *mut c_int, out: *mut Performance,
        _workspace: u64, _size: usize
    ) {
        cudnnGetConvolutionForwardAlgorithm_v7(h, x, w, conv, y, wanted, given, out)
    }

    fn cudnnFindConvolutionBackwardDataAlgorithmEx(
        h: *const Handle, w: &Tensor, _wp: u64, dy: &Tensor, _dyp: u64, conv: &Convolution,
        dx: &Tensor, _dxp: u64, wanted: c_int, given: *mut c_int, out: *mut Performance,
        _workspace: u64, _size: usize
    ) {
        cudnnGetConvolutionBackwardDataAlgorithm_v7(h, w, dy, conv, dx, wanted, given, out)
    }

    fn cudnnFindConvolutionBackwardFilterAlgorithmEx(
        h: *const Handle, x: &Tensor, _xp: u64, dy: &Tensor, _dyp: u64, conv: &Convolution,
        dw: &Tensor, _dwp: u64, wanted: c_int, given: *mut c_int, out: *mut Performance,
        _workspace: u64, _size: usize
    ) {
        cudnnGetConvolutionBackwardFilterAlgorithm_v7(h, x, dy, conv, dw, wanted, given, out)
    }

    fn cudnnGetConvolutionForwardAlgorithmMaxCount(_h: *const Handle, n: *mut c_int) {
        *n = 2;
        SUCCESS
    }

    fn cudnnGetConvolutionBackwardDataAlgorithmMaxCount(_h: *const Handle, n: *mut c_int) {
        *n = 2;
        SUCCESS
    }

    fn cudnnGetConvolutionBackwardFilterAlgorithmMaxCount(_h: *const Handle, n: *mut c_int) {
        *n = 2;
        SUCCESS
    }

    fn cudnnGetConvolutionForwardWorkspaceSize(
        _h: *const Handle, x: &Tensor, w: &Tensor, conv: &Convolution, y: &Tensor, _a: c_int,
        size: *mut usize
    ) {
        *size = WORKSPACE;
        if shape(conv, x, w, y).is_some() { SUCCESS } else { BAD_PARAM }
    }

    fn cudnnGetConvolutionBackwardDataWorkspaceSize(
        _h: *const Handle, w: &Tensor, dy: &Tensor, conv: &Convolution, dx: &Tensor, _a: c_int,
        size: *mut usize
    ) {
        *size = WORKSPACE;
        if shape(conv, dx, w, dy).is_some() { SUCCESS } else { BAD_PARAM }
    }

    fn cudnnGetConvolutionBackwardFilterWorkspaceSize(
        _h: *const Handle, x: &Tensor, dy: &Tensor, conv: &Convolution, dw: &Tensor, _a: c_int,
        size: *mut usize
    ) {
        *size = WORKSPACE;
        if shape(conv, x, dw, dy).is_some() { SUCCESS } else { BAD_PARAM }
    }
}

/// A convolution's sizes, with three spatial dimensions of which the first may be 1.
#[derive(Clone, Copy, Debug)]
struct Shape {
    samples: usize,
    groups: usize,
    /// Channels of a group.
    inputs: usize,
    outputs: usize,
    input: [usize; 3],
    kernel: [usize; 3],
    output: [usize; 3],
    pad: [usize; 3],
    stride: [usize; 3],
    dilation: [usize; 3],
    flipped: bool,
}

fn shape(conv: &Convolution, x: &Tensor, w: &Tensor, y: &Tensor) -> Option<Shape> {
    let fail = || {
        device::report(&format!(
            "convolution: sizes do not fit: {:?} with {:?} to {:?} by {conv:?}",
            x.dims, w.dims, y.dims
        ));
    };
    let spatial = conv.pad.len();
    let groups = conv.groups.max(1);
    let good = spatial <= 3
        && [x, w, y].iter().all(|t| t.dims.len() == spatial + 2)
        && x.dims[1] == w.dims[1] * groups
        && w.dims[0].is_multiple_of(groups)
        && output(conv, x, w).is_some_and(|o| o == y.dims);
    if !good {
        fail();
        return None;
    }
    let three = |v: &[usize], missing: usize| {
        let mut out = [missing; 3];
        out[3 - spatial..].copy_from_slice(v);
        out
    };
    Some(Shape {
        samples: x.dims[0],
        groups,
        inputs: w.dims[1],
        outputs: w.dims[0] / groups,
        input: three(&x.dims[2..], 1),
        kernel: three(&w.dims[2..], 1),
        output: three(&y.dims[2..], 1),
        pad: three(&conv.pad, 0),
        stride: three(&conv.stride, 1),
        dilation: three(&conv.dilation, 1),
        flipped: conv.flipped,
    })
}

impl Shape {
    fn pixels(&self) -> usize {
        self.output.iter().product()
    }

    fn taps(&self) -> usize {
        self.inputs * self.kernel.iter().product::<usize>()
    }

    fn image(&self) -> usize {
        self.input.iter().product()
    }

    /// For each tap and output pixel the input element under it, if there is one.
    fn visit(&self, mut f: impl FnMut(usize, usize, usize)) {
        let [kd, kh, kw] = self.kernel;
        for tap in 0..self.taps() {
            let mut k = [tap / kw / kh % kd, tap / kw % kh, tap % kw];
            if self.flipped {
                k = std::array::from_fn(|i| self.kernel[i] - 1 - k[i]);
            }
            let channel = tap / (kd * kh * kw);
            let at = |i: usize, o: usize| {
                (o * self.stride[i] + k[i] * self.dilation[i])
                    .checked_sub(self.pad[i])
                    .filter(|&p| p < self.input[i])
            };
            let mut pixel = 0;
            for od in 0..self.output[0] {
                for oh in 0..self.output[1] {
                    let row = at(0, od).zip(at(1, oh));
                    for ow in 0..self.output[2] {
                        if let (Some((d, h)), Some(w)) = (row, at(2, ow)) {
                            let place = (d * self.input[1] + h) * self.input[2] + w;
                            f(tap, pixel, channel * self.image() + place);
                        }
                        pixel += 1;
                    }
                }
            }
        }
    }

    /// The input elements under each tap (rows of pixels, one for each tap).
    fn columns<T: Real>(&self, x: &[T]) -> Vec<T> {
        let mut out = vec![T::ZERO; self.taps() * self.pixels()];
        let pixels = self.pixels();
        self.visit(|tap, pixel, place| out[tap * pixels + pixel] = x[place]);
        out
    }

    fn forward<T: Real>(&self, x: &[T], w: &[T]) -> Vec<T> {
        let (taps, pixels) = (self.taps(), self.pixels());
        let mut y = vec![T::ZERO; self.samples * self.groups * self.outputs * pixels];
        y.par_chunks_mut((self.outputs * pixels).max(1))
            .enumerate()
            .for_each(|(part, y)| {
                let group = part % self.groups;
                let size = self.inputs * self.image();
                let columns = self.columns(&x[part * size..][..size]);
                let w = &w[group * self.outputs * taps..][..self.outputs * taps];
                y.copy_from_slice(&product(&columns, w, (pixels, self.outputs, taps)));
            });
        y
    }

    fn backward_data<T: Real>(&self, w: &[T], dy: &[T]) -> Vec<f64> {
        let (taps, pixels) = (self.taps(), self.pixels());
        let size = self.inputs * self.image();
        let mut dx = vec![0f64; self.samples * self.groups * size];
        dx.par_chunks_mut(size.max(1))
            .enumerate()
            .for_each(|(part, dx)| {
                let group = part % self.groups;
                let w = &w[group * self.outputs * taps..][..self.outputs * taps];
                let across: Vec<T> = (0..taps)
                    .flat_map(|t| (0..self.outputs).map(move |o| w[o * taps + t]))
                    .collect();
                let dy = &dy[part * self.outputs * pixels..][..self.outputs * pixels];
                let columns = product(dy, &across, (pixels, taps, self.outputs));
                self.visit(|tap, pixel, place| dx[place] += columns[tap * pixels + pixel].into());
            });
        dx
    }

    fn backward_filter<T: Real>(&self, x: &[T], dy: &[T]) -> Vec<f64> {
        let (taps, pixels) = (self.taps(), self.pixels());
        let size = self.inputs * self.image();
        let mut dw = vec![0f64; self.groups * self.outputs * taps];
        dw.par_chunks_mut((self.outputs * taps).max(1))
            .enumerate()
            .for_each(|(group, dw)| {
                for sample in 0..self.samples {
                    let part = sample * self.groups + group;
                    let columns = self.columns(&x[part * size..][..size]);
                    let dy = &dy[part * self.outputs * pixels..][..self.outputs * pixels];
                    let across: Vec<T> = (0..pixels)
                        .flat_map(|p| (0..self.outputs).map(move |o| dy[o * pixels + p]))
                        .collect();
                    let sums = product(&across, &columns, (self.outputs, taps, pixels));
                    for o in 0..self.outputs {
                        for t in 0..taps {
                            dw[o * taps + t] += sums[t * self.outputs + o].into();
                        }
                    }
                }
            });
        dw
    }
}

/// A tensor's values as the tensor cores see them.
fn operand<T: Real>(t: &Tensor, base: u64, tf32: bool) -> Vec<T> {
    let cut = |v: f64| if tf32 { tf32_even(v as f32) as f64 } else { v };
    t.read(base).into_iter().map(|v| T::from(cut(v))).collect()
}

fn to_f64<T: Real>(v: Vec<T>) -> Vec<f64> {
    v.into_iter().map(T::into).collect()
}

impl Convolution {
    /// By default f32 goes through the tensor cores as TF32; FMA_MATH forbids it.
    fn tf32(&self, ty: Type) -> bool {
        ty == Type::F32 && self.math != 3 && device::compute_capability().0 >= 8
    }
}

fn workspace(base: u64, size: usize) -> bool {
    if size < WORKSPACE {
        device::report(&format!(
            "convolution: a workspace of {size} bytes, not {WORKSPACE}"
        ));
        return false;
    }
    memory::check("the workspace", base, size as u64)
}

/// The algorithm that is ranked first for each pass.
const FIRST: c_int = 1;

/// What goes wrong when it runs, after all that was said of it before.
fn told_to_refuse(what: &str) -> bool {
    static REFUSED: OnceLock<String> = OnceLock::new();
    REFUSED.get_or_init(|| std::env::var("STAND_IN_REFUSES").unwrap_or_default()) == what
}

/// Whether convolutions of such maps are refused.
fn refused(maps: &Tensor) -> bool {
    told_to_refuse("channels-last") && maps.dims[1] > 1 && maps.strides[1] == 1
}

/// Whether an algorithm fails.
fn fails(algorithm: c_int) -> bool {
    algorithm == FIRST && told_to_refuse("first-algorithm")
}

export! {
    fn cudnnConvolutionForward(
        h: *const Handle, alpha: *const c_void, x: &Tensor, xp: u64, w: &Tensor, wp: u64,
        conv: &Convolution, algorithm: c_int, space: u64, size: usize, beta: *const c_void,
        y: &Tensor, yp: u64
    ) {
        let Some(s) = shape(conv, x, w, y) else { return BAD_PARAM };
        if refused(x) {
            return NOT_SUPPORTED;
        }
        if fails(algorithm) {
            return EXECUTION_FAILED;
        }
        if !workspace(space, size) {
            return BAD_PARAM;
        }
        let scale = scalars(x.ty, alpha, beta);
        let (x, w, y, conv) = (x.clone(), w.clone(), y.clone(), conv.clone());
        submit(h, move || {
            if !x.check("x", xp) || !w.check("w", wp) || !y.check("y", yp) {
                return false;
            }
            let tf32 = conv.tf32(x.ty);
            let out = if x.ty == Type::F64 || conv.double {
                s.forward::<f64>(&operand(&x, xp, false), &operand(&w, wp, false))
            } else {
                to_f64(s.forward::<f32>(&operand(&x, xp, tf32), &operand(&w, wp, tf32)))
            };
            y.write(yp, &out, scale);
            true
        })
    }

    fn cudnnConvolutionBackwardData(
        h: *const Handle, alpha: *const c_void, w: &Tensor, wp: u64, dy: &Tensor, dyp: u64,
        conv: &Convolution, algorithm: c_int, space: u64, size: usize, beta: *const c_void,
        dx: &Tensor, dxp: u64
    ) {
        let Some(s) = shape(conv, dx, w, dy) else { return BAD_PARAM };
        if refused(dx) {
            return NOT_SUPPORTED;
        }
        if fails(algorithm) {
            return EXECUTION_FAILED;
        }
        if !workspace(space, size) {
            return BAD_PARAM;
        }
        let scale = scalars(dx.ty, alpha, beta);
        let (w, dy, dx, conv) = (w.clone(), dy.clone(), dx.clone(), conv.clone());
        submit(h, move || {
            if !w.check("w", wp) || !dy.check("dy", dyp) || !dx.check("dx", dxp) {
                return false;
            }
            let tf32 = conv.tf32(dx.ty);
            let out = if dx.ty == Type::F64 || conv.double {
                s.backward_data::<f64>(&operand(&w, wp, false), &operand(&dy, dyp, false))
            } else {
                s.backward_data::<f32>(&operand(&w, wp, tf32), &operand(&dy, dyp, tf32))
            };
            dx.write(dxp, &out, scale);
            true
        })
    }

    fn cudnnConvolutionBackwardFilter(
        h: *const Handle, alpha: *const c_void, x: &Tensor, xp: u64, dy: &Tensor, dyp: u64,
        conv: &Convolution, algorithm: c_int, space: u64, size: usize, beta: *const c_void,
        dw: &Tensor, dwp: u64
    ) {
        let Some(s) = shape(conv, x, dw, dy) else { return BAD_PARAM };
        if refused(x) {
            return NOT_SUPPORTED;
        }
        if fails(algorithm) {
            return EXECUTION_FAILED;
        }
        if !workspace(space, size) {
            return BAD_PARAM;
        }
        let scale = scalars(dw.ty, alpha, beta);
        let (x, dy, dw, conv) = (x.clone(), dy.clone(), dw.clone(), conv.clone());
        submit(h, move || {
            if !x.check("x", xp) || !dy.check("dy", dyp) || !dw.check("dw", dwp) {
                return false;
            }
            let tf32 = conv.tf32(x.ty);
            let out = if x.ty == Type::F64 || conv.double {
                s.backward_filter::<f64>(&operand(&x, xp, false), &operand(&dy, dyp, false))
            } else {
                s.backward_filter::<f32>(&operand(&x, xp, tf32), &operand(&dy, dyp, tf32))
            };
            dw.write(dwp, &out, scale);
            true
        })
    }

    fn cudnnConvolutionBackwardBias(
        h: *const Handle, alpha: *const c_void, dy: &Tensor, dyp: u64, beta: *const c_void,
        db: &Tensor, dbp: u64
    ) {
        let scale = scalars(dy.ty, alpha, beta);
        let (dy, db) = (dy.clone(), db.clone());
        submit(h, move || {
            if !dy.check("dy", dyp) || !db.check("db", dbp) {
                return false;
            }
            let sums = by_channel(&dy, &dy.read(dyp), |v| v.iter().sum());
            db.write(dbp, &sums, scale);
            true
        })
    }
}

/// Applies a function to all values of each channel.
fn by_channel(t: &Tensor, values: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let (n, c, s) = (t.dims[0], t.dims[1], t.spatial());
    (0..c)
        .map(|c_at| {
            let all: Vec<f64> = (0..n)
                .flat_map(|i| values[(i * c + c_at) * s..][..s].iter().copied())
                .collect();
            f(&all)
        })
        .collect()
}

// Batch normalisation. `ops`: 0 plain, 1 followed by a ReLU, 2 with an addition before it.

/// The fused forms exist only for tensors whose channels vary fastest.
fn fusible(ops: c_int, x: &Tensor) -> bool {
    let good = ops == 0 || ops <= 2 && x.channels_last();
    if !good {
        device::report("batch normalisation: activations are fused for NHWC only");
    }
    good
}

fn channel_of(t: &Tensor, index: usize) -> usize {
    index / t.spatial() % t.dims[1]
}

struct Normalise {
    ops: c_int,
    scale: (f64, f64),
    x: (Tensor, u64),
    z: Option<(Tensor, u64)>,
    y: (Tensor, u64),
    params: Tensor,
    weight: u64,
    bias: u64,
    factor: f64,
    running: [u64; 2],
    epsilon: f64,
    saved: [u64; 2],
    reserve: (u64, usize),
}

impl Normalise {
    fn check(&self) -> bool {
        let optional = |p: u64| p == 0 || self.params.check("batch normalisation", p);
        let all = [
            self.running[0],
            self.running[1],
            self.saved[0],
            self.saved[1],
        ];
        self.x.0.check("x", self.x.1)
            && self.y.0.check("y", self.y.1)
            && self.z.as_ref().is_none_or(|z| z.0.check("z", z.1))
            && self.params.check("scale", self.weight)
            && self.params.check("bias", self.bias)
            && all.into_iter().all(optional)
            && (self.ops == 0
                || self.reserve.1 >= self.x.0.count()
                    && memory::check("the reserve", self.reserve.0, self.x.0.count() as u64))
    }

    fn run(&self) -> bool {
        if !self.check() {
            return false;
        }
        let t = &self.x.0;
        let x = t.read(self.x.1);
        let m = (t.count() / t.dims[1]) as f64;
        let mean = by_channel(t, &x, |v| v.iter().sum::<f64>() / m);
        let squares = by_channel(t, &x, |v| {
            let mean = v.iter().sum::<f64>() / m;
            v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / m
        });
        let inverse: Vec<f64> = squares
            .iter()
            .map(|v| 1.0 / (v + self.epsilon).sqrt())
            .collect();
        let keep = (self.factor, 1.0 - self.factor);
        if self.running[0] != 0 {
            self.params.write(self.running[0], &mean, keep);
        }
        if self.running[1] != 0 {
            // The running variance is the unbiased one.
            let unbiased: Vec<f64> = squares
                .iter()
                .map(|v| if m > 1.0 { v * m / (m - 1.0) } else { *v })
                .collect();
            self.params.write(self.running[1], &unbiased, keep);
        }
        for (to, values) in self.saved.iter().zip([&mean, &inverse]) {
            if *to != 0 {
                self.params.write(*to, values, (1.0, 0.0));
            }
        }
        self.apply(&x, &mean, &inverse);
        true
    }

    fn apply(&self, x: &[f64], mean: &[f64], inverse: &[f64]) {
        let t = &self.x.0;
        let (weight, bias) = (self.params.read(self.weight), self.params.read(self.bias));
        let z = self
            .z
            .as_ref()
            .filter(|_| self.ops == 2)
            .map(|z| z.0.read(z.1));
        let mut y = Vec::with_capacity(x.len());
        for (i, &v) in x.iter().enumerate() {
            let c = channel_of(t, i);
            let mut r = weight[c] * (v - mean[c]) * inverse[c] + bias[c];
            if let Some(z) = &z {
                r += z[i];
            }
            if self.ops > 0 {
                unsafe { *(self.reserve.0 as *mut u8).add(i) = (r > 0.0) as u8 };
                r = r.max(0.0);
            }
            y.push(r);
        }
        self.y.0.write(self.y.1, &y, self.scale);
    }
}

export! {
    fn cudnnDeriveBNTensorDescriptor(to: &mut Tensor, x: &Tensor, mode: c_int) {
        let mut dims = vec![1; x.dims.len()];
        if mode == 0 {
            dims[1..].copy_from_slice(&x.dims[1..]);
        } else {
            dims[1] = x.dims[1];
        }
        let ty = if x.ty == Type::F64 { Type::F64 } else { Type::F32 };
        let strides = packed(&dims, false);
        *to = Tensor { ty, dims, strides };
        SUCCESS
    }

    fn cudnnBatchNormalizationForwardTraining(
        h: *const Handle, mode: c_int, alpha: *const c_void, beta: *const c_void, x: &Tensor,
        xp: u64, y: &Tensor, yp: u64, params: &Tensor, weight: u64, bias: u64, factor: f64,
        mean: u64, variance: u64, epsilon: f64, saved_mean: u64, saved_inverse: u64
    ) {
        if mode == 0 {
            return NOT_SUPPORTED;
        }
        let n = Normalise {
            ops: 0,
            scale: scalars(x.ty, alpha, beta),
            x: (x.clone(), xp),
            z: None,
            y: (y.clone(), yp),
            params: params.clone(),
            weight,
            bias,
            factor,
            running: [mean, variance],
            epsilon,
            saved: [saved_mean, saved_inverse],
            reserve: (0, 0),
        };
        submit(h, move || n.run())
    }

    fn cudnnBatchNormalizationForwardTrainingEx(
        h: *const Handle, mode: c_int, ops: c_int, alpha: *const c_void, beta: *const c_void,
        x: &Tensor, xp: u64, z: *const Tensor, zp: u64, y: &Tensor, yp: u64, params: &Tensor,
        weight: u64, bias: u64, factor: f64, mean: u64, variance: u64, epsilon: f64,
        saved_mean: u64, saved_inverse: u64, activation: *const Activation, _space: u64,
        _size: usize, reserve: u64, reserve_size: usize
    ) {
        let relu = ops == 0 || !activation.is_null() && (*activation).mode == 1;
        if mode == 0 || !fusible(ops, x) || !relu {
            return NOT_SUPPORTED;
        }
        let n = Normalise {
            ops,
            scale: scalars(x.ty, alpha, beta),
            x: (x.clone(), xp),
            z: (ops == 2).then(|| ((*z).clone(), zp)),
            y: (y.clone(), yp),
            params: params.clone(),
            weight,
            bias,
            factor,
            running: [mean, variance],
            epsilon,
            saved: [saved_mean, saved_inverse],
            reserve: (reserve, reserve_size),
        };
        submit(h, move || n.run())
    }

    fn cudnnBatchNormalizationForwardInference(
        h: *const Handle, mode: c_int, alpha: *const c_void, beta: *const c_void, x: &Tensor,
        xp: u64, y: &Tensor, yp: u64, params: &Tensor, weight: u64, bias: u64, mean: u64,
        variance: u64, epsilon: f64
    ) {
        if mode == 0 {
            return NOT_SUPPORTED;
        }
        let n = Normalise {
            ops: 0,
            scale: scalars(x.ty, alpha, beta),
            x: (x.clone(), xp),
            z: None,
            y: (y.clone(), yp),
            params: params.clone(),
            weight,
            bias,
            factor: 0.0,
            running: [mean, variance],
            epsilon,
            saved: [0, 0],
            reserve: (0, 0),
        };
        submit(h, move || {
            if !n.check() {
                return false;
            }
            let (mean, variance) = (n.params.read(n.running[0]), n.params.read(n.running[1]));
            let inverse: Vec<f64> = variance.iter().map(|v| 1.0 / (v + epsilon).sqrt()).collect();
            n.apply(&n.x.0.read(n.x.1), &mean, &inverse);
            true
        })
    }

    fn cudnnBatchNormalizationBackward(
        h: *const Handle, mode: c_int, ad: *const c_void, bd: *const c_void, ap: *const c_void,
        bp: *const c_void, x: &Tensor, xp: u64, dy: &Tensor, dyp: u64, dx: &Tensor, dxp: u64,
        params: &Tensor, weight: u64, dweight: u64, dbias: u64, epsilon: f64, saved_mean: u64,
        saved_inverse: u64
    ) {
        if mode == 0 {
            return NOT_SUPPORTED;
        }
        let b = Backward {
            ops: 0,
            data: scalars(x.ty, ad, bd),
            param: scalars(x.ty, ap, bp),
            x: (x.clone(), xp),
            dy: (dy.clone(), dyp),
            dz: None,
            dx: (dx.clone(), dxp),
            params: params.clone(),
            weight,
            dweight,
            dbias,
            epsilon,
            saved: [saved_mean, saved_inverse],
            reserve: (0, 0),
        };
        submit(h, move || b.run())
    }

    fn cudnnBatchNormalizationBackwardEx(
        h: *const Handle, mode: c_int, ops: c_int, ad: *const c_void, bd: *const c_void,
        ap: *const c_void, bp: *const c_void, x: &Tensor, xp: u64, _y: *const Tensor, _yp: u64,
        dy: &Tensor, dyp: u64, dz: *const Tensor, dzp: u64, dx: &Tensor, dxp: u64,
        params: &Tensor, weight: u64, _bias: u64, dweight: u64, dbias: u64, epsilon: f64,
        saved_mean: u64, saved_inverse: u64, _activation: *const Activation, _space: u64,
        _size: usize, reserve: u64, reserve_size: usize
    ) {
        if mode == 0 || !fusible(ops, x) {
            return NOT_SUPPORTED;
        }
        let b = Backward {
            ops,
            data: scalars(x.ty, ad, bd),
            param: scalars(x.ty, ap, bp),
            x: (x.clone(), xp),
            dy: (dy.clone(), dyp),
            dz: (ops == 2).then(|| ((*dz).clone(), dzp)),
            dx: (dx.clone(), dxp),
            params: params.clone(),
            weight,
            dweight,
            dbias,
            epsilon,
            saved: [saved_mean, saved_inverse],
            reserve: (reserve, reserve_size),
        };
        submit(h, move || b.run())
    }

    fn cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
        _h: *const Handle, mode: c_int, ops: c_int, x: &Tensor, _z: *const Tensor, _y: &Tensor,
        _params: &Tensor, _activation: *const Activation, size: *mut usize
    ) {
        *size = WORKSPACE;
        if mode == 0 || !fusible(ops, x) { NOT_SUPPORTED } else { SUCCESS }
    }

    fn cudnnGetBatchNormalizationBackwardExWorkspaceSize(
        _h: *const Handle, mode: c_int, ops: c_int, x: &Tensor, _y: *const Tensor, _dy: &Tensor,
        _dz: *const Tensor, _dx: &Tensor, _params: &Tensor, _activation: *const Activation,
        size: *mut usize
    ) {
        *size = WORKSPACE;
        if mode == 0 || !fusible(ops, x) { NOT_SUPPORTED } else { SUCCESS }
    }

    fn cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
        _h: *const Handle, _mode: c_int, ops: c_int, _activation: *const Activation, x: &Tensor,
        size: *mut usize
    ) {
        // A byte for each element says whether the ReLU let it pass.
        *size = if ops == 0 { 0 } else { x.count() };
        SUCCESS
    }
}

struct Backward {
    ops: c_int,
    data: (f64, f64),
    param: (f64, f64),
    x: (Tensor, u64),
    dy: (Tensor, u64),
    dz: Option<(Tensor, u64)>,
    dx: (Tensor, u64),
    params: Tensor,
    weight: u64,
    dweight: u64,
    dbias: u64,
    epsilon: f64,
    saved: [u64; 2],
    reserve: (u64, usize),
}

impl Backward {
    fn run(&self) -> bool {
        let t = &self.x.0;
        let good = t.check("x", self.x.1)
            && self.dy.0.check("dy", self.dy.1)
            && self.dx.0.check("dx", self.dx.1)
            && self.dz.as_ref().is_none_or(|z| z.0.check("dz", z.1))
            && [self.weight, self.dweight, self.dbias]
                .into_iter()
                .chain(self.saved.into_iter().filter(|&p| p != 0))
                .all(|p| self.params.check("batch normalisation", p))
            && (self.ops == 0
                || self.reserve.1 >= t.count()
                    && memory::check("the reserve", self.reserve.0, t.count() as u64));
        if !good {
            return false;
        }
        let x = t.read(self.x.1);
        let mut dy = self.dy.0.read(self.dy.1);
        if self.ops > 0 {
            for (i, d) in dy.iter_mut().enumerate() {
                if unsafe { *(self.reserve.0 as *const u8).add(i) } == 0 {
                    *d = 0.0;
                }
            }
        }
        if let Some((dz, at)) = &self.dz {
            dz.write(*at, &dy, self.data);
        }
        let m = (t.count() / t.dims[1]) as f64;
        let (mean, inverse) = if self.saved[0] != 0 && self.saved[1] != 0 {
            (
                self.params.read(self.saved[0]),
                self.params.read(self.saved[1]),
            )
        } else {
            let mean = by_channel(t, &x, |v| v.iter().sum::<f64>() / m);
            let inverse = by_channel(t, &x, |v| {
                let mean = v.iter().sum::<f64>() / m;
                let variance = v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / m;
                1.0 / (variance + self.epsilon).sqrt()
            });
            (mean, inverse)
        };
        let unit = |i: usize| {
            let c = channel_of(t, i);
            (x[i] - mean[c]) * inverse[c]
        };
        let products: Vec<f64> = dy.iter().enumerate().map(|(i, d)| d * unit(i)).collect();
        let dbias = by_channel(t, &dy, |v| v.iter().sum());
        let dweight = by_channel(t, &products, |v| v.iter().sum());
        let weight = self.params.read(self.weight);
        let dx: Vec<f64> = (0..x.len())
            .map(|i| {
                let c = channel_of(t, i);
                weight[c] * inverse[c] * (dy[i] - (dbias[c] + unit(i) * dweight[c]) / m)
            })
            .collect();
        self.dx.0.write(self.dx.1, &dx, self.data);
        self.params.write(self.dweight, &dweight, self.param);
        self.params.write(self.dbias, &dbias, self.param);
        true
    }
}

// Pooling.

export! {
    fn cudnnSetPooling2dDescriptor(
        p: &mut Pooling, mode: c_int, _nan: c_int, wh: c_int, ww: c_int, ph: c_int, pw: c_int,
        sh: c_int, sw: c_int
    ) {
        let pair = |a: c_int, b: c_int| vec![a as usize, b as usize];
        *p = Pooling { mode, window: pair(wh, ww), pad: pair(ph, pw), stride: pair(sh, sw) };
        SUCCESS
    }

    fn cudnnSetPoolingNdDescriptor(
        p: &mut Pooling, mode: c_int, _nan: c_int, n: c_int, window: *const c_int,
        pad: *const c_int, stride: *const c_int
    ) {
        let (window, pad, stride) = (list(window, n), list(pad, n), list(stride, n));
        *p = Pooling { mode, window, pad, stride };
        SUCCESS
    }

    fn cudnnGetPooling2dForwardOutputDim(
        p: &Pooling, x: &Tensor, n: *mut c_int, c: *mut c_int, h: *mut c_int, w: *mut c_int
    ) {
        let Some(dims) = pooled(p, x) else { return BAD_PARAM };
        for (to, d) in [n, c, h, w].into_iter().zip(dims) {
            *to = d as c_int;
        }
        SUCCESS
    }

    fn cudnnPoolingForward(
        h: *const Handle, p: &Pooling, alpha: *const c_void, x: &Tensor, xp: u64,
        beta: *const c_void, y: &Tensor, yp: u64
    ) {
        if pooled(p, x) != Some(y.dims.clone()) {
            return BAD_PARAM;
        }
        let scale = scalars(x.ty, alpha, beta);
        let (p, x, y) = (p.clone(), x.clone(), y.clone());
        submit(h, move || {
            if !x.check("x", xp) || !y.check("y", yp) {
                return false;
            }
            let values = x.read(xp);
            let out: Vec<f64> = windows(&p, &x, &y)
                .map(|(under, share)| match p.mode {
                    0 | 3 => under.iter().map(|&i| values[i]).fold(f64::NEG_INFINITY, |a, b| {
                        if b.is_nan() || b > a { b } else { a }
                    }),
                    _ => under.iter().map(|&i| values[i]).sum::<f64>() * share,
                })
                .collect();
            y.write(yp, &out, scale);
            true
        })
    }

    fn cudnnPoolingBackward(
        h: *const Handle, p: &Pooling, alpha: *const c_void, y: &Tensor, yp: u64, dy: &Tensor,
        dyp: u64, x: &Tensor, xp: u64, beta: *const c_void, dx: &Tensor, dxp: u64
    ) {
        if pooled(p, x) != Some(dy.dims.clone()) {
            return BAD_PARAM;
        }
        let scale = scalars(x.ty, alpha, beta);
        let (p, y, dy, x, dx) = (p.clone(), y.clone(), dy.clone(), x.clone(), dx.clone());
        submit(h, move || {
            let maximum = p.mode == 0 || p.mode == 3;
            let good = dy.check("dy", dyp)
                && dx.check("dx", dxp)
                && (!maximum || x.check("x", xp) && y.check("y", yp));
            if !good {
                return false;
            }
            let values = if maximum { x.read(xp) } else { Vec::new() };
            let mut out = vec![0.0; dx.count()];
            for ((under, share), d) in windows(&p, &x, &dy).zip(dy.read(dyp)) {
                if !maximum {
                    under.iter().for_each(|&i| out[i] += d * share);
                    continue;
                }
                // The first of equal largest elements gets it all.
                let first = under.iter().copied().reduce(|a, b| {
                    if values[b] > values[a] { b } else { a }
                });
                if let Some(i) = first {
                    out[i] += d;
                }
            }
            dx.write(dxp, &out, scale);
            true
        })
    }
}

fn pooled(p: &Pooling, x: &Tensor) -> Option<Vec<usize>> {
    if x.dims.len() != p.window.len() + 2 || p.stride.contains(&0) {
        return None;
    }
    let mut dims = vec![x.dims[0], x.dims[1]];
    for i in 0..p.window.len() {
        let room = (x.dims[2 + i] + 2 * p.pad[i]).checked_sub(p.window[i])?;
        dims.push(room / p.stride[i] + 1);
    }
    Some(dims)
}

/// For each element of y those of x under its window, and a mean's share of each.
fn windows<'a>(
    p: &'a Pooling,
    x: &'a Tensor,
    y: &'a Tensor,
) -> impl Iterator<Item = (Vec<usize>, f64)> + 'a {
    let (from, to) = (x.spatial(), y.spatial());
    (0..y.count()).map(move |index| {
        let mut places = vec![index / to * from];
        let mut rest = index % to;
        let mut inner = 1;
        // From the last dimension to the first; each adds its places under the window.
        for i in (0..p.window.len()).rev() {
            let (size, at) = (x.dims[2 + i], rest % y.dims[2 + i]);
            rest /= y.dims[2 + i];
            let under = (0..p.window[i])
                .filter_map(|k| (at * p.stride[i] + k).checked_sub(p.pad[i]))
                .filter(|&q| q < size);
            let under: Vec<usize> = under.collect();
            places = under
                .iter()
                .flat_map(|&q| places.iter().map(move |&b| b + q * inner))
                .collect();
            inner *= size;
        }
        let count = if p.mode == 1 {
            p.window.iter().product()
        } else {
            places.len()
        };
        (places, 1.0 / count as f64)
    })
}

// Small operations.

impl Activation {
    fn forward(&self, x: f64) -> f64 {
        match self.mode {
            0 => 1.0 / (1.0 + (-x).exp()),
            1 => {
                if x.is_nan() {
                    x
                } else {
                    x.max(0.0)
                }
            }
            2 => x.tanh(),
            3 => x.clamp(0.0, self.coefficient),
            4 => {
                if x >= 0.0 {
                    x
                } else {
                    self.coefficient * x.exp_m1()
                }
            }
            6 => x / (1.0 + (-self.coefficient * x).exp()),
            _ => x,
        }
    }

    fn slope(&self, x: f64, y: f64) -> f64 {
        match self.mode {
            0 => y * (1.0 - y),
            1 => (y > 0.0) as u8 as f64,
            2 => 1.0 - y * y,
            3 => (y > 0.0 && y < self.coefficient) as u8 as f64,
            4 => {
                if x >= 0.0 {
                    1.0
                } else {
                    y + self.coefficient
                }
            }
            6 => {
                let s = 1.0 / (1.0 + (-self.coefficient * x).exp());
                s + self.coefficient * x * s * (1.0 - s)
            }
            _ => 1.0,
        }
    }
}

/// Rows of elements that a softmax normalises together, as index lists.
fn softmax_rows(t: &Tensor, mode: c_int) -> Vec<Vec<usize>> {
    let (n, c, s) = (t.dims[0], t.dims[1], t.spatial());
    if mode == 0 {
        return (0..n)
            .map(|i| (i * c * s..(i + 1) * c * s).collect())
            .collect();
    }
    (0..n * s)
        .map(|i| (0..c).map(|k| (i / s * c + k) * s + i % s).collect())
        .collect()
}

export! {
    fn cudnnSetActivationDescriptor(a: &mut Activation, mode: c_int, _nan: c_int, c: f64) {
        *a = Activation { mode, coefficient: if mode == 6 { 1.0 } else { c } };
        SUCCESS
    }

    fn cudnnSetActivationDescriptorSwishBeta(a: &mut Activation, beta: f64) {
        a.coefficient = beta;
        SUCCESS
    }

    fn cudnnActivationForward(
        h: *const Handle, a: &Activation, alpha: *const c_void, x: &Tensor, xp: u64,
        beta: *const c_void, y: &Tensor, yp: u64
    ) {
        let scale = scalars(x.ty, alpha, beta);
        let (a, x, y) = (*a, x.clone(), y.clone());
        submit(h, move || {
            if !x.check("x", xp) || !y.check("y", yp) {
                return false;
            }
            let out: Vec<f64> = x.read(xp).into_iter().map(|v| a.forward(v)).collect();
            y.write(yp, &out, scale);
            true
        })
    }

    fn cudnnActivationBackward(
        h: *const Handle, a: &Activation, alpha: *const c_void, y: &Tensor, yp: u64, dy: &Tensor,
        dyp: u64, x: &Tensor, xp: u64, beta: *const c_void, dx: &Tensor, dxp: u64
    ) {
        let scale = scalars(x.ty, alpha, beta);
        let (a, y, dy, x, dx) = (*a, y.clone(), dy.clone(), x.clone(), dx.clone());
        submit(h, move || {
            let good = y.check("y", yp) && dy.check("dy", dyp) && x.check("x", xp);
            if !good || !dx.check("dx", dxp) {
                return false;
            }
            let (xs, ys, dys) = (x.read(xp), y.read(yp), dy.read(dyp));
            let out: Vec<f64> =
                (0..xs.len()).map(|i| dys[i] * a.slope(xs[i], ys[i])).collect();
            dx.write(dxp, &out, scale);
            true
        })
    }

    fn cudnnAddTensor(
        h: *const Handle, alpha: *const c_void, a: &Tensor, ap: u64, beta: *const c_void,
        c: &Tensor, cp: u64
    ) {
        let fits = a.dims.len() == c.dims.len()
            && a.dims.iter().zip(&c.dims).all(|(&x, &y)| x == 1 || x == y);
        if !fits {
            return BAD_PARAM;
        }
        let scale = scalars(c.ty, alpha, beta);
        let (a, c) = (a.clone(), c.clone());
        submit(h, move || {
            if !a.check("A", ap) || !c.check("C", cp) {
                return false;
            }
            // Where A has one element along a dimension it is read again and again.
            let strides = a.dims.iter().zip(&a.strides).map(|(&d, &s)| if d == 1 { 0 } else { s });
            let spread = Tensor { ty: a.ty, dims: c.dims.clone(), strides: strides.collect() };
            c.write(cp, &spread.read(ap), scale);
            true
        })
    }

    fn cudnnTransformTensor(
        h: *const Handle, alpha: *const c_void, x: &Tensor, xp: u64, beta: *const c_void,
        y: &Tensor, yp: u64
    ) {
        if x.dims != y.dims {
            return BAD_PARAM;
        }
        let scale = scalars(x.ty, alpha, beta);
        let (x, y) = (x.clone(), y.clone());
        submit(h, move || {
            if !x.check("x", xp) || !y.check("y", yp) {
                return false;
            }
            y.write(yp, &x.read(xp), scale);
            true
        })
    }

    fn cudnnSetTensor(h: *const Handle, y: &Tensor, yp: u64, value: *const c_void) {
        let value = y.ty.read(value as u64, 0);
        let y = y.clone();
        submit(h, move || {
            let good = y.check("y", yp);
            if good {
                y.write(yp, &vec![value; y.count()], (1.0, 0.0));
            }
            good
        })
    }

    fn cudnnScaleTensor(h: *const Handle, y: &Tensor, yp: u64, alpha: *const c_void) {
        let (alpha, _) = scalars(y.ty, alpha, std::ptr::null());
        let y = y.clone();
        submit(h, move || {
            let good = y.check("y", yp);
            if good {
                let old = y.read(yp);
                y.write(yp, &old, (alpha, 0.0));
            }
            good
        })
    }

    fn cudnnSoftmaxForward(
        h: *const Handle, algorithm: c_int, mode: c_int, alpha: *const c_void, x: &Tensor,
        xp: u64, beta: *const c_void, y: &Tensor, yp: u64
    ) {
        let scale = scalars(x.ty, alpha, beta);
        let (x, y) = (x.clone(), y.clone());
        submit(h, move || {
            if !x.check("x", xp) || !y.check("y", yp) {
                return false;
            }
            let mut values = x.read(xp);
            for row in softmax_rows(&x, mode) {
                let most = row.iter().map(|&i| values[i]).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = row.iter().map(|&i| (values[i] - most).exp()).sum();
                for &i in &row {
                    let v = values[i] - most;
                    values[i] = if algorithm == 2 { v - sum.ln() } else { v.exp() / sum };
                }
            }
            y.write(yp, &values, scale);
            true
        })
    }

    fn cudnnSoftmaxBackward(
        h: *const Handle, algorithm: c_int, mode: c_int, alpha: *const c_void, y: &Tensor,
        yp: u64, dy: &Tensor, dyp: u64, beta: *const c_void, dx: &Tensor, dxp: u64
    ) {
        let scale = scalars(y.ty, alpha, beta);
        let (y, dy, dx) = (y.clone(), dy.clone(), dx.clone());
        submit(h, move || {
            if !y.check("y", yp) || !dy.check("dy", dyp) || !dx.check("dx", dxp) {
                return false;
            }
            let (ys, dys) = (y.read(yp), dy.read(dyp));
            let mut out = vec![0.0; ys.len()];
            for row in softmax_rows(&y, mode) {
                if algorithm == 2 {
                    let sum: f64 = row.iter().map(|&i| dys[i]).sum();
                    row.iter().for_each(|&i| out[i] = dys[i] - ys[i].exp() * sum);
                } else {
                    let sum: f64 = row.iter().map(|&i| dys[i] * ys[i]).sum();
                    row.iter().for_each(|&i| out[i] = ys[i] * (dys[i] - sum));
                }
            }
            dx.write(dxp, &out, scale);
            true
        })
    }

    fn cudnnSetReduceTensorDescriptor(
        r: &mut Reduction, op: c_int, _ty: c_int, _nan: c_int, _indices: c_int, _index_ty: c_int
    ) {
        r.op = op;
        SUCCESS
    }

    fn cudnnGetReductionWorkspaceSize(
        _h: *const Handle, _r: &Reduction, _a: &Tensor, _c: &Tensor, size: *mut usize
    ) {
        *size = WORKSPACE;
        SUCCESS
    }

    fn cudnnGetReductionIndicesSize(
        _h: *const Handle, _r: &Reduction, _a: &Tensor, _c: &Tensor, size: *mut usize
    ) {
        *size = 0;
        SUCCESS
    }

    fn cudnnReduceTensor(
        h: *const Handle, r: &Reduction, _indices: u64, _indices_size: usize, _space: u64,
        _size: usize, alpha: *const c_void, a: &Tensor, ap: u64, beta: *const c_void, c: &Tensor,
        cp: u64
    ) {
        if r.op > 7 {
            return NOT_SUPPORTED;
        }
        let scale = scalars(a.ty, alpha, beta);
        let (op, a, c) = (r.op, a.clone(), c.clone());
        submit(h, move || {
            if !a.check("A", ap) || !c.check("C", cp) {
                return false;
            }
            let start = match op {
                1 => 1.0,
                2 => f64::INFINITY,
                3 => f64::NEG_INFINITY,
                _ => 0.0,
            };
            let mut out = vec![start; c.count()];
            let contiguous = packed(&c.dims, false);
            let strides = c.dims.iter().zip(contiguous).map(|(&d, s)| if d == 1 { 0 } else { s });
            let targets = Tensor { ty: a.ty, dims: a.dims.clone(), strides: strides.collect() };
            let values = a.read(ap);
            let mut next = values.iter();
            targets.visit(&mut |at| {
                let v = next.next().copied().unwrap_or(f64::NAN);
                let o = &mut out[at];
                *o = match op {
                    1 => *o * v,
                    2 => o.min(v),
                    3 => o.max(v),
                    4 => o.max(v.abs()),
                    6 => *o + v.abs(),
                    7 => *o + v * v,
                    _ => *o + v,
                };
            });
            let share = c.count() as f64 / a.count() as f64;
            for o in &mut out {
                *o = match op {
                    5 => *o * share,
                    7 => o.sqrt(),
                    _ => *o,
                };
            }
            c.write(cp, &out, scale);
            true
        })
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetVersion() -> usize {
    91500
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetCudartVersion() -> usize {
    13000
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetErrorString(status: c_int) -> *const c_char {
    let text: &CStr = match status {
        SUCCESS => c"CUDNN_STATUS_SUCCESS",
        BAD_PARAM => c"CUDNN_STATUS_BAD_PARAM",
        NOT_SUPPORTED => c"CUDNN_STATUS_NOT_SUPPORTED",
        EXECUTION_FAILED => c"CUDNN_STATUS_EXECUTION_FAILED",
        _ => c"CUDNN_STATUS_UNKNOWN",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnGetLastErrorString(message: *mut c_char, size: usize) {
    if size > 0 {
        unsafe { message.write(0) };
    }
}
