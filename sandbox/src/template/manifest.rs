use serde::{Deserialize, Serialize};

/// What a template is: the content of its `template.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name.
    pub name: String,
    /// The version of Chitin that built it.
    pub chitin: String,
    /// When, seconds since 1970 UTC.
    pub created: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The command that warmed it up.
    pub warm_up: Option<String>,
    /// The digest of the policy it was built under.
    #[serde(default)]
    pub policy: Option<String>,
    /// Bytes that the memory file takes on disk.
    pub memory_bytes: u64,
}
