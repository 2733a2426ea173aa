//! The header of a vsock packet. Source: VIRTIO 1.2, section 5.10.6.

/// Its size on the wire.
pub const HEADER_BYTES: usize = 44;

/// The same, as lengths on the wire are counted.
pub const HEADER_LEN: u32 = 44;

/// The most payload in one packet, as Linux has it (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

/// A stream, the only type we serve.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// It is not, or no longer.
    Reset = 3,
    /// One side, or both, is done.
    Shutdown = 4,
    /// Payload.
    Data = 5,
    /// Here is my window.
    CreditUpdate = 6,
    /// What is your window?
    CreditRequest = 7,
}

impl Op {
    fn parse(op: u16) -> Option<Self> {
        let all = [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::Data,
            Op::CreditUpdate,
            Op::CreditRequest,
        ];
        all.into_iter().find(|known| *known as u16 == op)
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The context: 2 is the host, 3 the guest.
    pub cid: u64,
    /// The port.
    pub port: u32,
}

/// A header, parsed. `op` keeps what it does not know, to be answered with a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Who sent it.
    pub source: Address,
    /// Who is to get it.
    pub destination: Address,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Stream, or another that we do not serve.
    pub kind: u16,
    /// What is asked for; `None` is an operation that does not exist.
    pub op: Option<Op>,
    /// For [`Op::Shutdown`].
    pub flags: u32,
    /// The sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// How many bytes of payload the sender has taken out of it, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every combination of bytes is one.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            std::array::from_fn(|index| bytes[at + index])
        }
        let u16_at = |at| u16::from_le_bytes(field(bytes, at));
        let u32_at = |at| u32::from_le_bytes(field(bytes, at));
        let u64_at = |at| u64::from_le_bytes(field(bytes, at));
        Self {
            source: Address { cid: u64_at(0), port: u32_at(16) },
            destination: Address { cid: u64_at(8), port: u32_at(20) },
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::parse(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// The header as it goes on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.source.cid.to_le_bytes());
        put(8, &self.destination.cid.to_le_bytes());
        put(16, &self.source.port.to_le_bytes());
        put(20, &self.destination.port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
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
    fn headers_survive_the_wire() {
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
