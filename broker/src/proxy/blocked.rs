//! The reasons for which the proxy blocks a request or a response.

use std::fmt;
use std::sync::Arc;

use http::header::HeaderName;
use http::{Method, StatusCode};

use super::body::MAX_BODY;
use super::store::MAX_HITS;

/// A reason for which a message is blocked. Its text is sent to the workload and written to the
/// audit log; it never contains a value.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum BlockReason {
    /// The method is CONNECT.
    #[error("CONNECT is not allowed: this is an endpoint, not a proxy")]
    Connect,
    /// The method is none that the proxy forwards.
    #[error("the method {0} is not forwarded to hosts with proxied credentials")]
    Method(Method),
    /// The request names another host than the one that was dialled.
    #[error("the request was for another host than the connection")]
    OtherHost,
    /// The request has fields that describe its length or connection ambiguously.
    #[error("the request has an ambiguous or unsupported {0}")]
    RequestFraming(HeaderName),
    /// The request upgrades its connection, and not with a valid handshake of WebSocket.
    #[error(
        "the request upgrades its connection: only WebSocket, version 13, over HTTP/1.1 is \
         relayed to hosts with proxied credentials"
    )]
    Upgrade,
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
    #[error(
        "the placeholder of {credential} is in {location}, where it is not replaced{}",
        location.opt_in(credential)
    )]
    Misplaced { credential: String, location: Location },
    /// A placeholder was sent to a host that its credential is not for.
    #[error("the placeholder of {credential} was sent to another host, in {location}")]
    WrongHost { credential: String, location: Location },
    /// A placeholder is in a request whose method its credential is not for.
    #[error("the credential {credential} is not for requests with the method {method}")]
    WrongMethod { credential: String, method: Method },
    /// A placeholder is in a request whose path its credential is not for.
    #[error("the credential {credential} is only for paths at or below {prefix}")]
    WrongPath { credential: String, prefix: String },
    /// A placeholder was sent on a connection whose TLS is not intercepted.
    #[error("the placeholder of {credential} was sent to another host")]
    NotIntercepted { credential: String },
    /// Values were scrubbed from too many messages.
    #[error(
        "over {MAX_HITS} messages a minute contained the value of a credential: requests are \
         refused until the rate is lower"
    )]
    ScrubLimit,
    /// More requests are in flight than the buffers of the sandbox are for.
    #[error("too many requests are in flight: retry when others have ended")]
    Busy,
    /// The response has a content encoding.
    #[error(
        "the endpoint compressed its response without being asked, so that it cannot be scrubbed"
    )]
    Compressed,
    /// The response is in a character encoding that is not a superset of ASCII.
    #[error("the response has a character encoding that cannot be scrubbed")]
    Charset,
    /// The response has another transfer encoding than `chunked`.
    #[error("the response has another transfer encoding than `chunked`")]
    TransferEncoding,
    /// The response has fields that describe its length or type ambiguously.
    #[error("the response has an ambiguous {0}")]
    ResponseFraming(HeaderName),
    /// The response has a status that was not requested, or that the proxy does not forward.
    #[error("the endpoint answered with status {0}, which was not requested")]
    Status(u16),
    /// The endpoint's answer to a handshake of WebSocket is invalid, or has an extension.
    #[error("the endpoint sent an invalid WebSocket handshake, or one with an extension")]
    Handshake,
    /// A frame of a WebSocket is invalid, or has an extension.
    #[error("{0} sent an invalid WebSocket frame, or one with an extension")]
    WebSocketFrame(Side),
    /// The endpoint sent no valid response.
    #[error("the endpoint did not answer: {0}")]
    NoResponse(Arc<hyper::Error>),
}

impl BlockReason {
    /// Returns the status of the response that the workload receives.
    pub fn status(&self) -> StatusCode {
        match self {
            BlockReason::OtherHost => StatusCode::MISDIRECTED_REQUEST,
            BlockReason::RequestFraming(_) => StatusCode::BAD_REQUEST,
            BlockReason::Body => StatusCode::PAYLOAD_TOO_LARGE,
            BlockReason::ScrubLimit => StatusCode::TOO_MANY_REQUESTS,
            BlockReason::Busy => StatusCode::SERVICE_UNAVAILABLE,
            BlockReason::Compressed
            | BlockReason::Charset
            | BlockReason::TransferEncoding
            | BlockReason::ResponseFraming(_)
            | BlockReason::Status(_)
            | BlockReason::Handshake
            | BlockReason::WebSocketFrame(_)
            | BlockReason::NoResponse(_) => StatusCode::BAD_GATEWAY,
            BlockReason::Connect
            | BlockReason::Method(_)
            | BlockReason::Upgrade
            | BlockReason::InvalidQuery
            | BlockReason::InvalidHeader(_)
            | BlockReason::Revoked { .. }
            | BlockReason::Misplaced { .. }
            | BlockReason::WrongHost { .. }
            | BlockReason::WrongMethod { .. }
            | BlockReason::WrongPath { .. }
            | BlockReason::NotIntercepted { .. } => StatusCode::FORBIDDEN,
        }
    }
}

/// A side of an intercepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Sandbox,
    Endpoint,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Sandbox => "the sandbox",
            Side::Endpoint => "the endpoint",
        })
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
    WebSocket,
}

impl Location {
    /// Returns the end of a sentence: the options that make the proxy replace it here, if any.
    fn opt_in(&self, credential: &str) -> String {
        match self {
            Location::Query => {
                format!(": use --secret-query {credential}, or `replaced_in: [query]` in a policy")
            }
            Location::Body => {
                format!(": use --secret-body {credential}, or `replaced_in: [body]` in a policy")
            }
            Location::Header(name) => format!(
                ": use --secret-header {credential}={name}, or `replaced_in: [\"header:{name}\"]` \
                 in a policy"
            ),
            Location::Path | Location::HeaderName | Location::WebSocket => String::new(),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Path => f.write_str("the path"),
            Location::Query => f.write_str("the query"),
            Location::HeaderName => f.write_str("a header's name"),
            Location::Header(name) => write!(f, "the header {name}"),
            Location::Body => f.write_str("the body"),
            Location::WebSocket => f.write_str("a WebSocket"),
        }
    }
}
