//! NVRTC: it says its version, and compiles nothing.

use crate::driver::export;
use std::ffi::{c_char, c_int, c_void};

const SUCCESS: c_int = 0;
/// `NVRTC_ERROR_INTERNAL_ERROR`
const FAILED: c_int = 11;

export! {
    fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) {
        *major = 13;
        *minor = 0;
        SUCCESS
    }

    fn nvrtcCreateProgram(
        _program: *mut c_void, _source: *const c_char, _name: *const c_char, _n: c_int,
        _headers: *const c_void, _names: *const c_void
    ) {
        crate::device::report("NVRTC compiles nothing here: compile with nvcc beforehand");
        FAILED
    }

    fn nvrtcCompileProgram(_program: *mut c_void, _n: c_int, _options: *const c_void) { FAILED }

    fn nvrtcDestroyProgram(_program: *mut c_void) { FAILED }

    fn nvrtcGetPTXSize(_program: *mut c_void, _size: *mut usize) { FAILED }

    fn nvrtcGetPTX(_program: *mut c_void, _text: *mut c_char) { FAILED }

    fn nvrtcGetProgramLogSize(_program: *mut c_void, _size: *mut usize) { FAILED }

    fn nvrtcGetProgramLog(_program: *mut c_void, _text: *mut c_char) { FAILED }
}
