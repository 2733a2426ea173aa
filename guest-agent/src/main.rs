//! `chitin-agent`, the `/init` of every sandbox. All of it is in the library.
//!
//! There is no Rust `main`: the standard library's start-up opens `/dev/null` where standard descriptors are
//! closed and aborts if it cannot. As the kernel's first process this program has neither descriptors nor a `/dev`.
#![no_main]

use std::ffi::{CStr, c_char, c_int};

#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    let arguments: Vec<&[u8]> = (0..count)
        // SAFETY: the C library passes `argc` valid, NUL-terminated strings that live as long as the process.
        .map(|index| unsafe { CStr::from_ptr(*argv.add(index)) }.to_bytes())
        .collect();
    chitin_agent::run(&arguments)
}
