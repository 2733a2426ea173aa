//! Faults: violations of the VIRTIO specification by a guest.
//!
//! A fault is never a bug of the monitor and never a reason to panic. It is counted, and it crosses
//! the control socket as JSON when the guest has ended. The names of the variants are part of that
//! format: a host can match them, while the text is for people and may change.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// An action of a guest that the specification forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the fields are named after what they hold")]
pub enum GuestFault {
    /// A register that does not exist, or not with this size or alignment.
    #[error("invalid access of size {bytes} at offset {offset:#x} of a virtio device")]
    RegisterAccess {
        /// From the start of the device.
        offset: u64,
        /// The size of the access.
        bytes: usize,
    },
    /// A write to a register that is read-only, or read-only in the current status.
    #[error("virtio register {offset:#x} cannot be written in status {status:#x}")]
    RegisterWrite {
        /// From the start of the device.
        offset: u64,
        /// The status register at that time.
        status: u32,
    },
    /// A status that does not follow from the current one.
    #[error("virtio status {to:#x} does not follow from {from:#x}")]
    StatusTransition { from: u32, to: u32 },
    /// `DRIVER_OK` with a queue that is not ready, or whose rings are not in guest memory.
    #[error("queue {queue} was enabled without usable rings")]
    UnusableQueue { queue: u16 },
    /// A notification of a queue that does not exist or is not running.
    #[error("notification of queue {queue}, which is not running")]
    Notification {
        /// The value written to `QueueNotify`.
        queue: u32,
    },
    /// The available index is ahead by more than the size of the queue, or the ring is not in guest
    /// memory.
    #[error("queue {queue}: invalid available ring")]
    AvailableRing { queue: u16 },
    /// The used ring is not in guest memory.
    #[error("queue {queue}: invalid used ring")]
    UsedRing { queue: u16 },
    /// A chain that is empty, endless or longer than the queue, or that leaves its descriptor
    /// table.
    #[error("queue {queue}: invalid descriptor chain {head}")]
    Chain { queue: u16, head: u16 },
    /// A descriptor with a flag of a feature that was not negotiated, such as an indirect table.
    #[error(
        "queue {queue}: descriptor chain {head} has flags {flags:#x}, which were not negotiated"
    )]
    DescriptorFlags {
        queue: u16,
        head: u16,
        /// All flags of the descriptor.
        flags: u16,
    },
    /// A chain with a buffer that is not in guest memory.
    #[error("queue {queue}: descriptor chain {head} points outside guest memory")]
    BufferAddress { queue: u16, head: u16 },
    /// A chain whose buffers are too small for the request, or of the wrong direction.
    #[error("queue {queue}: descriptor chain {head} has only {bytes} bytes for the request")]
    BufferTooSmall {
        queue: u16,
        head: u16,
        /// The length of its buffers in the direction that the device needed.
        bytes: usize,
    },
    /// A request that the device does not implement.
    #[error("queue {queue}: unknown request type {kind}")]
    UnknownRequest { queue: u16, kind: u32 },
    /// An invalid packet of the vsock device.
    #[error("vsock packet {0}")]
    Packet(PacketFault),
}

/// A vsock packet that no driver sends, or not in this state of the connection. The text completes
/// "vsock packet …".
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PacketFault {
    /// The chain has fewer bytes than a header.
    #[error("shorter than its header")]
    ShortHeader,
    /// The source CID is not the guest's.
    #[error("with a source CID that is not the guest's")]
    SourceCid,
    /// The destination CID is not the host's.
    #[error("with a destination CID that is not the host's")]
    DestinationCid,
    /// The socket type is not a stream.
    #[error("with a socket type other than a stream")]
    SocketType,
    /// The operation does not exist.
    #[error("with an unknown operation")]
    UnknownOp,
    /// A request for a port other than the channel's.
    #[error("requesting a connection to a closed port")]
    ClosedPort,
    /// A request after the guest has had its one connection.
    #[error("requesting a second connection")]
    SecondConnection,
    /// A request while another one waits for the guest to be saved and restored.
    #[error("requesting a third connection")]
    ThirdConnection,
    /// A packet on a connection whose request has not been answered.
    #[error("on a connection that has not been accepted")]
    NotAccepted,
    /// A packet while no connection is open.
    #[error("without a connection")]
    NotConnected,
    /// A packet between ports that are not connected to each other.
    #[error("for a connection that does not exist")]
    UnknownConnection,
    /// A response, although the device never requests a connection.
    #[error("responding to no request")]
    UnexpectedResponse,
    /// The header announces more payload than the chain holds.
    #[error("with a length beyond its buffers")]
    LengthBeyondBuffers,
    /// The payload exceeds the most that one packet may carry.
    #[error("with more payload than a packet may carry")]
    PayloadTooLong,
    /// Payload after the guest has shut down its sending half.
    #[error("with payload after the end of the stream")]
    PayloadAfterShutdown,
    /// Payload beyond the receive buffer that the device has announced.
    #[error("with payload beyond the credit")]
    CreditExceeded,
}

impl From<PacketFault> for GuestFault {
    fn from(fault: PacketFault) -> Self {
        Self::Packet(fault)
    }
}

/// Counts the faults of one device, from any thread. Only the first is kept: a guest cannot make
/// this grow, and later faults are often consequences of the first.
#[derive(Debug, Default)]
pub struct FaultCounter {
    total: AtomicU64,
    first: OnceLock<GuestFault>,
}

impl FaultCounter {
    /// Counts one fault.
    pub fn count(&self, fault: impl Into<GuestFault>) {
        let _ = self.first.set(fault.into());
        self.total.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of faults so far.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Returns the first fault.
    pub fn first(&self) -> Option<GuestFault> {
        self.first.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_json_names_variant_and_fields() {
        for (fault, json) in [
            (GuestFault::Chain { queue: 1, head: 7 }, r#"{"chain":{"queue":1,"head":7}}"#),
            (PacketFault::NotConnected.into(), r#"{"packet":"not_connected"}"#),
        ] {
            assert_eq!(serde_json::to_string(&fault).unwrap(), json);
            assert_eq!(serde_json::from_str::<GuestFault>(json).unwrap(), fault);
        }
    }

    #[test]
    fn fault_counter_keeps_the_first_fault() {
        let faults = FaultCounter::default();
        assert_eq!((faults.total(), faults.first()), (0, None));
        faults.count(PacketFault::UnknownOp);
        faults.count(GuestFault::UsedRing { queue: 0 });
        assert_eq!((faults.total(), faults.first()), (2, Some(PacketFault::UnknownOp.into())));
    }
}
