//! One microVM, from files to its end.
//!
//! ```text
//!                  ┌── boot ───┐
//!  VmResources ────┤           ├───▶ MicroVm ───▶ running ────────────▶ draining ──────▶ Ended
//!   open files     └─ restore ─┘     memory,      vCPU threads, and     the guest ended  end and
//!                   named steps      devices,     the event loop on     itself: its last kernel
//!                   in this order    vCPUs        the VMM thread        bytes are        log
//!                                                    │                  delivered          ▲
//!                                                    ├── stopped, fault, KVM error ────────┤
//!                                                    └── request: Snapshotter, template ───┘
//! ```
//!
//! The VMM thread, which is the one that calls [`Monitor::run`], serves the devices; each vCPU has
//! a thread. They share the devices' registers, with one lock for each device, and nothing else: a
//! vCPU that changes what the VMM thread serves sends it a request.
//!
//! | step | files |
//! |---|---|
//! | open the files | `resources.rs` |
//! | make the microVM | `boot.rs` or `restore.rs`; their common steps: `init.rs`, `devices.rs` |
//! | run it | `run.rs`, `vcpu_threads.rs`, `vcpu.rs`, `event_loop.rs`, `device_worker.rs` |
//! | save it | `snapshot.rs` |

mod boot;
mod builder;
mod device_requests;
mod device_worker;
mod devices;
mod end;
mod error;
mod event_loop;
mod eventfd;
mod init;
pub(crate) mod kick;
mod loop_signals;
mod microvm;
mod resources;
mod restore;
mod run;
#[cfg(feature = "seccomp-tests")]
mod seccomp_test_port;
mod snapshot;
mod start_barrier;
mod stopper;
mod vcpu;
mod vcpu_events;
mod vcpu_threads;

use std::os::unix::net::UnixStream;

pub use builder::MonitorBuilder;
pub use end::{End, Ended};
pub use error::MonitorError;
pub use resources::VmResources;
pub use stopper::Stopper;

use event_loop::HostInterface;
use microvm::MicroVm;
use restore::Restored;
use run::Run;

use crate::HostError;

/// A microVM that is ready to run.
///
/// ```no_run
/// use chitin_vmm::{Monitor, VmSpec};
///
/// let (channel, _ours) = std::os::unix::net::UnixStream::pair()?;
/// let monitor = Monitor::builder()
///     .spec(VmSpec::new("target/artifacts/vmlinux", "target/artifacts/root.img"))
///     .channel(channel)
///     .build()?;
/// let stopper = monitor.stopper(); // ends the guest from any thread
/// let ended = monitor.run()?;
/// println!("{:?}\n{}", ended.end.reason, ended.log);
/// # drop(stopper);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Monitor {
    microvm: MicroVm,
    /// The saved state of a restored guest, of which the devices are restored when it runs.
    restored: Option<Restored>,
    host: HostInterface,
    /// If set, the system calls of all threads are filtered.
    filters: bool,
}

impl Monitor {
    /// Starts with nothing.
    pub fn builder() -> MonitorBuilder {
        MonitorBuilder::default()
    }

    /// Returns a handle that ends the guest from any thread.
    pub fn stopper(&self) -> Stopper {
        self.host.stopper.clone()
    }

    /// Gives a prepared guest its channel.
    ///
    /// # Errors
    /// The channel cannot be used, or the guest has one already.
    pub fn attach(&mut self, channel: UnixStream) -> Result<(), MonitorError> {
        self.microvm.attach_channel(channel)
    }

    /// Runs the guest to its end, on this thread and one for each vCPU. A prepared guest waits
    /// until the host sends [`go`](crate::control::Request::Go).
    ///
    /// # Errors
    /// The host refuses a thread or a descriptor, or has sent a request that is not possible. The
    /// end of the guest itself is not an error but an [`Ended`].
    pub fn run(self) -> Result<Ended, MonitorError> {
        kick::install_kick_handler()
            .map_err(HostError::during("install the signal handler of vCPUs"))?;
        Run::new(self.microvm, self.restored, self.host, self.filters)?.run_to_end()
    }
}
