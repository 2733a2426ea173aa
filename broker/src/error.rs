use crate::proxy::SetupError;

/// What can go wrong with credentials. No message holds a value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A secret could not be had.
    #[error("secret {name}: {reason}")]
    Secret {
        /// Its name.
        name: String,
        /// What failed on which source; never the value.
        reason: String,
    },
    /// A secret cannot be kept out of the sandbox as was asked.
    #[error(transparent)]
    Proxy(#[from] SetupError),
    /// Whoever asked for credentials is gone.
    #[error("the sandbox has been stopped")]
    Stopped,
}
