//! The byte stream to the host.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use chitin_protocol::VSOCK_PORT;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_send_buffer_size_force, socket_error};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::{Context, SystemError};

/// The host listens before it starts the machine, so an answer takes as long as the host's thread needs to wake.
/// Generous, because an emulated host may be a hundred times slower; it equals the kernel's own limit.
pub const CONNECT_TIMEOUT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// When the host has made room, the kernel wakes a sender only if less than half of its send buffer is in use, and what the device
/// has sent counts until something else is sent (`kernel-config/patches/0011`): up to the device's window of 256 KiB, which
/// is more than half of what a socket has by default. In bytes; the kernel takes twice as many.
const SEND_BUFFER: usize = 1 << 20;

/// From the kernel's `linux/vm_sockets.h`.
const SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW: libc::c_int = 8;

/// A century: the kernel counts it in ticks, so that the largest number of all would not do.
const FOR_EVER_S: i64 = 100 * 366 * 86_400;

#[expect(clippy::cast_possible_truncation, reason = "a few bytes")]
const TIMEVAL_LEN: libc::socklen_t = size_of::<libc::timeval>() as libc::socklen_t;

#[expect(clippy::cast_possible_truncation, reason = "both constants are small")]
const FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "a few bytes")]
const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Both directions of the channel, non-blocking, on descriptors above 2.
pub struct Channel {
    input: OwnedFd,
    /// `None`: the same descriptor as `input`.
    output: Option<OwnedFd>,
}

/// A vsock socket that is not connected yet. The agent's own filter lets it open no more of them later.
pub struct Socket(OwnedFd);

impl Socket {
    pub fn open() -> Result<Socket, SystemError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)
                .context("open", "a vsock socket")?;
        set_socket_send_buffer_size_force(&socket, SEND_BUFFER)
            .context("let", "a vsock socket send more")?;
        Ok(Socket(socket))
    }

    /// Begins to connect to the host's vsock port. The answer arrives while other things are done:
    /// [`Channel::connected`] waits for it.
    pub fn connect(self) -> Result<Channel, SystemError> {
        let Socket(socket) = self;
        let object = format_args!("vsock 2:{VSOCK_PORT}");
        // SAFETY: all-zero is a valid `sockaddr_vm`.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = FAMILY;
        address.svm_cid = libc::VMADDR_CID_HOST;
        address.svm_port = VSOCK_PORT;
        // SAFETY: `address` is a `sockaddr_vm` of the length given, and outlives the call.
        let result =
            unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
        match crate::syscall::check_result(result) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Channel { input: socket, output: None }),
            Err(errno) => Err(errno).context("connect to", object),
        }
    }

    /// Lets the kernel wait for the answer for as long as a template may lie.
    pub fn wait_for_ever(&self) -> Result<(), SystemError> {
        let limit = libc::timeval { tv_sec: FOR_EVER_S, tv_usec: 0 };
        // SAFETY: the option reads a `timeval`, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::AF_VSOCK,
                SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW,
                (&raw const limit).cast(),
                TIMEVAL_LEN,
            )
        };
        crate::syscall::check_result(result).context("lift the time limit of", "a vsock socket")
    }
}

impl Channel {
    /// Waits until a [`Socket::connect`] has come to its end; for ever if `limit` is `None`.
    pub fn connected(&self, limit: Option<Timespec>) -> Result<(), SystemError> {
        let object = format_args!("vsock 2:{VSOCK_PORT}");
        let mut poll = [PollFd::new(&self.input, PollFlags::OUT)];
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, limit.as_ref()))
            .context("wait for", object)?;
        if ready == 0 {
            return Err(Errno::TIMEDOUT).context("connect to", object);
        }
        socket_error(&self.input).and_then(|outcome| outcome).context("connect to", object)
    }

    /// Takes descriptors 0 and 1 over and leaves `/dev/null` in their place.
    pub fn stdio() -> Result<Channel, SystemError> {
        let null = rustix::fs::open(
            "/dev/null",
            OFlags::RDWR | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .context("open", "/dev/null")?;
        let mut moved = Vec::with_capacity(2);
        for fd in 0..2 {
            // SAFETY: the agent was started with its channel on 0 and 1; if it was not, the call says so.
            let standard = unsafe { BorrowedFd::borrow_raw(fd) };
            let own =
                rustix::io::fcntl_dupfd_cloexec(standard, 3).context("take descriptor", fd)?;
            let flags =
                rustix::fs::fcntl_getfl(&own).context("read the flags of descriptor", fd)?;
            rustix::fs::fcntl_setfl(&own, flags | OFlags::NONBLOCK)
                .context("change descriptor", fd)?;
            replace(&null, fd).context("replace descriptor", fd)?;
            moved.push(own);
        }
        let output = moved.pop();
        match moved.pop() {
            Some(input) => Ok(Channel { input, output }),
            None => Err(Errno::BADF).context("take descriptor", 0),
        }
    }

    /// Where bytes of the host arrive.
    pub fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// Where bytes for the host go. May be the same descriptor as [`input`](Self::input).
    pub fn output(&self) -> BorrowedFd<'_> {
        self.output.as_ref().unwrap_or(&self.input).as_fd()
    }

    /// Whether one descriptor serves both directions.
    pub fn is_one(&self) -> bool {
        self.output.is_none()
    }
}

/// Makes descriptor `number` (0, 1 or 2) another name of `fd`, inherited by children.
pub fn replace(fd: impl AsFd, number: i32) -> Result<(), Errno> {
    // SAFETY: 0 to 2 belong to the process as a whole; nothing here owns them, so they may be replaced.
    let mut standard = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    rustix::io::dup2(fd, &mut standard)
}
