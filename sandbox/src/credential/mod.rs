//! Credentials: where they come from beyond this host, how long they live, and how they get to where they are used.

mod keeper;
mod tls;
mod vault;

use std::collections::BTreeMap;

use chitin_protocol::Delivery;
use zeroize::Zeroizing;

use keeper::Issued;
pub(crate) use keeper::Keeper;
use vault::{MAX_FIELDS, Read, Session, VaultError};
pub use vault::{SecretId, VaultConfig, VaultLogin};

use crate::policy::VaultSource;
use crate::secret::{SecretValue, check_name};
use crate::{Error, SecretSpec};

/// What is asked for beside single credentials.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    /// A secret of which each field is a credential.
    pub source: Option<VaultSource>,
    /// The vault; without it, the one that the environment names.
    pub vault: Option<VaultConfig>,
}

/// A credential with its value.
#[derive(Debug)]
pub(crate) struct Value {
    pub name: String,
    pub delivery: Delivery,
    pub value: SecretValue,
}

/// All credentials of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    pub values: Vec<Value>,
    /// Who keeps what was issued for them alive, and takes it back.
    pub keeper: Option<Keeper>,
}

impl Fetched {
    /// Takes back what was issued, when nothing has come of the sandbox.
    pub async fn give_back(self) {
        if let Some(keeper) = self.keeper {
            keeper.end().await;
        }
    }
}

/// Fetches everything. What was issued is taken back if anything fails.
pub(crate) async fn fetch(secrets: &[SecretSpec], spec: &Spec) -> Result<Fetched, Error> {
    let mut vault = Vault { config: spec.vault.as_ref(), ..Vault::default() };
    let fetched = fetch_from(&mut vault, secrets, spec).await;
    let keeper = vault.session.map(|session| Keeper::start(session, vault.issued));
    match fetched {
        Ok(values) => Ok(Fetched { values, keeper }),
        Err(error) => {
            if let Some(keeper) = keeper {
                keeper.end().await;
            }
            Err(error)
        }
    }
}

async fn fetch_from(vault: &mut Vault<'_>, secrets: &[SecretSpec], spec: &Spec) -> Result<Vec<Value>, Error> {
    let mut values = Vec::new();
    for secret in secrets {
        let value = secret.fetch(vault).await?;
        values.push(Value { name: secret.name.clone(), delivery: secret.delivery, value });
    }
    if let Some(source) = &spec.source {
        let failed = |reason: String| Error::Secret { name: source.to_string(), reason };
        for (name, bytes) in vault.fields(source).await.map_err(|error| failed(error.to_string()))? {
            // One that is asked for by name comes from where it was said to come from.
            if values.iter().all(|value| value.name != name) {
                let value = SecretValue::hold(bytes, false)
                    .map_err(|why| failed(format!("field `{name}`: {why}")))?;
                values.push(Value { name, delivery: Delivery::Memory, value });
            }
        }
    }
    Ok(values)
}

/// A vault that is logged in to when it is first asked, and asked once for each secret.
#[derive(Default)]
pub(crate) struct Vault<'a> {
    config: Option<&'a VaultConfig>,
    session: Option<Session>,
    read: BTreeMap<String, Read>,
    issued: Vec<Issued>,
}

impl Vault<'_> {
    /// The value of a field, or of the only one.
    pub async fn field(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, String> {
        self.one(source).await.map_err(|error| error.to_string())
    }

    async fn one(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        let what = source.place();
        let Read { fields, .. } = self.read(source).await?;
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
            if read.fields.len() > MAX_FIELDS {
                return Err(VaultError::TooMany { what: place, count: read.fields.len() });
            }
            if let Some((id, lease)) = &read.lease {
                self.issued.push(Issued { what: place.clone(), id: id.clone(), lease: *lease });
            }
            self.read.insert(place.clone(), read);
        }
        self.read.get(&place).ok_or(VaultError::Answer { what: place })
    }
}

fn credential_name(what: &str, field: &str) -> Result<String, VaultError> {
    match check_name(field) {
        Ok(()) => Ok(field.to_owned()),
        Err(_) => Err(VaultError::FieldName { what: what.into(), field: field.into() }),
    }
}
