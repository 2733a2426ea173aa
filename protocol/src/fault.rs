use crate::{ProcessId, RequestId, StreamId};

/// A violation of the protocol by the peer.
///
/// A fault cannot be recovered from: it ends the connection, and the sandbox with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "fields of variants whose text explains them")]
pub enum Fault {
    /// The first frame was not a hello.
    #[error("the peer sent a frame of kind {kind:#04x} before its hello")]
    MissingHello {
        /// The kind byte of that frame.
        kind: u8,
    },
    /// The peer sent a second hello.
    #[error("the peer sent its hello twice")]
    DuplicateHello,
    /// The hello does not begin with the magic bytes: the peer speaks another protocol.
    #[error("the peer's hello is malformed; is the program at the other end a chitin agent?")]
    InvalidHello,
    /// The peer offers a version that this side does not support.
    #[error(
        "the peer offers protocol version {theirs}, this side {ours}: use a root image of this \
         release"
    )]
    UnsupportedVersion { theirs: u32, ours: u32 },
    /// A kind byte that no version of the protocol defines.
    #[error("unknown frame kind {kind:#04x}")]
    UnknownKind { kind: u8 },
    /// A payload length, in bytes, outside the range of the frame's kind.
    #[error("a frame of kind {kind:#04x} announced an invalid length of {len} bytes")]
    InvalidLength { kind: u8, len: u32 },
    /// A control frame that does not decode to a message of this direction, or has trailing bytes.
    #[error("undecodable control message of {len} bytes")]
    InvalidMessage {
        /// The length of the payload in bytes.
        len: usize,
    },
    /// A frame on a stream that was never opened, or a control frame that names a stream.
    #[error("a frame of kind {kind:#04x} on stream {stream}, which was never opened")]
    UnknownStream { kind: u8, stream: StreamId },
    /// A stream id that belongs to the other side, or that was used before.
    #[error("the peer opened stream {stream}, an id it may not use")]
    InvalidStreamId { stream: StreamId },
    /// More than [`crate::MAX_STREAMS`] open streams of the host, or [`crate::MAX_DIALS`] of the
    /// agent.
    #[error(
        "too many open streams: at most {} of the host and {} of the agent",
        crate::MAX_STREAMS,
        crate::MAX_DIALS
    )]
    TooManyStreams,
    /// Data or an end on a half that the peer has ended, or that does not exist.
    #[error("data on stream {stream} after its end")]
    DataAfterEnd { stream: StreamId },
    /// More data than the window of the stream allows.
    #[error("{len} bytes on stream {stream}, which has {window} bytes of window left")]
    WindowExceeded { stream: StreamId, len: u32, window: u32 },
    /// Credit of zero bytes, or credit that raises the window above [`crate::WINDOW`].
    #[error("{credit} bytes of credit on stream {stream} are none, or overflow its window")]
    CreditOverflow { stream: StreamId, credit: u32 },
    /// More frames on closed streams than can have been on their way when these were closed.
    #[error("the peer floods streams that are closed")]
    StaleFrames,
    /// The peer causes answers and does not read them.
    #[error("the peer left {len} bytes of output unread")]
    UnreadBacklog {
        /// The number of bytes that wait to be written.
        len: usize,
    },
    /// A message that is not allowed in this state. The layer above reports it.
    #[error("unexpected message: {0}")]
    Unexpected(#[from] Unexpected),
}

/// The reason why a well-formed control message is a [`Fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unexpected {
    /// The agent sent a second [`Ready`](crate::ToHost::Ready).
    #[error("the agent reported ready twice")]
    DuplicateReady,
    /// [`Exited`](crate::ToHost::Exited) for a process that is not running.
    #[error("the exit of process {0}, which is not running")]
    UnknownProcess(ProcessId),
    /// [`Done`](crate::ToHost::Done) for a request that is not pending.
    #[error("an answer to request {0}, which is not pending")]
    UnknownRequest(RequestId),
    /// A message about egress from an agent that was not sent [`Egress`](crate::ToGuest::Egress).
    #[error("egress is not enabled")]
    EgressNotEnabled,
    /// A [`Start`](crate::Start) with the id of a process that is still running.
    #[error("process id {0} is in use")]
    ProcessIdInUse(ProcessId),
    /// A copy with the id of a copy that is still running.
    #[error("request id {0} is in use")]
    RequestIdInUse(RequestId),
    /// A message that follows [`Freeze`](crate::ToGuest::Freeze) on the same channel.
    #[error("a message after a freeze")]
    MessageAfterFreeze,
    /// A second [`Freeze`](crate::ToGuest::Freeze): an agent can be frozen once.
    #[error("a second freeze")]
    SecondFreeze,
    /// A [`Reseed`](crate::Reseed) without a preceding [`Freeze`](crate::ToGuest::Freeze).
    #[error("a reseed without a freeze")]
    ReseedWithoutFreeze,
    /// Any other message where only a [`Reseed`](crate::Reseed) is allowed.
    #[error("a message before the reseed")]
    MessageBeforeReseed,
}
