//! The header of a vsock packet. Source: VIRTIO 1.2, section 5.10.6.

use super::{CHANNEL_PORT, GUEST_CID, HOST_CID};

/// The size of a header.
pub const HEADER_BYTES: usize = 44;

/// The size of a header, in the type of lengths on the wire.
pub const HEADER_LEN: u32 = 44;

/// The most payload in one packet, as in Linux (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type that the device offers.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags: the sender closes the connection.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The operation of a packet, `VIRTIO_VSOCK_OP_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Requests a connection.
    Request = 1,
    /// Accepts a requested connection.
    Response = 2,
    /// Refuses a connection, or ends it at once.
    Rst = 3,
    /// Ends one direction of a connection, or both.
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Announces the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Rst,
        Self::Shutdown,
        Self::Rw,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    fn parse(op: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u16 == op)
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockAddr {
    /// The context ID: 2 is the host, 3 the guest.
    pub cid: u64,
    /// The port.
    pub port: u32,
}

/// The host's end of the only connection.
pub const CHANNEL_ADDR: VsockAddr = VsockAddr { cid: HOST_CID, port: CHANNEL_PORT };

/// A parsed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender.
    pub source: VsockAddr,
    /// The receiver.
    pub destination: VsockAddr,
    /// The bytes of payload that follow.
    pub len: u32,
    /// The field `type`: [`TYPE_STREAM`], or a type that the device does not offer.
    pub socket_type: u16,
    /// The operation, or `None` if it does not exist.
    pub op: Option<Op>,
    /// The flags of [`Op::Shutdown`].
    pub flags: u32,
    /// The sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// The bytes of payload that the sender has taken out of that buffer so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Makes a header without payload from a port of the guest to the channel.
    pub fn guest_to_host(op: Op, guest_port: u32, buf_alloc: u32) -> Self {
        Self {
            source: VsockAddr { cid: GUEST_CID, port: guest_port },
            destination: CHANNEL_ADDR,
            len: 0,
            socket_type: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc,
            fwd_cnt: 0,
        }
    }

    /// Makes the reset that refuses this packet.
    pub fn refusal(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            len: 0,
            socket_type: self.socket_type,
            op: Some(Op::Rst),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Parses a header. All bytes are valid.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            std::array::from_fn(|index| bytes[at + index])
        }
        let u16_at = |at| u16::from_le_bytes(field(bytes, at));
        let u32_at = |at| u32::from_le_bytes(field(bytes, at));
        let u64_at = |at| u64::from_le_bytes(field(bytes, at));
        Self {
            source: VsockAddr { cid: u64_at(0), port: u32_at(16) },
            destination: VsockAddr { cid: u64_at(8), port: u32_at(20) },
            len: u32_at(24),
            socket_type: u16_at(28),
            op: Op::parse(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Encodes the header. An unknown operation becomes zero.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.source.cid.to_le_bytes());
        put(8, &self.destination.cid.to_le_bytes());
        put(16, &self.source.port.to_le_bytes());
        put(20, &self.destination.port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.socket_type.to_le_bytes());
        put(30, &self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let mut bytes = [0; HEADER_BYTES];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(index).unwrap();
        }
        let unknown = Header::parse(&bytes);
        assert_eq!((unknown.op, unknown.source.cid), (None, 0x0706_0504_0302_0100));
        for op in 1..=7u16 {
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            let header = Header::parse(&bytes);
            assert_eq!(header.op.unwrap() as u16, op);
            assert_eq!(header.to_bytes(), bytes);
        }
    }
}
