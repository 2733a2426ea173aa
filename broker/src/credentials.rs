//! Credentials: where they come from beyond this host, how long they live, and how they get to where they are used.

mod authority;
mod endpoint;
mod handed;
mod keeper;
mod keys;
mod keystore;
mod message;
mod placeholder;
mod proxy;
mod selftest;
mod tls;
mod trust;
mod vault;

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::{Mutex, oneshot};
use tokio::time::Instant;
use zeroize::Zeroizing;

pub(crate) use endpoint::{Endpoint, Fetched as Answered, PORT as ENDPOINT_PORT};
pub(crate) use handed::Handed;
pub(crate) use keeper::Keeper;
use keeper::{Changes, Issued};
use keys::{Keys, KeysError};
pub use proxy::Reach;
pub(crate) use proxy::{Account, Proxy, SetupError};
pub(crate) use trust::trust;
use vault::{Fields, MAX_FIELDS, Read, Session, VaultError};
pub use vault::{SecretId, VaultConfig, VaultLogin};

use crate::policy::VaultSource;
use crate::returning::Returning;
use crate::secret::{SecretSource, SecretValue, check_name};
use crate::template::fill_random;
use crate::{Error, SecretSpec};

/// How the workload gets a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// As a sealed file in memory, inherited, that `NAME_FILE` names.
    Memory,
    /// As the environment variable `NAME`, which everything that the workload starts sees.
    Env,
    /// Not at all: the environment variable `NAME` is a placeholder, which is replaced on its way to the named hosts.
    Proxy(Reach),
    /// When it asks: keys of AWS, which its SDKs fetch from an address of the sandbox's own, again and again. For one credential.
    Endpoint,
}

/// How one that was fetched gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Memory,
    Env,
    Proxy,
    Endpoint,
}

impl Way {
    /// In the words of a policy.
    pub fn word(self) -> &'static str {
        match self {
            Way::Memory => "memory",
            Way::Env => "env",
            Way::Proxy => "proxy",
            Way::Endpoint => "endpoint",
        }
    }
}

/// What is asked for beside single credentials.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    /// A secret of which each field is a credential.
    pub source: Option<VaultSource>,
    /// The vault; without it, the one that the environment names.
    pub vault: Option<VaultConfig>,
    /// PEM: who vouches for endpoints; without it, who the system trusts.
    pub trusted: Option<String>,
}

/// A credential with its value, for the agent.
#[derive(Debug)]
pub(crate) struct Value {
    pub name: String,
    pub delivery: chitin_protocol::Delivery,
    pub value: SecretValue,
}

/// A credential that is what a vault's secret is, for as long as it is.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    pub name: String,
    pub source: VaultSource,
}

/// All credentials of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    pub values: Vec<Value>,
    /// Those that are to follow what becomes of their secrets.
    pub bound: Vec<Bound>,
    /// What becomes of them.
    pub changes: Option<Changes>,
    /// Those whose values do not enter; their placeholders are among the others.
    pub proxy: Option<Arc<Proxy>>,
    /// The one that is asked for; what finds it is among the others.
    pub endpoint: Option<Arc<Endpoint>>,
    /// Who keeps what was issued for them alive, and takes it back.
    pub keeper: Option<Keeper>,
}

impl Fetched {
    /// The credentials and how each is delivered.
    pub fn deliveries(&self) -> impl Iterator<Item = (&str, Way)> {
        let proxied = |name: &str| {
            self.proxy.iter().flat_map(|proxy| proxy.placeholders()).any(|(own, _)| own == name)
        };
        let finds = |name: &str| self.endpoint.is_some() && Endpoint::is_variable(name);
        let values = self.values.iter().filter_map(move |value| {
            let name = value.name.as_str();
            let how = match value.delivery {
                _ if finds(name) => return None,
                chitin_protocol::Delivery::Env if proxied(name) => Way::Proxy,
                chitin_protocol::Delivery::Env => Way::Env,
                chitin_protocol::Delivery::Memory => Way::Memory,
            };
            Some((name, how))
        });
        values.chain(self.endpoint.iter().map(|endpoint| (endpoint.name(), Way::Endpoint)))
    }

    /// Takes back what was issued, when nothing has come of the sandbox.
    pub async fn give_back(self) {
        if let Some(keeper) = self.keeper {
            keeper.end().await;
        }
    }
}

/// Fetches everything. What was issued is taken back if anything fails, and if nobody waits for it any more.
pub(crate) async fn fetch(secrets: &[SecretSpec], spec: &Spec) -> Result<Fetched, Error> {
    let (waits, mut gone) = oneshot::channel();
    let waits = Waits(Some(waits));
    let (secrets, spec) = (secrets.to_vec(), spec.clone());
    // In a task of its own, which has the time to give back what it has got when whoever asked is gone. What it leaves behind
    // is dropped in this order, so that what is fetched begins to be given back before that who asked is gone is forgotten.
    let fetched =
        tokio::spawn(async move { (fetch_for(&secrets, &spec, &mut gone).await, gone) }).await;
    drop(waits);
    fetched.map_or(Err(Error::Stopped), |(fetched, _)| fetched)
}

/// Somebody waits for credentials.
struct Waits(Option<oneshot::Sender<Returning>>);

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(waits) = self.0.take() {
            let _ = waits.send(Returning::begin());
        }
    }
}

async fn fetch_for(
    secrets: &[SecretSpec],
    spec: &Spec,
    gone: &mut oneshot::Receiver<Returning>,
) -> Result<Fetched, Error> {
    let mut vault = Vault { config: spec.vault.as_ref(), ..Vault::default() };
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
    let bound = fetched.as_ref().map_or(&[][..], |sorted| &sorted.bound);
    let followed = bound.iter().map(|bound| (bound.source.place(), bound.source.clone())).collect();
    let mut keeper = vault.session.map(|session| Keeper::start(session, vault.issued, followed));
    let changes = keeper.as_mut().and_then(Keeper::changes);
    let fetched = fetched.and_then(|Sorted { mut values, bound, proxy, asked }| {
        let reader = keeper.as_ref().map(Keeper::reader);
        let endpoint = asked.map(|asked| serve(asked, reader, &mut values)).transpose()?;
        Ok((values, bound, proxy, endpoint))
    });
    match fetched {
        Ok((values, bound, proxy, endpoint)) => {
            Ok(Fetched { values, bound, changes, proxy, endpoint, keeper })
        }
        Err(error) => {
            if let Some(keeper) = keeper {
                keeper.end().await;
            }
            drop(returning);
            Err(error)
        }
    }
}

struct Sorted {
    values: Vec<Value>,
    bound: Vec<Bound>,
    proxy: Option<Arc<Proxy>>,
    asked: Option<Asked>,
}

/// What is asked for by the workload, with what it would get now and how long the vault vouches for that.
struct Asked {
    secret: SecretSpec,
    keys: Keys,
    lease: Option<Instant>,
}

/// An endpoint, and beside it what has the workload find it.
fn serve(
    asked: Asked,
    reader: Option<keeper::Reader>,
    values: &mut Vec<Value>,
) -> Result<Arc<Endpoint>, Error> {
    let Asked { secret, keys, lease } = asked;
    let name = secret.name.clone();
    let failed = |reason| Error::Secret { name: name.clone(), reason };
    let endpoint = Endpoint::new(secret, keys, lease, reader, fill_random).map_err(failed)?;
    for (name, value) in endpoint.environment() {
        let value = SecretValue::hold(value, false).map_err(failed)?;
        values.push(Value { name: name.into(), delivery: chitin_protocol::Delivery::Env, value });
    }
    Ok(Arc::new(endpoint))
}

async fn fetch_from(
    vault: &mut Vault<'_>,
    secrets: &[SecretSpec],
    spec: &Spec,
) -> Result<Sorted, Error> {
    let (mut values, mut bound, mut proxied, mut asked) =
        (Vec::new(), Vec::new(), Vec::new(), None);
    for secret in secrets {
        if secret.delivery == Delivery::Endpoint {
            let failed = |reason: String| Error::Secret { name: secret.name.clone(), reason };
            if asked.is_some() {
                let reason = "there is one endpoint, at which programs look for one credential, and another has it";
                return Err(failed(reason.into()));
            }
            let (keys, lease) = vault.keys(secret).await?;
            asked = Some(Asked {
                secret: secret.clone(),
                keys: keys.map_err(|error| failed(error.to_string()))?,
                lease,
            });
            continue;
        }
        let value = secret.fetch(vault).await?;
        let name = secret.name.clone();
        if let SecretSource::Vault(source) = &secret.source {
            bound.push(Bound { name: name.clone(), source: source.clone() });
        }
        match &secret.delivery {
            Delivery::Memory => {
                values.push(Value { name, delivery: chitin_protocol::Delivery::Memory, value })
            }
            Delivery::Env => {
                values.push(Value { name, delivery: chitin_protocol::Delivery::Env, value })
            }
            Delivery::Proxy(reach) => proxied.push((name, reach.clone(), value)),
            // It was dealt with.
            Delivery::Endpoint => {}
        }
    }
    let mut proxy = None;
    if !proxied.is_empty() {
        let roots = match &spec.trusted {
            Some(pem) => Arc::new(tls::roots_of(
                CertificateDer::pem_slice_iter(pem.as_bytes()).flatten().collect(),
            )),
            None => tls::system_roots(),
        };
        let made = Arc::new(Proxy::new(proxied, tls::client(roots), fill_random)?);
        made.self_test().await?;
        for (name, placeholder) in made.placeholders() {
            let failed = |reason| Error::Secret { name: name.into(), reason };
            let value =
                SecretValue::hold(Zeroizing::new(placeholder.into()), false).map_err(failed)?;
            values.push(Value {
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
                let value = SecretValue::hold(bytes, false)
                    .map_err(|why| failed(format!("field `{name}`: {why}")))?;
                let source = VaultSource { field: Some(name.clone()), ..source.clone() };
                bound.push(Bound { name: name.clone(), source });
                values.push(Value { name, delivery: chitin_protocol::Delivery::Memory, value });
            }
        }
    }
    Ok(Sorted { values, bound, proxy, asked })
}

/// A vault that is logged in to when it is first asked, and asked once for each secret.
#[derive(Default)]
pub(crate) struct Vault<'a> {
    config: Option<&'a VaultConfig>,
    session: Option<Session>,
    read: BTreeMap<String, Read>,
    issued: Vec<Issued>,
    /// Held from the question to the vault until what it has issued is noted.
    asking: Arc<Mutex<()>>,
}

impl Vault<'_> {
    /// The value of a field, or of the only one.
    pub async fn field(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, String> {
        self.one(source).await.map_err(|error| error.to_string())
    }

    async fn one(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        field_of(source, &self.read(source).await?.fields)
    }

    /// The keys that a source gives, and how long the vault vouches for them.
    async fn keys(
        &mut self,
        secret: &SecretSpec,
    ) -> Result<(Result<Keys, KeysError>, Option<Instant>), Error> {
        let SecretSource::Vault(source) = &secret.source else {
            let value = secret.fetch(self).await?;
            return Ok((Keys::from_json(value.to_bytes().expose()), None));
        };
        let failed = |error: VaultError| Error::Secret {
            name: secret.name.clone(),
            reason: error.to_string(),
        };
        check_name(&secret.name).map_err(|error| Error::Secret {
            name: secret.name.clone(),
            reason: error.to_string(),
        })?;
        let keys = match &source.field {
            Some(_) => Keys::from_json(&self.one(source).await.map_err(failed)?),
            None => Keys::from_fields(&self.read(source).await.map_err(failed)?.fields),
        };
        let lease =
            self.read(source).await.map_err(failed)?.lease.as_ref().map(|(_, lease)| lease.until);
        Ok((keys, lease))
    }

    /// The fields that can be credentials: all of them, or the one that is meant.
    async fn fields(
        &mut self,
        source: &VaultSource,
    ) -> Result<Vec<(String, Zeroizing<Vec<u8>>)>, VaultError> {
        let what = source.place();
        if let Some(field) = &source.field {
            return Ok(vec![(credential_name(&what, field)?, self.one(source).await?)]);
        }
        let mut values = Vec::new();
        for (name, value) in &self.read(source).await?.fields {
            let name = credential_name(&what, name)?;
            let value = value
                .clone()
                .ok_or_else(|| VaultError::NoText { what: what.clone(), field: name.clone() })?;
            values.push((name, value));
        }
        Ok(values)
    }

    async fn read(&mut self, source: &VaultSource) -> Result<&Read, VaultError> {
        let place = source.place();
        if !self.read.contains_key(&place) {
            let _asking = self.asking.clone().lock_owned().await;
            if self.session.is_none() {
                let found;
                let config = match self.config {
                    Some(config) => config,
                    None => {
                        found = VaultConfig::from_env()?;
                        &found
                    }
                };
                self.session = Some(Session::begin(config).await?);
            }
            let missing = || VaultError::Answer { what: place.clone() };
            let read = self.session.as_ref().ok_or_else(missing)?.read(source).await?;
            if let Some((id, lease)) = &read.lease {
                self.issued.push(Issued { what: place.clone(), id: id.clone(), lease: *lease });
            }
            if read.fields.len() > MAX_FIELDS {
                return Err(VaultError::TooMany { what: place, count: read.fields.len() });
            }
            self.read.insert(place.clone(), read);
        }
        self.read.get(&place).ok_or(VaultError::Answer { what: place })
    }
}

/// The value of the field that is meant, or of the only one.
fn field_of(source: &VaultSource, fields: &Fields) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let what = source.place();
    let (name, value) = match (&source.field, fields.as_slice()) {
        (Some(name), _) => {
            let missing = || VaultError::NoField { what: what.clone(), field: name.clone() };
            fields.iter().find(|(field, _)| field == name).ok_or_else(missing)?
        }
        (None, [one]) => one,
        (None, _) => return Err(VaultError::WhichField { what, count: fields.len() }),
    };
    value.clone().ok_or_else(|| VaultError::NoText { what, field: name.clone() })
}

fn credential_name(what: &str, field: &str) -> Result<String, VaultError> {
    match check_name(field) {
        Ok(()) => Ok(field.to_owned()),
        Err(_) => Err(VaultError::FieldName { what: what.into(), field: field.into() }),
    }
}
