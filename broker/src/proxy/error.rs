//! Errors of the proxy. No message contains a value.

use std::io;
use std::time::Duration;

use http::StatusCode;

use super::certificate_authority::CertificateError;
use super::store::{MAX_VALUE, MIN_VALUE};

/// Time limit of a TLS handshake, on either side.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// An error that prevents the proxy from starting.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum SetupError {
    /// The proxy cannot deliver the value of this credential.
    #[error("secret {name}: {error}")]
    Value { name: String, error: ValueError },
    /// The kernel provides no random bytes for the placeholder.
    #[error("secret {name}: get random bytes: {error}")]
    Random { name: String, error: io::Error },
    /// The certificate authority of the sandbox could not be created.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The self-test failed: the credential would not have been replaced or scrubbed.
    #[error("secret {name}: the self-test of its proxy failed: {protocol}: {error}")]
    SelfTest { name: String, protocol: &'static str, error: SelfTestError },
}

/// A reason for which the proxy cannot deliver a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The value is shorter than eight bytes.
    #[error(
        "a value of less than {MIN_VALUE} bytes cannot be scrubbed from responses: use another \
         delivery"
    )]
    TooShort,
    /// The value is longer than a header may be.
    #[error(
        "a value of more than {} KiB is longer than servers accept in a header: use another \
         delivery",
        MAX_VALUE / 1024
    )]
    TooLong,
    /// The value has characters that are not printable ASCII.
    #[error("the value has characters that an HTTP header cannot hold: use printable ASCII")]
    NotPrintable,
}

/// A failure of the self-test.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// The credential has no host.
    #[error("the credential has no host")]
    NoHost,
    /// The credential was revoked.
    #[error("the credential has been revoked")]
    Revoked,
    /// The self-test did not finish in time.
    #[error("no result within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// The endpoint's certificate could not be created.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The TLS handshake failed.
    #[error("TLS handshake: {0}")]
    Tls(io::Error),
    /// The request could not be built.
    #[error("build a request: {0}")]
    Request(#[from] http::Error),
    /// The exchange of a request and its response failed.
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// The body of the response is incomplete or too large.
    #[error("read the response: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// The placeholder was not replaced in the request.
    #[error("the endpoint did not receive the value (status {0})")]
    NotReplaced(StatusCode),
    /// The value was not scrubbed from the response.
    #[error("the response contained the value")]
    NotScrubbed,
    /// A request with a placeholder in its path was not blocked.
    #[error("a placeholder in a path was not blocked (status {0})")]
    NotBlocked(StatusCode),
    /// The endpoint received another number of requests than one.
    #[error("the endpoint received {0} requests instead of 1")]
    RequestCount(usize),
}

/// An error that ends an intercepted connection. Only the audit log contains its text.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("not a TLS connection; hosts with proxied credentials accept TLS only")]
    NotTls,
    #[error("the TLS handshake with the sandbox failed: {0}")]
    SandboxHandshake(String),
    #[error("TLS was for another host than the connection")]
    OtherServerName,
    #[error("the TLS handshake with the endpoint failed: {0}")]
    EndpointHandshake(io::Error),
    #[error("a TLS handshake took longer than {} s", HANDSHAKE_LIMIT.as_secs())]
    HandshakeTimedOut,
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("the HTTP connection failed: {0}")]
    Http(#[from] hyper::Error),
}
