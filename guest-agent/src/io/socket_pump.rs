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

use super::pump::Step;
use crate::failure;

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

    /// Takes note of an event. Whether something is wrong is the socket's to say, not the event's: under gVisor one whose both
    /// ends have closed has every flag there is, also while there is something to be read.
    pub fn wake(&mut self, readable: bool, writable: bool, doubtful: bool) {
        self.readable |= readable;
        self.writable |= writable;
        if doubtful && self.connecting.is_none() {
            self.broken |= self.error().is_err();
        }
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
    pub fn step(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        scratch: &mut [u8],
    ) -> Step {
        if let Some(step) = self.connect(connection, stream) {
            return step;
        }
        let mut moved = false;
        while self.writable && !self.waiting.is_empty() && !self.broken {
            let count = self.put(None);
            self.waiting.drain(..count);
            connection.return_credit(stream, count);
            moved |= count > 0;
        }
        if self.ended && self.waiting.is_empty() && !self.shut && !self.broken {
            self.shut = true;
            self.broken |= rustix::net::shutdown(&self.socket, Shutdown::Write).is_err();
            moved = true;
        }
        let room = connection.send_capacity(stream).min(MAX_DATA);
        // What is broken off has an end to be read, once the error was.
        if self.readable && !self.read && !self.broken && room > 0 {
            match rustix::io::read(&self.socket, &mut scratch[..room]) {
                Ok(0) => {
                    self.read = true;
                    connection.end_stream(stream);
                }
                Ok(count) => {
                    connection.send_data(stream, &scratch[..count]);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => self.broken = true,
            }
            moved |= self.readable;
        }
        if self.broken {
            connection.reset_stream(stream);
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
        if self.connecting.is_some() && !self.writable {
            return Some(Step::Waiting);
        }
        let Connecting { request, port } = self.connecting.take()?;
        let outcome = self.error();
        let failed = outcome.is_err();
        let result = outcome.map_err(|errno| refused(port, errno));
        if let Err(error) = connection.send_message(&ToHost::Done { request, result }) {
            crate::log(error);
        }
        if !failed {
            self.readable = true;
            return None;
        }
        connection.reset_stream(stream);
        Some(Step::Finished)
    }

    /// What has happened to the socket; it says so once.
    fn error(&self) -> Result<(), Errno> {
        sockopt::socket_error(&self.socket)?
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use chitin_protocol::{Direction, Event, Host};

    use super::*;

    /// A link whose host has ended its half, and the socket at the other end of it.
    fn half_closed() -> (Link, TcpStream, Connection<Guest>, Connection<Host>, StreamId) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nonblocking(true).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let (mut guest, mut host) = (Connection::<Guest>::new(), Connection::<Host>::new());
        let stream = host.open_stream(Direction::Both).unwrap();
        guest.accept_stream(stream, Direction::Both).unwrap();
        let mut link = Link::new(near.into()).unwrap();
        link.end();
        assert_eq!(link.step(&mut guest, stream, &mut [0; MAX_DATA]), Step::Moved);
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
        (link, far, guest, host, stream)
    }

    /// What has arrived at the host, and whether it ended well.
    fn arrived(guest: &mut Connection<Guest>, host: &mut Connection<Host>) -> (Vec<u8>, bool) {
        let sent = guest.pending_output().to_vec();
        host.input_buffer()[..sent.len()].copy_from_slice(&sent);
        host.commit_input(sent.len());
        let (mut bytes, mut ended) = (Vec::new(), false);
        while let Some(event) = host.next_event().unwrap() {
            match event {
                Event::Data { bytes: more, .. } => bytes.extend_from_slice(more),
                Event::End { .. } => ended = true,
                _ => {}
            }
        }
        (bytes, ended)
    }

    #[test]
    fn every_flag_at_once_is_no_reset_while_there_is_something_to_read() {
        let (mut link, mut far, mut guest, mut host, stream) = half_closed();
        far.write_all(b"the answer").unwrap();
        drop(far);
        link.wake(true, true, true);
        while link.step(&mut guest, stream, &mut [0; MAX_DATA]) == Step::Moved {}
        assert_eq!(arrived(&mut guest, &mut host), (b"the answer".to_vec(), true));
    }

    #[test]
    fn a_reset_is_one() {
        let (mut link, far, mut guest, mut host, stream) = half_closed();
        sockopt::set_socket_linger(&far, Some(Duration::ZERO)).unwrap();
        drop(far);
        link.wake(true, true, true);
        assert_eq!(link.step(&mut guest, stream, &mut [0; MAX_DATA]), Step::Finished);
        assert_eq!(arrived(&mut guest, &mut host), (Vec::new(), false));
    }
}
