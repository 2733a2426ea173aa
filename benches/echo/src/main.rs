//! Prints its arguments, like `echo`, with nothing that is not the sandbox's: no dynamic loader, no locale, no runtime.
//!
//! Benchmarks and the trial run of a template start it. `/bin/echo` of the root image takes three times as long, most of
//! it in the loader.
#![no_main]

use libc::{STDOUT_FILENO, c_char, c_int};

/// Entered by the C library's startup code.
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let last = usize::try_from(count).unwrap_or(0);
    for at in 1..last {
        // SAFETY: `main` is given `count` pointers to strings that end in NUL and live as long as the process.
        let argument = unsafe { core::ffi::CStr::from_ptr(*arguments.add(at)) };
        let end: &[u8] = if at + 1 == last { b"\n" } else { b" " };
        if !write(argument.to_bytes(), end) {
            return 1;
        }
    }
    0
}

/// Writes both to standard output, in one piece; false where that cannot be.
fn write(text: &[u8], end: &[u8]) -> bool {
    let pieces = [text, end].map(|bytes| libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    });
    // SAFETY: two vectors over live slices, which are only read.
    let written = unsafe { libc::writev(STDOUT_FILENO, pieces.as_ptr(), 2) };
    usize::try_from(written) == Ok(text.len() + end.len())
}
