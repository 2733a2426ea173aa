//! The reasons for which the proxy blocks a request or a response.

use std::fmt;
use std::sync::Arc;

use http::StatusCode;
use http::header::HeaderName;

use super::body::MAX_BODY;

/// A reason for which a message is blocked. Its text is sent to the workload and written to the
/// audit log; it never contains a value.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum BlockReason {
    /// The method is CONNECT.
    #[error("CONNECT is not allowed: this is an endpoint, not a proxy")]
    Connect,
    /// The request names another host than the one that was dialled.
    #[error("the request was for another host than the connection")]
    OtherHost,
    /// The body is larger than [`MAX_BODY`], or incomplete.
    #[error(
        "a body over {} MiB, to a host where placeholders are replaced in bodies, or one that \
         broke off",
        MAX_BODY / (1024 * 1024)
    )]
    Body,
    /// The query with the value is not valid in a URL.
    #[error("the query is too long for a URL")]
    InvalidQuery,
    /// The value is not valid in a header.
    #[error("{0} cannot hold the value")]
    InvalidHeader(Location),
    /// The credential was revoked, or has expired.
    #[error("the credential {credential} was revoked or has expired")]
    Revoked { credential: String },
    /// A placeholder is in a location where it is not replaced.
    #[error("the placeholder of {credential} is in {location}, where it is not replaced")]
    Misplaced { credential: String, location: Location },
    /// A placeholder was sent to a host that its credential is not for.
    #[error("the placeholder of {credential} was sent to another host, in {location}")]
    WrongHost { credential: String, location: Location },
    /// A placeholder was sent on a connection whose TLS is not intercepted.
    #[error("the placeholder of {credential} was sent to another host")]
    NotIntercepted { credential: String },
    /// The response has a content encoding.
    #[error(
        "the endpoint compressed its response without being asked, so that it cannot be scrubbed"
    )]
    Compressed,
    /// The endpoint sent no valid response.
    #[error("the endpoint did not answer: {0}")]
    NoResponse(Arc<hyper::Error>),
}

impl BlockReason {
    /// Returns the status of the response that the workload receives.
    pub fn status(&self) -> StatusCode {
        match self {
            BlockReason::OtherHost => StatusCode::MISDIRECTED_REQUEST,
            BlockReason::Body => StatusCode::PAYLOAD_TOO_LARGE,
            BlockReason::Compressed | BlockReason::NoResponse(_) => StatusCode::BAD_GATEWAY,
            BlockReason::Connect
            | BlockReason::InvalidQuery
            | BlockReason::InvalidHeader(_)
            | BlockReason::Revoked { .. }
            | BlockReason::Misplaced { .. }
            | BlockReason::WrongHost { .. }
            | BlockReason::NotIntercepted { .. } => StatusCode::FORBIDDEN,
        }
    }
}

/// The part of a message in which a placeholder was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    Path,
    Query,
    HeaderName,
    Header(HeaderName),
    Body,
    UpgradedConnection,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Path => f.write_str("the path"),
            Location::Query => f.write_str("the query"),
            Location::HeaderName => f.write_str("a header's name"),
            Location::Header(name) => write!(f, "the header {name}"),
            Location::Body => f.write_str("the body"),
            Location::UpgradedConnection => f.write_str("an upgraded connection"),
        }
    }
}
