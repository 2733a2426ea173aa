//! Checks of the host's configuration, for hosts that run sandboxes of strangers.
//!
//! [`diagnose_host`](crate::doctor::diagnose_host) tells whether a sandbox runs here. These checks
//! tell what weakens its wall: settings of the kernel, of KVM and of the processor that this library
//! cannot change for its user. They read files below `/proc`, `/sys` and `/dev`, and change nothing.

mod advisories;
mod files;
mod rows;

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use self::files::HostFiles;
pub use self::rows::render_document;

/// The judgement of one check, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// The host is as it should be.
    Ok,
    /// The host does not tell.
    Unknown,
    /// The host is weaker than it could be.
    Warning,
    /// A guest, or a program beside it, has a known way through.
    Bad,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Grade::Ok => "ok",
            Grade::Unknown => "unknown",
            Grade::Warning => "warning",
            Grade::Bad => "bad",
        })
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFinding {
    /// The name of the check, a row of `docs/host.md`.
    pub name: String,
    /// The judgement.
    pub grade: Grade,
    /// The file that was read.
    pub source: String,
    /// The content of the file that decided.
    pub found: String,
    /// The effect of a bad setting.
    pub reason: String,
    /// The change that helps. `None` if nothing has to be changed.
    pub remedy: Option<String>,
}

/// Checks this host.
pub fn check_host() -> Vec<HostFinding> {
    check_host_at(Path::new("/"))
}

/// Checks the host whose root directory this is: the fixture of a test, or the host of a container
/// that has it mounted.
///
/// A file that is absent or unreadable is a finding, and not an error.
pub fn check_host_at(root: &Path) -> Vec<HostFinding> {
    let files = HostFiles::new(root);
    let mut findings: Vec<HostFinding> = rows::ROWS.iter().map(|row| row.check(&files)).collect();
    findings.extend(rows::check_vulnerabilities(&files));
    findings
}

#[cfg(test)]
#[path = "host_test.rs"]
mod tests;
