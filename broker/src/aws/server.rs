//! Delivery `endpoint`: keys that are good for a short time, fetched by the SDKs of AWS as they do in a cloud. They are answered
//! here, on the host, at a port that leads nowhere else.
//!
//! ```text
//!   SDK ── GET 127.0.0.1:9911 ──▶ agent ── Dial localhost:9911 ──▶ broker ──▶ token right? ──▶ nearly over? ──▶ source
//!       ◀──────────────────────────── keys, good until … ◀──────────────────────────────────────────────────────┘
//! ```
//!
//! Two conventions: a container's credentials, whose token the workload has in its environment; and an instance's metadata, whose
//! token is asked for by PUT (version 2, and no other).

use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use chitin_spec::{SecretSource, SecretSpec};
use hmac::{Hmac, Mac};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::keys::Keys;
use crate::proxy::encoding::{decode_base64, encode_base64};
use crate::secret_value::SecretValue;
use crate::source::fetch_value;
use crate::vault::{Current, LeaseReader, VaultReader};

/// What the workload connects to.
const HOST_NAME: &str = "localhost";

/// Where AWS's own helper serves credentials to a machine's programs.
pub const PORT: u16 = 9911;

/// A request is a few hundred bytes on a connection that never leaves this machine.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// An answer may wait for a source: a command has 60 s, a vault 10.
const SERVE_LIMIT: Duration = Duration::from_secs(90);

/// All headers of a request.
const MAX_HEADERS: usize = 16 * 1024;

/// What keys are said to be good for whose source does not say. SDKs fetch new ones 5 to 15 minutes before.
const SAID: Duration = Duration::from_secs(30 * 60);

/// A command, or a secret that lies in a vault, is asked again after so long if it does not say how long it is good for.
const AGE: Duration = Duration::from_secs(60);

/// Between two readings of a source, at least: a workload must not be able to hammer it.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest life of a metadata token, of AWS's own service.
const MAX_TTL: u64 = 21_600;

/// Bytes of what is random here.
const RANDOM: usize = 32;

/// Where the container's convention is, its token, where the instance's is, and that its first version is not.
const VARIABLES: [&str; 4] = [
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_V1_DISABLED",
];

const TOKEN_PATH: &str = "/latest/api/token";
const META: &str = "/latest/meta-data/iam/security-credentials/";
const META_TOKEN: &str = "x-aws-ec2-metadata-token";
const META_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// Keys as they were read last.
struct CachedKeys {
    keys: Keys,
    read: Instant,
    /// Until when they are good, and for how long that was when they were read.
    good: Option<(SystemTime, Duration)>,
}

impl CachedKeys {
    /// `lease`: until when the source vouches for them.
    fn new(keys: Keys, lease: Option<Instant>) -> CachedKeys {
        let until = [keys.until, lease.map(wall)].into_iter().flatten().min();
        let good =
            until.map(|until| (until, until.duration_since(SystemTime::now()).unwrap_or_default()));
        CachedKeys { keys, read: Instant::now(), good }
    }

    /// Whether three quarters of their time are over, or nobody knows.
    fn is_old(&self) -> bool {
        match self.good {
            None => self.read.elapsed() >= AGE,
            Some((until, term)) => until < SystemTime::now() + term / 4,
        }
    }
}

/// A moment as a clock on a wall shows it.
fn wall(moment: Instant) -> SystemTime {
    SystemTime::now() + moment.saturating_duration_since(Instant::now())
}

/// The endpoint of one sandbox.
pub struct AwsCredentialServer {
    spec: SecretSpec,
    /// What reads a vault's secret again.
    reader: Option<LeaseReader>,
    held: Mutex<CachedKeys>,
    revoked: AtomicBool,
    /// A container's, for the workload's environment.
    token: SecretValue,
    /// Makes metadata tokens, which nobody has to remember then.
    key: Zeroizing<[u8; RANDOM]>,
}

impl fmt::Debug for AwsCredentialServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsCredentialServer").field("name", &self.spec.name).finish_non_exhaustive()
    }
}

/// What became of a request, for the audit. What has got nobody anything, and was no attempt to, is `None`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Keys were given; `trouble`: newer ones could not be had.
    Given { trouble: Option<String> },
    /// It was not for whoever asked.
    Refused(&'static str),
    /// There were none to give.
    Failed(String),
}

impl AwsCredentialServer {
    /// An endpoint for these keys, which were just read; `lease`: until when the vault vouches for them.
    pub(crate) fn new(
        spec: SecretSpec,
        keys: Keys,
        lease: Option<Instant>,
        reader: Option<LeaseReader>,
        mut random: impl FnMut(&mut [u8]) -> std::io::Result<()>,
    ) -> Result<AwsCredentialServer, String> {
        let mut made = || {
            let mut bytes = Zeroizing::new([0; RANDOM]);
            random(&mut *bytes)
                .map_err(|error| format!("get random bytes: {error}"))
                .map(|()| bytes)
        };
        let (key, token) = (made()?, made()?);
        let token = SecretValue::new(Zeroizing::new(encode_base64(&*token, true)), false)?;
        let held = Mutex::new(CachedKeys::new(keys, lease));
        Ok(AwsCredentialServer { spec, reader, held, revoked: AtomicBool::new(false), token, key })
    }

    /// The name of the credential.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Whether a Dial to it is for this.
    pub fn is_at(host: &str, port: u16) -> bool {
        host == HOST_NAME && port == PORT
    }

    /// Where the agent is to accept for it.
    pub(crate) fn wire() -> chitin_protocol::Endpoint {
        chitin_protocol::Endpoint { host: HOST_NAME.into(), wildcard: false, port: PORT }
    }

    /// Whether an environment variable is one by which SDKs find it.
    pub(crate) fn is_variable(name: &str) -> bool {
        VARIABLES.contains(&name)
    }

    /// What SDKs look for in their environment.
    pub(crate) fn environment(&self) -> [(&'static str, Zeroizing<Vec<u8>>); 4] {
        let place = format!("http://127.0.0.1:{PORT}");
        let container = format!("{place}{}", self.path());
        [
            (VARIABLES[0], Zeroizing::new(container.into_bytes())),
            (VARIABLES[1], Zeroizing::new(self.token.to_bytes().expose().to_vec())),
            (VARIABLES[2], Zeroizing::new(place.into_bytes())),
            (VARIABLES[3], Zeroizing::new(b"true".to_vec())),
        ]
    }

    fn path(&self) -> String {
        format!("/credentials/{}", self.spec.name)
    }

    /// From now on nobody gets anything.
    pub fn revoke(&self) {
        self.revoked.store(true, Ordering::Relaxed);
    }

    /// Answers the one request of a connection.
    pub(crate) async fn serve<S>(self: &Arc<AwsCredentialServer>, stream: S) -> Option<Outcome>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let fetched = StdMutex::new(None);
        let (asked, heard) = tokio::sync::watch::channel(false);
        let service = service_fn(|request: Request<Incoming>| {
            asked.send_replace(true);
            let fetched = &fetched;
            async move {
                let (response, outcome) = self.answer(&request).await;
                *fetched.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
                Ok::<_, Infallible>(response)
            }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            // One request a connection, so that their number has the limits of connections.
            .keep_alive(false)
            .half_close(true)
            .max_buf_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        let silent = async {
            tokio::time::sleep(REQUEST_LIMIT).await;
            if *heard.borrow() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // Who hangs up has heard what there was for it.
            served = tokio::time::timeout(SERVE_LIMIT, serving) => drop(served),
            () = silent => {}
        }
        fetched.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(
        self: &Arc<AwsCredentialServer>,
        request: &Request<Incoming>,
    ) -> (Response<Full<Bytes>>, Option<Outcome>) {
        let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
        let refused = |status, why| (text(status, why), Some(Outcome::Refused(why)));
        if self.revoked.load(Ordering::Relaxed) {
            return refused(StatusCode::FORBIDDEN, "the credential was revoked");
        }
        // A page in a browser that was led here by a name of its own has that name here.
        let named = header(headers, HOST.as_str());
        if !["127.0.0.1", "localhost"]
            .iter()
            .any(|name| named == format!("{name}:{PORT}").as_bytes())
        {
            return refused(StatusCode::FORBIDDEN, "the request was for another host");
        }
        // Only a proxy sets it, and a proxy asks for somebody else: AWS's own service refuses it as well.
        if headers.contains_key("x-forwarded-for") {
            return refused(StatusCode::FORBIDDEN, "the request came through a proxy");
        }
        if path == self.path() {
            return match (method, self.is_token(header(headers, AUTHORIZATION.as_str()))) {
                (&Method::GET, true) => self.give().await,
                (&Method::GET, false) => {
                    refused(StatusCode::UNAUTHORIZED, "the authorization token is not right")
                }
                _ => (text(StatusCode::METHOD_NOT_ALLOWED, "GET only"), None),
            };
        }
        if path == TOKEN_PATH {
            return (self.metadata_token(method, headers), None);
        }
        if path.starts_with("/latest/") {
            if !self.is_metadata_token(header(headers, META_TOKEN)) {
                return refused(
                    StatusCode::UNAUTHORIZED,
                    "there is no valid metadata token, without which nothing is answered",
                );
            }
            return match path.strip_prefix(META.trim_end_matches('/')) {
                _ if method != Method::GET => {
                    (text(StatusCode::METHOD_NOT_ALLOWED, "GET only"), None)
                }
                Some("" | "/") => (text(StatusCode::OK, &self.spec.name), None),
                Some(role) if role.strip_prefix('/') == Some(&self.spec.name) => self.give().await,
                _ => (
                    text(StatusCode::NOT_FOUND, "there is nothing here but the keys of one role"),
                    None,
                ),
            };
        }
        (text(StatusCode::NOT_FOUND, "there is nothing here"), None)
    }

    async fn give(self: &Arc<AwsCredentialServer>) -> (Response<Full<Bytes>>, Option<Outcome>) {
        // In a task of its own: who gives up waiting must not make a source's answer be thrown away each time.
        let this = self.clone();
        let given = tokio::spawn(async move { this.document().await }).await;
        match given.unwrap_or_else(|_| Err("the reading was broken off".into())) {
            // It may have been revoked meanwhile.
            _ if self.revoked.load(Ordering::Relaxed) => {
                let why = "the credential was revoked";
                (text(StatusCode::FORBIDDEN, why), Some(Outcome::Refused(why)))
            }
            Ok((document, trouble)) => {
                let mut response = Response::new(Full::new(Bytes::from_owner(document)));
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                (response, Some(Outcome::Given { trouble }))
            }
            Err(why) => {
                // Why is for who runs the sandbox, not for what runs in it.
                let what = "the source of the credential has none that is good";
                (text(StatusCode::SERVICE_UNAVAILABLE, what), Some(Outcome::Failed(why)))
            }
        }
    }

    /// The keys as they are now, and why they are not newer if they should be.
    pub(crate) async fn document(&self) -> Result<(Zeroizing<Vec<u8>>, Option<String>), String> {
        let mut held = self.held.lock().await;
        let trouble = match held.read.elapsed() < PAUSE {
            true => None,
            false => self.refresh(&mut held).await.err(),
        };
        let now = SystemTime::now();
        let until = match held.good {
            Some((until, _)) if until <= now => {
                return Err(trouble.unwrap_or_else(|| "its time is over".into()));
            }
            Some((until, _)) => until,
            None => now + SAID,
        };
        Ok((held.keys.document(now, until), trouble))
    }

    /// Reads the source again if there may be something new.
    async fn refresh(&self, held: &mut CachedKeys) -> Result<(), String> {
        let old = held.is_old();
        if let (SecretSource::Vault(source), Some(reader)) = (&self.spec.source, &self.reader) {
            let said = |error: &dyn fmt::Display| error.to_string();
            match reader.current(source, old).await.map_err(|error| said(&error))? {
                Current::Kept(None) => {}
                // It was renewed.
                Current::Kept(Some(until)) => {
                    let term = held.good.map_or(Duration::ZERO, |(_, term)| term);
                    let until = [held.keys.until, Some(wall(until))].into_iter().flatten().min();
                    held.good = until.map(|until| (until, term));
                }
                Current::Read(fields, lease) => {
                    let keys = match &source.field {
                        None => Keys::from_fields(&fields),
                        Some(name) => {
                            let field = fields.iter().find(|(field, _)| field == name);
                            Keys::from_json(
                                field
                                    .and_then(|(_, value)| value.as_deref())
                                    .map_or(&[], Vec::as_slice),
                            )
                        }
                    };
                    *held = CachedKeys::new(keys.map_err(|error| said(&error))?, lease);
                }
            }
            return Ok(());
        }
        let again = match self.spec.source {
            // Nobody changes it behind our back.
            SecretSource::Env(_) => false,
            SecretSource::File(_) => true,
            SecretSource::Exec(_) | SecretSource::Vault(_) => old,
        };
        if again {
            let value = fetch_value(&self.spec, &mut VaultReader::default())
                .await
                .map_err(|error| error.to_string())?;
            let keys =
                Keys::from_json(value.to_bytes().expose()).map_err(|error| error.to_string())?;
            *held = CachedKeys::new(keys, None);
        }
        Ok(())
    }

    fn mac(&self, bytes: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&*self.key).ok()?;
        mac.update(bytes);
        Some(mac)
    }

    /// Whether it is the container's token, in a time that tells nothing about it.
    fn is_token(&self, given: &[u8]) -> bool {
        let right = self.mac(self.token.to_bytes().expose()).map(|mac| mac.finalize().into_bytes());
        right.zip(self.mac(given)).is_some_and(|(right, given)| given.verify(&right).is_ok())
    }

    /// A token is the moment at which it ends, and a proof that it was made here.
    fn metadata_token(&self, method: &Method, headers: &HeaderMap) -> Response<Full<Bytes>> {
        if method != Method::PUT {
            return text(StatusCode::METHOD_NOT_ALLOWED, "PUT only");
        }
        let ttl =
            std::str::from_utf8(header(headers, META_TTL)).ok().and_then(|ttl| ttl.parse().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TTL).contains(ttl)) else {
            return text(StatusCode::BAD_REQUEST, "a token lives for 1 to 21600 seconds");
        };
        let end = (seconds() + ttl).to_be_bytes();
        let Some(mac) = self.mac(&end) else {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "no token");
        };
        let token = encode_base64(&[&end[..], &mac.finalize().into_bytes()].concat(), false);
        let mut response = Response::new(Full::new(Bytes::from(token)));
        response.headers_mut().insert(META_TTL, HeaderValue::from(ttl));
        response
    }

    fn is_metadata_token(&self, given: &[u8]) -> bool {
        let Some(token) = decode_base64(given) else { return false };
        let Some((end, proof)) = token.split_first_chunk() else { return false };
        let proven = self.mac(end).is_some_and(|mac| mac.verify_slice(proof).is_ok());
        proven && u64::from_be_bytes(*end) > seconds()
    }
}

/// A header's value; empty if it is not there or there twice.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a [u8] {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_bytes(),
        _ => &[],
    }
}

/// Since 1970.
fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn text(status: StatusCode, what: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(what.to_owned())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
