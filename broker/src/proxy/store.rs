//! The credentials of a sandbox that the proxy delivers: placeholders, values and their scope.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use chitin_spec::ProxyScope;

use super::error::{SetupError, ValueError};
use super::placeholder::{Placeholders, RANDOM_BYTES, format_placeholder};
use super::redaction::RedactionPatterns;
use crate::secret_value::SecretValue;

/// Minimum length of a value. A shorter one would match unrelated text, which would be scrubbed.
pub(super) const MIN_VALUE: usize = 8;

/// A credential whose value never enters the sandbox.
pub(super) struct Credential {
    pub name: String,
    pub hosts: Vec<chitin_protocol::Endpoint>,
    /// The placeholder is replaced in queries, too.
    pub query: bool,
    /// The placeholder is replaced in bodies, too.
    pub body: bool,
    pub placeholder: String,
    values: Mutex<Values>,
}

/// The values of a credential.
#[derive(Default)]
struct Values {
    /// `None` after the credential was revoked.
    current: Option<Arc<SecretValue>>,
    /// The value until the last rotation, which is scrubbed from responses as well.
    previous: Option<Arc<SecretValue>>,
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
}

impl CredentialStore {
    /// Makes a placeholder for each credential: name, scope, value.
    pub fn new(
        secrets: Vec<(String, ProxyScope, SecretValue)>,
        mut fill_random: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<CredentialStore, SetupError> {
        let (mut credentials, mut placeholders, mut patterns) =
            (Vec::new(), Placeholders::default(), RedactionPatterns::default());
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
            patterns.add_value(value.to_bytes().expose());
            let values = Mutex::new(Values { current: Some(Arc::new(value)), previous: None });
            let hosts = scope.hosts.iter().map(Into::into).collect();
            let ProxyScope { query, body, .. } = scope;
            credentials.push(Credential { name, hosts, query, body, placeholder, values });
        }
        Ok(CredentialStore { credentials, placeholders, patterns: RwLock::new(patterns) })
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
            let mut values = credential.values();
            if let Some(previous) = values.current.take() {
                values.previous = Some(previous);
            }
            values.current = value.clone();
        }
        *patterns = RedactionPatterns::default();
        for credential in &self.credentials {
            let values = credential.values();
            for value in [&values.current, &values.previous].into_iter().flatten() {
                patterns.add_value(value.to_bytes().expose());
            }
        }
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

/// Checks that a value can be sent in a header and recognized in a response.
fn check_value(value: &SecretValue) -> Result<(), ValueError> {
    let bytes = value.to_bytes();
    if bytes.expose().len() < MIN_VALUE {
        return Err(ValueError::TooShort);
    }
    if !bytes.expose().iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Err(ValueError::NotPrintable);
    }
    Ok(())
}
