//! Credentials on the host: where they come from, and how they are held until they are handed over.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use chitin_protocol::{MAX_SECRET, SecretBytes};
use memmap2::MmapMut;
use tokio::io::AsyncReadExt;
use zeroize::{Zeroize, Zeroizing};

use crate::Error;
use crate::credential::{Delivery, Reach, Vault};
use crate::policy::{Endpoint, VaultSource};

/// How long a command that prints a secret may take: one that asks for a password at a terminal gets that long.
const EXEC_LIMIT: Duration = Duration::from_secs(60);

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
                (source, Delivery::Proxy(Reach { hosts, query: false, body: false }))
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

pub(crate) fn check_name(name: &str) -> Result<(), ParseSecretError> {
    let mut bytes = name.bytes();
    let starts = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if starts && name.len() <= MAX_NAME && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        Ok(())
    } else {
        Err(ParseSecretError::Name(name.into()))
    }
}

impl SecretSpec {
    /// Fetches the value. Messages name the source and never the value.
    pub(crate) async fn fetch(&self, vault: &mut Vault<'_>) -> Result<SecretValue, Error> {
        let failed = |reason: String| Error::Secret { name: self.name.clone(), reason };
        check_name(&self.name).map_err(|error| failed(error.to_string()))?;
        match &self.source {
            SecretSource::Env(variable) => {
                let value = std::env::var_os(variable).ok_or_else(|| {
                    failed(format!("the environment variable {variable} is not set"))
                })?;
                SecretValue::hold(Zeroizing::new(OsString::into_encoded_bytes(value)), false)
            }
            SecretSource::File(path) => {
                read_file(path).and_then(|bytes| SecretValue::hold(bytes, true))
            }
            SecretSource::Exec(command) => {
                run(command).await.and_then(|bytes| SecretValue::hold(bytes, true))
            }
            SecretSource::Vault(source) => {
                vault.field(source).await.and_then(|bytes| SecretValue::hold(bytes, false))
            }
        }
        .map_err(failed)
    }
}

fn read_file(path: &PathBuf) -> Result<Zeroizing<Vec<u8>>, String> {
    let failed = |error: std::io::Error| format!("read {}: {error}", path.display());
    let file = std::fs::File::open(path).map_err(failed)?;
    // Full capacity from the start: a vector that grows leaves copies behind. One byte more shows that it is too long.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    file.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

async fn run(command: &str) -> Result<Zeroizing<Vec<u8>>, String> {
    let failed = |error: std::io::Error| format!("run `{command}`: {error}");
    let mut child = tokio::process::Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let Some(stdout) = child.stdout.take() else {
        return Err(format!("run `{command}`: no output"));
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    let reading = async {
        stdout.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes).await?;
        // One that has said too much may never end by itself.
        if bytes.len() > MAX_SECRET { Ok(None) } else { child.wait().await.map(Some) }
    };
    let status = tokio::time::timeout(EXEC_LIMIT, reading)
        .await
        .map_err(|_| format!("`{command}` has not ended within {} s", EXEC_LIMIT.as_secs()))?
        .map_err(failed)?;
    match status {
        Some(status) if !status.success() => Err(format!("`{command}` failed: {status}")),
        _ => Ok(bytes),
    }
}

/// A credential's value in memory of its own: locked against swapping, left out of core dumps by the kernel's rules
/// for locked pages where those apply, wiped when dropped.
pub(crate) struct SecretValue {
    pages: MmapMut,
    len: usize,
}

impl SecretValue {
    pub(crate) fn hold(
        bytes: Zeroizing<Vec<u8>>,
        strip_newline: bool,
    ) -> Result<SecretValue, String> {
        let value = match bytes.as_slice() {
            [rest @ .., b'\n'] if strip_newline => rest,
            all => all,
        };
        if value.is_empty() {
            return Err("the value is empty".into());
        }
        if value.len() > MAX_SECRET {
            return Err(format!("the value is over the limit of {} KiB", MAX_SECRET / 1024));
        }
        let mut pages =
            MmapMut::map_anon(value.len()).map_err(|error| format!("allocate memory: {error}"))?;
        pages.lock().map_err(|error| {
            format!("lock memory against swapping: {error}; raise the limit (`ulimit -l`)")
        })?;
        pages[..value.len()].copy_from_slice(value);
        Ok(SecretValue { len: value.len(), pages })
    }

    /// A copy to be sent. It is wiped as well.
    pub fn to_bytes(&self) -> SecretBytes {
        SecretBytes::new(self.pages[..self.len].to_vec())
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        self.pages.zeroize();
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretValue({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn fetch(source: &str) -> Result<Vec<u8>, String> {
        let spec: SecretSpec = format!("TOKEN={source}").parse().unwrap();
        spec.fetch(&mut Vault::default())
            .await
            .map(|value| value.to_bytes().expose().to_vec())
            .map_err(|error| error.to_string())
    }

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
        assert_eq!(spec.delivery, Delivery::Proxy(Reach { hosts, query: false, body: false }));
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

    #[tokio::test]
    async fn files_and_commands_lose_one_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret\n\n").unwrap();
        assert_eq!(fetch(&format!("file:{}", path.display())).await.unwrap(), b"s3cret\n");
        assert_eq!(fetch("exec:echo s3cret").await.unwrap(), b"s3cret");
    }

    #[tokio::test]
    async fn a_source_that_fails_is_named() {
        let cases = [
            (
                "env:CHITIN_NO_SUCH",
                "secret TOKEN: the environment variable CHITIN_NO_SUCH is not set",
            ),
            (
                "file:/nonexistent/x",
                "secret TOKEN: read /nonexistent/x: No such file or directory (os error 2)",
            ),
            ("file:/dev/null", "secret TOKEN: the value is empty"),
            ("file:/dev/zero", "secret TOKEN: the value is over the limit of 64 KiB"),
            ("exec:exit 3", "secret TOKEN: `exit 3` failed: exit status: 3"),
            ("exec:true", "secret TOKEN: the value is empty"),
            (
                "exec:head -c 100000 /dev/zero; exec sleep 100",
                "secret TOKEN: the value is over the limit of 64 KiB",
            ),
        ];
        for (source, message) in cases {
            let fetched = tokio::time::timeout(Duration::from_secs(5), fetch(source)).await;
            assert_eq!(fetched.expect("does not hang"), Err(message.to_owned()));
        }
    }
}
