//! A bound on the workload's processes in a container whose kernel is its own, which is gVisor's: it has the first version of
//! cgroups, and of them what is needed to count. The runtime's own bound is around that kernel, which does not survive it.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::{Context, SystemError};

/// An empty directory of the image, in which the hierarchy is for a moment.
const PLACE: &str = "/run";

/// As many as a microVM has; the host may ask for less.
const MAX_TASKS: u32 = 4096;

/// A cgroup that every child joins.
pub struct Counted {
    /// Closed to the workload, which could otherwise open it as a descriptor of this process: gVisor lets it try.
    directory: OwnedFd,
}

impl Counted {
    /// Makes it. The hierarchy has no path afterwards.
    pub fn create() -> Result<Counted, SystemError> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("none", PLACE, "cgroup", flags, Some(c"pids"))
            .context("mount", "a cgroup")?;
        let made = Counted::create_in(PLACE);
        rustix::mount::unmount(PLACE, UnmountFlags::DETACH).context("unmount", PLACE)?;
        made
    }

    fn create_in(place: &str) -> Result<Counted, SystemError> {
        let path = format!("{place}/workload");
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)).context("create", &path)?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty()).context("open", &path)?;
        let counted = Counted { directory };
        counted.limit(MAX_TASKS).context("limit", "processes")?;
        Ok(counted)
    }

    /// Bounds processes and threads.
    pub fn limit(&self, tasks: u32) -> Result<(), Errno> {
        let text = tasks.min(MAX_TASKS).to_string();
        let file = open_to_write(self.directory.as_fd(), c"pids.max")?;
        let written = rustix::io::write(file, text.as_bytes())?;
        if written == text.len() { Ok(()) } else { Err(Errno::IO) }
    }

    /// What a child [joins](join).
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn open_to_write(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
}

/// In the child, before it is a user: from here on it counts, and what it starts. System calls only.
pub fn join(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut digits = [0; 10];
    let mut at = digits.len();
    let mut number = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
    while number > 0 && at > 0 {
        at -= 1;
        digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
    rustix::io::write(open_to_write(directory, c"cgroup.procs")?, &digits[at..]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_writes_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let procs = dir.path().join("cgroup.procs");
        std::fs::write(&procs, "").unwrap();
        join(std::fs::File::open(dir.path()).unwrap().as_fd()).unwrap();
        assert_eq!(std::fs::read_to_string(procs).unwrap(), std::process::id().to_string());
    }
}
