//! Streams, events, capture and graphs.
//!
//! Work is done when it is submitted, on the calling thread, so that a stream has nothing
//! to wait for. A stream that captures records the work instead.

use crate::device::{self, *};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Instant;

/// A piece of work: it can be done again and again, and returns a driver error code.
pub type Work = Arc<dyn Fn() -> i32 + Send + Sync>;

#[derive(Default)]
pub struct Graph {
    pub work: Vec<Work>,
    /// Allocations that were freed during the capture: the work still uses them.
    pub memory: Vec<u64>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        for &m in &self.memory {
            crate::memory::free(m, crate::memory::is_device);
        }
    }
}

pub struct Capture {
    origin: Key,
    thread: ThreadId,
    mode: i32,
    id: u64,
    graph: Mutex<Graph>,
    invalid: std::sync::atomic::AtomicBool,
}

/// The per-thread default stream is another one in each thread.
type Key = (usize, Option<ThreadId>);

pub const LEGACY: usize = 1;
pub const PER_THREAD: usize = 2;

fn key(stream: usize) -> Key {
    match stream {
        0 | LEGACY => (LEGACY, None),
        PER_THREAD => (PER_THREAD, Some(std::thread::current().id())),
        _ => (stream, None),
    }
}

static CAPTURES: Mutex<Option<HashMap<Key, Arc<Capture>>>> = Mutex::new(None);
/// The number of capturing streams, so that nobody else has to take the lock.
static CAPTURING: AtomicUsize = AtomicUsize::new(0);

fn captures<R>(f: impl FnOnce(&mut HashMap<Key, Arc<Capture>>) -> R) -> R {
    let mut guard = CAPTURES.lock().unwrap_or_else(|e| e.into_inner());
    let map = guard.get_or_insert_default();
    let r = f(map);
    CAPTURING.store(map.len(), Ordering::Release);
    r
}

pub fn capture_of(stream: usize) -> Option<Arc<Capture>> {
    if CAPTURING.load(Ordering::Acquire) == 0 {
        return None;
    }
    captures(|map| map.get(&key(stream)).cloned())
}

impl Capture {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn is_valid(&self) -> bool {
        !self.invalid.load(Ordering::Relaxed)
    }

    fn invalidate(&self) {
        self.invalid.store(true, Ordering::Relaxed);
    }

    pub fn keep(&self, memory: u64) {
        self.graph.lock().unwrap().memory.push(memory);
    }
}

/// Does work in a stream, or records it if the stream captures.
pub fn submit(stream: usize, work: impl Fn() -> i32 + Send + Sync + 'static) -> i32 {
    if broken() != SUCCESS {
        return broken();
    }
    match capture_of(stream) {
        None => note(work()),
        Some(c) if !c.is_valid() => CAPTURE_INVALIDATED,
        Some(c) => {
            c.graph.lock().unwrap().work.push(Arc::new(work));
            SUCCESS
        }
    }
}

/// For calls that wait: an error if the stream captures, which ends that capture's use.
pub fn forbid(stream: usize) -> i32 {
    if broken() != SUCCESS {
        return broken();
    }
    if let Some(c) = capture_of(stream) {
        c.invalidate();
        return CAPTURE_UNSUPPORTED;
    }
    SUCCESS
}

/// For calls that are unsafe while any stream captures in a strict mode.
pub fn forbid_unsafe() -> i32 {
    if broken() != SUCCESS {
        return broken();
    }
    if CAPTURING.load(Ordering::Acquire) == 0 {
        return SUCCESS;
    }
    let me = std::thread::current().id();
    captures(|map| {
        let strict = |c: &&Arc<Capture>| c.mode == 0 || c.mode == 1 && c.thread == me;
        match map.values().find(strict) {
            Some(c) => {
                c.invalidate();
                CAPTURE_UNSUPPORTED
            }
            None => SUCCESS,
        }
    })
}

pub fn begin_capture(stream: usize, mode: i32) -> i32 {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let origin = key(stream);
    if origin.0 == LEGACY {
        return CAPTURE_UNSUPPORTED;
    }
    captures(|map| {
        if map.contains_key(&origin) {
            return INVALID_VALUE;
        }
        let capture = Capture {
            origin,
            thread: std::thread::current().id(),
            mode,
            id: NEXT.fetch_add(1, Ordering::Relaxed) as u64,
            graph: Mutex::default(),
            invalid: Default::default(),
        };
        map.insert(origin, Arc::new(capture));
        SUCCESS
    })
}

pub fn end_capture(stream: usize) -> Result<Graph, i32> {
    let c = captures(|map| {
        let c = map.get(&key(stream)).cloned().ok_or(INVALID_VALUE)?;
        if c.origin != key(stream) {
            return Err(CAPTURE_UNMATCHED);
        }
        map.retain(|_, o| !Arc::ptr_eq(o, &c));
        Ok(c)
    })?;
    if !c.is_valid() {
        return Err(CAPTURE_INVALIDATED);
    }
    let mut graph = c.graph.lock().unwrap();
    Ok(std::mem::take(&mut graph))
}

pub fn run_graph(graph: &Graph) -> i32 {
    graph
        .work
        .iter()
        .map(|w| w())
        .find(|&e| e != SUCCESS)
        .unwrap_or(SUCCESS)
}

pub struct Event {
    timing: bool,
    state: Mutex<(Option<Instant>, Option<Arc<Capture>>)>,
}

impl Event {
    pub fn new(timing: bool) -> Event {
        Event {
            timing,
            state: Mutex::default(),
        }
    }

    pub fn record(&self, stream: usize) -> i32 {
        if broken() != SUCCESS {
            return broken();
        }
        let capture = capture_of(stream);
        let now = capture.is_none().then(Instant::now);
        *self.state.lock().unwrap() = (now, capture);
        SUCCESS
    }

    fn capture(&self) -> Option<Arc<Capture>> {
        let state = self.state.lock().unwrap();
        let c = state.1.clone()?;
        // A capture that has ended no longer holds its events.
        let live = captures(|map| map.values().any(|o| Arc::ptr_eq(o, &c)));
        live.then_some(c)
    }

    pub fn wait(&self) -> i32 {
        if self.capture().is_some() {
            CAPTURED_EVENT
        } else {
            device::broken()
        }
    }

    /// Makes a stream wait: it joins the capture in which the event was recorded.
    pub fn join(&self, stream: usize) -> i32 {
        if broken() != SUCCESS {
            return broken();
        }
        let (mine, theirs) = (capture_of(stream), self.capture());
        match (mine, theirs) {
            (None, None) => SUCCESS,
            (None, Some(c)) => {
                captures(|map| map.insert(key(stream), c));
                SUCCESS
            }
            (Some(m), Some(t)) if Arc::ptr_eq(&m, &t) => SUCCESS,
            (Some(_), None) if self.state.lock().unwrap().0.is_none() => SUCCESS,
            (Some(m), _) => {
                m.invalidate();
                CAPTURE_ISOLATION
            }
        }
    }

    pub fn elapsed(&self, end: &Event) -> Result<f32, i32> {
        if !self.timing || !end.timing {
            return Err(INVALID_HANDLE);
        }
        let start = self.state.lock().unwrap().0.ok_or(INVALID_HANDLE)?;
        let end = end.state.lock().unwrap().0.ok_or(INVALID_HANDLE)?;
        let ms = |d: std::time::Duration| d.as_secs_f32() * 1e3;
        Ok(match end.checked_duration_since(start) {
            Some(d) => ms(d),
            None => -ms(start - end),
        })
    }
}
