//! Who keeps which field on which tier. Each field is kept or refused on each tier; the match has no wildcard, so a new field
//! or tier is a decision here.

use chitin_spec::TierKind;

use super::{Policy, SyscallFilter};

/// A field of the file that somebody has to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `image`
    Image,
    /// `hardening.strip_agent_capabilities`
    Capabilities,
    /// `hardening.readonly_root_filesystem`
    ReadonlyRoot,
    /// `hardening.credential_source`
    CredentialSource,
    /// `sandbox.filesystem`
    Filesystem,
    /// `sandbox.network.allowed_egress`
    Egress,
    /// `sandbox.syscall_filter`
    SyscallFilter,
    /// `resources.vcpus`
    Vcpus,
    /// `resources.memory_mib`
    Memory,
    /// `resources.timeout`
    Timeout,
    /// `resources.pids`
    Pids,
    /// `resources.disk_mib`
    Disk,
    /// `secrets`
    Secrets,
}

/// What becomes of a field on a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept; by what.
    Kept(&'static str),
    /// A run is refused; why.
    Refused(&'static str),
}

impl Field {
    /// All of them, in the order of the file.
    pub const ALL: [Field; 13] = [
        Field::Image,
        Field::Capabilities,
        Field::ReadonlyRoot,
        Field::CredentialSource,
        Field::Filesystem,
        Field::Egress,
        Field::SyscallFilter,
        Field::Vcpus,
        Field::Memory,
        Field::Timeout,
        Field::Pids,
        Field::Disk,
        Field::Secrets,
    ];

    /// Its keys in the file.
    pub fn name(self) -> &'static str {
        match self {
            Field::Image => "image",
            Field::Capabilities => "hardening.strip_agent_capabilities",
            Field::ReadonlyRoot => "hardening.readonly_root_filesystem",
            Field::CredentialSource => "hardening.credential_source",
            Field::Filesystem => "sandbox.filesystem",
            Field::Egress => "sandbox.network.allowed_egress",
            Field::SyscallFilter => "sandbox.syscall_filter",
            Field::Vcpus => "resources.vcpus",
            Field::Memory => "resources.memory_mib",
            Field::Timeout => "resources.timeout",
            Field::Pids => "resources.pids",
            Field::Disk => "resources.disk_mib",
            Field::Secrets => "secrets",
        }
    }
}

impl Policy {
    /// What becomes of a field of this policy on a tier, its profile's part included.
    pub fn verdict(&self, field: Field, tier: TierKind) -> Verdict {
        match tier {
            TierKind::Ironclaw => Verdict::Kept(self.microvm(field)),
            TierKind::Nanoclaw | TierKind::Nemoclaw => Verdict::Kept(self.container(field)),
        }
    }

    fn microvm(&self, field: Field) -> &'static str {
        match field {
            Field::Image => "the guest's root, read-only",
            Field::Filesystem if self.files_confined => {
                "copies, and the guest kernel's Landlock for all the rest"
            }
            Field::Filesystem => "nothing of the host is in the guest",
            Field::Egress if !self.egress.is_empty() => {
                "the guest has no network interface but loopback; a broker on this host dials what is listed"
            }
            Field::Egress => "the guest has no network interface but loopback",
            Field::Vcpus => "the microVM has no more",
            Field::Memory => "the microVM has no more",
            Field::Timeout => "this host ends the microVM",
            Field::Pids => "a cgroup of the guest",
            Field::Disk => "the size of the one tmpfs that takes all writes",
            Field::Capabilities
            | Field::ReadonlyRoot
            | Field::CredentialSource
            | Field::SyscallFilter
            | Field::Secrets => self.agent(field),
        }
    }

    fn container(&self, field: Field) -> &'static str {
        match field {
            Field::Image => "the archive of the root that lies beside the image, read-only",
            Field::Filesystem if self.files_confined => {
                "copies, those that are only read in a directory that the image does not have; and Landlock of the kernel below for \
                 all the rest: without it, as under gVisor, the start is refused"
            }
            Field::Filesystem => "nothing of the host is in the container",
            Field::Egress if !self.egress.is_empty() => {
                "the container's network has loopback alone; a broker on this host dials what is listed"
            }
            Field::Egress => "the container's network has loopback alone",
            Field::Vcpus => "a quota of the container's cgroup",
            Field::Memory => "the container's cgroup",
            Field::Timeout => "this host ends the container",
            Field::Pids => "the container's cgroup; in gVisor, one of its own kernel's",
            Field::Disk => "the sizes of the three tmpfs that take all writes",
            Field::Capabilities
            | Field::ReadonlyRoot
            | Field::CredentialSource
            | Field::SyscallFilter
            | Field::Secrets => self.agent(field),
        }
    }

    /// What the agent sees to, the same way everywhere.
    fn agent(&self, field: Field) -> &'static str {
        match field {
            Field::Capabilities => {
                "the agent drops all but net bind, also from the bounding set, before the workload starts"
            }
            Field::ReadonlyRoot => {
                "the workload's root is mounted read-only, and it has no right to mount"
            }
            Field::CredentialSource if self.credential_source.is_some() => {
                "this host logs in to the vault; the login never enters, and ends with the sandbox"
            }
            Field::CredentialSource => "there is none",
            Field::SyscallFilter => match self.syscalls {
                SyscallFilter::DefaultDeny => "seccomp: what is not listed fails with EPERM",
                SyscallFilter::DefaultAllow => "seccomp: what no workload needs fails with ENOSYS",
            },
            _ => {
                "handed over after the start, in memory; not in the image, the command line or a template"
            }
        }
    }
}
