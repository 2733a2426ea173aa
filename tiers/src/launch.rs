//! What a tier is given to launch.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use chitin_vmm::VmSpec;

/// A guest that has not said hello by then never will. A cold boot takes a fraction of a second on hardware; on an
/// emulated, loaded host it has been seen to take twenty.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

// What a specification may ask for is what the monitor takes.
const _: () = assert!(chitin_spec::MAX_VCPUS == chitin_vmm::spec::MAX_VCPUS as u32);
const _: () = assert!(
    chitin_spec::MIN_MEMORY_MIB == chitin_vmm::spec::MIN_MEMORY_MIB
        && chitin_spec::MAX_MEMORY_MIB == chitin_vmm::spec::MAX_MEMORY_MIB
);

/// What a tier is given.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Size and images; of a microVM all of it.
    pub spec: VmSpec,
    /// Of a guest that is restored; taken by the monitor.
    pub files: Option<GuestFiles>,
    /// Whether it already keeps the policy.
    pub confined: bool,
    /// Processes and threads at once; of a microVM the agent sees to it, and to the disk.
    pub tasks: u32,
    /// What may be written at most.
    pub disk_bytes: Option<u64>,
    /// What the policy puts where nothing can be written later. The agent of a microVM makes room for it itself.
    pub fixed: Vec<ReadOnlyPath>,
}

/// The files of a saved guest.
#[derive(Debug)]
pub struct GuestFiles {
    /// Its memory.
    pub memory: File,
    /// What its devices and vCPUs were.
    pub state: File,
    /// What both are sealed with.
    pub key: File,
}

/// A copy that the workload may only read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOnlyPath {
    /// Where it will be.
    pub path: PathBuf,
    /// Whether it is a directory.
    pub directory: bool,
}
