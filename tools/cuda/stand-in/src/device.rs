//! The devices, which are all alike: their properties, the sticky error and how errors are named.

use std::ffi::CStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

pub const SUCCESS: i32 = 0;
pub const INVALID_VALUE: i32 = 1;
pub const OUT_OF_MEMORY: i32 = 2;
pub const INVALID_DEVICE: i32 = 101;
pub const INVALID_IMAGE: i32 = 200;
pub const INVALID_CONTEXT: i32 = 201;
pub const INVALID_PTX: i32 = 218;
pub const FILE_NOT_FOUND: i32 = 301;
pub const INVALID_HANDLE: i32 = 400;
pub const NOT_FOUND: i32 = 500;
pub const ILLEGAL_ADDRESS: i32 = 700;
pub const ASSERT: i32 = 710;
pub const ILLEGAL_INSTRUCTION: i32 = 715;
pub const MISALIGNED_ADDRESS: i32 = 716;
pub const LAUNCH_FAILED: i32 = 719;
pub const NOT_SUPPORTED: i32 = 801;
pub const CAPTURE_UNSUPPORTED: i32 = 900;
pub const CAPTURE_INVALIDATED: i32 = 901;
pub const CAPTURE_UNMATCHED: i32 = 903;
pub const CAPTURE_ISOLATION: i32 = 905;
pub const CAPTURED_EVENT: i32 = 907;
pub const INVALID_CLUSTER_SIZE: i32 = 912;

pub const NAME: &CStr = c"CUDA stand-in (no GPU)";
pub const MULTIPROCESSORS: i32 = 4;
pub const MAX_THREADS: u32 = 1024;
/// Shared memory of a block without and with opting in, and of a multiprocessor.
pub const SHARED: u32 = 48 << 10;
pub const SHARED_OPT_IN: u32 = 227 << 10;
pub const SHARED_MULTIPROCESSOR: u32 = 228 << 10;

pub fn compute_capability() -> (i32, i32) {
    static VALUE: OnceLock<(i32, i32)> = OnceLock::new();
    *VALUE.get_or_init(|| {
        let text = std::env::var("STAND_IN_COMPUTE_CAPABILITY").unwrap_or("9.0".to_string());
        let parsed = text
            .split_once('.')
            .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        parsed.unwrap_or_else(|| {
            report(&format!(
                "STAND_IN_COMPUTE_CAPABILITY is {text}, not like 9.0; 9.0 is taken"
            ));
            (9, 0)
        })
    })
}

/// How many devices there are.
pub fn count() -> i32 {
    static VALUE: OnceLock<i32> = OnceLock::new();
    *VALUE.get_or_init(|| {
        let number = std::env::var("STAND_IN_DEVICES").ok();
        let number = number.and_then(|t| t.parse::<i32>().ok());
        number.unwrap_or(1).clamp(0, 16)
    })
}

/// Of all devices together.
pub fn total_memory() -> u64 {
    static VALUE: OnceLock<u64> = OnceLock::new();
    *VALUE.get_or_init(|| {
        let mib = std::env::var("STAND_IN_MEMORY_MIB")
            .ok()
            .and_then(|t| t.parse::<u64>().ok());
        mib.unwrap_or(4096) << 20
    })
}

/// Whether each launch is to be told on standard error.
pub fn traced() -> bool {
    static VALUE: OnceLock<bool> = OnceLock::new();
    *VALUE.get_or_init(|| std::env::var("STAND_IN_TRACE").is_ok_and(|v| v != "0"))
}

pub fn report(text: &str) {
    eprintln!("cuda stand-in: {text}");
}

/// The error that broke the context, after which every call returns it.
static BROKEN: AtomicI32 = AtomicI32::new(0);

pub fn broken() -> i32 {
    BROKEN.load(Ordering::Relaxed)
}

/// Breaks the context if the error is one of those that do so.
pub fn note(error: i32) -> i32 {
    if matches!(error, 700..=702 | 710 | 714..=719) {
        let _ = BROKEN.compare_exchange(0, error, Ordering::Relaxed, Ordering::Relaxed);
    }
    error
}

/// Names and descriptions of the errors that the library returns, and common others.
pub fn describe(error: i32) -> Option<(&'static CStr, &'static CStr)> {
    Some(match error {
        0 => (c"CUDA_SUCCESS", c"no error"),
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        3 => (c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
        100 => (
            c"CUDA_ERROR_NO_DEVICE",
            c"no CUDA-capable device is detected",
        ),
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        200 => (
            c"CUDA_ERROR_INVALID_IMAGE",
            c"device kernel image is invalid",
        ),
        201 => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        218 => (c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
        301 => (c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found"),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        500 => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        600 => (c"CUDA_ERROR_NOT_READY", c"device not ready"),
        700 => (
            c"CUDA_ERROR_ILLEGAL_ADDRESS",
            c"an illegal memory access was encountered",
        ),
        701 => (
            c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
            c"too many resources requested for launch",
        ),
        710 => (c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
        715 => (
            c"CUDA_ERROR_ILLEGAL_INSTRUCTION",
            c"an illegal instruction was encountered",
        ),
        716 => (c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
        719 => (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
        801 => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
        900 => (
            c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            c"operation not permitted when stream is capturing",
        ),
        901 => (
            c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            c"operation failed due to a previous error during capture",
        ),
        903 => (
            c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
            c"capture was not ended in the same stream as it began",
        ),
        905 => (
            c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
            c"dependency created on uncaptured work in another stream",
        ),
        907 => (
            c"CUDA_ERROR_CAPTURED_EVENT",
            c"operation not permitted on an event last recorded in a capturing stream",
        ),
        912 => (c"CUDA_ERROR_INVALID_CLUSTER_SIZE", c"invalid cluster size"),
        999 => (c"CUDA_ERROR_UNKNOWN", c"unknown error"),
        _ => return None,
    })
}

pub fn attribute(which: i32) -> i32 {
    let (major, minor) = compute_capability();
    match which {
        1..=3 => MAX_THREADS as i32,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65535,
        8 => SHARED as i32,
        9 => 64 << 10,
        10 => 32,
        11 => i32::MAX,
        12 | 82 => 65536,
        13 | 36 => 1_000_000,
        14 => 512,
        // One copy engine, mapped host memory, unified addressing and the like.
        15 | 19 | 31 | 40 | 41 | 78 | 79 | 80 | 83 | 95 | 99 | 115 => 1,
        16 => MULTIPROCESSORS,
        37 => 128,
        38 => 4 << 20,
        39 => 2048,
        75 => major,
        76 => minor,
        81 => SHARED_MULTIPROCESSOR as i32,
        87 => 2,
        97 => SHARED_OPT_IN as i32,
        106 => 32,
        111 => 1024,
        // Cluster launch.
        120 => (major >= 9) as i32,
        _ => 0,
    }
}
