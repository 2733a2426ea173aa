//! File trees in and out. Each copy is a thread that may wait for a file system, at one end of a pipe whose other
//! end the event loop pumps.
//!
//! The workload may run meanwhile and rearrange what is copied: `chitin-tree` follows no link and never looks a
//! path up twice. In a microVM the thread's root is the agent's view of the root file system ([`crate::root_fs`]), in
//! which nothing is mounted: a path cannot lead into `/proc` even if a check here were wrong.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use chitin_protocol::{Failure, StreamId};
use chitin_tree::{ReceiveOptions, SendOptions};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use crate::{Context, SystemError, failure};

/// Copies at once. Each holds a descriptor for each level of its tree, at most 128, and a thread with its buffers.
const MAX_COPIES: usize = 8;

/// The tree walkers keep their levels on the heap; the C library's own default is half of this.
const STACK: usize = 256 * 1024;

/// Who owns what is copied in: the image's `agent`, user and group.
const WORKLOAD: (u32, u32) = (1000, 1000);

/// What is the workload's own: directories made on the way are too, below it.
const HOME: &str = "/work";

/// The kernel's file systems, whose files are no data.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the host.
    In,
    /// To the host.
    Out,
}

type Outcome = Result<(), Failure>;

struct Copy {
    direction: Direction,
    stream: StreamId,
    outcome: Option<Outcome>,
}

/// What a thread shares with the loop.
struct Shared {
    finished: Mutex<Vec<(u32, Outcome)>>,
    /// An eventfd: something is in `finished`.
    wake: OwnedFd,
    /// The root for copies; none: the one that everybody sees.
    root: Option<OwnedFd>,
}

/// All copies that have not been answered yet.
pub struct Copies {
    shared: Arc<Shared>,
    running: BTreeMap<u32, Copy>,
}

/// A copy that has come to its end.
pub struct Finished {
    pub request: u32,
    pub direction: Direction,
    pub stream: StreamId,
    pub outcome: Outcome,
}

impl Copies {
    pub fn new(root: Option<OwnedFd>) -> Result<Copies, SystemError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context("open", "an eventfd")?;
        let shared = Shared { finished: Mutex::default(), wake, root };
        Ok(Copies { shared: Arc::new(shared), running: BTreeMap::new() })
    }

    /// Readable when a copy has finished.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Whether a copy of this name is running.
    pub fn contains(&self, request: u32) -> bool {
        self.running.contains_key(&request)
    }

    /// Whether any is running.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Starts one. The tree goes through `pipe`.
    pub fn start(
        &mut self,
        request: u32,
        direction: Direction,
        path: &[u8],
        stream: StreamId,
        pipe: OwnedFd,
    ) -> Result<(), Failure> {
        let path = checked(path)?;
        let fail = |operation, errno| failure(operation, path.as_os_str().as_bytes(), errno);
        if self.running.len() >= MAX_COPIES {
            return Err(fail("copy, beside 8 other copies,", Errno::AGAIN));
        }
        let shared = Arc::clone(&self.shared);
        let job = path.clone();
        let run = move || {
            let pipe = File::from(pipe);
            let outcome = shared.enter_root().and_then(|()| match direction {
                Direction::In => receive(&pipe, &job),
                Direction::Out => send(&pipe, &job),
            });
            shared.finished.lock().unwrap_or_else(PoisonError::into_inner).push((request, outcome));
            // Fails only if the counter is full, and then the loop is awake.
            let _ = rustix::io::write(&shared.wake, &1_u64.to_ne_bytes());
            // Only now, so that who sees the pipe close finds the outcome.
            drop(pipe);
        };
        std::thread::Builder::new().stack_size(STACK).spawn(run).map_err(|error| {
            fail("start a thread to copy", Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        })?;
        self.running.insert(request, Copy { direction, stream, outcome: None });
        Ok(())
    }

    /// Copies that are over. One to the host is so only when its stream is, which `is_open` tells.
    pub fn take_finished(&mut self, is_open: impl Fn(StreamId) -> bool) -> Vec<Finished> {
        for (request, outcome) in
            self.shared.finished.lock().unwrap_or_else(PoisonError::into_inner).drain(..)
        {
            if let Some(copy) = self.running.get_mut(&request) {
                copy.outcome = Some(outcome);
            }
        }
        let over = |copy: &Copy| {
            copy.outcome.is_some() && (copy.direction == Direction::In || !is_open(copy.stream))
        };
        let requests: Vec<u32> = self
            .running
            .iter()
            .filter(|(_, copy)| over(copy))
            .map(|(request, _)| *request)
            .collect();
        let finished = |request| {
            let Copy { direction, stream, outcome } = self.running.remove(&request)?;
            Some(Finished { request, direction, stream, outcome: outcome? })
        };
        requests.into_iter().filter_map(finished).collect()
    }

    /// Takes the wake-up back, so that it does not repeat itself.
    pub fn woken(&self) {
        let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
    }
}

impl Shared {
    /// Gives the calling thread a root of its own.
    fn enter_root(&self) -> Outcome {
        let Some(root) = &self.root else { return Ok(()) };
        let enter = || {
            // SAFETY: root and working directory stop being shared with other threads, none of which changes them.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            rustix::process::fchdir(root)?;
            rustix::process::chroot(".")
        };
        enter().map_err(|errno| failure("enter the root file system", b"", errno))
    }
}

fn receive(pipe: &File, path: &Path) -> Outcome {
    // An agent that is not root cannot give anything away.
    let owner = rustix::process::geteuid().is_root().then_some(WORKLOAD);
    let info = rustix::system::sysinfo();
    // Files are memory here. The tmpfs has a stricter limit; this one spares the wait for holes that cannot be.
    let max_bytes = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    let options = ReceiveOptions { owner, ..ReceiveOptions::agent(WORKLOAD, max_bytes) };
    if let Some(parent) = path.parent() {
        let owner = owner.filter(|_| path.starts_with(HOME));
        chitin_tree::create_dirs(parent, 0o755, owner).map_err(|error| told(&error))?;
    }
    chitin_tree::receive(pipe, path, &options).map(drop).map_err(|error| told(&error))
}

fn send(pipe: &File, path: &Path) -> Outcome {
    chitin_tree::send(path, pipe, &SendOptions::agent()).map(drop).map_err(|error| told(&error))
}

fn told(error: &chitin_tree::Error) -> Failure {
    failure(&error.to_string(), b"", Errno::from_raw_os_error(error.errno()))
}

/// A path that a copy may have, without a slash at its end. `chitin-tree` refuses links in it.
fn checked(path: &[u8]) -> Result<PathBuf, Failure> {
    let plain = Path::new(OsStr::from_bytes(path));
    let components = plain.components().all(|component| match component {
        Component::RootDir | Component::Normal(_) => true,
        Component::CurDir | Component::ParentDir | Component::Prefix(_) => false,
    });
    if !components || !plain.is_absolute() || path.contains(&0) {
        return Err(failure(
            "copy, not being an absolute path without . and ..,",
            path,
            Errno::INVAL,
        ));
    }
    if KERNEL.iter().any(|kernel| plain.starts_with(kernel)) {
        return Err(failure("copy, being the kernel's,", path, Errno::PERM));
    }
    Ok(plain.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_plain_and_not_the_kernels() {
        for good in ["/", "/work", "/work/a b", "/process", "/work/..a", "/work//a/"] {
            assert!(checked(good.as_bytes()).is_ok(), "{good}");
        }
        for bad in [
            "",
            "work",
            "./a",
            "/work/../etc",
            "/..",
            "/work/a\0b",
            "/proc",
            "/proc/self/mem",
            "//dev/x",
            "/sys/",
        ] {
            assert!(checked(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
