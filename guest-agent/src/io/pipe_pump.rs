//! Pumps between a pipe and a stream, one for each direction.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use chitin_protocol::{Connection, Guest, MAX_DATA, StreamId};
use rustix::io::Errno;

use super::pump::{Buffers, Progress};
use super::splicer::MIN_SPLICE;

/// The number of frames that are spliced after a large one.
const FRAMES_TO_SPLICE: u8 = 4;

/// Moves bytes from a pipe to a stream: standard output and error, and trees that are copied out.
pub struct PipeToStream {
    pipe: OwnedFd,
    ready: bool,
    /// The number of next frames that are spliced, whatever their size: a writer that fills a pipe
    /// leaves little in it between two reads.
    frames_to_splice: u8,
    /// The number of bytes still to move. Known only once the process has ended.
    remaining: Option<u64>,
}

impl PipeToStream {
    pub fn new(pipe: OwnedFd) -> PipeToStream {
        PipeToStream { pipe, ready: true, frames_to_splice: 0, remaining: None }
    }

    pub fn wake(&mut self) {
        self.ready = true;
    }

    /// Bounds the output after its process has ended: the bytes that the pipe holds now are the
    /// last ones that count, even if another process has the pipe open.
    pub fn drain(&mut self) {
        self.remaining = Some(rustix::io::ioctl_fionread(&self.pipe).unwrap_or(0));
        self.ready = true;
    }

    /// Moves one frame at most, so that pumps take turns.
    pub fn step(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        buffers: &mut Buffers,
    ) -> Progress {
        let remaining =
            self.remaining.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        let room = connection.send_capacity(stream).min(MAX_DATA);
        // An end needs no credit, so it is sent even if no data could be.
        if remaining == 0 {
            connection.end_stream(stream);
            return Progress::Finished;
        }
        if !self.ready || room == 0 {
            return Progress::Waiting;
        }
        match self.move_frame(connection, stream, room.min(remaining), buffers) {
            Ok(0) => {
                connection.end_stream(stream);
                Progress::Finished
            }
            Ok(count) => {
                self.frames_to_splice = if count >= MIN_SPLICE {
                    FRAMES_TO_SPLICE
                } else {
                    self.frames_to_splice.saturating_sub(1)
                };
                self.remaining = self.remaining.map(|left| left.saturating_sub(count as u64));
                Progress::Moved
            }
            Err(Errno::INTR) => Progress::Moved,
            Err(Errno::AGAIN) if self.remaining.is_none() => {
                self.ready = false;
                Progress::Waiting
            }
            // A pipe that holds less than it reported was read by another process of the workload,
            // which is the workload's own affair.
            Err(_) => {
                connection.end_stream(stream);
                Progress::Finished
            }
        }
    }

    /// Moves a frame out of the pipe, and returns its length; 0 at the end of the pipe.
    fn move_frame(
        &self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        max: usize,
        buffers: &mut Buffers,
    ) -> Result<usize, Errno> {
        // A spliced frame is sent before all queued output, so nothing may be queued yet.
        let splicer = &mut buffers.splicer;
        if self.frames_to_splice > 0
            && splicer.is_empty()
            && connection.pending_output().is_empty()
            && splicer.open_pipes()
        {
            return splicer
                .take_frame(&self.pipe, max, |count| connection.begin_data_frame(stream, count));
        }
        let count = rustix::io::read(&self.pipe, &mut buffers.scratch[..max])?;
        connection.send_data(stream, &buffers.scratch[..count]);
        Ok(count)
    }
}

/// Moves bytes from a stream to a pipe: standard input, and trees that are copied in. Bytes that
/// the pipe does not take wait here. Their number is bounded by the stream's window, because credit
/// is returned only for bytes that have left.
pub struct StreamToPipe {
    pipe: OwnedFd,
    ready: bool,
    waiting: VecDeque<u8>,
    /// The host has sent its last byte.
    ended: bool,
    /// The pipe has no reader any more.
    broken: bool,
}

impl StreamToPipe {
    pub fn new(pipe: OwnedFd) -> StreamToPipe {
        StreamToPipe { pipe, ready: true, waiting: VecDeque::new(), ended: false, broken: false }
    }

    /// Records that the pipe can be written, or, with `broken`, that it has no reader any more.
    pub fn wake(&mut self, broken: bool) {
        self.broken |= broken;
        self.ready = !self.broken;
    }

    /// Accepts bytes of the stream, and returns how many have reached the pipe already.
    pub fn accept_data(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while self.waiting.is_empty() && self.ready && written < bytes.len() {
            let outcome = rustix::io::write(&self.pipe, &bytes[written..]);
            written += self.record_write(outcome);
        }
        self.waiting.extend(&bytes[written..]);
        written
    }

    /// Records that the host has sent its last byte.
    pub fn accept_end(&mut self) {
        self.ended = true;
    }

    /// Writes the bytes that wait.
    pub fn step(&mut self, connection: &mut Connection<Guest>, stream: StreamId) -> Progress {
        let mut moved = 0;
        while self.ready && !self.waiting.is_empty() {
            let outcome = rustix::io::write(&self.pipe, self.waiting.as_slices().0);
            let count = self.record_write(outcome);
            self.waiting.drain(..count);
            moved += count;
        }
        connection.return_credit(stream, moved);
        if self.broken {
            connection.reset_stream(stream);
            return Progress::Finished;
        }
        if self.ended && self.waiting.is_empty() {
            return Progress::Finished;
        }
        if moved > 0 { Progress::Moved } else { Progress::Waiting }
    }

    /// Records the outcome of a write, and returns the number of bytes written.
    fn record_write(&mut self, outcome: Result<usize, Errno>) -> usize {
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
