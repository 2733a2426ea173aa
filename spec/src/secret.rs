//! The specification of a credential: its name, its source and its delivery.

use std::path::PathBuf;
use std::str::FromStr;

use crate::delivery::Delivery;
use crate::proxy_scope::ProxyScope;
use crate::secret_hosts::{ParseHostsError, split_hosts};
use crate::vault::VaultSource;

/// Longest name. The agent has the same limit.
const MAX_NAME: usize = 128;

/// The source of a credential's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// `env:VAR`: an environment variable of this process.
    Env(String),
    /// `file:PATH`: the content of a file, without one final newline.
    File(PathBuf),
    /// `exec:CMD`: the output of a shell command, without one final newline.
    Exec(String),
    /// `vault://MOUNT/PATH#FIELD`: a field of a Vault secret. The environment of this process has
    /// the address and the login.
    Vault(VaultSource),
}

/// The specification of a credential: `NAME=SOURCE`, or `NAME=SOURCE@HOST,…` for a credential that
/// the proxy sends to these hosts and that never enters the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretSpec {
    /// Name of the credential in the sandbox.
    pub name: String,
    /// Source of the value.
    pub source: SecretSource,
    /// Way in which the workload gets it.
    pub delivery: Delivery,
}

/// A text that is not a [`SecretSpec`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSecretError {
    /// There is no `=`. The text may be a pasted value: the error does not repeat it.
    #[error("there is no `=`: write NAME=SOURCE")]
    NoSource,
    /// The name is not a valid name of an environment variable.
    #[error(
        "`{0:.80}` cannot name an environment variable: \
         use letters, digits and `_`, at most {MAX_NAME}"
    )]
    Name(String),
    /// The source has an unknown scheme.
    #[error("unknown source `{0}`: use env:VAR, file:PATH, exec:CMD or vault://MOUNT/PATH#FIELD")]
    Source(String),
    /// The text after `@` is not a list of hosts.
    #[error(transparent)]
    Hosts(#[from] ParseHostsError),
}

impl FromStr for SecretSpec {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let (name, source) = text.split_once('=').ok_or(ParseSecretError::NoSource)?;
        check_name(name)?;
        // First of all the scheme: without one, the text may be a pasted value, which no error
        // repeats.
        check_scheme(source)?;
        let (source, hosts) = split_hosts(source)?;
        let delivery = match hosts {
            Some(hosts) => Delivery::Proxy(ProxyScope { hosts, ..ProxyScope::default() }),
            None => Delivery::Memory,
        };
        Ok(SecretSpec { name: name.into(), source: source.parse()?, delivery })
    }
}

fn check_scheme(source: &str) -> Result<(), ParseSecretError> {
    match source.split_once(':') {
        Some(("env" | "file" | "exec" | "vault", _)) => Ok(()),
        Some((kind, _)) => Err(ParseSecretError::Source(format!("{kind}:…"))),
        None => Err(ParseSecretError::Source("…".into())),
    }
}

impl SecretSource {
    /// Returns the scheme, without what follows it.
    pub fn scheme(&self) -> &'static str {
        match self {
            SecretSource::Env(_) => "env",
            SecretSource::File(_) => "file",
            SecretSource::Exec(_) => "exec",
            SecretSource::Vault(_) => "vault",
        }
    }
}

impl FromStr for SecretSource {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(SecretSource::Env(name.into())),
            Some(("file", path)) if !path.is_empty() => Ok(SecretSource::File(path.into())),
            Some(("exec", command)) if !command.is_empty() => {
                Ok(SecretSource::Exec(command.into()))
            }
            Some(("vault", _)) => text
                .parse()
                .map(SecretSource::Vault)
                .map_err(|_| ParseSecretError::Source("vault:…".into())),
            // The rest of the text may be a pasted value: the error does not repeat it.
            Some((kind, _)) => Err(ParseSecretError::Source(format!("{kind}:…"))),
            None => Err(ParseSecretError::Source("…".into())),
        }
    }
}

/// Checks that a text can name an environment variable, and therefore a credential.
///
/// # Errors
/// [`ParseSecretError::Name`].
pub fn check_name(name: &str) -> Result<(), ParseSecretError> {
    let mut bytes = name.bytes();
    let starts = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if starts && name.len() <= MAX_NAME && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        Ok(())
    } else {
        Err(ParseSecretError::Name(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_spec_parses_or_names_the_fault() {
        let spec: SecretSpec = "API_TOKEN=exec:pass show a=b".parse().unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.source),
            ("API_TOKEN", SecretSource::Exec("pass show a=b".into()))
        );
        for bad in [
            "TOKEN",
            "=env:A",
            "1A=env:A",
            "A-B=env:A",
            "A=env:",
            "A=file",
            "A=vault://x",
            "A=vault:x",
        ] {
            assert!(bad.parse::<SecretSpec>().is_err(), "{bad}");
        }
        let spec: SecretSpec =
            "A=exec:ssh me@box cat key@api.example.com,*.example.org:8443".parse().unwrap();
        let hosts =
            ["api.example.com:443", "*.example.org:8443"].map(|host| host.parse().unwrap()).into();
        assert_eq!(spec.delivery, Delivery::Proxy(ProxyScope { hosts, ..ProxyScope::default() }));
        assert_eq!(spec.source, SecretSource::Exec("ssh me@box cat key".into()));
        let long = "A".repeat(65_536);
        for name in [&long, "A\0B", "Ä", "A B", "A\n"] {
            let error = format!("{name}=env:A").parse::<SecretSpec>().unwrap_err().to_string();
            assert!(
                error.contains("letters, digits and `_`, at most 128") && error.len() < 250,
                "{error:?}"
            );
        }
        assert!(long.parse::<SecretSpec>().unwrap_err().to_string().len() < 250);
        for weaker in ["A=env:A@", "A=env:A@1.2.3.4", "A=exec:echo v@bad"] {
            let error = weaker.parse::<SecretSpec>().unwrap_err();
            assert!(matches!(error, ParseSecretError::Hosts(_)), "{weaker}: {error}");
        }
        // A text that may be a pasted value is not repeated.
        let error = "A=sk-live-12345".parse::<SecretSpec>().unwrap_err().to_string();
        assert!(!error.contains("12345"), "{error}");
        let error = "A=pa@ss@12345".parse::<SecretSpec>().unwrap_err().to_string();
        assert!(!error.contains("12345"), "{error}");
        let error = "A=sk:12345".parse::<SecretSpec>().unwrap_err().to_string();
        assert!(!error.contains("12345"), "{error}");
    }
}
