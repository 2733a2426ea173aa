use serde::{Deserialize, Serialize};

/// The description of a template: the content of its `template.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The name of the template.
    pub name: String,
    /// The version of Chitin that built it.
    pub chitin: String,
    /// The time of the build, seconds since 1970 UTC.
    pub created: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The warm-up command.
    pub warm_up: Option<String>,
    /// The digest of the policy that it was built under.
    #[serde(default)]
    pub policy: Option<String>,
    /// The size of the memory file on disk, in bytes.
    pub memory_bytes: u64,
}
