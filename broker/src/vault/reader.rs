//! Reads the secrets of a vault for the credentials of one sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;

use chitin_spec::{VaultConfig, VaultSource, check_name};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::client::VaultSecret;
use super::lease_renewal::IssuedLease;
use super::{Fields, VaultClient, VaultError, config_from_env};

/// Logs in at the first read, and reads each secret once.
#[derive(Default)]
pub(crate) struct VaultReader<'a> {
    config: Option<&'a VaultConfig>,
    pub client: Option<VaultClient>,
    secrets: BTreeMap<String, VaultSecret>,
    pub issued: Vec<IssuedLease>,
    /// Held from a request until the lease of its response is in `issued`.
    pub reading: Arc<Mutex<()>>,
}

impl<'a> VaultReader<'a> {
    /// Makes a reader for this vault, or for the one that the environment names.
    pub fn new(config: Option<&'a VaultConfig>) -> VaultReader<'a> {
        VaultReader { config, ..VaultReader::default() }
    }

    /// Returns the value of the field that the source names, or of the only field.
    pub async fn read_field(
        &mut self,
        source: &VaultSource,
    ) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        select_field(source, &self.read_secret(source).await?.fields)
    }

    /// Returns the fields that become credentials: the field that the source names, or all.
    pub async fn read_credentials(
        &mut self,
        source: &VaultSource,
    ) -> Result<Vec<(String, Zeroizing<Vec<u8>>)>, VaultError> {
        let location = source.location();
        if let Some(field) = &source.field {
            let name = credential_name(&location, field)?;
            return Ok(vec![(name, self.read_field(source).await?)]);
        }
        let mut values = Vec::new();
        for (field, value) in &self.read_secret(source).await?.fields {
            let name = credential_name(&location, field)?;
            let value = value.clone().ok_or_else(|| VaultError::NotScalar {
                location: location.clone(),
                field: name.clone(),
            })?;
            values.push((name, value));
        }
        Ok(values)
    }

    /// Reads a secret at the first call for its location.
    pub async fn read_secret(&mut self, source: &VaultSource) -> Result<&VaultSecret, VaultError> {
        let location = source.location();
        if !self.secrets.contains_key(&location) {
            let _reading = self.reading.clone().lock_owned().await;
            let secret = self.client().await?.read_secret(source).await?;
            if let Some((id, lease)) = &secret.lease {
                let (location, id) = (location.clone(), id.clone());
                self.issued.push(IssuedLease { location, id, lease: *lease });
            }
            self.secrets.insert(location.clone(), secret);
        }
        self.secrets.get(&location).ok_or(VaultError::InvalidResponse { operation: location })
    }

    /// Returns the client, which is logged in at the first call.
    async fn client(&mut self) -> Result<&VaultClient, VaultError> {
        let client = match self.client.take() {
            Some(client) => client,
            None => match self.config {
                Some(config) => VaultClient::log_in(config).await?,
                None => VaultClient::log_in(&config_from_env()?).await?,
            },
        };
        Ok(self.client.insert(client))
    }
}

/// Returns the value of the field that the source names, or of the only field.
///
/// # Errors
/// The field does not exist, the source does not name one of several, or the value is not a string,
/// number or boolean.
pub fn select_field(
    source: &VaultSource,
    fields: &Fields,
) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let location = source.location();
    let (field, value) = match (&source.field, fields.as_slice()) {
        (Some(field), _) => fields.iter().find(|(name, _)| name == field).ok_or_else(|| {
            VaultError::MissingField { location: location.clone(), field: field.clone() }
        })?,
        (None, [only]) => only,
        (None, _) => return Err(VaultError::AmbiguousField { location, count: fields.len() }),
    };
    value.clone().ok_or_else(|| VaultError::NotScalar { location, field: field.clone() })
}

fn credential_name(location: &str, field: &str) -> Result<String, VaultError> {
    match check_name(field) {
        Ok(()) => Ok(field.to_owned()),
        Err(_) => {
            Err(VaultError::InvalidFieldName { location: location.into(), field: field.into() })
        }
    }
}
