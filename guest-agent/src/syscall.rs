//! Results of raw system calls.

use rustix::io::Errno;

/// Converts the result of a C library call or of `syscall(2)`, which is negative on failure.
pub fn check_result(result: impl Into<libc::c_long>) -> Result<(), Errno> {
    if result.into() >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
