//! The vsock connection to the host, made in three steps with other work in between.
//!
//! ```text
//!   UnconnectedSocket ──start_connect──▶ VsockStream ──await_connection──▶ connected
//! ```
//!
//! The crate's own `VsockStream::connect` does all three at once and waits. Here the socket is
//! opened before the agent's seccomp filter forbids that, and the host answers while the agent
//! makes the file systems or, on the channel after a freeze, once a template has been restored.

use std::os::fd::{AsRawFd, OwnedFd};

use chitin_protocol::VSOCK_PORT;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_send_buffer_size_force, socket_error};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vsock::{VMADDR_CID_HOST, VsockAddr, VsockSocket, VsockStream};

use crate::error::{Context, SystemError};
use crate::syscall::check_result;

/// The host listens before it starts the machine, so an answer takes as long as the host's thread
/// needs to wake. The limit is generous, because an emulated host may be a hundred times slower.
pub const CONNECT_TIMEOUT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// The send buffer, in bytes; the kernel takes twice as many.
///
/// When the host has made room, the kernel wakes a sender only if less than half of its send buffer
/// is in use, and what the device has sent counts until something else is sent
/// (`kernel-config/patches/0011`). That is up to the device's window of 256 KiB, which is more than
/// half of a socket's default buffer.
const SEND_BUFFER_LEN: usize = 1 << 20;

/// From the kernel's `linux/vm_sockets.h`.
const SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW: libc::c_int = 8;

/// A century. The kernel counts the timeout in ticks, so the largest number would overflow.
const UNLIMITED_TIMEOUT_S: i64 = 100 * 366 * 86_400;

#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const TIMEVAL_LEN: libc::socklen_t = size_of::<libc::timeval>() as libc::socklen_t;

/// A non-blocking vsock socket that is not connected yet. The agent's own seccomp filter does not
/// let it open more of them later.
pub struct UnconnectedSocket(VsockSocket);

impl UnconnectedSocket {
    pub fn open() -> Result<UnconnectedSocket, SystemError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)
                .context("open", "a vsock socket")?;
        set_socket_send_buffer_size_force(&socket, SEND_BUFFER_LEN)
            .context("enlarge the send buffer of", "a vsock socket")?;
        Ok(UnconnectedSocket(VsockSocket::from(socket)))
    }

    /// Starts to connect to the host. The answer arrives while other work is done.
    pub fn start_connect(self) -> Result<VsockStream, SystemError> {
        let host = VsockAddr::new(VMADDR_CID_HOST, VSOCK_PORT);
        let object = format_args!("vsock {VMADDR_CID_HOST}:{VSOCK_PORT}");
        match self.0.connect(&host).map_err(|error| Errno::from_io_error(&error)) {
            Ok(()) | Err(Some(Errno::INPROGRESS)) => Ok(VsockStream::from(OwnedFd::from(self.0))),
            Err(errno) => Err(errno.unwrap_or(Errno::IO)).context("connect to", object),
        }
    }

    /// Lets the kernel wait for the host's answer for as long as a template may be stored.
    pub fn disable_connect_timeout(&self) -> Result<(), SystemError> {
        let limit = libc::timeval { tv_sec: UNLIMITED_TIMEOUT_S, tv_usec: 0 };
        // SAFETY: for this option the kernel reads one `timeval`, the size of which is passed and
        // which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::AF_VSOCK,
                SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW,
                (&raw const limit).cast(),
                TIMEVAL_LEN,
            )
        };
        check_result(result).context("disable the connect timeout of", "a vsock socket")
    }
}

/// Waits for the host's answer, without a limit if `timeout` is `None`.
pub fn await_connection(
    stream: &VsockStream,
    timeout: Option<Timespec>,
) -> Result<(), SystemError> {
    let object = format_args!("vsock {VMADDR_CID_HOST}:{VSOCK_PORT}");
    let mut poll = [PollFd::new(stream, PollFlags::OUT)];
    let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, timeout.as_ref()))
        .context("wait for", object)?;
    if ready == 0 {
        return Err(Errno::TIMEDOUT).context("connect to", object);
    }
    socket_error(stream).and_then(|outcome| outcome).context("connect to", object)
}
