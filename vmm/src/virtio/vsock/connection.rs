//! The one connection between the guest and the channel. Everything else is refused with a reset.
//!
//! ```text
//!          REQUEST to the channel      SHUTDOWN (both)    all delivered, RST sent
//!   Idle ─────────────────────────▶ Open ───────▶ Closing ───────────────────────▶ Closed
//!                                    │               │                               ▲
//!                                    │  RST, fault   │         all delivered         │
//!                                    └───────────────┴──▶ Draining ──────────────────┘
//!
//!   From any state with a channel, when the host closes it: HostGone
//!
//!   In a guest that becomes a template:
//!          REQUEST                         saved, restored             accepted
//!   Closed ───────▶ Closed with a request ─ ─ ─ ─ ─ ─ ─ ─ ─ ─▶ Idle ────────────▶ Open
//! ```
//!
//! In `Open`, each direction can end by itself: a SHUTDOWN (send) of the guest shuts down the
//! channel's write half once the bytes before it are delivered, and the end of the channel's stream
//! becomes a SHUTDOWN (send) to the guest.
//!
//! A guest that becomes a template may request a second connection once it has closed the first.
//! That is the *successor* of the connection. The request gets no answer here: the guest is saved
//! with it, and each guest restored from it begins with a channel of its own and is accepted.
//!
//! Nothing here blocks and nothing grows. Payload for a host that does not read is buffered up to
//! the guest's credit ([`BUFFER_BYTES`](super::credit::BUFFER_BYTES)), and control packets up to
//! [`MAX_PENDING_CONTROL`]; after that the guest's packets stay in its queue.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::host_channel::HostChannel;
use super::packet::{CHANNEL_ADDR, HEADER_BYTES, HEADER_LEN, Header, Op, TYPE_STREAM, VsockAddr};
use super::stream::Stream;
use super::{CHANNEL_PORT, GUEST_CID, HOST_CID};
use crate::state::machine::ConnectionRequest;
use crate::virtio::chain::{Buffers, Chain};
use crate::virtio::queue::Completion;
use crate::virtio::{FaultCounter, Flow, GuestFault, NotQuiescent, PacketFault, Ready, StopReason};

/// The most control packets that wait for a receive buffer. A guest that floods the device with
/// packets to be refused, and provides no buffers, stalls itself instead of growing the list.
pub const MAX_PENDING_CONTROL: usize = 32;

/// The guest's one connection, and the control packets that wait to be received.
pub struct Connection {
    state: State,
    /// Set if the guest becomes a template, and so may have a [`Successor`].
    is_template: bool,
    /// Set when the guest has connected; see [`Vsock`](super::Vsock).
    used: Arc<AtomicBool>,
    /// Packets without payload that wait for a receive buffer. They are sent before any payload.
    pending_control: VecDeque<Header>,
    faults: Arc<FaultCounter>,
}

/// The states of the drawing above.
enum State {
    /// The guest has not connected.
    Idle(HostChannel),
    /// The guest and the host exchange bytes.
    Open(Stream),
    /// The guest has shut down both directions. It gets a reset as confirmation when the host has
    /// all of its bytes.
    Closing(Stream, Successor),
    /// The guest has no connection any more, and the host does not have all of its bytes yet.
    Draining(HostChannel, Successor),
    /// The connection is closed and the channel is shut down, or there never was a channel.
    Closed(Successor),
    /// The host has closed the channel, which stops the guest.
    HostGone,
}

/// The connection after this one, which a guest that becomes a template requests before it is
/// saved.
#[derive(Clone, Copy, Debug)]
enum Successor {
    /// There may be none: the guest becomes no template, or a fault ended its connection.
    Refused,
    /// The guest may request one.
    Allowed,
    /// The guest has requested one and waits.
    Requested(ConnectionRequest),
}

impl Connection {
    /// Makes the connection of a guest that has not requested any. It is refused if there is no
    /// channel, or if `used`.
    pub fn new(
        channel: Option<Arc<UnixStream>>,
        is_template: bool,
        used: Arc<AtomicBool>,
        faults: Arc<FaultCounter>,
    ) -> Self {
        let state = match channel {
            Some(socket) if !used.load(Ordering::Relaxed) => State::Idle(HostChannel::new(socket)),
            _ => State::Closed(Successor::Refused),
        };
        Self { state, is_template, used, pending_control: VecDeque::new(), faults }
    }

    /// Returns whether the guest has ever connected.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns the channel's socket as long as it is of use.
    pub fn channel(&self) -> Option<&UnixStream> {
        self.state.channel().map(HostChannel::socket)
    }

    /// Returns whether the channel has refused output.
    pub fn is_blocked(&self) -> bool {
        self.state.channel().is_some_and(HostChannel::is_blocked)
    }

    /// Returns whether the host has all bytes that came from the guest.
    pub fn is_drained(&self) -> bool {
        self.state.channel().is_none_or(HostChannel::is_drained)
    }

    /// Returns the consequence of the state for the guest.
    pub fn flow(&self) -> Flow {
        match self.state {
            State::HostGone => Flow::Stop(StopReason::ChannelClosed),
            _ if self.save().is_ok() => Flow::AwaitSnapshot,
            _ => Flow::Continue,
        }
    }

    /// Returns the request that waits for the guest to be saved and restored.
    ///
    /// # Errors
    /// There is none, or something else is going on.
    pub fn save(&self) -> Result<ConnectionRequest, NotQuiescent> {
        let State::Closed(successor) = self.state else {
            return Err(NotQuiescent::ConnectionOpen);
        };
        let Successor::Requested(request) = successor else { return Err(NotQuiescent::NoRequest) };
        if !self.pending_control.is_empty() {
            return Err(NotQuiescent::PendingReplies);
        }
        Ok(request)
    }

    /// Opens the connection unless there was one: accepts a request, which may be the one that the
    /// guest was saved with.
    pub fn accept(&mut self, request: ConnectionRequest) {
        self.state = match self.take_state() {
            State::Idle(channel) => {
                let guest = VsockAddr { cid: GUEST_CID, port: request.port };
                let mut stream = Stream::new(channel, guest);
                stream.record_announcement(request.buf_alloc, request.fwd_cnt);
                self.pending_control.push_back(stream.make_header(Op::Response));
                self.used.store(true, Ordering::Relaxed);
                State::Open(stream)
            }
            state => state,
        };
    }

    /// Handles the readiness of the channel.
    pub fn on_channel(&mut self, ready: Ready) {
        let Some(channel) = self.state.channel_mut() else { return };
        channel.record_ready(ready);
        if ready.hung_up {
            match &mut self.state {
                // With the write half shut down, a host that only ends its stream looks like one
                // that is gone. A read finds out.
                State::Open(stream) if stream.is_write_half_shut() => {
                    let readable = Ready { readable: true, ..Ready::default() };
                    stream.channel.record_ready(readable);
                }
                _ => self.state = State::HostGone,
            }
        }
    }

    /// Sends buffered payload to the channel, and does what had to wait for that.
    pub fn flush(&mut self) {
        let Some(channel) = self.state.channel_mut() else { return };
        let flushed = channel.flush();
        self.record_forwarded(flushed);
        self.finish_delivery();
    }

    /// Returns whether there is room for the answers to one more packet.
    pub fn has_room(&self) -> bool {
        self.pending_control.len() < MAX_PENDING_CONTROL
    }

    /// Handles one packet of the guest. A packet that breaks a rule is counted, and refused or
    /// dropped; it never stops the queue. Without [room](Self::has_room) for answers the packet
    /// stays in the queue.
    pub fn handle_packet(&mut self, chain: &mut Chain<'_>) -> Completion {
        if !self.has_room() {
            return Completion::Stop;
        }
        let mut bytes = [0; HEADER_BYTES];
        if chain.readable.read_bytes(&mut bytes).is_none() {
            self.faults.count(PacketFault::ShortHeader);
            return Completion::EMPTY;
        }
        let header = Header::parse(&bytes);
        if let Err(fault) = self.handle_header(&header, &mut chain.readable) {
            self.faults.count(fault);
            if self.state.stream_of(&header).is_some() {
                // Its bytes may be incomplete now: the stream cannot go on.
                self.drain(Successor::Refused);
            }
            // A reset is never answered, or two sides could go on for ever.
            if header.op != Some(Op::Rst) && header.source.cid == GUEST_CID {
                self.pending_control.push_back(header.refusal());
            }
        }
        Completion::EMPTY
    }

    fn handle_header(
        &mut self,
        header: &Header,
        payload: &mut Buffers<'_>,
    ) -> Result<(), PacketFault> {
        let op = check_header(header)?;
        if op == Op::Request {
            return self.handle_request(header);
        }
        if self.withdraw_request(header.source.port) {
            // The guest has given the request up, or is confused about it.
            return if op == Op::Rst { Ok(()) } else { Err(PacketFault::NotAccepted) };
        }
        if !self.state.is_connected() {
            return Err(PacketFault::NotConnected);
        }
        let Some(stream) = self.state.stream_of(header) else {
            return Err(PacketFault::UnknownConnection);
        };
        stream.record_announcement(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Rw => {
                let payload = stream.check_payload(header, payload)?;
                let sent = stream.channel.send(payload);
                self.record_forwarded(sent);
            }
            Op::Shutdown => self.handle_shutdown(header.flags),
            Op::Rst => {
                let successor = self.successor_after_close();
                self.drain(successor);
            }
            Op::CreditRequest => {
                let update = stream.make_header(Op::CreditUpdate);
                self.pending_control.push_back(update);
            }
            Op::Response => return Err(PacketFault::UnexpectedResponse),
            // The credit that it carries has been recorded. A request does not get here.
            Op::CreditUpdate | Op::Request => {}
        }
        Ok(())
    }

    fn handle_request(&mut self, header: &Header) -> Result<(), PacketFault> {
        if header.destination.port != CHANNEL_PORT {
            return Err(PacketFault::ClosedPort);
        }
        let Header { source: VsockAddr { port, .. }, buf_alloc, fwd_cnt, .. } = *header;
        let request = ConnectionRequest { port, buf_alloc, fwd_cnt };
        if let State::Idle(_) = self.state {
            self.accept(request);
            return Ok(());
        }
        match self.state.successor_mut() {
            None | Some(Successor::Refused) => Err(PacketFault::SecondConnection),
            Some(Successor::Requested(_)) => Err(PacketFault::ThirdConnection),
            Some(successor) => {
                *successor = Successor::Requested(request);
                Ok(())
            }
        }
    }

    /// Withdraws the request that waits, if it came from this port. Returns whether there was one.
    fn withdraw_request(&mut self, port: u32) -> bool {
        match self.state.successor_mut() {
            Some(successor) if successor.is_requested_by(port) => {
                *successor = Successor::Allowed;
                true
            }
            _ => false,
        }
    }

    fn handle_shutdown(&mut self, flags: u32) {
        if let State::Open(stream) = &mut self.state {
            stream.shut_down(flags);
            if stream.is_closed_by_guest() {
                let successor = self.successor_after_close();
                self.state = match self.take_state() {
                    State::Open(stream) => State::Closing(stream, successor),
                    state => state,
                };
            }
        }
        self.finish_delivery();
    }

    /// Moves the state out, to be replaced at once.
    fn take_state(&mut self) -> State {
        mem::replace(&mut self.state, State::HostGone)
    }

    /// Ends the connection at once. The host still gets the bytes that were received.
    fn drain(&mut self, successor: Successor) {
        self.state = match self.take_state() {
            State::Open(stream) | State::Closing(stream, _) => {
                State::Draining(stream.channel, successor)
            }
            state => state,
        };
        self.flush();
    }

    /// Does what had to wait until the host has all bytes of the guest: ends its stream, or closes
    /// the channel.
    fn finish_delivery(&mut self) {
        let successor = match &mut self.state {
            State::Open(stream) => return stream.finish_to_host(),
            State::Closing(stream, successor) if stream.channel.is_drained() => {
                // A guest that closes a connection waits for a reset as confirmation.
                let confirmation = stream.make_header(Op::Rst);
                self.pending_control.push_back(confirmation);
                stream.channel.shut_down(Shutdown::Both);
                *successor
            }
            State::Draining(channel, successor) if channel.is_drained() => {
                channel.shut_down(Shutdown::Both);
                *successor
            }
            _ => return,
        };
        self.state = State::Closed(successor);
    }

    /// Records how many bytes the channel took. An error means that the host is gone.
    fn record_forwarded(&mut self, sent: io::Result<u32>) {
        match (sent, &mut self.state) {
            (Ok(bytes), State::Open(stream) | State::Closing(stream, _)) => {
                stream.credit.record_forwarded(bytes);
            }
            (Ok(_), _) => {}
            (Err(_), state) => *state = State::HostGone,
        }
    }

    /// Returns the successor of a connection that the guest closes by the rules.
    fn successor_after_close(&self) -> Successor {
        match self.state {
            State::Closing(_, successor) => successor,
            _ if self.is_template => Successor::Allowed,
            _ => Successor::Refused,
        }
    }

    /// Returns whether there may be something to send to the guest. Only a read of the channel
    /// tells for certain.
    pub fn has_output(&self) -> bool {
        !self.pending_control.is_empty()
            || match &self.state {
                State::Open(stream) | State::Closing(stream, _) => stream.has_output(),
                _ => false,
            }
    }

    /// Fills one receive buffer with the next packet for the guest.
    ///
    /// # Errors
    /// The buffer is too small for any packet.
    pub fn fill_buffer(
        &mut self,
        queue: u16,
        chain: &mut Chain<'_>,
    ) -> Result<Completion, GuestFault> {
        let bytes = chain.writable.len();
        let too_small = GuestFault::BufferTooSmall { queue, head: chain.head, bytes };
        // A buffer for a header alone could never carry the payload that waits.
        if bytes <= HEADER_BYTES {
            return Err(too_small);
        }
        let mut header_space = chain.writable.split_front(HEADER_BYTES);
        let Some(header) = self.next_packet(&mut chain.writable) else {
            return Ok(Completion::Stop);
        };
        header_space.write_bytes(&header.to_bytes()).ok_or(too_small)?;
        Ok(Completion::Done { len: HEADER_LEN.saturating_add(header.len) })
    }

    /// Returns the header of the next packet, whose payload is in `payload_space` then.
    fn next_packet(&mut self, payload_space: &mut Buffers<'_>) -> Option<Header> {
        if let Some(header) = self.pending_control.pop_front() {
            return Some(header);
        }
        let (State::Open(stream) | State::Closing(stream, _)) = &mut self.state else {
            return None;
        };
        stream.next_packet(payload_space).unwrap_or_else(|_| {
            self.state = State::HostGone;
            None
        })
    }
}

/// Checks the fields of a header that do not depend on the connection. Returns the operation.
fn check_header(header: &Header) -> Result<Op, PacketFault> {
    if header.source.cid != GUEST_CID {
        return Err(PacketFault::SourceCid);
    }
    if header.destination.cid != HOST_CID {
        return Err(PacketFault::DestinationCid);
    }
    if header.socket_type != TYPE_STREAM {
        return Err(PacketFault::SocketType);
    }
    header.op.ok_or(PacketFault::UnknownOp)
}

impl State {
    fn channel(&self) -> Option<&HostChannel> {
        match self {
            State::Idle(channel) | State::Draining(channel, _) => Some(channel),
            State::Open(stream) | State::Closing(stream, _) => Some(&stream.channel),
            State::Closed(_) | State::HostGone => None,
        }
    }

    fn channel_mut(&mut self) -> Option<&mut HostChannel> {
        match self {
            State::Idle(channel) | State::Draining(channel, _) => Some(channel),
            State::Open(stream) | State::Closing(stream, _) => Some(&mut stream.channel),
            State::Closed(_) | State::HostGone => None,
        }
    }

    fn successor_mut(&mut self) -> Option<&mut Successor> {
        match self {
            State::Closing(_, successor)
            | State::Draining(_, successor)
            | State::Closed(successor) => Some(successor),
            State::Idle(_) | State::Open(_) | State::HostGone => None,
        }
    }

    fn is_connected(&self) -> bool {
        matches!(self, State::Open(_) | State::Closing(..))
    }

    /// Returns the connection that a packet belongs to.
    fn stream_of(&mut self, header: &Header) -> Option<&mut Stream> {
        match self {
            State::Open(stream) | State::Closing(stream, _) => {
                let ends = (header.source, header.destination);
                (ends == (stream.guest, CHANNEL_ADDR)).then_some(stream)
            }
            _ => None,
        }
    }
}

impl Successor {
    fn is_requested_by(&self, port: u32) -> bool {
        matches!(self, Self::Requested(request) if request.port == port)
    }
}
