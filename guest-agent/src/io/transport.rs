//! The channel to the host, the protocol connection on it, and the pumps of its streams.
//!
//! Memory is bounded by what the connection allows: no pump reads while its output waits.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use chitin_protocol::{Connection, Event, Fault, Guest, StreamId, ToGuest, ToHost};
use rustix::io::Errno;

use super::channel::Channel;
use super::pipe_pump::{PipeToStream, StreamToPipe};
use super::poll::{EventFlags, Poll, Token};
use super::pump::{Buffers, Progress, Pump};
use super::socket_pump::SocketPump;
use super::splicer::Splicer;
use super::vsock::UnconnectedSocket;
use crate::error::{Context, SystemError};
use crate::{log_line, read_boottime_ns};

pub struct Transport {
    pub poll: Poll,
    pub connection: Connection<Guest>,
    pub buffers: Buffers,
    channel: Channel,
    /// Reading the channel may return bytes.
    readable: bool,
    /// The channel may take bytes.
    writable: bool,
    pumps: BTreeMap<StreamId, Pump>,
    /// The stream whose pump is stepped first in the next turn.
    first_stream: StreamId,
}

impl Transport {
    /// Watches the channel. `connection` is the one that [`send_ready`] has made on it.
    pub fn new(channel: Channel, connection: Connection<Guest>) -> Result<Transport, SystemError> {
        // The channel of a container does not take pages.
        let splicer = Splicer::new(matches!(channel, Channel::Vsock(_)));
        let poll = Poll::new()?;
        channel.watch(&poll)?;
        Ok(Transport {
            poll,
            connection,
            buffers: Buffers::new(splicer),
            channel,
            readable: true,
            writable: true,
            pumps: BTreeMap::new(),
            first_stream: 0,
        })
    }

    /// Drops everything on the channel, and continues on another one, on which it reports that the
    /// agent is ready. Waits for the host's answer without a limit.
    pub fn reconnect(&mut self, socket: UnconnectedSocket) -> Result<(), SystemError> {
        self.pumps.clear();
        // The host takes one connection at a time: the old one ends before the new one begins.
        self.channel.shut_down()?;
        self.channel = Channel::Vsock(socket.start_connect()?);
        self.channel.await_connection(None)?;
        self.connection = send_ready(&self.channel, read_boottime_ns());
        self.channel.watch(&self.poll)?;
        (self.readable, self.writable) = (true, true);
        Ok(())
    }

    /// Records an event of the channel's input, or of both directions if one descriptor serves
    /// both.
    pub fn wake_input(&mut self, flags: EventFlags) {
        let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        self.readable |= broken || flags.contains(EventFlags::IN);
        self.writable |= broken || flags.contains(EventFlags::OUT);
    }

    /// Records an event of the channel's output.
    pub fn wake_output(&mut self) {
        self.writable = true;
    }

    /// Records an event of a pump's descriptor.
    pub fn wake_pump(&mut self, stream: StreamId, flags: EventFlags) {
        // The pump may have been dropped while an earlier event of the same batch was handled.
        if let Some(pump) = self.pumps.get_mut(&stream) {
            pump.wake(flags);
        }
    }

    /// Reads once from the channel, and returns whether anything may have arrived. Breaks when the
    /// channel has ended.
    pub fn read(&mut self) -> Result<ControlFlow<(), bool>, SystemError> {
        if !self.readable {
            return Ok(ControlFlow::Continue(false));
        }
        match rustix::io::read(self.channel.input(), self.connection.input_buffer()) {
            Ok(0) => Ok(ControlFlow::Break(())),
            Ok(count) => {
                self.connection.commit_input(count);
                Ok(ControlFlow::Continue(true))
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(ControlFlow::Continue(false))
            }
            Err(Errno::INTR) => Ok(ControlFlow::Continue(true)),
            // An end in any form is an end.
            Err(Errno::CONNRESET | Errno::PIPE) => Ok(ControlFlow::Break(())),
            Err(errno) => Err(errno).context("read", "the channel"),
        }
    }

    /// Delivers received data to the pumps until a message arrives, and returns it; `None` when all
    /// that was read has been handled.
    pub fn next_message(&mut self) -> Result<Option<ToGuest>, Fault> {
        while let Some(event) = self.connection.next_event()? {
            match event {
                Event::Established { .. } | Event::Credit { .. } => {}
                Event::Message(message) => return Ok(Some(message)),
                Event::Data { stream, bytes } => {
                    let accepted = match self.pumps.get_mut(&stream) {
                        Some(pump) => pump.accept_data(bytes),
                        // The pump is gone, and the reset of the stream is under way.
                        None => bytes.len(),
                    };
                    self.connection.return_credit(stream, accepted);
                }
                Event::End { stream } => {
                    if let Some(pump) = self.pumps.get_mut(&stream) {
                        pump.accept_end();
                    }
                }
                Event::Reset { stream } => self.drop_pump(stream),
            }
        }
        Ok(None)
    }

    /// Steps each pump once, and returns whether anything moved. Each turn begins with another
    /// pump, because output room is shared and the first one to ask gets it.
    pub fn step_pumps(&mut self) -> bool {
        let mut moved = false;
        let order: Vec<StreamId> = self
            .pumps
            .range(self.first_stream..)
            .chain(self.pumps.range(..self.first_stream))
            .map(|(stream, _)| *stream)
            .collect();
        self.first_stream = order.get(1).copied().unwrap_or(0);
        for stream in order {
            let progress = match self.pumps.get_mut(&stream) {
                Some(pump) => pump.step(&mut self.connection, stream, &mut self.buffers),
                None => Progress::Waiting,
            };
            moved |= progress != Progress::Waiting;
            if progress == Progress::Finished {
                self.pumps.remove(&stream);
            }
        }
        moved
    }

    /// Writes to the channel as much as it takes, and returns whether anything was written.
    pub fn write(&mut self) -> Result<bool, SystemError> {
        let mut moved = false;
        while self.writable {
            let channel = self.channel.output();
            let outcome = if !self.buffers.splicer.is_empty() {
                // The spliced frame precedes all output that was queued since.
                self.buffers.splicer.send(channel)
            } else if self.connection.pending_output().is_empty() {
                break;
            } else {
                rustix::io::write(channel, self.connection.pending_output())
                    .inspect(|count| self.connection.consume_output(*count))
            };
            match outcome {
                Ok(_) => moved = true,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // Reading reports the end as well, after it has returned all that has arrived.
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    self.writable = false;
                    self.readable = true;
                    moved = true;
                }
                Err(errno) => return Err(errno).context("write", "the channel"),
            }
        }
        Ok(moved)
    }

    /// Returns whether all output has been written to the channel.
    pub fn is_flushed(&self) -> bool {
        self.connection.pending_output().is_empty() && self.buffers.splicer.is_empty()
    }

    /// Queues a message to the host.
    pub fn send(&mut self, message: &ToHost) {
        // No message of the agent comes near the limit: see `make_failure`.
        if let Err(error) = self.connection.send_message(message) {
            log_line(error);
        }
    }

    /// Pumps the data of `stream` into `pipe`.
    pub fn pump_to_pipe(&mut self, stream: StreamId, pipe: OwnedFd) -> Result<(), Errno> {
        self.watch_pipe(stream, &pipe, EventFlags::OUT)?;
        self.pumps.insert(stream, Pump::StreamToPipe(StreamToPipe::new(pipe)));
        Ok(())
    }

    /// Pumps the content of `pipe` to `stream`.
    pub fn pump_from_pipe(&mut self, stream: StreamId, pipe: OwnedFd) -> Result<(), Errno> {
        self.watch_pipe(stream, &pipe, EventFlags::IN)?;
        self.pumps.insert(stream, Pump::PipeToStream(PipeToStream::new(pipe)));
        Ok(())
    }

    /// Pumps the data of `stream` to a socket, and the data of the socket back.
    pub fn pump_socket(&mut self, stream: StreamId, pump: SocketPump) -> Result<(), Errno> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        self.poll.add(pump.socket(), Token::Pump(stream), flags)?;
        self.pumps.insert(stream, Pump::Socket(pump));
        Ok(())
    }

    /// Makes the agent's end of a pipe non-blocking and watches it. The other end, which belongs to
    /// another process or thread, stays blocking.
    fn watch_pipe(
        &self,
        stream: StreamId,
        pipe: &OwnedFd,
        interest: EventFlags,
    ) -> Result<(), Errno> {
        rustix::io::ioctl_fionbio(pipe, true)?;
        self.poll.add(pipe, Token::Pump(stream), interest | EventFlags::ET)
    }

    pub fn has_pump(&self, stream: StreamId) -> bool {
        self.pumps.contains_key(&stream)
    }

    pub fn drop_pump(&mut self, stream: StreamId) {
        self.pumps.remove(&stream);
    }

    /// Bounds the output on `stream`, whose process has ended: see [`PipeToStream::drain`].
    pub fn drain_output(&mut self, stream: StreamId) {
        if let Some(Pump::PipeToStream(pump)) = self.pumps.get_mut(&stream) {
            pump.drain();
        }
    }
}

/// Makes a connection and reports on it that the agent is ready. Output that the channel does not
/// take at once follows in the event loop.
pub fn send_ready(channel: &Channel, started_ns: u64) -> Connection<Guest> {
    let mut connection = Connection::new();
    let ready = ToHost::Ready { started_ns, ready_ns: read_boottime_ns() };
    if let Err(error) = connection.send_message(&ready) {
        log_line(error);
    }
    if let Ok(count) = rustix::io::write(channel.output(), connection.pending_output()) {
        connection.consume_output(count);
    }
    connection
}
