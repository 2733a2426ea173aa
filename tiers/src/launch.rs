//! The input of a launch.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use chitin_vmm::VmSpec;

/// Time within which a guest must answer. A cold boot takes a fraction of a second on hardware, and
/// has taken twenty seconds on a loaded, emulated host.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

// The limits of a specification are those of the monitor.
const _: () = assert!(chitin_spec::MAX_VCPUS == chitin_vmm::spec::MAX_VCPUS as u32);
const _: () = assert!(
    chitin_spec::MIN_MEMORY_MIB == chitin_vmm::spec::MIN_MEMORY_MIB
        && chitin_spec::MAX_MEMORY_MIB == chitin_vmm::spec::MAX_MEMORY_MIB
);

/// The specification of a launch.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Size and images. A microVM uses all fields, a container the size only.
    pub vm: VmSpec,
    /// Files of the saved guest, if one is restored. The monitor takes them over.
    pub guest_files: Option<GuestFiles>,
    /// The restored guest was given the files of the policy before it was saved.
    pub has_policy_files: bool,
    /// Maximum number of processes and threads. In a microVM the agent enforces this and
    /// `disk_bytes`.
    pub max_tasks: u32,
    /// Maximum size of all written files.
    pub disk_bytes: Option<u64>,
    /// Read-only copies of the policy. A container needs a mount for each; the agent of a microVM
    /// makes room for them itself.
    pub read_only_paths: Vec<ReadOnlyPath>,
}

/// The files of a saved guest.
#[derive(Debug)]
pub struct GuestFiles {
    /// Memory.
    pub memory: File,
    /// State of devices and vCPUs.
    pub state: File,
    /// Key of the MACs over both.
    pub key: File,
}

/// A copy that the workload can read and not write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOnlyPath {
    /// Path in the sandbox.
    pub path: PathBuf,
    /// The copy is a directory.
    pub directory: bool,
}
