//! `chitin-agent`, the `/init` of every sandbox. All of it is in the library.
//!
//! There is no Rust `main`, because the standard library's start-up opens `/dev/null` for standard
//! descriptors that are closed, and aborts if it cannot. The kernel's first process has neither
//! descriptors nor a `/dev`.
#![no_main]

use std::ffi::{CStr, c_char, c_int};

#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    let arguments: Vec<&[u8]> = (0..count)
        // SAFETY: the C library passes `argc` pointers to NUL-terminated strings, which live as
        // long as the process.
        .map(|index| unsafe { CStr::from_ptr(*argv.add(index)) }.to_bytes())
        .collect();
    chitin_agent::run(&arguments)
}
