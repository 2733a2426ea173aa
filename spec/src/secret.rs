//! A credential as it is asked for: its name, its source and its delivery.

use std::path::PathBuf;
use std::str::FromStr;

use crate::delivery::{Delivery, ProxyScope};
use crate::endpoint::Endpoint;
use crate::vault::VaultSource;

/// Longest name, the same as the agent's.
const MAX_NAME: usize = 128;

/// Where a credential comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// An environment variable of this process: `env:VAR`.
    Env(String),
    /// A file's content, without one final newline: `file:PATH`.
    File(PathBuf),
    /// What a shell command prints, without one final newline: `exec:CMD`.
    Exec(String),
    /// A field of a secret of a vault, which the environment of this process names and logs in to: `vault://MOUNT/PATH#FIELD`.
    Vault(VaultSource),
}

/// A credential as asked for: `NAME=SOURCE`, or `NAME=SOURCE@HOST,…` for one that is to go to these hosts and never enter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretSpec {
    /// The name the workload knows it by.
    pub name: String,
    /// Where it comes from.
    pub source: SecretSource,
    /// How the workload gets it.
    pub delivery: Delivery,
}

/// A specification that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSecretError {
    /// There is no `=`.
    #[error("`{0:.80}` is not NAME=SOURCE")]
    NoSource(String),
    /// The name could not be an environment variable's.
    #[error(
        "the name `{0:.80}` is not an environment variable's: letters, digits and `_`, at most {MAX_NAME}"
    )]
    Name(String),
    /// The source is of no known kind.
    #[error("the source `{0}` is none of env:VAR, file:PATH, exec:CMD, vault://MOUNT/PATH#FIELD")]
    Source(String),
}

impl FromStr for SecretSpec {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let (name, source) =
            text.split_once('=').ok_or_else(|| ParseSecretError::NoSource(text.into()))?;
        check_name(name)?;
        let (source, delivery) = match split_hosts(source) {
            Some((source, hosts)) => {
                (source, Delivery::Proxy(ProxyScope { hosts, query: false, body: false }))
            }
            None => (source, Delivery::Memory),
        };
        Ok(SecretSpec { name: name.into(), source: source.parse()?, delivery })
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
            // The text is not repeated if it may be a value somebody pasted in.
            Some((kind, _)) => Err(ParseSecretError::Source(format!("{kind}:…"))),
            None => Err(ParseSecretError::Source("…".into())),
        }
    }
}

/// What stands behind the last `@`, if all of it is hosts: `HOST` or `HOST:PORT`, 443 if not said. One that has neither a dot nor
/// a port is none, so that `exec:ssh me@box cat key` is a command.
fn split_hosts(text: &str) -> Option<(&str, Vec<Endpoint>)> {
    let (source, hosts) = text.rsplit_once('@')?;
    let hosts = hosts.split(',').map(|host| match host.contains(':') {
        true => host.parse().ok(),
        false => host.contains('.').then(|| format!("{host}:443").parse().ok())?,
    });
    Some((source, hosts.collect::<Option<Vec<_>>>()?))
}

/// Whether a text can be the name of an environment variable, and so of a credential.
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
    fn specifications_parse_or_say_what_is_wrong() {
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
        assert_eq!(spec.delivery, Delivery::Proxy(ProxyScope { hosts, query: false, body: false }));
        assert_eq!(spec.source, SecretSource::Exec("ssh me@box cat key".into()));
        for own in [
            "A=exec:ssh me@box",
            "A=file:/a@b/c.d",
            "A=exec:mail x@y.z w",
            "A=env:A@",
            "A=env:A@1.2.3.4",
        ] {
            assert_eq!(own.parse::<SecretSpec>().unwrap().delivery, Delivery::Memory, "{own}");
        }
        let long = "A".repeat(65_536);
        for name in [&long, "A\0B", "Ä", "A B", "A\n"] {
            let error = format!("{name}=env:A").parse::<SecretSpec>().unwrap_err().to_string();
            assert!(
                error.contains("letters, digits and `_`, at most 128") && error.len() < 250,
                "{error:?}"
            );
        }
        assert!(long.parse::<SecretSpec>().unwrap_err().to_string().len() < 250);
        // Ports and names that are none make no host, and the whole a source that is not there.
        for hosts in [
            "api.example.com:0",
            "api.example.com:70000",
            "1.2.3.4:443",
            "a\0.test",
            &format!("{long}.test"),
        ] {
            assert_eq!(
                format!("A=env:K@{hosts}").parse::<SecretSpec>().unwrap().delivery,
                Delivery::Memory
            );
        }
        // What may be a pasted value is not echoed.
        let error = "A=sk-live-12345".parse::<SecretSpec>().unwrap_err().to_string();
        assert!(!error.contains("12345"), "{error}");
        let error = "A=sk:12345".parse::<SecretSpec>().unwrap_err().to_string();
        assert!(!error.contains("12345"), "{error}");
    }
}
