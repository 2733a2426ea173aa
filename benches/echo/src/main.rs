//! Prints its arguments, like `echo`, without anything that is not the sandbox's: no dynamic
//! loader, no locale, no runtime.
//!
//! Benchmarks and the warm-up of a template start it. `/bin/echo` of the root image takes three
//! times as long, most of it in the loader.
#![no_main]

use libc::{STDOUT_FILENO, c_char, c_int};

/// The entry point, called by the C library's start-up code.
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let last = usize::try_from(count).unwrap_or(0);
    for at in 1..last {
        // SAFETY: `arguments` points to `count` pointers to NUL-terminated strings, which live as
        // long as the process.
        let argument = unsafe { core::ffi::CStr::from_ptr(*arguments.add(at)) };
        let end: &[u8] = if at + 1 == last { b"\n" } else { b" " };
        if !write_stdout(argument.to_bytes(), end) {
            return 1;
        }
    }
    0
}

/// Writes both slices to standard output with one system call. Returns whether all of them were
/// written.
fn write_stdout(text: &[u8], end: &[u8]) -> bool {
    let slices = [text, end].map(|bytes| libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    });
    // SAFETY: both vectors point to slices that outlive the call, and writev(2) only reads them.
    let written = unsafe { libc::writev(STDOUT_FILENO, slices.as_ptr(), 2) };
    usize::try_from(written) == Ok(text.len() + end.len())
}
