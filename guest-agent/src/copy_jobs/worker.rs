//! The threads of copies.
//!
//! The workload may run in the meantime and rearrange the files that are copied: `chitin-tree`
//! follows no link and never looks up a path twice. In a microVM the thread's root is the agent's
//! view of the root file system ([`crate::root_fs`]), in which nothing is mounted: a path could not
//! lead into `/proc` even if a check here were wrong.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use chitin_protocol::Failure;
use chitin_tree::{ReceiveOptions, SendOptions};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::CopyDirection;
use crate::error::{Context, SystemError, make_failure};

/// The stack size of a thread. The tree walkers keep their levels on the heap; the C library's own
/// default is half of this.
const STACK_LEN: usize = 256 * 1024;

/// The owner of files that are copied in: user and group `agent` of the image.
const WORKLOAD: (u32, u32) = (1000, 1000);

/// The directory that belongs to the workload. So do directories that are made below it for a copy.
const HOME: &str = "/work";

/// The kernel's file systems, whose files are not data.
const KERNEL_FILE_SYSTEMS: [&str; 3] = ["/proc", "/sys", "/dev"];

pub type Outcome = Result<(), Failure>;

/// State that the threads share with the event loop.
pub struct Workers {
    /// Outcomes that the event loop has not taken yet, by request id.
    outcomes: Mutex<Vec<(u32, Outcome)>>,
    /// An eventfd that is readable while there are outcomes.
    wake: OwnedFd,
    /// The root of the threads, if it is not the one of the workload.
    root: Option<OwnedFd>,
}

impl Workers {
    pub fn new(root: Option<OwnedFd>) -> Result<Workers, SystemError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context("open", "an eventfd")?;
        Ok(Workers { outcomes: Mutex::default(), wake, root })
    }

    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
    }

    pub fn take_outcomes(&self) -> Vec<(u32, Outcome)> {
        std::mem::take(&mut *self.outcomes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add_outcome(&self, id: u32, outcome: Outcome) {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).push((id, outcome));
        // Fails only if the counter is full, and then the event loop is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Gives the calling thread its root.
    fn enter_root(&self) -> Outcome {
        let Some(root) = &self.root else { return Ok(()) };
        let enter = || {
            // SAFETY: the calling thread stops sharing root and working directory with the other
            // threads. None of them relies on this one changing theirs.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            rustix::process::fchdir(root)?;
            rustix::process::chroot(".")
        };
        enter().map_err(|errno| make_failure("enter the root file system", b"", errno))
    }
}

/// Starts the thread of a copy, which moves the tree through `pipe`.
pub fn spawn_worker(
    workers: &Arc<Workers>,
    id: u32,
    direction: CopyDirection,
    path: PathBuf,
    pipe: OwnedFd,
) -> Result<(), Failure> {
    let object = path.clone();
    let workers = Arc::clone(workers);
    let run = move || {
        let pipe = File::from(pipe);
        let outcome = workers.enter_root().and_then(|()| match direction {
            CopyDirection::In => receive_tree(&pipe, &path),
            CopyDirection::Out => send_tree(&pipe, &path),
        });
        workers.add_outcome(id, outcome);
        // Closed last, so that the event loop finds the outcome when it sees the pipe close.
        drop(pipe);
    };
    std::thread::Builder::new().stack_size(STACK_LEN).spawn(run).map(drop).map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
        make_failure("start a thread to copy", object.as_os_str().as_bytes(), errno)
    })
}

fn receive_tree(pipe: &File, path: &Path) -> Outcome {
    // An agent that is not root cannot change owners.
    let owner = rustix::process::geteuid().is_root().then_some(WORKLOAD);
    let info = rustix::system::sysinfo();
    // Files are memory here. The tmpfs has a lower limit; this one ends a sparse file early that
    // could never fit.
    let max_bytes = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    let options = ReceiveOptions { owner, ..ReceiveOptions::agent(WORKLOAD, max_bytes) };
    if let Some(parent) = path.parent() {
        let owner = owner.filter(|_| path.starts_with(HOME));
        chitin_tree::create_dirs(parent, 0o755, owner).map_err(|error| convert_error(&error))?;
    }
    chitin_tree::receive(pipe, path, &options).map(drop).map_err(|error| convert_error(&error))
}

fn send_tree(pipe: &File, path: &Path) -> Outcome {
    chitin_tree::send(path, pipe, &SendOptions::agent())
        .map(drop)
        .map_err(|error| convert_error(&error))
}

fn convert_error(error: &chitin_tree::Error) -> Failure {
    make_failure(&error.to_string(), b"", Errno::from_raw_os_error(error.errno()))
}

/// Checks that a path may be copied, and returns it without a slash at its end. `chitin-tree`
/// refuses symbolic links in it.
pub fn check_path(bytes: &[u8]) -> Result<PathBuf, Failure> {
    let path = Path::new(OsStr::from_bytes(bytes));
    let is_plain = path.components().all(|component| match component {
        Component::RootDir | Component::Normal(_) => true,
        Component::CurDir | Component::ParentDir | Component::Prefix(_) => false,
    });
    if !is_plain || !path.is_absolute() || bytes.contains(&0) {
        let operation = "copy a path that is not absolute, or has . or .. in it:";
        return Err(make_failure(operation, bytes, Errno::INVAL));
    }
    if KERNEL_FILE_SYSTEMS.iter().any(|kernel| path.starts_with(kernel)) {
        return Err(make_failure("copy a file of the kernel:", bytes, Errno::PERM));
    }
    Ok(path.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_path_must_be_absolute_and_plain() {
        for good in ["/", "/work", "/work/a b", "/process", "/work/..a", "/work//a/"] {
            assert!(check_path(good.as_bytes()).is_ok(), "{good}");
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
            assert!(check_path(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
