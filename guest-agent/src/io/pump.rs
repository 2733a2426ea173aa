//! Pumps move bytes between a stream of the connection and a pipe or a socket, as fast as credit
//! and the descriptor allow, and never block. Their descriptors are registered edge-triggered with
//! epoll: a pump remembers what the last attempt and the last event said.

use chitin_protocol::{Connection, Guest, MAX_DATA, StreamId};

use super::pipe_pump::{PipeToStream, StreamToPipe};
use super::poll::EventFlags;
use super::socket_pump::SocketPump;
use super::splicer::Splicer;

/// The outcome of one step of a pump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing can be done now. An event, credit or room in the connection will change that.
    Waiting,
    /// Bytes have moved, and more might.
    Moved,
    /// Nothing is left to do, and the pump can be dropped.
    Finished,
}

/// Buffers that all pumps share.
pub struct Buffers {
    /// Room for the data of a frame, [`MAX_DATA`] bytes.
    pub scratch: Box<[u8]>,
    pub splicer: Splicer,
}

impl Buffers {
    pub fn new(splicer: Splicer) -> Buffers {
        Buffers { scratch: vec![0; MAX_DATA].into_boxed_slice(), splicer }
    }
}

/// The pump of one stream.
pub enum Pump {
    PipeToStream(PipeToStream),
    StreamToPipe(StreamToPipe),
    /// Both directions of a TCP socket.
    Socket(SocketPump),
}

impl Pump {
    /// Records an event of the pump's descriptor.
    pub fn wake(&mut self, flags: EventFlags) {
        let has_error = flags.contains(EventFlags::ERR);
        match self {
            Pump::PipeToStream(pump) => pump.wake(),
            Pump::StreamToPipe(pump) => pump.wake(has_error),
            Pump::Socket(pump) => pump.wake(
                flags.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP),
                flags.contains(EventFlags::OUT),
                has_error,
            ),
        }
    }

    /// Moves one frame at most to the connection, so that pumps take turns.
    pub fn step(
        &mut self,
        connection: &mut Connection<Guest>,
        stream: StreamId,
        buffers: &mut Buffers,
    ) -> Progress {
        match self {
            Pump::PipeToStream(pump) => pump.step(connection, stream, buffers),
            Pump::StreamToPipe(pump) => pump.step(connection, stream),
            Pump::Socket(pump) => pump.step(connection, stream, &mut buffers.scratch),
        }
    }

    /// Accepts bytes of the stream, and returns how many have reached the descriptor already.
    pub fn accept_data(&mut self, bytes: &[u8]) -> usize {
        match self {
            Pump::StreamToPipe(pump) => pump.accept_data(bytes),
            Pump::Socket(pump) => pump.accept_data(bytes),
            Pump::PipeToStream(_) => bytes.len(),
        }
    }

    /// Records that the host has sent its last byte.
    pub fn accept_end(&mut self) {
        match self {
            Pump::StreamToPipe(pump) => pump.accept_end(),
            Pump::Socket(pump) => pump.accept_end(),
            Pump::PipeToStream(_) => {}
        }
    }
}
