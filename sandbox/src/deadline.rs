//! Time limits that hold whatever the async runtime does.
//!
//! A guest decides how much work its channel makes, and code of the embedding program may block a
//! worker of the runtime. A timer of that runtime fires late then, or never. One thread of the
//! process watches all deadlines instead, and does nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Instant;

/// An object with a time limit.
pub(crate) trait Expire: Send + Sync {
    /// Ends what the object stands for. Runs on the watching thread, and must not block.
    fn expire(&self);
}

/// Deadlines, the earliest first. The number distinguishes equal ones.
type Watched = BTreeMap<(Instant, u64), Weak<dyn Expire>>;

#[derive(Default)]
struct Watcher {
    state: Mutex<State>,
    /// The earliest deadline has changed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    watched: Watched,
    last_number: u64,
    has_thread: bool,
}

/// A deadline that is watched. Dropping it cancels the deadline.
pub(crate) struct DeadlineGuard {
    key: (Instant, u64),
}

impl fmt::Debug for DeadlineGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadlineGuard").finish_non_exhaustive()
    }
}

impl Drop for DeadlineGuard {
    fn drop(&mut self) {
        // The thread wakes up for it at most once more, and finds nothing.
        watcher().lock().watched.remove(&self.key);
    }
}

/// Expires `object` at this time, if it still exists.
///
/// If no thread can be started, the deadline is watched by the next call that succeeds to start
/// one: a host without a free thread does not start guests either.
pub(crate) fn watch(at: Instant, object: &Arc<dyn Expire>) -> DeadlineGuard {
    let watcher = watcher();
    let mut state = watcher.lock();
    state.last_number += 1;
    let key = (at, state.last_number);
    state.watched.insert(key, Arc::downgrade(object));
    if !state.has_thread {
        let thread = thread::Builder::new().name("chitin-deadline".into());
        state.has_thread = thread.spawn(run_watcher).is_ok();
    }
    drop(state);
    watcher.changed.notify_one();
    DeadlineGuard { key }
}

fn watcher() -> &'static Watcher {
    static WATCHER: OnceLock<Watcher> = OnceLock::new();
    WATCHER.get_or_init(Watcher::default)
}

impl Watcher {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for deadlines until the process ends.
fn run_watcher() {
    let watcher = watcher();
    let mut state = watcher.lock();
    loop {
        let now = Instant::now();
        let earliest = state.watched.first_key_value().map(|((at, _), _)| *at);
        state = match earliest {
            None => watcher.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(at) if at > now => {
                let waited = watcher.changed.wait_timeout(state, at - now);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            Some(_) => {
                let expired = state.watched.pop_first();
                // An object may cancel other deadlines while it expires.
                drop(state);
                if let Some(object) = expired.and_then(|(_, object)| object.upgrade()) {
                    object.expire();
                }
                watcher.lock()
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    struct Report(mpsc::Sender<Instant>);

    impl Expire for Report {
        fn expire(&self) {
            let _ = self.0.send(Instant::now());
        }
    }

    fn object() -> (Arc<dyn Expire>, mpsc::Receiver<Instant>) {
        let (sender, receiver) = mpsc::channel();
        (Arc::new(Report(sender)), receiver)
    }

    #[test]
    fn deadlines_expire_in_order_of_time() {
        let start = Instant::now();
        let (late, late_reports) = object();
        let (early, early_reports) = object();
        let _late = watch(start + Duration::from_millis(120), &late);
        let _early = watch(start + Duration::from_millis(40), &early);
        let limit = Duration::from_secs(10);
        let first = early_reports.recv_timeout(limit).unwrap();
        let second = late_reports.recv_timeout(limit).unwrap();
        assert!(first >= start + Duration::from_millis(40) && first < second);
        assert!(second >= start + Duration::from_millis(120));
    }

    #[test]
    fn cancelled_and_dropped_objects_do_not_expire() {
        let at = Instant::now() + Duration::from_millis(50);
        let (cancelled, cancelled_reports) = object();
        drop(watch(at, &cancelled));
        let (dropped, dropped_reports) = object();
        let _guard = watch(at, &dropped);
        drop(dropped);
        let (last, last_reports) = object();
        let _last = watch(at + Duration::from_millis(50), &last);
        last_reports.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(cancelled_reports.try_recv().is_err() && dropped_reports.try_recv().is_err());
    }
}
