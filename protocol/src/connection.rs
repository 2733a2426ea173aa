//! One side of a channel, without I/O.
//!
//! ```text
//!                 hello received            peer violates the protocol
//!   Greeting ───────────────▶ Established ───────────────────▶ (Fault: drop the connection)
//!
//!   each half of a stream:
//!   open ──data*──▶ end sent / end received ──▶ closed     reset, by either side, closes both halves
//! ```
//!
//! Bytes from the peer enter through [`Connection::input_buffer`] and [`Connection::commit_input`],
//! and come out as [`Event`]s. Bytes for the peer wait in [`Connection::pending_output`]. A control
//! message names the streams it opens, and the layer above opens them with
//! [`Connection::accept_stream`] while it handles the message. The multiplexer therefore needs no
//! frame that opens a stream, and a data frame cannot overtake the message that opens its stream.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::{Serialize, de::DeserializeOwned};
use zeroize::Zeroize;

use crate::frame::{HEADER_LEN, HELLO_LEN, Header, Kind, MAGIC, MAX_DATA};
use crate::{Fault, MAX_DIALS, MAX_STREAMS, StreamId, ToGuest, ToHost, VERSION, WINDOW};

/// The initial size of the input buffer, which is zeroed when it is allocated. It holds a few short
/// messages, and most commands need no more.
const SMALL_INPUT: usize = 4096;

/// The amount of unsent output above which no more stream data is accepted: four full frames in
/// flight.
const OUTPUT_HIGH_WATER: usize = 4 * MAX_DATA_FRAME;

/// The length of the longest data frame.
const MAX_DATA_FRAME: usize = HEADER_LEN + MAX_DATA;

/// The maximum amount of unsent output. An honest peer reads its answers; one that lets them pile
/// up to this size is attacking memory.
const OUTPUT_LIMIT: usize = 4 * 1024 * 1024;

/// Credit is returned in halves of a window: often enough that the sender does not stall, and
/// seldom enough to be cheap.
const CREDIT_STEP: u32 = WINDOW / 2;

/// The allowance for frames on a stream that this side has closed: the peer may have filled the
/// window before it learnt of that, and sent a few short frames.
const STALE_ALLOWANCE: u32 = WINDOW + 64 * SHORT_FRAME_COST;

/// The cost of a frame without data. A data frame costs its length.
const SHORT_FRAME_COST: u32 = 16;

/// The maximum allowance: that of all streams that can be open at a time.
#[expect(clippy::cast_possible_truncation, reason = "the sum of two small constants")]
const MAX_STALE_ALLOWANCE: u32 = (MAX_STREAMS + MAX_DIALS) as u32 * STALE_ALLOWANCE;

/// The role of a side, which fixes the direction of messages and the parity of stream ids.
pub trait Role {
    /// The messages that this side sends.
    type Send: Serialize;
    /// The messages that this side receives.
    type Receive: DeserializeOwned;
    /// True if this side opens streams with odd ids.
    const OPENS_ODD: bool;
}

/// The role of the host.
#[derive(Debug)]
pub enum Host {}

/// The role of the agent.
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

/// An action of the peer.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a, M> {
    /// The hello was received.
    Established {
        /// The version that both sides use: the lower of the two offered.
        version: u32,
    },
    /// A control message. Open the streams it names before requesting the next event.
    Message(M),
    /// Data on a stream. Call [`Connection::return_credit`] once the bytes have left this side.
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
    /// The peer has closed the stream in both directions.
    Reset {
        /// The stream.
        stream: StreamId,
    },
    /// The peer granted credit: a blocked sender may continue.
    Credit {
        /// The stream.
        stream: StreamId,
    },
}

/// The halves of a stream that exist, seen from this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// This side sends.
    Send,
    /// This side receives.
    Receive,
    /// Both sides send and receive.
    Both,
}

#[derive(Debug)]
struct Stream {
    /// The number of bytes this side may still send; `None` once it has ended its half.
    send: Option<u32>,
    /// The window of the receiving half; `None` once the peer has ended it.
    receive: Option<Window>,
}

#[derive(Debug)]
struct Window {
    /// The number of bytes the peer may still send.
    left: u32,
    /// The number of bytes consumed here and not yet granted again.
    ungranted: u32,
}

/// One side of a channel: a state machine that the caller feeds with bytes.
///
/// The caller repeats three steps: read into [`input_buffer`](Self::input_buffer) and call
/// [`commit_input`](Self::commit_input); handle each [`next_event`](Self::next_event) until it is
/// `None`; write [`pending_output`](Self::pending_output) and call
/// [`consume_output`](Self::consume_output). After a [`Fault`], the connection must be dropped.
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
    /// The end of the last control message in `output`. Everything before it is zeroed, because a
    /// control message may contain a secret.
    control_end: usize,
    streams: BTreeMap<StreamId, Stream>,
    /// The last ids opened by this side and by the peer. Ids only grow, so that a frame on a closed
    /// stream can be distinguished from one on a stream that was never opened.
    last_own_id: StreamId,
    last_peer_id: StreamId,
    /// The allowance for frames that have no effect, because their stream is closed. Such a frame
    /// costs the peer next to nothing, so that an endless sequence of them is an attack.
    stale_allowance: u32,
    frames_received: u64,
    role: PhantomData<fn() -> R>,
}

impl<R: Role> Default for Connection<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Role> Connection<R> {
    /// Returns a new connection with its hello in [`pending_output`](Self::pending_output).
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
            last_own_id: u32::from(R::OPENS_ODD),
            last_peer_id: u32::from(!R::OPENS_ODD),
            stale_allowance: STALE_ALLOWANCE,
            frames_received: 0,
            role: PhantomData,
        };
        // Ids start at 2 and 3: 0 is the connection itself, and 1 is left out for symmetry.
        let mut hello = [0; HELLO_LEN];
        hello[..4].copy_from_slice(&MAGIC);
        hello[4..].copy_from_slice(&VERSION.to_le_bytes());
        connection.queue_frame(Kind::Hello, 0, &hello);
        connection
    }

    // ---- input

    /// Returns the free part of the input buffer, which is never empty.
    ///
    /// Fill it with bytes from the peer and report their number with
    /// [`commit_input`](Self::commit_input).
    pub fn input_buffer(&mut self) -> &mut [u8] {
        if self.parsed == self.received {
            self.parsed = 0;
            self.received = 0;
        }
        let mut needed = self.needed_input();
        if self.input.len() - self.parsed < needed || self.received == self.input.len() {
            self.input.copy_within(self.parsed..self.received, 0);
            self.received -= self.parsed;
            self.parsed = 0;
            // The buffer is full of bytes for which no event has been requested yet.
            if self.received >= SMALL_INPUT && self.received == self.input.len() {
                needed = needed.max(MAX_DATA_FRAME);
            }
            // A frame may be larger than the buffer. Its header has been checked at this point.
            if self.input.len() < needed {
                // Resizing in place would write to every page, and could leave a part of a secret
                // in freed memory.
                let mut larger = vec![0; needed];
                larger[..self.received].copy_from_slice(&self.input[..self.received]);
                self.input[..self.received].zeroize();
                self.input = larger;
            }
        }
        &mut self.input[self.received..]
    }

    /// Marks the first `count` bytes of [`input_buffer`](Self::input_buffer) as received.
    pub fn commit_input(&mut self, count: usize) {
        self.received = self.input.len().min(self.received + count);
    }

    /// Returns the buffer size for the frame that is arriving. Above [`SMALL_INPUT`], any data
    /// frame fits as well.
    fn needed_input(&self) -> usize {
        let announced =
            self.peek_header().ok().flatten().map_or(0, |header| HEADER_LEN + header.len as usize);
        if announced <= SMALL_INPUT { SMALL_INPUT } else { announced.max(MAX_DATA_FRAME) }
    }

    fn peek_header(&self) -> Result<Option<Header>, Fault> {
        match self.input[self.parsed..self.received].first_chunk::<HEADER_LEN>() {
            Some(bytes) => Header::decode(*bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Returns the next event, or `None` if more input is needed.
    ///
    /// # Errors
    /// Returns a [`Fault`] if the peer violated the protocol. The connection cannot be used
    /// afterwards.
    pub fn next_event(&mut self) -> Result<Option<Event<'_, R::Receive>>, Fault> {
        loop {
            if self.output.len() - self.sent > OUTPUT_LIMIT {
                return Err(Fault::UnreadBacklog { len: self.output.len() - self.sent });
            }
            // Without a hello, its absence is a more useful report than an invalid header.
            if !self.established
                && let Some(&kind) = self.input[self.parsed..self.received].first()
                && kind != Kind::Hello as u8
            {
                return Err(Fault::MissingHello { kind });
            }
            let Some(header) = self.peek_header()? else { return Ok(None) };
            let start = self.parsed + HEADER_LEN;
            let end = start + header.len as usize;
            if end > self.received {
                return Ok(None);
            }
            self.parsed = end;
            self.frames_received += 1;
            let stream = header.stream;
            match header.kind {
                Kind::Hello => {
                    let version = self.handle_hello(start)?;
                    return Ok(Some(Event::Established { version }));
                }
                Kind::Control => {
                    let message = Self::decode_message(&mut self.input[start..end])?;
                    return Ok(Some(Event::Message(message)));
                }
                Kind::Data => {
                    if self.handle_data(stream, header.len)? {
                        return Ok(Some(Event::Data { stream, bytes: &self.input[start..end] }));
                    }
                }
                Kind::Credit => {
                    let mut credit = [0; 4];
                    credit.copy_from_slice(&self.input[start..end]);
                    if self.handle_credit(stream, u32::from_le_bytes(credit))? {
                        return Ok(Some(Event::Credit { stream }));
                    }
                }
                Kind::End => {
                    if self.handle_end(stream)? {
                        return Ok(Some(Event::End { stream }));
                    }
                }
                Kind::Reset => {
                    self.find_stream(stream, Kind::Reset)?;
                    if self.streams.remove(&stream).is_some() {
                        return Ok(Some(Event::Reset { stream }));
                    }
                    self.charge_stale_frame(Kind::Reset, 0)?;
                }
            }
        }
    }

    /// Returns the number of frames that were parsed so far, also those without an effect: a measure
    /// of the work that the peer makes.
    pub fn frames_received(&self) -> u64 {
        self.frames_received
    }

    fn handle_hello(&mut self, start: usize) -> Result<u32, Fault> {
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

    /// Decodes a control message and zeroes its bytes, which may contain a secret.
    fn decode_message(payload: &mut [u8]) -> Result<R::Receive, Fault> {
        let message = match postcard::take_from_bytes(payload) {
            Ok((message, [])) => message,
            _ => return Err(Fault::InvalidMessage { len: payload.len() }),
        };
        payload.zeroize();
        Ok(message)
    }

    /// Returns the stream of a frame, or `None` if it is closed: the peer may not know that yet.
    fn find_stream(&mut self, id: StreamId, kind: Kind) -> Result<Option<&mut Stream>, Fault> {
        let own = (id % 2 == 1) == R::OPENS_ODD;
        let last = if own { self.last_own_id } else { self.last_peer_id };
        if id < 2 || id > last {
            return Err(Fault::UnknownStream { kind: kind as u8, stream: id });
        }
        Ok(self.streams.get_mut(&id))
    }

    /// Charges a frame that has no effect.
    fn charge_stale_frame(&mut self, kind: Kind, len: u32) -> Result<bool, Fault> {
        let cost = if kind == Kind::Data { len } else { SHORT_FRAME_COST };
        match self.stale_allowance.checked_sub(cost) {
            Some(left) => self.stale_allowance = left,
            None => return Err(Fault::StaleFrames),
        }
        Ok(false)
    }

    /// Allows the frames that the peer may have sent on a stream before it learns that this side
    /// has closed it.
    fn allow_stale_frames(&mut self) {
        self.stale_allowance =
            self.stale_allowance.saturating_add(STALE_ALLOWANCE).min(MAX_STALE_ALLOWANCE);
    }

    fn handle_data(&mut self, id: StreamId, len: u32) -> Result<bool, Fault> {
        let Some(stream) = self.find_stream(id, Kind::Data)? else {
            return self.charge_stale_frame(Kind::Data, len);
        };
        let Some(window) = &mut stream.receive else {
            return Err(Fault::DataAfterEnd { stream: id });
        };
        match window.left.checked_sub(len) {
            Some(left) => window.left = left,
            None => return Err(Fault::WindowExceeded { stream: id, len, window: window.left }),
        }
        Ok(true)
    }

    fn handle_credit(&mut self, id: StreamId, credit: u32) -> Result<bool, Fault> {
        let Some(stream) = self.find_stream(id, Kind::Credit)? else {
            return self.charge_stale_frame(Kind::Credit, 0);
        };
        // Credit and the end of this side's half may cross on the way, which is not a fault.
        let Some(allowed) = &mut stream.send else {
            return self.charge_stale_frame(Kind::Credit, 0);
        };
        match allowed.checked_add(credit) {
            Some(sum) if sum <= WINDOW && credit > 0 => *allowed = sum,
            _ => return Err(Fault::CreditOverflow { stream: id, credit }),
        }
        Ok(true)
    }

    fn handle_end(&mut self, id: StreamId) -> Result<bool, Fault> {
        let Some(stream) = self.find_stream(id, Kind::End)? else {
            return self.charge_stale_frame(Kind::End, 0);
        };
        if stream.receive.take().is_none() {
            return Err(Fault::DataAfterEnd { stream: id });
        }
        self.remove_if_closed(id);
        Ok(true)
    }

    fn remove_if_closed(&mut self, id: StreamId) {
        if self
            .streams
            .get(&id)
            .is_some_and(|stream| stream.send.is_none() && stream.receive.is_none())
        {
            self.streams.remove(&id);
            self.allow_stale_frames();
        }
    }

    // ---- streams

    /// Opens a stream of this side, to be named in the control message that is sent next.
    ///
    /// Returns `None` if the limit is reached: [`MAX_STREAMS`] for the host, [`MAX_DIALS`] for the
    /// agent.
    pub fn open_stream(&mut self, direction: Direction) -> Option<StreamId> {
        if !self.is_below_limit(R::OPENS_ODD) {
            return None;
        }
        let id = self.last_own_id.checked_add(2)?;
        self.last_own_id = id;
        self.insert_stream(id, direction);
        Some(id)
    }

    /// Opens a stream that a control message of the peer named.
    ///
    /// # Errors
    /// Returns [`Fault::InvalidStreamId`] if the peer may not use this id, and
    /// [`Fault::TooManyStreams`] if its limit is reached.
    pub fn accept_stream(&mut self, id: StreamId, direction: Direction) -> Result<(), Fault> {
        let theirs = (id % 2 == 1) != R::OPENS_ODD;
        if !theirs || id <= self.last_peer_id {
            return Err(Fault::InvalidStreamId { stream: id });
        }
        if !self.is_below_limit(!R::OPENS_ODD) {
            return Err(Fault::TooManyStreams);
        }
        self.last_peer_id = id;
        self.insert_stream(id, direction);
        Ok(())
    }

    /// Returns true if [`open_stream`](Self::open_stream) would succeed.
    pub fn can_open_stream(&self) -> bool {
        self.is_below_limit(R::OPENS_ODD)
    }

    /// Returns true if one more stream with an odd (or even) id may be opened. A side that opens a
    /// stream has sent the ends of earlier streams before, so that both sides count the same.
    fn is_below_limit(&self, odd: bool) -> bool {
        let limit = if odd { MAX_DIALS } else { MAX_STREAMS };
        self.streams.len() < limit
            || self.streams.keys().filter(|id| (*id % 2 == 1) == odd).count() < limit
    }

    fn insert_stream(&mut self, id: StreamId, direction: Direction) {
        let send = (direction != Direction::Receive).then_some(WINDOW);
        let receive =
            (direction != Direction::Send).then_some(Window { left: WINDOW, ungranted: 0 });
        self.streams.insert(id, Stream { send, receive });
    }

    /// Returns the number of bytes that [`send_data`](Self::send_data) would accept now. It is 0
    /// for a closed stream.
    pub fn send_capacity(&self, id: StreamId) -> usize {
        let room = OUTPUT_HIGH_WATER.saturating_sub(self.output.len() - self.sent + HEADER_LEN);
        let credit = self.streams.get(&id).and_then(|stream| stream.send).unwrap_or(0);
        room.min(credit as usize)
    }

    /// Returns true if this side's half of the stream is open: it has not ended it, and the peer
    /// has not reset it.
    pub fn is_sending(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.send.is_some())
    }

    /// Queues as many of `bytes` as credit and buffers allow, and returns their number.
    pub fn send_data(&mut self, id: StreamId, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let count = self.send_capacity(id).min(bytes.len() - taken).min(MAX_DATA);
            if count == 0 {
                break;
            }
            self.queue_frame(Kind::Data, id, &bytes[taken..taken + count]);
            self.consume_credit(id, count);
            taken += count;
        }
        taken
    }

    /// Returns the header of a data frame that the caller writes itself, and charges its credit.
    ///
    /// The caller must write the header and `count` bytes of payload before anything that is queued
    /// from now on. [`pending_output`](Self::pending_output) must therefore be empty, and `count`
    /// must not exceed [`send_capacity`](Self::send_capacity) or [`MAX_DATA`].
    pub fn begin_data_frame(&mut self, id: StreamId, count: usize) -> [u8; HEADER_LEN] {
        debug_assert!(
            self.pending_output().is_empty() && count <= self.send_capacity(id).min(MAX_DATA)
        );
        self.consume_credit(id, count);
        Header { kind: Kind::Data, len: u32::try_from(count).unwrap_or(u32::MAX), stream: id }
            .encode()
    }

    /// Deducts sent bytes from the credit of a stream. `count` is within
    /// [`send_capacity`](Self::send_capacity) and therefore fits a `u32`.
    fn consume_credit(&mut self, id: StreamId, count: usize) {
        if let Some(credit) = self.streams.get_mut(&id).and_then(|stream| stream.send.as_mut()) {
            *credit = credit.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }

    /// Ends this side's half of the stream. Has no effect if it has ended already.
    pub fn end_stream(&mut self, id: StreamId) {
        let ended = self.streams.get_mut(&id).and_then(|stream| stream.send.take());
        if ended.is_some() {
            self.queue_frame(Kind::End, id, &[]);
            self.remove_if_closed(id);
        }
    }

    /// Closes the stream in both directions. Has no effect if it is closed already.
    pub fn reset_stream(&mut self, id: StreamId) {
        if self.streams.remove(&id).is_some() {
            self.allow_stale_frames();
            self.queue_frame(Kind::Reset, id, &[]);
        }
    }

    /// Returns credit for `count` bytes that were received on the stream and have left this side:
    /// the peer may send as many more.
    pub fn return_credit(&mut self, id: StreamId, count: usize) {
        let Some(window) = self.streams.get_mut(&id).and_then(|stream| stream.receive.as_mut())
        else {
            return;
        };
        // No more can be consumed than was granted, whatever the caller passes.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        window.ungranted = window.ungranted.saturating_add(count).min(WINDOW - window.left);
        if window.ungranted < CREDIT_STEP {
            return;
        }
        let credit = window.ungranted;
        window.ungranted = 0;
        window.left += credit;
        self.queue_frame(Kind::Credit, id, &credit.to_le_bytes());
    }

    // ---- output

    /// Queues a control message.
    ///
    /// # Errors
    /// Returns [`TooLarge`] if its encoding is longer than [`crate::MAX_CONTROL`]. Nothing is
    /// queued in that case.
    pub fn send_message(&mut self, message: &R::Send) -> Result<(), TooLarge> {
        // The size is computed first, so that the message is encoded into the one buffer that is
        // zeroed.
        let len = postcard::serialize_with_flavor(message, postcard::ser_flavors::Size::default())
            .unwrap_or(usize::MAX);
        if len > crate::MAX_CONTROL {
            return Err(TooLarge { len });
        }
        self.queue_header(Kind::Control, 0, len);
        let start = self.output.len();
        self.output.resize(start + len, 0);
        self.control_end = start + len;
        let written =
            postcard::to_slice(message, &mut self.output[start..]).map(|bytes| bytes.len());
        debug_assert_eq!(written, Ok(len));
        Ok(())
    }

    /// Returns the bytes to write to the peer. Report the number of written bytes with
    /// [`consume_output`](Self::consume_output).
    pub fn pending_output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// Removes the first `count` bytes of [`pending_output`](Self::pending_output), which have been
    /// written.
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

    fn queue_frame(&mut self, kind: Kind, stream: StreamId, payload: &[u8]) {
        self.queue_header(kind, stream, payload.len());
        self.output.extend_from_slice(payload);
    }

    /// Appends a header, and reserves room for it and `len` bytes of payload.
    fn queue_header(&mut self, kind: Kind, stream: StreamId, len: usize) {
        let needed = HEADER_LEN + len;
        if self.output.capacity() - self.output.len() < needed {
            self.grow_output(needed);
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.output.extend_from_slice(&Header { kind, len, stream }.encode());
    }

    /// Moves the unsent output into a buffer with room for `needed` more bytes.
    ///
    /// Growing a `Vec` in place could leave a copy of a secret in freed memory. The old buffer is
    /// zeroed up to the end of the last control message.
    fn grow_output(&mut self, needed: usize) {
        let unsent = self.output.len() - self.sent;
        let mut larger =
            Vec::with_capacity((unsent + needed).next_power_of_two().max(OUTPUT_HIGH_WATER));
        larger.extend_from_slice(&self.output[self.sent..]);
        let mut old = std::mem::replace(&mut self.output, larger);
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

/// A control message that does not fit a frame, usually because of a long argv or environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a control message of {len} bytes exceeds the limit of {} bytes", crate::MAX_CONTROL)]
pub struct TooLarge {
    /// The encoded length in bytes.
    pub len: usize,
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
