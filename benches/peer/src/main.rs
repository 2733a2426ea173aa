//! What the first process of a guest of another monitor does, so that Chitin can be measured beside it: no file systems, no
//! lock-down, no protocol, nothing that would have to be taken off its figures. It is a program of its own, and no part of the echo
//! that is measured, because that is to have as few pages as can be.
//!
//! It connects to the host once and serves that connection; when that has ended it serves, one at a time, those that the host
//! makes, which also works after a restore. On each it first sends one byte, [`HELLO`]. Then, in lock step:
//!
//! ```text
//!   'x' length  words, each ended by a NUL   ──▶   what the command prints, which holds no NUL; NUL; its exit code
//!   'w' length  that many bytes              ──▶   'w'
//!   'r' length                               ──▶   that many bytes
//! ```
//!
//! A length is 32 bits, little-endian. `benches/src/peer/guest.rs` is the other end.

#![no_main]

use core::ptr;

use libc::{c_char, c_int, c_void};

/// The vsock port, of the host for the first connection and of the guest for the others.
const PORT: u32 = 1024;

const HELLO: &[u8] = b"h";

/// Bytes moved at once, and the longest command with its arguments.
const BUFFER: usize = 64 * 1024;

/// The most words of a command.
const MAX_WORDS: usize = 64;

/// As of a shell that does not find a command.
const NOT_FOUND: c_int = 127;

const PATH: &core::ffi::CStr = c"PATH=/usr/local/bin:/usr/bin:/bin";

/// Entered by the C library's startup code.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    c_int::from(serve().is_none())
}

/// Serves for ever. A return means that there is no vsock, and ends the guest.
fn serve() -> Option<()> {
    let mut buffer = [0; BUFFER];
    let listener = socket()?;
    let here = address(libc::VMADDR_CID_ANY);
    // SAFETY: the address is one of its family, and outlives the calls.
    unsafe {
        checked(libc::bind(listener, (&raw const here).cast(), ADDRESS_BYTES))?;
        checked(libc::listen(listener, 8))?;
    }
    let first = socket()?;
    let host = address(libc::VMADDR_CID_HOST);
    // SAFETY: as above.
    if checked(unsafe { libc::connect(first, (&raw const host).cast(), ADDRESS_BYTES) }).is_some() {
        converse(first, &mut buffer);
    }
    // SAFETY: the descriptors are this function's own.
    unsafe { libc::close(first) };
    loop {
        // SAFETY: no address is asked for.
        let connection =
            checked(unsafe { libc::accept(listener, ptr::null_mut(), ptr::null_mut()) })?;
        converse(connection, &mut buffer);
        // SAFETY: as above.
        unsafe { libc::close(connection) };
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a few bytes")]
const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;

fn socket() -> Option<c_int> {
    // Not closed by a command's start: without a console these may be the standard descriptors.
    // SAFETY: takes numbers only.
    checked(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })
}

fn address(cid: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
    address.svm_family = FAMILY;
    (address.svm_cid, address.svm_port) = (cid, PORT);
    address
}

fn checked(result: c_int) -> Option<c_int> {
    (result >= 0).then_some(result)
}

/// One connection, until the host ends it or asks for something else.
fn converse(connection: c_int, buffer: &mut [u8; BUFFER]) -> Option<()> {
    write(connection, HELLO)?;
    loop {
        let mut request = [0; 5];
        read(connection, &mut request)?;
        let [kind, length @ ..] = request;
        let length = usize::try_from(u32::from_le_bytes(length)).ok()?;
        match kind {
            b'x' => {
                let words = buffer.get_mut(..length)?;
                read(connection, words)?;
                let code = run(connection, words)?;
                write(connection, &[0, code])?;
            }
            b'w' => {
                let mut left = length;
                while left > 0 {
                    let count = left.min(BUFFER);
                    left -= some(connection, &mut buffer[..count])?;
                }
                write(connection, b"w")?;
            }
            b'r' => {
                buffer.fill(0);
                let mut left = length;
                while left > 0 {
                    let count = left.min(BUFFER);
                    write(connection, &buffer[..count])?;
                    left -= count;
                }
            }
            _ => return None,
        }
    }
}

/// Runs a command whose output goes to the connection, and returns its exit code.
fn run(connection: c_int, words: &[u8]) -> Option<u8> {
    let mut arguments: [*const c_char; MAX_WORDS + 1] = [ptr::null(); MAX_WORDS + 1];
    if words.last() != Some(&0) {
        return None;
    }
    for (at, word) in words.split_inclusive(|byte| *byte == 0).enumerate() {
        *arguments[..MAX_WORDS].get_mut(at)? = word.as_ptr().cast();
    }
    let environment = [PATH.as_ptr(), ptr::null()];
    // SAFETY: the child, a copy of this process's one thread, calls nothing but the kernel: its words end in NUL and its lists
    // in a null pointer.
    unsafe {
        let child = checked(libc::fork())?;
        if child == 0 {
            libc::dup2(connection, libc::STDIN_FILENO);
            libc::dup2(connection, libc::STDOUT_FILENO);
            libc::dup2(connection, libc::STDERR_FILENO);
            libc::execvpe(arguments[0], arguments.as_ptr(), environment.as_ptr());
            libc::_exit(NOT_FOUND);
        }
        let mut status = 0;
        // Whatever the command has left behind is reaped on the way.
        while checked(libc::waitpid(-1, &raw mut status, 0))? != child {}
        let code = if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            128 + libc::WTERMSIG(status)
        };
        u8::try_from(code).ok()
    }
}

/// Reads until the slice is full.
fn read(connection: c_int, mut bytes: &mut [u8]) -> Option<()> {
    while !bytes.is_empty() {
        let count = some(connection, bytes)?;
        bytes = &mut bytes[count..];
    }
    Some(())
}

/// Reads at least one byte.
fn some(connection: c_int, bytes: &mut [u8]) -> Option<usize> {
    // SAFETY: the slice is writable for its length.
    let count = unsafe { libc::read(connection, bytes.as_mut_ptr().cast::<c_void>(), bytes.len()) };
    usize::try_from(count).ok().filter(|count| *count > 0)
}

fn write(connection: c_int, mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        // SAFETY: the slice is readable for its length.
        let count =
            unsafe { libc::write(connection, bytes.as_ptr().cast::<c_void>(), bytes.len()) };
        bytes = bytes.get(usize::try_from(count).ok().filter(|count| *count > 0)?..)?;
    }
    Some(())
}
