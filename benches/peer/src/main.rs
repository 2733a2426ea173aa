//! The first process of a guest of another monitor, so that Chitin can be measured against it.
//!
//! It makes no file systems, locks nothing down and speaks no protocol: nothing that would have to
//! be subtracted from the other monitor's figures. It is separate from the echo program that is
//! measured, because that one should have as few pages as possible.
//!
//! It connects to the host once and serves that connection. After its end it serves connections
//! that the host makes, one at a time, which works after a restore as well. On each connection it
//! first sends one byte, [`HELLO`]. Then, in lock step:
//!
//! ```text
//!   'x' length  words, each with a NUL at its end   ──▶   the command's output, NUL, exit code
//!   'w' length  that many bytes                     ──▶   'w'
//!   'r' length                                      ──▶   that many bytes
//! ```
//!
//! A length is 32 bits, little-endian. The output holds no NUL. `benches/src/peer/connection.rs` is
//! the other end.

#![no_main]

use core::ptr;

use libc::{c_char, c_int, c_void};

/// The vsock port: of the host for the first connection, of the guest for the others.
const PORT: u32 = 1024;

const HELLO: &[u8] = b"h";

/// The number of bytes moved at once, and the limit of a command with its arguments.
const BUFFER_LEN: usize = 64 * 1024;

/// The most words of a command.
const MAX_WORDS: usize = 64;

/// The exit code of a shell that does not find a command.
const NOT_FOUND: c_int = 127;

const PATH: &core::ffi::CStr = c"PATH=/usr/local/bin:/usr/bin:/bin";

/// The entry point, called by the C library's start-up code.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    c_int::from(serve_connections().is_none())
}

/// Serves connections. Returns only if there is no vsock, which ends the guest.
fn serve_connections() -> Option<()> {
    let mut buffer = [0; BUFFER_LEN];
    let listener = open_socket()?;
    let here = make_address(libc::VMADDR_CID_ANY);
    // SAFETY: `here` is a `sockaddr_vm` of the length given, which outlives the call to bind(2).
    unsafe {
        check_result(libc::bind(listener, (&raw const here).cast(), ADDRESS_LEN))?;
        check_result(libc::listen(listener, 8))?;
    }
    let first = open_socket()?;
    let host = make_address(libc::VMADDR_CID_HOST);
    // SAFETY: `host` is a `sockaddr_vm` of the length given, which outlives the call.
    let connected = unsafe { libc::connect(first, (&raw const host).cast(), ADDRESS_LEN) };
    if check_result(connected).is_some() {
        serve_connection(first, &mut buffer);
    }
    // SAFETY: this function has opened the descriptor and uses it no longer.
    unsafe { libc::close(first) };
    loop {
        // SAFETY: with null pointers the kernel returns no address, and writes no memory.
        let accepted = unsafe { libc::accept(listener, ptr::null_mut(), ptr::null_mut()) };
        let connection = check_result(accepted)?;
        serve_connection(connection, &mut buffer);
        // SAFETY: this loop has accepted the descriptor and uses it no longer.
        unsafe { libc::close(connection) };
    }
}

#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;

/// Opens a vsock socket that a command inherits: without a console it may be a standard descriptor.
fn open_socket() -> Option<c_int> {
    // SAFETY: socket(2) takes three numbers and accesses no memory.
    check_result(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })
}

fn make_address(cid: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
    address.svm_family = FAMILY;
    (address.svm_cid, address.svm_port) = (cid, PORT);
    address
}

fn check_result(result: c_int) -> Option<c_int> {
    (result >= 0).then_some(result)
}

/// Serves one connection, until the host ends it or makes an unknown request.
fn serve_connection(connection: c_int, buffer: &mut [u8; BUFFER_LEN]) -> Option<()> {
    write_all(connection, HELLO)?;
    loop {
        let mut request = [0; 5];
        read_exact(connection, &mut request)?;
        let [kind, length @ ..] = request;
        let length = usize::try_from(u32::from_le_bytes(length)).ok()?;
        match kind {
            b'x' => {
                let words = buffer.get_mut(..length)?;
                read_exact(connection, words)?;
                let code = run_command(connection, words)?;
                write_all(connection, &[0, code])?;
            }
            b'w' => {
                let mut left = length;
                while left > 0 {
                    let count = left.min(BUFFER_LEN);
                    left -= read_some(connection, &mut buffer[..count])?;
                }
                write_all(connection, b"w")?;
            }
            b'r' => {
                buffer.fill(0);
                let mut left = length;
                while left > 0 {
                    let count = left.min(BUFFER_LEN);
                    write_all(connection, &buffer[..count])?;
                    left -= count;
                }
            }
            _ => return None,
        }
    }
}

/// Runs a command whose standard descriptors are the connection, and returns its exit code.
fn run_command(connection: c_int, words: &[u8]) -> Option<u8> {
    let mut arguments: [*const c_char; MAX_WORDS + 1] = [ptr::null(); MAX_WORDS + 1];
    if words.last() != Some(&0) {
        return None;
    }
    for (at, word) in words.split_inclusive(|byte| *byte == 0).enumerate() {
        *arguments[..MAX_WORDS].get_mut(at)? = word.as_ptr().cast();
    }
    let environment = [PATH.as_ptr(), ptr::null()];
    // SAFETY: this process has one thread, so its copy may call anything. All words end with NUL,
    // both arrays end with a null pointer, and all of them outlive the call to execvpe(3).
    // waitpid(2) writes one `int`, which outlives the call.
    unsafe {
        let child = check_result(libc::fork())?;
        if child == 0 {
            libc::dup2(connection, libc::STDIN_FILENO);
            libc::dup2(connection, libc::STDOUT_FILENO);
            libc::dup2(connection, libc::STDERR_FILENO);
            libc::execvpe(arguments[0], arguments.as_ptr(), environment.as_ptr());
            libc::_exit(NOT_FOUND);
        }
        let mut status = 0;
        // Also reaps processes that commands have left behind.
        while check_result(libc::waitpid(-1, &raw mut status, 0))? != child {}
        let code = if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            128 + libc::WTERMSIG(status)
        };
        u8::try_from(code).ok()
    }
}

/// Reads until the slice is full.
fn read_exact(connection: c_int, mut bytes: &mut [u8]) -> Option<()> {
    while !bytes.is_empty() {
        let count = read_some(connection, bytes)?;
        bytes = &mut bytes[count..];
    }
    Some(())
}

/// Reads at least one byte.
fn read_some(connection: c_int, bytes: &mut [u8]) -> Option<usize> {
    // SAFETY: read(2) writes at most `bytes.len()` bytes to the slice, which outlives the call.
    let count = unsafe { libc::read(connection, bytes.as_mut_ptr().cast::<c_void>(), bytes.len()) };
    usize::try_from(count).ok().filter(|count| *count > 0)
}

/// Writes the whole slice.
fn write_all(connection: c_int, mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        // SAFETY: write(2) reads at most `bytes.len()` bytes of the slice, which outlives the call.
        let count =
            unsafe { libc::write(connection, bytes.as_ptr().cast::<c_void>(), bytes.len()) };
        bytes = bytes.get(usize::try_from(count).ok().filter(|count| *count > 0)?..)?;
    }
    Some(())
}
