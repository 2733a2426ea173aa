//! The credentials of a sandbox that the proxy delivers: placeholders, values and their scope.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use chitin_spec::ProxyScope;
use zeroize::Zeroizing;

use super::error::{SetupError, ValueError};
use super::placeholder::{Placeholders, RANDOM_BYTES, format_placeholder};
use super::redaction::RedactionPatterns;
use crate::secret_value::SecretValue;
use crate::token_bucket::TokenBucket;

/// Minimum length of a value. A shorter one would match unrelated text, which would be scrubbed.
pub(super) const MIN_VALUE: usize = 8;

/// Maximum length of a value: what servers accept in one header. Three times as much of each
/// response is held back while it is scrubbed.
pub(super) const MAX_VALUE: usize = 8 * 1024;

/// Earlier values of a credential that are scrubbed from responses. A lease that is replaced every
/// hour has as many in 64 hours; then the oldest is forgotten.
pub(super) const MAX_EARLIER_VALUES: usize = 64;

/// Messages with a scrubbed value, a minute, after which requests are refused. Each of them tells
/// the workload that something it sent contains a value, or that the endpoint discloses one.
pub(super) const MAX_HITS: u32 = 60;

/// A credential whose value never enters the sandbox.
pub(super) struct Credential {
    pub name: String,
    pub hosts: Vec<chitin_protocol::Endpoint>,
    /// The requests in which the placeholder is replaced.
    pub scope: ProxyScope,
    pub placeholder: String,
    values: Mutex<Values>,
}

/// The values of a credential.
#[derive(Default)]
struct Values {
    /// `None` after the credential was revoked.
    current: Option<Arc<SecretValue>>,
    /// The values until each rotation, oldest first, which are scrubbed from responses as well.
    earlier: VecDeque<Zeroizing<Vec<u8>>>,
}

impl Values {
    /// Replaces the value, and remembers the one before.
    fn replace(&mut self, value: Option<Arc<SecretValue>>) {
        if let Some(before) = std::mem::replace(&mut self.current, value) {
            let before = copy_value(&before);
            // Vaults may return to an earlier value.
            self.earlier.retain(|earlier| *earlier != before);
            self.earlier.push_back(before);
            if self.earlier.len() > MAX_EARLIER_VALUES {
                self.earlier.pop_front();
            }
        }
    }
}

fn copy_value(value: &SecretValue) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(value.to_bytes().expose().to_vec())
}

impl Credential {
    fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the value, unless the credential was revoked.
    pub fn value(&self) -> Option<Arc<SecretValue>> {
        self.values().current.clone()
    }

    /// Returns true if the placeholder is replaced on connections to this host and port.
    pub fn covers(&self, host: &str, port: u16) -> bool {
        self.hosts.iter().any(|endpoint| endpoint.port == port && endpoint.matches_host(host))
    }
}

/// All credentials of a sandbox that the proxy delivers.
pub(super) struct CredentialStore {
    pub credentials: Vec<Credential>,
    pub placeholders: Placeholders,
    patterns: RwLock<RedactionPatterns>,
    hits: Mutex<TokenBucket>,
}

impl CredentialStore {
    /// Makes a placeholder for each credential: name, scope, value.
    pub fn new(
        secrets: Vec<(String, ProxyScope, SecretValue)>,
        mut fill_random: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<CredentialStore, SetupError> {
        let (mut credentials, mut placeholders) = (Vec::new(), Placeholders::default());
        for (name, scope, value) in secrets {
            if let Err(error) = check_value(&value) {
                return Err(SetupError::Value { name, error });
            }
            let mut random = [0; RANDOM_BYTES];
            if let Err(error) = fill_random(&mut random) {
                return Err(SetupError::Random { name, error });
            }
            let placeholder = format_placeholder(random);
            placeholders.insert(placeholder.clone(), credentials.len());
            let values = Values { current: Some(Arc::new(value)), earlier: VecDeque::new() };
            let (values, hosts) =
                (Mutex::new(values), scope.hosts.iter().map(Into::into).collect());
            credentials.push(Credential { name, hosts, scope, placeholder, values });
        }
        let patterns = RwLock::new(make_patterns(&credentials));
        Ok(CredentialStore { credentials, placeholders, patterns, hits: full_hit_bucket() })
    }

    /// Returns the patterns that responses are scrubbed of.
    pub fn patterns(&self) -> RwLockReadGuard<'_, RedactionPatterns> {
        self.patterns.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the value of a credential.
    pub fn replace_value(&self, name: &str, value: SecretValue) -> Result<(), ValueError> {
        check_value(&value)?;
        self.set_value(name, Some(Arc::new(value)));
        Ok(())
    }

    /// Removes the value of a credential: its placeholder blocks every later request.
    pub fn revoke(&self, name: &str) {
        self.set_value(name, None);
    }

    fn set_value(&self, name: &str, value: Option<Arc<SecretValue>>) {
        // The lock is held throughout: a new value is scrubbed from responses before it is sent.
        let mut patterns = self.patterns.write().unwrap_or_else(PoisonError::into_inner);
        for credential in self.credentials.iter().filter(|credential| credential.name == name) {
            credential.values().replace(value.clone());
        }
        *patterns = make_patterns(&self.credentials);
    }

    /// Counts a message in which a value was scrubbed.
    pub fn record_hit(&self) {
        self.hits.lock().unwrap_or_else(PoisonError::into_inner).try_take();
    }

    /// Returns true if so many messages contained a value that requests are refused for a while.
    pub fn hit_limit_reached(&self) -> bool {
        self.hits.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Forgets the hits of a self-test.
    pub fn reset_hits(&self) {
        let full = full_hit_bucket().into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.hits.lock().unwrap_or_else(PoisonError::into_inner) = full;
    }

    /// Returns true if any credential is for this host and port.
    pub fn covers(&self, host: &str, port: u16) -> bool {
        self.credentials.iter().any(|credential| credential.covers(host, port))
    }

    /// Makes responses pass unscrubbed, for the test of the self-test.
    #[cfg(test)]
    pub fn clear_patterns(&mut self) {
        self.patterns = RedactionPatterns::default().into();
    }
}

/// Returns the patterns of all values, the earlier ones included.
fn make_patterns(credentials: &[Credential]) -> RedactionPatterns {
    let mut all = Vec::new();
    for credential in credentials {
        let values = credential.values();
        all.extend(values.current.as_deref().map(copy_value));
        all.extend(values.earlier.iter().cloned());
    }
    RedactionPatterns::new(&all)
}

fn full_hit_bucket() -> Mutex<TokenBucket> {
    let capacity = f64::from(MAX_HITS);
    Mutex::new(TokenBucket::new(capacity / 60.0, capacity))
}

/// Checks that a value can be sent in a header and recognized in a response.
fn check_value(value: &SecretValue) -> Result<(), ValueError> {
    let bytes = value.to_bytes();
    if bytes.expose().len() < MIN_VALUE {
        return Err(ValueError::TooShort);
    }
    if bytes.expose().len() > MAX_VALUE {
        return Err(ValueError::TooLong);
    }
    if !bytes.expose().iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Err(ValueError::NotPrintable);
    }
    Ok(())
}
