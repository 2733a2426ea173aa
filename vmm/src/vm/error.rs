//! Why a microVM could not be made or run.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::arch::x86_64::boot::BootError;
use crate::control::ControlError;
use crate::image::ImageError;
use crate::kernel::KernelError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::spec::SpecError;
use crate::state::StateError;
use crate::virtio::NotQuiescent;

/// A microVM that could not be made, or a host that failed under it.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The specification is out of bounds.
    #[error("specification")]
    Spec(#[from] SpecError),
    /// The kernel cannot be opened.
    #[error("open kernel {}", path.display())]
    OpenKernel {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The root image cannot be opened.
    #[error("open root image {}", path.display())]
    OpenImage {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel cannot be booted.
    #[error("kernel {}", path.display())]
    Kernel {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: KernelError,
    },
    /// The root image cannot be used.
    #[error("root image {}", path.display())]
    Image {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: ImageError,
    },
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// Boot data could not be written.
    #[error("boot data")]
    Boot(#[from] BootError),
    /// Tables could not be written.
    #[error("descriptor and page tables")]
    Tables(#[source] GuestMemoryError),
    /// The command line could not be made.
    #[error("kernel command line")]
    CommandLine(#[source] linux_loader::cmdline::Error),
    /// The host refused something small.
    #[error("{operation}")]
    Host {
        /// What.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The control socket failed, or the host sent something else than was due.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host has sent a request at the wrong time.
    #[error("the request `{request}` is not possible: {reason}")]
    Untimely {
        /// The name of the request.
        request: &'static str,
        /// The reason why it is not possible now.
        reason: &'static str,
    },
    /// A template cannot be used or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The guest cannot be saved now.
    #[error("save the guest")]
    Save(#[from] NotQuiescent),
    /// The event loop failed.
    #[error("event loop")]
    EventLoop(#[source] event_manager::Error),
}

pub(super) fn host(operation: &'static str) -> impl Fn(io::Error) -> MonitorError {
    move |source| MonitorError::Host { operation, source }
}
