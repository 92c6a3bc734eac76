//! The driver API from start to end, in one test: the context is one for the process, and
//! the last step breaks it.

use cuda_stand_in::{blas, driver::*, stream};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;

const OK: c_int = 0;

unsafe fn launch(f: &'static KernelHandle, on: usize, params: &mut [*mut c_void]) -> c_int {
    unsafe { cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, on, params.as_mut_ptr(), null_mut()) }
}

#[test]
fn memory_graphs_and_errors() {
    // SAFETY: nothing else runs in this process.
    unsafe { std::env::set_var("STAND_IN_MEMORY_MIB", "64") };
    unsafe {
        assert_eq!(cuInit(0), OK);
        let mut name = [0 as c_char; 64];
        cuDeviceGetName(name.as_mut_ptr(), 64, 0);
        assert!(
            CStr::from_ptr(name.as_ptr())
                .to_str()
                .unwrap()
                .contains("no GPU")
        );

        // Memory is limited, and pools keep account.
        let (mut p, mut q) = (0u64, 0u64);
        assert_eq!(cuMemAlloc_v2(&mut p, 65 << 20), 2);
        assert_eq!(cuMemAlloc_v2(&mut p, 48 << 20), OK);
        assert!(
            std::slice::from_raw_parts(p as *const u8, 1000)
                .iter()
                .all(|&b| b == 0xFF)
        );
        assert_eq!(cuMemAllocAsync(&mut q, 17 << 20, 0), 2);
        assert_eq!(cuMemAllocAsync(&mut q, 16 << 20, 0), OK);
        let (mut free, mut total) = (1, 0);
        cuMemGetInfo_v2(&mut free, &mut total);
        assert_eq!((free, total), (0, 64 << 20));
        let mut pool = 0;
        cuDeviceGetDefaultMemPool(&mut pool, 0);
        let attribute = |which| {
            let mut v = 0u64;
            assert_eq!(
                cuMemPoolGetAttribute(pool, which, &mut v as *mut u64 as *mut c_void),
                OK
            );
            v
        };
        assert_eq!([7, 8, 5, 6].map(attribute), [16 << 20; 4]);
        assert_eq!(cuMemFreeAsync(q, 0), OK);
        assert_eq!([7, 8, 5].map(attribute), [0, 16 << 20, 16 << 20]);
        assert_eq!(cuMemPoolTrimTo(pool, 0), OK);
        assert_eq!(attribute(5), 0);
        assert_eq!(cuMemFree_v2(p), OK);
        assert_eq!(cuMemFree_v2(p), 1);

        // A captured sequence of a copy, a library call and a kernel, replayed.
        let mut module = null_mut();
        let text = concat!(include_str!("kernels/kernels.ptx"), "\0");
        assert_eq!(
            cuModuleLoadData(&mut module, text.as_ptr() as *const c_void),
            OK
        );
        let mut f = null_mut();
        assert_eq!(
            cuModuleGetFunction(&mut f, &*module, c"no_such".as_ptr()),
            500
        );
        assert_eq!(
            cuModuleGetFunction(&mut f, &*module, c"out_of_bounds".as_ptr()),
            OK
        );
        let f: &'static KernelHandle = &*f;
        let (mut x, mut y, mut n, mut extra) = (0u64, 0u64, 4, 0);
        cuMemAlloc_v2(&mut x, 16);
        cuMemAlloc_v2(&mut y, 16);
        let start = [1f32, 2.0, 3.0, 4.0];
        let mut s = 0;
        assert_eq!(cuStreamCreate(&mut s, 1), OK);
        let mut h = null_mut();
        blas::cublasCreate_v2(&mut h);
        blas::cublasSetStream_v2(h, s);
        let two = 2f32;
        assert_eq!(cuStreamBeginCapture_v2(s, 1), OK);
        assert_eq!(cuMemcpyHtoDAsync_v2(x, start.as_ptr() as u64, 16, s), OK);
        assert_eq!(blas::cublasSscal_v2(h, 4, &two, x, 1), 0);
        assert_eq!(cuMemcpyDtoDAsync_v2(y, x, 16, s), OK);
        let mut count = 2;
        let arg = |v: *mut c_int| v as *mut c_void;
        let to_x = &mut x as *mut u64 as *mut c_void;
        assert_eq!(
            launch(f, s, &mut [to_x, arg(&mut count), arg(&mut extra)]),
            OK
        );
        let mut status = 0;
        cuStreamIsCapturing(s, &mut status);
        assert_eq!(status, 1);
        let mut graph = std::ptr::null();
        assert_eq!(cuStreamEndCapture(s, &mut graph), OK);
        let value = |at: u64| std::slice::from_raw_parts(at as *const f32, 4).to_vec();
        assert!(value(y)[0].is_nan(), "a capture must not run");
        let mut exec = std::ptr::null();
        assert_eq!(cuGraphInstantiateWithFlags(&mut exec, graph, 0), OK);
        assert_eq!(cuGraphDestroy(graph), OK);
        for _ in 0..2 {
            assert_eq!(cuGraphLaunch(exec, s), OK);
            assert_eq!(value(y), [2.0, 4.0, 6.0, 8.0]);
            assert_eq!(value(x), [1.0, 1.0, 6.0, 8.0]);
        }
        cuGraphExecDestroy(exec);

        // To wait in a capture spoils it.
        assert_eq!(cuStreamBeginCapture_v2(s, 1), OK);
        assert_eq!(cuStreamSynchronize(s), 900);
        assert_eq!(cuStreamEndCapture(s, &mut graph), 901);
        assert_eq!(cuStreamBeginCapture_v2(stream::LEGACY, 1), 900);

        // Another stream joins a capture by an event.
        let (mut other, mut event) = (0, null_mut());
        cuStreamCreate(&mut other, 1);
        cuEventCreate(&mut event, 2);
        assert_eq!(cuStreamBeginCapture_v2(s, 1), OK);
        assert_eq!(cuEventRecord(event, s), OK);
        assert_eq!(cuStreamWaitEvent(other, event, 0), OK);
        assert_eq!(cuMemsetD32Async(y, 0, 4, other), OK);
        assert_eq!(cuStreamEndCapture(s, &mut graph), OK);
        assert_eq!((*graph).work.len(), 1);
        assert_eq!(value(y)[0], 2.0);
        cuGraphDestroy(graph);

        // Wrong launches are refused, and break nothing.
        let params = &mut [to_x, arg(&mut n), arg(&mut extra)];
        let refused = cuLaunchKernel(
            f,
            1,
            1,
            1,
            2048,
            1,
            1,
            0,
            s,
            params.as_mut_ptr(),
            null_mut(),
        );
        assert_eq!(refused, 1);
        let refused = cuLaunchKernel(
            f,
            1,
            1,
            1,
            32,
            1,
            1,
            60000,
            s,
            params.as_mut_ptr(),
            null_mut(),
        );
        assert_eq!(refused, 1);
        assert_eq!(cuFuncSetAttribute(f, 8, 60000), OK);
        let good = cuLaunchKernel(
            f,
            1,
            1,
            1,
            32,
            1,
            1,
            60000,
            s,
            params.as_mut_ptr(),
            null_mut(),
        );
        assert_eq!(good, OK);

        // A store past the end breaks the context for good.
        extra = 1;
        let params = &mut [to_x, arg(&mut n), arg(&mut extra)];
        assert_eq!(launch(f, s, params), 700);
        assert_eq!(cuStreamSynchronize(s), 700);
        assert_eq!(cuMemAlloc_v2(&mut p, 16), 700);
    }
}
