//! Where a credential's value comes from: the environment, a file, a command, a vault.

use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use chitin_protocol::MAX_SECRET;
use chitin_spec::{SecretSource, SecretSpec, check_name};
use tokio::io::AsyncReadExt;
use zeroize::Zeroizing;

use crate::Error;
use crate::secret_value::SecretValue;
use crate::vault::VaultReader;

/// How long a command that prints a secret may take: one that asks for a password at a terminal gets that long.
const EXEC_LIMIT: Duration = Duration::from_secs(60);

/// Fetches the value. Messages name the source and never the value.
pub(crate) async fn fetch_value(
    secret: &SecretSpec,
    vault: &mut VaultReader<'_>,
) -> Result<SecretValue, Error> {
    let failed = |reason: String| Error::Secret { name: secret.name.clone(), reason };
    check_name(&secret.name).map_err(|error| failed(error.to_string()))?;
    match &secret.source {
        SecretSource::Env(variable) => {
            let value = std::env::var_os(variable)
                .ok_or_else(|| failed(format!("the environment variable {variable} is not set")))?;
            SecretValue::new(Zeroizing::new(OsString::into_encoded_bytes(value)), false)
        }
        SecretSource::File(path) => read_file(path).and_then(|bytes| SecretValue::new(bytes, true)),
        SecretSource::Exec(command) => {
            run(command).await.and_then(|bytes| SecretValue::new(bytes, true))
        }
        SecretSource::Vault(source) => {
            vault.field(source).await.and_then(|bytes| SecretValue::new(bytes, false))
        }
    }
    .map_err(failed)
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn fetch(source: &str) -> Result<Vec<u8>, String> {
        let spec: SecretSpec = format!("TOKEN={source}").parse().unwrap();
        fetch_value(&spec, &mut VaultReader::default())
            .await
            .map(|value| value.to_bytes().expose().to_vec())
            .map_err(|error| error.to_string())
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
