//! The limits of a container, and the sizes of its mounts that follow from them.

use crate::LaunchSpec;

/// The limits of a container on this host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// CPUs of the cgroup's quota.
    pub vcpus: u8,
    /// Memory in bytes.
    pub memory: u64,
    /// Maximum processes and threads of agent and workload together.
    pub tasks: u32,
    /// Maximum bytes of all written files, if less than the memory allows.
    pub disk: Option<u64>,
}

impl Limits {
    pub fn of(spec: &LaunchSpec) -> Limits {
        let memory = spec.vm.memory_bytes();
        let tasks = spec.max_tasks.saturating_add(AGENT_TASKS);
        Limits { vcpus: spec.vm.vcpus, memory, tasks, disk: spec.disk_bytes }
    }
}

/// Tasks of the agent: itself and its concurrent copy jobs.
const AGENT_TASKS: u32 = 8;

/// The directory of credentials in memory, on a tmpfs to which only the agent can write.
pub(crate) const CREDENTIALS: &str = "/run/credentials";

/// The size of all credentials in memory: 64 of at most 64 KiB.
pub(crate) const CREDENTIAL_BYTES: u64 = 4 << 20;

/// A writable directory of the workload, on a tmpfs.
pub(crate) struct Scratch {
    pub path: &'static str,
    pub mode: &'static str,
    pub owner: u32,
    pub bytes: u64,
}

/// Returns the writable directories with their sizes.
///
/// Their pages count as memory of the sandbox. Together they leave a fifth of it, so that a
/// workload that fills them gets ENOSPC and is not killed. A smaller limit on written files is
/// divided instead.
pub(crate) fn scratch_mounts(limits: Limits) -> [Scratch; 3] {
    let bytes = writable_bytes(limits);
    [
        Scratch { path: "/work", mode: "0755", owner: 1000, bytes: bytes / 8 * 5 },
        Scratch { path: "/tmp", mode: "1777", owner: 0, bytes: bytes / 4 },
        Scratch { path: "/dev/shm", mode: "1777", owner: 0, bytes: bytes / 8 },
    ]
}

fn writable_bytes(limits: Limits) -> u64 {
    limits.disk.unwrap_or(u64::MAX).min(limits.memory / 5 * 4)
}

/// Returns the size of each mount for read-only copies. Together they take the fifth that
/// [`scratch_mounts`] leaves; no workload writes to them.
pub(crate) fn read_only_mount_bytes(limits: Limits, mounts: usize) -> u64 {
    writable_bytes(limits) / 4 / u64::try_from(mounts.max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_leaves_memory_for_processes() {
        let memory = 256 << 20;
        let all = |disk| {
            let limits = Limits { vcpus: 1, memory, tasks: 1, disk };
            scratch_mounts(limits).iter().map(|scratch| scratch.bytes).sum::<u64>()
        };
        assert!(all(None) <= memory / 5 * 4);
        let limits = Limits { vcpus: 1, memory, tasks: 1, disk: None };
        assert!(all(None) + 3 * read_only_mount_bytes(limits, 3) <= memory);
        assert_eq!(all(Some(64 << 20)), 64 << 20);
    }
}
