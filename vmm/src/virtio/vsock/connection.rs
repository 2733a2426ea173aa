//! One connection between the guest and the channel, and a reset for everything else.
//!
//! ```text
//!           REQUEST to port 1024           SHUTDOWN (both), RST, a broken rule
//!   Idle ─────────────────────────▶ Open ───────────────────────────────────▶ Closing ──▶ Closed
//!                                    │                                          delivers what the guest sent
//!                                    └── each direction may end by itself: SHUTDOWN (send) ⇄ end of stream
//!
//!   In a guest that becomes a template:
//!           SHUTDOWN (both) or RST           REQUEST                      saved, restored
//!   Open ──────────────────────────▶ Closed ─────────▶ Closed, waiting ─ ─ ─ ─ ─ ─ ─ ─ ─ ─▶ Open, to another channel
//! ```
//!
//! Nothing here blocks and nothing grows: payload for a host that does not read is kept up to the window the guest was
//! given ([`BUFFER_BYTES`]), answers up to [`MAX_ANSWERS`], and then the guest's packets stay in its own queue.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::credit::{BUFFER_BYTES, Credit};
use super::packet::{
    Address, HEADER_BYTES, HEADER_LEN, Header, MAX_PAYLOAD_BYTES, Op, SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::{CHANNEL_PORT, EMPTY, GUEST_CID, HOST_CID};
use crate::state::machine::ConnectionRequest;
use crate::virtio::queue::{Chain, Completion};
use crate::virtio::{FaultCounter, Flow, GuestFault, NotQuiescent, Ready};

/// How many answers wait for a driver that gives no buffers. A guest that floods us with packets to be refused stalls
/// itself instead of growing this list.
pub const MAX_ANSWERS: usize = 32;

enum Link {
    /// No connection yet.
    Idle,
    /// The guest's port, and its flow control.
    Open(Connection),
    /// There was one.
    Closed,
}

struct Connection {
    guest: Address,
    credit: Credit,
    /// The host will send no more, and whether the guest knows.
    host_done: bool,
    /// The guest takes no more, or sends no more; and what of that the channel has been told.
    guest_shutdown: u32,
    applied_shutdown: u32,
    /// A window was asked for, and not yet given.
    asked_for_credit: bool,
}

/// Joins packets and the channel.
pub struct Muxer {
    link: Link,
    channel: Option<Arc<UnixStream>>,
    spent: Arc<AtomicBool>,
    faults: Arc<FaultCounter>,
    /// Headers to be sent before any payload.
    answers: VecDeque<Header>,
    /// Payload of the guest that the channel did not take yet; at most [`BUFFER_BYTES`].
    backlog: VecDeque<u8>,
    /// Edge-triggered readiness: true until a call says otherwise.
    readable: bool,
    writable: bool,
    /// Whether a second connection is left waiting, and the one that is.
    template: bool,
    waiting: Option<ConnectionRequest>,
    /// The guest ended its connection itself, keeping the rules.
    left: bool,
    /// A packet was left in the queue because `answers` is full.
    stalled: bool,
    stop: Option<&'static str>,
}

impl Muxer {
    /// A muxer before any connection; it takes one unless `spent`. For a `template` it keeps the second one waiting.
    pub fn new(
        channel: Option<Arc<UnixStream>>,
        template: bool,
        spent: Arc<AtomicBool>,
        faults: Arc<FaultCounter>,
    ) -> Self {
        Self {
            link: if spent.load(Ordering::Relaxed) || channel.is_none() {
                Link::Closed
            } else {
                Link::Idle
            },
            channel,
            spent,
            faults,
            answers: VecDeque::new(),
            backlog: VecDeque::new(),
            readable: true,
            writable: true,
            template,
            waiting: None,
            left: false,
            stalled: false,
            stop: None,
        }
    }

    /// The channel, as long as it is of use.
    pub fn channel(&self) -> Option<&UnixStream> {
        self.channel.as_deref()
    }

    /// Whether the guest still has a purpose.
    pub fn flow(&self) -> Flow {
        match self.stop {
            Some(why) => Flow::Stop(why),
            None if self.save().is_ok() => Flow::Waiting,
            None => Flow::Continue,
        }
    }

    /// The connection that waits, when nothing else is going on.
    ///
    /// # Errors
    /// What is going on.
    pub fn save(&self) -> Result<ConnectionRequest, NotQuiescent> {
        if !matches!(self.link, Link::Closed) || self.channel.is_some() || !self.backlog.is_empty()
        {
            return Err(NotQuiescent("the guest has not closed its connection"));
        }
        let request =
            self.waiting.ok_or(NotQuiescent("the guest has not asked for a new connection"))?;
        if !self.answers.is_empty() {
            return Err(NotQuiescent("the guest has not taken the answers to what it sent"));
        }
        Ok(request)
    }

    /// Answers the request of a guest that was saved with it.
    pub fn grant(&mut self, request: ConnectionRequest) {
        if self.channel.is_some() && matches!(self.link, Link::Idle) {
            let guest = Address { cid: GUEST_CID, port: request.port };
            self.open(guest, request.buf_alloc, request.fwd_cnt);
        }
    }

    /// Whether the channel did not take all of what it was given.
    pub fn is_blocked(&self) -> bool {
        !self.writable && self.channel.is_some()
    }

    /// Whether everything that came from the guest is with the host.
    pub fn is_drained(&self) -> bool {
        self.backlog.is_empty() || self.channel.is_none()
    }

    /// Notes what the channel is ready for.
    pub fn on_channel(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
        if ready.hung_up {
            match &self.link {
                // With our sending half shut, a host that only ends its own looks the same: reading tells.
                Link::Open(open) if open.applied_shutdown & SHUTDOWN_SEND != 0 => {
                    self.readable = true
                }
                _ => self.host_is_gone(),
            }
        }
    }

    /// Gives kept payload to the channel.
    pub fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let Some(mut channel) = self.channel.as_deref() else { return };
            let (front, _) = self.backlog.as_slices();
            match channel.write(front) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    if let Link::Open(connection) = &mut self.link {
                        connection.credit.forward(u32::try_from(count).unwrap_or(u32::MAX));
                    }
                }
                Err(error) => self.on_write_error(error.kind()),
            }
        }
        if self.backlog.is_empty() {
            // What a burst took is not kept for the guest's whole life.
            self.backlog = VecDeque::new();
            match self.link {
                Link::Idle => {}
                Link::Open(_) => self.finish_shutdown(),
                Link::Closed => self.drop_channel(),
            }
        }
    }

    /// Takes one packet from the guest.
    ///
    /// # Errors
    /// Never: a packet that breaks a rule is dropped or answered, and the queue lives on.
    pub fn on_packet(
        &mut self,
        _queue: u16,
        chain: &mut Chain<'_>,
    ) -> Result<Completion, GuestFault> {
        if self.answers.len() >= MAX_ANSWERS {
            self.stalled = true;
            return Ok(Completion::Stop);
        }
        let mut bytes = [0; HEADER_BYTES];
        if chain.readable.take(&mut bytes).is_none() {
            self.faults.count(GuestFault::Packet("shorter than a header"));
            return Ok(EMPTY);
        }
        let header = Header::parse(&bytes);
        if let Err(why) = self.on_header(&header, chain) {
            self.faults.count(GuestFault::Packet(why));
            if self.is_ours(&header) {
                self.close();
            }
            self.refuse(&header);
        }
        Ok(EMPTY)
    }

    fn on_header(&mut self, header: &Header, chain: &mut Chain<'_>) -> Result<(), &'static str> {
        if header.source.cid != GUEST_CID {
            return Err("from another context");
        }
        if header.destination.cid != HOST_CID {
            return Err("to a context that is not here");
        }
        if header.kind != TYPE_STREAM {
            return Err("of a type that is not offered");
        }
        let op = header.op.ok_or("of an unknown operation")?;
        if op == Op::Request {
            return self.on_request(header);
        }
        if self.waiting.is_some_and(|request| request.port == header.source.port) {
            // It does not wait any longer, or is confused: either way the request is gone.
            self.waiting = None;
            return if op == Op::Reset {
                Ok(())
            } else {
                Err("on a connection that was not granted")
            };
        }
        let Link::Open(connection) = &mut self.link else { return Err("without a connection") };
        if connection.guest != header.source || header.destination.port != CHANNEL_PORT {
            return Err("for a connection that does not exist");
        }
        connection.learn(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Data => return self.on_data(header, chain),
            Op::Shutdown => {
                connection.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                self.finish_shutdown();
            }
            Op::Reset => {
                self.left = true;
                self.close();
            }
            Op::CreditRequest => {
                let answer = connection.header(Op::CreditUpdate);
                self.answers.push_back(answer);
            }
            Op::Response => return Err("a response that nobody asked for"),
            // Every packet carries the guest's window; this one nothing else.
            Op::CreditUpdate | Op::Request => {}
        }
        Ok(())
    }

    fn on_request(&mut self, header: &Header) -> Result<(), &'static str> {
        if header.destination.port != CHANNEL_PORT {
            return Err("a connection to a port that is not open");
        }
        let (port, Header { buf_alloc, fwd_cnt, .. }) = (header.source.port, *header);
        match &self.link {
            Link::Idle => self.open(header.source, buf_alloc, fwd_cnt),
            // Closed, or closing: the host may not have read the last of it.
            Link::Open(open) if !self.template || open.guest_shutdown != SHUTDOWN_BOTH => {
                return Err("a second connection");
            }
            Link::Closed if !self.template || !self.left => return Err("a second connection"),
            _ if self.waiting.is_some() => return Err("a third connection"),
            _ => self.waiting = Some(ConnectionRequest { port, buf_alloc, fwd_cnt }),
        }
        Ok(())
    }

    fn open(&mut self, guest: Address, buf_alloc: u32, fwd_cnt: u32) {
        let mut connection = Connection {
            guest,
            credit: Credit::default(),
            host_done: false,
            guest_shutdown: 0,
            applied_shutdown: 0,
            asked_for_credit: false,
        };
        connection.learn(buf_alloc, fwd_cnt);
        self.answers.push_back(connection.header(Op::Response));
        self.link = Link::Open(connection);
        self.spent.store(true, Ordering::Relaxed);
    }

    fn on_data(&mut self, header: &Header, chain: &mut Chain<'_>) -> Result<(), &'static str> {
        let Link::Open(connection) = &mut self.link else { return Err("without a connection") };
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let problem = if len > chain.readable.len() {
            Some("longer than its buffers")
        } else if len > MAX_PAYLOAD_BYTES {
            Some("longer than any packet")
        } else if connection.guest_shutdown & SHUTDOWN_SEND != 0 {
            Some("payload after the end")
        } else if connection.credit.receive(header.len).is_err() {
            Some("payload beyond the window")
        } else {
            None
        };
        if let Some(why) = problem {
            // The stream has a hole now: it cannot go on, and whoever gets the error ends it.
            return Err(why);
        }
        let mut payload = chain.readable.split(len);
        while self.backlog.is_empty() && self.writable && !payload.is_empty() {
            let Some(channel) = self.channel.as_deref() else { break };
            match payload.write_to(channel.as_fd()) {
                Ok(count) => {
                    if let Link::Open(connection) = &mut self.link {
                        connection.credit.forward(u32::try_from(count).unwrap_or(u32::MAX));
                    }
                }
                Err(error) => self.on_write_error(error.kind()),
            }
        }
        if self.channel.is_some() {
            payload.append_to(&mut self.backlog);
            debug_assert!(self.backlog.len() <= BUFFER_BYTES as usize);
        }
        Ok(())
    }

    /// Whether there is something to send to the guest, as far as can be told without reading the channel.
    pub fn has_output(&self) -> bool {
        !self.answers.is_empty()
            || match &self.link {
                Link::Open(connection) => {
                    connection.credit.owes_update() || connection.wants(self.readable)
                }
                _ => false,
            }
    }

    /// Fills one buffer of the guest with the next packet.
    ///
    /// # Errors
    /// The buffer has no room for any packet.
    pub fn next_packet(
        &mut self,
        queue: u16,
        chain: &mut Chain<'_>,
    ) -> Result<Completion, GuestFault> {
        let bytes = chain.writable.len();
        let short = GuestFault::Short { queue, head: chain.head, bytes };
        // Room for a header alone would be used up without ever carrying the payload that waits.
        if bytes <= HEADER_BYTES {
            return Err(short);
        }
        if let Some(header) = self.answers.pop_front() {
            return put(header, chain).ok_or(short);
        }
        let Link::Open(connection) = &mut self.link else { return Ok(Completion::Stop) };
        if connection.wants(self.readable) {
            let room =
                u32::try_from((bytes - HEADER_BYTES).min(MAX_PAYLOAD_BYTES)).unwrap_or(u32::MAX);
            let window = connection.credit.window().min(room);
            if window == 0 {
                connection.asked_for_credit = true;
                let request = connection.header(Op::CreditRequest);
                return put(request, chain).ok_or(short);
            }
            let Some(channel) = self.channel.as_deref() else { return Ok(Completion::Stop) };
            let mut place = chain.writable.split(HEADER_BYTES);
            let mut payload = chain.writable.split(window as usize);
            match payload.read_from(channel.as_fd()) {
                Ok(0) => {
                    connection.host_done = true;
                    let mut end = connection.header(Op::Shutdown);
                    end.flags = SHUTDOWN_SEND;
                    place.put(&end.to_bytes()).ok_or(short)?;
                    return Ok(Completion::Done { len: HEADER_LEN });
                }
                Ok(count) => {
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    let mut data = connection.header(Op::Data);
                    data.len = count;
                    connection.credit.send(count);
                    place.put(&data.to_bytes()).ok_or(short)?;
                    return Ok(Completion::Done { len: count.saturating_add(HEADER_LEN) });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    return Ok(Completion::Stop);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.host_is_gone();
                    return Ok(Completion::Stop);
                }
            }
            // Nothing came after all; `chain` lost its front to `place`, which can still carry an update.
            let Link::Open(connection) = &mut self.link else { return Ok(Completion::Stop) };
            if connection.credit.owes_update() {
                let update = connection.header(Op::CreditUpdate);
                place.put(&update.to_bytes()).ok_or(short)?;
                return Ok(Completion::Done { len: HEADER_LEN });
            }
            return Ok(Completion::Stop);
        }
        if connection.credit.owes_update() {
            let update = connection.header(Op::CreditUpdate);
            return put(update, chain).ok_or(short);
        }
        Ok(Completion::Stop)
    }

    /// Whether packets were left for want of room that there is now.
    pub fn take_stall(&mut self) -> bool {
        let resume = self.stalled && self.answers.len() < MAX_ANSWERS;
        if resume {
            self.stalled = false;
        }
        resume
    }

    /// Answers a packet that nobody wants with a reset; a reset itself with nothing, or two sides could go on for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op == Some(Op::Reset) || header.source.cid != GUEST_CID {
            return;
        }
        self.answers.push_back(Header {
            source: header.destination,
            destination: header.source,
            len: 0,
            kind: header.kind,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// Does what the guest's shutdown asks for, once what it sent before has been delivered.
    fn finish_shutdown(&mut self) {
        let Link::Open(connection) = &mut self.link else { return };
        let delivered = self.backlog.is_empty();
        if connection.guest_shutdown == SHUTDOWN_BOTH && delivered {
            // A guest that says it is done waits for a reset as the confirmation.
            let answer = connection.header(Op::Reset);
            self.answers.push_back(answer);
            self.left = true;
            self.close();
            return;
        }
        let Some(channel) = self.channel.as_deref() else { return };
        let due = connection.guest_shutdown & !connection.applied_shutdown;
        // A channel that is gone is found out by the next read or write.
        if due & SHUTDOWN_SEND != 0 && delivered {
            let _ = channel.shutdown(Shutdown::Write);
            connection.applied_shutdown |= SHUTDOWN_SEND;
        }
        if due & SHUTDOWN_RECEIVE != 0 {
            let _ = channel.shutdown(Shutdown::Read);
            connection.applied_shutdown |= SHUTDOWN_RECEIVE;
        }
    }

    /// The connection is over: the host reads what is left and then the end.
    fn close(&mut self) {
        self.link = Link::Closed;
        self.flush();
    }

    /// Whether a packet names the connection that is open.
    fn is_ours(&self, header: &Header) -> bool {
        let host = Address { cid: HOST_CID, port: CHANNEL_PORT };
        matches!(&self.link, Link::Open(open) if open.guest == header.source && header.destination == host)
    }

    fn drop_channel(&mut self) {
        if let Some(channel) = self.channel.take() {
            let _ = channel.shutdown(Shutdown::Both);
        }
    }

    fn on_write_error(&mut self, kind: ErrorKind) {
        match kind {
            ErrorKind::WouldBlock => self.writable = false,
            ErrorKind::Interrupted => {}
            _ => self.host_is_gone(),
        }
    }

    fn host_is_gone(&mut self) {
        if self.channel.take().is_some() {
            self.backlog = VecDeque::new();
            self.link = Link::Closed;
            self.stop = Some("the host closed the channel");
        }
    }
}

impl Connection {
    /// Takes note of the guest's window.
    fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.credit.learn(buf_alloc, fwd_cnt);
        // Only a window ends the wait for one: a guest that answers with none is not asked again, or both would go on
        // asking and answering.
        self.asked_for_credit &= self.credit.window() == 0;
    }

    /// A header of this connection, with the latest word on our window.
    fn header(&mut self, op: Op) -> Header {
        Header {
            source: Address { cid: HOST_CID, port: CHANNEL_PORT },
            destination: self.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.credit.tell(),
        }
    }

    /// Whether payload from the host can go to the guest, or a window can be asked for.
    fn wants(&self, readable: bool) -> bool {
        let open = !self.host_done && self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        open && readable && (self.credit.window() > 0 || !self.asked_for_credit)
    }
}

fn put(header: Header, chain: &mut Chain<'_>) -> Option<Completion> {
    chain.writable.put(&header.to_bytes())?;
    Some(Completion::Done { len: HEADER_LEN })
}
