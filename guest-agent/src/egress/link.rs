//! A connection on the loopback interface and the stream that goes on with it: a pump for both directions, each of which
//! ends on its own.
//!
//! ```text
//!   connecting ──▶ open ──┬── the socket's end read:  End sent ──┐
//!                         └── End read:  the socket's half shut ─┴──▶ closed
//!          anything fails, or the stream is reset ──▶ the socket is reset
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use chitin_protocol::{Connection, Guest, MAX_DATA, StreamId, ToHost};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, sockopt};

use crate::failure;
use crate::pump::Step;

/// A connection that is being made for the host.
struct Connecting {
    request: u32,
    port: u16,
}

/// A connection and what waits for it, bounded by the stream's window.
pub struct Link {
    socket: OwnedFd,
    connecting: Option<Connecting>,
    readable: bool,
    writable: bool,
    broken: bool,
    waiting: VecDeque<u8>,
    /// The socket has been read to its end.
    read: bool,
    /// The stream has come to its end; and the socket has been told.
    ended: bool,
    shut: bool,
}

impl Link {
    /// Of a socket that is connected and does not block.
    pub fn new(socket: OwnedFd) -> Result<Link, Errno> {
        // Small writes are not to wait for an acknowledgement that the other side delays.
        sockopt::set_tcp_nodelay(&socket, true)?;
        // Until all has gone well, closing it is a reset.
        sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        Ok(Link {
            socket,
            connecting: None,
            readable: true,
            writable: true,
            broken: false,
            waiting: VecDeque::new(),
            read: false,
            ended: false,
            shut: false,
        })
    }

    /// Of a socket that is about to be connected with this port, for a request of the host's.
    pub fn connecting(socket: OwnedFd, request: u32, port: u16) -> Result<Link, Errno> {
        let mut link = Link::new(socket)?;
        link.connecting = Some(Connecting { request, port });
        (link.readable, link.writable) = (false, false);
        Ok(link)
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn wake(&mut self, readable: bool, writable: bool, broken: bool) {
        self.readable |= readable;
        self.writable |= writable;
        self.broken |= broken;
    }

    /// Takes bytes of the stream over and says how many have left for the socket already.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while self.waiting.is_empty() && self.writable && sent < bytes.len() {
            sent += self.put(Some(&bytes[sent..]));
        }
        self.waiting.extend(&bytes[sent..]);
        sent
    }

    /// The host has sent its last byte.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Moves what can be moved, one frame at most from the socket.
    pub fn step(&mut self, connection: &mut Connection<Guest>, stream: StreamId, scratch: &mut [u8]) -> Step {
        if let Some(step) = self.connect(connection, stream) {
            return step;
        }
        let mut moved = false;
        while self.writable && !self.waiting.is_empty() && !self.broken {
            let count = self.put(None);
            self.waiting.drain(..count);
            connection.consumed(stream, count);
            moved |= count > 0;
        }
        if self.ended && self.waiting.is_empty() && !self.shut && !self.broken {
            self.shut = true;
            self.broken |= rustix::net::shutdown(&self.socket, Shutdown::Write).is_err();
            moved = true;
        }
        let room = connection.sendable(stream).min(MAX_DATA);
        if self.readable && !self.read && room > 0 {
            match rustix::io::read(&self.socket, &mut scratch[..room]) {
                Ok(0) => {
                    self.read = true;
                    connection.end(stream);
                }
                Ok(count) => {
                    connection.send(stream, &scratch[..count]);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => self.broken = true,
            }
            moved |= self.readable;
        }
        if self.broken {
            connection.reset(stream);
            return Step::Finished;
        }
        if self.read && self.shut {
            // All of it has been handed to the kernel, which delivers it.
            let _ = sockopt::set_socket_linger(&self.socket, None);
            return Step::Finished;
        }
        if moved { Step::Moved } else { Step::Waiting }
    }

    /// Sees what has become of a connection that is being made. `None`: there is one to use.
    fn connect(&mut self, connection: &mut Connection<Guest>, stream: StreamId) -> Option<Step> {
        if self.connecting.is_some() && !self.writable && !self.broken {
            return Some(Step::Waiting);
        }
        let Connecting { request, port } = self.connecting.take()?;
        let outcome = sockopt::socket_error(&self.socket).and_then(|outcome| outcome);
        let failed = outcome.is_err();
        let result = outcome.map_err(|errno| refused(port, errno));
        if let Err(error) = connection.send_message(&ToHost::Done { request, result }) {
            crate::log(error);
        }
        if !failed {
            self.readable = true;
            return None;
        }
        connection.reset(stream);
        Some(Step::Finished)
    }

    /// Sends these bytes, or what waits, and says how many.
    fn put(&mut self, bytes: Option<&[u8]>) -> usize {
        let bytes = bytes.unwrap_or(self.waiting.as_slices().0);
        match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => return count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.writable = false,
            Err(_) => {
                self.broken = true;
                self.writable = false;
            }
        }
        0
    }
}

/// Why the host's connection could not be made.
pub fn refused(port: u16, errno: Errno) -> chitin_protocol::Failure {
    failure("connect to port", port.to_string().as_bytes(), errno)
}
