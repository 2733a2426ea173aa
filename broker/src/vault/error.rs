use std::fmt;
use std::io;
use std::path::PathBuf;

use super::MAX_FIELDS;

/// An error of a Vault server, or of its configuration.
///
/// No message holds a secret, nor the words of a server: they may quote a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the message of each variant describes it")]
pub enum VaultError {
    #[error("VAULT_ADDR is not set: set it to the address of the vault, https://HOST:8200")]
    MissingAddress,
    #[error("VAULT_ADDR is not an http:// or https:// address")]
    InvalidAddress,
    #[error(
        "VAULT_SKIP_VERIFY is set, and a server with an unverified certificate may be any server: \
         set VAULT_CACERT to the CA of the vault instead"
    )]
    SkipVerify,
    #[error("no login for the vault: set VAULT_TOKEN, or VAULT_ROLE_ID and VAULT_SECRET_ID")]
    MissingLogin,
    #[error(
        "{0} holds a character that an HTTP header cannot hold: check for a newline at its end"
    )]
    InvalidHeader(&'static str),
    #[error("read the certificates of VAULT_CACERT, {}", path.display())]
    ReadCertificates { path: PathBuf, source: io::Error },
    #[error("VAULT_CACERT, {}: not a PEM file", path.display())]
    InvalidCertificates { path: PathBuf },
    #[error("VAULT_CACERT, {}: the file holds no certificate", path.display())]
    NoCertificates { path: PathBuf },
    #[error("set up the HTTP client for the vault")]
    HttpClient(#[source] reqwest::Error),
    #[error("the vault at {address} cannot be reached: {failure}")]
    Unreachable { address: String, failure: ConnectionFailure },
    #[error("the vault at {address} is sealed or not ready: unseal it")]
    Sealed { address: String },
    #[error(
        "the vault at {address} answers with a redirect, which would send the token elsewhere: \
         set VAULT_ADDR to the active server"
    )]
    Redirect { address: String },
    #[error(
        "the vault refuses the login at auth/{mount}: the role id or secret id is wrong, used up \
         or expired, or the mount is not an AppRole"
    )]
    LoginRefused { mount: String },
    #[error("the wrapping token for the vault is invalid: it was used before, or has expired")]
    InvalidWrappingToken,
    #[error("the vault refuses {operation}: the token has expired, or its policies forbid this")]
    Denied { operation: String },
    #[error("the vault has nothing at {operation}")]
    NotFound { operation: String },
    #[error("the vault does not support {operation}")]
    Unsupported { operation: String },
    #[error("the vault answers {operation} with status {code}")]
    Status { operation: String, code: u16 },
    #[error("the vault's response to {operation} is invalid")]
    InvalidResponse { operation: String },
    #[error("{location} has {count} fields: choose one with #FIELD")]
    AmbiguousField { location: String, count: usize },
    #[error("{location} has no field `{field}`")]
    MissingField { location: String, field: String },
    #[error("field `{field}` of {location} is not a string, number or boolean")]
    NotScalar { location: String, field: String },
    #[error("field `{field}` of {location} cannot name a credential: use letters, digits and `_`")]
    InvalidFieldName { location: String, field: String },
    #[error("{location} has {count} fields: at most {MAX_FIELDS} can become credentials")]
    TooManyFields { location: String, count: usize },
    #[error("the credentials that the vault issued were revoked")]
    Revoked,
    #[error("the lease can no longer be renewed")]
    NotRenewable,
}

impl VaultError {
    /// Returns true if the server did not process the request. Another request would fail too.
    pub(crate) fn is_outage(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Sealed { .. } | Self::Redirect { .. })
    }
}

/// The reason why a connection to a Vault server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionFailure {
    /// No response within 10 seconds.
    Timeout,
    /// TLS failed. Usually, the certificate is not from a trusted CA.
    Tls,
    /// The connection was refused, or the name does not resolve.
    Connect,
    /// The connection ended before the response did, or the response is not HTTP.
    Broken,
}

impl ConnectionFailure {
    pub(super) fn of(error: &reqwest::Error) -> ConnectionFailure {
        match error {
            error if error.is_timeout() => Self::Timeout,
            error if has_tls_source(error) => Self::Tls,
            error if error.is_connect() => Self::Connect,
            _ => Self::Broken,
        }
    }
}

impl fmt::Display for ConnectionFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timeout => "no response within 10 s",
            Self::Tls => "its certificate is not trusted (set VAULT_CACERT to its CA)",
            Self::Connect => "no server listens there, or the name does not resolve",
            Self::Broken => "the connection ended early",
        })
    }
}

/// Returns true if an error of TLS is among the sources.
fn has_tls_source(error: &reqwest::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<rustls::Error>() {
            return true;
        }
        // The `source` of an I/O error skips the error that it wraps.
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && inner.is::<rustls::Error>()
        {
            return true;
        }
        source = error.source();
    }
    false
}
