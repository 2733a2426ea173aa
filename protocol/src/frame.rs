//! Frames: eight bytes of header, then the payload.
//!
//! ```text
//!  0        1                    4                          8
//!  ┌────────┬────────────────────┬──────────────────────────┬─ ─ ─ ─ ─
//!  │ kind   │ length (24 bit LE) │ stream (32 bit LE)       │ payload
//!  └────────┴────────────────────┴──────────────────────────┴─ ─ ─ ─ ─
//! ```

use crate::Fault;

/// The length of a frame header in bytes.
pub const HEADER_LEN: usize = 8;

/// The maximum payload of a data frame in bytes: one pipe buffer of Linux, and one vsock packet.
pub const MAX_DATA: usize = 64 * 1024;

/// The maximum payload of a control frame in bytes. The longest honest message is a `Start` with a
/// long argv and environment.
pub const MAX_CONTROL: usize = 256 * 1024;

/// The payload length of a hello: magic bytes and version.
pub(crate) const HELLO_LEN: usize = 8;
pub(crate) const MAGIC: [u8; 4] = *b"CHTN";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Magic bytes and version (u32 LE), on stream 0. Each side sends exactly one, as its first
    /// frame.
    Hello = 1,
    /// One message, encoded with postcard, on stream 0.
    Control = 2,
    /// Bytes of a stream, at least one.
    Data = 3,
    /// A number of bytes (u32 LE) that the receiver has consumed: the sender may send as many more.
    Credit = 4,
    /// The end of the sender's half: it sends no more data on the stream.
    End = 5,
    /// The end of the stream in both directions.
    Reset = 6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub len: u32,
    pub stream: u32,
}

impl Header {
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&(self.len << 8).to_le_bytes());
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.stream.to_le_bytes());
        bytes
    }

    /// Decodes a header and checks kind, length and stream, so that only an acceptable payload is
    /// waited for.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Header, Fault> {
        let [kind, l0, l1, l2, s0, s1, s2, s3] = bytes;
        let len = u32::from_le_bytes([l0, l1, l2, 0]);
        let stream = u32::from_le_bytes([s0, s1, s2, s3]);
        let (known, lengths) = match kind {
            1 => (Kind::Hello, HELLO_LEN..=HELLO_LEN),
            2 => (Kind::Control, 1..=MAX_CONTROL),
            3 => (Kind::Data, 1..=MAX_DATA),
            4 => (Kind::Credit, 4..=4),
            5 => (Kind::End, 0..=0),
            6 => (Kind::Reset, 0..=0),
            _ => return Err(Fault::UnknownKind { kind }),
        };
        if !lengths.contains(&(len as usize)) {
            return Err(Fault::InvalidLength { kind, len });
        }
        let connection_wide = matches!(known, Kind::Hello | Kind::Control);
        if connection_wide != (stream == 0) {
            return Err(Fault::UnknownStream { kind, stream });
        }
        Ok(Header { kind: known, len, stream })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let header = Header { kind: Kind::Data, len: MAX_DATA as u32, stream: 0x0102_0304 };
        assert_eq!(header.encode(), [3, 0, 0, 1, 4, 3, 2, 1]);
        assert_eq!(Header::decode(header.encode()), Ok(header));
    }

    #[test]
    fn invalid_length_is_rejected_by_header_alone() {
        for (kind, len) in [
            (1, 7),
            (2, 0),
            (2, MAX_CONTROL + 1),
            (3, 0),
            (3, MAX_DATA + 1),
            (4, 5),
            (5, 1),
            (6, 1),
        ] {
            let stream = u32::from(kind > 2);
            let mut bytes = [0; HEADER_LEN];
            bytes[..4].copy_from_slice(&((len as u32) << 8).to_le_bytes());
            bytes[0] = kind;
            bytes[4..].copy_from_slice(&stream.to_le_bytes());
            assert_eq!(Header::decode(bytes), Err(Fault::InvalidLength { kind, len: len as u32 }));
        }
    }

    #[test]
    fn unknown_kind_or_wrong_stream_is_fault() {
        assert_eq!(Header::decode([0; 8]), Err(Fault::UnknownKind { kind: 0 }));
        assert_eq!(Header::decode([7, 0, 0, 0, 0, 0, 0, 0]), Err(Fault::UnknownKind { kind: 7 }));
        assert_eq!(
            Header::decode([3, 1, 0, 0, 0, 0, 0, 0]),
            Err(Fault::UnknownStream { kind: 3, stream: 0 })
        );
        assert_eq!(
            Header::decode([2, 1, 0, 0, 9, 0, 0, 0]),
            Err(Fault::UnknownStream { kind: 2, stream: 9 })
        );
    }
}
