//! The Vault server and the login that the environment names.

use std::path::PathBuf;

use chitin_spec::{SecretId, VaultConfig, VaultLogin};
use zeroize::Zeroizing;

use super::VaultError;

/// Reads `VAULT_ADDR`, `VAULT_NAMESPACE` and `VAULT_CACERT`; and `VAULT_TOKEN`, or `VAULT_ROLE_ID`
/// with `VAULT_SECRET_ID` or `VAULT_WRAPPED_SECRET_ID`, and `VAULT_APPROLE_MOUNT` if it is not
/// `approle`.
pub(crate) fn config_from_env() -> Result<VaultConfig, VaultError> {
    config_from(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

pub(super) fn config_from(
    variable: impl Fn(&str) -> Option<String>,
) -> Result<VaultConfig, VaultError> {
    let address = variable("VAULT_ADDR").ok_or(VaultError::MissingAddress)?;
    let skip = variable("VAULT_SKIP_VERIFY").unwrap_or_default().to_ascii_lowercase();
    if !matches!(skip.as_str(), "" | "0" | "f" | "false") {
        return Err(VaultError::SkipVerify);
    }
    let secret = |name| variable(name).map(Zeroizing::new);
    let login = if let Some(token) = secret("VAULT_TOKEN") {
        VaultLogin::Token(token)
    } else {
        let secret_id = secret("VAULT_SECRET_ID")
            .map(SecretId::Plain)
            .or_else(|| secret("VAULT_WRAPPED_SECRET_ID").map(SecretId::Wrapped));
        let (Some(role_id), Some(secret_id)) = (secret("VAULT_ROLE_ID"), secret_id) else {
            return Err(VaultError::MissingLogin);
        };
        let mount = variable("VAULT_APPROLE_MOUNT").unwrap_or_else(|| "approle".into());
        VaultLogin::AppRole { mount, role_id, secret_id }
    };
    let (namespace, ca) =
        (variable("VAULT_NAMESPACE"), variable("VAULT_CACERT").map(PathBuf::from));
    Ok(VaultConfig { address, login, namespace, ca })
}
