//! File descriptors of the process as a whole: the standard ones, and those that a child must not
//! inherit.

use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, SystemError};
use crate::syscall::check_result;

/// Opens descriptors 0 to 2 where they are closed, so that no descriptor that is opened later
/// becomes a child's standard output. The kernel leaves them closed if the image has no
/// `/dev/console`.
pub fn fill_standard_fds() -> Result<(), SystemError> {
    loop {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/", flags, Mode::empty()).context("open", "/")?;
        if fd.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open until the process replaces it.
        let _ = fd.into_raw_fd();
    }
}

/// Duplicates `fd` to the standard descriptor `number` (0, 1 or 2), which children inherit.
pub fn replace_standard_fd(fd: impl AsFd, number: i32) -> Result<(), Errno> {
    match number {
        0 => rustix::stdio::dup2_stdin(fd),
        1 => rustix::stdio::dup2_stdout(fd),
        2 => rustix::stdio::dup2_stderr(fd),
        _ => Err(Errno::BADF),
    }
}

/// Marks the descriptors from `first` to `last`, both included, as close-on-exec. Those that the
/// agent opens are marked already; this covers descriptors that it does not know of.
///
/// Makes one system call and allocates nothing, so that a forked child may call it.
pub fn close_on_exec(first: i32, last: i32) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC closes nothing: it sets a flag on descriptors
    // of this process and accesses no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first.cast_unsigned(),
            last.cast_unsigned(),
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match check_result(result) {
        // Before Linux 5.11, and in gVisor.
        Err(Errno::NOSYS | Errno::INVAL) => Ok(()),
        other => other,
    }
}
