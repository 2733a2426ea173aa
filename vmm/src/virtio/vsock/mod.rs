//! The vsock device: the guest's one way out.
//!
//! A guest gets one connection in its life, from any port of its own to port [`CHANNEL_PORT`] of the host. It is joined to
//! the channel, byte by byte; whatever else it tries is answered with a reset. See [`connection`] for the connection and
//! [`credit`] for flow control.
//!
//! A guest that becomes a template closes that connection and asks for another one. It gets no answer in this life: it is
//! saved with the request pending, and each guest restored from it finds it granted, and joined to a channel of its own.
//! To the guest the time between is a connection that took a moment. Nothing is reset and nothing is polled.

pub mod connection;
pub mod credit;
pub mod packet;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::queue::{ActiveQueue, Completion, Position};
use super::{Activation, Flow, GuestFault, NotQuiescent, QueueHandler, Ready, VirtioDevice};
use crate::state::machine::ConnectionRequest;
use connection::Muxer;

/// Where a device finds its channel, which may come later than everything else, but once.
pub type ChannelSlot = Arc<OnceLock<Arc<UnixStream>>>;

/// The guest's context identifier; 0 to 2 have fixed meanings and each guest has a device of its own.
pub const GUEST_CID: u64 = 3;
/// The host's.
pub const HOST_CID: u64 = 2;
/// The port of the host that the agent connects to.
pub const CHANNEL_PORT: u32 = 1024;

/// The most entries of the queues: receive, transmit, events. A driver fills the receive queue with buffers before the first
/// connection, and again when half of them are used. Ours gives it a socket's window (256 KiB) in as many buffers as there are
/// entries (`kernel-config/patches/0012`): with fewer and larger ones more bytes go in each packet, and a copy has to touch new
/// pages sooner. Events are sent only when a guest is restored, one at a time.
pub const QUEUE_SIZES: [u16; 3] = [32, 128, 8];

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// How often one notification fills and empties the list of answers before other work gets a turn: enough for a transmit
/// queue full of packets to be refused. A guest can go on adding packets and buffers for ever.
const ROUNDS_PER_TURN: usize = 4;

/// The negotiation half.
pub struct Vsock {
    config: [u8; 8],
    channel: ChannelSlot,
    /// Whether a second connection is left unanswered, so that the guest can be saved.
    template: bool,
    /// Set once a guest has connected: a byte stream cannot be joined to a second connection.
    spent: Arc<AtomicBool>,
}

impl Vsock {
    /// A device whose connection is joined to the channel found in the slot when a driver is ready, which must not block.
    /// Without one every connection is refused.
    pub fn new(channel: ChannelSlot, template: bool) -> Self {
        Self { config: GUEST_CID.to_le_bytes(), channel, template, spent: Arc::default() }
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
        // The driver refills the receive queue long before it is empty, and only notifies us when it was.
        Some(TRANSMIT)
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn activate(&mut self, activation: Activation) -> Box<dyn QueueHandler> {
        let channel = self.channel.get().cloned();
        let mut muxer =
            Muxer::new(channel, self.template, Arc::clone(&self.spent), activation.faults);
        if let Some(request) = activation.request {
            muxer.grant(request);
        }
        Box::new(VsockHandler { muxer, queues: activation.queues, spent: Arc::clone(&self.spent) })
    }
}

/// The running half: moves packets between the queues and the muxer.
struct VsockHandler {
    muxer: Muxer,
    queues: Vec<ActiveQueue>,
    spent: Arc<AtomicBool>,
}

impl VsockHandler {
    /// Moves whatever can be moved. What cannot waits for the driver's next notification or the channel's next readiness.
    fn pump(&mut self) -> Result<Flow, GuestFault> {
        let Self { muxer, queues, .. } = self;
        let [receive, transmit, ..] = queues.as_mut_slice() else { return Ok(Flow::Continue) };
        for _ in 0..ROUNDS_PER_TURN {
            muxer.flush();
            transmit.drain(|chain| muxer.on_packet(TRANSMIT, chain))?;
            if muxer.has_output() {
                receive.drain(|chain| muxer.next_packet(RECEIVE, chain))?;
            }
            // Packets were left because answers had no room, and now they have.
            if !muxer.take_stall() {
                return Ok(muxer.flow());
            }
        }
        // An eventfd that is full has been written to already.
        let _ = transmit.kick().write(1);
        Ok(muxer.flow())
    }
}

impl QueueHandler for VsockHandler {
    fn sources(&self) -> Vec<RawFd> {
        self.muxer.channel().map(AsRawFd::as_raw_fd).into_iter().collect()
    }

    fn is_blocked(&self) -> bool {
        self.muxer.is_blocked()
    }

    fn on_kick(&mut self) -> Result<Flow, GuestFault> {
        self.pump()
    }

    fn on_source(&mut self, _: usize, ready: Ready) -> Result<Flow, GuestFault> {
        self.muxer.on_channel(ready);
        self.pump()
    }

    fn is_drained(&self) -> bool {
        self.muxer.is_drained()
    }

    fn save(&self) -> Result<(Vec<Position>, Option<ConnectionRequest>), NotQuiescent> {
        let request = self.muxer.save()?;
        let transmit = self.queues.get(usize::from(TRANSMIT));
        if !transmit.is_some_and(|queue| queue.is_empty().unwrap_or(false)) {
            return Err(NotQuiescent("the guest has packets that were not taken"));
        }
        Ok((self.queues.iter().map(ActiveQueue::position).collect(), Some(request)))
    }

    fn survives_reset(&self) -> bool {
        !self.spent.load(Ordering::Relaxed)
    }
}

/// What a chain becomes when it carries nothing back.
const EMPTY: Completion = Completion::Done { len: 0 };

#[cfg(test)]
#[path = "vsock_test.rs"]
mod tests;
