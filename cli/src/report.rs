//! The JSON record of one run.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin::{
    EndCause, Exit, Jail, Phases, Policy, RejectedTier, SelectedTier, Usage, printable_json,
};
use serde::Serialize;

use crate::error::CliError;
use crate::run::CopyRecord;

/// The content of `--report`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The version of Chitin.
    pub chitin: &'static str,
    /// The tier of the sandbox, or the one that was asked for if none was started.
    pub tier: String,
    /// The implementation of the tier and the reason for its choice; none if none was started.
    pub isolation: Option<Isolation>,
    /// The policy that was enforced.
    pub policy: Option<PolicyRecord>,
    /// Program and arguments, lossy where they are not UTF-8.
    pub command: Vec<String>,
    /// The cause of the end, as `exit`, `signal`, `out_of_memory` or `time_limit`.
    pub cause: EndCause,
    /// The exit code of `chitin run`.
    pub exit_code: u8,
    /// The end of the workload, if it ended.
    pub exit: Option<Exit>,
    /// The resources that it used, and the limits that were reached meanwhile.
    pub usage: Option<Usage>,
    /// The error of Chitin, if it failed.
    pub error: Option<String>,
    /// The jail of the monitor; none on a tier without a monitor.
    pub jail: Option<JailReport>,
    /// The sandbox shared no page with another (`--private-memory`).
    pub private_memory: bool,
    /// The copies that were tried, and what was left out of them.
    pub copies: Vec<CopyRecord>,
    /// The phases of the run, in nanoseconds since the start of the monitor.
    pub phases: Phases,
}

/// The jail of the monitor.
#[derive(Debug, Serialize)]
pub struct JailReport {
    /// False with `--no-jail`.
    pub on: bool,
    /// The jail as the monitor reports it when it enters the guest; none before, and without a
    /// jail.
    #[serde(flatten)]
    pub closed: Option<Jail>,
}

/// The policy of a run.
#[derive(Debug, Serialize)]
pub struct PolicyRecord {
    /// The file.
    pub file: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub digest: String,
    /// Its profile.
    pub profile: &'static str,
    /// The plugin that it is for.
    pub plugin: Option<String>,
}

impl PolicyRecord {
    /// Identifies a policy.
    pub fn new(policy: &Policy) -> PolicyRecord {
        PolicyRecord {
            file: policy.origin.clone(),
            digest: policy.digest.clone(),
            profile: policy.profile.name(),
            plugin: policy.plugin.clone(),
        }
    }
}

/// The implementation of a tier on this host, and the reason for its choice.
#[derive(Debug, Serialize)]
pub struct Isolation {
    /// The program that implements it.
    pub implementation: String,
    /// The version of the program.
    pub version: String,
    /// The reason for this choice, as one sentence.
    pub why: String,
    /// Preferred implementations, and the reason against each.
    pub short_of: Vec<String>,
    /// Tiers that were asked for first, and the reason against each.
    pub passed_over: Vec<RejectedTier>,
}

impl Isolation {
    /// Describes the tier of a sandbox.
    pub fn new(selected: &SelectedTier) -> Isolation {
        Isolation {
            implementation: selected.capabilities.implementation.clone(),
            version: selected.capabilities.version.clone(),
            why: selected.explain(),
            short_of: selected.capabilities.short_of.clone(),
            passed_over: selected.passed_over.clone(),
        }
    }
}

/// Writes a value as indented JSON.
///
/// A regular file is replaced by rename, so that an earlier report stays whole until the new one
/// is.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CliError> {
    let failed = || CliError::io(format!("write {}", path.display()));
    let json = serde_json::to_string_pretty(value).map_err(|error| failed()(error.into()))?;
    // The output of guests and the messages of daemons are part of it.
    let json = printable_json(&json) + "\n";
    // A device or a pipe, such as /dev/stdout, cannot be replaced.
    if path.exists() && !path.is_file() {
        return std::fs::write(path, json).map_err(failed());
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    // A random name that is created, never opened: no link under it is followed.
    let mut temporary = tempfile::Builder::new()
        .prefix(".chitin-report-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(dir.unwrap_or(Path::new(".")))
        .map_err(failed())?;
    temporary.write_all(json.as_bytes()).map_err(failed())?;
    temporary.persist(path).map_err(|error| failed()(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_under_a_temporary_name_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("report.json"), dir.path().join("victim"));
        std::fs::write(&victim, "precious").unwrap();
        let predicted = format!("report.json.{}.tmp", std::process::id());
        std::os::unix::fs::symlink(&victim, dir.path().join(predicted)).unwrap();
        write_json(&path, &serde_json::json!({"a": 1})).unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"a\": 1\n}\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn report_escapes_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        write_json(&path, &["\u{1b}[2J\u{9b}2J\u{202e}"]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.is_ascii(), "{text:?}");
        let read: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, ["\u{1b}[2J\u{9b}2J\u{202e}"]);
    }
}
