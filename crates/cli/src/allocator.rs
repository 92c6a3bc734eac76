//! The allocator of the binary. glibc returns every large buffer to the kernel, so that each step
//! of a training run would pay for page faults again; this one keeps what it has.

use libmimalloc_sys::{mi_option_set, mi_option_t};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of `mimalloc.h`, which the crate does not name.
const PURGE_DELAY: mi_option_t = 15;

/// Never give freed memory back to the kernel.
pub fn keep_memory() {
    // SAFETY: sets an integer option; called before any other thread starts.
    unsafe { mi_option_set(PURGE_DELAY, -1) };
}
