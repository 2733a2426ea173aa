//! A secret in a Vault server, and the login to that server.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::string_type;

/// The location of a secret in Vault: `vault://MOUNT/PATH`, or `vault://MOUNT/PATH#FIELD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultSource {
    /// Mount path of the secrets engine.
    pub mount: String,
    /// Path of the secret below the mount.
    pub path: String,
    /// A single field of the secret. `None` means every field, or the only one.
    pub field: Option<String>,
}

/// A text that is not a [`VaultSource`]. It may be a pasted value, so the error does not repeat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a Vault secret: write vault://MOUNT/PATH or vault://MOUNT/PATH#FIELD")]
pub struct ParseVaultSourceError;

impl FromStr for VaultSource {
    type Err = ParseVaultSourceError;

    fn from_str(text: &str) -> Result<VaultSource, ParseVaultSourceError> {
        let rest = text.strip_prefix("vault://").ok_or(ParseVaultSourceError)?;
        let (rest, field) =
            rest.split_once('#').map_or((rest, None), |(rest, field)| (rest, Some(field)));
        let (mount, path) = rest.split_once('/').ok_or(ParseVaultSourceError)?;
        if !is_path_segment(mount) || !path.split('/').all(is_path_segment) || field == Some("") {
            return Err(ParseVaultSourceError);
        }
        Ok(VaultSource { mount: mount.into(), path: path.into(), field: field.map(str::to_owned) })
    }
}

/// Returns true if a URL can hold the segment as it is, and does not read it as anything else.
fn is_path_segment(segment: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'?' | b'#' | b'\\');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(plain)
}

impl VaultSource {
    /// Returns `vault://MOUNT/PATH`, without the field.
    pub fn location(&self) -> String {
        format!("vault://{}/{}", self.mount, self.path)
    }
}

impl fmt::Display for VaultSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.location())?;
        self.field.as_ref().map_or(Ok(()), |field| write!(f, "#{field}"))
    }
}

string_type!(VaultSource, "VaultSource", r"^vault://[^/#]+/[^#]+(#.+)?$");

/// The address of a Vault server and the login to it.
#[derive(Clone)]
pub struct VaultConfig {
    /// Base URL, `http://…` or `https://…`.
    pub address: String,
    /// Credentials for the login.
    pub login: VaultLogin,
    /// Vault namespace of every request.
    pub namespace: Option<String>,
    /// PEM file of CA certificates that replace the system's trust store.
    pub ca: Option<PathBuf>,
}

/// The credentials of a login.
#[derive(Clone)]
pub enum VaultLogin {
    /// A token that the caller obtained. Chitin neither renews nor revokes it.
    Token(Zeroizing<String>),
    /// An AppRole login. Its token is renewed, and revoked at the end.
    AppRole {
        /// Mount path of the auth method, usually `approle`.
        mount: String,
        /// Role id.
        role_id: Zeroizing<String>,
        /// Secret id.
        secret_id: SecretId,
    },
}

/// The secret id of an AppRole login.
#[derive(Clone)]
pub enum SecretId {
    /// The secret id itself.
    Plain(Zeroizing<String>),
    /// A response-wrapping token that holds the secret id, valid for one login.
    Wrapped(Zeroizing<String>),
}

impl fmt::Debug for VaultConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let login = match &self.login {
            VaultLogin::Token(_) => "token",
            VaultLogin::AppRole { .. } => "AppRole",
        };
        f.debug_struct("VaultConfig")
            .field("address", &self.address)
            .field("login", &login)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}
