use std::io;

use chitin_spec::ParseSecretError;

use crate::aws::AwsKeysError;
use crate::proxy::SetupError;
use crate::secret_value::SecretValueError;
use crate::source::SourceError;
use crate::vault::VaultError;

/// An error of credentials. No message holds a value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A credential cannot be fetched or delivered.
    #[error("secret {name}")]
    Secret {
        /// The name of the credential, or the location of several.
        name: String,
        /// The cause.
        source: SecretError,
    },
    /// A credential cannot be delivered through the proxy.
    #[error(transparent)]
    Proxy(#[from] SetupError),
    /// The caller stopped waiting for the credentials.
    #[error("the sandbox has been stopped")]
    Stopped,
}

/// The reason why a single credential cannot be fetched or delivered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// Its name is invalid.
    #[error(transparent)]
    Name(#[from] ParseSecretError),
    /// Its source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its vault failed.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// Its value is invalid.
    #[error(transparent)]
    Value(#[from] SecretValueError),
    /// The value of one field is invalid.
    #[error("field `{field}`")]
    Field {
        /// The name of the field.
        field: String,
        /// The cause.
        source: SecretValueError,
    },
    /// Its value is not a pair of AWS keys.
    #[error(transparent)]
    AwsKeys(#[from] AwsKeysError),
    /// The keys have expired, and the source has no others.
    #[error("the keys have expired")]
    AwsKeysExpired,
    /// Another credential is delivered by the AWS endpoint.
    #[error("another credential is delivered by the endpoint: it serves only one")]
    SecondEndpoint,
    /// The kernel gave no random bytes.
    #[error("get random bytes")]
    Random(#[source] io::Error),
    /// The task that reads the source ended early.
    #[error("reading the source was interrupted")]
    Interrupted,
}

impl SecretError {
    /// Adds the name of the credential.
    pub(crate) fn named(self, name: impl Into<String>) -> Error {
        Error::Secret { name: name.into(), source: self }
    }
}
