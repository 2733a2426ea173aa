//! The host's end of the connection: the channel's socket, and the payload that it has not taken
//! yet.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::credit::BUFFER_BYTES;
use crate::virtio::Ready;
use crate::virtio::chain::Buffers;

/// A non-blocking socket with a bounded buffer in front of it.
///
/// An error of any method means that the host has closed its end.
pub struct HostChannel {
    socket: Arc<UnixStream>,
    /// Payload of the guest that the socket has not taken; at most [`BUFFER_BYTES`], the guest's
    /// credit.
    backlog: VecDeque<u8>,
    /// Edge-triggered readiness: true until a call reports `EAGAIN`.
    readable: bool,
    writable: bool,
}

impl HostChannel {
    /// Wraps a non-blocking socket.
    pub fn new(socket: Arc<UnixStream>) -> Self {
        Self { socket, backlog: VecDeque::new(), readable: true, writable: true }
    }

    /// Returns the socket, to be watched.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Returns whether a read may return payload.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Returns whether the socket has refused payload.
    pub fn is_blocked(&self) -> bool {
        !self.writable
    }

    /// Returns whether the socket has taken all payload.
    pub fn is_drained(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Records the readiness of the socket.
    pub fn record_ready(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
    }

    /// Reads payload for the guest into its memory. Returns how many bytes were read, zero at the
    /// end of the stream, or `None` if there is nothing to read now.
    ///
    /// # Errors
    /// The host has closed its end.
    pub fn receive(&mut self, space: &mut Buffers<'_>) -> io::Result<Option<u32>> {
        match space.read_from_fd(self.socket.as_fd()) {
            Ok(count) => Ok(Some(u32::try_from(count).unwrap_or(u32::MAX))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(None)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends payload of the guest, and buffers what the socket does not take. Returns how many
    /// bytes the socket took.
    ///
    /// # Errors
    /// The host has closed its end.
    pub fn send(&mut self, mut payload: Buffers<'_>) -> io::Result<u32> {
        let mut sent = 0;
        while self.backlog.is_empty() && self.writable && !payload.is_empty() {
            let result = payload.write_to_fd(self.socket.as_fd());
            sent += self.record_write(result)?;
        }
        payload.append_to(&mut self.backlog);
        debug_assert!(self.backlog.len() <= BUFFER_BYTES as usize);
        Ok(u32::try_from(sent).unwrap_or(u32::MAX))
    }

    /// Sends buffered payload. Returns how many bytes the socket took.
    ///
    /// # Errors
    /// The host has closed its end.
    pub fn flush(&mut self) -> io::Result<u32> {
        let mut sent = 0;
        while self.writable && !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            let result = (&*self.socket).write(front);
            let count = self.record_write(result)?;
            self.backlog.drain(..count);
            sent += count;
        }
        if self.backlog.is_empty() {
            // Free the memory of a burst: the guest may live for a long time.
            self.backlog = VecDeque::new();
        }
        Ok(u32::try_from(sent).unwrap_or(u32::MAX))
    }

    /// Shuts down one direction or both. A socket that is no longer connected is reported by the
    /// next read or write.
    pub fn shut_down(&self, direction: Shutdown) {
        let _ = self.socket.shutdown(direction);
    }

    /// Returns how many bytes a write took, and records whether the socket is still writable.
    fn record_write(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(0)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
            result => result,
        }
    }
}
