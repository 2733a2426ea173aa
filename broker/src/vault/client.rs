//! A client of the Vault HTTP API with a login.
//!
//! The requests are few, and servers that implement a part of the API (OpenBao, RustyVault) differ
//! in their responses, so the client reads them leniently and wipes them itself.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chitin_spec::{SecretId, VaultConfig, VaultLogin, VaultSource};
use http::{HeaderValue, Method};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use tokio::time::Instant;
use url::Url;
use zeroize::Zeroizing;

use super::lease_schedule::Lease;
use super::wire::{Fields, Response, WipedJson, fields_from_json, is_unsupported_path};
use super::{ConnectionFailure, MAX_FIELDS, VaultError};
use crate::tls;

/// The time limit of one request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The operations on the token in error messages.
const TOKEN_RENEWAL: &str = "the renewal of its token";
const TOKEN_REVOCATION: &str = "the revocation of its token";

/// A secret that was read.
pub(crate) struct VaultSecret {
    pub fields: Fields,
    /// The id and lease of a secret that the vault issued for this reader (a dynamic secret).
    pub lease: Option<(String, Lease)>,
}

/// A login to a Vault server.
pub(crate) struct VaultClient {
    http: reqwest::Client,
    address: Url,
    namespace: Option<HeaderValue>,
    /// Empty until the login.
    pub(super) token: Zeroizing<String>,
    /// The lease of a token that this client obtained.
    pub token_lease: Option<Lease>,
    /// The role of an AppRole login. The client renews and revokes the tokens of such a login.
    role: Option<AppRole>,
    /// Tokens of earlier logins, with the time at which each expires.
    superseded: Vec<(Zeroizing<String>, Instant)>,
}

/// The credentials of an AppRole login.
struct AppRole {
    mount: String,
    role_id: Zeroizing<String>,
    secret_id: Zeroizing<String>,
}

impl fmt::Debug for VaultClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultClient").field("address", &self.origin()).finish_non_exhaustive()
    }
}

/// The login.
impl VaultClient {
    /// Logs in.
    pub async fn log_in(config: &VaultConfig) -> Result<VaultClient, VaultError> {
        let address = Url::parse(&config.address).map_err(|_| VaultError::InvalidAddress)?;
        if !matches!(address.scheme(), "http" | "https") || !address.has_host() {
            return Err(VaultError::InvalidAddress);
        }
        let namespace = config.namespace.as_deref();
        let mut client = VaultClient {
            http: build_http_client(config.ca.as_deref())?,
            address,
            namespace: namespace.map(|name| header_value("VAULT_NAMESPACE", name)).transpose()?,
            token: Zeroizing::default(),
            token_lease: None,
            role: None,
            superseded: Vec::new(),
        };
        match &config.login {
            VaultLogin::Token(token) => client.set_token(token)?,
            VaultLogin::AppRole { mount, role_id, secret_id } => {
                let secret_id = match secret_id {
                    SecretId::Plain(secret_id) => secret_id.clone(),
                    SecretId::Wrapped(token) => client.unwrap_secret_id(token).await?,
                };
                let role = AppRole { mount: mount.clone(), role_id: role_id.clone(), secret_id };
                client.log_in_approle(&role).await?;
                client.role = Some(role);
            }
        }
        Ok(client)
    }

    /// Obtains another token, if there is a role to log in with. The earlier token is revoked at
    /// the end only: its leases end with it.
    pub async fn log_in_again(&mut self) -> Result<(), VaultError> {
        let Some(role) = self.role.take() else { return Err(VaultError::NotRenewable) };
        let (token, lease) = (std::mem::take(&mut self.token), self.token_lease);
        let login = self.log_in_approle(&role).await;
        self.role = Some(role);
        if login.is_err() {
            self.token = token;
            return login;
        }
        self.superseded.retain(|(_, expires_at)| *expires_at > Instant::now());
        self.superseded.extend(lease.map(|lease| (token, lease.expires_at)));
        Ok(())
    }

    async fn log_in_approle(&mut self, role: &AppRole) -> Result<(), VaultError> {
        let AppRole { mount, role_id, secret_id } = role;
        let path = format!("auth/{mount}/login");
        let body = json!({ "role_id": role_id.as_str(), "secret_id": secret_id.as_str() });
        let response = match self.send(&path, Method::POST, &path, Some(body)).await {
            // Servers differ in the status for a wrong role, and for a mount without AppRole.
            Err(VaultError::Denied { .. } | VaultError::Status { code: 400 | 401, .. }) => {
                return Err(VaultError::LoginRefused { mount: mount.clone() });
            }
            response => response?,
        };
        let auth = response.auth.as_ref().ok_or(VaultError::InvalidResponse { operation: path })?;
        self.set_token(&auth.client_token)?;
        self.token_lease = Lease::new(auth.lease_duration, auth.renewable, Instant::now());
        Ok(())
    }

    /// Exchanges a wrapping token for the secret id in it.
    async fn unwrap_secret_id(&mut self, token: &str) -> Result<Zeroizing<String>, VaultError> {
        self.set_token(token)?;
        let (operation, path) = ("the unwrapping of the secret id", "sys/wrapping/unwrap");
        let response = match self.send(operation, Method::POST, path, Some(json!({}))).await {
            Err(VaultError::Denied { .. } | VaultError::Status { code: 400, .. }) => {
                return Err(VaultError::InvalidWrappingToken);
            }
            response => response?,
        };
        self.token = Zeroizing::default();
        let secret_id = response.data.0.get("secret_id").and_then(Value::as_str);
        secret_id.map(|text| Zeroizing::new(text.to_owned())).ok_or_else(|| {
            let location = "the wrapping token".into();
            VaultError::MissingField { location, field: "secret_id".into() }
        })
    }

    fn set_token(&mut self, token: &str) -> Result<(), VaultError> {
        header_value("the token of the vault", token)?;
        self.token = Zeroizing::new(token.to_owned());
        Ok(())
    }

    /// Returns true if this client obtained its token, by a role that can obtain another.
    pub fn owns_token(&self) -> bool {
        self.role.is_some()
    }
}

/// Secrets, leases and tokens.
impl VaultClient {
    /// Reads a secret. An engine of dynamic secrets issues one at each read.
    pub async fn read_secret(&self, source: &VaultSource) -> Result<VaultSecret, VaultError> {
        let (location, VaultSource { mount, path, .. }) = (source.location(), source);
        let mut response;
        if self.has_versions(mount).await? {
            let path = format!("{mount}/data/{path}");
            response = self.send(&location, Method::GET, &path, None).await?;
            // The fields are one level deeper, next to the metadata of the version.
            let data = response.data.0.get_mut("data").map(Value::take);
            response.data = WipedJson(data.unwrap_or_default());
        } else {
            let path = format!("{mount}/{path}");
            response = self.send(&location, Method::GET, &path, None).await?;
        }
        let Value::Object(data) = &response.data.0 else {
            return Err(VaultError::NotFound { operation: location });
        };
        if data.len() > MAX_FIELDS {
            return Err(VaultError::TooManyFields { location, count: data.len() });
        }
        // A static secret has a duration as well, which is advice: it is not a lease.
        let lease = Lease::new(response.lease_duration, response.renewable, Instant::now())
            .filter(|_| !response.lease_id.is_empty())
            .map(|lease| (response.lease_id.clone(), lease));
        Ok(VaultSecret { fields: fields_from_json(data), lease })
    }

    /// Returns true if the mount keeps versions (KV 2). The request is the one that the command
    /// line of Vault makes; a server that does not support it has no versions.
    async fn has_versions(&self, mount: &str) -> Result<bool, VaultError> {
        let path = format!("sys/internal/ui/mounts/{mount}");
        match self.send("the kind of a mount", Method::GET, &path, None).await {
            Ok(response) => {
                let version = response.data.0.pointer("/options/version");
                Ok(version.and_then(Value::as_str) == Some("2"))
            }
            Err(error) if error.is_outage() => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Renews the token, and updates `token_lease`.
    pub async fn renew_token(&mut self) -> Result<(), VaultError> {
        let (operation, path) = (TOKEN_RENEWAL, "auth/token/renew-self");
        let response = match self.send(operation, Method::POST, path, Some(json!({}))).await {
            Err(VaultError::Unsupported { .. }) => {
                // The older form has the token in its path, which servers may log: it is sent only
                // to servers without the other form.
                let path = format!("auth/token/renew/{}", *self.token);
                let ttl = self.token_lease.map_or(0, |lease| lease.ttl.as_secs());
                let body = json!({ "increment": ttl });
                self.send(operation, Method::POST, &path, Some(body)).await?
            }
            response => response?,
        };
        let missing = || VaultError::InvalidResponse { operation: operation.into() };
        let auth = response.auth.as_ref().ok_or_else(missing)?;
        self.token_lease = Lease::new(auth.lease_duration, auth.renewable, Instant::now());
        Ok(())
    }

    /// Renews a lease. Returns `None` if the server has no leases, or if this one never expires.
    pub async fn renew_lease(&self, id: &str, lease: Lease) -> Result<Option<Lease>, VaultError> {
        let body = json!({ "lease_id": id, "increment": lease.ttl.as_secs() });
        let (operation, path) = ("the renewal of a lease", "sys/leases/renew");
        match self.send(operation, Method::PUT, path, Some(body)).await {
            Ok(Response { lease_duration, renewable, .. }) => {
                Ok(Lease::new(lease_duration, renewable, Instant::now()))
            }
            Err(VaultError::NotFound { .. } | VaultError::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Revokes a lease.
    pub async fn revoke_lease(&self, id: &str) -> Result<(), VaultError> {
        let body = json!({ "lease_id": id });
        let (operation, path) = ("the revocation of a lease", "sys/leases/revoke");
        match self.send(operation, Method::PUT, path, Some(body)).await {
            Ok(_) | Err(VaultError::NotFound { .. } | VaultError::Unsupported { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Revokes every token that this client obtained, and with each token its leases. Expired
    /// tokens are left out, because a server refuses their requests.
    pub async fn revoke_tokens(&mut self) -> Result<(), VaultError> {
        if !self.owns_token() {
            return Ok(());
        }
        let mut revoked = Ok(());
        if self.token_lease.is_none_or(|lease| lease.expires_at > Instant::now()) {
            revoked = self.revoke_token().await;
        }
        for (token, expires_at) in std::mem::take(&mut self.superseded) {
            if expires_at > Instant::now() {
                self.token = token;
                let superseded = self.revoke_token().await;
                revoked = revoked.and(superseded);
            }
        }
        revoked
    }

    async fn revoke_token(&self) -> Result<(), VaultError> {
        let (operation, path) = (TOKEN_REVOCATION, "auth/token/revoke-self");
        match self.send(operation, Method::POST, path, Some(json!({}))).await {
            Err(VaultError::Unsupported { .. }) => {
                // See `renew_token`.
                let path = format!("auth/token/revoke/{}", *self.token);
                self.send(operation, Method::POST, &path, Some(json!({}))).await.map(drop)
            }
            response => response.map(drop),
        }
    }
}

/// HTTP.
impl VaultClient {
    /// Sends a request below `/v1/`. Errors name the `operation`, and never the path.
    async fn send(
        &self,
        operation: &str,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Response, VaultError> {
        let mut request =
            self.http.request(method, self.url(path)?).header("X-Vault-Request", "true");
        if !self.token.is_empty() {
            let token = header_value("the token of the vault", &self.token)?;
            request = request.header("X-Vault-Token", token);
        }
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(body) = body.map(WipedJson) {
            let body = Zeroizing::new(body.0.to_string().into_bytes());
            request = request.body(Bytes::from_owner(body));
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.unreachable(&error))?;
        if !status.is_success() {
            return Err(self.status_error(operation, status.as_u16(), &body));
        }
        Response::parse(body)
            .map_err(|_| VaultError::InvalidResponse { operation: operation.to_owned() })
    }

    fn url(&self, path: &str) -> Result<Url, VaultError> {
        let mut url = self.address.clone();
        let mut segments = url.path_segments_mut().map_err(|()| VaultError::InvalidAddress)?;
        segments.pop_if_empty().push("v1").extend(path.split('/'));
        drop(segments);
        Ok(url)
    }

    /// Returns the address for messages: without the user and password that it may hold.
    fn origin(&self) -> String {
        self.address.origin().ascii_serialization()
    }

    fn unreachable(&self, error: &reqwest::Error) -> VaultError {
        let failure = ConnectionFailure::of(error);
        VaultError::Unreachable { address: self.origin(), failure }
    }

    fn status_error(&self, operation: &str, code: u16, body: &[u8]) -> VaultError {
        let (address, operation) = (self.origin(), operation.to_owned());
        match code {
            400..=599 if is_unsupported_path(body) => VaultError::Unsupported { operation },
            300..=399 => VaultError::Redirect { address },
            403 => VaultError::Denied { operation },
            404 | 405 => VaultError::NotFound { operation },
            // 472 and 473: standby nodes of a replicated cluster.
            429 | 472 | 473 | 501 | 503 => VaultError::Sealed { address },
            code => VaultError::Status { operation, code },
        }
    }
}

/// Builds a client without proxies and redirects, so that only the server at `VAULT_ADDR` gets the
/// token.
fn build_http_client(ca: Option<&Path>) -> Result<reqwest::Client, VaultError> {
    let tls = match ca {
        Some(path) => tls::client_config(Arc::new(tls::root_store(read_certificates(path)?))),
        None => tls::client_config(tls::system_roots()),
    };
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(REQUEST_LIMIT)
        .build()
        .map_err(VaultError::HttpClient)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, VaultError> {
    let pem = std::fs::read(path)
        .map_err(|source| VaultError::ReadCertificates { path: path.into(), source })?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Err(_) => Err(VaultError::InvalidCertificates { path: path.into() }),
        Ok(certificates) if certificates.is_empty() => {
            Err(VaultError::NoCertificates { path: path.into() })
        }
        Ok(certificates) => Ok(certificates),
    }
}

/// Converts a text to the value of an HTTP header that is left out of debug output.
fn header_value(name: &'static str, text: &str) -> Result<HeaderValue, VaultError> {
    let graphic = text.bytes().all(|byte| byte.is_ascii_graphic());
    match HeaderValue::from_str(text) {
        Ok(mut value) if graphic => {
            value.set_sensitive(true);
            Ok(value)
        }
        _ => Err(VaultError::InvalidHeader(name)),
    }
}
