//! Machine-readable causes of failures.

use serde::{Deserialize, Serialize};

/// The cause of a failure, for programs that react to it. The error text has the details and the
/// remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureCode {
    /// The specification is invalid or cannot be read.
    Spec,
    /// There is no `/dev/kvm`.
    KvmMissing,
    /// The user may not open `/dev/kvm`.
    KvmPermission,
    /// `/dev/kvm` cannot be opened for another reason, or lacks something that a microVM needs.
    KvmUnusable,
    /// KVM has refused a request for the guest.
    Kvm,
    /// The kernel cannot be opened, or is not a kernel that can be booted.
    KernelImage,
    /// The root image cannot be opened, or is not a root image.
    RootImage,
    /// The host does not give the guest its memory.
    Memory,
    /// The template cannot be used or written: build it again.
    Template,
    /// The guest cannot be saved in its present state.
    NotQuiescent,
    /// The jail cannot be set up on this host.
    Jail,
    /// The host has broken the protocol of the control socket, or sent a request at the wrong time.
    Control,
    /// The monitor was killed, or ended without reporting the reason.
    Killed,
    /// The host has refused an operation that every process may usually do.
    Host,
    /// The monitor has failed in a way that only a fault of its own explains.
    Internal,
}
