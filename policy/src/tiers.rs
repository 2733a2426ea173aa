//! The enforcement of each field on each tier.
//!
//! Each field is enforced or refused on each tier. The match has no wildcard, so that a new field
//! or tier needs a decision here.

use chitin_spec::TierKind;

use super::{Policy, SyscallFilter};

/// A field of the file that must be enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `image`
    Image,
    /// `hardening.strip_agent_capabilities`
    Capabilities,
    /// `hardening.readonly_root_filesystem`
    ReadonlyRoot,
    /// `hardening.private_memory`
    PrivateMemory,
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

/// The treatment of a field on a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enforced by this mechanism.
    Enforced(&'static str),
    /// A run is refused for this reason.
    Refused(&'static str),
}

impl Field {
    /// All fields, in the order of the file.
    pub const ALL: [Field; 14] = [
        Field::Image,
        Field::Capabilities,
        Field::ReadonlyRoot,
        Field::PrivateMemory,
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

    /// Returns the path of the key in the file.
    pub fn name(self) -> &'static str {
        match self {
            Field::Image => "image",
            Field::Capabilities => "hardening.strip_agent_capabilities",
            Field::ReadonlyRoot => "hardening.readonly_root_filesystem",
            Field::PrivateMemory => "hardening.private_memory",
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
    /// Returns the treatment of a field of this policy on a tier, including its profile's part.
    pub fn verdict(&self, field: Field, tier: TierKind) -> Verdict {
        match tier {
            TierKind::Ironclaw => Verdict::Enforced(self.microvm_mechanism(field)),
            TierKind::Nanoclaw | TierKind::Nemoclaw
                if field == Field::PrivateMemory && self.private_memory =>
            {
                Verdict::Refused(
                    "the containers of a host share the pages of their files: choose the tier \
                     ironclaw",
                )
            }
            TierKind::Nanoclaw | TierKind::Nemoclaw => {
                Verdict::Enforced(self.container_mechanism(field))
            }
        }
    }

    fn microvm_mechanism(&self, field: Field) -> &'static str {
        match field {
            Field::Image => "the guest's root, read-only",
            Field::PrivateMemory if self.private_memory => {
                "kernel, root image and template are copied for this microVM"
            }
            Field::PrivateMemory => "not requested",
            Field::Filesystem if self.files_confined => {
                "copies, and the guest kernel's Landlock for every other file"
            }
            Field::Filesystem => "no file of the host is in the guest",
            Field::Egress if !self.egress.is_empty() => {
                "the guest has no network interface but loopback; a broker on this host dials the \
                 listed endpoints"
            }
            Field::Egress => "the guest has no network interface but loopback",
            Field::Vcpus => "the size of the microVM",
            Field::Memory => "the size of the microVM",
            Field::Timeout => "this host ends the microVM",
            Field::Pids => "a cgroup of the guest",
            Field::Disk => "the size of the one tmpfs that takes all writes",
            Field::Capabilities
            | Field::ReadonlyRoot
            | Field::CredentialSource
            | Field::SyscallFilter
            | Field::Secrets => self.agent_mechanism(field),
        }
    }

    fn container_mechanism(&self, field: Field) -> &'static str {
        match field {
            Field::Image => "the root archive next to the image, read-only",
            Field::PrivateMemory => "not requested",
            Field::Filesystem if self.files_confined => {
                "copies, read-only ones in a directory that the image does not have, and the \
                 kernel's Landlock for every other file: without Landlock, as under gVisor, the \
                 start is refused"
            }
            Field::Filesystem => "no file of the host is in the container",
            Field::Egress if !self.egress.is_empty() => {
                "the container's network has loopback only; a broker on this host dials the listed \
                 endpoints"
            }
            Field::Egress => "the container's network has loopback only",
            Field::Vcpus => "a quota of the container's cgroup",
            Field::Memory => "the container's cgroup",
            Field::Timeout => "this host ends the container",
            Field::Pids => "the container's cgroup; under gVisor, a cgroup of its kernel",
            Field::Disk => "the sizes of the three tmpfs that take all writes",
            Field::Capabilities
            | Field::ReadonlyRoot
            | Field::CredentialSource
            | Field::SyscallFilter
            | Field::Secrets => self.agent_mechanism(field),
        }
    }

    /// Returns the mechanism of a field that the agent enforces in the same way on every tier.
    fn agent_mechanism(&self, field: Field) -> &'static str {
        match field {
            Field::Capabilities => {
                "the agent drops all but net bind, also from the bounding set, before the workload"
            }
            Field::ReadonlyRoot => {
                "the workload's root is mounted read-only, and the workload cannot mount"
            }
            Field::CredentialSource if self.credential_source.is_some() => {
                "this host logs in to Vault; the login never enters, and ends with the sandbox"
            }
            Field::CredentialSource => "not used",
            Field::SyscallFilter => match self.syscalls {
                SyscallFilter::DefaultDeny => "seccomp: calls that are not listed fail with EPERM",
                SyscallFilter::DefaultAllow => {
                    "seccomp: calls that no workload needs fail with ENOSYS"
                }
            },
            _ => {
                "delivered in memory after the start; not in the image, command line or a template"
            }
        }
    }
}
