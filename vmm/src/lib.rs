//! The Chitin monitor: runs one microVM with one vsock channel and one read-only image, and no other device.
//!
//! Minimal means a minimal attack surface: there is no PCI, no ACPI, no firmware, no network card and no shared file system,
//! and what is not there cannot be attacked. See [`Monitor`] for how to run one, and [`probe`] for whether this host can.

pub mod arch;
pub mod bus;
pub mod console;
pub mod control;
mod error_chain;
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
pub use error_chain::{error_chain, printable};
pub use spec::{SpecError, VmSpec};
pub use vm::{End, Ended, Monitor, MonitorBuilder, MonitorError, Stopper, VmResources};
