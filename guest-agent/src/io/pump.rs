//! Pumps move bytes between a stream of the connection and a pipe, as fast as credit and the pipe allow, and never
//! block. They are registered edge-triggered with epoll: `ready` is what the last attempt and the last event said.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use chitin_protocol::{Connection, Guest, MAX_DATA, StreamId};
use rustix::io::Errno;

use super::socket_pump::Link;
use super::splicer::{Splicer, WORTH_SPLICING};

/// Frames that are spliced after a large one.
const FRAMES_TO_SPLICE: u8 = 4;

/// What a step of a pump came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done for now: an event, credit or room in the connection will change that.
    Waiting,
    /// Bytes have moved, and more might.
    Moved,
    /// All is done; the pump can be dropped.
    Finished,
}

/// What all pumps share.
pub struct Buffers {
    /// Room for a frame, of [`MAX_DATA`] bytes.
    pub scratch: Box<[u8]>,
    /// Where the channel can be spliced to.
    pub splicer: Option<Splicer>,
}

/// From a pipe to a stream: standard output and error, and files on their way out.
pub struct Outflow {
    pipe: OwnedFd,
    ready: bool,
    /// How many of the next frames are spliced, whatever they hold: one that fills a pipe leaves little behind in between.
    to_splice: u8,
    /// How many more bytes there are to move: known only once the process that was waited for has ended.
    left: Option<u64>,
}

impl Outflow {
    pub fn new(pipe: OwnedFd) -> Outflow {
        Outflow { pipe, ready: true, to_splice: 0, left: None }
    }

    pub fn wake(&mut self) {
        self.ready = true;
    }

    /// The process is gone: what the pipe holds now is the last that counts, whoever else has it open.
    pub fn drain(&mut self) {
        self.left = Some(rustix::io::ioctl_fionread(&self.pipe).unwrap_or(0));
        self.ready = true;
    }

    /// Moves one frame at most, so that pumps take turns.
    pub fn step(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        buffers: &mut Buffers,
    ) -> Step {
        let left = self.left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        let room = connection.send_capacity(stream).min(MAX_DATA);
        // An end needs no credit, so it is looked for even if nothing could be sent.
        if left == 0 {
            connection.end_stream(stream);
            return Step::Finished;
        }
        if !self.ready || room == 0 {
            return Step::Waiting;
        }
        match self.take(connection, stream, room.min(left), buffers) {
            Ok(0) => {
                connection.end_stream(stream);
                Step::Finished
            }
            Ok(count) => {
                self.to_splice = if count >= WORTH_SPLICING {
                    FRAMES_TO_SPLICE
                } else {
                    self.to_splice.saturating_sub(1)
                };
                self.left = self.left.map(|left| left.saturating_sub(count as u64));
                Step::Moved
            }
            Err(Errno::INTR) => Step::Moved,
            Err(Errno::AGAIN) if self.left.is_none() => {
                self.ready = false;
                Step::Waiting
            }
            // A pipe that has less than it said was read by somebody else: that is the workload's affair.
            Err(_) => {
                connection.end_stream(stream);
                Step::Finished
            }
        }
    }

    /// Takes a frame out of the pipe; 0 at its end.
    fn take(
        &self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        most: usize,
        buffers: &mut Buffers,
    ) -> Result<usize, Errno> {
        // A frame that is spliced goes first, so that nothing may wait before it.
        if let Some(splicer) = &mut buffers.splicer
            && self.to_splice > 0
            && splicer.is_empty()
            && connection.pending_output().is_empty()
            && splicer.open()
        {
            return splicer
                .take(&self.pipe, most, |count| connection.begin_data_frame(stream, count));
        }
        let count = rustix::io::read(&self.pipe, &mut buffers.scratch[..most])?;
        connection.send_data(stream, &buffers.scratch[..count]);
        Ok(count)
    }
}

/// From a stream to a pipe: standard input, and files on their way in. What the pipe does not take waits here,
/// bounded by the stream's window, because credit is returned only for what has left.
pub struct Inflow {
    pipe: OwnedFd,
    ready: bool,
    waiting: VecDeque<u8>,
    ended: bool,
    broken: bool,
}

impl Inflow {
    pub fn new(pipe: OwnedFd) -> Inflow {
        Inflow { pipe, ready: true, waiting: VecDeque::new(), ended: false, broken: false }
    }

    /// The pipe can be written, or, with `broken`, nobody reads it any more.
    pub fn wake(&mut self, broken: bool) {
        self.broken |= broken;
        self.ready = !self.broken;
    }

    /// Takes bytes of the stream over and says how many have left for the pipe already.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while self.waiting.is_empty() && self.ready && written < bytes.len() {
            let outcome = rustix::io::write(&self.pipe, &bytes[written..]);
            written += self.note(outcome);
        }
        self.waiting.extend(&bytes[written..]);
        written
    }

    /// The peer has sent its last byte.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Writes what waits.
    pub fn step(&mut self, connection: &mut Connection<Guest>, stream: StreamId) -> Step {
        let mut moved = 0;
        while self.ready && !self.waiting.is_empty() {
            let outcome = rustix::io::write(&self.pipe, self.waiting.as_slices().0);
            let count = self.note(outcome);
            self.waiting.drain(..count);
            moved += count;
        }
        connection.return_credit(stream, moved);
        if self.broken {
            connection.reset_stream(stream);
            return Step::Finished;
        }
        if self.ended && self.waiting.is_empty() {
            return Step::Finished;
        }
        if moved > 0 { Step::Moved } else { Step::Waiting }
    }

    /// Takes note of what a write came to, and gives the number of bytes.
    fn note(&mut self, outcome: Result<usize, Errno>) -> usize {
        match outcome {
            Ok(count) => return count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.ready = false,
            Err(_) => {
                self.broken = true;
                self.ready = false;
            }
        }
        0
    }
}

/// Either direction, or both.
pub enum Pump {
    Out(Outflow),
    In(Inflow),
    /// Both, on a socket.
    Link(Link),
}
