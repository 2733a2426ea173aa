//! Observes that the kernel runs out of memory in a container's cgroup, until after the cgroup is
//! gone.
//!
//! gVisor's kernel is in that cgroup and dies with it, and its runtime removes the counters before
//! the end of the container can be noticed.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::counters::read_counter;
use super::engine::container_cgroups;

/// Time within which the kernel reports that a cgroup is gone.
const REMOVAL_LIMIT: Duration = Duration::from_millis(500);

/// A watch on one container.
#[derive(Debug)]
pub(crate) struct OomWatch {
    observed: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl OomWatch {
    /// Starts to watch a container that runs. Returns `None` if its cgroup cannot be watched. Must
    /// be called within a tokio runtime.
    pub fn start(container: &str) -> Option<OomWatch> {
        let cgroup = container_cgroups(container).find(|cgroup| has_memory_files(cgroup))?;
        let observed = Arc::new(AtomicBool::new(false));
        let task = if cgroup.join("memory.events").exists() {
            let events = cgroup.join("memory.events");
            let inotify = register_fd(watch_file(&events)?)?;
            tokio::spawn(watch_events(inotify, events, observed.clone()))
        } else {
            let eventfd = register_fd(register_eventfd(&cgroup)?)?;
            tokio::spawn(watch_notifications(eventfd, cgroup, observed.clone()))
        };
        Some(OomWatch { observed, task })
    }

    /// Returns true if the kernel ran out of memory. Called once the container has ended.
    pub async fn has_observed(&mut self) -> bool {
        if !self.observed.load(Ordering::Acquire) {
            // The last notification may be on its way.
            let _ = tokio::time::timeout(REMOVAL_LIMIT, &mut self.task).await;
        }
        self.observed.load(Ordering::Acquire)
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn has_memory_files(cgroup: &Path) -> bool {
    ["memory.events", "memory.oom_control"].iter().any(|file| cgroup.join(file).exists())
}

#[expect(
    deprecated,
    reason = "the successor is unsafe, as a descriptor may change, which this type's cannot"
)]
fn register_fd(fd: OwnedFd) -> Option<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE).ok()
}

/// Watches `memory.events` of cgroup version 2.
fn watch_file(events: &Path) -> Option<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let inotify = inotify::init(flags).ok()?;
    let changes = inotify::WatchFlags::MODIFY | inotify::WatchFlags::DELETE_SELF;
    inotify::add_watch(&inotify, events, changes).ok()?;
    Some(inotify)
}

async fn watch_events(inotify: AsyncFd<OwnedFd>, events: PathBuf, observed: Arc<AtomicBool>) {
    let mut changes = [0; 1024];
    while let Ok(mut ready) = inotify.readable().await {
        let read = ready.try_io(|inotify| Ok(rustix::io::read(inotify, &mut changes)?));
        if let Ok(Err(_)) = read {
            return;
        }
        if read_counter(&events, "oom_kill") > 0 {
            observed.store(true, Ordering::Release);
        }
        if observed.load(Ordering::Acquire) || !events.exists() {
            return;
        }
    }
}

/// Registers an eventfd for `memory.oom_control` of cgroup version 1 (`memcg_test.rst` of Linux).
fn register_eventfd(cgroup: &Path) -> Option<OwnedFd> {
    let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
    let control = File::open(cgroup.join("memory.oom_control")).ok()?;
    let line = format!("{} {}", eventfd.as_raw_fd(), control.as_raw_fd());
    fs::write(cgroup.join("cgroup.event_control"), line).ok()?;
    Some(eventfd)
}

/// The kernel adds 1 for each time that it runs out of memory, and 1 after the cgroup is gone: two
/// notifications, or one while the cgroup exists, are about memory.
async fn watch_notifications(
    eventfd: AsyncFd<OwnedFd>,
    cgroup: PathBuf,
    observed: Arc<AtomicBool>,
) {
    let mut total = 0u64;
    while let Ok(mut ready) = eventfd.readable().await {
        let mut count = [0; 8];
        match ready.try_io(|eventfd| Ok(rustix::io::read(eventfd, &mut count)?)) {
            Ok(Ok(8)) => total = total.saturating_add(u64::from_ne_bytes(count)),
            Ok(_) => return,
            Err(_) => continue,
        }
        if total > 1 || cgroup.exists() {
            observed.store(true, Ordering::Release);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes to an eventfd as the kernel does, and returns whether that counts as an observation.
    async fn observe(notifications: &[u64], cgroup_exists: bool) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("cgroup");
        if cgroup_exists {
            fs::create_dir(&cgroup).unwrap();
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfd = rustix::event::eventfd(0, flags).unwrap();
        for count in notifications {
            rustix::io::write(&eventfd, &count.to_ne_bytes()).unwrap();
        }
        let observed = Arc::new(AtomicBool::new(false));
        let eventfd = register_fd(eventfd).unwrap();
        let task = tokio::spawn(watch_notifications(eventfd, cgroup, observed.clone()));
        OomWatch { observed, task }.has_observed().await
    }

    #[tokio::test]
    async fn removal_of_the_cgroup_is_not_out_of_memory() {
        assert!(!observe(&[1], false).await);
        assert!(!observe(&[], true).await);
        assert!(observe(&[1], true).await);
        assert!(observe(&[1, 1], false).await);
        assert!(observe(&[2], false).await);
    }

    #[tokio::test]
    async fn kill_counted_in_events_is_observed() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("memory.events");
        fs::write(&events, "max 1\noom_kill 0\n").unwrap();
        let inotify = register_fd(watch_file(&events).unwrap()).unwrap();
        let observed = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(watch_events(inotify, events.clone(), observed.clone()));
        let mut watch = OomWatch { observed, task };
        fs::write(&events, "max 9\noom_kill 1\n").unwrap();
        assert!(watch.has_observed().await);
    }

    #[test]
    fn missing_container_cannot_be_watched() {
        assert!(OomWatch::start("chitin-no-such-container").is_none());
    }
}
