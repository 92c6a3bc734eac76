//! Cache-line aligned memory, and where it lives between calls.
//!
//! glibc hands large blocks back to the kernel, so that every step would pay for page faults
//! again. Workspaces therefore stay with their thread, and the iterates that wait for the
//! backward pass return to a small pool.

use super::vector::Element;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::sync::Mutex;

/// Page size that the kernel is asked for: the iterates of a batch span thousands of small pages.
const HUGE: usize = 2 << 20;
/// Buffers that the pool holds at most; more are freed.
const POOLED: usize = 8;

/// A zero-initialised block of bytes, aligned to a cache line.
#[derive(Debug)]
struct Block {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: a block owns its memory.
unsafe impl Send for Block {}
// SAFETY: shared access only reads the pointer and the size.
unsafe impl Sync for Block {}

impl Block {
    const EMPTY: Self = Self {
        start: std::ptr::null_mut(),
        bytes: 0,
    };

    fn layout(bytes: usize) -> Layout {
        // Only a size near isize::MAX fails here, and no such slice of features can exist.
        let align = if bytes >= HUGE { HUGE } else { 4096 };
        Layout::from_size_align(bytes, align).unwrap_or_else(|_| Layout::new::<u8>())
    }

    fn new(bytes: usize) -> Self {
        let bytes = bytes
            .max(1)
            .next_multiple_of(if bytes >= HUGE { HUGE } else { 4096 });
        let layout = Self::layout(bytes);
        assert_eq!(layout.size(), bytes, "workspace too large");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        #[cfg(target_os = "linux")]
        if bytes >= HUGE {
            // SAFETY: the range is ours; the advice may be ignored.
            unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // Only now: the first touch decides the size of a page.
        // SAFETY: freshly allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Self { start, bytes }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated in `new` with the same layout.
            unsafe { dealloc(self.start, Self::layout(self.bytes)) };
        }
    }
}

thread_local! {
    static WORKSPACE: RefCell<Block> = const { RefCell::new(Block::EMPTY) };
}

/// Calls `work` with `length` elements of this thread's workspace (contents arbitrary).
///
/// A call from within `work` on the same thread (rayon may steal) gets memory of its own.
pub(crate) fn with_workspace<T: Element, R>(length: usize, work: impl FnOnce(*mut T) -> R) -> R {
    let bytes = length * size_of::<T>();
    let mut block = WORKSPACE.with(|slot| std::mem::replace(&mut *slot.borrow_mut(), Block::EMPTY));
    if block.bytes < bytes {
        block = Block::new(bytes);
    }
    let result = work(block.start.cast());
    WORKSPACE.with(|slot| {
        let mut slot = slot.borrow_mut();
        if slot.bytes < block.bytes {
            *slot = block;
        }
    });
    result
}

static POOL: Mutex<Vec<Block>> = Mutex::new(Vec::new());

/// Memory of one forward pass that its backward pass reads; goes back to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Kept {
    block: Block,
}

impl Kept {
    pub(crate) fn new<T: Element>(length: usize) -> Self {
        let bytes = length * size_of::<T>();
        let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The smallest that is large enough and not wastefully larger.
        let best = pool
            .iter()
            .enumerate()
            .filter(|(_, block)| block.bytes >= bytes && block.bytes / 2 <= bytes.max(4096))
            .min_by_key(|(_, block)| block.bytes)
            .map(|(at, _)| at);
        let block = match best {
            Some(at) => pool.swap_remove(at),
            None => {
                drop(pool);
                Block::new(bytes)
            }
        };
        Self { block }
    }

    pub(crate) fn pointer<T: Element>(&self) -> *mut T {
        self.block.start.cast()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let block = std::mem::replace(&mut self.block, Block::EMPTY);
        let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if pool.len() == POOLED {
            pool.remove(0);
        }
        pool.push(block);
    }
}
