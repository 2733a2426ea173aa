//! A secret of a vault, and how to log in to that vault.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::string_type;

/// A place in a vault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultSource {
    /// The mount of the secrets engine.
    pub mount: String,
    /// The path in it.
    pub path: String,
    /// The field, if one is meant.
    pub field: Option<String>,
}

impl FromStr for VaultSource {
    type Err = String;

    fn from_str(text: &str) -> Result<VaultSource, String> {
        // What may be a pasted value is not repeated.
        let wrong =
            || "a credential source is vault://MOUNT/PATH or vault://MOUNT/PATH#FIELD".to_owned();
        let rest = text.strip_prefix("vault://").ok_or_else(wrong)?;
        let (rest, field) =
            rest.split_once('#').map_or((rest, None), |(rest, field)| (rest, Some(field)));
        let (mount, path) = rest.split_once('/').ok_or_else(wrong)?;
        // What a URL would take for something else is in no name.
        let plain =
            |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'?' | b'#' | b'\\');
        let name = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(plain);
        if !name(mount) || !path.split('/').all(name) || field == Some("") {
            return Err(wrong());
        }
        Ok(VaultSource { mount: mount.into(), path: path.into(), field: field.map(str::to_owned) })
    }
}

impl VaultSource {
    /// Where it is, without the field.
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

/// What a vault is and how to log in to it.
#[derive(Clone)]
pub struct VaultConfig {
    /// `http://…` or `https://…`.
    pub address: String,
    /// Who we are to it.
    pub login: VaultLogin,
    /// The namespace everything is in, if it has any.
    pub namespace: Option<String>,
    /// A file of PEM certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
}

/// Who we are to a vault.
#[derive(Clone)]
pub enum VaultLogin {
    /// A token that somebody else has got. It is neither renewed nor revoked.
    Token(Zeroizing<String>),
    /// A role. The token that it gets is renewed, and revoked at the end.
    AppRole {
        /// Where the auth method is mounted, usually `approle`.
        mount: String,
        /// Which role.
        role_id: Zeroizing<String>,
        /// What proves it.
        secret_id: SecretId,
    },
}

/// What proves that we may take a role.
#[derive(Clone)]
pub enum SecretId {
    /// The secret id itself.
    Plain(Zeroizing<String>),
    /// A token that wraps it, good for one login.
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
