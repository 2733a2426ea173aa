//! The vsock device: the guest's only way out.
//!
//! A guest gets one connection in its life, from any port of its own to port [`CHANNEL_PORT`] of
//! the host. The device joins it to the channel, byte by byte, and refuses everything else. See
//! [`connection`] for the states of the connection and [`credit`] for the flow control.
//!
//! A guest that becomes a template closes that connection and requests another one. It gets no
//! answer: it is saved with the request pending, and each guest restored from it finds the request
//! accepted, on a channel of its own. To the guest, the time between is a connection that took a
//! moment. Nothing is reset and nothing is polled.
//!
//! # The protocol
//!
//! VIRTIO 1.2, section 5.10, in brief. A connection is a byte stream between two addresses, each a
//! context ID (CID) and a port; CID 2 is the host. Packets from the guest arrive in the transmit
//! queue. Packets to the guest need an empty buffer that the driver has put into the receive queue.
//! The third queue would report events such as a changed CID, and stays unused. Each packet begins
//! with a header of 44 bytes ([`packet::Header`]): the two addresses, an operation, the length of
//! the payload, and the sender's credit.
//!
//! - `REQUEST` asks for a connection. The other side accepts with `RESPONSE` or refuses with `RST`.
//! - `RW` carries payload.
//! - `SHUTDOWN` says, in two flags, that its sender will send no more, or receive no more. A side
//!   that sets both waits for `RST` as the confirmation.
//! - `RST` ends a connection at once. It also answers every packet that belongs to no connection,
//!   except another `RST`.
//! - `CREDIT_UPDATE` announces credit, and `CREDIT_REQUEST` asks for such a packet.
//!
//! Credit keeps a sender from filling the receiver's memory. Every header carries the size of its
//! sender's receive buffer (`buf_alloc`) and how many bytes have been taken out of it so far
//! (`fwd_cnt`). The peer may have at most `buf_alloc` bytes on the way that `fwd_cnt` does not
//! cover yet.
//!
//! Many packets of the guest call for a reply, and the receive queue may be empty at that moment.
//! So no reply is written at once, not even the `RESPONSE` to a `REQUEST`: it waits in a short list
//! (`pending_control`) and leaves in the next receive buffer, before any payload. The specification
//! asks both sides for such a list, so that two full queues do not wait for each other for ever,
//! and lets it be bounded: when it is full, the device stops taking packets.

pub mod connection;
pub mod credit;
mod host_channel;
pub mod packet;
mod stream;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::queue::{ActiveQueue, Completion};
use super::{
    Activation, Flow, GuestFault, HandlerState, NotQuiescent, QueueHandler, Ready, VirtioDevice,
};
use connection::Connection;

/// The place of the channel's socket, which may be set after the device was made, but once.
pub type ChannelSlot = Arc<OnceLock<Arc<UnixStream>>>;

/// The guest's CID. 0 to 2 are reserved, and each guest has a device of its own, so that all can
/// have the same.
pub const GUEST_CID: u64 = 3;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// The port of the host that the agent connects to.
pub const CHANNEL_PORT: u32 = 1024;

/// The largest sizes of the queues: receive, transmit, events. A driver fills the receive queue
/// with buffers before the first connection, and again when half of them are used. The guest's
/// kernel spreads a socket's window (256 KiB) over as many buffers as the queue has entries
/// (`kernel-config/patches/0012`). Fewer and larger buffers would put more bytes in each packet,
/// and a restored guest would touch new pages sooner.
pub const QUEUE_SIZES: [u16; 3] = [32, 128, 8];

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The most times that one notification fills and empties the list of pending control packets
/// before other work gets a turn. Four times the list is a transmit queue full of packets to be
/// refused. A guest can go on adding packets and buffers for ever.
const ROUNDS_PER_TURN: usize = 4;

/// The negotiation half.
pub struct Vsock {
    config: [u8; 8],
    channel: ChannelSlot,
    /// Set if the guest becomes a template: its second connection is left unanswered.
    is_template: bool,
    /// Set when the guest has connected. A byte stream cannot be joined to a second connection, not
    /// even after the driver has reset the device.
    used: Arc<AtomicBool>,
}

impl Vsock {
    /// Makes a device that joins the guest's connection to the channel in the slot, a non-blocking
    /// socket. A connection is refused if the slot is empty when the driver is ready.
    pub fn new(channel: ChannelSlot, is_template: bool) -> Self {
        Self { config: GUEST_CID.to_le_bytes(), channel, is_template, used: Arc::default() }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn busy_queue(&self) -> Option<u16> {
        // The driver refills the receive queue long before it is empty, and only notifies the
        // device when it was.
        Some(TRANSMIT)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler> {
        let Activation { queues, request, faults, .. } = activation;
        let (channel, used) = (self.channel.get().cloned(), Arc::clone(&self.used));
        let mut connection = Connection::new(channel, self.is_template, used, faults);
        if let Some(request) = request {
            connection.accept(request);
        }
        Box::new(VsockHandler { connection, queues })
    }
}

/// The running half: moves packets between the queues and the connection.
struct VsockHandler {
    connection: Connection,
    queues: Vec<ActiveQueue>,
}

impl VsockHandler {
    /// Moves all packets that can be moved. The others wait for the driver's next notification, or
    /// for the channel.
    fn process_queues(&mut self) -> Result<Flow, GuestFault> {
        let Self { connection, queues } = self;
        let [receive, transmit, ..] = queues.as_mut_slice() else { return Ok(Flow::Continue) };
        for _ in 0..ROUNDS_PER_TURN {
            connection.flush();
            let mut stalled = false;
            transmit.drain(|chain| {
                let completion = connection.handle_packet(chain);
                stalled |= completion == Completion::Stop;
                Ok(completion)
            })?;
            if connection.has_output() {
                receive.drain(|chain| connection.fill_buffer(RECEIVE, chain))?;
            }
            if !(stalled && connection.has_room()) {
                return Ok(connection.flow());
            }
        }
        transmit.call_again();
        Ok(connection.flow())
    }
}

impl QueueHandler for VsockHandler {
    fn sources(&self) -> Vec<RawFd> {
        self.connection.channel().map(AsRawFd::as_raw_fd).into_iter().collect()
    }

    fn is_blocked(&self) -> bool {
        self.connection.is_blocked()
    }

    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        self.process_queues()
    }

    fn on_source(&mut self, _: usize, ready: Ready) -> Result<Flow, GuestFault> {
        self.connection.on_channel(ready);
        self.process_queues()
    }

    fn is_drained(&self) -> bool {
        self.connection.is_drained()
    }

    fn save(&self) -> Result<HandlerState, NotQuiescent> {
        let request = self.connection.save()?;
        let transmit = self.queues.get(usize::from(TRANSMIT));
        if !transmit.is_some_and(|queue| queue.is_empty().unwrap_or(false)) {
            return Err(NotQuiescent::PendingPackets);
        }
        let positions = self.queues.iter().map(ActiveQueue::position).collect();
        Ok(HandlerState { positions, request: Some(request) })
    }

    fn survives_reset(&self) -> bool {
        !self.connection.is_used()
    }
}

#[cfg(test)]
mod connection_test;
#[cfg(test)]
mod flow_control_test;
#[cfg(test)]
mod template_test;
#[cfg(test)]
mod test_guest;
