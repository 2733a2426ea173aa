//! One side of the channel, without I/O.
//!
//! ```text
//!                 hello read                peer breaks a rule
//!   Greeting ───────────────▶ Established ───────────────────▶ (Fault: drop the connection)
//!
//!   a stream, each half on its own:
//!   open ──data*──▶ end sent / end read ──▶ closed         reset, from either side, closes both halves
//! ```
//!
//! Bytes from the peer go in at [`Connection::input_buffer`]/[`Connection::commit_input`] and come out as [`Event`]s; bytes
//! for the peer wait in [`Connection::pending_output`]. Control messages name the streams they open, and the layer
//! above opens them ([`Connection::accept_stream`]) while it handles the message, so the multiplexer needs no frame
//! for it and a data frame can never overtake its stream.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::{Serialize, de::DeserializeOwned};
use zeroize::Zeroize;

use crate::frame::{HEADER_LEN, HELLO_LEN, Header, Kind, MAGIC, MAX_DATA};
use crate::{Fault, MAX_DIALS, MAX_STREAMS, StreamId, ToGuest, ToHost, VERSION, WINDOW};

/// What is read into as long as all that comes are short messages: most commands need no more, and a buffer is cleared first.
const FEW_MESSAGES: usize = 4096;

/// Above this much unsent output no more stream data is taken: enough for four full frames in flight.
const OUTPUT_HIGH_WATER: usize = 4 * WHOLE_FRAME;

/// The longest data frame.
const WHOLE_FRAME: usize = HEADER_LEN + MAX_DATA;

/// An honest peer reads its answers; one that lets this much of them pile up is attacking memory.
const OUTPUT_LIMIT: usize = 4 * 1024 * 1024;

/// Credit is returned in halves of a window: often enough that the sender never stalls, seldom enough to be cheap.
const CREDIT_STEP: u32 = WINDOW / 2;

/// Which side this is: fixes the direction of messages and the parity of stream ids.
pub trait Role {
    /// What this side sends.
    type Send: Serialize;
    /// What this side receives.
    type Receive: DeserializeOwned;
    /// The parity of the ids this side opens.
    const OPENS_ODD: bool;
}

/// The host's side.
#[derive(Debug)]
pub enum Host {}

/// The agent's side.
#[derive(Debug)]
pub enum Guest {}

impl Role for Host {
    type Send = ToGuest;
    type Receive = ToHost;
    const OPENS_ODD: bool = false;
}

impl Role for Guest {
    type Send = ToHost;
    type Receive = ToGuest;
    const OPENS_ODD: bool = true;
}

/// What the peer did.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a, M> {
    /// The hello was read; `version` is what both sides speak now.
    Established {
        /// The lower of both versions.
        version: u32,
    },
    /// A control message. Open the streams it names before asking for the next event.
    Message(M),
    /// Bytes of a stream. Give them back as credit with [`Connection::return_credit`] once they have left this side.
    Data {
        /// The stream.
        stream: StreamId,
        /// At least one byte, at most [`MAX_DATA`].
        bytes: &'a [u8],
    },
    /// The peer has sent its last byte on the stream.
    End {
        /// The stream.
        stream: StreamId,
    },
    /// The peer wants nothing more of the stream, in either direction.
    Reset {
        /// The stream.
        stream: StreamId,
    },
    /// The peer granted credit: a sender that was stopped may go on.
    Credit {
        /// The stream.
        stream: StreamId,
    },
}

/// Which halves of a stream exist, seen from this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// This side sends.
    Send,
    /// This side receives.
    Receive,
    /// Both.
    Both,
}

#[derive(Debug)]
struct Stream {
    /// Bytes this side may still send; `None` once it has ended its half.
    send: Option<u32>,
    /// The receiving half; `None` once the peer has ended it.
    receive: Option<Window>,
}

#[derive(Debug)]
struct Window {
    /// Bytes the peer may still send.
    left: u32,
    /// Bytes consumed here and not yet granted again.
    ungranted: u32,
}

/// One side of a channel. See the module's documentation for how it is driven.
#[derive(Debug)]
pub struct Connection<R> {
    established: bool,
    input: Vec<u8>,
    /// `input[parsed..received]` has been received and not parsed.
    parsed: usize,
    received: usize,
    output: Vec<u8>,
    /// `output[..sent]` has been written.
    sent: usize,
    /// Where the last control message in `output` ends: up to there it is wiped, for there may be a secret in it.
    control_end: usize,
    streams: BTreeMap<StreamId, Stream>,
    /// The last id opened by this side and by the peer; ids only grow, so "late" and "never" can be told apart.
    last_own: StreamId,
    last_peer: StreamId,
    role: PhantomData<fn() -> R>,
}

impl<R: Role> Default for Connection<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Role> Connection<R> {
    /// A new connection, its own hello waiting in [`pending_output`](Self::pending_output).
    pub fn new() -> Self {
        let mut connection = Connection {
            established: false,
            input: Vec::new(),
            parsed: 0,
            received: 0,
            output: Vec::new(),
            sent: 0,
            control_end: 0,
            streams: BTreeMap::new(),
            last_own: u32::from(R::OPENS_ODD),
            last_peer: u32::from(!R::OPENS_ODD),
            role: PhantomData,
        };
        // Ids start at 2 and 3: 0 is the connection itself, and 1 is left out for symmetry.
        let mut hello = [0; HELLO_LEN];
        hello[..4].copy_from_slice(&MAGIC);
        hello[4..].copy_from_slice(&VERSION.to_le_bytes());
        connection.push(Kind::Hello, 0, &hello);
        connection
    }

    // ---- input

    /// Room for bytes from the peer; never empty. Say with [`commit_input`](Self::commit_input) how many came.
    pub fn input_buffer(&mut self) -> &mut [u8] {
        if self.parsed == self.received {
            self.parsed = 0;
            self.received = 0;
        }
        let mut wanted = self.wanted();
        if self.input.len() - self.parsed < wanted || self.received == self.input.len() {
            self.input.copy_within(self.parsed..self.received, 0);
            self.received -= self.parsed;
            self.parsed = 0;
            // Full of what nobody has asked for yet.
            if self.received >= FEW_MESSAGES && self.received == self.input.len() {
                wanted = wanted.max(WHOLE_FRAME);
            }
            // A frame may be larger than the buffer; its header has been checked by then.
            if self.input.len() < wanted {
                // Growing in place would write to every page of it, and could leave a part of a secret in freed memory.
                let mut roomier = vec![0; wanted];
                roomier[..self.received].copy_from_slice(&self.input[..self.received]);
                self.input[..self.received].zeroize();
                self.input = roomier;
            }
        }
        &mut self.input[self.received..]
    }

    /// The first `count` bytes of [`input_buffer`](Self::input_buffer) are from the peer.
    pub fn commit_input(&mut self, count: usize) {
        self.received = self.input.len().min(self.received + count);
    }

    /// The buffer that takes the frame now arriving; where that is more than a few messages, any data frame too.
    fn wanted(&self) -> usize {
        let announced =
            self.peek().ok().flatten().map_or(0, |header| HEADER_LEN + header.len as usize);
        if announced <= FEW_MESSAGES { FEW_MESSAGES } else { announced.max(WHOLE_FRAME) }
    }

    fn peek(&self) -> Result<Option<Header>, Fault> {
        match self.input[self.parsed..self.received].first_chunk::<HEADER_LEN>() {
            Some(bytes) => Header::decode(*bytes).map(Some),
            None => Ok(None),
        }
    }

    /// The next thing the peer did, or `None` when more input is needed.
    pub fn next_event(&mut self) -> Result<Option<Event<'_, R::Receive>>, Fault> {
        loop {
            if self.output.len() - self.sent > OUTPUT_LIMIT {
                return Err(Fault::UnreadBacklog { len: self.output.len() - self.sent });
            }
            // A bad kind in place of a hello is the more useful thing to report.
            if !self.established
                && let Some(&kind) = self.input[self.parsed..self.received].first()
                && kind != Kind::Hello as u8
            {
                return Err(Fault::MissingHello { kind });
            }
            let Some(header) = self.peek()? else { return Ok(None) };
            let start = self.parsed + HEADER_LEN;
            let end = start + header.len as usize;
            if end > self.received {
                return Ok(None);
            }
            self.parsed = end;
            let stream = header.stream;
            match header.kind {
                Kind::Hello => {
                    let version = self.read_hello(start)?;
                    return Ok(Some(Event::Established { version }));
                }
                Kind::Control => {
                    let payload = &mut self.input[start..end];
                    let message = match postcard::take_from_bytes(payload) {
                        Ok((message, [])) => message,
                        _ => return Err(Fault::InvalidMessage { len: header.len as usize }),
                    };
                    // It may have carried a secret.
                    payload.zeroize();
                    return Ok(Some(Event::Message(message)));
                }
                Kind::Data => {
                    if self.take_data(stream, header.len)? {
                        return Ok(Some(Event::Data { stream, bytes: &self.input[start..end] }));
                    }
                }
                Kind::Credit => {
                    let mut credit = [0; 4];
                    credit.copy_from_slice(&self.input[start..end]);
                    if self.take_credit(stream, u32::from_le_bytes(credit))? {
                        return Ok(Some(Event::Credit { stream }));
                    }
                }
                Kind::End => {
                    if self.take_end(stream)? {
                        return Ok(Some(Event::End { stream }));
                    }
                }
                Kind::Reset => {
                    self.live(stream, Kind::Reset)?;
                    if self.streams.remove(&stream).is_some() {
                        return Ok(Some(Event::Reset { stream }));
                    }
                }
            }
        }
    }

    fn read_hello(&mut self, start: usize) -> Result<u32, Fault> {
        if self.established {
            return Err(Fault::DuplicateHello);
        }
        let (magic, version) = self.input[start..start + HELLO_LEN].split_at(4);
        if magic != MAGIC {
            return Err(Fault::InvalidHello);
        }
        let mut bytes = [0; 4];
        bytes.copy_from_slice(version);
        let theirs = u32::from_le_bytes(bytes);
        if theirs == 0 {
            return Err(Fault::UnsupportedVersion { theirs, ours: VERSION });
        }
        self.established = true;
        Ok(theirs.min(VERSION))
    }

    /// The stream a frame names. `None` if it is closed already, which a peer may not know yet.
    fn live(&mut self, id: StreamId, kind: Kind) -> Result<Option<&mut Stream>, Fault> {
        let own = (id % 2 == 1) == R::OPENS_ODD;
        let last = if own { self.last_own } else { self.last_peer };
        if id < 2 || id > last {
            return Err(Fault::UnknownStream { kind: kind as u8, stream: id });
        }
        Ok(self.streams.get_mut(&id))
    }

    fn take_data(&mut self, id: StreamId, len: u32) -> Result<bool, Fault> {
        let Some(stream) = self.live(id, Kind::Data)? else { return Ok(false) };
        let Some(window) = &mut stream.receive else {
            return Err(Fault::DataAfterEnd { stream: id });
        };
        match window.left.checked_sub(len) {
            Some(left) => window.left = left,
            None => return Err(Fault::WindowExceeded { stream: id, len, window: window.left }),
        }
        Ok(true)
    }

    fn take_credit(&mut self, id: StreamId, credit: u32) -> Result<bool, Fault> {
        let Some(stream) = self.live(id, Kind::Credit)? else { return Ok(false) };
        // Credit may cross our end on the way: then it is of no use, and no offence.
        let Some(allowed) = &mut stream.send else { return Ok(false) };
        match allowed.checked_add(credit) {
            Some(sum) if sum <= WINDOW => *allowed = sum,
            _ => return Err(Fault::CreditOverflow { stream: id, credit }),
        }
        Ok(true)
    }

    fn take_end(&mut self, id: StreamId) -> Result<bool, Fault> {
        let Some(stream) = self.live(id, Kind::End)? else { return Ok(false) };
        if stream.receive.take().is_none() {
            return Err(Fault::DataAfterEnd { stream: id });
        }
        self.forget_if_closed(id);
        Ok(true)
    }

    fn forget_if_closed(&mut self, id: StreamId) {
        if self
            .streams
            .get(&id)
            .is_some_and(|stream| stream.send.is_none() && stream.receive.is_none())
        {
            self.streams.remove(&id);
        }
    }

    // ---- streams

    /// Opens a stream of this side's own, to be named in the control message sent next. `None` when there are as many
    /// as there may be: [`MAX_STREAMS`] of the host's, [`MAX_DIALS`] of the agent's.
    pub fn open_stream(&mut self, direction: Direction) -> Option<StreamId> {
        if !self.has_room(R::OPENS_ODD) {
            return None;
        }
        let id = self.last_own.checked_add(2)?;
        self.last_own = id;
        self.insert(id, direction);
        Some(id)
    }

    /// Opens a stream that a control message of the peer named.
    pub fn accept_stream(&mut self, id: StreamId, direction: Direction) -> Result<(), Fault> {
        let theirs = (id % 2 == 1) != R::OPENS_ODD;
        if !theirs || id <= self.last_peer {
            return Err(Fault::InvalidStreamId { stream: id });
        }
        if !self.has_room(!R::OPENS_ODD) {
            return Err(Fault::TooManyStreams);
        }
        self.last_peer = id;
        self.insert(id, direction);
        Ok(())
    }

    /// Whether [`open_stream`](Self::open_stream) would open one.
    pub fn can_open_stream(&self) -> bool {
        self.has_room(R::OPENS_ODD)
    }

    /// Whoever opens a stream has sent the ends of those before it first, so that both sides count the same.
    fn has_room(&self, odd: bool) -> bool {
        let limit = if odd { MAX_DIALS } else { MAX_STREAMS };
        self.streams.len() < limit
            || self.streams.keys().filter(|id| (*id % 2 == 1) == odd).count() < limit
    }

    fn insert(&mut self, id: StreamId, direction: Direction) {
        let send = (direction != Direction::Receive).then_some(WINDOW);
        let receive =
            (direction != Direction::Send).then_some(Window { left: WINDOW, ungranted: 0 });
        self.streams.insert(id, Stream { send, receive });
    }

    /// How many bytes [`send_data`](Self::send_data) would take now. 0 also for a stream that is closed.
    pub fn send_capacity(&self, id: StreamId) -> usize {
        let room = OUTPUT_HIGH_WATER.saturating_sub(self.output.len() - self.sent + HEADER_LEN);
        let credit = self.streams.get(&id).and_then(|stream| stream.send).unwrap_or(0);
        room.min(credit as usize)
    }

    /// Whether this side can still send on the stream: it has not ended it and the peer has not reset it.
    pub fn is_sending(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.send.is_some())
    }

    /// Queues as much of `bytes` as credit and buffers allow, and says how much that was.
    pub fn send_data(&mut self, id: StreamId, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let count = self.send_capacity(id).min(bytes.len() - taken).min(MAX_DATA);
            if count == 0 {
                break;
            }
            self.push(Kind::Data, id, &bytes[taken..taken + count]);
            self.spend(id, count);
            taken += count;
        }
        taken
    }

    /// The header of a data frame that the caller sends itself, and its payload of `count` bytes behind it, before all that is
    /// queued from now on: when [`pending_output`](Self::pending_output) is empty. `count` is at most [`send_capacity`](Self::send_capacity) and [`MAX_DATA`].
    pub fn begin_data_frame(&mut self, id: StreamId, count: usize) -> [u8; HEADER_LEN] {
        debug_assert!(
            self.pending_output().is_empty() && count <= self.send_capacity(id).min(MAX_DATA)
        );
        self.spend(id, count);
        Header { kind: Kind::Data, len: u32::try_from(count).unwrap_or(u32::MAX), stream: id }
            .encode()
    }

    /// Takes off the credit of a stream what is sent on it: what [`send_capacity`](Self::send_capacity) allows, which fits u32.
    fn spend(&mut self, id: StreamId, count: usize) {
        if let Some(credit) = self.streams.get_mut(&id).and_then(|stream| stream.send.as_mut()) {
            *credit = credit.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }

    /// Ends this side's half of the stream. Harmless if it has ended.
    pub fn end_stream(&mut self, id: StreamId) {
        let ended = self.streams.get_mut(&id).and_then(|stream| stream.send.take());
        if ended.is_some() {
            self.push(Kind::End, id, &[]);
            self.forget_if_closed(id);
        }
    }

    /// Drops the stream in both directions. Harmless if it is closed.
    pub fn reset_stream(&mut self, id: StreamId) {
        if self.streams.remove(&id).is_some() {
            self.push(Kind::Reset, id, &[]);
        }
    }

    /// `count` bytes received on the stream have left this side: the peer may send as many more.
    pub fn return_credit(&mut self, id: StreamId, count: usize) {
        let Some(window) = self.streams.get_mut(&id).and_then(|stream| stream.receive.as_mut())
        else {
            return;
        };
        // No more can be consumed than was granted, whatever the caller says.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        window.ungranted = window.ungranted.saturating_add(count).min(WINDOW - window.left);
        if window.ungranted < CREDIT_STEP {
            return;
        }
        let credit = window.ungranted;
        window.ungranted = 0;
        window.left += credit;
        self.push(Kind::Credit, id, &credit.to_le_bytes());
    }

    // ---- output

    /// Queues a control message. `Err` gives its encoded length if it is larger than [`crate::MAX_CONTROL`].
    pub fn send_message(&mut self, message: &R::Send) -> Result<(), TooLarge> {
        // Counted first, so that it is encoded into the one buffer that is wiped.
        let len = postcard::serialize_with_flavor(message, postcard::ser_flavors::Size::default())
            .unwrap_or(usize::MAX);
        if len > crate::MAX_CONTROL {
            return Err(TooLarge { len });
        }
        self.push_header(Kind::Control, 0, len);
        let start = self.output.len();
        self.output.resize(start + len, 0);
        self.control_end = start + len;
        let written =
            postcard::to_slice(message, &mut self.output[start..]).map(|bytes| bytes.len());
        debug_assert_eq!(written, Ok(len));
        Ok(())
    }

    /// Bytes for the peer. Say with [`consume_output`](Self::consume_output) how many have been written.
    pub fn pending_output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// The first `count` bytes of [`pending_output`](Self::pending_output) have been written.
    pub fn consume_output(&mut self, count: usize) {
        let end = self.output.len().min(self.sent + count);
        if self.sent < self.control_end {
            self.output[self.sent..end.min(self.control_end)].zeroize();
        }
        self.sent = end;
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
            self.control_end = 0;
        }
    }

    fn push(&mut self, kind: Kind, stream: StreamId, payload: &[u8]) {
        self.push_header(kind, stream, payload.len());
        self.output.extend_from_slice(payload);
    }

    /// Appends a header, having made room for it and `len` bytes of payload.
    fn push_header(&mut self, kind: Kind, stream: StreamId, len: usize) {
        let needed = HEADER_LEN + len;
        if self.output.capacity() - self.output.len() < needed {
            self.make_room(needed);
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.output.extend_from_slice(&Header { kind, len, stream }.encode());
    }

    /// Moves what is unsent into a buffer with room for `needed` more bytes. Growing a `Vec` in place could leave
    /// a copy of a secret in freed memory: the old buffer is wiped as far as a control message reached.
    fn make_room(&mut self, needed: usize) {
        let unsent = self.output.len() - self.sent;
        let mut roomier =
            Vec::with_capacity((unsent + needed).next_power_of_two().max(OUTPUT_HIGH_WATER));
        roomier.extend_from_slice(&self.output[self.sent..]);
        let mut old = std::mem::replace(&mut self.output, roomier);
        old[..self.control_end].zeroize();
        self.control_end = self.control_end.saturating_sub(self.sent);
        self.sent = 0;
    }
}

impl<R> Drop for Connection<R> {
    fn drop(&mut self) {
        self.output[..self.control_end].zeroize();
    }
}

/// A control message does not fit a frame: argv and environment, most likely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a control message of {len} bytes is over the limit of {}", crate::MAX_CONTROL)]
pub struct TooLarge {
    /// Its encoded length in bytes.
    pub len: usize,
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
