//! The sources of a credential: an environment variable, a file, a command or a vault.

use std::ffi::OsString;
use std::io;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use chitin_protocol::MAX_SECRET;
use chitin_spec::{SecretSource, SecretSpec, check_name};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use zeroize::Zeroizing;

use crate::error::SecretError;
use crate::secret_value::SecretValue;
use crate::vault::VaultReader;

/// The time limit of a command that prints a secret. It may ask for a password at a terminal.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// The reason why an environment variable, a file or a command gives no value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The environment variable is not set.
    #[error("the environment variable {variable} is not set")]
    UnsetVariable {
        /// Its name.
        variable: String,
    },
    /// The file cannot be read.
    #[error("read {}", path.display())]
    ReadFile {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The command cannot be run, or its output cannot be read.
    #[error("run `{command}`")]
    RunCommand {
        /// The command line.
        command: String,
        /// The cause.
        source: io::Error,
    },
    /// The command reports a failure.
    #[error("`{command}` failed: {status}")]
    CommandFailed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: ExitStatus,
    },
    /// The command does not end.
    #[error("`{command}` has not ended within {} s", COMMAND_LIMIT.as_secs())]
    CommandTimeout {
        /// The command line.
        command: String,
    },
}

/// Fetches the value of a credential.
pub(crate) async fn fetch_value(
    secret: &SecretSpec,
    vault: &mut VaultReader<'_>,
) -> Result<SecretValue, SecretError> {
    check_name(&secret.name)?;
    // A file and the output of a command usually end with a newline that is not part of the value.
    let (bytes, strip_newline) = match &secret.source {
        SecretSource::Env(variable) => (read_variable(variable)?, false),
        SecretSource::File(path) => (read_file(path)?, true),
        SecretSource::Exec(command) => (run_command(command).await?, true),
        SecretSource::Vault(source) => (vault.read_field(source).await?, false),
    };
    Ok(SecretValue::new(bytes, strip_newline)?)
}

fn read_variable(variable: &str) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    match std::env::var_os(variable) {
        Some(value) => Ok(Zeroizing::new(OsString::into_encoded_bytes(value))),
        None => Err(SourceError::UnsetVariable { variable: variable.into() }),
    }
}

fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let failed = |source| SourceError::ReadFile { path: path.into(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = value_buffer();
    file.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

async fn run_command(command: &str) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let failed = |source| SourceError::RunCommand { command: command.into(), source };
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (bytes, status) = tokio::time::timeout(COMMAND_LIMIT, read_output(child))
        .await
        .map_err(|_| SourceError::CommandTimeout { command: command.into() })?
        .map_err(failed)?;
    match status {
        Some(status) if !status.success() => {
            Err(SourceError::CommandFailed { command: command.into(), status })
        }
        _ => Ok(bytes),
    }
}

/// Reads the output of a command. Returns no status for a command whose output is too long: it may
/// never end by itself, and is killed.
async fn read_output(mut child: Child) -> io::Result<(Zeroizing<Vec<u8>>, Option<ExitStatus>)> {
    let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut bytes = value_buffer();
    stdout.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes).await?;
    let status = match bytes.len() > MAX_SECRET {
        true => None,
        false => Some(child.wait().await?),
    };
    Ok((bytes, status))
}

/// Returns a buffer with full capacity, because a vector that grows leaves copies behind. One more
/// byte than the limit shows that a value is too long.
fn value_buffer() -> Zeroizing<Vec<u8>> {
    Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret_value::SecretValueError;

    async fn fetch(source: &str) -> Result<Vec<u8>, SecretError> {
        let spec: SecretSpec = format!("TOKEN={source}").parse().unwrap();
        let value = fetch_value(&spec, &mut VaultReader::default()).await?;
        Ok(value.to_bytes().expose().to_vec())
    }

    #[tokio::test]
    async fn files_and_commands_lose_one_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret\n\n").unwrap();
        assert_eq!(fetch(&format!("file:{}", path.display())).await.unwrap(), b"s3cret\n");
        assert_eq!(fetch("exec:echo s3cret").await.unwrap(), b"s3cret");
    }

    async fn fetch_error(source: &str) -> SecretError {
        let fetched = tokio::time::timeout(Duration::from_secs(5), fetch(source)).await;
        fetched.expect("does not hang").expect_err(source)
    }

    #[tokio::test]
    async fn failed_source_is_named() {
        use SecretError::Source;
        use SourceError::*;
        let error = fetch_error("env:CHITIN_NO_SUCH").await;
        assert!(
            matches!(&error, Source(UnsetVariable { variable }) if variable == "CHITIN_NO_SUCH"),
            "{error:?}"
        );
        let error = fetch_error("file:/nonexistent/x").await;
        assert!(
            matches!(&error, Source(ReadFile { path, source })
                if path == Path::new("/nonexistent/x")
                    && source.kind() == io::ErrorKind::NotFound),
            "{error:?}"
        );
        let error = fetch_error("exec:exit 3").await;
        assert!(
            matches!(&error, Source(CommandFailed { command, status })
                if command == "exit 3" && status.code() == Some(3)),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn empty_and_endless_values_are_refused() {
        use SecretError::Value;
        for empty in ["file:/dev/null", "exec:true"] {
            let error = fetch_error(empty).await;
            assert!(matches!(error, Value(SecretValueError::Empty)), "{empty}: {error:?}");
        }
        let endless = "exec:head -c 100000 /dev/zero; exec sleep 100";
        for endless in ["file:/dev/zero", endless] {
            let error = fetch_error(endless).await;
            assert!(matches!(error, Value(SecretValueError::TooLong)), "{endless}: {error:?}");
        }
    }
}
