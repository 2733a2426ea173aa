//! Large output on its way to the channel as the pages that the workload wrote, without a copy of ours.
//!
//! ```text
//!   workload's pipe ──splice──▶ taken ──splice──▶ framed ──splice──▶ vsock
//!                                 how many?         header
//! ```
//!
//! A frame begins with its length, which is known only once the pages are out of a pipe that others can read too: hence two pipes.

use std::os::fd::{BorrowedFd, OwnedFd};

use chitin_protocol::HEADER_LEN;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, splice};

/// The kernel sends sixteen pieces of a pipe as one packet (`splice_to_socket`), of which the header is one.
pub const MAX_SPLICE: usize = 15 * 4096;

/// Bytes of a frame from which on the next ones are spliced: for less, four calls take longer than two copies.
pub const WORTH_SPLICING: usize = 16 * 1024;

struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
}

impl Pipe {
    fn new() -> Result<Pipe, Errno> {
        let (output, input) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Pipe { output, input })
    }
}

/// One frame at a time, header first.
#[derive(Default)]
pub struct Splicer {
    pipes: Option<Pipes>,
}

struct Pipes {
    taken: Pipe,
    framed: Pipe,
    /// Bytes in either.
    in_taken: usize,
    in_framed: usize,
}

impl Splicer {
    /// Makes the pipes when they are needed first. Returns whether there are any.
    pub fn open(&mut self) -> bool {
        if self.pipes.is_none()
            && let (Ok(taken), Ok(framed)) = (Pipe::new(), Pipe::new())
        {
            self.pipes = Some(Pipes { taken, framed, in_taken: 0, in_framed: 0 });
        }
        self.pipes.is_some()
    }

    /// Whether all of the last frame has been sent.
    pub fn is_empty(&self) -> bool {
        self.pipes.as_ref().is_none_or(|pipes| pipes.in_taken + pipes.in_framed == 0)
    }

    /// Takes up to `most` bytes, at most [`MAX_SPLICE`], off a pipe, and puts the header that `header` makes for them in front.
    /// Only when the last frame is gone. Returns how many bytes those are; 0 at the end of the pipe.
    ///
    /// # Errors
    /// `EAGAIN`: the pipe has nothing for now. Others lose what was taken.
    pub fn take(
        &mut self,
        pipe: &OwnedFd,
        most: usize,
        header: impl FnOnce(usize) -> [u8; HEADER_LEN],
    ) -> Result<usize, Errno> {
        debug_assert!(self.is_empty());
        let Some(pipes) = &mut self.pipes else { return Err(Errno::AGAIN) };
        let count = move_pages(pipe, &pipes.taken.input, most.min(MAX_SPLICE))?;
        if count > 0 {
            match rustix::io::write(&pipes.framed.input, &header(count)) {
                Ok(written) => (pipes.in_taken, pipes.in_framed) = (count, written),
                // No memory: payload without a header must not follow.
                Err(errno) => {
                    self.pipes = None;
                    return Err(errno);
                }
            }
        }
        Ok(count)
    }

    /// Sends what the socket takes. Returns how much that was.
    ///
    /// # Errors
    /// The socket's: `EAGAIN` if it takes nothing.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let Some(pipes) = &mut self.pipes else { return Ok(0) };
        if pipes.in_taken > 0 {
            match move_pages(&pipes.taken.output, &pipes.framed.input, pipes.in_taken) {
                Ok(count) => {
                    pipes.in_taken -= count;
                    pipes.in_framed += count;
                }
                // Full of pieces: some have to go first.
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        let sent = move_pages(&pipes.framed.output, socket, pipes.in_framed)?;
        pipes.in_framed -= sent;
        Ok(sent)
    }
}

fn move_pages(
    from: impl std::os::fd::AsFd,
    to: impl std::os::fd::AsFd,
    most: usize,
) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| splice(&from, None, &to, None, most, SpliceFlags::NONBLOCK))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pipe() -> (OwnedFd, std::fs::File) {
        let Pipe { output, input } = Pipe::new().unwrap();
        (output, input.into())
    }

    fn opened() -> Splicer {
        let mut splicer = Splicer::default();
        assert!(splicer.open());
        splicer
    }

    #[test]
    fn a_frame_is_a_header_and_what_was_in_the_pipe() {
        let (output, mut input) = pipe();
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let mut splicer = opened();
        assert_eq!(splicer.take(&output, MAX_SPLICE, |_| unreachable!()), Err(Errno::AGAIN));

        let text: Vec<u8> = (0..60_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        input.write_all(&text).unwrap();
        let mut lengths = Vec::new();
        let mut received = Vec::new();
        for most in [50_000, MAX_SPLICE] {
            let count = splicer.take(&output, most, |count| {
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
        assert_eq!(splicer.take(&output, MAX_SPLICE, |_| unreachable!()), Ok(0));
    }

    #[test]
    fn many_small_pieces_go_as_well_and_a_full_socket_is_waited_for() {
        let (output, input) = pipe();
        // Each write keeps a page of its own.
        let packets = rustix::fs::fcntl_getfl(&input).unwrap() | rustix::fs::OFlags::DIRECT;
        rustix::fs::fcntl_setfl(&input, packets).unwrap();
        for _ in 0..16 {
            rustix::io::write(&input, b"12345").unwrap();
        }
        let (socket, mut peer) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        while rustix::io::write(&socket, &[0; 4096]).is_ok() {}
        let mut splicer = opened();
        assert_eq!(splicer.take(&output, MAX_SPLICE, |_| *b"headhead"), Ok(80));
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
