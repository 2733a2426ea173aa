//! The errors of a monitor.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::HostError;
use crate::arch::x86_64::boot::BootError;
use crate::control::{ControlError, FailureCode};
use crate::image::ImageError;
use crate::kernel::KernelError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::memory::memory_file::MemoryFileError;
use crate::memory::recorder::RecordError;
use crate::spec::SpecError;
use crate::state::StateError;
use crate::virtio::NotQuiescent;

/// The microVM could not be made, or the host has failed under it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum MonitorError {
    /// The specification is invalid.
    #[error("specification")]
    Spec(#[from] SpecError),
    /// The kernel cannot be opened.
    #[error("open kernel {}", path.display())]
    OpenKernel { path: PathBuf, source: io::Error },
    /// The kernel cannot be booted.
    #[error("kernel {}", path.display())]
    Kernel { path: PathBuf, source: KernelError },
    /// The root image cannot be opened.
    #[error("open root image {}", path.display())]
    OpenImage { path: PathBuf, source: io::Error },
    /// The root image cannot be used.
    #[error("root image {}", path.display())]
    Image { path: PathBuf, source: ImageError },
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host does not give the guest its memory.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// The boot parameters cannot be written.
    #[error("boot parameters")]
    Boot(#[from] BootError),
    /// The descriptor table and the page tables cannot be written.
    #[error("descriptor and page tables")]
    Tables(#[source] GuestMemoryError),
    /// The kernel command line cannot be made.
    #[error("kernel command line")]
    CommandLine(#[source] linux_loader::cmdline::Error),
    /// The host has refused an operation that every process may usually do.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The control socket has failed, or the host has broken its protocol.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host has sent a request at the wrong time.
    #[error("the request `{request}` is not possible: {reason}")]
    Untimely { request: &'static str, reason: &'static str },
    /// The state of the template cannot be used or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The memory file of the template cannot be used or written.
    #[error(transparent)]
    MemoryFile(#[from] MemoryFileError),
    /// The pages that the guest uses cannot be recorded.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The guest cannot be saved in its present state.
    #[error("save the guest")]
    Save(#[from] NotQuiescent),
    /// The event loop has failed.
    #[error("event loop")]
    EventLoop(#[source] event_manager::Error),
}

impl MonitorError {
    /// Classifies the error for programs. There is no wildcard, so that a new variant needs a
    /// decision.
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Spec(_) => FailureCode::Spec,
            Self::OpenKernel { .. } | Self::Kernel { .. } => FailureCode::KernelImage,
            Self::OpenImage { .. } | Self::Image { .. } => FailureCode::RootImage,
            Self::Kvm(error) => kvm_code(error),
            Self::Memory(_) => FailureCode::Memory,
            Self::Boot(error) => boot_code(error),
            Self::Tables(_) | Self::CommandLine(_) => FailureCode::Internal,
            Self::Host(_) | Self::EventLoop(_) => FailureCode::Host,
            Self::Control(error) => error.code(),
            Self::Untimely { .. } => FailureCode::Control,
            Self::State(_) | Self::MemoryFile(_) | Self::Record(_) => FailureCode::Template,
            Self::Save(_) => FailureCode::NotQuiescent,
        }
    }
}

fn kvm_code(error: &KvmError) -> FailureCode {
    match error {
        KvmError::Missing => FailureCode::KvmMissing,
        KvmError::Permission | KvmError::Forbidden => FailureCode::KvmPermission,
        KvmError::Open(_) | KvmError::Version { .. } | KvmError::Lacks(_) => {
            FailureCode::KvmUnusable
        }
        KvmError::Call { .. } | KvmError::Msrs { .. } => FailureCode::Kvm,
    }
}

fn boot_code(error: &BootError) -> FailureCode {
    match error {
        BootError::Entropy(_) => FailureCode::Host,
        BootError::Write { .. } | BootError::Parameters { .. } | BootError::CommandLine { .. } => {
            FailureCode::Internal
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_permission_error_has_its_code() {
        for errno in [libc::EACCES, libc::EPERM] {
            let error = MonitorError::from(KvmError::from_open(kvm_ioctls::Error::new(errno)));
            assert_eq!(error.code(), FailureCode::KvmPermission);
        }
        let busy = MonitorError::from(KvmError::from_open(kvm_ioctls::Error::new(libc::EBUSY)));
        assert_eq!(busy.code(), FailureCode::KvmUnusable);
    }
}
