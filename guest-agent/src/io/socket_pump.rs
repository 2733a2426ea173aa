//! A pump for both directions between a TCP socket of the loopback interface and a stream. Each
//! direction ends separately.
//!
//! ```text
//!   connecting ──▶ open ──┬── end of the socket read:  End sent ────────────┐
//!                         └── End received:  the socket's half shut down ──┴──▶ closed
//!          any failure, or a reset of the stream ──▶ the socket is reset
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use chitin_protocol::{Connection, Failure, Guest, MAX_DATA, StreamId, ToHost};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, sockopt};

use super::pump::Progress;
use crate::error::make_failure;
use crate::log_line;

/// A request of the host's whose connection is not established yet.
struct PendingConnect {
    request: u32,
    port: u16,
}

/// A socket and the bytes that wait for it, bounded by the stream's window.
pub struct SocketPump {
    socket: OwnedFd,
    pending_connect: Option<PendingConnect>,
    readable: bool,
    writable: bool,
    broken: bool,
    waiting: VecDeque<u8>,
    /// The socket has been read to its end.
    read_to_end: bool,
    /// The host has sent its last byte.
    ended: bool,
    /// The writing half of the socket has been shut down.
    shut_down: bool,
}

impl SocketPump {
    /// Pumps a connected, non-blocking socket.
    pub fn new(socket: OwnedFd) -> Result<SocketPump, Errno> {
        // Small writes should not wait for an acknowledgement that the other side delays.
        sockopt::set_tcp_nodelay(&socket, true)?;
        // Until both directions have ended, closing the socket resets the connection.
        sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        Ok(SocketPump {
            socket,
            pending_connect: None,
            readable: true,
            writable: true,
            broken: false,
            waiting: VecDeque::new(),
            read_to_end: false,
            ended: false,
            shut_down: false,
        })
    }

    /// Pumps a socket that is being connected to `port` for a request of the host's.
    pub fn new_connecting(socket: OwnedFd, request: u32, port: u16) -> Result<SocketPump, Errno> {
        let mut pump = SocketPump::new(socket)?;
        pump.pending_connect = Some(PendingConnect { request, port });
        (pump.readable, pump.writable) = (false, false);
        Ok(pump)
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Records an event. An error flag is only a reason to ask the socket: under gVisor a socket
    /// whose two ends have closed reports every flag, even while there is something left to read.
    pub fn wake(&mut self, readable: bool, writable: bool, has_error: bool) {
        self.readable |= readable;
        self.writable |= writable;
        if has_error && self.pending_connect.is_none() {
            self.broken |= self.take_error().is_err();
        }
    }

    /// Accepts bytes of the stream, and returns how many have reached the socket already.
    pub fn accept_data(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while self.waiting.is_empty() && self.writable && sent < bytes.len() {
            let outcome = rustix::net::send(&self.socket, &bytes[sent..], SendFlags::NOSIGNAL);
            sent += self.record_send(outcome);
        }
        self.waiting.extend(&bytes[sent..]);
        sent
    }

    /// Records that the host has sent its last byte.
    pub fn accept_end(&mut self) {
        self.ended = true;
    }

    /// Moves what can be moved, and one frame at most from the socket.
    pub fn step(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        scratch: &mut [u8],
    ) -> Progress {
        if let Some(progress) = self.finish_connect(connection, stream) {
            return progress;
        }
        let mut moved = self.write_waiting(connection, stream);
        if self.ended && self.waiting.is_empty() && !self.shut_down && !self.broken {
            self.shut_down = true;
            self.broken |= rustix::net::shutdown(&self.socket, Shutdown::Write).is_err();
            moved = true;
        }
        moved |= self.read_frame(connection, stream, scratch);
        if self.broken {
            connection.reset_stream(stream);
            return Progress::Finished;
        }
        if self.read_to_end && self.shut_down {
            // The kernel has all bytes and delivers them after the socket is closed.
            let _ = sockopt::set_socket_linger(&self.socket, None);
            return Progress::Finished;
        }
        if moved { Progress::Moved } else { Progress::Waiting }
    }

    /// Writes the bytes that wait, and returns whether any were written.
    fn write_waiting(&mut self, connection: &mut Connection<Guest>, stream: StreamId) -> bool {
        let mut moved = false;
        while self.writable && !self.waiting.is_empty() && !self.broken {
            let bytes = self.waiting.as_slices().0;
            let outcome = rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL);
            let count = self.record_send(outcome);
            self.waiting.drain(..count);
            connection.return_credit(stream, count);
            moved |= count > 0;
        }
        moved
    }

    /// Reads one frame from the socket, and returns whether there may be more.
    fn read_frame(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        scratch: &mut [u8],
    ) -> bool {
        let room = connection.send_capacity(stream).min(MAX_DATA);
        // A broken socket is not read: after its error has been taken, it would report an end.
        if !self.readable || self.read_to_end || self.broken || room == 0 {
            return false;
        }
        match rustix::io::read(&self.socket, &mut scratch[..room]) {
            Ok(0) => {
                self.read_to_end = true;
                connection.end_stream(stream);
            }
            Ok(count) => {
                connection.send_data(stream, &scratch[..count]);
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => {}
            Err(_) => self.broken = true,
        }
        self.readable
    }

    /// Answers the host's request once the connection is established or has failed. Returns `None`
    /// if the socket can be used.
    fn finish_connect(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
    ) -> Option<Progress> {
        if self.pending_connect.is_some() && !self.writable {
            return Some(Progress::Waiting);
        }
        let PendingConnect { request, port } = self.pending_connect.take()?;
        let outcome = self.take_error();
        let failed = outcome.is_err();
        let result = outcome.map_err(|errno| make_connect_failure(port, errno));
        if let Err(error) = connection.send_message(&ToHost::Done { request, result }) {
            log_line(error);
        }
        if !failed {
            self.readable = true;
            return None;
        }
        connection.reset_stream(stream);
        Some(Progress::Finished)
    }

    /// Takes the socket's pending error, which it reports once.
    fn take_error(&self) -> Result<(), Errno> {
        sockopt::socket_error(&self.socket)?
    }

    /// Records the outcome of a send, and returns the number of bytes sent.
    fn record_send(&mut self, outcome: Result<usize, Errno>) -> usize {
        match outcome {
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

/// Makes the failure of a connection that the host has asked for.
pub fn make_connect_failure(port: u16, errno: Errno) -> Failure {
    make_failure("connect to port", port.to_string().as_bytes(), errno)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use chitin_protocol::{Direction, Event, Host};

    use super::*;

    /// Returns a pump whose host has ended its half, and the socket at the other end.
    fn half_closed_pump() -> (SocketPump, TcpStream, Connection<Guest>, Connection<Host>, StreamId)
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nonblocking(true).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let (mut guest, mut host) = (Connection::<Guest>::new(), Connection::<Host>::new());
        let stream = host.open_stream(Direction::Both).unwrap();
        guest.accept_stream(stream, Direction::Both).unwrap();
        let mut pump = SocketPump::new(near.into()).unwrap();
        pump.accept_end();
        assert_eq!(pump.step(&mut guest, stream, &mut [0; MAX_DATA]), Progress::Moved);
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
        (pump, far, guest, host, stream)
    }

    /// Returns the bytes that have arrived at the host, and whether the stream has ended.
    fn receive_all(guest: &mut Connection<Guest>, host: &mut Connection<Host>) -> (Vec<u8>, bool) {
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
    fn readable_socket_with_error_flag_is_not_reset() {
        let (mut pump, mut far, mut guest, mut host, stream) = half_closed_pump();
        far.write_all(b"the answer").unwrap();
        drop(far);
        pump.wake(true, true, true);
        while pump.step(&mut guest, stream, &mut [0; MAX_DATA]) == Progress::Moved {}
        assert_eq!(receive_all(&mut guest, &mut host), (b"the answer".to_vec(), true));
    }

    #[test]
    fn socket_reset_resets_the_stream() {
        let (mut pump, far, mut guest, mut host, stream) = half_closed_pump();
        sockopt::set_socket_linger(&far, Some(Duration::ZERO)).unwrap();
        drop(far);
        pump.wake(true, true, true);
        assert_eq!(pump.step(&mut guest, stream, &mut [0; MAX_DATA]), Progress::Finished);
        assert_eq!(receive_all(&mut guest, &mut host), (Vec::new(), false));
    }
}
