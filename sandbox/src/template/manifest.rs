use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// The description of a template, as it is sealed.
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
    pub policy: Option<String>,
    /// The size of the memory file on disk, in bytes.
    pub memory_bytes: u64,
    /// The version of Chitin and the identity of the root image that a copy needs.
    pub binding: String,
}

/// The content of `template.json`: the manifest, and the identity of the files that belong to it.
/// The seal covers every byte of it, so that it is parsed only after it was verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SealedManifest {
    pub manifest: Manifest,
    pub memory: FileIdentity,
    /// The MAC at the end of the state file, which covers the rest of it.
    pub state_mac: String,
}

/// The identity of a file that is too large to be hashed at every start. Its `ctime` cannot be set
/// by any process, so that no change leaves it as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for FileIdentity {
    fn from(metadata: &Metadata) -> FileIdentity {
        FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
