//! The record of one run, for programs.

use std::path::Path;

use chitin::{Exit, Jail, Phases, Policy, RejectedTier, SelectedTier, Usage};
use serde::Serialize;

use crate::failure::Failure;

/// What `--report` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The version of Chitin.
    pub chitin: &'static str,
    /// How the sandbox was isolated, or was to be.
    pub tier: String,
    /// By what, and why that; none if none was started.
    pub isolation: Option<Isolation>,
    /// What it was held to.
    pub policy: Option<Governed>,
    /// Program and arguments, lossy where they are not UTF-8.
    pub command: Vec<String>,
    /// What `chitin run` exits with.
    pub exit_code: u8,
    /// How the workload ended, if it did.
    pub exit: Option<Exit>,
    /// What it used.
    pub usage: Option<Usage>,
    /// What failed, if Chitin did.
    pub error: Option<String>,
    /// What the monitor was jailed in.
    pub jail: JailReport,
    /// Where the time went, nanoseconds since the monitor was started.
    pub phases: Phases,
}

/// Whether there was a jail, and what it was like.
#[derive(Debug, Serialize)]
pub struct JailReport {
    /// False with `--no-jail`.
    pub on: bool,
    /// As the monitor reports it when the guest is entered; none before, and without a jail.
    #[serde(flatten)]
    pub closed: Option<Jail>,
}

/// Which policy a run was held to.
#[derive(Debug, Serialize)]
pub struct Governed {
    /// The file.
    pub file: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub digest: String,
    /// Its profile.
    pub profile: &'static str,
    /// What it is for.
    pub plugin: Option<String>,
}

impl Governed {
    /// Names a policy.
    pub fn of(policy: &Policy) -> Governed {
        Governed {
            file: policy.origin.clone(),
            digest: policy.digest.clone(),
            profile: policy.profile.name(),
            plugin: policy.plugin.clone(),
        }
    }
}

/// What a tier is made of here, and why it is that one.
#[derive(Debug, Serialize)]
pub struct Isolation {
    /// The program behind it.
    pub implementation: String,
    /// Its version.
    pub version: String,
    /// Why this one, in a sentence.
    pub why: String,
    /// What the tier would rather be made of, and why each is not it.
    pub short_of: Vec<String>,
    /// What was asked for before it, and what each lacks.
    pub passed_over: Vec<RejectedTier>,
}

impl Isolation {
    /// Of a sandbox's choice.
    pub fn of(chosen: &SelectedTier) -> Isolation {
        Isolation {
            implementation: chosen.capabilities.implementation.clone(),
            version: chosen.capabilities.version.clone(),
            why: chosen.why(),
            short_of: chosen.capabilities.short_of.clone(),
            passed_over: chosen.passed_over.clone(),
        }
    }
}

impl Report {
    /// Writes it as JSON; a former report stays whole until the new one is.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        write_json(path, self)
    }
}

/// Writes a value as indented JSON, by way of a temporary name beside it.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Failure> {
    let failed = |source| Failure::Io { what: format!("write {}", path.display()), source };
    let mut json = serde_json::to_vec_pretty(value).map_err(|error| failed(error.into()))?;
    json.push(b'\n');
    // A device or a pipe, /dev/stdout for one, has no beside.
    if path.exists() && !path.is_file() {
        return std::fs::write(path, json).map_err(failed);
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    std::fs::write(&temporary, json).and_then(|()| std::fs::rename(&temporary, path)).map_err(
        |error| {
            let _ = std::fs::remove_file(&temporary);
            failed(error)
        },
    )
}
