//! Convolutions by cuDNN.

use super::memory::{Real, with_bytes};
use crate::{Error, Precision, Search, is_out_of_memory, precision, search};
use candle_core::cuda::cudarc::cudnn::{result, sys};
use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType};
use cudarc::driver::CudaStream;
use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Scratch memory that an algorithm may take.
const MOST_WORKSPACE: usize = 1 << 29;
/// Algorithms of a pass that cuDNN may name, each with every rounding.
const MOST_ALGORITHMS: usize = 32;

/// A convolution along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Along {
    /// Size of the input.
    pub input: usize,
    /// Size of the output.
    pub output: usize,
    /// Size of the filter.
    pub kernel: usize,
    /// Distance of outputs in the input.
    pub stride: usize,
    /// Zeros on either side.
    pub padding: usize,
    /// Distance of the filter's places in the input.
    pub dilation: usize,
}

/// A convolution of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Convolution {
    /// Images.
    pub batch: usize,
    /// Channels in and out.
    pub channels: (usize, usize),
    /// Parts of the channels that do not see each other.
    pub groups: usize,
    /// Down.
    pub rows: Along,
    /// Across.
    pub columns: Along,
    /// Whether the channels of a pixel lie beside each other: maps `(batch, height, width, channels)`
    /// and filters `(out, height, width, in)` instead of `(batch, channels, height, width)` and
    /// `(out, in, height, width)`.
    pub channels_last: bool,
}

/// What is computed of input, filter and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradient of the input, from that of the output.
    Input,
    /// The gradient of the filter, from that of the output.
    Filter,
}

impl Convolution {
    /// Values that a pass writes.
    fn values(&self, pass: Pass) -> usize {
        let (rows, columns, (inputs, outputs)) = (self.rows, self.columns, self.channels);
        let sizes = match pass {
            Pass::Forward => [self.batch, outputs, rows.output, columns.output],
            Pass::Input => [self.batch, inputs, rows.input, columns.input],
            Pass::Filter => [
                outputs,
                inputs / self.groups.max(1),
                rows.kernel,
                columns.kernel,
            ],
        };
        sizes.iter().product()
    }
}

/// Whether cuDNN has an algorithm for a pass that [`convolve`] would take.
///
/// # Errors
/// As there.
pub fn can_convolve<T: Real>(
    device: &CudaDevice,
    convolution: &Convolution,
    pass: Pass,
) -> candle_core::Result<bool> {
    with_plan::<T, _>(device, convolution, pass, |_, plan| {
        Ok(!plan.choices.is_empty())
    })
}

/// Runs a pass on the stream of the device: one of the addresses of `(input, filter, output)` is written,
/// or added to where it `adds`, the other two are read. Products are rounded as [`crate::precision`] says.
///
/// The algorithm of each shape is chosen once a thread, as [`search`] says, among those that give the same
/// bits each time and take at most 512 MiB of scratch.
///
/// # Safety
/// The addresses are those of memory that is alive, of this type and these sizes.
///
/// # Errors
/// [`Error::Library`] without cuDNN, [`Error::OutOfMemory`] for the scratch, [`Error::Call`].
pub unsafe fn convolve<T: Real>(
    device: &CudaDevice,
    convolution: &Convolution,
    pass: Pass,
    (x, w, y): (u64, u64, u64),
    adds: bool,
) -> candle_core::Result<()> {
    with_plan::<T, _>(device, convolution, pass, |handle, plan| {
        if search() == Search::Timed && !plan.timed {
            let written = convolution.values(pass) * size_of::<T>();
            // SAFETY: the caller vouches for the operands.
            unsafe { plan.time(handle, device, T::DTYPE, (pass, written), (x, w, y)) }?;
        }
        while let Some(&choice) = plan.choices.first() {
            plan.round_as(choice)?;
            let ran = with_bytes(OP, device, choice.workspace, |workspace| {
                // SAFETY: the caller vouches for the operands; descriptors and handle live in this thread.
                Ok(unsafe { plan.run(handle, choice, T::DTYPE, (x, w, y), (workspace, adds)) })
            })?;
            match ran {
                // What the ranking held for possible, and is not.
                Err(error) if is_refusal(&error) => drop(plan.choices.remove(0)),
                ran => return said(ran),
            }
        }
        let problem = format!(
            "cuDNN has no algorithm of repeatable results within {} MiB for the {pass:?} pass of \
             {convolution:?} in {:?}",
            MOST_WORKSPACE >> 20,
            T::DTYPE
        );
        Err(Error::Call { op: OP, problem }.into())
    })
}

/// Whether cuDNN says that it cannot do this, and not that something went wrong.
fn is_refusal(error: &result::CudnnError) -> bool {
    let name = format!("{:?}", error.0);
    name.starts_with("CUDNN_STATUS_NOT_SUPPORTED") || name.starts_with("CUDNN_STATUS_BAD_PARAM")
}

const OP: &str = "conv2d";

/// Gives `work` the handle of this thread and its plan for a pass.
fn with_plan<T: Real, R>(
    device: &CudaDevice,
    convolution: &Convolution,
    pass: Pass,
    work: impl FnOnce(sys::cudnnHandle_t, &mut Plan) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    /// Looked for once: that tries one name after another.
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens a library of that name, if there is one.
    if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        let (asked, library) = (OP.to_owned(), "cudnn");
        return Err(Error::Library { asked, library }.into());
    }
    let most = convolution
        .values(Pass::Input)
        .max(convolution.values(Pass::Forward));
    if most > c_int::MAX as usize {
        let problem = format!(
            "maps of {most} values are more than cuDNN takes (2³¹ - 1): a smaller batch is needed, or more parts \
             of it (accumulate)"
        );
        return Err(Error::Call { op: OP, problem }.into());
    }
    LIBRARY.with_borrow_mut(|libraries| {
        let library = match libraries.entry(device.id()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Library::open(device)?),
        };
        let key = (*convolution, pass, T::DTYPE, precision(), search());
        let handle = library.handle;
        let plan = match library.plans.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Plan::new(handle, convolution, pass, T::DTYPE)?),
        };
        work(handle, plan)
    })
}

/// Which plan: the precision matters to f32 alone.
type Key = (Convolution, Pass, DType, Precision, Search);

thread_local! {
    /// A handle of cuDNN belongs to a thread.
    static LIBRARY: RefCell<HashMap<DeviceId, Library>> = RefCell::default();
}

struct Library {
    // Before the handle: they go first.
    plans: HashMap<Key, Plan>,
    handle: sys::cudnnHandle_t,
    /// What the handle works on must outlive it.
    _stream: Arc<CudaStream>,
}

impl Library {
    fn open(device: &CudaDevice) -> candle_core::Result<Self> {
        let stream = device.cuda_stream();
        stream
            .context()
            .bind_to_thread()
            .map_err(candle_core::Error::wrap)?;
        let handle = said(result::create_handle())?;
        // SAFETY: both were made just now, or live with the device.
        said(unsafe { result::set_stream(handle, stream.cu_stream().cast()) })?;
        Ok(Self {
            plans: HashMap::new(),
            handle,
            _stream: stream,
        })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `open`. At the end of the program the driver may be gone: then it fails.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// An algorithm, by its number in the list of its pass.
#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Input(sys::cudnnConvolutionBwdDataAlgo_t),
    Filter(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// An algorithm that will do, how it rounds, and bytes that it works with.
#[derive(Clone, Copy)]
struct Choice {
    algorithm: Algorithm,
    math: sys::cudnnMathType_t,
    workspace: usize,
}

/// What cuDNN says of an algorithm.
struct Candidate {
    algorithm: Algorithm,
    works: bool,
    deterministic: bool,
    math: sys::cudnnMathType_t,
}

struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    w: sys::cudnnFilterDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    /// The fastest first, as far as that is known.
    choices: Vec<Choice>,
    /// Whether they were timed.
    timed: bool,
}

impl Plan {
    fn new(
        handle: sys::cudnnHandle_t,
        shape: &Convolution,
        pass: Pass,
        dtype: DType,
    ) -> candle_core::Result<Self> {
        let mut plan = Self {
            x: ptr::null_mut(),
            w: ptr::null_mut(),
            y: ptr::null_mut(),
            convolution: ptr::null_mut(),
            choices: vec![],
            timed: false,
        };
        let math = plan.describe(shape, dtype)?;
        let candidates = match plan.candidates(handle, pass) {
            // What it does not know at all.
            Err(error) if is_refusal(&error) => return Ok(plan),
            candidates => said(candidates)?,
        };
        let full = math == sys::cudnnMathType_t::CUDNN_FMA_MATH;
        for candidate in candidates {
            use sys::cudnnMathType_t::{CUDNN_DEFAULT_MATH, CUDNN_FMA_MATH};
            let rounds = !matches!(candidate.math, CUDNN_DEFAULT_MATH | CUDNN_FMA_MATH);
            if !candidate.works || !candidate.deterministic || full && rounds {
                continue;
            }
            let mut choice = Choice {
                algorithm: candidate.algorithm,
                math: if full { math } else { candidate.math },
                workspace: 0,
            };
            // As it is with this rounding, which what the ranking says may not be.
            plan.round_as(choice)?;
            choice.workspace = match plan.scratch(handle, choice) {
                Err(error) if is_refusal(&error) => continue,
                bytes => said(bytes)?,
            };
            if choice.workspace <= MOST_WORKSPACE {
                plan.choices.push(choice);
            }
        }
        Ok(plan)
    }

    fn round_as(&self, choice: Choice) -> candle_core::Result<()> {
        // SAFETY: the descriptor is alive.
        said(unsafe { result::set_convolution_math_type(self.convolution, choice.math) })
    }

    /// Bytes that an algorithm works with.
    fn scratch(
        &self,
        handle: sys::cudnnHandle_t,
        choice: Choice,
    ) -> Result<usize, result::CudnnError> {
        let (x, w, y, convolution) = (self.x, self.w, self.y, self.convolution);
        // SAFETY: the descriptors are alive.
        unsafe {
            match choice.algorithm {
                Algorithm::Forward(algorithm) => result::get_convolution_forward_workspace_size(
                    handle,
                    x,
                    w,
                    convolution,
                    y,
                    algorithm,
                ),
                Algorithm::Input(algorithm) => {
                    result::get_convolution_backward_data_workspace_size(
                        handle,
                        w,
                        y,
                        convolution,
                        x,
                        algorithm,
                    )
                }
                Algorithm::Filter(algorithm) => {
                    result::get_convolution_backward_filter_workspace_size(
                        handle,
                        x,
                        y,
                        convolution,
                        w,
                        algorithm,
                    )
                }
            }
        }
    }

    /// Puts the choices in order of the time that each takes, with results of their own; those that do not run
    /// go. Those that there is no memory for come last.
    ///
    /// # Safety
    /// As [`convolve`].
    unsafe fn time(
        &mut self,
        handle: sys::cudnnHandle_t,
        device: &CudaDevice,
        dtype: DType,
        (pass, written): (Pass, usize),
        (x, w, y): (u64, u64, u64),
    ) -> candle_core::Result<()> {
        const CALLS: u32 = 3;
        self.timed = true;
        let took = |choice: Choice| {
            with_bytes(OP, device, written, |to| {
                let operands = match pass {
                    Pass::Forward => (x, w, to),
                    Pass::Input => (to, w, y),
                    Pass::Filter => (x, to, y),
                };
                with_bytes(OP, device, choice.workspace, |workspace| {
                    // SAFETY: the caller vouches for what is read; what is written was made for it.
                    let run =
                        || unsafe { self.run(handle, choice, dtype, operands, (workspace, false)) };
                    let calls = |count| (0..count).try_for_each(|_| run());
                    if let Err(error) = calls(1) {
                        return Ok(Err(error));
                    }
                    device
                        .cuda_stream()
                        .synchronize()
                        .map_err(candle_core::Error::wrap)?;
                    let start = Instant::now();
                    if let Err(error) = calls(CALLS) {
                        return Ok(Err(error));
                    }
                    device
                        .cuda_stream()
                        .synchronize()
                        .map_err(candle_core::Error::wrap)?;
                    Ok(Ok(start.elapsed()))
                })
            })
        };
        let mut times: Vec<(Duration, Choice)> = vec![];
        for &choice in &self.choices {
            self.round_as(choice)?;
            match took(choice) {
                // It would not have to run: the ranking may have it behind others.
                Ok(Err(_)) => {}
                Ok(Ok(time)) => times.push((time, choice)),
                Err(error) if is_out_of_memory(&error.to_string()) => {
                    times.push((Duration::MAX, choice))
                }
                Err(error) => return Err(error),
            }
        }
        times.sort_by_key(|(time, _)| *time);
        self.choices = times.into_iter().map(|(_, choice)| choice).collect();
        Ok(())
    }

    /// Makes the descriptors; tells how products are rounded.
    fn describe(
        &mut self,
        shape: &Convolution,
        dtype: DType,
    ) -> candle_core::Result<sys::cudnnMathType_t> {
        use sys::cudnnDataType_t as Type;
        use sys::cudnnMathType_t as Math;
        use sys::cudnnTensorFormat_t::{CUDNN_TENSOR_NCHW, CUDNN_TENSOR_NHWC};
        let (kind, compute, math) = match (dtype, precision()) {
            (DType::F64, _) => (
                Type::CUDNN_DATA_DOUBLE,
                Type::CUDNN_DATA_DOUBLE,
                Math::CUDNN_DEFAULT_MATH,
            ),
            (DType::BF16, _) => (
                Type::CUDNN_DATA_BFLOAT16,
                Type::CUDNN_DATA_FLOAT,
                Math::CUDNN_TENSOR_OP_MATH,
            ),
            (_, Precision::Full) => (
                Type::CUDNN_DATA_FLOAT,
                Type::CUDNN_DATA_FLOAT,
                Math::CUDNN_FMA_MATH,
            ),
            (_, Precision::Tf32) => (
                Type::CUDNN_DATA_FLOAT,
                Type::CUDNN_DATA_FLOAT,
                Math::CUDNN_DEFAULT_MATH,
            ),
        };
        let format = match shape.channels_last {
            true => CUDNN_TENSOR_NHWC,
            false => CUDNN_TENSOR_NCHW,
        };
        let (rows, columns) = (shape.rows, shape.columns);
        let of = |c: usize, h: usize, w: usize| [shape.batch, c, h, w].map(|n| n as c_int);
        let (inputs, outputs) = shape.channels;
        // SAFETY: each descriptor is made before it is set.
        unsafe {
            self.x = said(result::create_tensor_descriptor())?;
            self.y = said(result::create_tensor_descriptor())?;
            self.w = said(result::create_filter_descriptor())?;
            self.convolution = said(result::create_convolution_descriptor())?;
            let x = of(inputs, rows.input, columns.input);
            said(result::set_tensor4d_descriptor(self.x, format, kind, x))?;
            let y = of(outputs, rows.output, columns.output);
            said(result::set_tensor4d_descriptor(self.y, format, kind, y))?;
            let in_group = inputs / shape.groups.max(1);
            let w = [outputs, in_group, rows.kernel, columns.kernel].map(|n| n as c_int);
            said(result::set_filter4d_descriptor(self.w, kind, format, w))?;
            said(result::set_convolution2d_descriptor(
                self.convolution,
                rows.padding as c_int,
                columns.padding as c_int,
                rows.stride as c_int,
                columns.stride as c_int,
                rows.dilation as c_int,
                columns.dilation as c_int,
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                compute,
            ))?;
            let groups = shape.groups as i32;
            said(result::set_convolution_group_count(
                self.convolution,
                groups,
            ))?;
            said(result::set_convolution_math_type(self.convolution, math))?;
        }
        Ok(math)
    }

    /// The algorithms of a pass, the ones that cuDNN takes for the fastest first.
    fn candidates(
        &self,
        handle: sys::cudnnHandle_t,
        pass: Pass,
    ) -> Result<Vec<Candidate>, result::CudnnError> {
        let (most, mut given) = (MOST_ALGORITHMS as c_int, 0);
        macro_rules! ask {
            ($kind:ident, $ask:ident, $first:expr, $second:expr, $third:expr) => {{
                // SAFETY: a structure of numbers, of which 0 is one of each enumeration.
                let mut found = [unsafe { std::mem::zeroed() }; MOST_ALGORITHMS];
                // SAFETY: room for as many as are asked for; the descriptors are alive.
                unsafe {
                    result::$ask(
                        handle,
                        $first,
                        $second,
                        self.convolution,
                        $third,
                        most,
                        &raw mut given,
                        found.as_mut_ptr(),
                    )
                }?;
                let found = found.iter().take(given.max(0) as usize);
                found
                    .map(|f| Candidate {
                        algorithm: Algorithm::$kind(f.algo),
                        works: f.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS,
                        deterministic: f.determinism
                            == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC,
                        math: f.mathType,
                    })
                    .collect()
            }};
        }
        Ok(match pass {
            Pass::Forward => ask!(
                Forward,
                get_convolution_forward_algorithm,
                self.x,
                self.w,
                self.y
            ),
            Pass::Input => ask!(
                Input,
                get_convolution_backward_data_algorithm,
                self.w,
                self.y,
                self.x
            ),
            Pass::Filter => ask!(
                Filter,
                get_convolution_backward_filter_algorithm,
                self.x,
                self.y,
                self.w
            ),
        })
    }

    /// # Safety
    /// As [`convolve`]; the handle is of this thread.
    unsafe fn run(
        &self,
        handle: sys::cudnnHandle_t,
        choice: Choice,
        dtype: DType,
        (x, w, y): (u64, u64, u64),
        (workspace, adds): (u64, bool),
    ) -> Result<(), result::CudnnError> {
        let kept = if adds { 1.0 } else { 0.0 };
        let (single, double) = ((1.0_f32, kept as f32), (1.0_f64, kept));
        let factors: (*const c_void, *const c_void) = match dtype {
            DType::F64 => (
                ptr::from_ref(&double.0).cast(),
                ptr::from_ref(&double.1).cast(),
            ),
            _ => (
                ptr::from_ref(&single.0).cast(),
                ptr::from_ref(&single.1).cast(),
            ),
        };
        let (one, kept) = factors;
        let read = |at: u64| at as *const c_void;
        let (workspace, bytes) = (workspace as *mut c_void, choice.workspace);
        // SAFETY: the caller vouches for the operands.
        unsafe {
            match choice.algorithm {
                Algorithm::Forward(algorithm) => result::convolution_forward(
                    handle,
                    one,
                    self.x,
                    read(x),
                    self.w,
                    read(w),
                    self.convolution,
                    algorithm,
                    workspace,
                    bytes,
                    kept,
                    self.y,
                    y as *mut c_void,
                ),
                Algorithm::Input(algorithm) => result::convolution_backward_data(
                    handle,
                    one,
                    self.w,
                    read(w),
                    self.y,
                    read(y),
                    self.convolution,
                    algorithm,
                    workspace,
                    bytes,
                    kept,
                    self.x,
                    x as *mut c_void,
                ),
                Algorithm::Filter(algorithm) => result::convolution_backward_filter(
                    handle,
                    one,
                    self.x,
                    read(x),
                    self.y,
                    read(y),
                    self.convolution,
                    algorithm,
                    workspace,
                    bytes,
                    kept,
                    self.w,
                    w as *mut c_void,
                ),
            }
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `describe`, or null where it failed before.
        unsafe {
            for tensor in [self.x, self.y] {
                if !tensor.is_null() {
                    let _ = result::destroy_tensor_descriptor(tensor);
                }
            }
            if !self.w.is_null() {
                let _ = result::destroy_filter_descriptor(self.w);
            }
            if !self.convolution.is_null() {
                let _ = result::destroy_convolution_descriptor(self.convolution);
            }
        }
    }
}

fn said<T>(result: Result<T, result::CudnnError>) -> candle_core::Result<T> {
    result.map_err(|error| {
        let problem = format!("cuDNN: {:?}", error.0);
        Error::Call {
            op: "conv2d",
            problem,
        }
        .into()
    })
}
