//! The Chitin monitor: runs one microVM with one vsock channel and one read-only image, and no
//! other device.
//!
//! Fewer devices mean fewer ways to attack: there is no PCI, no ACPI, no firmware, no network card
//! and no shared file system. [`Monitor`] runs a microVM; [`probe`] finds out if this host can.
//!
//! | module | content |
//! |---|---|
//! | [`vm`] | one microVM: boot, restore, run, snapshot; the event loop and the vCPUs |
//! | [`virtio`], [`console`], [`bus`] | devices, and the address spaces they are reached in |
//! | [`kvm`], [`arch`], [`memory`] | KVM, x86-64, guest memory |
//! | [`kernel`], [`image`], [`ramoops`] | kernel, root image, and the log that a guest leaves |
//! | [`state`] | the saved state of a microVM |
//! | [`spec`], [`control`] | the specification, and the control socket to the host |
//! | [`jail`], [`seccomp`], [`signals`] | the process `chitin-vmm` and its confinement |

pub mod arch;
pub mod bus;
pub mod console;
pub mod control;
mod host_error;
pub mod image;
pub mod jail;
pub mod kernel;
pub mod kvm;
pub mod memory;
pub mod probe;
pub mod ramoops;
pub mod seccomp;
pub mod signals;
pub mod spec;
pub mod state;
pub mod virtio;
pub mod vm;

pub use control::{EndReason, Event, FailureCode, Request};
pub use host_error::HostError;
pub use spec::{SpecError, VmSpec};
pub use vm::{End, Ended, Monitor, MonitorBuilder, MonitorError, Stopper, VmResources};
