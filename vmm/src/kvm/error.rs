//! The errors of KVM.

use std::io;
use std::path::Path;

use super::API_VERSION;

/// KVM cannot be used, or has refused a request.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "open /dev/kvm: it does not exist: enable virtualization in the firmware (or nested \
         virtualization for this machine) and load `kvm_intel` or `kvm_amd`"
    )]
    Missing,
    /// The user may not open `/dev/kvm`.
    #[error(
        "open /dev/kvm: permission denied: add your user to the group `kvm` (`sudo usermod -aG kvm \
         $USER`, then log in again)"
    )]
    Permission,
    /// A control group of devices forbids `/dev/kvm`, as that of a container does.
    #[error(
        "open /dev/kvm: this container or control group forbids the device: allow it (Docker: \
         `--device /dev/kvm`)"
    )]
    Forbidden,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("open /dev/kvm")]
    Open(#[source] io::Error),
    /// `/dev/kvm` is not KVM, or a version of it that this monitor does not know.
    #[error("/dev/kvm has version {version} of the KVM API, this monitor needs {API_VERSION}")]
    Version { version: i32 },
    /// The kernel is too old, or was built without an option.
    #[error("KVM lacks {0}: Linux 4.12 or newer has it")]
    Lacks(&'static str),
    /// A request has failed.
    #[error("KVM: {operation}")]
    Call { operation: &'static str, source: io::Error },
    /// KVM has set fewer registers than it was given.
    #[error("KVM set {done} of {requested} model-specific registers")]
    Msrs { done: usize, requested: usize },
}

impl KvmError {
    /// Classifies an error of opening `/dev/kvm`.
    pub(crate) fn from_open(error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO if !Path::new("/dev/kvm").exists() => {
                Self::Missing
            }
            libc::EACCES => Self::Permission,
            libc::EPERM => Self::Forbidden,
            _ => Self::Open(error.into()),
        }
    }
}

/// Adds the operation to an error of a KVM call.
pub(super) trait During<T> {
    /// Names the operation that the call belongs to.
    fn during(self, operation: &'static str) -> Result<T, KvmError>;
}

impl<T> During<T> for Result<T, kvm_ioctls::Error> {
    fn during(self, operation: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError::Call { operation, source: error.into() })
    }
}
