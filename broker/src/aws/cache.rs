//! The keys of one credential, read again from their source before they expire.

use std::time::{Duration, SystemTime};

use chitin_spec::{SecretSource, SecretSpec, VaultSource};
use tokio::sync::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::AwsKeys;
use crate::error::SecretError;
use crate::source::fetch_value;
use crate::vault::{CurrentSecret, Fields, LeaseReader, VaultReader};

/// The validity that is stated for keys without an expiry. SDKs request new keys 5 to 15 minutes
/// before.
pub(super) const STATED_VALIDITY: Duration = Duration::from_secs(30 * 60);

/// The age at which keys without an expiry are read again from a command or a static secret.
const MAX_AGE: Duration = Duration::from_secs(60);

/// The minimum time between two reads: a workload must not be able to load the source.
pub(super) const READ_PAUSE: Duration = Duration::from_secs(1);

/// The source of keys, and the keys that were read last.
pub(super) struct KeyCache {
    source: SecretSpec,
    /// Reads a secret of a vault again.
    reader: Option<LeaseReader>,
    pub(super) cached: Mutex<CachedKeys>,
}

/// The keys that were read last.
pub(super) struct CachedKeys {
    keys: AwsKeys,
    pub(super) read_at: Instant,
    validity: Option<Validity>,
}

#[derive(Clone, Copy)]
struct Validity {
    expires_at: SystemTime,
    /// The time that was left when the keys were read.
    ttl: Duration,
}

impl CachedKeys {
    /// The keys are valid until they or their lease expire, whichever is earlier.
    fn new(keys: AwsKeys, lease_expires_at: Option<Instant>) -> CachedKeys {
        let validity = earliest(keys.expires_at, lease_expires_at).map(|expires_at| {
            let ttl = expires_at.duration_since(SystemTime::now()).unwrap_or_default();
            Validity { expires_at, ttl }
        });
        CachedKeys { keys, read_at: Instant::now(), validity }
    }

    /// Records a renewal of the lease.
    fn extend(&mut self, lease_expires_at: Instant) {
        let ttl = self.validity.map_or(Duration::ZERO, |validity| validity.ttl);
        self.validity = earliest(self.keys.expires_at, Some(lease_expires_at))
            .map(|expires_at| Validity { expires_at, ttl });
    }

    /// Returns true if less than a quarter of the TTL is left, or if the keys have no expiry and
    /// were read a while ago.
    fn is_stale(&self) -> bool {
        match self.validity {
            None => self.read_at.elapsed() >= MAX_AGE,
            Some(Validity { expires_at, ttl }) => expires_at < SystemTime::now() + ttl / 4,
        }
    }
}

fn earliest(keys: Option<SystemTime>, lease: Option<Instant>) -> Option<SystemTime> {
    keys.into_iter().chain(lease.map(to_system_time)).min()
}

fn to_system_time(instant: Instant) -> SystemTime {
    SystemTime::now() + instant.saturating_duration_since(Instant::now())
}

impl KeyCache {
    /// Makes a cache of keys that were just read.
    pub fn new(
        source: SecretSpec,
        keys: AwsKeys,
        lease_expires_at: Option<Instant>,
        reader: Option<LeaseReader>,
    ) -> KeyCache {
        KeyCache { source, reader, cached: Mutex::new(CachedKeys::new(keys, lease_expires_at)) }
    }

    /// The name of the credential.
    pub fn name(&self) -> &str {
        &self.source.name
    }

    /// Returns the current document. The error beside it is that of a failed read, after which the
    /// earlier keys are still valid.
    pub async fn read_document(
        &self,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<SecretError>), SecretError> {
        let mut cached = self.cached.lock().await;
        let failure = match cached.read_at.elapsed() < READ_PAUSE {
            true => None,
            false => self.refresh(&mut cached).await.err(),
        };
        let now = SystemTime::now();
        let expires_at = match cached.validity {
            Some(Validity { expires_at, .. }) if expires_at <= now => {
                return Err(failure.unwrap_or(SecretError::AwsKeysExpired));
            }
            Some(Validity { expires_at, .. }) => expires_at,
            None => now + STATED_VALIDITY,
        };
        Ok((cached.keys.document(now, expires_at), failure))
    }

    /// Reads the source again if it may have other keys.
    async fn refresh(&self, cached: &mut CachedKeys) -> Result<(), SecretError> {
        let stale = cached.is_stale();
        if let (SecretSource::Vault(source), Some(reader)) = (&self.source.source, &self.reader) {
            return refresh_from_vault(cached, source, reader, stale).await;
        }
        let reread = match self.source.source {
            // The environment of this process does not change.
            SecretSource::Env(_) => false,
            SecretSource::File(_) => true,
            SecretSource::Exec(_) | SecretSource::Vault(_) => stale,
        };
        if reread {
            let value = fetch_value(&self.source, &mut VaultReader::default()).await?;
            let keys = AwsKeys::from_json(value.to_bytes().expose())?;
            *cached = CachedKeys::new(keys, None);
        }
        Ok(())
    }
}

async fn refresh_from_vault(
    cached: &mut CachedKeys,
    source: &VaultSource,
    reader: &LeaseReader,
    stale: bool,
) -> Result<(), SecretError> {
    match reader.read_current(source, stale).await? {
        CurrentSecret::Unchanged { expires_at: None } => {}
        CurrentSecret::Unchanged { expires_at: Some(expires_at) } => cached.extend(expires_at),
        CurrentSecret::Read { fields, expires_at } => {
            *cached = CachedKeys::new(parse_fields(source, &fields)?, expires_at);
        }
    }
    Ok(())
}

fn parse_fields(source: &VaultSource, fields: &Fields) -> Result<AwsKeys, SecretError> {
    let Some(name) = &source.field else { return Ok(AwsKeys::from_fields(fields)?) };
    let value = fields.iter().find(|(field, _)| field == name);
    let json = value.and_then(|(_, value)| value.as_deref()).map_or(&[][..], Vec::as_slice);
    Ok(AwsKeys::from_json(json)?)
}
