//! Credentials: where they come from beyond this host, how long they live, and how they get to where they are used.

use std::io;
use std::pin::pin;
use std::sync::Arc;

use chitin_spec::{
    Delivery, DeliveryKind, SecretSource, SecretSpec, VaultConfig, VaultSource, check_name,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;
use zeroize::Zeroizing;

use crate::Error;
use crate::aws::AwsCredentialServer;
use crate::aws::keys::{Keys, KeysError};
use crate::proxy::Proxy;
use crate::secret_value::SecretValue;
use crate::source::fetch_value;
use crate::tls;
use crate::vault::{Changes, LeaseReader, LeaseRenewer, VaultError, VaultReader};

/// What is asked for beside single credentials.
#[derive(Debug, Clone, Default)]
pub struct CredentialSpec {
    /// A secret of which each field is a credential.
    pub source: Option<VaultSource>,
    /// The vault; without it, the one that the environment names.
    pub vault: Option<VaultConfig>,
    /// PEM: who vouches for endpoints; without it, who the system trusts.
    pub trusted: Option<String>,
}

/// A credential with its value, for the agent.
#[derive(Debug)]
pub struct CredentialValue {
    /// Its name.
    pub name: String,
    /// How the agent delivers it.
    pub delivery: chitin_protocol::Delivery,
    /// What it is, or what stands for it.
    pub value: SecretValue,
}

/// A credential that is what a vault's secret is, for as long as it is.
#[derive(Debug, Clone)]
pub struct RotatingCredential {
    /// Its name.
    pub name: String,
    /// Where it is read.
    pub source: VaultSource,
}

/// All credentials of a sandbox.
#[derive(Debug, Default)]
pub struct FetchedCredentials {
    /// What the agent is given.
    pub values: Vec<CredentialValue>,
    /// Those that are to follow what becomes of their secrets.
    pub rotating: Vec<RotatingCredential>,
    /// What becomes of them.
    pub changes: Option<Changes>,
    /// Those whose values do not enter; their placeholders are among the others.
    pub proxy: Option<Arc<Proxy>>,
    /// The one that is asked for; what finds it is among the others.
    pub aws_server: Option<Arc<AwsCredentialServer>>,
    /// Who keeps what was issued for them alive, and takes it back.
    pub lease_renewer: Option<LeaseRenewer>,
}

impl FetchedCredentials {
    /// The credentials and how each is delivered.
    pub fn deliveries(&self) -> impl Iterator<Item = (&str, DeliveryKind)> {
        let proxied = |name: &str| {
            self.proxy.iter().flat_map(|proxy| proxy.placeholders()).any(|(own, _)| own == name)
        };
        let finds =
            |name: &str| self.aws_server.is_some() && AwsCredentialServer::is_variable(name);
        let values = self.values.iter().filter_map(move |value| {
            let name = value.name.as_str();
            let how = match value.delivery {
                _ if finds(name) => return None,
                chitin_protocol::Delivery::Env if proxied(name) => DeliveryKind::Proxy,
                chitin_protocol::Delivery::Env => DeliveryKind::Env,
                chitin_protocol::Delivery::Memory => DeliveryKind::Memory,
            };
            Some((name, how))
        });
        values
            .chain(self.aws_server.iter().map(|endpoint| (endpoint.name(), DeliveryKind::Endpoint)))
    }

    /// Takes back what was issued, when nothing has come of the sandbox.
    pub async fn revoke(self) {
        if let Some(keeper) = self.lease_renewer {
            keeper.revoke_all().await;
        }
    }
}

/// Fetches everything. What was issued is taken back if anything fails, and if nobody waits for it any more.
/// The giving back is counted by `cleanup`.
///
/// # Errors
/// The first credential that could not be had.
#[tracing::instrument(name = "credentials", skip_all, fields(count = secrets.len()))]
pub async fn fetch_credentials(
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
    cleanup: &TaskTracker,
) -> Result<FetchedCredentials, Error> {
    let (waits, mut gone) = oneshot::channel();
    let waits = CancelGuard { waits: Some(waits), cleanup: cleanup.clone() };
    let (secrets, spec, cleanup) = (secrets.to_vec(), spec.clone(), cleanup.clone());
    // In a task of its own, which has the time to give back what it has got when whoever asked is gone. What it leaves behind
    // is dropped in this order, so that what is fetched begins to be given back before that who asked is gone is forgotten.
    let fetching = async move { (fetch_for(&secrets, &spec, &cleanup, &mut gone).await, gone) };
    let fetched = tokio::spawn(fetching.in_current_span()).await;
    drop(waits);
    fetched.map_or(Err(Error::Stopped), |(fetched, _)| fetched)
}

/// Somebody waits for credentials.
struct CancelGuard {
    waits: Option<oneshot::Sender<TaskTrackerToken>>,
    cleanup: TaskTracker,
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if let Some(waits) = self.waits.take() {
            let _ = waits.send(self.cleanup.token());
        }
    }
}

async fn fetch_for(
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
    cleanup: &TaskTracker,
    gone: &mut oneshot::Receiver<TaskTrackerToken>,
) -> Result<FetchedCredentials, Error> {
    let mut vault = VaultReader::new(spec.vault.as_ref());
    let mut returning = None;
    let asking = vault.asking.clone();
    let fetched = {
        let mut fetching = pin!(fetch_from(&mut vault, secrets, spec));
        tokio::select! {
            fetched = &mut fetching => fetched,
            gone = gone => {
                returning = gone.ok();
                // What a vault is being asked for it may have issued already: its answer is waited for.
                tokio::select! {
                    _ = &mut fetching => {}
                    _ = asking.lock() => {}
                }
                Err(Error::Stopped)
            }
        }
    };
    let rotating = fetched.as_ref().map_or(&[][..], |resolved| &resolved.rotating);
    let followed = rotating.iter().map(|one| (one.source.location(), one.source.clone())).collect();
    let mut keeper =
        vault.session.map(|session| LeaseRenewer::start(session, vault.issued, followed, cleanup));
    let changes = keeper.as_mut().and_then(LeaseRenewer::changes);
    let fetched = fetched.and_then(|ResolvedSecrets { mut values, rotating, proxy, asked }| {
        let reader = keeper.as_ref().map(LeaseRenewer::reader);
        let endpoint = asked.map(|asked| serve(asked, reader, &mut values)).transpose()?;
        Ok((values, rotating, proxy, endpoint))
    });
    match fetched {
        Ok((values, rotating, proxy, endpoint)) => Ok(FetchedCredentials {
            values,
            rotating,
            changes,
            proxy,
            aws_server: endpoint,
            lease_renewer: keeper,
        }),
        Err(error) => {
            if let Some(keeper) = keeper {
                keeper.revoke_all().await;
            }
            drop(returning);
            Err(error)
        }
    }
}

struct ResolvedSecrets {
    values: Vec<CredentialValue>,
    rotating: Vec<RotatingCredential>,
    proxy: Option<Arc<Proxy>>,
    asked: Option<AwsRequest>,
}

/// What is asked for by the workload, with what it would get now and how long the vault vouches for that.
struct AwsRequest {
    secret: SecretSpec,
    keys: Keys,
    lease: Option<Instant>,
}

/// Fills a buffer with random bytes of the kernel.
fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    getrandom::fill(buffer).map_err(io::Error::from)
}

/// An endpoint, and beside it what has the workload find it.
fn serve(
    asked: AwsRequest,
    reader: Option<LeaseReader>,
    values: &mut Vec<CredentialValue>,
) -> Result<Arc<AwsCredentialServer>, Error> {
    let AwsRequest { secret, keys, lease } = asked;
    let name = secret.name.clone();
    let failed = |reason| Error::Secret { name: name.clone(), reason };
    let endpoint =
        AwsCredentialServer::new(secret, keys, lease, reader, fill_random).map_err(failed)?;
    for (name, value) in endpoint.environment() {
        let value = SecretValue::new(value, false).map_err(failed)?;
        values.push(CredentialValue {
            name: name.into(),
            delivery: chitin_protocol::Delivery::Env,
            value,
        });
    }
    Ok(Arc::new(endpoint))
}

/// The keys that a source gives, and how long the vault vouches for them.
async fn fetch_aws_keys(
    vault: &mut VaultReader<'_>,
    secret: &SecretSpec,
) -> Result<(Result<Keys, KeysError>, Option<Instant>), Error> {
    let SecretSource::Vault(source) = &secret.source else {
        let value = fetch_value(secret, vault).await?;
        return Ok((Keys::from_json(value.to_bytes().expose()), None));
    };
    let failed =
        |error: VaultError| Error::Secret { name: secret.name.clone(), reason: error.to_string() };
    check_name(&secret.name)
        .map_err(|error| Error::Secret { name: secret.name.clone(), reason: error.to_string() })?;
    let keys = match &source.field {
        Some(_) => Keys::from_json(&vault.one(source).await.map_err(failed)?),
        None => Keys::from_fields(&vault.read(source).await.map_err(failed)?.fields),
    };
    let lease =
        vault.read(source).await.map_err(failed)?.lease.as_ref().map(|(_, lease)| lease.until);
    Ok((keys, lease))
}

/// Logs that a credential was fetched: never its value, and of its source only the scheme, because
/// a command may contain a value.
fn log_fetched(secret: &SecretSpec) {
    let delivery = secret.delivery.kind().name();
    tracing::info!(name = secret.name, source = secret.source.scheme(), delivery, "fetched");
}

async fn fetch_from(
    vault: &mut VaultReader<'_>,
    secrets: &[SecretSpec],
    spec: &CredentialSpec,
) -> Result<ResolvedSecrets, Error> {
    let (mut values, mut rotating, mut proxied, mut asked) =
        (Vec::new(), Vec::new(), Vec::new(), None);
    for secret in secrets {
        if secret.delivery == Delivery::Endpoint {
            let failed = |reason: String| Error::Secret { name: secret.name.clone(), reason };
            if asked.is_some() {
                let reason = "there is one endpoint, at which programs look for one credential, and another has it";
                return Err(failed(reason.into()));
            }
            let (keys, lease) = fetch_aws_keys(vault, secret).await?;
            asked = Some(AwsRequest {
                secret: secret.clone(),
                keys: keys.map_err(|error| failed(error.to_string()))?,
                lease,
            });
            log_fetched(secret);
            continue;
        }
        let value = fetch_value(secret, vault).await?;
        log_fetched(secret);
        let name = secret.name.clone();
        if let SecretSource::Vault(source) = &secret.source {
            rotating.push(RotatingCredential { name: name.clone(), source: source.clone() });
        }
        match &secret.delivery {
            Delivery::Memory => values.push(CredentialValue {
                name,
                delivery: chitin_protocol::Delivery::Memory,
                value,
            }),
            Delivery::Env => values.push(CredentialValue {
                name,
                delivery: chitin_protocol::Delivery::Env,
                value,
            }),
            Delivery::Proxy(reach) => proxied.push((name, reach.clone(), value)),
            // It was dealt with.
            Delivery::Endpoint => {}
        }
    }
    let mut proxy = None;
    if !proxied.is_empty() {
        let roots = match &spec.trusted {
            Some(pem) => Arc::new(tls::root_store(
                CertificateDer::pem_slice_iter(pem.as_bytes()).flatten().collect(),
            )),
            None => tls::system_roots(),
        };
        let made = Arc::new(Proxy::new(proxied, tls::client_config(roots), fill_random)?);
        made.self_test().await?;
        for (name, placeholder) in made.placeholders() {
            let failed = |reason| Error::Secret { name: name.into(), reason };
            let value =
                SecretValue::new(Zeroizing::new(placeholder.into()), false).map_err(failed)?;
            values.push(CredentialValue {
                name: name.into(),
                delivery: chitin_protocol::Delivery::Env,
                value,
            });
        }
        proxy = Some(made);
    }
    if let Some(source) = &spec.source {
        let failed = |reason: String| Error::Secret { name: source.to_string(), reason };
        for (name, bytes) in
            vault.fields(source).await.map_err(|error| failed(error.to_string()))?
        {
            // One that is asked for by name comes from where it was said to come from.
            if values.iter().all(|value| value.name != name) {
                let value = SecretValue::new(bytes, false)
                    .map_err(|why| failed(format!("field `{name}`: {why}")))?;
                let source = VaultSource { field: Some(name.clone()), ..source.clone() };
                rotating.push(RotatingCredential { name: name.clone(), source });
                values.push(CredentialValue {
                    name,
                    delivery: chitin_protocol::Delivery::Memory,
                    value,
                });
            }
        }
    }
    Ok(ResolvedSecrets { values, rotating, proxy, asked })
}
