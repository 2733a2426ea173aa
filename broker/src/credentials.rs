//! The credentials of a sandbox: fetched from their sources, and prepared for their deliveries.
//!
//! ```text
//!   SecretSpec ──fetch_value──▶ value ──┬─ memory, env ──▶ CredentialValue
//!                                       ├─ proxy ────────▶ Proxy, and placeholders in env
//!                                       └─ endpoint ─────▶ AwsCredentialServer, and its variables
//!   leases of a vault ─────────────────────────────────▶ LeaseRenewer
//! ```

use std::io;
use std::pin::pin;
use std::sync::Arc;

use chitin_spec::{
    Delivery, DeliveryKind, ProxyScope, SecretSource, SecretSpec, VaultConfig, VaultSource,
    check_name,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;
use zeroize::Zeroizing;

use crate::aws::{AwsCredentialServer, AwsKeys};
use crate::error::{Error, SecretError};
use crate::proxy::Proxy;
use crate::secret_value::SecretValue;
use crate::source::fetch_value;
use crate::tls;
use crate::vault::{Changes, LeaseReader, LeaseRenewer, VaultReader};

/// Options that concern all credentials of a sandbox.
#[derive(Debug, Clone, Default)]
pub struct CredentialSpec {
    /// A secret of a vault of which each field becomes a credential.
    pub source: Option<VaultSource>,
    /// The vault. `None`: the vault that the environment names.
    pub vault: Option<VaultConfig>,
    /// The CA certificates for hosts with proxied credentials, as PEM. `None`: those that the
    /// system trusts.
    pub trusted: Option<String>,
}

/// A credential with its value, for the agent.
#[derive(Debug)]
pub struct CredentialValue {
    /// The name of the credential.
    pub name: String,
    /// The delivery in the guest.
    pub delivery: chitin_protocol::Delivery,
    /// The value, or its placeholder.
    pub value: SecretValue,
}

/// A credential bound to a Vault secret; it rotates when the secret does.
#[derive(Debug, Clone)]
pub struct RotatingCredential {
    /// The name of the credential.
    pub name: String,
    /// The secret and its field.
    pub source: VaultSource,
}

/// All credentials of a sandbox.
#[derive(Debug, Default)]
pub struct FetchedCredentials {
    /// The values for the agent.
    pub values: Vec<CredentialValue>,
    /// The credentials that rotate with their secrets.
    pub rotating: Vec<RotatingCredential>,
    /// The changes of those secrets.
    pub changes: Option<Changes>,
    /// The proxy of credentials whose values stay on the host. Their placeholders are in `values`.
    pub proxy: Option<Arc<Proxy>>,
    /// The server of the credential with delivery `endpoint`. Its variables are in `values`.
    pub aws_server: Option<Arc<AwsCredentialServer>>,
    /// The task that renews and revokes the leases.
    pub lease_renewer: Option<LeaseRenewer>,
}

impl FetchedCredentials {
    /// Returns the name and delivery of each credential.
    pub fn deliveries(&self) -> impl Iterator<Item = (&str, DeliveryKind)> {
        let is_proxied = |name: &str| {
            self.proxy.iter().flat_map(|proxy| proxy.placeholders()).any(|(own, _)| own == name)
        };
        let is_variable =
            |name: &str| self.aws_server.is_some() && AwsCredentialServer::is_variable(name);
        let values = self.values.iter().filter_map(move |value| {
            let name = value.name.as_str();
            let kind = match value.delivery {
                _ if is_variable(name) => return None,
                chitin_protocol::Delivery::Env if is_proxied(name) => DeliveryKind::Proxy,
                chitin_protocol::Delivery::Env => DeliveryKind::Env,
                chitin_protocol::Delivery::Memory => DeliveryKind::Memory,
            };
            Some((name, kind))
        });
        values.chain(self.aws_server.iter().map(|server| (server.name(), DeliveryKind::Endpoint)))
    }

    /// Revokes the leases of a sandbox that was not started.
    pub async fn revoke(self) {
        if let Some(renewer) = self.lease_renewer {
            renewer.revoke_all().await;
        }
    }
}

/// Fetches all credentials. Leases are revoked if one of them fails, and if the caller stops
/// waiting. `cleanup` counts that revocation.
///
/// # Errors
/// The error of the first credential that failed.
#[tracing::instrument(name = "credentials", skip_all, fields(count = secrets.len()))]
pub async fn fetch_credentials(
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
    cleanup: &TaskTracker,
) -> Result<FetchedCredentials, Error> {
    let (cancel, mut cancelled) = oneshot::channel();
    let guard = CancelGuard { cancel: Some(cancel), cleanup: cleanup.clone() };
    let (secrets, spec, cleanup) = (secrets.to_vec(), spec.clone(), cleanup.clone());
    // A separate task has the time to revoke leases after the caller has gone. Its result is
    // dropped in this order: the credentials, whose renewer then counts its revocation as a
    // clean-up, before the receiver, which holds the token of the guard.
    let fetching = async move {
        (fetch_or_cancel(&secrets, &spec, &cleanup, &mut cancelled).await, cancelled)
    };
    let fetched = tokio::spawn(fetching.in_current_span()).await;
    drop(guard);
    fetched.map_or(Err(Error::Stopped), |(fetched, _)| fetched)
}

/// Tells the task that fetches credentials that the caller stopped waiting. The message is a token
/// that keeps the clean-up counted until the task has revoked the leases.
struct CancelGuard {
    cancel: Option<oneshot::Sender<TaskTrackerToken>>,
    cleanup: TaskTracker,
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            let _ = cancel.send(self.cleanup.token());
        }
    }
}

async fn fetch_or_cancel(
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
    cleanup: &TaskTracker,
    cancelled: &mut oneshot::Receiver<TaskTrackerToken>,
) -> Result<FetchedCredentials, Error> {
    let mut vault = VaultReader::new(spec.vault.as_ref());
    let reading = vault.reading.clone();
    let mut cleanup_token = None;
    let resolved = {
        let mut resolving = pin!(resolve_secrets(&mut vault, secrets, spec));
        tokio::select! {
            resolved = &mut resolving => resolved,
            cancelled = cancelled => {
                cleanup_token = cancelled.ok();
                // The vault may have issued a secret already. Wait for its response, to revoke it.
                tokio::select! {
                    _ = &mut resolving => {}
                    _ = reading.lock() => {}
                }
                Err(Error::Stopped)
            }
        }
    };
    let renewer = start_renewer(vault, resolved.as_ref().ok(), cleanup);
    match resolved.and_then(|resolved| resolved.serve_aws_keys(renewer.as_ref())) {
        Ok((resolved, aws_server)) => Ok(resolved.into_fetched(renewer, aws_server)),
        Err(error) => {
            if let Some(renewer) = renewer {
                renewer.revoke_all().await;
            }
            drop(cleanup_token);
            Err(error)
        }
    }
}

/// Starts the renewal of the leases, if there is a login.
fn start_renewer(
    vault: VaultReader<'_>,
    resolved: Option<&ResolvedSecrets>,
    cleanup: &TaskTracker,
) -> Option<LeaseRenewer> {
    let rotating = resolved.map_or(&[][..], |resolved| &resolved.rotating);
    let reissuable = rotating.iter().map(|it| (it.source.location(), it.source.clone())).collect();
    Some(LeaseRenewer::start(vault.client?, vault.issued, reissuable, cleanup))
}

/// The values of all credentials, before leases are renewed.
#[derive(Default)]
struct ResolvedSecrets {
    values: Vec<CredentialValue>,
    rotating: Vec<RotatingCredential>,
    /// Credentials of the proxy: name, scope and value.
    proxied: Vec<(String, ProxyScope, SecretValue)>,
    proxy: Option<Arc<Proxy>>,
    aws: Option<AwsRequest>,
}

/// The credential with delivery `endpoint`, with its first keys.
struct AwsRequest {
    secret: SecretSpec,
    keys: AwsKeys,
    lease_expires_at: Option<Instant>,
}

/// Fetches the values of all credentials.
async fn resolve_secrets(
    vault: &mut VaultReader<'_>,
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
) -> Result<ResolvedSecrets, Error> {
    let mut resolved = ResolvedSecrets::default();
    for secret in secrets {
        let added = resolved.add_secret(vault, secret).await;
        added.map_err(|error| error.named(&secret.name))?;
        log_fetched(secret);
    }
    resolved.start_proxy(spec.trusted.as_deref()).await?;
    if let Some(source) = &spec.source {
        let added = resolved.add_fields(vault, source).await;
        added.map_err(|error| error.named(source.to_string()))?;
    }
    Ok(resolved)
}

/// Logs that a credential was fetched: never its value, and of its source only the scheme, because
/// a command may contain a value.
fn log_fetched(secret: &SecretSpec) {
    let delivery = secret.delivery.kind().name();
    tracing::info!(name = secret.name, source = secret.source.scheme(), delivery, "fetched");
}

impl ResolvedSecrets {
    async fn add_secret(
        &mut self,
        vault: &mut VaultReader<'_>,
        secret: &SecretSpec,
    ) -> Result<(), SecretError> {
        let name = secret.name.clone();
        let delivery = match &secret.delivery {
            Delivery::Endpoint => return self.add_aws_keys(vault, secret).await,
            Delivery::Proxy(scope) => {
                let value = fetch_value(secret, vault).await?;
                self.add_rotation(secret);
                self.proxied.push((name, scope.clone(), value));
                return Ok(());
            }
            Delivery::Memory => chitin_protocol::Delivery::Memory,
            Delivery::Env => chitin_protocol::Delivery::Env,
        };
        let value = fetch_value(secret, vault).await?;
        self.add_rotation(secret);
        self.values.push(CredentialValue { name, delivery, value });
        Ok(())
    }

    /// Binds a credential to its secret in a vault.
    fn add_rotation(&mut self, secret: &SecretSpec) {
        if let SecretSource::Vault(source) = &secret.source {
            let (name, source) = (secret.name.clone(), source.clone());
            self.rotating.push(RotatingCredential { name, source });
        }
    }

    async fn add_aws_keys(
        &mut self,
        vault: &mut VaultReader<'_>,
        secret: &SecretSpec,
    ) -> Result<(), SecretError> {
        if self.aws.is_some() {
            return Err(SecretError::SecondEndpoint);
        }
        let (keys, lease_expires_at) = fetch_aws_keys(vault, secret).await?;
        self.aws = Some(AwsRequest { secret: secret.clone(), keys, lease_expires_at });
        Ok(())
    }

    /// Makes the proxy, tests it, and adds its placeholders to the environment.
    async fn start_proxy(&mut self, trusted: Option<&str>) -> Result<(), Error> {
        if self.proxied.is_empty() {
            return Ok(());
        }
        let roots = match trusted {
            Some(pem) => {
                let certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
                Arc::new(tls::root_store(certificates.flatten().collect()))
            }
            None => tls::system_roots(),
        };
        let proxied = std::mem::take(&mut self.proxied);
        let proxy = Arc::new(Proxy::new(proxied, tls::client_config(roots), fill_random)?);
        proxy.self_test().await?;
        for (name, placeholder) in proxy.placeholders() {
            let added = self.add_variable(name, Zeroizing::new(placeholder.into()));
            added.map_err(|error| error.named(name))?;
        }
        self.proxy = Some(proxy);
        Ok(())
    }

    /// Adds a value to the environment of the workload.
    fn add_variable(&mut self, name: &str, value: Zeroizing<Vec<u8>>) -> Result<(), SecretError> {
        let (name, value) = (name.to_owned(), SecretValue::new(value, false)?);
        let delivery = chitin_protocol::Delivery::Env;
        self.values.push(CredentialValue { name, delivery, value });
        Ok(())
    }

    /// Adds each field of a secret as a credential, unless another credential has its name.
    async fn add_fields(
        &mut self,
        vault: &mut VaultReader<'_>,
        source: &VaultSource,
    ) -> Result<(), SecretError> {
        for (name, bytes) in vault.read_credentials(source).await? {
            if self.values.iter().any(|value| value.name == name) {
                continue;
            }
            let value = SecretValue::new(bytes, false)
                .map_err(|source| SecretError::Field { field: name.clone(), source })?;
            let source = VaultSource { field: Some(name.clone()), ..source.clone() };
            self.rotating.push(RotatingCredential { name: name.clone(), source });
            let delivery = chitin_protocol::Delivery::Memory;
            self.values.push(CredentialValue { name, delivery, value });
        }
        Ok(())
    }

    /// Makes the server of AWS keys, and adds its variables to the environment.
    fn serve_aws_keys(
        mut self,
        renewer: Option<&LeaseRenewer>,
    ) -> Result<(ResolvedSecrets, Option<Arc<AwsCredentialServer>>), Error> {
        let Some(request) = self.aws.take() else { return Ok((self, None)) };
        let name = request.secret.name.clone();
        let server = self
            .start_aws_server(request, renewer.map(LeaseRenewer::reader))
            .map_err(|error| error.named(name))?;
        Ok((self, Some(server)))
    }

    fn start_aws_server(
        &mut self,
        request: AwsRequest,
        reader: Option<LeaseReader>,
    ) -> Result<Arc<AwsCredentialServer>, SecretError> {
        let AwsRequest { secret, keys, lease_expires_at } = request;
        let server = AwsCredentialServer::new(secret, keys, lease_expires_at, reader, fill_random)?;
        for (name, value) in server.environment() {
            self.add_variable(name, value)?;
        }
        Ok(Arc::new(server))
    }

    fn into_fetched(
        self,
        mut lease_renewer: Option<LeaseRenewer>,
        aws_server: Option<Arc<AwsCredentialServer>>,
    ) -> FetchedCredentials {
        let changes = lease_renewer.as_mut().and_then(LeaseRenewer::take_changes);
        let ResolvedSecrets { values, rotating, proxy, .. } = self;
        FetchedCredentials { values, rotating, changes, proxy, aws_server, lease_renewer }
    }
}

/// Fetches AWS keys, and the expiry of their lease.
async fn fetch_aws_keys(
    vault: &mut VaultReader<'_>,
    secret: &SecretSpec,
) -> Result<(AwsKeys, Option<Instant>), SecretError> {
    let SecretSource::Vault(source) = &secret.source else {
        let value = fetch_value(secret, vault).await?;
        return Ok((AwsKeys::from_json(value.to_bytes().expose())?, None));
    };
    check_name(&secret.name)?;
    let keys = match &source.field {
        Some(_) => AwsKeys::from_json(&vault.read_field(source).await?)?,
        None => AwsKeys::from_fields(&vault.read_secret(source).await?.fields)?,
    };
    let lease = vault.read_secret(source).await?.lease.as_ref();
    Ok((keys, lease.map(|(_, lease)| lease.expires_at)))
}

/// Fills a buffer with random bytes of the kernel.
fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    getrandom::fill(buffer).map_err(io::Error::from)
}
