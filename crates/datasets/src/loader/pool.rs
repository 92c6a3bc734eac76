//! Threads that prepare images ahead of the caller and hand them over in order, batch by batch.
//!
//! Workers take one image at a time, so that a batch is ready as soon as its images are, however
//! many workers there are. No more than a window of batches is in the making: a slow caller stops
//! the workers, and memory is bounded. Whatever goes wrong with an image reaches the caller in the
//! place of its batch; nothing waits for something that will not come.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::{Error, Result};

/// What the workers do: the images of a set, one by one.
pub(crate) trait Prepare: Send + Sync + 'static {
    /// What one worker keeps between images.
    type Scratch: Default;
    /// A prepared image.
    type Image: Send + 'static;

    /// Prepares the image at `position` of the epoch.
    fn prepare(&self, position: usize, scratch: &mut Self::Scratch) -> Result<Self::Image>;

    /// What the image is called in messages.
    fn name(&self, position: usize) -> String;
}

/// Prepares an image; a panic becomes an error that names it.
pub(crate) fn prepare<P: Prepare>(
    task: &P,
    position: usize,
    scratch: &mut P::Scratch,
) -> Result<P::Image> {
    let outcome = catch_unwind(AssertUnwindSafe(|| task.prepare(position, scratch)));
    outcome.unwrap_or_else(|payload| {
        // Whatever state the panic left behind is not used again.
        *scratch = P::Scratch::default();
        Err(Error::Worker {
            name: task.name(position),
            problem: panic_text(payload.as_ref()),
        })
    })
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}

/// Images of the batches `first..last` of an epoch, prepared by threads of its own.
pub(crate) struct Pool<P: Prepare> {
    shared: Arc<Shared<P>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<P: Prepare> {
    task: P,
    state: Mutex<State<P::Image>>,
    /// There is something to take, or all is over.
    more: Condvar,
    /// A batch is complete, or a worker has ended.
    ready: Condvar,
}

struct State<I> {
    /// Next position to take.
    next: usize,
    /// Positions below this may be taken.
    allowed: usize,
    /// End of the last batch.
    end: usize,
    /// Position at which the first of `batches` begins.
    start: usize,
    batch: usize,
    batches: VecDeque<Making<I>>,
    workers: usize,
    stop: bool,
}

/// A batch in the making.
struct Making<I> {
    images: Vec<Option<Result<I>>>,
    left: usize,
}

impl<P: Prepare> Pool<P> {
    /// Starts `workers` threads on positions `start..end`, in batches of `batch`, the last of which
    /// may be smaller; `window` batches at most are in the making or waiting.
    ///
    /// # Errors
    /// [`Error::Config`] where the system gives no thread at all; fewer than asked for will do.
    pub(crate) fn start(
        task: P,
        (start, end): (usize, usize),
        batch: usize,
        workers: usize,
        window: usize,
    ) -> Result<Self> {
        let mut state = State {
            next: start,
            allowed: start,
            end,
            start,
            batch,
            batches: VecDeque::new(),
            workers: 0,
            stop: false,
        };
        for _ in 0..window.max(1) {
            state.allow_a_batch();
        }
        let shared = Arc::new(Shared {
            task,
            state: Mutex::new(state),
            more: Condvar::new(),
            ready: Condvar::new(),
        });
        let mut threads = Vec::with_capacity(workers);
        for i in 0..workers.max(1) {
            let worker = Arc::clone(&shared);
            shared.lock().workers += 1;
            let spawned = std::thread::Builder::new()
                .name(format!("loader-{i}"))
                .spawn(move || worker.work());
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    shared.lock().workers -= 1;
                    if threads.is_empty() {
                        let problem = format!("no thread for the loader: {error}");
                        return Err(Error::Config(problem));
                    }
                    tracing::warn!(%error, "the loader has {i} workers instead of {workers}");
                    break;
                }
            }
        }
        Ok(Self { shared, threads })
    }

    /// The images of the next batch in order, or nothing after the last. After an error that ended
    /// all workers there is nothing either.
    pub(crate) fn next(&mut self) -> Option<Vec<Result<P::Image>>> {
        let mut state = self.shared.lock();
        loop {
            let first = state.batches.front()?;
            if first.left == 0 {
                break;
            }
            if state.workers == 0 {
                // They end only when all is done or after a panic outside of `prepare`.
                state.batches.clear();
                let lost = Error::Lost(self.shared.task.name(state.start));
                return Some(vec![Err(lost)]);
            }
            state = self
                .shared
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let done = state.batches.pop_front()?;
        state.start += done.images.len();
        state.allow_a_batch();
        drop(state);
        self.shared.more.notify_all();
        Some(done.images.into_iter().flatten().collect())
    }
}

impl<I> State<I> {
    fn allow_a_batch(&mut self) {
        let size = self.batch.min(self.end - self.allowed);
        if size > 0 {
            self.allowed += size;
            self.batches.push_back(Making {
                images: (0..size).map(|_| None).collect(),
                left: size,
            });
        }
    }
}

impl<P: Prepare> Shared<P> {
    /// A thread that panicked while it held the lock has left no half-made state: every change is one
    /// assignment after the other that cannot panic in between.
    fn lock(&self) -> MutexGuard<'_, State<P::Image>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let _leaving = Leaving(self);
        let mut scratch = P::Scratch::default();
        while let Some(position) = self.take() {
            let image = prepare(&self.task, position, &mut scratch);
            let mut state = self.lock();
            let offset = position - state.start;
            let (of, at) = (offset / state.batch, offset % state.batch);
            if let Some(batch) = state.batches.get_mut(of)
                && let Some(place) = batch.images.get_mut(at)
            {
                *place = Some(image);
                batch.left -= 1;
                if batch.left == 0 && of == 0 {
                    self.ready.notify_one();
                }
            }
        }
    }

    fn take(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.stop || state.next == state.end {
                return None;
            }
            if state.next < state.allowed {
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self
                .more
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Tells the caller that a worker is gone, however it went.
struct Leaving<'a, P: Prepare>(&'a Shared<P>);

impl<P: Prepare> Drop for Leaving<'_, P> {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.ready.notify_one();
    }
}

impl<P: Prepare> Drop for Pool<P> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // Its panic, if any, has been told through its place in the batch.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    /// Hands over positions, late or not at all.
    #[derive(Default)]
    struct Numbers {
        made: Arc<AtomicUsize>,
        panics_at: Option<usize>,
        fails_at: Option<usize>,
    }

    impl Prepare for Numbers {
        type Scratch = usize;
        type Image = usize;

        fn prepare(&self, position: usize, scratch: &mut usize) -> Result<usize> {
            // The first of a few takes longest, so that they end in another order.
            std::thread::sleep(Duration::from_micros(200 * (7 - position as u64 % 7)));
            *scratch += 1;
            self.made.fetch_add(1, Ordering::SeqCst);
            assert_ne!(Some(position), self.panics_at, "on purpose");
            match Some(position) == self.fails_at {
                true => Err(Error::Config(format!("broken {position}"))),
                false => Ok(position),
            }
        }

        fn name(&self, position: usize) -> String {
            format!("image {position}")
        }
    }

    fn batches(pool: &mut Pool<Numbers>) -> Vec<Vec<usize>> {
        std::iter::from_fn(|| pool.next())
            .map(|batch| batch.into_iter().map(|image| image.unwrap()).collect())
            .collect()
    }

    #[test]
    fn in_order_whatever_the_number_of_workers() {
        for workers in [1, 2, 3, 8] {
            for window in [1, 2, 5] {
                let mut pool =
                    Pool::start(Numbers::default(), (3, 25), 4, workers, window).unwrap();
                let found = batches(&mut pool);
                assert_eq!(found.len(), 6);
                assert_eq!(found.concat(), (3..25).collect::<Vec<_>>());
                assert_eq!(found[5], [23, 24]);
                assert!(pool.next().is_none());
            }
        }
    }

    #[test]
    fn no_more_than_the_window_is_made() {
        let task = Numbers::default();
        let made = Arc::clone(&task.made);
        let mut pool = Pool::start(task, (0, 1000), 5, 4, 2).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(made.load(Ordering::SeqCst), 10);
        pool.next().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(made.load(Ordering::SeqCst), 15);
        // Dropping it early ends the threads.
        drop(pool);
        assert_eq!(made.load(Ordering::SeqCst), 15);
    }

    #[test]
    fn errors_and_panics_come_in_their_place() {
        let task = Numbers {
            panics_at: Some(6),
            fails_at: Some(3),
            ..Numbers::default()
        };
        let mut pool = Pool::start(task, (0, 8), 4, 3, 2).unwrap();
        let first = pool.next().unwrap();
        assert!(first[..3].iter().all(Result::is_ok));
        assert_eq!(
            first[3].as_ref().unwrap_err().to_string(),
            "data settings: broken 3"
        );
        let second = pool.next().unwrap();
        let text = second[2].as_ref().unwrap_err().to_string();
        assert!(
            text.contains("image 6") && text.contains("on purpose"),
            "{text}"
        );
        assert!(pool.next().is_none());
    }

    /// A scratch that cannot be made: the worker itself dies.
    struct Doomed;
    struct Bomb;
    impl Default for Bomb {
        fn default() -> Self {
            panic!("no scratch")
        }
    }
    impl Prepare for Doomed {
        type Scratch = Bomb;
        type Image = ();
        fn prepare(&self, _: usize, _: &mut Bomb) -> Result<()> {
            Ok(())
        }
        fn name(&self, position: usize) -> String {
            format!("image {position}")
        }
    }

    #[test]
    fn dead_workers_are_an_error_and_not_a_wait_without_end() {
        let mut pool = Pool::start(Doomed, (0, 8), 4, 3, 2).unwrap();
        let batch = pool.next().unwrap();
        let text = batch[0].as_ref().unwrap_err().to_string();
        assert!(text.contains("have ended"), "{text}");
        assert!(pool.next().is_none());
    }
}
