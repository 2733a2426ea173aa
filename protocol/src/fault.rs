use crate::StreamId;

/// A breach of the protocol by the peer. There is no way back: the connection, and the sandbox with it, ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The first frame was not a hello.
    #[error("the peer sent a frame of kind {kind:#04x} before its hello")]
    NoHello {
        /// The kind byte that came instead.
        kind: u8,
    },
    /// A second hello.
    #[error("the peer sent its hello twice")]
    HelloTwice,
    /// The hello is not ours at all: another protocol, or noise.
    #[error("the peer's hello is malformed; is the program at the other end a chitin agent?")]
    BadHello,
    /// A version this side cannot speak.
    #[error(
        "the peer speaks protocol version {theirs}, this side {ours}: use a root image of this release"
    )]
    Version {
        /// What the peer offered.
        theirs: u32,
        /// What this side offers.
        ours: u32,
    },
    /// A kind byte no version defines.
    #[error("unknown frame kind {kind:#04x}")]
    UnknownKind {
        /// The kind byte.
        kind: u8,
    },
    /// A payload length this kind cannot have.
    #[error("a frame of kind {kind:#04x} announced {len} bytes")]
    BadLength {
        /// The kind byte.
        kind: u8,
        /// The announced length in bytes.
        len: u32,
    },
    /// A control frame that does not decode to a message of this direction, or has bytes left over.
    #[error("undecodable control message of {len} bytes")]
    BadMessage {
        /// Length of the payload in bytes.
        len: usize,
    },
    /// A frame on a stream nobody opened, or a control frame that names one.
    #[error("a frame of kind {kind:#04x} on stream {stream}, which was never opened")]
    UnknownStream {
        /// The kind byte.
        kind: u8,
        /// The stream it named.
        stream: StreamId,
    },
    /// An id that is not the peer's to open, or was used before.
    #[error("the peer opened stream {stream}, an id it may not use")]
    BadStreamId {
        /// The id.
        stream: StreamId,
    },
    /// More than [`crate::MAX_STREAMS`] of the host's at once, or [`crate::MAX_DIALS`] of the agent's.
    #[error(
        "more streams at once than the {} of a host or the {} of an agent",
        crate::MAX_STREAMS,
        crate::MAX_DIALS
    )]
    TooManyStreams,
    /// Data on a half the peer had ended, or that never existed.
    #[error("data on stream {stream} after its end")]
    DataAfterEnd {
        /// The stream.
        stream: StreamId,
    },
    /// More data than this side granted.
    #[error("{len} bytes on stream {stream} with {window} bytes of window left")]
    WindowExceeded {
        /// The stream.
        stream: StreamId,
        /// Length of the data in bytes.
        len: u32,
        /// What was left of the window in bytes.
        window: u32,
    },
    /// Credit beyond [`crate::WINDOW`].
    #[error("{credit} bytes of credit on stream {stream} overflow its window")]
    CreditOverflow {
        /// The stream.
        stream: StreamId,
        /// The granted bytes.
        credit: u32,
    },
    /// The peer makes this side answer and does not read the answers.
    #[error("the peer left {len} bytes of answers unread")]
    Backlog {
        /// Bytes waiting to be written.
        len: usize,
    },
    /// A control message that makes no sense in this state, found by the layer above.
    #[error("unexpected message: {what}")]
    Unexpected {
        /// What was wrong with it.
        what: &'static str,
    },
}
