//! A limit of the workload's processes in a container whose kernel serves this sandbox alone, which
//! is gVisor's. That kernel has version 1 of cgroups, and of them the controller that counts
//! processes. The runtime's own limit is around that kernel, which does not survive reaching it.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::MAX_TASKS;
use crate::error::{Context, SystemError};

/// An empty directory of the image, on which the hierarchy is mounted for a moment.
const MOUNT_POINT: &str = "/run";

/// A cgroup of the version 1 pids controller, which every child joins.
pub struct PidsCgroup {
    /// Only the agent may open it. gVisor lets the workload try, through the descriptors of this
    /// process.
    directory: OwnedFd,
}

impl PidsCgroup {
    /// Creates the cgroup. Its hierarchy has no path afterwards.
    pub fn create() -> Result<PidsCgroup, SystemError> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("none", MOUNT_POINT, "cgroup", flags, Some(c"pids"))
            .context("mount", "a cgroup")?;
        let created = PidsCgroup::create_in(MOUNT_POINT);
        rustix::mount::unmount(MOUNT_POINT, UnmountFlags::DETACH)
            .context("unmount", MOUNT_POINT)?;
        created
    }

    fn create_in(hierarchy: &str) -> Result<PidsCgroup, SystemError> {
        let path = format!("{hierarchy}/workload");
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)).context("create", &path)?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty()).context("open", &path)?;
        let cgroup = PidsCgroup { directory };
        cgroup.limit_tasks(MAX_TASKS).context("limit", "processes")?;
        Ok(cgroup)
    }

    /// Limits the number of processes and threads.
    pub fn limit_tasks(&self, limit: u32) -> Result<(), Errno> {
        let text = limit.min(MAX_TASKS).to_string();
        let file = open_for_writing(self.directory.as_fd(), c"pids.max")?;
        let written = rustix::io::write(file, text.as_bytes())?;
        if written == text.len() { Ok(()) } else { Err(Errno::IO) }
    }

    /// Returns the directory of the cgroup, for [`join_cgroup`].
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn open_for_writing(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Moves the calling child into the cgroup, while it has the right to: from here on the child and
/// its descendants count.
///
/// Makes system calls only.
pub fn join_cgroup(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    // Formatted by hand, because a child must not allocate.
    let mut digits = [0; 10];
    let mut start = digits.len();
    let mut pid = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
    while pid > 0 && start > 0 {
        start -= 1;
        digits[start] = b'0' + u8::try_from(pid % 10).unwrap_or(0);
        pid /= 10;
    }
    rustix::io::write(open_for_writing(directory, c"cgroup.procs")?, &digits[start..]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_process_writes_its_pid() {
        let dir = tempfile::tempdir().unwrap();
        let procs = dir.path().join("cgroup.procs");
        std::fs::write(&procs, "").unwrap();
        join_cgroup(std::fs::File::open(dir.path()).unwrap().as_fd()).unwrap();
        assert_eq!(std::fs::read_to_string(procs).unwrap(), std::process::id().to_string());
    }
}
