//! The profiles: data. A policy names one; what it does not say itself is as the profile says, and the profile's locks
//! (system calls, files, network, credentials) can be tightened by the file and not loosened.

use std::fmt;
use std::time::Duration;

use chitin_spec::Limits;
use schemars::JsonSchema;
use serde::Deserialize;

/// A profile's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Code of strangers that computes: no network.
    Restricted,
    /// Code of strangers that needs a few services.
    RestrictedNet,
    /// What holds without a policy.
    #[default]
    Default,
    /// Code of one's own, which needs room.
    Trusted,
}

/// Which system calls a workload may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SyscallFilter {
    /// All but those that no workload needs.
    DefaultAllow,
    /// Those on a list, each with its reason, and no others.
    DefaultDeny,
}

/// What a profile says.
#[derive(Debug)]
pub struct ProfileSpec {
    /// Its name.
    pub profile: Profile,
    /// Who it is for.
    pub purpose: &'static str,
    /// The loosest filter.
    pub syscalls: SyscallFilter,
    /// Whether only the system and what the policy lists can be read.
    pub files_confined: bool,
    /// Whether endpoints may be listed at all.
    pub egress: bool,
    /// Whether a credential may be put into the environment.
    pub env_secrets: bool,
    /// What the sandbox gets where the file does not say: more is a matter of saying so.
    pub resources: Limits,
}

/// Ample for a script and the tools it calls; a fork bomb is over at once.
const FEW_TASKS: u32 = 256;

/// Ample for a build with as many jobs as eight CPUs take, and the agent's own limit.
const MANY_TASKS: u32 = 4096;

/// Every profile.
pub const PROFILES: [ProfileSpec; 4] = [
    ProfileSpec {
        profile: Profile::Restricted,
        purpose: "code of strangers that computes on what it is given",
        syscalls: SyscallFilter::DefaultDeny,
        files_confined: true,
        egress: false,
        env_secrets: false,
        resources: Limits {
            vcpus: 1,
            memory_mib: 256,
            // One who waits for a result has given up by then.
            timeout: Some(Duration::from_secs(300)),
            pids: FEW_TASKS,
            disk_mib: Some(64),
        },
    },
    ProfileSpec {
        profile: Profile::RestrictedNet,
        purpose: "code of strangers that needs a few services, each by name",
        syscalls: SyscallFilter::DefaultDeny,
        files_confined: true,
        egress: true,
        env_secrets: false,
        resources: Limits {
            vcpus: 1,
            memory_mib: 256,
            timeout: Some(Duration::from_secs(300)),
            pids: FEW_TASKS,
            disk_mib: Some(64),
        },
    },
    ProfileSpec {
        profile: Profile::Default,
        purpose: "what also holds without a policy",
        syscalls: SyscallFilter::DefaultAllow,
        files_confined: false,
        egress: true,
        env_secrets: true,
        resources: Limits {
            vcpus: 1,
            memory_mib: 256,
            timeout: None,
            pids: MANY_TASKS,
            disk_mib: None,
        },
    },
    ProfileSpec {
        profile: Profile::Trusted,
        purpose: "code of one's own, which needs room",
        syscalls: SyscallFilter::DefaultAllow,
        files_confined: false,
        egress: true,
        env_secrets: true,
        resources: Limits {
            vcpus: 2,
            memory_mib: 1024,
            timeout: None,
            pids: MANY_TASKS,
            disk_mib: None,
        },
    },
];

impl Profile {
    /// What it says.
    pub fn spec(self) -> &'static ProfileSpec {
        match self {
            Profile::Restricted => &PROFILES[0],
            Profile::RestrictedNet => &PROFILES[1],
            Profile::Default => &PROFILES[2],
            Profile::Trusted => &PROFILES[3],
        }
    }

    /// Its name in a file.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Restricted => "restricted",
            Profile::RestrictedNet => "restricted-net",
            Profile::Default => "default",
            Profile::Trusted => "trusted",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl SyscallFilter {
    /// Its name in a file.
    pub fn name(self) -> &'static str {
        match self {
            SyscallFilter::DefaultAllow => "default_allow",
            SyscallFilter::DefaultDeny => "default_deny",
        }
    }
}
