//! Sends large output to the channel as the pages that the workload wrote, without copying them.
//!
//! ```text
//!   workload's pipe ──splice──▶ payload ──splice──▶ frame ──splice──▶ vsock
//!                               (how many?)        (header first)
//! ```
//!
//! A frame begins with its length, which is known only once the pages are out of a pipe that others
//! can read too. That is why there are two pipes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use chitin_protocol::HEADER_LEN;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, splice};

/// The most bytes of a spliced frame. The kernel sends sixteen buffers of a pipe as one packet
/// (`splice_to_socket`), and the header takes one of them.
pub const MAX_SPLICE: usize = 15 * 4096;

/// The size of a frame, in bytes, from which on the next ones are spliced. For less, four system
/// calls take longer than two copies.
pub const MIN_SPLICE: usize = 16 * 1024;

struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    fn new() -> Result<Pipe, Errno> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Pipe { reader, writer })
    }
}

/// Splices one frame at a time, header first.
pub struct Splicer {
    /// The channel is a socket that takes pages. That of a container is not.
    enabled: bool,
    /// Opened with the first frame.
    pipes: Option<Pipes>,
}

struct Pipes {
    payload: Pipe,
    frame: Pipe,
    /// Bytes in `payload`.
    payload_len: usize,
    /// Bytes in `frame`.
    frame_len: usize,
}

impl Splicer {
    pub fn new(enabled: bool) -> Splicer {
        Splicer { enabled, pipes: None }
    }

    /// Opens the pipes unless they are open. Returns whether frames can be spliced.
    pub fn open_pipes(&mut self) -> bool {
        if self.enabled
            && self.pipes.is_none()
            && let (Ok(payload), Ok(frame)) = (Pipe::new(), Pipe::new())
        {
            self.pipes = Some(Pipes { payload, frame, payload_len: 0, frame_len: 0 });
        }
        self.pipes.is_some()
    }

    /// Returns whether all of the last frame has been sent.
    pub fn is_empty(&self) -> bool {
        self.pipes.as_ref().is_none_or(|pipes| pipes.payload_len + pipes.frame_len == 0)
    }

    /// Takes up to `max` bytes, and at most [`MAX_SPLICE`], out of `pipe`, and prepends the header
    /// that `make_header` returns for their number. Returns that number; 0 at the end of the pipe.
    /// The last frame must have been sent.
    ///
    /// # Errors
    /// `EAGAIN` if the pipe is empty. Any other error loses the bytes that were taken.
    pub fn take_frame(
        &mut self,
        pipe: &OwnedFd,
        max: usize,
        make_header: impl FnOnce(usize) -> [u8; HEADER_LEN],
    ) -> Result<usize, Errno> {
        debug_assert!(self.is_empty());
        let Some(pipes) = &mut self.pipes else { return Err(Errno::AGAIN) };
        let count = move_pages(pipe, &pipes.payload.writer, max.min(MAX_SPLICE))?;
        if count > 0 {
            match rustix::io::write(&pipes.frame.writer, &make_header(count)) {
                Ok(written) => (pipes.payload_len, pipes.frame_len) = (count, written),
                // Out of memory. The payload must not be sent without its header.
                Err(errno) => {
                    self.pipes = None;
                    return Err(errno);
                }
            }
        }
        Ok(count)
    }

    /// Sends as much as the socket takes, and returns how much that was.
    ///
    /// # Errors
    /// Those of the socket: `EAGAIN` if it takes nothing.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let Some(pipes) = &mut self.pipes else { return Ok(0) };
        if pipes.payload_len > 0 {
            match move_pages(&pipes.payload.reader, &pipes.frame.writer, pipes.payload_len) {
                Ok(count) => {
                    pipes.payload_len -= count;
                    pipes.frame_len += count;
                }
                // All buffers of the pipe are in use: some have to be sent first.
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        let sent = move_pages(&pipes.frame.reader, socket, pipes.frame_len)?;
        pipes.frame_len -= sent;
        Ok(sent)
    }
}

fn move_pages(from: impl AsFd, to: impl AsFd, max: usize) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| splice(&from, None, &to, None, max, SpliceFlags::NONBLOCK))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pipe() -> (OwnedFd, std::fs::File) {
        let Pipe { reader, writer } = Pipe::new().unwrap();
        (reader, writer.into())
    }

    fn open_splicer() -> Splicer {
        let mut splicer = Splicer::new(true);
        assert!(splicer.open_pipes());
        splicer
    }

    #[test]
    fn spliced_frame_is_header_and_pipe_content() {
        let (output, mut input) = pipe();
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let mut splicer = open_splicer();
        assert_eq!(splicer.take_frame(&output, MAX_SPLICE, |_| unreachable!()), Err(Errno::AGAIN));

        let text: Vec<u8> = (0..60_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        input.write_all(&text).unwrap();
        let mut lengths = Vec::new();
        let mut received = Vec::new();
        for most in [50_000, MAX_SPLICE] {
            let count = splicer.take_frame(&output, most, |count| {
                lengths.push(count);
                *b"headhead"
            });
            assert_eq!(count, Ok(*lengths.last().unwrap()));
            while !splicer.is_empty() {
                let sent = splicer.send(socket.as_fd()).unwrap();
                let mut bytes = vec![0; sent];
                peer.read_exact(&mut bytes).unwrap();
                received.extend(bytes);
            }
        }
        assert_eq!(lengths, [50_000, 10_000]);
        let expected = [&b"headhead"[..], &text[..50_000], b"headhead", &text[50_000..]].concat();
        assert!(received == expected);

        drop(input);
        assert_eq!(splicer.take_frame(&output, MAX_SPLICE, |_| unreachable!()), Ok(0));
    }

    #[test]
    fn small_buffers_are_spliced_to_a_full_socket() {
        let (output, input) = pipe();
        // In packet mode each write takes a page of the pipe.
        let packets = rustix::fs::fcntl_getfl(&input).unwrap() | rustix::fs::OFlags::DIRECT;
        rustix::fs::fcntl_setfl(&input, packets).unwrap();
        for _ in 0..16 {
            rustix::io::write(&input, b"12345").unwrap();
        }
        let (socket, mut peer) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        while rustix::io::write(&socket, &[0; 4096]).is_ok() {}
        let mut splicer = open_splicer();
        assert_eq!(splicer.take_frame(&output, MAX_SPLICE, |_| *b"headhead"), Ok(80));
        assert_eq!(splicer.send(socket.as_fd()), Err(Errno::AGAIN));
        assert!(!splicer.is_empty());

        peer.set_nonblocking(true).unwrap();
        let mut received = Vec::new();
        while !splicer.is_empty() {
            let _ = peer.read_to_end(&mut received);
            let _ = splicer.send(socket.as_fd());
        }
        let _ = peer.read_to_end(&mut received);
        let expected = [&b"headhead"[..], &b"12345".repeat(16)].concat();
        assert!(received.ends_with(&expected));
    }
}
