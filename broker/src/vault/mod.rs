//! Credentials of a vault: logs in, reads each secret once, renews what was issued, and revokes it at the end.
//!
//! ```text
//!   VAULT_TOKEN ────────────────┐
//!   VAULT_ROLE_ID + SECRET_ID ──┴─▶ Session ──read──▶ fields ──▶ LeaseRenewer: renew … log in again, read again … ──▶ revoke
//! ```
//!
//! The requests are those of `vaultrs`; answers are read here, because a server that speaks only part of the protocol leaves
//! fields out that the client library insists on, and because a body with a secret in it is to be wiped. What a server says in
//! words is not repeated: it may quote what it was sent.

mod lease_renewal;
mod reader;

pub use lease_renewal::{Change, Changes, LeaseRenewer};
pub(crate) use lease_renewal::{Current, LeaseReader};
pub(crate) use reader::VaultReader;
pub use reader::select_field;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chitin_spec::{SecretId, VaultConfig, VaultLogin, VaultSource};
use rustify::clients::reqwest::Client as HttpClient;
use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use rustify::errors::ClientError;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use vaultrs::api::EndpointMiddleware;
use vaultrs::api::auth::approle::requests::LoginWithApproleRequest;
use vaultrs::api::kv1::requests::GetSecretRequest;
use vaultrs::api::kv2::requests::ReadSecretRequest;
use zeroize::{Zeroize, Zeroizing};

use crate::tls;

/// How long the vault may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Fields of one secret: each becomes a credential, of which the agent keeps 64.
pub(crate) const MAX_FIELDS: usize = 64;

/// What goes wrong with a vault, one class each. No message holds anything that is secret, nor what the server said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum VaultError {
    #[error("VAULT_ADDR is not set: give the vault's address, https://HOST:8200")]
    NoAddress,
    #[error("VAULT_ADDR is no http:// or https:// address")]
    Address,
    #[error(
        "VAULT_SKIP_VERIFY is set, and a vault whose certificate is not checked may be anybody: name its CA in VAULT_CACERT"
    )]
    Unverified,
    #[error("no way to log in: set VAULT_TOKEN, or VAULT_ROLE_ID and VAULT_SECRET_ID")]
    NoLogin,
    #[error("{0} holds what no HTTP header can: was a newline copied with it?")]
    Malformed(&'static str),
    #[error("read the certificates of VAULT_CACERT, {path}: {why}")]
    Certificates { path: String, why: String },
    #[error("the vault at {address} cannot be reached: {why}")]
    Unreachable { address: String, why: &'static str },
    #[error("the vault at {address} is sealed, or not ready: unseal it")]
    Sealed { address: String },
    #[error(
        "the vault at {address} answers with a redirect, which would take the token elsewhere: set VAULT_ADDR to the active server"
    )]
    Redirect { address: String },
    #[error(
        "the vault refuses the login at auth/{mount}: role id or secret id are wrong, used up or expired, or no AppRole is there"
    )]
    Login { mount: String },
    #[error("the vault's wrapping token is not valid: it was used before, or has expired")]
    Wrapping,
    #[error("the vault refuses {what}: the token has expired, or its policies do not allow this")]
    Denied { what: String },
    #[error("the vault has nothing at {what}")]
    NotFound { what: String },
    #[error("the vault does not know {what}")]
    Unknown { what: String },
    #[error("the vault answers {what} with status {code}")]
    Status { what: String, code: u16 },
    #[error("the vault's answer to {what} is none")]
    Answer { what: String },
    #[error("{what} has {count} fields: say which, #FIELD")]
    WhichField { what: String, count: usize },
    #[error("{what} has no field `{field}`")]
    NoField { what: String, field: String },
    #[error("field `{field}` of {what} is no text, number or truth value")]
    NoText { what: String, field: String },
    #[error("field `{field}` of {what} cannot be a credential's name: letters, digits and `_`")]
    FieldName { what: String, field: String },
    #[error("{what} has {count} fields: at most {MAX_FIELDS} can be credentials")]
    TooMany { what: String, count: usize },
    #[error("what the vault had issued was given back")]
    Ended,
    #[error("it is renewed no longer")]
    NoLonger,
}

/// As the environment says: `VAULT_ADDR`, `VAULT_NAMESPACE`, `VAULT_CACERT`; `VAULT_TOKEN`, or `VAULT_ROLE_ID` with
/// `VAULT_SECRET_ID` or `VAULT_WRAPPED_SECRET_ID`, and `VAULT_APPROLE_MOUNT` if it is not `approle`.
pub(crate) fn config_from_env() -> Result<VaultConfig, VaultError> {
    config_from(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn config_from(variable: impl Fn(&str) -> Option<String>) -> Result<VaultConfig, VaultError> {
    let address = variable("VAULT_ADDR").ok_or(VaultError::NoAddress)?;
    let skip = variable("VAULT_SKIP_VERIFY").unwrap_or_default().to_ascii_lowercase();
    if !matches!(skip.as_str(), "" | "0" | "f" | "false") {
        return Err(VaultError::Unverified);
    }
    let secret = |name| variable(name).map(Zeroizing::new);
    let login = if let Some(token) = secret("VAULT_TOKEN") {
        VaultLogin::Token(token)
    } else {
        let secret_id = secret("VAULT_SECRET_ID")
            .map(SecretId::Plain)
            .or_else(|| secret("VAULT_WRAPPED_SECRET_ID").map(SecretId::Wrapped));
        let (Some(role_id), Some(secret_id)) = (secret("VAULT_ROLE_ID"), secret_id) else {
            return Err(VaultError::NoLogin);
        };
        let mount = variable("VAULT_APPROLE_MOUNT").unwrap_or_else(|| "approle".into());
        VaultLogin::AppRole { mount, role_id, secret_id }
    };
    let (namespace, ca) =
        (variable("VAULT_NAMESPACE"), variable("VAULT_CACERT").map(PathBuf::from));
    Ok(VaultConfig { address, login, namespace, ca })
}

/// How long something is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    /// From when on it is not.
    pub until: Instant,
    /// What it was given.
    pub ttl: Duration,
    pub renewable: bool,
}

impl Lease {
    /// `None`: it does not end.
    fn new(seconds: u64, renewable: bool) -> Option<Lease> {
        // A vault's longest default is 32 days; a century is as good as for ever, and no overflow.
        let ttl = Duration::from_secs(seconds.min(100 * 366 * 24 * 3600));
        (seconds > 0).then(|| Lease { until: Instant::now() + ttl, ttl, renewable })
    }
}

/// Fields with their values. A value that is no text, number or truth value is `None`.
pub type Fields = Vec<(String, Option<Zeroizing<Vec<u8>>>)>;

/// A secret that was read.
pub(crate) struct Read {
    pub fields: Fields,
    /// Of a secret that the vault has made for us.
    pub lease: Option<(String, Lease)>,
}

/// What every answer is made of. Whatever a server leaves out is as good as empty.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Answer {
    auth: Option<Auth>,
    data: Wiped,
    lease_id: String,
    lease_duration: u64,
    renewable: bool,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    #[serde(default)]
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

impl Drop for Auth {
    fn drop(&mut self) {
        self.client_token.zeroize();
    }
}

/// A value whose texts are wiped when it is dropped.
#[derive(Deserialize, Default)]
#[serde(transparent)]
pub(crate) struct Wiped(pub(crate) Value);

impl Drop for Wiped {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

/// Wipes all texts of a value.
fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(values) => values.iter_mut().for_each(wipe),
        Value::Object(fields) => fields.values_mut().for_each(wipe),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// A request that `vaultrs` has no type for.
#[derive(Debug)]
struct Call {
    method: RequestMethod,
    path: String,
    body: Option<Value>,
}

impl Endpoint for Call {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        self.path.clone()
    }

    fn method(&self) -> RequestMethod {
        self.method.clone()
    }

    fn body(&self) -> Result<Option<Vec<u8>>, ClientError> {
        Ok(self.body.as_ref().map(|body| body.to_string().into_bytes()))
    }
}

/// A login.
pub(crate) struct Session {
    http: HttpClient,
    middleware: EndpointMiddleware,
    address: String,
    /// Of a token that is ours to renew and revoke.
    pub lease: Option<Lease>,
    /// To log in with again. What there is is ours then.
    role: Option<Role>,
    /// Tokens that others have followed, and until when they are good.
    former: Vec<(Zeroizing<String>, Instant)>,
}

/// A role with what proves it.
struct Role {
    mount: String,
    role_id: Zeroizing<String>,
    secret_id: Zeroizing<String>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.middleware.token.zeroize();
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Session {
    /// Logs in.
    pub async fn begin(config: &VaultConfig) -> Result<Session, VaultError> {
        let address = url::Url::parse(&config.address).map_err(|_| VaultError::Address)?;
        if !matches!(address.scheme(), "http" | "https") || !address.has_host() {
            return Err(VaultError::Address);
        }
        // The client library panics at these.
        if let Some(namespace) = &config.namespace {
            check_header("VAULT_NAMESPACE", namespace)?;
        }
        let http = HttpClient::new(address.as_str(), http_client(config)?);
        let middleware = EndpointMiddleware {
            token: String::new(),
            version: "v1".into(),
            wrap: None,
            namespace: config.namespace.clone(),
        };
        // Without what may stand in front of an `@`.
        let shown = address.origin().ascii_serialization();
        let mut session = Session {
            http,
            middleware,
            address: shown,
            lease: None,
            role: None,
            former: Vec::new(),
        };
        match &config.login {
            VaultLogin::Token(token) => session.take(token)?,
            VaultLogin::AppRole { mount, role_id, secret_id } => {
                let secret_id = match secret_id {
                    SecretId::Plain(secret_id) => secret_id.clone(),
                    SecretId::Wrapped(token) => session.unwrap(token).await?,
                };
                let role = Role { mount: mount.clone(), role_id: role_id.clone(), secret_id };
                session.log_in(&role).await?;
                session.role = Some(role);
            }
        }
        Ok(session)
    }

    fn take(&mut self, token: &str) -> Result<(), VaultError> {
        check_header("the vault's token", token)?;
        self.middleware.token.zeroize();
        // Full size at once: growing leaves copies behind.
        self.middleware.token = String::with_capacity(token.len());
        self.middleware.token.push_str(token);
        Ok(())
    }

    /// Gets another token, if there is a role to log in with. The former is not given back before the end: what was issued
    /// to it would end with it.
    pub async fn log_in_again(&mut self) -> Result<(), VaultError> {
        let Some(role) = self.role.take() else { return Err(VaultError::NoLonger) };
        let (token, lease) =
            (Zeroizing::new(std::mem::take(&mut self.middleware.token)), self.lease);
        let again = self.log_in(&role).await;
        self.role = Some(role);
        match again {
            Ok(()) => {
                self.former.retain(|(_, until)| *until > Instant::now());
                self.former.extend(lease.map(|lease| (token, lease.until)));
                Ok(())
            }
            Err(error) => {
                self.take(&token)?;
                Err(error)
            }
        }
    }

    async fn log_in(&mut self, role: &Role) -> Result<(), VaultError> {
        let Role { mount, role_id, secret_id } = role;
        let what = format!("auth/{mount}/login");
        let request = LoginWithApproleRequest::builder()
            .mount(mount.as_str())
            .role_id(role_id.as_str())
            .secret_id(secret_id.as_str())
            .build()
            .map_err(|_| VaultError::Answer { what: what.clone() })?;
        let answer = match self.ask(&what, request).await {
            // Servers do not agree on which of these a wrong role is, nor what is no role's place.
            Err(VaultError::Denied { .. } | VaultError::Status { code: 400 | 401, .. }) => {
                return Err(VaultError::Login { mount: mount.clone() });
            }
            answer => answer?,
        };
        let auth = answer.auth.as_ref().ok_or(VaultError::Answer { what })?;
        self.take(&auth.client_token)?;
        self.lease = Lease::new(auth.lease_duration, auth.renewable);
        Ok(())
    }

    /// The secret id in a wrapping token.
    async fn unwrap(&mut self, token: &str) -> Result<Zeroizing<String>, VaultError> {
        self.take(token)?;
        let request = Call {
            method: RequestMethod::POST,
            path: "sys/wrapping/unwrap".into(),
            body: Some(json!({})),
        };
        let answer = match self.ask("the unwrapping of the secret id", request).await {
            Err(VaultError::Denied { .. } | VaultError::Status { code: 400, .. }) => {
                return Err(VaultError::Wrapping);
            }
            answer => answer?,
        };
        self.middleware.token.zeroize();
        let secret_id = answer.data.0.get("secret_id").and_then(Value::as_str);
        let missing =
            || VaultError::NoField { what: "the wrapping token".into(), field: "secret_id".into() };
        secret_id.map(|text| Zeroizing::new(text.to_owned())).ok_or_else(missing)
    }

    /// Reads a secret. Of an engine that makes credentials, each reading makes one.
    pub async fn read(&self, source: &VaultSource) -> Result<Read, VaultError> {
        let what = source.location();
        let failed = || VaultError::Answer { what: what.clone() };
        let mut answer = if self.is_versioned(source).await? {
            let request =
                ReadSecretRequest::builder().mount(&source.mount).path(&source.path).build();
            let mut answer = self.ask(&what, request.map_err(|_| failed())?).await?;
            // The fields are one level deeper, beside what is known about this version.
            let data = answer.data.0.get_mut("data").map(Value::take).unwrap_or_default();
            answer.data = Wiped(data);
            answer
        } else {
            let request =
                GetSecretRequest::builder().mount(&source.mount).path(&source.path).build();
            self.ask(&what, request.map_err(|_| failed())?).await?
        };
        let lease_id = std::mem::take(&mut answer.lease_id);
        let lease = Lease::new(answer.lease_duration, answer.renewable);
        let Value::Object(data) = &answer.data.0 else { return Err(VaultError::NotFound { what }) };
        if data.len() > MAX_FIELDS {
            return Err(VaultError::TooMany { what, count: data.len() });
        }
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone().into_bytes()),
            Value::Number(number) => Some(number.to_string().into_bytes()),
            Value::Bool(truth) => Some(truth.to_string().into_bytes()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        };
        let field =
            |(name, value): (&String, &Value)| (name.clone(), text(value).map(Zeroizing::new));
        let fields = data.iter().map(field).collect();
        // A value that lies there has a duration as well, which is advice, and no lease.
        let lease = lease.filter(|_| !lease_id.is_empty()).map(|lease| (lease_id, lease));
        Ok(Read { fields, lease })
    }

    /// Whether the mount keeps versions (KV 2). Asked as the vault's own command line does; a server that does not know the
    /// question has none.
    async fn is_versioned(&self, source: &VaultSource) -> Result<bool, VaultError> {
        let path = format!("sys/internal/ui/mounts/{}", source.mount);
        let request = Call { method: RequestMethod::GET, path, body: None };
        match self.ask("the kind of a mount", request).await {
            Ok(answer) => {
                Ok(answer.data.0.pointer("/options/version").and_then(Value::as_str) == Some("2"))
            }
            Err(
                error @ (VaultError::Unreachable { .. }
                | VaultError::Sealed { .. }
                | VaultError::Redirect { .. }),
            ) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Renews the token, and says how long it is good for now.
    pub async fn renew(&mut self) -> Result<(), VaultError> {
        let what = "the renewal of its token";
        let method = RequestMethod::POST;
        let request = Call {
            method: method.clone(),
            path: "auth/token/renew-self".into(),
            body: Some(json!({})),
        };
        let answer = match self.ask(what, request).await {
            Err(VaultError::Unknown { .. }) => {
                // Servers that only know the older form. Others are not sent a token in a path, which they may log.
                let path = format!("auth/token/renew/{}", self.middleware.token);
                let body =
                    Some(json!({ "increment": self.lease.map_or(0, |lease| lease.ttl.as_secs()) }));
                self.ask(what, Call { method, path, body }).await?
            }
            answer => answer?,
        };
        let auth = answer.auth.as_ref().ok_or(VaultError::Answer { what: what.into() })?;
        self.lease = Lease::new(auth.lease_duration, auth.renewable);
        Ok(())
    }

    /// Renews a lease. `None`: the server knows no leases, or this one does not end.
    pub async fn renew_lease(&self, id: &str, lease: Lease) -> Result<Option<Lease>, VaultError> {
        let body = json!({ "lease_id": id, "increment": lease.ttl.as_secs() });
        let request =
            Call { method: RequestMethod::PUT, path: "sys/leases/renew".into(), body: Some(body) };
        match self.ask("the renewal of a lease", request).await {
            Ok(answer) => Ok(Lease::new(answer.lease_duration, answer.renewable)),
            Err(VaultError::NotFound { .. } | VaultError::Unknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes a lease back.
    pub async fn revoke_lease(&self, id: &str) -> Result<(), VaultError> {
        let body = Some(json!({ "lease_id": id }));
        let request = Call { method: RequestMethod::PUT, path: "sys/leases/revoke".into(), body };
        match self.ask("the revocation of a lease", request).await {
            Ok(_) | Err(VaultError::NotFound { .. } | VaultError::Unknown { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives back the token, if it was got here, and those before it, and with them all that was issued to them. What is over
    /// is not: a server refuses what comes with it.
    pub async fn revoke(&mut self) -> Result<(), VaultError> {
        if !self.is_ours() {
            return Ok(());
        }
        let mut revoked = Ok(());
        if self.lease.is_none_or(|lease| lease.until > Instant::now()) {
            revoked = self.revoke_token().await;
        }
        for (token, until) in std::mem::take(&mut self.former) {
            if until > Instant::now() {
                self.take(&token)?;
                let former = self.revoke_token().await;
                revoked = revoked.and(former);
            }
        }
        revoked
    }

    async fn revoke_token(&self) -> Result<(), VaultError> {
        let what = "the revocation of its token";
        let method = RequestMethod::POST;
        let request = Call {
            method: method.clone(),
            path: "auth/token/revoke-self".into(),
            body: Some(json!({})),
        };
        match self.ask(what, request).await {
            Err(VaultError::Unknown { .. }) => {
                let path = format!("auth/token/revoke/{}", self.middleware.token);
                self.ask(what, Call { method, path, body: Some(json!({})) }).await.map(drop)
            }
            answer => answer.map(drop),
        }
    }

    /// Whether the token was got here, with a role that gets another.
    pub fn is_ours(&self) -> bool {
        self.role.is_some()
    }

    async fn ask(&self, what: &str, endpoint: impl Endpoint) -> Result<Answer, VaultError> {
        let address = || self.address.clone();
        let what = || what.to_owned();
        match endpoint.with_middleware(&self.middleware).exec(&self.http).await {
            Ok(mut result) => {
                let mut body = Zeroizing::new(std::mem::take(result.response.body_mut()));
                // 204.
                if body.is_empty() {
                    return Ok(Answer::default());
                }
                let answer =
                    serde_json::from_slice(&body).map_err(|_| VaultError::Answer { what: what() });
                body.zeroize();
                answer
            }
            Err(ClientError::ServerResponseError { code, content }) => Err(match code {
                400..=599 if is_unknown(&content) => VaultError::Unknown { what: what() },
                300..=399 => VaultError::Redirect { address: address() },
                403 => VaultError::Denied { what: what() },
                404 | 405 => VaultError::NotFound { what: what() },
                // 472, 473: standbys of replication.
                429 | 472 | 473 | 501 | 503 => VaultError::Sealed { address: address() },
                code => VaultError::Status { what: what(), code },
            }),
            Err(
                ClientError::RequestError { source, .. } | ClientError::ResponseError { source },
            ) => {
                let error = source.downcast_ref::<reqwest::Error>();
                let why = match error {
                    Some(error) if error.is_timeout() => "it does not answer within 10 s",
                    Some(error) if is_tls(error) => {
                        "its certificate is not one to trust (VAULT_CACERT names a CA)"
                    }
                    Some(error) if error.is_connect() => {
                        "nobody listens there, or the name does not resolve"
                    }
                    _ => "the connection broke off",
                };
                Err(VaultError::Unreachable { address: address(), why })
            }
            Err(_) => Err(VaultError::Answer { what: what() }),
        }
    }
}

/// Whether a server says that it has no such path, which no two say with the same status.
fn is_unknown(content: &Option<String>) -> bool {
    let said = content.as_deref().unwrap_or_default().to_ascii_lowercase();
    said.contains("unsupported path")
        || said.contains("path is not supported")
        || said.contains("path not supported")
}

/// Whether TLS is what went wrong.
fn is_tls(error: &reqwest::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<rustls::Error>() {
            return true;
        }
        // An I/O error shows what it was made of in another way.
        if let Some(inner) =
            error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref)
            && inner.is::<rustls::Error>()
        {
            return true;
        }
        source = error.source();
    }
    false
}

/// Without proxies, and without following redirects: a token goes where it was meant to go and nowhere else.
fn http_client(config: &VaultConfig) -> Result<reqwest::Client, VaultError> {
    let tls = match &config.ca {
        Some(path) => {
            let failed =
                |why: String| VaultError::Certificates { path: path.display().to_string(), why };
            let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            let certificates = certificates.map_err(|_| failed("it is no PEM".into()))?;
            if certificates.is_empty() {
                return Err(failed("there is none in it".into()));
            }
            tls::client_config(Arc::new(tls::root_store(certificates)))
        }
        None => tls::client_config(tls::system_roots()),
    };
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(ANSWER_LIMIT)
        .build()
        .map_err(|_| VaultError::Address)
}

/// Whether a text can be the value of an HTTP header.
fn check_header(what: &'static str, text: &str) -> Result<(), VaultError> {
    match text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(()),
        false => Err(VaultError::Malformed(what)),
    }
}

#[cfg(test)]
#[path = "vault_test/mod.rs"]
mod tests;
