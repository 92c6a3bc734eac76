//! Launches that are recorded once and replayed.

use super::call;
use crate::Result;
use candle_core::CudaDevice;
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use std::sync::{Mutex, PoisonError};

/// Launches of a device's stream, with their arguments.
pub struct Recording(Mutex<CudaGraph>);

// SAFETY: a graph may be used by any thread, by one at a time: it is behind a lock.
unsafe impl Send for Recording {}
// SAFETY: as above.
unsafe impl Sync for Recording {}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recording")
    }
}

/// Records what `work` launches, without running it: it must not wait for the device, nor allocate, nor
/// load a kernel for the first time.
///
/// # Safety
/// The memory that it works on lives as long as the recording.
///
/// # Errors
/// Those of `work`; [`crate::Error::Call`] for work that cannot be recorded.
pub unsafe fn record(
    op: &'static str,
    device: &CudaDevice,
    work: impl FnOnce() -> candle_core::Result<()>,
) -> candle_core::Result<Recording> {
    let stream = device.cuda_stream();
    // Only this thread is bound by what a recording forbids.
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    call(op, stream.begin_capture(mode))?;
    let worked = work();
    // Ended in any case, or the stream would go on recording.
    let ended = stream.end_capture(CUgraphInstantiate_flags(0));
    worked?;
    match call(op, ended)? {
        Some(graph) => Ok(Recording(Mutex::new(graph))),
        None => candle_core::bail!("{op}: nothing was recorded"),
    }
}

impl Recording {
    /// Runs it on the stream that it was recorded on.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn replay(&self, op: &'static str) -> Result<()> {
        let graph = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        call(op, graph.launch())?;
        super::launch::count_launch();
        Ok(())
    }
}
