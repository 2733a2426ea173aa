//! Reads secrets of a vault for the credentials of one sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;

use chitin_spec::{VaultConfig, VaultSource, check_name};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::lease_renewal::Issued;
use super::{Fields, MAX_FIELDS, Read, Session, VaultError, config_from_env};

/// A vault that is logged in to when it is first asked, and asked once for each secret.
#[derive(Default)]
pub(crate) struct VaultReader<'a> {
    config: Option<&'a VaultConfig>,
    pub session: Option<Session>,
    read: BTreeMap<String, Read>,
    pub issued: Vec<Issued>,
    /// Held from the question to the vault until what it has issued is noted.
    pub asking: Arc<Mutex<()>>,
}

impl<'a> VaultReader<'a> {
    /// Of this vault, or of the one that the environment names.
    pub fn new(config: Option<&'a VaultConfig>) -> VaultReader<'a> {
        VaultReader { config, ..VaultReader::default() }
    }

    /// The value of a field, or of the only one.
    pub async fn field(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, String> {
        self.one(source).await.map_err(|error| error.to_string())
    }

    pub async fn one(&mut self, source: &VaultSource) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        select_field(source, &self.read(source).await?.fields)
    }

    /// The fields that can be credentials: all of them, or the one that is meant.
    pub async fn fields(
        &mut self,
        source: &VaultSource,
    ) -> Result<Vec<(String, Zeroizing<Vec<u8>>)>, VaultError> {
        let what = source.location();
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

    pub async fn read(&mut self, source: &VaultSource) -> Result<&Read, VaultError> {
        let place = source.location();
        if !self.read.contains_key(&place) {
            let _asking = self.asking.clone().lock_owned().await;
            if self.session.is_none() {
                let found;
                let config = match self.config {
                    Some(config) => config,
                    None => {
                        found = config_from_env()?;
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
///
/// # Errors
/// There is none of that name, or several and none is named, or it is no text.
pub fn select_field(
    source: &VaultSource,
    fields: &Fields,
) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let what = source.location();
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
