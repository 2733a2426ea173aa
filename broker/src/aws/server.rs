//! The server behind delivery `endpoint`: it answers SDKs of AWS at a port that leads nowhere else.
//!
//! ```text
//!   SDK ── GET 127.0.0.1:9911 ─▶ agent ── Dial localhost:9911 ─▶ broker ─▶ cache ─▶ source
//!       ◀─────────────────────── keys with an expiry ◀────────────────────────┘
//! ```
//!
//! It serves two protocols: the credentials of a container (ECS), whose token is in the environment
//! of the workload, and the metadata of an instance, see `imds`.

use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chitin_spec::SecretSpec;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::AwsKeys;
use super::cache::KeyCache;
use super::imds::{self, SECRET_LEN, TokenKey};
use crate::error::SecretError;
use crate::proxy::encoding::encode_base64;
use crate::secret_value::SecretValue;
use crate::vault::LeaseReader;

/// The host name that the agent dials.
const HOST_NAME: &str = "localhost";

/// The port at which the credential helper of AWS serves a machine.
pub const PORT: u16 = 9911;

/// The time limit for the head of a request: a few hundred bytes from the same machine.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The time limit of a connection. A response may wait for a source: 60 s for a command, 10 s for
/// each request to a vault.
const SERVE_LIMIT: Duration = Duration::from_secs(90);

/// The maximum size of all headers of a request in bytes.
const MAX_HEADERS: usize = 16 * 1024;

/// The environment variables of SDKs: the URL and the token of container credentials, the URL of
/// instance metadata, and the option that disables its version 1.
const VARIABLES: [&str; 4] = [
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_V1_DISABLED",
];

/// The credential server of one sandbox.
pub struct AwsCredentialServer {
    pub(super) cache: KeyCache,
    revoked: AtomicBool,
    /// The token of container credentials.
    pub(super) token: SecretValue,
    pub(super) token_key: TokenKey,
}

impl fmt::Debug for AwsCredentialServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsCredentialServer").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// The result of a request, for the audit log. A request that neither got keys nor tried to is not
/// logged.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The keys were sent. `refresh_error`: the source failed, so they are the earlier ones.
    Served { refresh_error: Option<SecretError> },
    /// The request was not allowed.
    Refused(Refusal),
    /// There are no valid keys.
    Failed(SecretError),
}

/// The reason why a request is refused. The message is also the body of the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the credential was revoked")]
    Revoked,
    /// A page in a browser that reached this server by DNS rebinding sends the name of its site.
    #[error("the request was for another host")]
    WrongHost,
    /// A proxy makes requests for others. The metadata service of EC2 refuses them as well.
    #[error("the request came through a proxy")]
    Forwarded,
    #[error("the authorization token is wrong")]
    WrongToken,
    #[error("the request has no valid metadata token")]
    NoMetadataToken,
}

impl Refusal {
    fn status(self) -> StatusCode {
        match self {
            Self::Revoked | Self::WrongHost | Self::Forwarded => StatusCode::FORBIDDEN,
            Self::WrongToken | Self::NoMetadataToken => StatusCode::UNAUTHORIZED,
        }
    }
}

type Answer = (Response<Full<Bytes>>, Option<Outcome>);

impl AwsCredentialServer {
    /// Makes a server of keys that were just read. `lease_expires_at` is the expiry of their lease.
    pub(crate) fn new(
        source: SecretSpec,
        keys: AwsKeys,
        lease_expires_at: Option<Instant>,
        reader: Option<LeaseReader>,
        mut fill_random: impl FnMut(&mut [u8]) -> std::io::Result<()>,
    ) -> Result<AwsCredentialServer, SecretError> {
        let mut random = || {
            let mut bytes = Zeroizing::new([0; SECRET_LEN]);
            fill_random(&mut *bytes).map_err(SecretError::Random).map(|()| bytes)
        };
        let (key, token) = (random()?, random()?);
        Ok(AwsCredentialServer {
            cache: KeyCache::new(source, keys, lease_expires_at, reader),
            revoked: AtomicBool::new(false),
            token: SecretValue::new(Zeroizing::new(encode_base64(&*token, true)), false)?,
            token_key: TokenKey::new(key),
        })
    }

    /// Returns the name of the credential.
    pub fn name(&self) -> &str {
        self.cache.name()
    }

    /// Returns true if a Dial to this host and port is for this server.
    pub fn is_at(host: &str, port: u16) -> bool {
        host == HOST_NAME && port == PORT
    }

    /// Returns the endpoint at which the agent accepts connections for this server.
    pub(crate) fn wire() -> chitin_protocol::Endpoint {
        chitin_protocol::Endpoint { host: HOST_NAME.into(), wildcard: false, port: PORT }
    }

    /// Returns true if an environment variable is one of [`environment`](Self::environment).
    pub(crate) fn is_variable(name: &str) -> bool {
        VARIABLES.contains(&name)
    }

    /// Returns the environment variables by which SDKs find the server.
    pub(crate) fn environment(&self) -> [(&'static str, Zeroizing<Vec<u8>>); 4] {
        let base = format!("http://127.0.0.1:{PORT}");
        let container = format!("{base}{}", self.container_path());
        [
            (VARIABLES[0], Zeroizing::new(container.into_bytes())),
            (VARIABLES[1], Zeroizing::new(self.token.to_bytes().expose().to_vec())),
            (VARIABLES[2], Zeroizing::new(base.into_bytes())),
            (VARIABLES[3], Zeroizing::new(b"true".to_vec())),
        ]
    }

    fn container_path(&self) -> String {
        format!("/credentials/{}", self.name())
    }

    /// Refuses all requests from now on.
    pub fn revoke(&self) {
        self.revoked.store(true, Ordering::Relaxed);
    }

    fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Answers the single request of a connection.
    pub(crate) async fn serve<S>(self: &Arc<AwsCredentialServer>, stream: S) -> Option<Outcome>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let last_outcome = Mutex::new(None);
        let (received_tx, received) = watch::channel(false);
        let service = service_fn(|request: Request<Incoming>| {
            received_tx.send_replace(true);
            let last_outcome = &last_outcome;
            async move {
                let (response, outcome) = self.answer(&request).await;
                *last_outcome.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
                Ok::<_, Infallible>(response)
            }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            // One request a connection, so that the limits of connections also limit requests.
            .keep_alive(false)
            .half_close(true)
            .max_buf_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        let silent = async {
            tokio::time::sleep(REQUEST_LIMIT).await;
            if *received.borrow() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // A client that closes the connection needs no more of the response.
            served = tokio::time::timeout(SERVE_LIMIT, serving) => drop(served),
            () = silent => {}
        }
        last_outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(self: &Arc<AwsCredentialServer>, request: &Request<Incoming>) -> Answer {
        let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
        if let Err(refusal) = self.check_origin(headers) {
            return refuse(refusal);
        }
        if path == self.container_path() {
            return self.answer_container(method, headers).await;
        }
        if path == imds::TOKEN_PATH {
            return (self.issue_metadata_token(method, headers), None);
        }
        if path.starts_with("/latest/") {
            return self.answer_metadata(method, path, headers).await;
        }
        (text(StatusCode::NOT_FOUND, "not found"), None)
    }

    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.is_revoked() {
            return Err(Refusal::Revoked);
        }
        let host = header(headers, HOST.as_str());
        if !["127.0.0.1", "localhost"]
            .iter()
            .any(|name| host == format!("{name}:{PORT}").as_bytes())
        {
            return Err(Refusal::WrongHost);
        }
        if headers.contains_key("x-forwarded-for") {
            return Err(Refusal::Forwarded);
        }
        Ok(())
    }

    /// Answers a request for container credentials.
    async fn answer_container(
        self: &Arc<AwsCredentialServer>,
        method: &Method,
        headers: &HeaderMap,
    ) -> Answer {
        if method != Method::GET {
            return (text(StatusCode::METHOD_NOT_ALLOWED, "GET only"), None);
        }
        let (token, given) = (self.token.to_bytes(), header(headers, AUTHORIZATION.as_str()));
        match self.token_key.is_equal(token.expose(), given) {
            true => self.send_keys().await,
            false => refuse(Refusal::WrongToken),
        }
    }

    fn issue_metadata_token(&self, method: &Method, headers: &HeaderMap) -> Response<Full<Bytes>> {
        if method != Method::PUT {
            return text(StatusCode::METHOD_NOT_ALLOWED, "PUT only");
        }
        let Ok(ttl) = imds::parse_ttl(header(headers, imds::TTL_HEADER)) else {
            return text(StatusCode::BAD_REQUEST, "the TTL of a token is 1 to 21600 seconds");
        };
        let Some(token) = self.token_key.issue_until(imds::seconds_since_epoch() + ttl) else {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "no token");
        };
        let mut response = Response::new(Full::new(Bytes::from(token)));
        response.headers_mut().insert(imds::TTL_HEADER, HeaderValue::from(ttl));
        response
    }

    /// Answers a request for instance metadata: the name of the role, or its keys.
    async fn answer_metadata(
        self: &Arc<AwsCredentialServer>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Answer {
        if !self.token_key.verify(header(headers, imds::TOKEN_HEADER)) {
            return refuse(Refusal::NoMetadataToken);
        }
        if method != Method::GET {
            return (text(StatusCode::METHOD_NOT_ALLOWED, "GET only"), None);
        }
        match path.strip_prefix(imds::ROLE_PATH) {
            Some("" | "/") => (text(StatusCode::OK, self.name()), None),
            Some(role) if role.strip_prefix('/') == Some(self.name()) => self.send_keys().await,
            _ => (text(StatusCode::NOT_FOUND, "not found: only the keys of one role"), None),
        }
    }

    /// Returns the current document of the keys, see [`KeyCache::read_document`].
    pub(crate) async fn read_document(
        &self,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<SecretError>), SecretError> {
        self.cache.read_document().await
    }

    async fn send_keys(self: &Arc<AwsCredentialServer>) -> Answer {
        // In a separate task: otherwise, a client that stops waiting would discard the response of
        // the source each time.
        let this = self.clone();
        let read = tokio::spawn(async move { this.read_document().await }).await;
        match read.unwrap_or(Err(SecretError::Interrupted)) {
            // The credential may have been revoked during the read.
            _ if self.is_revoked() => refuse(Refusal::Revoked),
            Ok((document, refresh_error)) => {
                let mut response = Response::new(Full::new(Bytes::from_owner(document)));
                let json = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, json);
                (response, Some(Outcome::Served { refresh_error }))
            }
            Err(error) => {
                // The cause is for the audit log, and not for the workload.
                let body = "the source of the credential has no valid keys";
                (text(StatusCode::SERVICE_UNAVAILABLE, body), Some(Outcome::Failed(error)))
            }
        }
    }
}

/// Returns the value of a header. Empty: it is missing, or there twice.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a [u8] {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_bytes(),
        _ => &[],
    }
}

fn refuse(refusal: Refusal) -> Answer {
    (text(refusal.status(), &refusal.to_string()), Some(Outcome::Refused(refusal)))
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_owned())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
