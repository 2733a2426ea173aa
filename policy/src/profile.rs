//! The profiles, as data.
//!
//! A policy names a profile. Keys that the file leaves out take the profile's values. The file can
//! tighten the profile's restrictions (system calls, files, network, credentials), not loosen them.

use std::fmt;
use std::time::Duration;

use chitin_spec::Limits;
use schemars::JsonSchema;
use serde::Deserialize;

/// The name of a profile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Untrusted code without network.
    Restricted,
    /// Untrusted code that needs a few services.
    RestrictedNet,
    /// The settings of a sandbox without a policy.
    #[default]
    Default,
    /// Trusted code that needs more resources.
    Trusted,
}

/// The system calls that a workload may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SyscallFilter {
    /// All except those that no workload needs.
    DefaultAllow,
    /// Only those on a list, each with its reason.
    DefaultDeny,
}

/// The settings of a profile.
#[derive(Debug)]
pub struct ProfileSpec {
    /// Name.
    pub profile: Profile,
    /// Intended use.
    pub purpose: &'static str,
    /// The least strict filter.
    pub syscalls: SyscallFilter,
    /// Only the system and the files of the policy are readable.
    pub files_confined: bool,
    /// Endpoints may be listed.
    pub egress: bool,
    /// Credentials may be delivered in the environment.
    pub env_secrets: bool,
    /// Limits for keys that the file leaves out. A file may raise them.
    pub resources: Limits,
}

/// Enough for a script and the tools that it calls. A fork bomb reaches it at once.
const FEW_TASKS: u32 = 256;

/// Enough for a build with the jobs that eight CPUs take. The agent has the same limit.
const MANY_TASKS: u32 = 4096;

/// The limits of both profiles for untrusted code.
const RESTRICTED_LIMITS: Limits = Limits {
    vcpus: 1,
    memory_mib: 256,
    // A caller that waits for a result has given up by then.
    timeout: Some(Duration::from_secs(300)),
    pids: FEW_TASKS,
    disk_mib: Some(64),
};

/// Every profile.
pub const PROFILES: [ProfileSpec; 4] = [
    ProfileSpec {
        profile: Profile::Restricted,
        purpose: "untrusted code that computes on its input",
        syscalls: SyscallFilter::DefaultDeny,
        files_confined: true,
        egress: false,
        env_secrets: false,
        resources: RESTRICTED_LIMITS,
    },
    ProfileSpec {
        profile: Profile::RestrictedNet,
        purpose: "untrusted code that needs a few services, each listed",
        syscalls: SyscallFilter::DefaultDeny,
        files_confined: true,
        egress: true,
        env_secrets: false,
        resources: RESTRICTED_LIMITS,
    },
    ProfileSpec {
        profile: Profile::Default,
        purpose: "the settings without a policy",
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
        purpose: "trusted code that needs more resources",
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
    /// Returns the settings.
    pub fn spec(self) -> &'static ProfileSpec {
        match self {
            Profile::Restricted => &PROFILES[0],
            Profile::RestrictedNet => &PROFILES[1],
            Profile::Default => &PROFILES[2],
            Profile::Trusted => &PROFILES[3],
        }
    }

    /// Returns the word that a file uses.
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
    /// Returns the word that a file uses.
    pub fn name(self) -> &'static str {
        match self {
            SyscallFilter::DefaultAllow => "default_allow",
            SyscallFilter::DefaultDeny => "default_deny",
        }
    }
}
